"""From images to features through the user's own model, which is called as it is and left as it was.

What reaches the model is a fresh float batch (B, 3, H, W) on its own device, or the images themselves for extractors
that read paths. Mean and std are never guessed: the user passes a transform, or names a preset.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm.auto import tqdm

from pose2id._inputs import checked_choice, checked_count

PARTS_NDIM = 3
_IMAGE_NDIM = 3
_BATCH_NDIM = 4
INPUTS = ("batch", "images")
_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Extractor(Protocol):
    """Any callable that maps images to features; a torch module is one.

    It gets a float tensor (B, 3, H, W), or with `inputs="images"` a list of paths or (H, W, 3) uint8 RGB arrays, and
    the batch's share of the side inputs. It returns features (B, D) or parts (B, P, D), as a tensor or numpy array, as
    the first element of a tuple, or under "features" in a dict. Visibility (B, P) of parts may follow in the tuple, or
    stand under "visibility".
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Features of a batch of images, the only positional argument, with the side inputs as keywords."""


@dataclass(frozen=True)
class Preprocess:
    """A transform: RGB picture to float32 tensor (3, H, W), resized, scaled to [0, 1], then (x - mean) / std.

    Attributes:
        size: (height, width) in pixels.
        mean: per channel, RGB order, of values in [0, 1].
        std: per channel, RGB order.
        interpolation: "bilinear", "bicubic" or "lanczos", antialiased as Pillow does it.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise ValueError(
                "Preprocess needs size (height, width), and mean and std of 3 values with no std of 0, got "
                f"size={self.size}, mean={self.mean}, std={self.std}."
            )
        for side in self.size:
            checked_count(side, "size")
        checked_choice(self.interpolation, "interpolation", tuple(_RESAMPLING))

    def __call__(self, image: Image.Image) -> Tensor:
        """The (3, H, W) float32 tensor of an RGB picture."""
        height, width = self.size
        resized = image.convert("RGB").resize((width, height), _RESAMPLING[self.interpolation])
        pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


_HALF = (0.5, 0.5, 0.5)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

PRESETS: Mapping[str, Preprocess] = {
    "transreid": Preprocess((256, 128), _HALF, _HALF),
    "clip-reid": Preprocess((256, 128), _HALF, _HALF),
    "solider-reid": Preprocess((384, 128), _HALF, _HALF),
    "bpbreid": Preprocess((384, 128), *_IMAGENET),
    "kpr-solider": Preprocess((384, 128), _HALF, _HALF),
    "kpr-imagenet": Preprocess((256, 128), *_IMAGENET),
    "saai": Preprocess((288, 144), *_IMAGENET),
    "pmt": Preprocess((256, 128), *_IMAGENET, "lanczos"),
    "torchreid": Preprocess((256, 128), *_IMAGENET),
    # fast-reid normalises inside the model and takes 0..255.
    "fast-reid": Preprocess((256, 128), (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), "bicubic"),
}


def extract(
    extractor: Extractor,
    images: Any,
    *,
    transform: Callable[[Image.Image], Tensor] | str | None = None,
    inputs: str = "batch",
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
    side_inputs: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Raw features of images, not normalised, in order.

    Args:
        extractor: see `Extractor`. A torch module, or a bound method of one, runs in eval mode, which is restored
            afterwards, without gradients, on the device it is on. Of a model inside a lambda nothing is known: call
            its eval() yourself.
        images: sequence of paths, PIL pictures, (H, W, 3) uint8 RGB arrays or (3, H, W) float tensors in [0, 1]; or one
            array of them. Pictures in any 8-bit mode become RGB, EXIF rotation is applied.
        transform: picture to (3, H, W) float tensor, or the name of a preset (`PRESETS`). None: `images` are float
            tensors that the extractor takes as they are.
        inputs: "batch", or "images" for an extractor that takes a list of paths or (H, W, 3) uint8 RGB arrays.
        batch_size: images per call.
        device: where batches go; None: where the module's parameters are, else the CPU. The model is never moved.
        progress: show a bar on a terminal.
        side_inputs: keywords for the extractor. Tensors, arrays and lists have one entry per image and are sliced with
            the batch, in the container they come in (tensors also go to its device); so are tuples of that length.
            Anything else is passed on as it is; bind constants that look otherwise with functools.partial.

    Returns:
        (features, visibility): (N, D) or (N, P, D), and (N, P) or None, in the container, dtype and on the device that
        the extractor returns.

    Raises:
        TypeError, ValueError: bad input, an unreadable image (named by index and path), an output that is no feature.
    """
    items = checked_images(images)
    checked_choice(inputs, "inputs", INPUTS)
    batch_size = checked_count(batch_size, "batch_size")
    transform = checked_transform(transform, inputs)
    target = _device_of(extractor) if device is None else checked_device(device)
    side = dict(side_inputs or {})
    per_image = {name for name, value in side.items() if _is_per_image(value, name, len(items))}
    collected: list[Any] = [None, None]
    with _evaluating(extractor), tqdm(total=len(items), unit="img", disable=None if progress else True) as bar:
        for low in range(0, len(items), batch_size):
            index = range(low, min(low + batch_size, len(items)))
            batch = _batch(items, index, transform, target) if inputs == "batch" else [_native(items, i) for i in index]
            share = {name: _sliced(v, index, target) if name in per_image else v for name, v in side.items()}
            for slot, output in enumerate(_unpack(extractor(batch, **share), index)):
                collected[slot] = _stored(collected[slot], output, index, len(items))
            bar.update(len(index))
    return collected[0], collected[1]


def checked_transform(transform: Any, inputs: str) -> Callable[[Image.Image], Tensor] | None:
    """A transform that fits `inputs`; a preset's name becomes the preset."""
    if isinstance(transform, str):
        transform = PRESETS[checked_choice(transform, "transform", tuple(PRESETS))]
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be callable, a preset's name or None, got {type(transform).__name__}.")
    if inputs == "images" and transform is not None:
        raise ValueError("transform must be None with inputs='images': such an extractor does its own preprocessing.")
    return cast("Callable[[Image.Image], Tensor] | None", transform)


def checked_device(device: Any) -> torch.device:
    """A device that torch knows by name."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}.") from error


def checked_images(images: Any, name: str = "images") -> Any:
    """A non-empty sequence of images, or one array of them, whose files are there."""
    single = isinstance(images, (str, bytes, os.PathLike, Image.Image, Mapping))
    single |= isinstance(images, (np.ndarray, Tensor)) and images.ndim != _BATCH_NDIM
    if single or not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        given = f"shape {tuple(images.shape)}" if hasattr(images, "shape") else type(images).__name__
        raise TypeError(
            f"{name} must be a sequence of images, got {given}. Wrap one image in a list, an iterator in list()."
        )
    if len(images) == 0:
        raise ValueError(f"{name} must hold at least one image, got an empty sequence.")
    if not isinstance(images, (np.ndarray, Tensor)):
        # Before hours of extraction, not in the middle of them.
        for i, item in enumerate(images):
            if isinstance(item, (str, os.PathLike)) and not Path(item).is_file():
                raise ValueError(f"{name}[{i}] cannot be read: there is no file {os.fspath(item)}.")
    return images


def load_image(item: Any, name: str) -> Image.Image:
    """A path, PIL picture, (H, W, 3) uint8 RGB array or (3, H, W) float tensor in [0, 1] as an RGB picture."""
    if isinstance(item, (str, os.PathLike)):
        try:
            with Image.open(item) as picture:
                return _as_rgb(picture, f"{name} ({os.fspath(item)})")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a broken PNG is a SyntaxError
            raise ValueError(f"{name} cannot be read: {os.fspath(item)} ({error}).") from error
    if isinstance(item, Image.Image):
        return _as_rgb(item, name)
    array = item
    if isinstance(item, Tensor):
        array = (item.detach().float() if item.is_floating_point() else item.detach()).cpu().numpy()
    if isinstance(array, np.ndarray) and array.ndim == _IMAGE_NDIM:
        if array.dtype == np.uint8 and array.shape[2] == 3:
            return Image.fromarray(np.ascontiguousarray(array))
        if array.dtype.kind == "f" and array.shape[0] == 3:
            if not (array.min() >= 0 and array.max() <= 1):  # NaN fails too
                raise ValueError(
                    f"{name} must be a float image in [0, 1] to be made a picture, got values in "
                    f"[{array.min():g}, {array.max():g}]. Divide by 255, or leave normalisation to what comes after."
                )
            return Image.fromarray(np.rint(array.transpose(1, 2, 0) * 255).astype(np.uint8))
    given = f"{type(item).__name__} of shape {tuple(item.shape)}" if hasattr(item, "shape") else type(item).__name__
    raise TypeError(
        f"{name} must be a path, a PIL picture, an (H, W, 3) uint8 RGB array or a (3, H, W) float tensor in [0, 1], "
        f"got {given}."
    )


def _as_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{name} must have 8 bits a channel, got mode {picture.mode!r}. Scale it to 0..255 first.")
    return ImageOps.exif_transpose(picture).convert("RGB")


def _batch(items: Any, index: range, transform: Callable[[Image.Image], Tensor] | None, device: torch.device) -> Tensor:
    tensors: list[Tensor] = []
    for i in index:
        if transform is not None:
            tensor = transform(load_image(items[i], f"images[{i}]"))
        else:
            tensor = torch.as_tensor(items[i]) if isinstance(items[i], (np.ndarray, Tensor)) else items[i]
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(
                    f"images[{i}] must be a float tensor (3, H, W) when there is no transform, got "
                    f"{type(items[i]).__name__}. Pass transform=, for example one of {', '.join(map(repr, PRESETS))}."
                )
        if not isinstance(tensor, Tensor) or tensor.ndim != _IMAGE_NDIM:
            shown = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"images[{i}] must give a (3, H, W) tensor, got {shown}. Check the transform.")
        if tensors and tensor.shape != tensors[0].shape:
            raise ValueError(
                f"images[{i}] must have the size of the batch's other images, {tuple(tensors[0].shape)}, got "
                f"{tuple(tensor.shape)}. Resize them in the transform."
            )
        tensors.append(tensor)
    # Stacked into new memory: some models normalise their input in place.
    return torch.stack(tensors).to(device)


def _native(items: Any, i: int) -> Any:
    if isinstance(items[i], (str, os.PathLike)):
        return os.fspath(items[i])
    return np.array(load_image(items[i], f"images[{i}]"))


def _device_of(extractor: Any) -> torch.device:
    module = _module_of(extractor)
    parameter = None if module is None else next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _module_of(extractor: Any) -> nn.Module | None:
    """The torch module behind an extractor: itself, or the one whose bound method it is."""
    owner = getattr(extractor, "__self__", extractor)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def _evaluating(extractor: Any) -> Iterator[None]:
    module = _module_of(extractor)
    training = [] if module is None else [part for part in module.modules() if part.training]
    if module is not None:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # One by one: parts of a model may have been frozen in eval mode on purpose.
        for part in training:
            part.training = True


def _is_per_image(value: Any, name: str, n: int) -> bool:
    if isinstance(value, tuple):
        return len(value) == n
    if not isinstance(value, list) and not (isinstance(value, (np.ndarray, Tensor)) and value.ndim > 0):
        return False
    if len(value) != n:
        raise ValueError(
            f"{name} must have one entry for each of the {n} images, got {len(value)}. Bind a constant with "
            "functools.partial(extractor, ...)."
        )
    return True


def _sliced(value: Any, index: range, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value[index.start : index.stop].to(device, copy=True)
    part = value[index.start : index.stop]
    return part.copy() if isinstance(part, np.ndarray) else part


def _unpack(output: Any, index: range) -> tuple[Any, Any]:
    if isinstance(output, Mapping):
        features, visibility = output.get("features"), output.get("visibility")
    elif isinstance(output, Sequence) and len(output) > 0:
        features, second = output[0], output[1] if len(output) > 1 else None
        parts = getattr(features, "ndim", 0) == PARTS_NDIM
        visibility = second if parts and getattr(second, "shape", None) == features.shape[:2] else None
    else:
        features, visibility = output, None
    if not isinstance(features, (np.ndarray, Tensor)):
        raise TypeError(
            "extractor must return features as a tensor or array, first in a tuple, or under 'features' in a dict, got "
            f"{type(output).__name__}{f' with keys {list(output)}' if isinstance(output, Mapping) else ''}."
        )
    if features.ndim not in (2, PARTS_NDIM) or len(features) != len(index) or 0 in features.shape:
        raise ValueError(
            f"extractor must return features (B, D) or parts (B, P, D) with B = {len(index)}, one for each image, "
            f"got shape {tuple(features.shape)}. Flatten other shapes in the extractor."
        )
    if visibility is not None and tuple(visibility.shape) != tuple(features.shape[:2]):
        raise ValueError(
            f"extractor must return visibility of shape (B, P) = {tuple(features.shape[:2])}, "
            f"got {tuple(visibility.shape)}."
        )
    return features, visibility


def _stored(whole: Any, part: Any, index: range, n: int) -> Any:
    """Copy a batch's output into the array of all: a model may reuse its output buffer for the next batch."""
    if index.start == 0:
        if part is None:
            return None
        shape = (n, *part.shape[1:])
        whole = np.empty(shape, part.dtype) if isinstance(part, np.ndarray) else part.new_empty(shape)
    if _form(part) != _form(whole):
        raise ValueError(
            f"extractor must return one form of output for all batches, got {_form(part)} from images[{index.start}] "
            f"on, after {_form(whole)}."
        )
    if whole is not None:
        whole[index.start : index.stop] = part
    return whole


def _form(output: Any) -> str:
    if output is None:
        return "no visibility"
    return f"{type(output).__name__} of {output.dtype}, shape (B, {', '.join(map(str, output.shape[1:]))})"
