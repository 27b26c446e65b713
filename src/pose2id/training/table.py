"""Tables of people: who is on which image, seen by which camera, in which pose; one line of CSV an image.

`pose2id train` reads them. A table knows images by their paths and opens none of them.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pose2id.io.checks import checked_choice
from pose2id.io.images import image_files, load_image
from pose2id.io.whole_files import whole_file
from pose2id.poses import KEYPOINTS, Pose, detect, read
from pose2id.poses.detection import Detector
from pose2id.poses.files import NobodyError

logger = logging.getLogger(__name__)

_COLUMNS = ("path", "identity", "camera", "keypoints")
_NEEDED = 2  # of them, the first
_ENTRIES = f"a JSON list of {len(KEYPOINTS)} entries [x, y] or null"
_NAMED = re.compile(r"(-1|\d+)_c(\d+)")
_CAMERA = re.compile(r"_c(\d+)|^c(\d+)_")
_SHOWN = 3  # files that an error lists
_SHOWN_LENGTH = 60  # characters of a cell that an error shows


@dataclass(frozen=True)
class PersonImage:
    """An image of a person, as a line of a table has it.

    Attributes:
        path: of the image.
        identity: who it is; the same text for the same person. Not empty.
        camera: which took it; empty where unknown.
        pose: the person's keypoints, in fractions of the image's width and height; None where unknown.

    Raises:
        TypeError: an attribute of another type.
        ValueError: an empty identity.
    """

    path: Path
    identity: str
    camera: str = ""
    pose: Pose | None = None

    def __post_init__(self) -> None:
        for name, kind in (("path", Path), ("identity", str), ("camera", str)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}.")
        if self.pose is not None and not isinstance(self.pose, Pose):
            raise TypeError(f"pose must be a Pose or None, got {type(self.pose).__name__}.")
        if not self.identity.strip():
            raise ValueError(f"identity must not be empty, got {self.identity!r} for {self.path}.")


def read_table(path: str | os.PathLike[str]) -> list[PersonImage]:
    """The images of a table, in its order.

    The table is CSV in UTF-8. Its header names the columns, in any order; those that are not named here are ignored:

    - `path`: of the image, absolute or from the table's folder. Each image once.
    - `identity`: any text.
    - `camera`: any text, or empty; the column may be missing.
    - `keypoints`: empty, or JSON `[[x, y], null, ...]` with 18 entries in the order of `pose2id.poses.KEYPOINTS`, in
      fractions of width and height, null where not visible; the column may be missing.

    Args:
        path: of the table. The images need not be there.

    Raises:
        OSError: the table cannot be read.
        ValueError: no CSV in UTF-8, no header or a column that it lacks, a line of another length, an empty path or
            identity, bad keypoints, an image that is there twice, no images: with the file, the line and the column.
    """
    path = Path(path)
    lines = _lines(path)
    line, header = next(lines, (1, []))
    columns = _columns(header, f"{path}, line {line}")
    images: list[PersonImage] = []
    first_lines: dict[str, int] = {}
    for line, cells in lines:
        where = f"{path}, line {line}"
        if len(cells) != len(header):
            raise ValueError(
                f"{where} must have {len(header)} cells, as the header has, got {len(cells)}. Put cells with commas, "
                'such as keypoints, in "quotation marks".'
            )
        image = _image({name: cells[i] for name, i in columns.items()}, path.parent, where)
        first = first_lines.setdefault(os.path.abspath(image.path), line)
        if first != line:
            raise ValueError(f"{where}, column path must name another image than line {first}, got {image.path} again.")
        images.append(image)
    if not images:
        raise ValueError(f"{path} must have a line for each image below its header, got none.")
    return images


def write_table(images: Sequence[PersonImage], path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a table, whole or not at all; `read_table` gives equal images back.

    Paths of images below the table's folder are written from there, so that both can move together; others are
    absolute. Coordinates are rounded to 6 decimals, which a pose's `key` does too. Names of poses are not kept.

    Args:
        images: at least one, each once.
        path: of the table.
        overwrite: replace the file if it is there.

    Raises:
        FileExistsError: there is such a file.
        OSError: the file cannot be written.
        TypeError: something that is no `PersonImage`.
        ValueError: no images, one that is there twice, a text that UTF-8 has no bytes for.
    """
    folder = Path(os.path.abspath(path)).parent
    rows: dict[str, list[str]] = {}
    for i, image in enumerate(images):
        if not isinstance(image, PersonImage):
            raise TypeError(f"images[{i}] must be a PersonImage, got {type(image).__name__}.")
        written = _written_path(image.path, folder)
        if written in rows:
            raise ValueError(f"images must hold each image once, got {image.path} again as images[{i}].")
        rows[written] = [written, image.identity, image.camera, _written_pose(image.pose)]
    if not rows:
        raise ValueError("images must hold at least one image, got none.")
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_COLUMNS, *rows.values()])
    try:
        content = text.getvalue().encode()
    except UnicodeEncodeError as error:  # a file name in another encoding
        around = error.object[max(0, error.start - _SHOWN_LENGTH) : error.end]
        raise ValueError(f"images must have names that UTF-8 can hold, got {around!r}. Rename the file.") from error
    target = Path(path).resolve()  # what a link points to, not the link, is replaced
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another file, or pass overwrite=True.")
    with whole_file(target, replace=overwrite) as unfinished:
        unfinished.write_bytes(content)


def table_of_folder(
    folder: str | os.PathLike[str],
    *,
    identity: str = "name",
    keypoints: str | os.PathLike[str] | None = None,
    detector: Detector | None = None,
    progress: bool = True,
) -> list[PersonImage]:
    """All image files below a folder, ordered by path, hidden files and folders left out.

    Args:
        folder: with images at any depth.
        identity: "name": file names begin with identity, `_c` and camera, as Market1501 has them
            (`0002_c1s1_000451_03.jpg`); identities -1 (junk) and 0 (distractors) are no people and left out. "folder":
            every person has one folder, whose name is the identity; the camera is the number after `_c` in a file's
            name, or in `c1_...`, if there is one.
        keypoints: directory with `NAME.json`, or OpenPose's `NAME_keypoints.json`, for the image NAME, which is the
            path below `folder` without suffix, in any format that `poses.read` reads. An image without such a file, or
            with nobody in it, has no pose; nor has one that is broken, or whose file is, which a warning says. Of
            several people the one with most visible keypoints is taken.
        detector: finds the poses of all images; see `poses.detect`.
        progress: show a bar on a terminal, for keypoints or detector.

    Raises:
        FileNotFoundError: no such folder, or no image files in it.
        TypeError: a detector that cannot be called.
        ValueError: both keypoints and detector, names that don't fit or are no people's, folders of the same name, no
            keypoints at all; with a detector an image that cannot be read.
    """
    identity = checked_choice(identity, "identity", ("name", "folder"))
    if keypoints is not None and detector is not None:
        raise ValueError("keypoints and detector must not both be given: poses come from files or from a detector.")
    folder = Path(folder)
    images = _images_below(folder, identity)
    if detector is not None:
        return with_poses(images, detect([image.path for image in images], detector, progress=progress))
    if keypoints is not None:
        return with_poses(images, _stored_poses(images, folder, Path(keypoints), progress))
    return images


def with_poses(images: Sequence[PersonImage], poses: Sequence[Pose | None]) -> list[PersonImage]:
    """The same images with these poses."""
    return [replace(image, pose=pose) for image, pose in zip(images, poses, strict=True)]


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row that is not blank; a row's line is its first."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise type(error)(
            f"table must be a CSV file that can be read, and {path} is none: {error.strerror}."
        ) from error
    try:
        text = content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} must be UTF-8, got {error}. Save the table as UTF-8.") from error
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in rows:
            if cells:
                yield line, cells
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line} must be CSV, got a row that is none ({error}).") from error


def _columns(header: list[str], where: str) -> dict[str, int]:
    """Column name to its place."""
    missing = [name for name in _COLUMNS[:_NEEDED] if name not in header]
    if missing:
        raise ValueError(
            f"{where} must be a header that names the columns {', '.join(_COLUMNS)}, of which camera and keypoints may "
            f"be left out, got {_shortened(','.join(header))} without {' and '.join(missing)}."
        )
    twice = [name for name in _COLUMNS if header.count(name) > 1]
    if twice:
        raise ValueError(f"{where} must name each column once, got {' and '.join(twice)} more than once.")
    return {name: header.index(name) for name in _COLUMNS if name in header}


def _image(cell: dict[str, str], folder: Path, where: str) -> PersonImage:
    for name in _COLUMNS[:_NEEDED]:
        if not cell[name].strip():
            raise ValueError(f"{where}, column {name} must not be empty, got {cell[name]!r}.")
    keypoints = cell.get("keypoints", "")
    pose = _pose(keypoints, f"{where}, column keypoints") if keypoints.strip() else None
    return PersonImage(folder / cell["path"], cell["identity"], cell.get("camera", ""), pose)


def _pose(text: str, where: str) -> Pose:
    try:
        points = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be empty or {_ENTRIES}, got {_shortened(text)} ({error}).") from error
    if not isinstance(points, list) or len(points) != len(KEYPOINTS):
        given = f"{len(points)} entries" if isinstance(points, list) else _shortened(text)
        raise ValueError(f"{where} must be empty or {_ENTRIES}, got {given}.")
    for i, point in enumerate(points):
        if point is not None and not (isinstance(point, list) and len(point) == 2):
            raise ValueError(f"{where}: entry {i} ({KEYPOINTS[i]}) must be [x, y] or null, got {point!r}.")
    try:
        return Pose(np.array([[math.nan, math.nan] if point is None else point for point in points]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _first(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files[:_SHOWN])) + (", ..." if len(files) > _SHOWN else "")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}...")


def _written_path(path: Path, folder: Path) -> str:
    absolute = Path(os.path.abspath(path))
    return (absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute).as_posix()


def _written_pose(pose: Pose | None) -> str:
    if pose is None:
        return ""
    # Rounded as `Pose.key` does it; 0.0 is added for want of negative zeros.
    points: list[Any] = (np.rint(pose.keypoints * 1e6) / 1e6 + 0.0).tolist()
    return json.dumps([point if seen else None for point, seen in zip(points, pose.visible, strict=True)])


def _images_below(folder: Path, identity: str) -> list[PersonImage]:
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be a directory of images, and there is no directory {folder}.")
    files = sorted(Path(file) for parent, file in image_files(folder) if "/." not in f"/{parent}")
    if not files:
        raise FileNotFoundError(f"{folder} must hold image files, and has none.")
    labels = {file: _by_name(file) if identity == "name" else _by_folder(file, folder) for file in files}
    strange = [file for file, label in labels.items() if label is None]
    if strange:
        wanted = {
            "name": "have names such as 0002_c1s1_000451_03.jpg, of identity, _c and camera",
            "folder": "be in folders, one for each person",
        }
        raise ValueError(
            f"images in {folder} must {wanted[identity]}, got {len(strange)} of {len(files)} that are not so: "
            f"{_first(strange)}. Move or rename them. Identities are taken from names (identity='name', "
            "--identity name) or folders (identity='folder', --identity folder)."
        )
    images = [PersonImage(file, *label) for file, label in labels.items() if label is not None]
    if identity == "folder":
        _check_folders(images)
    if identity == "name":
        images = [image for image in images if int(image.identity) > 0]
    if not images:
        raise ValueError(f"images in {folder} must show people, got {len(files)} of identities -1 (junk) and 0 only.")
    if len(images) < len(files):
        logger.warning("%d of %d images left out: identities -1 (junk) and 0", len(files) - len(images), len(files))
    return images


def _check_folders(images: Sequence[PersonImage]) -> None:
    """Raise if folders would make one person of several, or several of one, as person/camera/image does."""
    folders: dict[str, set[Path]] = defaultdict(set)
    for image in images:
        folders[image.identity].add(image.path.parent)
    for name, places in folders.items():
        if len(places) > 1:
            raise ValueError(
                f"every person must have one folder with images right in it, got {len(places)} folders {name!r}: "
                f"{_first(sorted(places))}. Move one person's images together; where people's folders hold others, as "
                "for cameras, move the images up, with c1_ or _c1 in their names for the camera."
            )
    by_depth = {len(image.path.parts): image.path for image in images}
    if len(by_depth) > 1:
        raise ValueError(
            "folders of people must all be at one depth, or cameras would pass for people, got "
            f"{_first(sorted(by_depth.values()))}. Move them, or make a table of each depth."
        )


def _by_name(file: Path) -> tuple[str, str] | None:
    """Identity and camera."""
    found = _NAMED.match(file.name)
    return (found[1], found[2]) if found else None


def _by_folder(file: Path, folder: Path) -> tuple[str, str] | None:
    """Identity and camera."""
    found = _CAMERA.search(file.name)
    return None if file.parent == folder else (file.parent.name, (found[1] or found[2]) if found else "")


def _stored_poses(images: Sequence[PersonImage], folder: Path, directory: Path, progress: bool) -> list[Pose | None]:
    names = [directory / image.path.relative_to(folder).with_suffix("") for image in images]
    files = [next((f for f in _keypoint_files(name) if f.is_file()), _keypoint_files(name)[0]) for name in names]
    if not any(file.is_file() for file in files):
        raise ValueError(
            f"keypoints must be a directory with NAME.json for image NAME, got {directory}, which has none for any of "
            f"{len(images)} images. Looked for {_first(files)}."
        )
    poses: list[Pose | None] = []
    problems = []
    pairs = zip(images, files, strict=True)
    for image, file in tqdm(pairs, total=len(files), unit="img", disable=None if progress else True):
        try:
            poses.append(_stored_pose(image.path, file) if file.is_file() else None)
        except ValueError as error:
            poses.append(None)
            problems.append(str(error))
    missing = [file for file in files if not file.is_file()]
    if missing:
        logger.warning("%d of %d images have no file of keypoints: %s", len(missing), len(images), _first(missing))
    if problems:
        shown = "; ".join(problems[:_SHOWN]) + ("; ..." if len(problems) > _SHOWN else "")
        logger.warning("%d of %d images have keypoints that cannot be used: %s", len(problems), len(images), shown)
    return poses


def _keypoint_files(name: Path) -> tuple[Path, Path]:
    """Where the keypoints of an image may be; OpenPose appends to its name."""
    return name.with_name(f"{name.name}.json"), name.with_name(f"{name.name}_keypoints.json")


def _stored_pose(path: Path, file: Path) -> Pose | None:
    width, height = load_image(path, f"image {path.name}").size
    try:
        people = read(file, size=(height, width))
    except NobodyError:
        return None
    return max(people, key=lambda pose: int(pose.visible.sum()))
