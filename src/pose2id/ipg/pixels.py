"""Images at the doors of the generator: references and drawn poses in, generated pictures out.

Pixels are made and read as the published code does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pose2id.io.images import checked_images, content_key, load_image
from pose2id.poses import Pose, draw, standard

LEAST_SIDE = 8  # pixels; fewer show no person
_KEPT_BYTES = 64 << 20


class References:
    """Reference images as RGB pictures, decoded when they are asked for; the latest 64 MiB are kept.

    Args:
        images: paths, PIL pictures or arrays, as for `IdentityGenerator.generate`.
        names: of the images, for errors; None: images[0], images[1], ...
    """

    def __init__(self, images: Any, names: Sequence[str] | None = None) -> None:
        self._images, self._names = images, names
        self._places: Sequence[int] = range(len(images))
        self._kept: dict[int, Image.Image] = {}  # the latest come last
        self._bytes = [0]  # in a list, to be shared as well
        self._lock = Lock()  # threads may ask

    def some(self, places: Sequence[int]) -> References:
        """Those at these places; what is kept is shared."""
        chosen = copy.copy(self)
        chosen._places = [self._places[place] for place in places]
        return chosen

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> Image.Image:
        i = self._places[place]
        kept = self._kept.get(i)
        if kept is not None:
            return kept
        picture = load_reference(self._images[i], self._names[i] if self._names else f"images[{i}]")
        with self._lock:
            if i not in self._kept:
                self._kept[i] = picture
                self._bytes[0] += _nbytes(picture)
            while self._bytes[0] > _KEPT_BYTES:
                self._bytes[0] -= _nbytes(self._kept.pop(next(iter(self._kept))))
        return picture


def load_reference(item: Any, name: str) -> Image.Image:
    """A reference image as an RGB picture (`pose2id.io.images.load_image`), of 8 x 8 pixels at least."""
    picture = load_image(item, name)
    if min(picture.size) < LEAST_SIDE:
        given = f"{picture.width} x {picture.height}"
        raise ValueError(f"{name} must be at least {LEAST_SIDE} pixels wide and high, got {given}.")
    return picture


def checked_poses(poses: Any) -> Any:
    """A sequence of poses or drawings; the standard ones by name."""
    if isinstance(poses, str) and poses == "standard":
        return standard()
    if isinstance(poses, (str, Mapping, Pose)) or not hasattr(poses, "__len__"):
        given = "one Pose; wrap it in a list" if isinstance(poses, Pose) else repr(poses)
        raise ValueError(f"poses must be 'standard' or a sequence of poses, got {given}.")
    return poses


def load_poses(poses: Any) -> list[tuple[str, Image.Image]]:
    """(key, drawing) of poses: "standard", or a sequence of `Pose` and of drawings, which are images of any kind.

    A pose's key is that of its keypoints, a drawing's its `content_key`.
    """
    loaded = []
    for i, pose in enumerate(checked_images(checked_poses(poses), "poses")):
        picture = draw(pose) if isinstance(pose, Pose) else load_image(pose, f"poses[{i}]")
        loaded.append((pose.key if isinstance(pose, Pose) else content_key(picture), picture))
    return loaded


def pixels(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """(3, height, width) float32 RGB in [0, 1], resized as the published code does: Lanczos, aspect not kept."""
    return torch.from_numpy(np.array(resized(picture, size))).permute(2, 0, 1).float() / 255


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An RGB picture of this (height, width)."""
    return picture.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS)


def to_pictures(images: Tensor, size: tuple[int, int] | None, name: str = "generated pictures") -> list[Image.Image]:
    """RGB pictures of images (B, 3, H, W) in [0, 1], made and resized as the published code does.

    Values are truncated to 8 bits, not rounded; `size` (height, width) is reached with Pillow's bicubic filter.

    Raises:
        ValueError: values that are not finite.
    """
    finite = torch.isfinite(images).flatten(1).all(1).tolist()
    if not all(finite):
        given = f"NaN or infinity in picture {finite.index(False) + 1} of {len(finite)}"
        raise ValueError(f"{name} must be finite, got {given}. Try dtype=torch.bfloat16 or torch.float32.")
    arrays = (images.float() * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [to_size(Image.fromarray(array), size) for array in arrays]


def to_size(picture: Image.Image, size: Sequence[int] | None) -> Image.Image:
    """A generated picture of this (height, width), resized as the published code does; None: as it is."""
    return picture if size is None else picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """(M, 3, H, W) float32 RGB in [0, 1] of pictures of one size: their 8-bit values over 255."""
    return torch.stack([pixels(picture, picture.size[::-1]) for picture in pictures])


def _nbytes(picture: Image.Image) -> int:
    return 3 * picture.width * picture.height
