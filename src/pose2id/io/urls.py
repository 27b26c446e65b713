"""Places that are named by URL, through fsspec (extra "distributed"): s3://, gs://, hf://, file://, memory://, ..."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePath
from typing import IO, Any

from pose2id.io.checks import require_modules

logger = logging.getLogger(__name__)

_WAITS = (0.5, 1.0, 2.0)  # seconds before a file is written again
# Where a folder is made by what lies in it, and mkdir makes buckets, of misspelt names too. A file appears whole there.
_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf"}
_AT_ONCE = 4 << 20  # bytes that stores take in one request


def is_url(name: Any) -> bool:
    """Whether a name is a URL, and no path.

    Raises:
        ValueError: it was a URL before a Path was made of it.
    """
    if isinstance(name, PurePath) and name.parts and re.fullmatch(r"[A-Za-z][\w+.-]+:", name.parts[0]):
        raise ValueError(f"a URL must be given as a string, since a Path loses a slash of it, got {name!r}.")
    return isinstance(name, str) and "://" in name


def opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, or of a path on this machine, and the path there.

    Raises:
        ImportError: fsspec, or the protocol's own package, is not installed; with the command that does it.
        ValueError: no such protocol.
    """
    require_modules(f'{url} needs the extra "distributed"', '"pose2id[distributed]"', "fsspec")
    from fsspec.core import url_to_fs  # noqa: PLC0415 - optional
    from fsspec.registry import known_implementations  # noqa: PLC0415
    from fsspec.utils import get_protocol  # noqa: PLC0415

    protocol = get_protocol(url)
    try:
        filesystem, path = url_to_fs(url)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        remedy = "" if package == "fsspec" else f": pip install {package}"
        raise ImportError(f"{protocol}:// needs another package{remedy} ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{url} must be of a protocol that fsspec knows, got {protocol}:// ({error}).") from error
    return filesystem, path.rstrip("/")


def write(filesystem: Any, path: str, content: IO[bytes]) -> None:
    """Write a file, and its folder, where there are any: whole or not at all; tried again 3 times after an OSError.

    A file that is replaced stays as it was until then; in stores this holds for 4 MiB at most.
    """
    folder, _, name = path.rpartition("/")
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    store = bool(protocols & _STORES)
    unfinished = path if store else f"{folder}/.{name}.{secrets.token_hex(4)}"
    at_once = store and content.seek(0, os.SEEK_END) <= _AT_ONCE
    for wait in (*_WAITS, None):
        try:
            if not store:
                filesystem.makedirs(folder, exist_ok=True)
            content.seek(0)
            if at_once:
                filesystem.pipe_file(path, content.read())
            else:
                with filesystem.open(unfinished, "wb") as target:
                    shutil.copyfileobj(content, target, 1 << 20)
            if not store:
                filesystem.mv(unfinished, path)
        except BaseException as error:
            if not at_once:
                with suppress(Exception):
                    filesystem.rm_file(unfinished)
            if wait is None or not isinstance(error, OSError):
                raise
            logger.warning("%s is written again in %s s: %s", path, wait, error)
            time.sleep(wait)
        else:
            return


@contextmanager
def named(url: str, what: str) -> Iterator[None]:
    """Say in whatever error a file system has what cannot be `what`, such as "read", as an OSError."""
    try:
        yield
    except Exception as error:  # credentials, connections: each package has its own
        raise OSError(f"{url} cannot be {what}: {str(error) or type(error).__name__}.") from error
