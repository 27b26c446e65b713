"""DukeMTMC, which its makers withdrew: known by its name or by its images, and refused."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FOLDER = re.compile(r"duke[-_ ]?mtmc|(occluded|partial|p)[-_ ]?duke", re.IGNORECASE)
_IMAGE = re.compile(r"\d+_c\d+_f\d+")


def refuse_name(name: str, place: object) -> None:
    """Raise where a folder is called like DukeMTMC, or a set made of it."""
    if _FOLDER.search(name):
        raise _error(place)


def refuse_images(names: Iterable[str], place: object) -> None:
    """Raise where images are named as in DukeMTMC-reID: 0005_c2_f0046985.jpg."""
    if any(_IMAGE.match(name) for name in names):
        raise _error(place)


def _error(place: object) -> ValueError:
    return ValueError(
        f"DukeMTMC, and what is made of it, is not supported, got {place}. Its makers withdrew it in 2019: people "
        "had been recorded and published beyond what had been approved. Use another data set."
    )
