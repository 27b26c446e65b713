"""What the readers share: where a set lies, which images are there, whether they are as many as published."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.datasets.dataset import Split
from pose2id.io.checks import first_few
from pose2id.io.images import SUFFIXES

LEVELS = 2  # how far below the given folder a set may lie
_SKIPPED = (".db", ".txt")  # Thumbs.db among them
_COUNTED = ("images", "identities", "cameras", "tracklets")  # as Split.counts has them


@dataclass(frozen=True)
class Layout:
    """How a set lies on disk.

    Attributes:
        name: the set's name.
        markers: names, in lower case, by which its folder is known: all of one entry.
        tree: the expected tree, for people.
    """

    name: str
    markers: tuple[tuple[str, ...], ...]
    tree: str

    def fits(self, folder: Path) -> bool:
        """Whether a folder is this set's, by the names in it."""
        names = entries(folder)
        return any(all(name in names for name in marker) for marker in self.markers)


def entries(folder: Path) -> dict[str, Path]:
    """Files and folders in a folder by their name in lower case; hidden ones are left out."""
    return {path.name.lower(): path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def candidates(place: Path, layouts: Iterable[Layout]) -> list[tuple[Layout, Path]]:
    """Sets in a folder, else those in the folders below it, up to two levels down: the first level that has any."""
    layouts, level = tuple(layouts), [place]
    for _ in range(LEVELS + 1):
        found = [(layout, folder) for folder in level for layout in layouts if layout.fits(folder)]
        if found:
            return found
        level = [path for folder in level for path in entries(folder).values() if path.is_dir()]
    return []


def top_of(place: str | os.PathLike[str], layout: Layout) -> Path:
    """The folder of a set, at a place or up to two levels below it.

    Raises:
        FileNotFoundError: there is no such folder, or no such set in it; the expected tree is shown.
        NotADirectoryError: the place is a file.
        ValueError: there are several.
    """
    folder = checked_folder(place)
    found = candidates(folder, [layout])
    if not found:
        raise missing(folder, next(name for marker in layout.markers for name in marker), layout)
    return only(found, folder)[1]


def only(found: list[tuple[Layout, Path]], place: Path) -> tuple[Layout, Path]:
    """The one candidate, or an error that lists them."""
    if len(found) > 1:
        shown = first_few((f"{layout.name} in {folder}" for layout, folder in found), len(found), most=6)
        raise ValueError(f"{place} must hold one data set, got {len(found)}: {shown}. Give the folder of one of them.")
    return found[0]


def checked_folder(place: str | os.PathLike[str]) -> Path:
    """A folder that is there, `~` expanded."""
    folder = Path(place).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} must be the folder of a data set, got a file.")
    return folder


def missing(folder: Path, what: str, layout: Layout) -> FileNotFoundError:
    """The error for a set without one of its folders or files: the expected tree, and what is there."""
    there = entries(folder)
    names = [path.name + ("/" if path.is_dir() else "") for path in there.values()]
    found = first_few(names, most=8) if names else "nothing"
    return FileNotFoundError(
        f"{layout.name}: there is no {what} in {folder}. Expected:\n{layout.tree.strip()}\nFound: {found}."
    )


def part(folder: Path, name: str, layout: Layout) -> Path:
    """A folder or file of a set, whatever the case of its name, or `missing`."""
    found = optional(folder, name)
    if found is None:
        raise missing(folder, name, layout)
    return found


def optional(folder: Path, name: str) -> Path | None:
    """As `part`, or None."""
    return entries(folder).get(name.lower())


def image_names(folder: Path, layout_name: str) -> list[str]:
    """Images in and below a folder, relative to it, with "/", sorted.

    Hidden files, Thumbs.db, desktop.ini, *.txt and *.db are skipped. Links are followed.

    Raises:
        NotADirectoryError: it is a file.
        ValueError: no image, files that are not images, or broken links.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{layout_name}: {folder} must be a folder of images, got a file.")
    names: list[str] = []
    others: list[str] = []
    for name, is_file in _walk(folder, "", (os.path.realpath(folder),)):
        (names if is_file and name.lower().endswith(SUFFIXES) else others).append(name)
    if others:
        shown = first_few(sorted(others))
        raise ValueError(f"{layout_name}: {folder} must hold images ({', '.join(SUFFIXES)}), got {shown}. Move them.")
    if not names:
        raise ValueError(f"{layout_name}: {folder} must hold images, got none. Is the archive unpacked?")
    return sorted(names)


def _walk(folder: str | Path, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """(relative name, whether it is there) of files; `above` are real folders on the way, to which a link may lead."""
    with os.scandir(folder) as found:
        for entry in found:
            lower = entry.name.lower()
            if entry.name.startswith(".") or lower == "desktop.ini":
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in above:
                    yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, real))
            elif not lower.endswith(_SKIPPED):
                yield prefix + entry.name, entry.is_file()


def named_images(
    folder: Path, pattern: re.Pattern[str], scheme: str, layout_name: str
) -> list[tuple[str, re.Match[str]]]:
    """Images of a folder with what a pattern finds at the start of their file names (without the folders before them).

    Raises:
        ValueError: names that do not fit; the first few are named.
    """
    names = image_names(folder, layout_name)
    return list(zip(names, matched(names, pattern, scheme, f"{layout_name}: {folder}"), strict=True))


def matched(names: list[str], pattern: re.Pattern[str], scheme: str, where: str) -> list[re.Match[str]]:
    """What a pattern finds at the start of each file name, or an error that names those where it finds nothing."""
    found = [pattern.match(name.rpartition("/")[2]) for name in names]
    bad = [name for name, match in zip(names, found, strict=True) if match is None]
    if bad:
        raise ValueError(f"{where} must hold images named like {scheme}, got {first_few(bad)}. Move or rename them.")
    return [match for match in found if match is not None]


def split_from(
    folder: Path, names: Iterable[str], pids: Iterable[int], camids: Iterable[int] | None, **more: NDArray[np.int64]
) -> Split:
    """A split of images of one folder, with integers as labels."""
    paths = tuple(os.path.join(folder, name) for name in names)
    cameras = None if camids is None else np.array(list(camids), dtype=np.int64)
    return Split(paths, np.array(list(pids), dtype=np.int64), cameras, **more)


def joined(splits: Collection[Split]) -> Split:
    """Splits of the same kind of labels one after another, without tracklets."""
    cameras = [split.camids for split in splits if split.camids is not None]
    return Split(
        tuple(path for split in splits for path in split.paths),
        np.concatenate([split.pids for split in splits]),
        np.concatenate(cameras) if cameras else None,
    )


def list_lines(path: Path, layout_name: str) -> list[tuple[str, int]]:
    """(name, number) of a list's lines "name number"; empty lines are skipped.

    Raises:
        ValueError: a line of another form, or none at all.
    """
    rows = []
    for number, line in enumerate(text_of(path, layout_name).splitlines(), start=1):
        words = line.split()
        if words and (len(words) != 2 or not words[1].isdecimal()):
            raise ValueError(f"{layout_name}: line {number} of {path} must be a name and a number, got {line!r}.")
        rows += [(words[0].replace("\\", "/"), int(words[1]))] if words else []
    if not rows:
        raise ValueError(f"{layout_name}: {path} must list images, got an empty file.")
    return rows


def text_of(path: Path, layout_name: str) -> str:
    """The text of a set's list."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{layout_name}: {path} must be text, got something else ({error}).") from error


def check_listed(listed: Iterable[str], there: Collection[str], folder: Path, layout_name: str) -> None:
    """Raise for images that a list names once too often, or that are not on disk."""
    names = list(listed)
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"{layout_name}: an image must be listed once, got {first_few(twice)} more than once.")
    there = set(there)
    gone = [name for name in names if name not in there]
    if gone:
        raise FileNotFoundError(f"{layout_name}: {folder} lacks {first_few(gone)} of its lists.")


def unlisted(names: Iterable[str], listed: Collection[str], what: str) -> tuple[str, ...]:
    """A note about images that are in no list."""
    others = sorted(set(names) - set(listed))
    return (f"Left out, in no list: {len(others):,} images of {what} ({first_few(others)}).",) if others else ()


def unread(top: Path, read: Collection[Path | None]) -> tuple[str, ...]:
    """A note about folders beside those that were read."""
    others = [path.name for path in entries(top).values() if path.is_dir() and path not in read]
    return (f"Not read: {first_few(others, most=8)}.",) if others else ()


def from_one(pids: NDArray[np.int64]) -> NDArray[np.int64]:
    """People's numbers, counted from 0, from 1 on: 0 is for distractors. Junk stays."""
    return np.where(pids < 0, pids, pids + 1)


def check_counts(
    name: str, splits: Mapping[str, Split | None], published: Mapping[str, Mapping[str, int]]
) -> tuple[str, ...]:
    """Warn, once, of splits whose counts are not the published ones; the same as notes.

    Args:
        name: of the set.
        splits: by name; None is not compared.
        published: of each split, "images", "identities", "cameras" or "tracklets" to their number.
    """
    differ = []
    for split_name, wanted in published.items():
        split = splits.get(split_name)
        found = {} if split is None else dict(zip(_COUNTED, split.counts(), strict=False))
        differ += [
            f"{split_name}: {found[what]:,} {what} found, {number:,} published"
            for what, number in wanted.items()
            if found and found[what] != number
        ]
    return warn_of(name, differ)


def warn_of(name: str, differ: list[str]) -> tuple[str, ...]:
    """Warn, once, of counts that are not the published ones; the same as notes."""
    if differ:
        warnings.warn(f"{name} is not as published: {'; '.join(differ)}.", UserWarning, stacklevel=4)
    return tuple(f"Not as published: {line}." for line in differ)


def read_mat(path: Path, layout_name: str, *keys: str) -> dict[str, Any]:
    """Arrays of a .mat file.

    Raises:
        ValueError: the file cannot be read, or lacks one of them.
    """
    from scipy.io import loadmat  # noqa: PLC0415 - slow to import

    try:
        content = loadmat(path)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{layout_name}: {path} cannot be read ({error}).") from error
    gone = [key for key in keys if key not in content]
    if gone:
        held = ", ".join(key for key in content if not key.startswith("__")) or "nothing"
        raise ValueError(f"{layout_name}: {path} must hold {' and '.join(gone)}; it holds {held}.")
    return {key: content[key] for key in keys}
