"""Generated pictures in a directory: which files belong to an image, and what their notes say."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count as counted
from pathlib import Path
from typing import Any

from PIL import Image

from pose2id.io.checks import checked_count, first_few
from pose2id.io.images import SUFFIXES, content_key, image_files, load_image
from pose2id.poses import Pose

logger = logging.getLogger(__name__)

NOTE = "pose2id"  # the PNG text that records what a generated picture was made from


def find(directory: str | os.PathLike[str], images: Sequence[Any], count: int) -> list[list[Path]]:
    """The files of `count` generated images of each image.

    Two layouts are known. If there is a folder pose1, picture m of an image is in the folder pose{m}, under the image's
    name with any image extension, possibly in folders (`pose1/cam1/0001/0001.png`). Otherwise every image has a folder
    of its own, named as the image without extension, possibly below others (`cam1/0001/0001/`); its first `count` files
    in natural order (pose2 before pose10) are taken, without contact sheets (`sheet*`). The longest end of an image's
    path that the directory has is its name.

    Args:
        directory: of the generated images.
        images: paths of the originals; the files themselves need not exist.
        count: M, at least 1.

    Returns:
        N lists of M paths.

    Raises:
        TypeError: an image that is not a path.
        ValueError: too few pose folders; pictures that are missing or ambiguous, or that two images share, named.
    """
    root, count = checked_directory(directory, count), checked_count(count, "count")
    paths = _paths(images)
    if (root / "pose1").is_dir():
        found = _in_pose_folders(root, paths, count)
        looked_for = f"{root}{os.sep}pose1..pose{count}{os.sep}<the image's name, any of {', '.join(SUFFIXES)}>"
    else:
        found = _in_own_folders(root, paths, count)
        looked_for = f"{count} pictures in {root}{os.sep}<the image's name without its extension>"
    check_found(found, images, count, root, looked_for)
    return found


def check_found(
    found: Sequence[Sequence[Any]], images: Sequence[Any], count: int, place: str | os.PathLike[str], looked_for: str
) -> None:
    """Raise if an image has fewer than `count` pictures in a place, and say what was looked for."""
    missing = [i for i, files in enumerate(found) if len(files) < count]
    if missing:
        shown = first_few(f"images[{i}] ({os.fspath(images[i])})" for i in missing)
        given = f"they are missing for {len(missing)} of {len(images)}: {shown}"
        remedy = "Make them with `pose2id generate`."
        raise ValueError(
            f"{place} must hold {count} pictures of every image; {given}. Looked for {looked_for}. {remedy}"
        )


def checked_directory(directory: str | os.PathLike[str], count: int) -> Path:
    """A directory; if it has pose folders, with pose1 to pose{count}."""
    root, there = Path(directory), pose_folders(directory)
    if not os.fspath(directory) or not root.is_dir():
        raise ValueError(f"directory must exist, got {os.fspath(directory)!r}.")
    if 0 < there < count:
        raise ValueError(f"num_poses must be at most {there}, the number of folders pose1, ... in {root}, got {count}.")
    return root


def pose_folders(directory: str | os.PathLike[str]) -> int:
    """How many folders pose1, pose2, ... a directory has."""
    return next(m for m in counted() if not Path(directory, f"pose{m + 1}").is_dir())


def _in_pose_folders(root: Path, paths: list[Path], count: int) -> list[list[Path]]:
    found: list[list[Path]] = [[] for _ in paths]
    keys: list[str | None] = []
    for m in range(count):
        files = _files_by_name(root / f"pose{m + 1}")
        # The first folder decides which end of an image's path is its name; the others must have that very name.
        keys = keys or names_in(files, paths)
        for i, key in enumerate(keys):
            if key in files:
                found[i].append(_one_of(files[key], paths[i], i))
    return found


def _in_own_folders(root: Path, paths: list[Path], count: int) -> list[list[Path]]:
    folders: dict[str, list[str]] = {}
    for parent, file in image_files(root):
        if not os.path.basename(file).lower().startswith("sheet"):
            folders.setdefault(parent, []).append(file)
    names = names_in(folders, paths)
    chosen = ([] if name is None else sorted(folders[name], key=_natural)[:count] for name in names)
    return [[Path(file) for file in files] for files in chosen]


def _paths(images: Sequence[Any]) -> list[Path]:
    for i, image in enumerate(images):
        if not isinstance(image, (str, os.PathLike)):
            raise TypeError(f"images[{i}] must be a path, whose pictures have its name, got {type(image).__name__}.")
    return [Path(os.path.abspath(image)) for image in images]


def names_in(known: Mapping[str, Any], images: Sequence[Any]) -> list[str | None]:
    """The longest end of each image's path, without the extension, that is known; each name for one image only."""
    paths = _paths(images)
    depth = max((name.count("/") + 1 for name in known), default=0)
    names: list[str | None] = []
    owners: dict[str, int] = {}
    for i, path in enumerate(paths):
        parts = path.with_suffix("").parts
        ends = ("/".join(parts[-length:]) for length in range(min(depth, len(parts)), 0, -1))
        name = next((end for end in ends if end in known), None)
        names.append(name)
        if name is not None and paths[owners.setdefault(name, i)] != path:
            both = f"images[{owners[name]}] ({paths[owners[name]]}) and images[{i}] ({path})"
            raise ValueError(f"images must have pictures of their own, but {both} would both get those of {name}.")
    return names


def _files_by_name(folder: Path) -> dict[str, list[str]]:
    """Image files below a folder, by their relative path without extension."""
    files: dict[str, list[str]] = {}
    for parent, file in image_files(folder):
        stem = os.path.splitext(os.path.basename(file))[0]
        files.setdefault(f"{parent}/{stem}" if parent else stem, []).append(file)
    return files


def read_note(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings recorded in a generated PNG; {} for other files.

    Raises:
        ValueError: the PNG has a note, and is damaged.
    """
    try:
        with Image.open(path) as picture:
            note = json.loads(picture.info.get(NOTE, "{}"))
    except (OSError, SyntaxError, ValueError, TypeError, RecursionError, Image.DecompressionBombError):
        return {}
    if not isinstance(note, dict) or not note:
        return {}
    try:
        # The note comes before the pixels, whose checksums decoding doesn't look at.
        with Image.open(path) as picture:
            picture.verify()
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path} must be a whole picture, and is damaged ({error}). Generate it anew.") from error
    return note


def check_notes(
    found: Sequence[Sequence[Any]],
    images: Sequence[Any],
    poses: Sequence[Any],
    note_of: Callable[[Any], dict[str, Any]] = read_note,
) -> None:
    """Raise where a note says that a picture was made from another image, in another pose or by another ablation.

    Pictures of an ablation are for measuring what it costs; a warning in the log says that they are no others.

    Args:
        found: of `find`, or pictures of another kind.
        images: paths of the originals.
        poses: M, of the pictures; None for one that is not known, but the same for all images. Pictures without a note
            are taken as they are.
        note_of: the note of a picture in `found`.
    """
    keys = [_key(pose, f"poses[{m}]") for m, pose in enumerate(poses)]
    ablation, first = "none", None
    for i, (files, image) in enumerate(zip(found, images, strict=True)):
        original = None
        for m, file in enumerate(files):
            note = note_of(file)
            if "image" not in note:
                continue
            ablation, first = note.get("ablation", "none") if first is None else ablation, first or file
            if note.get("ablation", "none") != ablation:
                given = f"{first} has {ablation!r} and {file} {note.get('ablation', 'none')!r}"
                raise ValueError(f"pictures must be of one ablation, and {given}. Generate them into two directories.")
            original = original or content_key(load_image(image, f"images[{i}]"))
            if note["image"] != original:
                given = f"{file} was made from another image"
                raise ValueError(f"pictures must be of images[{i}] ({os.fspath(image)}), and {given}. Generate anew.")
            keys[m] = keys[m] or note.get("pose")
            if note.get("pose") != keys[m]:
                others = "those of other images in its folder" if poses[m] is None else f"poses[{m}]"
                raise ValueError(f"pictures must be in one set of poses, and {file} is in another pose than {others}.")
    if ablation != "none":
        logger.warning("%s and the others were generated for an ablation: %s", first, ablation)


def _key(pose: Any, name: str) -> str | None:
    if pose is None:
        return None
    return pose.key if isinstance(pose, Pose) else content_key(load_image(pose, name))


def _one_of(files: list[str], path: Path, i: int) -> Path:
    named_alike = [file for file in files if os.path.splitext(file)[1] == path.suffix]
    if len(files) > 1 and not named_alike:
        given = ", ".join(sorted(files))
        raise ValueError(f"pose folders must have one picture for images[{i}], got {given}. Remove all but one.")
    return Path(named_alike[0] if named_alike else files[0])


def _natural(file: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by value."""
    pieces = re.split(r"(\d+)", os.path.basename(file))
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]
