"""Market1501, and sets in its layout."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from pose2id.datasets.dataset import Dataset, Split
from pose2id.datasets.layout import (
    Layout,
    check_counts,
    from_one,
    named_images,
    optional,
    part,
    split_from,
    top_of,
    unread,
)
from pose2id.datasets.withdrawn import refuse_images

LAYOUT = Layout(
    "Market1501",
    (("bounding_box_test",), ("bounding_box_train",)),
    """
Market-1501-v15.09.15/
    bounding_box_test/     -1_c1s1_000401_03.jpg (junk), 0000_c1s1_000151_01.jpg (distractor), 0001_c1s1_001051_03.jpg
    bounding_box_train/    0002_c1s1_000451_03.jpg (this folder may be missing)
    query/                 0001_c1s1_001051_00.jpg""",
)
PUBLISHED = {
    "train": {"images": 12_936, "identities": 751},
    "query": {"images": 3_368, "identities": 750},
    "gallery": {"images": 19_732, "identities": 750},
}
FOLDERS = {"query": "query", "gallery": "bounding_box_test", "train": "bounding_box_train"}
_SCHEME = "0002_c1s1_000451_03.jpg (identity, camera)"
_NAME = re.compile(r"(-1|\d+)_c(\d+)(s\d+)?_")


def market1501(root: str | os.PathLike[str]) -> Dataset:
    """Read Market1501, or a set of your own in its layout.

    Junk (identity -1) and distractors (0000) stay in the gallery; evaluation drops the junk. Cameras are 1 to 6, as in
    the file names. A set in this layout whose names have no sequence (0002_c1_...) is one of your own: it is called by
    its folder's name, and its counts are not compared.

    Counts: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015. torchreid and fast-reid count
    15,913 gallery images, because they leave the junk out: `torchreid/data/datasets/image/market1501.py` of
    github.com/KaiyangZhou/deep-person-reid.

    Args:
        root: Market-1501-v15.09.15, whatever it is called, or a folder up to two levels above it.

    Raises:
        FileNotFoundError: a folder is missing; the expected tree is shown.
        ValueError: an empty folder, file names that do not fit, or those of DukeMTMC.
    """
    top = top_of(root, LAYOUT)
    query, gallery, train, sequences = read_boxes(top, LAYOUT)
    notes = unread(top, [optional(top, name) for name in FOLDERS.values()])
    if not sequences:
        return Dataset(top.resolve().name, top, query, gallery, train, "market1501", notes=notes)
    notes += check_counts(LAYOUT.name, {"train": train, "query": query, "gallery": gallery}, PUBLISHED)
    return Dataset(LAYOUT.name, top, query, gallery, train, "market1501", notes=notes)


def read_boxes(top: Path, layout: Layout) -> tuple[Split, Split, Split | None, bool]:
    """Query, gallery and training images of a set in Market1501's layout; whether its names have sequences (s1)."""
    query, gallery = (_boxes(part(top, FOLDERS[name], layout), layout) for name in ("query", "gallery"))
    train_folder = optional(top, FOLDERS["train"])
    train = None if train_folder is None else _boxes(train_folder, layout)
    splits = [split for split, _ in (query, gallery, train or query)]
    if (query[0].pids == 0).any():  # somebody whom a query asks for is no distractor
        splits = [replace(split, pids=from_one(split.pids)) for split in splits]
    return splits[0], splits[1], None if train is None else splits[2], query[1]


def _boxes(folder: Path, layout: Layout) -> tuple[Split, bool]:
    images = named_images(folder, _NAME, _SCHEME, layout.name)
    refuse_images((name.rpartition("/")[2] for name, _ in images), folder)
    split = split_from(
        folder,
        [name for name, _ in images],
        (int(found[1]) for _, found in images),
        (int(found[2]) for _, found in images),
    )
    return split, any(found[3] for _, found in images)
