"""Image files that several readers want, the model and the generator, are decoded once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from PIL import Image


@dataclass
class _Kept:
    pictures: dict[tuple[str, int, int], Image.Image] = field(default_factory=dict)
    free: int = 256 << 20  # bytes


_kept: ContextVar[_Kept | None] = ContextVar("_kept", default=None)


@contextmanager
def decoding_once() -> Iterator[None]:
    """Within, `load_image` decodes a file for its first reader, and keeps the latest 256 MiB of pictures for others."""
    token = _kept.set(_Kept())
    try:
        yield
    finally:
        _kept.reset(token)


def decoded(path: str, decode: Callable[[], Image.Image]) -> Image.Image:
    """The RGB picture of a file, the reader's own to write into."""
    kept = _kept.get()
    if kept is None or not os.path.isfile(path):
        return decode()
    status = os.stat(path)
    file = path, status.st_mtime_ns, status.st_size  # a source may write each picture to one name
    picture = kept.pictures.get(file)
    if picture is None:
        picture = kept.pictures[file] = decode()
        kept.free -= 3 * picture.width * picture.height
        while kept.free < 0:
            oldest = kept.pictures.pop(next(iter(kept.pictures)))
            kept.free += 3 * oldest.width * oldest.height
    return picture.copy()
