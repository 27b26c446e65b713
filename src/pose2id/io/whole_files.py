"""Files that are written atomically, and replace nothing unless asked.

While they are written they have hidden names, which tell machine and process: what a killed process left is removed by
the next one that writes into that folder.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.io.checks import checked_flag

_MACHINE = f"{zlib.crc32(platform.node().encode()) & 0xFFFFFF:06x}"
_HIDDEN = re.compile(rf"\.(?:.+\.|unfinished-){_MACHINE}([0-9a-f]{{6}})[0-9a-f]{{4}}", re.DOTALL)
_MOVED = ".moved"  # in a hidden directory: what is being moved out of it
_numbers = itertools.count()
_at_work: set[str] = set()  # hidden names of this process
_swept: set[Path] = set()  # folders


def new_file(path: str | os.PathLike[str], *, overwrite: bool | None = None, suffixes: tuple[str, ...] = ()) -> Path:
    """The file to write: `path`, or what it links to, so that a link stays one. Called before any work.

    Args:
        path: of the file, in a folder that exists.
        overwrite: whether it may exist; None: it must not, and the caller has no such option.
        suffixes: one of which it must end in.

    Raises:
        FileExistsError: it exists and may not.
        FileNotFoundError: its folder does not exist.
        OSError: its folder is a file, its name too long.
        ValueError: another ending.
    """
    with _named(path):
        target = Path(path).resolve()
        exists = target.exists()
    if suffixes and Path(path).suffix.lower() not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}.")
    check_folder(target.parent)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {Path(path).parent}.")
    if exists and not (overwrite is not None and checked_flag(overwrite, "overwrite")):
        replaced = "" if overwrite is None else ", or overwrite it (overwrite=True, --overwrite)"
        raise FileExistsError(f"{path} exists. Choose another name{replaced}.")
    return target


def new_directory(path: str | os.PathLike[str]) -> Path:
    """A directory to fill, which does not exist yet or is empty.

    Raises:
        FileExistsError: it is neither, or would be in a file.
        OSError: its name is too long.
    """
    target = Path(path).expanduser()
    check_folder(target.parent)
    _remove_leftovers(target)
    with _named(path):
        exists = target.exists()
    if exists and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty. Choose another.")
    return target


def check_folder(path: Path) -> None:
    """Raise a FileExistsError if a file is where this folder, or one that it is in, should be."""
    with _named(path):
        place = next((place for place in (path, *path.parents) if place.exists()), path)
    if place.is_file():
        raise FileExistsError(f"{path} must be a folder, and {place} is a file. Choose another.")


@contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A hidden name beside `path` to write to: it becomes `path` when all has gone well, and is removed if not.

    Raises:
        OSError: the file cannot be written; named. FileExistsError: without `replace`, it appeared in the meantime.
    """
    with _told_of(path), _hidden_beside(path) as unfinished:
        yield unfinished
        _give_name(unfinished, path, replace)


def write_files(contents: Mapping[Path, bytes], *, replace: bool = True) -> None:
    """Write files that belong together: all are whole before one gets its name; where the last one is, all are.

    If one cannot be written or named, those that are new are removed. With `replace`, a process killed between two
    names leaves an older last file beside what is new.

    Args:
        contents: of each path, in the order of naming.
        replace: as of `whole_file`.

    Raises:
        OSError: as `whole_file`.
    """
    new = []
    with ExitStack() as files:
        whole = {}
        for path, content in contents.items():
            with _told_of(path):
                whole[path] = files.enter_context(_hidden_beside(path))
                whole[path].write_bytes(content)
        try:
            for path, unfinished in whole.items():
                is_new = not path.exists()
                with _told_of(path):
                    _give_name(unfinished, path, replace)
                new += [path] * is_new
        except BaseException:
            for path in new:
                _remove(path)
            raise


@contextmanager
def whole_directory(path: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """A hidden directory to fill: its content becomes that of `path`, new or empty, when all has gone well.

    `last` is moved there last: without it, the directory is not whole. If anything fails, nothing is left in it.

    Raises:
        FileExistsError: the directory holds something.
    """
    target = new_directory(path)
    made, moved = not target.exists(), []
    with _named(path):
        target.mkdir(parents=True, exist_ok=True)
    try:
        # Inside the target, which may be a mount, or all that may be written to.
        with _hidden(target, ".unfinished-") as unfinished:
            unfinished.mkdir()
            yield unfinished
            files = sorted(unfinished.iterdir(), key=lambda file: file.name == last)
            listed = "/".join(f"{file.stat().st_ino}:{file.name}" for file in files)
            (unfinished / _MOVED).write_text(listed, encoding="utf-8")
            for file in files:
                moved.append(file.rename(target / file.name))
    except BaseException:
        for file in moved:
            _remove(file)
        if made:
            with suppress(OSError):  # another process put something there
                target.rmdir()
        raise


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say in an OSError what cannot be written."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"{path} cannot be written: {error.strerror or error}.") from error
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} cannot be the name of a file: {error}.") from error


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder beside a file, for what is needed while that is made; removed at the end."""
    with _hidden_beside(path) as folder:
        folder.mkdir()
        yield folder


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Say in an OSError which file it is about, whatever hidden name the file has."""
    try:
        yield
    except FileExistsError as error:
        raise FileExistsError(f"{path} was created by another process in the meantime. Choose another name.") from error
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error


def _hidden_beside(path: Path) -> AbstractContextManager[Path]:
    return _hidden(path.parent, f".{path.name[:40]}.")


@contextmanager
def _hidden(folder: Path, prefix: str) -> Iterator[Path]:
    """A hidden name in a folder. What has it in the end is removed, and before, once, what killed processes left."""
    if folder not in _swept:
        _swept.add(folder)
        _remove_leftovers(folder)
    name = f"{prefix}{_MACHINE}{os.getpid() & 0xFFFFFF:06x}{next(_numbers) & 0xFFFF:04x}"
    _at_work.add(name)
    try:
        yield folder / name
    finally:
        _remove(folder / name)
        _at_work.discard(name)


def _remove_leftovers(folder: Path) -> None:
    """Remove hidden files and directories whose process, on this machine, is no more."""
    with suppress(OSError, UnicodeDecodeError):
        for path in folder.iterdir():
            found = _HIDDEN.fullmatch(path.name)
            if found and path.name not in _at_work and not _is_alive(int(found[1], 16)):
                _remove_moved(path)
                _remove(path)


def _remove_moved(unfinished: Path) -> None:
    """Remove what had been moved out of a hidden directory, if not all of it was: the very files, told by inode."""
    if not (unfinished / _MOVED).exists():
        return
    files = [file.partition(":") for file in (unfinished / _MOVED).read_text(encoding="utf-8").split("/")]
    if any((unfinished / name).exists() for _, _, name in files):
        for inode, _, name in files:
            moved = unfinished.parent / name
            if moved.exists() and str(moved.stat().st_ino) == inode:
                _remove(moved)


def _is_alive(process: int) -> bool:
    """Whether another process has this number. In a container, a killed one may have had ours."""
    if os.name == "nt":  # where a signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return process != os.getpid()


def _remove(path: Path) -> None:
    """Remove a file or directory if it can be: no error may hide the one before."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _give_name(source: Path, path: Path, replace: bool) -> None:
    if replace:
        source.replace(path)
    else:
        _link(source, path)


def _link(source: Path, path: Path) -> None:
    """Give a file a name that no other file has."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links
        if path.exists():
            raise FileExistsError from error
        source.replace(path)


def write_npy(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterable[NDArray[Any]], *, replace: bool = False
) -> None:
    """Write an array whose blocks of rows come one after the other; `replace`: in the place of another file.

    Raises:
        OSError: as `whole_file`.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    # Not a memory map: written pages would fill memory, and a full disk would end the process.
    with whole_file(path, replace=replace) as unfinished, unfinished.open("xb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)
