"""Places that are named by URL, through fsspec (extra "distributed"): s3://, gs://, hf://, file://, memory://, ..."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pose2id.io.checks import require_modules

# Where a folder is made by what lies in it; mkdir makes buckets there, of misspelt names too.
_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf"}


def is_url(name: Any) -> bool:
    """Whether a name is a URL, and no path."""
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


def make_folder(filesystem: Any, path: str) -> None:
    """Make a folder, where there are any."""
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    if not protocols & _STORES:
        filesystem.makedirs(path, exist_ok=True)


@contextmanager
def named(url: str, what: str) -> Iterator[None]:
    """Say in whatever error a file system has what cannot be `what`, such as "read", as an OSError."""
    try:
        yield
    except Exception as error:  # credentials, connections: each package has its own
        raise OSError(f"{url} cannot be {what}: {str(error) or type(error).__name__}.") from error
