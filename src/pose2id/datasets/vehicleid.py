"""VehicleID (PKU): vehicles, without cameras."""

from __future__ import annotations

import os
from pathlib import Path

from pose2id.datasets.dataset import Dataset, Split
from pose2id.datasets.layout import (
    Layout,
    check_counts,
    check_listed,
    image_names,
    list_lines,
    optional,
    part,
    split_from,
    top_of,
    unread,
)
from pose2id.io.checks import checked_choice

SIZES = {"small": 800, "medium": 1_600, "large": 2_400}
LAYOUT = Layout(
    "VehicleID",
    (("train_test_split",),),
    """
VehicleID_V1.0/
    image/0000001.jpg
    train_test_split/
        test_list_800.txt, test_list_1600.txt, test_list_2400.txt    0000001 3 (image, identity)
        train_list.txt                                               (may be missing)""",
)
_TRAIN = {"images": 113_346, "identities": 13_164}
PUBLISHED = {
    "small": {"train": _TRAIN, "test": {"images": 6_493, "identities": 800}},
    "medium": {"train": _TRAIN, "test": {"images": 13_377, "identities": 1_600}},
    "large": {"train": _TRAIN, "test": {"images": 19_777, "identities": 2_400}},
}


def vehicleid(root: str | os.PathLike[str], *, size: str | None = None) -> Dataset:
    """Read VehicleID: a test list's images are both query and gallery, since the protocol draws one image per vehicle.

    Counts: `fastreid/data/datasets/vehicleid.py` of github.com/JDAI-CV/fast-reid; Liu et al., "Deep Relative Distance
    Learning: Tell the Difference Between Similar Vehicles", CVPR 2016.

    Args:
        root: VehicleID_V1.0, whatever it is called, or a folder up to two levels above it.
        size: of the test list: "small" (800 vehicles; None), "medium" (1,600) or "large" (2,400).

    Raises:
        FileNotFoundError: a folder, a list or a listed image is missing.
        ValueError: a list that does not fit.
    """
    size = checked_choice(size or "small", "size", tuple(SIZES))
    top = top_of(root, LAYOUT)
    images, lists = part(top, "image", LAYOUT), part(top, "train_test_split", LAYOUT)
    there = set(image_names(images, LAYOUT.name))
    test = _split(images, there, part(lists, f"test_list_{SIZES[size]}.txt", LAYOUT))
    train_list = optional(lists, "train_list.txt")
    train = None if train_list is None else _split(images, there, train_list)
    others = len(there) - len(test) - (0 if train is None else len(train))
    notes: tuple[str, ...] = (f"Not in the lists read: {others:,} images.",) if others else ()
    notes += unread(top, [images, lists])
    notes += check_counts(f"{LAYOUT.name} ({size})", {"train": train, "test": test}, PUBLISHED[size])
    return Dataset(f"{LAYOUT.name} ({size})", top, test, test, train, "vehicleid", notes=notes)


def _split(images: Path, there: set[str], path: Path) -> Split:
    lines = sorted(list_lines(path, LAYOUT.name))
    by_stem = {name.rpartition(".")[0]: name for name in there}
    names = [by_stem.get(stem, f"{stem}.jpg") for stem, _ in lines]
    check_listed(names, there, images, LAYOUT.name)
    return split_from(images, names, (pid for _, pid in lines), None)
