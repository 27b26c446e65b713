"""Images that a caller hands over, in any form, as RGB pictures."""

from __future__ import annotations

import hashlib
import io
import operator
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from pose2id.io.checks import as_numpy, checked_choice, dense
from pose2id.io.decoding import decoded

COLORS = ("rgb", "bgr")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_BITS_PER_SAMPLE = 258  # a tag of TIFF
_TURNS = {  # EXIF's orientation to what makes a picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def checked_images(images: Any, name: str = "images", *, colors: str = "rgb") -> Any:
    """A non-empty sequence of images, or one array of them, whose files are there.

    With `colors` "bgr" arrays and tensors become RGB when they are asked for.
    """
    checked_choice(colors, "colors", COLORS)
    single = isinstance(images, (str, bytes, os.PathLike, Image.Image, Mapping))
    single |= isinstance(images, (np.ndarray, Tensor)) and images.ndim != 4
    if single or not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise TypeError(f"{name} must be a sequence of images, got {_given(images)}. Wrap it in [] or list().")
    if len(images) == 0:
        raise ValueError(f"{name} must hold at least one image, got none.")
    if isinstance(images, (list, tuple)):  # a lazy sequence would decode each image here
        # Before hours of extraction, not in the middle of them.
        for i, item in enumerate(images):
            _check_pixels(item, f"{name}[{i}]")
            if isinstance(item, (str, os.PathLike)) and not Path(item).is_file():
                path = os.fspath(item)
                given = f"{path} is a folder; list its files" if Path(item).is_dir() else f"there is no file {path}"
                raise ValueError(f"{name}[{i}] cannot be read: {given}.")
    return images if colors == "rgb" else _Reversed(images, name)


class _Reversed:
    """Images whose arrays and tensors come with their colours in reverse, one by one, as copies."""

    def __init__(self, images: Any, name: str) -> None:
        self._images, self._name = images, name

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return _Reversed(self._images[place], self._name)
        i = operator.index(place)
        return self._reversed(self._images[i], i)

    def __iter__(self) -> Iterator[Any]:
        return (self._reversed(item, i) for i, item in enumerate(self._images))

    def _reversed(self, item: Any, i: int) -> Any:
        if isinstance(item, (str, os.PathLike, Image.Image)):
            return item  # they know their colours
        name = f"{self._name}[{i}]"
        dense(item, name)
        _check_pixels(item, name)
        axis = _colour_axis(item, name)
        if axis is None:
            return item
        # No view: torch takes no arrays with negative strides.
        return item.flip(axis) if isinstance(item, Tensor) else np.flip(item, axis).copy()


def load_image(item: Any, name: str) -> Image.Image:
    """A path, PIL picture, (H, W, 3) uint8 RGB array or (3, H, W) float tensor in [0, 1] as an RGB picture.

    What is grey gets three equal channels: pictures, and arrays and tensors (H, W), (H, W, 1) uint8 or (1, H, W) float.
    """
    dense(item, name)
    _check_pixels(item, name)
    if isinstance(item, (str, os.PathLike)):
        path = os.fspath(item)
        return decoded(path, lambda: _read(path, name, path))
    if isinstance(item, Image.Image):
        return _as_rgb(item, name, _stored_mode(item))
    axis = _colour_axis(item, name)
    array = as_numpy(item) if isinstance(item, Tensor) else item
    if array.dtype != np.uint8:
        if not (array.min() >= 0 and array.max() <= 1):  # NaN fails too
            given = f"values in [{array.min():g}, {array.max():g}]"
            raise ValueError(f"{name} must be a float image in [0, 1], got {given}. Divide by 255.")
        array = np.rint(array * 255).astype(np.uint8)
    channels = array[..., None] if axis is None else np.moveaxis(array, axis, 2)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(channels, (*channels.shape[:2], 3))))


def _colour_axis(item: Any, name: str) -> int | None:
    """2 of an (H, W, C) uint8 array or tensor, 0 of (C, H, W) floats, C being 3 or 1 for grey; None of grey (H, W)."""
    given = _given(item)
    if isinstance(item, (np.ndarray, Tensor)) and item.ndim in (2, 3):
        if isinstance(item, Tensor):
            whole, floating = item.dtype == torch.uint8, item.is_floating_point()
        else:
            whole, floating = item.dtype == np.uint8, item.dtype.kind == "f"
        if item.ndim == 2 and (whole or floating):
            return None
        if whole and item.shape[2] in (1, 3):
            return 2
        if floating and item.shape[0] in (1, 3):
            return 0
        given += f", {item.dtype}"
    wanted = "a path, a PIL picture, an (H, W, 3) uint8 RGB array or a (3, H, W) float tensor in [0, 1]"
    raise TypeError(f"{name} must be {wanted}, or grey (H, W), got {given}.")


def content_key(picture: Image.Image) -> str:
    """The hexadecimal SHA-256 of a picture's size and RGB pixels: equal for equal pictures, wherever they come from."""
    digest = hashlib.sha256(f"{picture.width}x{picture.height}".encode())
    digest.update(picture.convert("RGB").tobytes())
    return digest.hexdigest()


def image_files(folder: Path) -> Iterator[tuple[str, str]]:
    """(relative folder, path) of all image files below a folder: strings, since there may be a million.

    Hidden files and folders are left out. Links are followed, and each real file comes once: under its own name, if
    that is below the folder.
    """
    folders, linked = deque([os.fspath(folder)]), []
    seen: set[str] = set()  # real folders, and real files elsewhere
    while folders:
        for parent, inner, names in os.walk(folders.popleft()):
            real = os.path.realpath(parent)
            inner[:] = () if real in seen else sorted(name for name in inner if not name.startswith("."))
            if real in seen:
                continue
            seen.add(real)
            # After all that is no link: they may lead back to it.
            folders += (path for name in inner if os.path.islink(path := os.path.join(parent, name)))
            relative = Path(parent).relative_to(folder).as_posix()
            for name in sorted(filter(_is_listed, names)):
                file = "" if relative == "." else relative, os.path.join(parent, name)
                if os.path.islink(file[1]):
                    linked.append(file)
                else:
                    yield file
    for file in linked:
        parent, name = os.path.split(real := os.path.realpath(file[1]))
        if real not in seen and not (parent in seen and _is_listed(name)):
            seen.add(real)
            yield file


def _is_listed(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _check_pixels(item: Any, name: str) -> None:
    shape = item.size[::-1] if isinstance(item, Image.Image) else tuple(getattr(item, "shape", ()))
    if 0 in shape:
        raise ValueError(f"{name} must hold pixels, got an empty image of shape {shape}. Leave empty crops out.")


def image_from_bytes(content: bytes, name: str, path: str | os.PathLike[str] = "") -> Image.Image:
    """The RGB picture of a file's bytes, the same as `load_image` reads from the file, which errors name."""
    return _read(io.BytesIO(content), name, os.fspath(path) or f"{len(content)} bytes")


def _read(file: Any, name: str, where: str) -> Image.Image:
    try:
        with Image.open(file) as picture:
            mode = _stored_mode(picture)
            picture.load()
            picture.getexif()
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error).replace(repr(file), where)
        raise ValueError(f"{name} cannot be read: {where} ({reason}).") from error
    return _as_rgb(picture, f"{name} ({where})", mode)


def _stored_mode(picture: Image.Image) -> str:
    """Pillow's mode; "RGB;16" for colours of 16 bits, which Pillow cuts to 8. A loaded PNG no longer tells."""
    deep = any(re.search(";16[BLN]", str(tile[3])) for tile in getattr(picture, "tile", ()))
    # Of a TIFF with a plane for each colour Pillow keeps the lower 8 bits, without a word in its tiles.
    deep |= max(getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, ()), default=0) > 8
    return f"{picture.mode};16" if deep and not picture.mode.startswith("I") else picture.mode


def _as_rgb(picture: Image.Image, name: str, mode: str) -> Image.Image:
    if mode.startswith(("I", "F")) or mode.endswith(";16"):
        raise ValueError(f"{name} must have 8 bits a channel, got mode {mode!r}. Scale it to 0..255.")
    # Not ImageOps.exif_transpose, which writes the other fields anew, and fails where a camera left nonsense in them.
    orientation: Any = picture.getexif().get(ExifTags.Base.Orientation)
    turn = _TURNS.get(orientation)
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")  # else Pillow warns of some palettes
    upright = (picture if turn is None else picture.transpose(turn)).convert("RGB")
    upright.info.clear()  # of the orientation, too, or the picture could be turned again
    return upright


def _given(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return type(value).__name__ + shape
