"""Poses in JSON files: OpenPose's, ControlNet's and DWPose's, COCO's, and a simple format of our own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.io.checks import checked_number, checked_size
from pose2id.io.whole_files import new_file, whole_file
from pose2id.poses.skeleton import HIGHEST, KEYPOINTS, LOWEST, THRESHOLD, Pose, checked_numbers, openpose

_OF_BODY_25 = [*range(8), *range(9, 19)]  # the 18: all but the middle of the hips, and the feet


class NobodyError(ValueError):
    """A file of poses that shows nobody."""


@cache
def standard() -> tuple[Pose, ...]:
    """The 8 standard poses of the method's authors, named "1" to "8"."""
    return tuple(read(Path(__file__).with_name("standard.json")))


def read(
    path: str | os.PathLike[str], *, size: tuple[int, int] | None = None, threshold: float = THRESHOLD
) -> list[Pose]:
    """The poses of a JSON file, one for each person, in the file's order.

    Formats, where numbers are x, y and confidence of one keypoint after the other:

    - OpenPose: `{"people": [{"pose_keypoints_2d": [numbers]}, ...]}`, of 18 keypoints, 25 (BODY_25) or COCO's 17;
    - ControlNet and DWPose: the same with `canvas_width` and `canvas_height` in pixels, or a list of such objects;
    - COCO's results: `[{"keypoints": [numbers]}, ...]`, of 17 keypoints;
    - ours: `{"poses": [{"name": "front", "keypoints": [[x, y], null, ...]}, ...]}` with 18 entries in the order of
      `KEYPOINTS`, in fractions of width and height, null where not visible; names may be left out.

    Ours apart, coordinates are fractions if all visible ones of a picture lie in [-1, 2], and pixels otherwise. People
    without a visible keypoint are left out. Names are empty where the file has none.

    Args:
        path: of the file.
        size: (height, width) of the picture, for pixels, instead of the canvas that the file names.
        threshold: least confidence of a visible keypoint; with a confidence of 0 it never is visible.

    Raises:
        OSError: the file cannot be read.
        ValueError: another format, bad keypoints, pixels without a size, with the file and the place in it; or nobody
            (`NobodyError`).
    """
    size = None if size is None else checked_size(size)
    threshold = checked_number(threshold, "threshold", 0, 1)
    content = Path(path).read_bytes()
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        kinds = "OpenPose, ControlNet, DWPose, COCO or `pose2id poses`"
        raise ValueError(
            f"{os.fspath(path)} cannot be read as poses: it must be JSON, as written by {kinds} ({error})."
        ) from error
    try:
        poses = _parsed(data, size, threshold)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as poses: {error}") from error
    if not poses:
        raise NobodyError(f"{os.fspath(path)} cannot be read as poses: it shows no person with a visible keypoint.")
    return poses


def write(poses: Sequence[Pose], path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write poses and their names in our own format; `read` gives them back exactly.

    Args:
        poses: at least one.
        path: of the file.
        overwrite: replace the file if it is there.

    Raises:
        FileExistsError: the file exists, and `overwrite` is False.
        OSError: the file cannot be written.
    """
    content = file_content(poses)
    with whole_file(new_file(path, overwrite=overwrite)) as unfinished:
        unfinished.write_bytes(content)


def file_content(poses: Sequence[Pose]) -> bytes:
    """What `write` writes."""
    for i, pose in enumerate(poses):
        if not isinstance(pose, Pose):
            raise TypeError(f"poses[{i}] must be a Pose, got {type(pose).__name__}.")
    if not poses:
        raise ValueError("poses must hold at least one pose, got none.")
    entries = [{"name": pose.name, "keypoints": to_entries(pose.keypoints)} for pose in poses]
    return (json.dumps({"poses": entries}, indent=1) + "\n").encode()


def from_entries(entries: list[Any], where: str, name: Any = "") -> Pose:
    """The pose of 18 entries [x, y] or None, as JSON has them; `where` names them in errors."""
    for i, (joint, entry) in enumerate(zip(KEYPOINTS, entries, strict=False)):
        if entry is not None and not (isinstance(entry, list) and len(entry) == 2):
            raise ValueError(f"{where}[{i}] ({joint}) must be [x, y] or null, got {entry!r}.")
    return _pose([(math.nan, math.nan) if entry is None else entry for entry in entries], where, name)


def to_entries(keypoints: NDArray[np.float64]) -> list[list[float] | None]:
    """The entries of (18, 2) keypoints."""
    return [None if math.isnan(x) else [x, y] for x, y in keypoints.tolist()]


def _parsed(data: Any, size: tuple[int, int] | None, threshold: float) -> list[Pose]:
    if isinstance(data, dict) and "poses" in data:
        own = {f"poses[{i}]": entry for i, entry in enumerate(_list(data, "poses", ""))}
        lists = {where: _list(entry, "keypoints", where) for where, entry in own.items()}
        return [from_entries(lists[where], f"{where}.keypoints", entry.get("name", "")) for where, entry in own.items()]
    pictures = {f"[{i}]": entry for i, entry in enumerate(data)} if isinstance(data, list) else {"": data}
    return [pose for where, picture in pictures.items() for pose in _poses_of(picture, where, size, threshold)]


def _poses_of(picture: Any, where: str, size: tuple[int, int] | None, threshold: float) -> list[Pose]:
    """The people of a picture; an entry of COCO's results is a picture of one."""
    if isinstance(picture, dict) and "keypoints" in picture:
        key, entries = "keypoints", {where: picture}
    else:
        key = "pose_keypoints_2d"
        entries = {f"{where}.people[{i}]": entry for i, entry in enumerate(_list(picture, "people", where))}
    # ControlNet writes null for a person of whom only hands or face were found.
    bodies = {place: entry for place, entry in entries.items() if not _is_null(entry, key)}
    people = {place: _list(entry, key, place) for place, entry in bodies.items()}
    found = {place: _placed(numbers, place, threshold) for place, numbers in people.items()}
    found = {place: keypoints for place, keypoints in found.items() if not np.isnan(keypoints).all()}
    if any(np.nanmin(keypoints) < LOWEST or np.nanmax(keypoints) > HIGHEST for keypoints in found.values()):
        extent = size or _canvas(picture, where)
        found = {place: keypoints / extent[::-1] for place, keypoints in found.items()}
    return [_pose(keypoints, place) for place, keypoints in found.items()]


def _placed(numbers: list[Any], where: str, threshold: float) -> NDArray[np.float64]:
    """(18, 2) coordinates of a flat list, NaN where not visible."""
    array = checked_numbers(numbers, _named(where))
    if array.shape not in ((51,), (54,), (75,)):
        wanted = "x, y, confidence of 17, 18 or 25 keypoints, 51, 54 or 75 numbers"
        raise ValueError(f"{_named(where)} must have {wanted}, got shape {array.shape}.")
    keypoints = array.reshape(-1, 3)
    return openpose(keypoints[_OF_BODY_25] if len(keypoints) == 25 else keypoints, threshold)


def _canvas(picture: Any, where: str) -> tuple[int, int]:
    if "canvas_width" not in picture or "canvas_height" not in picture:
        raise ValueError(f"{_named(where)} is in pixels without canvas_width, canvas_height. Pass size=.")
    return checked_size((picture["canvas_height"], picture["canvas_width"]), f"{_named(where)}: canvas")


def _pose(keypoints: Any, where: str, name: Any = "") -> Pose:
    try:
        return Pose(keypoints, name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_named(where)}: {error}") from error


def _list(data: Any, key: str, where: str) -> list[Any]:
    found = data.get(key) if isinstance(data, dict) else None
    if not isinstance(found, list):
        given = list(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{_named(where)} must be an object with a list {key!r}, got {given}.")
    return found


def _is_null(data: Any, key: str) -> bool:
    return isinstance(data, dict) and key in data and data[key] is None


def _named(where: str) -> str:
    return where.lstrip(".") or "the file"
