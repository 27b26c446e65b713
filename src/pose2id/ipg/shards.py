"""Generated pictures in WebDataset shards, in a folder or behind a URL: `pictures-000000-1f3a9c2e.tar`, ...

In a shard the pictures of an image follow each other, as KEY.pose1.png to KEY.poseM.png: the very files that a folder
would have. KEY is the image's name; in its last part "%" and "." are written %25 and %2E, since WebDataset ends a key
at that part's first dot. The index, `pictures-000000-1f3a9c2e.json`, says where in the shard each picture lies and what
it was made from. It is written last: a shard without index is not there. What has an index is never written again.

A later shard has a higher number. Runs at one time may choose the same one: the random part of their names keeps them
apart, and puts them in order.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import secrets
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from PIL import Image

from pose2id.io.checks import checked_count
from pose2id.io.rows import blocks
from pose2id.io.urls import is_url, named, opened, write
from pose2id.io.whole_files import whole_file
from pose2id.ipg.folder import check_found, names_in

logger = logging.getLogger(__name__)

IMAGES = 256  # of a shard, at most
BYTES = 256 << 20  # when a shard is full
_INDEX = re.compile(r"pictures-(\d{6,})-[0-9a-f]{8}\.json")
_AHEAD = 32  # images whose pictures are asked for at once
_REQUEST = 4 << 20  # bytes of one request, where it is for more than one image
_GAP = 16 << 10  # bytes between two images that may be read for nothing: less than a request costs
_BLOCK = tarfile.BLOCKSIZE


def in_shards(directory: str | os.PathLike[str]) -> bool:
    """Whether pictures are in shards here: behind every URL, and in folders that have indexes and no pose1."""
    if is_url(directory):
        return True
    folder = Path(directory)
    return not (folder / "pose1").is_dir() and any(_INDEX.fullmatch(path.name) for path in folder.glob("*.json"))


def checked_shards(shards: Shards, count: int) -> Shards:
    """Shards with pictures in at least `count` poses."""
    if not len(shards):
        rule = "must hold shards of pictures (pictures-*.tar, each with its .json), and has none"
        raise ValueError(f"directory {rule}, got {shards.url!r}. Make them with `pose2id generate --out URL`.")
    if count > shards.num_poses:
        given = f"the number of an image's pictures in {shards.url}, got {count}"
        raise ValueError(f"num_poses must be at most {shards.num_poses}, {given}.")
    return shards


@dataclass(frozen=True)
class Picture:
    """One picture: where it lies, and what it was made from.

    Attributes:
        name: the image's, and m the number of the pose, from 1.
        shard: the path of the .tar in the file system.
        offset, size: its bytes there.
        crc32: their checksum.
    """

    name: str
    m: int
    shard: str
    offset: int
    size: int
    crc32: int
    image: str | None
    made_with: Mapping[str, Any]

    @property
    def note(self) -> dict[str, Any]:
        """What the PNG itself says that it was made from."""
        return {**self.made_with} if self.image is None else {"image": self.image, **self.made_with}

    def __str__(self) -> str:
        """Where errors say that it is."""
        return f"{self.shard}:{_key(self.name)}.pose{self.m}.png"


@dataclass(frozen=True)
class _Shard:
    order: tuple[int, str]  # the newest is last
    path: str
    size: int  # as the index has it
    notes: list[dict[str, Any]]


class Shards:
    """The pictures in the shards of one place, known by their indexes, and read as they are asked for.

    An image that several shards have is that of the newest. An index that cannot be understood counts as none, with a
    warning in the log.

    Args:
        url: of the folder with the shards; it need not exist yet. Or a path.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        self.filesystem, self.path = opened(self.url)
        self.next_number = 0
        self._images: dict[str, tuple[_Shard, str | None, list[list[int]]]] = {}
        self._sizes: dict[str, int | None] = {}  # of the shards that are there
        self._read: set[str] = set()  # indexes
        self._told: set[str] = set()  # of damage
        self.refresh()

    def refresh(self) -> None:
        """Look which shards are there, and read the indexes that are new."""
        self.filesystem.invalidate_cache()
        with named(self.url, "read"):
            try:
                found = self.filesystem.ls(self.path, detail=True)
            except FileNotFoundError:
                found = []
        self._sizes = {file["name"]: file["size"] for file in found}
        indexes = {path: int(number[1]) for path in self._sizes if (number := _INDEX.fullmatch(_last(path)))}
        self.next_number = max(indexes.values(), default=-1) + 1
        new = sorted(indexes.keys() - self._read)
        contents = self._bytes(new, [None] * len(new), [None] * len(new)) if new else []
        for path, content in zip(new, contents, strict=True):
            try:
                self._add(indexes[path], path.removesuffix(".json") + ".tar", json.loads(content))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                logger.warning("%s is no whole index, and its shard is left out (%s)", path, error)
            else:
                self._read.add(path)

    @property
    def num_poses(self) -> int:
        """The most pictures that an image has."""
        return max((len(places) for _, _, places in self._images.values()), default=0)

    def __contains__(self, name: object) -> bool:
        """Whether an image of this name has pictures."""
        return name in self._images

    def __iter__(self) -> Iterator[str]:
        """The names of images that have pictures."""
        return iter(self._images)

    def __len__(self) -> int:
        """How many images have pictures."""
        return len(self._images)

    def pictures(self, name: str) -> list[Picture]:
        """The pictures of an image, in the order of the poses; [] if it has none."""
        if name not in self._images:
            return []
        shard, image, places = self._images[name]
        return [
            Picture(name, m, shard.path, offset, size, crc32, image, shard.notes[note])
            for m, (offset, size, crc32, note) in enumerate(places, 1)
        ]

    def notes(self, name: str) -> list[dict[str, Any]]:
        """What an image's pictures were made from; [] if it has none, or, with a warning, if their shard is damaged."""
        damage = self.damage(name) if name in self._images else None
        if damage is None:
            return [picture.note for picture in self.pictures(name)]
        if damage not in self._told:
            logger.warning("%s: its pictures are made anew", damage)
            self._told.add(damage)
        return []

    def damage(self, name: str) -> str | None:
        """What is wrong with the shard of an image's pictures; None: nothing that its size would tell."""
        shard = self._images[name][0]
        size = self._sizes.get(shard.path, -1)
        if size in (shard.size, None):
            return None
        given = "it is gone" if size == -1 else f"it has {size}"
        return f"{shard.path} must have the {shard.size} bytes of its index, and {given}"

    def find(self, images: Sequence[Any], count: int) -> list[list[Picture]]:
        """`count` pictures of each image, after a look at what is there now.

        The longest end of an image's path that the shards have is its name.

        Raises:
            TypeError: an image that is not a path.
            ValueError: pictures that are missing, in damaged shards, or that two images share, named.
        """
        self.refresh()
        names = names_in(self._images, images)
        found = [[] if name is None else self.pictures(name)[:count] for name in names]
        check_found(
            found, images, count, self.url, f"{self.url}/pictures-*.tar:<the image's name>.pose1..pose{count}.png"
        )
        for name in dict.fromkeys(names):
            if name is not None and (damage := self.damage(name)) is not None:
                raise ValueError(f"{damage}. Run `pose2id generate` again: it makes these pictures anew.")
        return found

    def contents(self, found: Sequence[Sequence[Picture]]) -> Iterator[list[bytes]]:
        """The PNG files of each image's pictures.

        Raises:
            ValueError: they are not what the index says.
        """
        for block in blocks(len(found), _AHEAD):
            some = [list(pictures) for pictures in found[block]]
            spans = [(row[0].shard, row[0].offset, row[-1].offset + row[-1].size) for row in some if row]
            read = iter(self._of_spans(spans) if spans else [])
            for pictures in some:
                content, start = (next(read), pictures[0].offset) if pictures else (b"", 0)
                files = [content[p.offset - start : p.offset - start + p.size] for p in pictures]
                for picture, file in zip(pictures, files, strict=True):
                    if zlib.crc32(file) != picture.crc32:
                        remedy = "Delete that shard, and run `pose2id generate` again"
                        raise ValueError(f"{picture} must be what its index says, and is damaged. {remedy}.")
                yield files

    def decoded(self, found: Sequence[Sequence[Picture]]) -> Iterator[list[Image.Image]]:
        """Each image's pictures."""
        return ([_decoded(file) for file in files] for files in self.contents(found))

    def copies(self, found: Sequence[Sequence[Picture]], folder: Path) -> list[list[Path]]:
        """The pictures as files of a folder, `pose{m}/NAME.png`; those that it has already are not read again."""
        targets = [[folder / f"pose{p.m}" / f"{p.name}.png" for p in pictures] for pictures in found]
        missing = [i for i, row in enumerate(found) if not all(map(_is_copy, targets[i], row))]
        for i, files in zip(missing, self.contents([found[i] for i in missing]), strict=True):
            for target, file in zip(targets[i], files, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(target) as unfinished:
                    unfinished.write_bytes(file)
        return targets

    def write_beside(self, name: str, content: IO[bytes] | None) -> None:
        """Write a file among the shards; None: remove it, if it is there."""
        path = f"{self.path}/{name}"
        with named(f"{self.url}/{name}", "written"):
            if content is not None:
                write(self.filesystem, path, content)
            elif self.filesystem.exists(path):
                self.filesystem.rm_file(path)

    def _add(self, number: int, path: str, index: Mapping[str, Any]) -> None:
        notes = [dict(note) for note in index["notes"]]
        shard = _Shard((number, path), path, int(index["size"]), notes)
        images = {_checked_name(name): (shard, of["image"], of["pictures"]) for name, of in index["images"].items()}
        for _, _, places in images.values():
            for offset, size, crc32, note in places:
                if not all(isinstance(value, int) for value in (offset, size, crc32, note)):
                    raise TypeError("a place is not of whole numbers")
                if min(offset, size, crc32, note) < 0 or offset + size > shard.size or note >= len(notes):
                    raise ValueError("a picture is outside its shard")
        for name, entry in images.items():
            # Indexes may come out of order: one that was not whole a moment ago.
            if name not in self._images or self._images[name][0].order <= shard.order:
                self._images[name] = entry

    def _of_spans(self, spans: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """What is in a shard from a start to an end; spans that follow each other come by one request."""
        requests: list[tuple[str, int, int]] = []
        of_span: dict[int, int] = {}
        for i in sorted(range(len(spans)), key=spans.__getitem__):
            shard, start, end = spans[i]
            last, first, latest = requests[-1] if requests else ("", 0, 0)
            if last == shard and start <= latest + _GAP and end <= first + _REQUEST:
                requests[-1] = shard, first, max(end, latest)
            else:
                requests.append(spans[i])
            of_span[i] = len(requests) - 1
        shards, starts, ends = (list(values) for values in zip(*requests, strict=True))
        read = self._bytes(shards, starts, ends)
        offsets = [(k := of_span[i], start - starts[k], end - starts[k]) for i, (_, start, end) in enumerate(spans)]
        return [read[k][start:end] for k, start, end in offsets]

    def _bytes(self, paths: list[str], starts: list[Any], ends: list[Any]) -> list[bytes]:
        """Parts of files, all at once where the file system can."""
        with named(self.url, "read"):
            read = self.filesystem.cat_ranges(paths, starts, ends)
            for content in read:
                if isinstance(content, BaseException):
                    raise content
        return [bytes(content) for content in read]

    def __repr__(self) -> str:
        """Where, and how much there is."""
        return f"Shards({self.url!r}, images={len(self)}, num_poses={self.num_poses})"


class ShardWriter:
    """Adds shards to those of a place.

        with ShardWriter(Shards("s3://bucket/generated")) as writer:
            writer.write(name, [(png, note), ...])  # the M pictures of an image

    A shard is a temporary file on this machine until it is full, then it is uploaded, and after it its index; what
    fails with an OSError is tried again 3 times, within seconds. Leaving the block finishes the last one, on an error
    too: images that are in it are whole. Several writers may be at work in one place.

    Args:
        shards: of the place.
        images: that fill a shard.
        size: bytes that do.
    """

    def __init__(self, shards: Shards, *, images: int = IMAGES, size: int = BYTES) -> None:
        self.shards = shards
        self.images, self.size = checked_count(images, "images"), checked_count(size, "size")
        self._shard: _Unfinished | None = None

    def write(self, name: str, pictures: Sequence[tuple[bytes, Mapping[str, Any]]]) -> None:
        """Add an image: in the order of the poses each picture's PNG file, with the note that it has.

        Raises:
            OSError: a shard cannot be written; its images are lost.
        """
        if self._shard is None:
            self._shard = _Unfinished()
        self._shard.add(name, pictures)
        if len(self._shard.images) >= self.images or self._shard.tar.offset >= self.size:
            self.finish()

    def finish(self) -> None:
        """Upload the shard that has been begun, if there is one."""
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.upload(self.shards)

    def __enter__(self) -> ShardWriter:
        """The writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Finish the last shard."""
        if error is None:
            self.finish()
            return
        try:
            self.finish()
        except OSError as second:  # must not hide the first
            logger.warning("%s", second)


class _Unfinished:
    """A shard in a temporary file, which has no name and goes with the process."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="pose2id-")  # noqa: SIM115 - closed by upload
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self.images: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, int] = {}  # without the image, as JSON; many pictures have the same

    def add(self, name: str, pictures: Sequence[tuple[bytes, Mapping[str, Any]]]) -> None:
        if not pictures or _checked_name(name) in self.images:
            raise ValueError(f"name must be that of a new image with pictures, got {name!r} with {len(pictures)}.")
        image, places, start = pictures[0][1].get("image"), [], self.tar.offset
        if any(note.get("image") != image for _, note in pictures):
            raise ValueError(f"pictures of {name} must be of one image, and their notes have two.")
        try:
            for m, (png, note) in enumerate(pictures, 1):
                info = tarfile.TarInfo(f"{_key(name)}.pose{m}.png")
                info.size = len(png)
                self.tar.addfile(info, io.BytesIO(png))
                rest = json.dumps({key: value for key, value in note.items() if key != "image"}, sort_keys=True)
                number = self._notes.setdefault(rest, len(self._notes))
                offset = self.tar.offset - -(-len(png) // _BLOCK) * _BLOCK
                places.append([offset, len(png), zlib.crc32(png), number])
        except BaseException:  # an interruption, too, must leave whole images alone
            self.tar.offset = self.file.seek(start)
            self.file.truncate()
            raise
        self.images[name] = {"image": image, "pictures": places}

    def upload(self, shards: Shards) -> None:
        with self.file:
            self.tar.close()
            size = self.file.seek(0, os.SEEK_END)
            index = {"size": size, "notes": [json.loads(note) for note in self._notes], "images": self.images}
            shards.refresh()
            name = f"pictures-{shards.next_number:06}-{secrets.token_hex(4)}"
            try:
                shards.write_beside(f"{name}.tar", self.file)
                shards.write_beside(f"{name}.json", io.BytesIO(json.dumps(index).encode()))
            except Exception:
                # Not after an interruption: a store may go on with the index, and needs the shard then.
                for end in (".json", ".tar"):
                    with suppress(Exception):  # must not hide the first
                        shards.filesystem.rm_file(f"{shards.path}/{name}{end}")
                raise
        shards.refresh()


def _key(name: str) -> str:
    """The key of an image's sample."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.replace("%", "%25").replace(".", "%2E")


def _checked_name(name: str) -> str:
    """Of an image: a path below a folder."""
    if {"..", ""} & set(name.split("/")) or (os.name == "nt" and {"\\", ":"} & set(name)):
        raise ValueError(f"an image's name must be a path below a folder, got {name!r}")
    return name


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _decoded(file: bytes) -> Image.Image:
    with Image.open(io.BytesIO(file)) as picture:
        picture.load()
        return picture


def _is_copy(path: Path, picture: Picture) -> bool:
    same_size = path.is_file() and path.stat().st_size == picture.size
    return same_size and zlib.crc32(path.read_bytes()) == picture.crc32
