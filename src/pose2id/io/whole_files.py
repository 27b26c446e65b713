"""Files that are written atomically, and replace nothing unless asked."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.io.checks import checked_flag


def new_file(path: str | os.PathLike[str], *, overwrite: bool | None = None, suffixes: tuple[str, ...] = ()) -> Path:
    """The file to write: `path`, or what it links to, so that a link stays one. Called before any work.

    Args:
        path: of the file, in a folder that exists.
        overwrite: whether it may exist; None: it must not, and the caller has no such option.
        suffixes: one of which it must end in.

    Raises:
        FileExistsError: it exists and may not.
        FileNotFoundError: its folder does not exist.
        ValueError: another ending.
    """
    target = Path(path).resolve()
    if suffixes and Path(path).suffix.lower() not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {Path(path).parent}.")
    if target.exists() and not (overwrite is not None and checked_flag(overwrite, "overwrite")):
        raise FileExistsError(f"{path} exists. Choose another name{'' if overwrite is None else ', or overwrite it'}.")
    return target


def new_directory(path: str | os.PathLike[str]) -> Path:
    """A directory to fill, which does not exist yet or is empty.

    Raises:
        FileExistsError: it is neither.
    """
    target = Path(path).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty. Choose another.")
    return target


@contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A hidden name beside `path` to write to: it becomes `path` when all has gone well, and is removed if not.

    Raises:
        OSError: the file cannot be written; named. FileExistsError: without `replace`, it appeared in the meantime.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield unfinished
        if replace:
            unfinished.replace(path)
        else:
            _link(unfinished, path)
    except FileExistsError as error:
        raise FileExistsError(f"{path} was created by another process in the meantime. Choose another name.") from error
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


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


def write_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterable[NDArray[Any]]) -> None:
    """Write an array whose blocks of rows come one after the other.

    Raises:
        OSError: as `whole_file`.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    # Not a memory map: written pages would fill memory, and a full disk would end the process.
    with whole_file(path, replace=False) as unfinished, unfinished.open("xb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)
