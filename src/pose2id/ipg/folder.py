"""Generated images of the people on given images: made by a generator while they are needed, or read from a directory.

Either way they come as one sequence of M pictures for each image, in the images' order.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pose2id.io.checks import checked_count
from pose2id.io.images import SUFFIXES, content_key, image_files, load_image

if TYPE_CHECKING:
    from pose2id.poses import Pose

NOTE = "pose2id"  # the PNG text in which a generated picture tells what it was made from
_SHOWN = 3


class Generator(Protocol):
    """What makes pictures of a person in other poses; `pose2id.IdentityGenerator` is one."""

    @property
    def generate_iter(self) -> Callable[..., Iterator[Any]]:
        """A method `(images, poses, *, progress, **options)`; the options are those of `generate_options`.

        For each image, in order and only when asked for it: a sequence of pictures, one for each pose.
        """


def find(directory: str | os.PathLike[str], images: Sequence[Any], count: int) -> list[list[Path]]:
    """The files of `count` generated images of each image.

    Two layouts are known. If there is a folder pose1, picture m of an image is in the folder pose{m}, under the image's
    name or with another image extension; below it may be folders (`pose1/cam1/0001/0001.png`). Otherwise every image
    has a folder of its own, called as the image without its extension, possibly below others (`cam1/0001/0001/`); its
    first `count` files in natural order (pose2 before pose10) are taken, contact sheets (`sheet*`) left out.
    Of an image's path as much counts as the directory tells: the longest end that is there.

    Args:
        directory: where the generated images are.
        images: paths of the originals; the files themselves need not be there.
        count: M, at least 1.

    Returns:
        N lists of M paths.

    Raises:
        TypeError: an image that is no path.
        ValueError: too few pose folders; pictures that are missing, or could be one or another, with the images named;
            two images that would get the same pictures.
    """
    root, count = checked_directory(directory, count), checked_count(count, "count")
    for i, image in enumerate(images):
        if not isinstance(image, (str, os.PathLike)):
            raise TypeError(
                f"images[{i}] must be a path, because generated images are looked up by name, got "
                f"{type(image).__name__}."
            )
    paths = [Path(os.path.abspath(image)) for image in images]
    if (root / "pose1").is_dir():
        found = _in_pose_folders(root, paths, count)
        looked_for = f"{root}{os.sep}pose1..pose{count}{os.sep}<the image's name, any of {', '.join(SUFFIXES)}>"
    else:
        found = _in_own_folders(root, paths, count)
        looked_for = f"{count} pictures in {root}{os.sep}<the image's name without its extension>"
    missing = [i for i, files in enumerate(found) if len(files) < count]
    if missing:
        shown = ", ".join(f"images[{i}] ({os.fspath(images[i])})" for i in missing[:_SHOWN])
        raise ValueError(
            f"generated must hold {count} pictures of every image; they are missing for {len(missing)} of "
            f"{len(images)}: {shown}{', ...' if len(missing) > _SHOWN else ''}. Looked for {looked_for}. Generate "
            "them, or leave these images out."
        )
    return found


def checked_directory(directory: Any, count: int) -> Path:
    """A directory; if it has pose folders, with pose1 to pose{count}."""
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"generated must be a directory's path, got {type(directory).__name__}.")
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"generated must be a directory, got {os.fspath(directory)}.")
    there = 0
    while (root / f"pose{there + 1}").is_dir():
        there += 1
    if 0 < there < count:
        raise ValueError(
            f"num_poses must be at most {there}, the number of folders pose1, pose2, ... in {root}, got {count}. Pass "
            f"num_poses={there}."
        )
    return root


def checked_generator(generator: Any) -> Generator:
    """An object with `generate_iter`."""
    if not callable(getattr(generator, "generate_iter", None)):
        raise TypeError(
            f"generator must have a method generate_iter(images, poses, ...), got {type(generator).__name__}. Pass an "
            "IdentityGenerator."
        )
    return generator  # type: ignore[no-any-return]


def checked_poses(poses: Any, count: int, *, drawings: bool) -> tuple[Any, ...]:
    """The first `count` poses: of "standard", or of a sequence of `Pose` (of drawn images too, if `drawings`)."""
    from pose2id.poses import Pose, standard  # noqa: PLC0415 - only generation needs them

    if isinstance(poses, str):
        if poses != "standard":
            raise ValueError(f"poses must be 'standard' or a sequence of poses, got {poses!r}.")
        poses = standard()
    if not hasattr(poses, "__len__") or not hasattr(poses, "__getitem__") or isinstance(poses, Mapping):
        raise TypeError(f"poses must be 'standard' or a sequence of poses, got {type(poses).__name__}.")
    if count > len(poses):
        raise ValueError(f"num_poses must be at most {len(poses)}, the number of poses, got {count}.")
    chosen = tuple(poses[i] for i in range(count))
    for i, pose in enumerate(chosen):
        if not drawings and not isinstance(pose, Pose):
            raise TypeError(
                f"poses[{i}] must be a pose2id.poses.Pose, because pose_inputs are computed from it, got "
                f"{type(pose).__name__}."
            )
    return chosen


def checked_pose_inputs(pose_inputs: Any) -> dict[str, Callable[[Pose], Any]]:
    """Functions of a pose, by the keyword that they give the extractor."""
    if not isinstance(pose_inputs, Mapping):
        raise TypeError(
            "pose_inputs must map a keyword of the extractor to a function of a Pose, got "
            f"{type(pose_inputs).__name__}."
        )
    for name, function in pose_inputs.items():
        if not isinstance(name, str) or not callable(function):
            raise TypeError(f"pose_inputs[{name!r}] must be a function of a Pose, got {type(function).__name__}.")
    return dict(pose_inputs)


def checked_options(options: Any) -> dict[str, Any]:
    """Keywords for the generator."""
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise TypeError(f"generate_options must map keywords of the generator to values, got {options!r}.")
    return dict(options)


def generate(generator: Generator, images: Any, poses: Sequence[Any], options: Mapping[str, Any]) -> Iterator[Any]:
    """Pictures of each image in all poses, made when they are asked for; the images are handed over at once.

    Raises:
        ValueError: (while iterating) another number of pictures than poses, or pictures of fewer images.
    """
    stream = iter(generator.generate_iter(images, poses, **{"progress": False, **options}))
    return _checked_stream(stream, len(images), len(poses))


def stack_values(values: list[Any], like: Any, name: str) -> Any:
    """Values of the poses as one tensor, array or list: in the container and dtype of `like`, if that is one.

    `like` has one entry per image, or is None. Then arrays and tensors are stacked, and other values stay in a list.

    Raises:
        ValueError: values of different shapes, or not of the shape of `like`'s entries.
    """
    if isinstance(like, (list, tuple)):
        return values
    kinds = (np.ndarray, Tensor)
    if like is None and not all(isinstance(value, kinds) for value in values):
        return values
    arrays: list[NDArray[Any]] = [np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v) for v in values]
    wanted = arrays[0].shape if like is None else tuple(like.shape[1:])
    for m, array in enumerate(arrays):
        if array.shape != wanted:
            raise ValueError(
                f"pose_inputs[{name!r}] must give values of shape {wanted}, as for the "
                f"{'other poses' if like is None else 'original images'}, got {array.shape} for pose {m + 1}."
            )
    if like is None:
        return torch.stack(values) if isinstance(values[0], Tensor) else np.stack(arrays)
    stacked = np.stack(arrays)
    return torch.from_numpy(stacked).to(like) if isinstance(like, Tensor) else stacked.astype(like.dtype)


def _checked_stream(stream: Iterator[Any], n: int, count: int) -> Iterator[Any]:
    for i in range(n):
        pictures = next(stream, None)
        if pictures is None:
            raise ValueError(f"generator must give pictures of every image, got those of {i} of {n} images.")
        if len(pictures) != count:
            raise ValueError(f"generator must give {count} pictures of images[{i}], one a pose, got {len(pictures)}.")
        yield pictures


def _in_pose_folders(root: Path, paths: list[Path], count: int) -> list[list[Path]]:
    found: list[list[Path]] = [[] for _ in paths]
    keys: list[str | None] = []
    for m in range(count):
        files = _files_by_name(root / f"pose{m + 1}")
        # The first folder decides which end of an image's path is its name; the others must have that very name.
        keys = keys or _names_in(files, paths)
        for i, key in enumerate(keys):
            if key in files:
                found[i].append(_one_of(files[key], paths[i], i))
    return found


def _in_own_folders(root: Path, paths: list[Path], count: int) -> list[list[Path]]:
    folders: dict[str, list[str]] = {}
    for parent, file in image_files(root):
        if not os.path.basename(file).lower().startswith("sheet"):
            folders.setdefault(parent, []).append(file)
    names = _names_in(folders, paths)
    chosen = ([] if name is None else sorted(folders[name], key=_natural)[:count] for name in names)
    return [[Path(file) for file in files] for files in chosen]


def _names_in(known: Mapping[str, Any], paths: list[Path]) -> list[str | None]:
    """The longest end of each path, without the extension, that is known; each name for one image only."""
    depth = max((name.count("/") + 1 for name in known), default=0)
    names: list[str | None] = []
    owners: dict[str, int] = {}
    for i, path in enumerate(paths):
        parts = path.with_suffix("").parts
        ends = ("/".join(parts[-length:]) for length in range(min(depth, len(parts)), 0, -1))
        name = next((end for end in ends if end in known), None)
        names.append(name)
        if name is not None and paths[owners.setdefault(name, i)] != path:
            raise ValueError(
                f"generated must have pictures of each image, but images[{owners[name]}] ({paths[owners[name]]}) and "
                f"images[{i}] ({path}) would both get those of {name}. Keep the images' folders in it."
            )
    return names


def _files_by_name(folder: Path) -> dict[str, list[str]]:
    """Image files below a folder, by their relative path without extension."""
    files: dict[str, list[str]] = {}
    for parent, file in image_files(folder):
        stem = os.path.splitext(os.path.basename(file))[0]
        files.setdefault(f"{parent}/{stem}" if parent else stem, []).append(file)
    return files


def read_note(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a generated picture says that it was made from; {} for other files."""
    try:
        with Image.open(path) as picture:
            note = json.loads(picture.info.get(NOTE, "{}"))
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        return {}
    return note if isinstance(note, dict) else {}


def check_notes(found: Sequence[Sequence[Path]], images: Sequence[Any], poses: Sequence[Any]) -> None:
    """Raise where a picture's note says that it shows another image's person, or is in another pose than the others.

    Args:
        found: of `find`.
        images: paths of the originals.
        poses: what the pictures should be in; empty: in the same for all images. Pictures without a note, of other
            programs, are taken as they are.

    Raises:
        ValueError: the first such picture, named.
    """
    from pose2id.poses import Pose  # noqa: PLC0415 - only generation needs them

    keys: list[str | None] = [
        pose.key if isinstance(pose, Pose) else content_key(load_image(pose, f"poses[{m}]"))
        for m, pose in enumerate(poses)
    ] or [None] * len(found[0])
    for i, (files, image) in enumerate(zip(found, images, strict=True)):
        original = None
        for m, file in enumerate(files):
            note = read_note(file)
            if "image" not in note:
                continue
            original = original or content_key(load_image(image, f"images[{i}]"))
            if note["image"] != original:
                raise ValueError(
                    f"generated must hold pictures of images[{i}] ({os.fspath(image)}), and {file} was made from "
                    "another image, as its note says. Generate pictures of this one, into a directory of its own."
                )
            keys[m] = keys[m] or note.get("pose")
            if note.get("pose") != keys[m]:
                raise ValueError(
                    f"generated must hold pictures of all images in one set of poses, and {file} is in another pose "
                    f"than {'poses[' + str(m) + ']' if len(poses) else 'those of other images in its folder'}."
                )


def _one_of(files: list[str], path: Path, i: int) -> Path:
    named_alike = [file for file in files if os.path.splitext(file)[1] == path.suffix]
    if len(files) > 1 and not named_alike:
        raise ValueError(
            f"generated must have one picture for images[{i}] ({path}) in a pose folder, got "
            f"{', '.join(sorted(files))}. Remove all but one."
        )
    return Path(named_alike[0] if named_alike else files[0])


def _natural(file: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by value."""
    pieces = re.split(r"(\d+)", os.path.basename(file))
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]
