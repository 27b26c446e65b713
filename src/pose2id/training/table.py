"""Tables of people: who is on which image, from which camera, in which pose; one CSV line per image.

`pose2id train` reads them. A table holds paths of images and opens none of them.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pose2id.io.checks import checked_choice, checked_flag, first_few
from pose2id.io.images import image_files, load_image
from pose2id.io.whole_files import new_file, whole_file
from pose2id.poses import KEYPOINTS, Pose, check_pose, detect, read
from pose2id.poses.detection import Detector
from pose2id.poses.files import NobodyError, from_entries, to_entries

logger = logging.getLogger(__name__)

_NEEDED = ("path", "identity")
_COLUMNS = (*_NEEDED, "camera", "keypoints")
_BY_NAME = re.compile(r"(0*-0*1|\d+)_c(\d+)")
_JUNK = re.compile(r"0*-0*1")  # as data sets write it: -1, 00-1
_NOBODY = re.compile(rf"{_JUNK.pattern}|00+")  # distractors too: 0000
_CAMERA = re.compile(r"_c(\d+)|^c(\d+)_")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # all but tabs and line breaks
_SHOWN_LENGTH = 60  # characters of a cell that an error shows


@dataclass(frozen=True)
class PersonImage:
    """An image of a person: a line of a table.

    Attributes:
        path: of the image.
        identity: who it is: the same text for the same person, not empty; spaces around it don't count.
        camera: which took it, as a text; empty where unknown.
        pose: the person's keypoints, in fractions of the image's width and height; None where unknown.
    """

    path: Path
    identity: str
    camera: str = ""
    pose: Pose | None = None

    def __post_init__(self) -> None:
        for name, kind in (("path", Path), ("identity", str), ("camera", str), ("pose", Pose | None)):
            if not isinstance(given := getattr(self, name), kind):
                raise TypeError(f"{name} must be {self.__annotations__[name]}, got {type(given).__name__}.")
        if not self.identity.strip():
            raise ValueError(f"identity must not be empty, got {self.identity!r} for {self.path}.")
        for name in ("identity", "camera"):
            object.__setattr__(self, name, getattr(self, name).strip())


def check_people(images: Sequence[Any]) -> None:
    """Raise a TypeError where an image is not a `PersonImage`."""
    for i, image in enumerate(images):
        if not isinstance(image, PersonImage):
            raise TypeError(f"images[{i}] must be a PersonImage (see read_table), got {type(image).__name__}.")


def read_table(path: str | os.PathLike[str]) -> list[PersonImage]:
    """The images of a table, in its order.

    The table is CSV in UTF-8. Its header names the columns, in any order; other columns are ignored:

    - `path`: of the image, absolute or from the table's folder. Each image once.
    - `identity`: any text. Lines of identity -1 (junk), or 00-1, are left out with a warning; 0 and 0000 are people.
    - `camera`: any text, or empty; the column may be missing.
    - `keypoints`: empty, or JSON `[[x, y], null, ...]` with 18 entries in the order of `pose2id.poses.KEYPOINTS`, in
      fractions of width and height, null where not visible; the column may be missing.

    Args:
        path: of the table. The images need not be there.

    Raises:
        OSError: the table cannot be read.
        ValueError: bad content, with the file, the line and the column.
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
            rule = f"have {len(header)} cells, as the header, got {len(cells)}"
            raise ValueError(f'{where} must {rule}. Put cells with commas in "quotation marks".')
        image = _image({name: cells[i] for name, i in columns.items()}, path.parent, where)
        first = first_lines.setdefault(os.path.abspath(image.path), line)
        if first != line:
            raise ValueError(f"{where}, column path must name another image than line {first}, got {image.path} again.")
        images.append(image)
    people = [image for image in images if not _JUNK.fullmatch(image.identity)]
    if not people:
        given = f"{len(images)} of identity -1 (junk)" if images else "none"
        raise ValueError(f"{path} must have a line for each image below its header, got {given}.")
    if len(people) < len(images):
        logger.warning("%s: %d of %d images left out: identity -1 (junk)", path, len(images) - len(people), len(images))
    return people


def write_table(
    images: Sequence[PersonImage],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    root: str | os.PathLike[str] | None = None,
) -> None:
    """Write a table, whole or not at all; `read_table` gives equal images back, but for junk.

    Paths of images below the table's folder are written from there, so that both can move together; others are
    absolute, but for those below `root`. Coordinates are rounded to 6 decimals, as for a pose's `key`. Names of poses
    are not kept.

    Args:
        images: at least one, each once.
        path: of the table.
        overwrite: replace the file if it is there.
        root: a folder that moves together with the table: paths of images below it are written from the table's folder,
            by way of "..". None: there is none.

    Raises:
        FileExistsError: the file exists, and `overwrite` is False.
        OSError: the file cannot be written.
        ValueError: no images, one of them twice, a text that UTF-8 has no bytes for.
    """
    content = table_content(images, path, root)
    with whole_file(new_file(path, overwrite=overwrite), replace=overwrite) as unfinished:
        unfinished.write_bytes(content)


def table_content(
    images: Sequence[PersonImage], path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None
) -> bytes:
    """What `write_table` writes."""
    rows: dict[str, list[str]] = {}
    check_people(images)
    for i, image in enumerate(images):
        written = path_from(path, image.path, root)
        if written in rows:
            raise ValueError(f"images must hold each image once, got {image.path} again as images[{i}].")
        # Rounded as in `Pose.key`; 0.0 is added for want of negative zeros.
        entries = image.pose and json.dumps(to_entries(np.rint(image.pose.keypoints * 1e6) / 1e6 + 0.0))
        rows[written] = [written, image.identity, image.camera, entries or ""]
    if not rows:
        raise ValueError("images must hold at least one image, got none.")
    return csv_content([_COLUMNS, *rows.values()])


def path_from(table: str | os.PathLike[str], image: Path, root: str | os.PathLike[str] | None = None) -> str:
    """An image's path as a table holds it: from the table's folder if it is below that or below `root`, else absolute.

    Where the way from the table's folder to `root` leads through a link, or to another drive, it is absolute, too.
    """
    folder, absolute = Path(os.path.abspath(table)).parent, Path(os.path.abspath(image))
    if absolute.is_relative_to(folder):
        return absolute.relative_to(folder).as_posix()
    inside = root is not None and absolute.is_relative_to(os.path.abspath(root))
    # Of a linked folder, ".." is the folder above what it links to.
    if inside and Path(os.path.realpath(folder)) == folder and folder.anchor == absolute.anchor:
        return Path(os.path.relpath(absolute, folder)).as_posix()
    return absolute.as_posix()


def csv_content(rows: Iterable[Sequence[object]]) -> bytes:
    """Rows as CSV in UTF-8; a ValueError for a text that it has no bytes for."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    try:
        return text.getvalue().encode()
    except UnicodeEncodeError as error:  # a file name in another encoding
        around = error.object[max(0, error.start - _SHOWN_LENGTH) : error.end]
        raise ValueError(f"images must have names that UTF-8 can hold, got {around!r}. Rename the file.") from error


def table_of_folder(
    folder: str | os.PathLike[str],
    *,
    identity: str = "name",
    keypoints: str | os.PathLike[str] | None = None,
    detector: Detector | None = None,
    progress: bool = True,
) -> list[PersonImage]:
    """All image files below a folder, ordered by path, without hidden files and folders.

    Args:
        folder: with images at any depth.
        identity: "name": file names begin with identity, `_c` and camera, as in Market1501
            (`0002_c1s1_000451_03.jpg`). "folder": every person has one folder, named by the identity; the camera is the
            number after `_c` in a file's name, or in `c1_...`, if there is one. Identities -1 (junk) and 0
            (distractors) are left out, as 00-1 and 0000 too; but a folder 0 may be the first of people numbered from 0.
            All others are texts: 007 is not 7.
        keypoints: directory with `NAME.json`, or OpenPose's `NAME_keypoints.json`, in any format of `poses.read`; NAME
            is the image's path below `folder` without suffix. The person with most visible keypoints counts. Without
            such a file, or if it shows nobody, an image has no pose; nor, with a warning, if one of the two is broken.
        detector: finds the poses of all images; see `poses.detect`.
        progress: show a bar on a terminal, for keypoints or detector.

    Raises:
        FileNotFoundError: no such folder, or no image files in it.
        ValueError: both keypoints and detector, file names without an identity, folders of the same name, no keypoints
            at all; with a detector an image that cannot be read.
    """
    identity = checked_choice(identity, "identity", ("name", "folder"))
    checked_flag(progress, "progress")
    if keypoints is not None and detector is not None:
        raise ValueError("keypoints and detector must not both be given. Leave one out.")
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


def with_valid_poses(images: Sequence[PersonImage]) -> list[PersonImage]:
    """The same images without poses that are not valid (`poses.check_pose`); how many these are, and why, is logged.

    Images with a pose are opened: their proportions count.
    """
    checked = []
    broken: Counter[str] = Counter()
    refused = []
    for image in images:
        if image.pose is not None:
            width, height = load_image(image.path, f"image {image.path.name}").size
            verdict = check_pose(image.pose, size=(height, width))
            if not verdict:
                broken.update(verdict.rules)
                refused.append(f"{image.path.name} ({verdict.reasons[0]})")
                image = replace(image, pose=None)  # noqa: PLW2901
        checked.append(image)
    if refused:
        poses = len(refused) + sum(image.pose is not None for image in checked)
        rules = ", ".join(f"{name} {count}" for name, count in broken.most_common())
        shown = first_few(refused, separator="; ")
        logger.warning("%d of %d poses left out, not valid: %s. By rule: %s", len(refused), poses, shown, rules)
    return checked


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row that is not blank; a row's line is its first."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise type(error)(f"table must be a CSV file, and {path} cannot be read: {error.strerror}.") from error
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
        raise ValueError(f"{path}, line {line} must be CSV ({error}).") from error


def _columns(header: list[str], where: str) -> dict[str, int]:
    """Column name to its place."""
    missing = [name for name in _NEEDED if name not in header]
    if missing:
        given = f"{_shortened(','.join(header))} without {' and '.join(missing)}"
        raise ValueError(f"{where} must be a header with path and identity, got {given}.")
    twice = [name for name in _COLUMNS if header.count(name) > 1]
    if twice:
        raise ValueError(f"{where} must name each column once, got {' and '.join(twice)} more than once.")
    return {name: header.index(name) for name in _COLUMNS if name in header}


def _image(cell: dict[str, str], folder: Path, where: str) -> PersonImage:
    for name in _NEEDED:
        if not cell[name].strip():
            raise ValueError(f"{where}, column {name} must not be empty, got {cell[name]!r}.")
    if _CONTROL.search(cell["path"]):
        given = _shortened(cell["path"])
        raise ValueError(f"{where}, column path must hold no control characters, got {given}. Rename the file.")
    keypoints = cell.get("keypoints", "")
    pose = _pose(keypoints, f"{where}, column keypoints") if keypoints.strip() else None
    return PersonImage(folder / cell["path"], cell["identity"], cell.get("camera", ""), pose)


def _pose(text: str, where: str) -> Pose:
    try:
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise ValueError("not a list")
    except (ValueError, RecursionError) as error:
        rule = f"be empty or a JSON list of {len(KEYPOINTS)} entries [x, y] or null"
        raise ValueError(f"{where} must {rule}, got {_shortened(text)} ({error}).") from error
    return from_entries(entries, where)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}...")


def _images_below(folder: Path, identity: str) -> list[PersonImage]:
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be a directory of images, and there is no directory {folder}.")
    files = sorted(Path(file) for _, file in image_files(folder))
    if not files:
        raise FileNotFoundError(f"{folder} must hold image files, and has none.")
    labels = {file: _label(file, folder, identity) for file in files}
    strange = [file for file, label in labels.items() if label is None]
    if strange:
        rule = "have names such as 0002_c1s1_000451_03.jpg" if identity == "name" else "be in folders, one per person"
        given = f"{len(strange)} of {len(files)} others: {first_few(strange)}"
        raise ValueError(f"images in {folder} must {rule}, got {given}. {_other_identity(files, folder, identity)}")
    images = [PersonImage(file, *label) for file, label in labels.items() if label is not None]
    people = [image for image in images if not _NOBODY.fullmatch(image.identity)]
    if identity == "folder":
        _check_folders(people)
    else:
        people = [image for image in people if image.identity != "0"]
    if not people:
        raise ValueError(f"images in {folder} must show people, got {len(files)} of identities -1 (junk) and 0 only.")
    if len(people) < len(files):
        logger.warning("%d of %d images left out: identities -1 (junk) and 0", len(files) - len(people), len(files))
    return people


def _other_identity(files: Sequence[Path], folder: Path, identity: str) -> str:
    """The remedy where files do not tell identities as asked: the other way, if that would do."""
    other = {"name": "folder", "folder": "name"}[identity]
    if all(_label(file, folder, other) for file in files):
        return f'identity="{other}" (--identity {other}) takes them from the {other}s instead.'
    return "Rename or move them, or list them in a CSV of your own: path, identity, camera."


def _check_folders(images: Sequence[PersonImage]) -> None:
    """Raise if folders would make one person of several, or several of one, as person/camera/image does."""
    folders: dict[str, set[Path]] = defaultdict(set)
    for image in images:
        folders[image.identity].add(image.path.parent)
    for name, places in folders.items():
        if len(places) > 1:
            given = f"{len(places)} folders {name!r}: {first_few(sorted(places))}"
            raise ValueError(f"every person must have one folder, got {given}. Move them together; _c1 is a camera.")
    by_depth = {len(image.path.parts): image.path for image in images}
    if len(by_depth) > 1:
        given = f"(or cameras would pass for people), got {first_few(sorted(by_depth.values()))}"
        raise ValueError(f"folders of people must all be at one depth {given}. Move them, or make several tables.")


def _label(file: Path, folder: Path, identity: str) -> tuple[str, str] | None:
    """Identity and camera."""
    if identity == "name":
        named = _BY_NAME.match(file.name)
        return (named[1], named[2]) if named else None
    found = _CAMERA.search(file.name)
    return None if file.parent == folder else (file.parent.name, (found[1] or found[2]) if found else "")


def _stored_poses(images: Sequence[PersonImage], folder: Path, directory: Path, progress: bool) -> list[Pose | None]:
    files = [_keypoint_file(directory / image.path.relative_to(folder).with_suffix("")) for image in images]
    missing = [file for file in files if not file.is_file()]
    if len(missing) == len(files):
        given = f"{directory}, which has none for any of {len(images)} images. Looked for {first_few(files)}"
        raise ValueError(f"keypoints must be a directory with NAME.json for image NAME, got {given}.")
    poses: list[Pose | None] = []
    problems = []
    pairs = zip(images, files, strict=True)
    for image, file in tqdm(pairs, total=len(files), unit="img", disable=None if progress else True):
        try:
            poses.append(_stored_pose(image.path, file) if file.is_file() else None)
        except ValueError as error:
            poses.append(None)
            problems.append(str(error))
    if missing:
        logger.warning("%d of %d images have no file of keypoints: %s", len(missing), len(images), first_few(missing))
    if problems:
        shown = first_few(problems, separator="; ")
        logger.warning("%d of %d images have keypoints that cannot be used: %s", len(problems), len(images), shown)
    return poses


def _keypoint_file(name: Path) -> Path:
    """Where the keypoints of an image may be; OpenPose appends to its name."""
    plain, openpose = (name.with_name(f"{name.name}{end}.json") for end in ("", "_keypoints"))
    return openpose if openpose.is_file() and not plain.is_file() else plain


def _stored_pose(path: Path, file: Path) -> Pose | None:
    width, height = load_image(path, f"image {path.name}").size
    try:
        people = read(file, size=(height, width))
    except NobodyError:
        return None
    return max(people, key=lambda pose: int(pose.visible.sum()))
