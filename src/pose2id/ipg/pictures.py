"""Where pictures of a person in other poses come from: a generator, a directory, or any callable of your own.

A source is called with the images and gives, for each of them in order, a sequence of M pictures: `pictures(images)`.
Arrays and tensors are RGB, those that a source gets and those that it gives.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pose2id.io.checks import as_numpy, checked_count
from pose2id.ipg.folder import check_notes, checked_directory, find, pose_folders
from pose2id.ipg.pixels import checked_poses
from pose2id.ipg.sampling import Sampling
from pose2id.ipg.shards import Picture, Shards, checked_shards, in_shards
from pose2id.poses import Pose

Pictures = Callable[[Any], Iterable[Sequence[Any]]]

_STANDARD_POSES = 8


class Generator(Protocol):
    """What makes pictures of a person in other poses; `pose2id.IdentityGenerator` is one."""

    def generate_iter(self, *args: Any, **kwargs: Any) -> Iterator[Sequence[Any]]:
        """`(images, poses, *, progress, **options)`: for each image, when asked for it, one picture per pose."""


class PosedPictures:
    """A source whose pictures of an image are in given poses.

    Attributes:
        poses: M `pose2id.poses.Pose` or drawings, or None for poses that are not known.
        pose_inputs: keywords of the model that depend on the pose: functions of a `Pose` which give a generated image's
            value in place of its original's, as for a model that takes keypoints
            `{"keypoints_xyc": lambda pose: pose.to_coco(size=(384, 128))}`.
    """

    _origin: str

    def __init__(
        self, poses: Any, num_poses: int | None, pose_inputs: Mapping[str, Callable[[Pose], Any]] | None
    ) -> None:
        self.pose_inputs = {} if pose_inputs is None else pose_inputs
        if not isinstance(self.pose_inputs, Mapping) or not all(map(callable, self.pose_inputs.values())):
            raise TypeError(f"pose_inputs must map keywords of the model to functions of a Pose, got {pose_inputs!r}.")
        count = None if num_poses is None else checked_count(num_poses, "num_poses", least=0)
        poses = checked_poses(poses)
        if not len(poses) and count != 0:
            raise ValueError("poses must hold at least one pose, got none. num_poses=0 leaves generated images out.")
        if count is not None and count > len(poses):
            raise ValueError(f"num_poses must be at most {len(poses)}, the number of poses, got {count}.")
        self.poses = tuple(poses[m] for m in range(len(poses) if count is None else count))
        for m, pose in enumerate(self.poses):
            if self.pose_inputs and not isinstance(pose, Pose):
                raise TypeError(f"poses[{m}] must be a Pose with pose_inputs, got {type(pose).__name__}.")

    @property
    def num_poses(self) -> int:
        """M of eq. 9."""
        return len(self.poses)

    def __repr__(self) -> str:
        """Where pictures come from, and M."""
        return f"{type(self).__name__}({self._origin}, num_poses={self.num_poses})"

    def side_inputs(self, like: Callable[[str], Any]) -> dict[str, Any]:
        """The values of `pose_inputs`, one per pose, in the container and dtype of `like(keyword)`: the images' own."""
        values = {name: [function(pose) for pose in self.poses] for name, function in self.pose_inputs.items()}
        return {name: _stacked(of_poses, like(name), name) for name, of_poses in values.items()}


class GeneratedPictures(PosedPictures):
    """Pictures that a generator makes while they are needed.

    Args:
        generator: a `pose2id.IdentityGenerator`, or any object with its `generate_iter` (`Generator`).
        poses: "standard", the paper's eight, or a sequence of `pose2id.poses.Pose` or drawings.
        num_poses: M of eq. 9: the first so many of the poses; None: all. 0: nothing is generated, and `Centralizer`
            leaves eq. 9 out.
        pose_inputs: see `PosedPictures`.
        sampling: steps, guidance, seed, size and ablation; None: the generator's defaults.
        **options: further keywords of the generator, such as batch_size.
    """

    def __init__(
        self,
        generator: Generator,
        /,
        poses: Any = "standard",
        num_poses: int | None = None,
        pose_inputs: Mapping[str, Callable[[Pose], Any]] | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        if isinstance(generator, type) or not callable(getattr(generator, "generate_iter", None)):
            given = f"the class {generator.__name__}" if isinstance(generator, type) else type(generator).__name__
            raise TypeError(f"generator must have a method generate_iter, and be an object, got {given}.")
        if sampling is not None and not isinstance(sampling, Sampling):
            raise TypeError(f"sampling must be a pose2id.Sampling, got {type(sampling).__name__}.")
        if "colors" in options:
            remedy = "Give it with the images, Centralizer(...)(images, colors='bgr')"
            raise ValueError(f"colors must be left out: the generator gets RGB images. {remedy}.")
        super().__init__(poses, num_poses, pose_inputs)
        self.generator, self._origin = generator, type(generator).__name__
        self.options = {"progress": False, **({} if sampling is None else sampling.keywords()), **options}
        # Their errors now, not after hours of set-up; `checked_sampling` is an `IdentityGenerator`'s.
        parameters = (
            inspect.signature(generator.generate_iter).bind((), self.poses, **self.options).signature.parameters
        )
        if check := getattr(generator, "checked_sampling", None):
            check(**{name: value for name, value in self.options.items() if name not in parameters})

    def __call__(self, images: Any) -> Iterator[Sequence[Any]]:
        """Pictures of each image, made when they are asked for; the generator gets all images at once."""
        return iter(self.generator.generate_iter(images, self.poses, **self.options))


class PictureFolder(PosedPictures):
    """Pictures that were generated before: `DIR/pose{m}/name`, or a folder for each image (`pose2id.ipg.folder.find`).

    Or in shards, behind a URL that fsspec knows (s3://, hf://, ...; extra "distributed") or in a folder: read when they
    are due.

    Images must be paths. Pictures with a note of what they were made from, as `pose2id generate` writes, must have been
    made from these images, in these poses; others are taken as they are.

    Args:
        directory: where the pictures are: a folder, or a URL.
        poses: that the pictures are in, to be compared with their notes; None: unknown, the same for every image.
        num_poses: M of eq. 9, the first so many of an image's pictures. None: as many as `poses`, else as there are
            folders pose1, pose2, ..., or pictures of an image in shards, else 8.
        pose_inputs: see `PosedPictures`; of the standard poses, if `poses` is None.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        poses: Any = None,
        num_poses: int | None = None,
        pose_inputs: Mapping[str, Callable[[Pose], Any]] | None = None,
    ) -> None:
        self.shards = Shards(directory) if in_shards(directory) else None
        if poses is None:
            every = (pose_folders(directory) if self.shards is None else self.shards.num_poses) or _STANDARD_POSES
            unknown = [None] * checked_count(every if num_poses is None else num_poses, "num_poses", least=0)
            poses = "standard" if pose_inputs else unknown
        super().__init__(poses, num_poses, pose_inputs)
        if self.shards is None:
            self.directory: Path | str = checked_directory(directory, self.num_poses)
        else:
            self.directory = checked_shards(self.shards, self.num_poses).url
        self._origin = repr(str(directory))

    def __call__(self, images: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Each image's pictures, paths or from shards PIL pictures, after a look at all their names and notes."""
        return iter(self._files(images)) if self.shards is None else self.shards.decoded(self._in_shards(images))

    def files(self, images: Sequence[Any], copies: Path) -> list[list[Path]]:
        """Paths of each image's pictures; those in shards are copied into a folder, unless it has them."""
        if self.shards is None:
            return self._files(images)
        return self.shards.copies(self._in_shards(images), copies)

    def _files(self, images: Sequence[Any]) -> list[list[Path]]:
        found = find(self.directory, images, self.num_poses)
        check_notes(found, images, self.poses)
        return found

    def _in_shards(self, images: Sequence[Any]) -> list[list[Picture]]:
        shards: Any = self.shards
        found: list[list[Picture]] = shards.find(images, self.num_poses)
        check_notes(found, images, self.poses, lambda picture: picture.note)
        return found


def in_order(pictures: Pictures, images: Any) -> tuple[Iterator[Sequence[Any]], int]:
    """Each image's pictures, and M: that of the first image, where the source has no `num_poses`.

    Raises:
        ValueError: M is 0; (while iterating) another number of pictures, or pictures of fewer images.
    """
    count = getattr(pictures, "num_poses", None)
    stream = iter(()) if count == 0 else iter(pictures(images))
    if count is None:
        first = next(stream, ())
        count, stream = _length(first, 0), chain([first], stream)
    if count == 0:
        raise ValueError("pictures must be at least 1 of every image for features of generated images, got 0.")
    return _checked(stream, len(images), count), count


def _checked(stream: Iterator[Sequence[Any]], n: int, count: int) -> Iterator[Sequence[Any]]:
    for i in range(n):
        pictures = next(stream, None)
        if pictures is None:
            raise ValueError(f"pictures must be given of every image, got those of {i} of {n} images.")
        if _length(pictures, i) != count:
            raise ValueError(f"pictures must be {count} of every image, got {len(pictures)} of images[{i}].")
        # Before the last are used: with more, those that came may have been of other images.
        if i == n - 1 and next(stream, None) is not None:
            raise ValueError(f"pictures must be given once for each image, got more than those of {n} images.")
        yield pictures


def _length(pictures: Any, i: int) -> int:
    one = isinstance(pictures, (str, os.PathLike)) or getattr(pictures, "ndim", 4) < 4
    if one or not hasattr(pictures, "__len__"):
        given = f"got {type(pictures).__name__}"
        raise TypeError(f"pictures of images[{i}] must be a sequence, such as a list, of M pictures, {given}.")
    return len(pictures)


def _stacked(values: list[Any], like: Any, name: str) -> Any:
    """Values of the poses as one tensor, array or list: in the container and dtype of `like`, if that is one.

    `like` has one entry per image, or is None. Then arrays and tensors are stacked, and other values stay in a list.
    """
    kinds = (np.ndarray, Tensor)
    if not isinstance(like, kinds) and (like is not None or not all(isinstance(value, kinds) for value in values)):
        return values
    arrays = [as_numpy(value) if isinstance(value, Tensor) else np.asarray(value) for value in values]
    wanted = arrays[0].shape if like is None else tuple(like.shape[1:])
    for m, array in enumerate(arrays):
        if array.shape != wanted:
            others = "other poses" if like is None else "original images"
            given = f"as for the {others}, got {array.shape} for pose {m + 1}"
            raise ValueError(f"pose_inputs[{name!r}] must give values of shape {wanted}, {given}.")
    if like is None:
        return torch.stack(values) if isinstance(values[0], Tensor) else np.stack(arrays)
    stacked = np.stack(arrays)
    whole = not (like.is_floating_point() or like.is_complex() if isinstance(like, Tensor) else like.dtype.kind in "fc")
    if whole and stacked.dtype.kind == "f" and (stacked != np.rint(stacked)).any():
        raise ValueError(f"pose_inputs[{name!r}] must give whole numbers, as the original images have ({like.dtype}).")
    return torch.from_numpy(stacked).to(like) if isinstance(like, Tensor) else stacked.astype(like.dtype)
