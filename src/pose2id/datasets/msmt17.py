"""MSMT17, versions 1 and 2."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from pose2id.datasets.dataset import Dataset, Split
from pose2id.datasets.layout import (
    Layout,
    check_counts,
    check_listed,
    from_one,
    image_names,
    list_lines,
    matched,
    missing,
    optional,
    part,
    split_from,
    top_of,
    unlisted,
    unread,
)

LAYOUT = Layout(
    "MSMT17",
    (("list_query.txt",), ("list_gallery.txt",), ("mask_test_v2",)),
    """
MSMT17_V2/  (V1: train/ and test/)
    list_query.txt, list_gallery.txt     0000/0000_000_01_0303morning_0015_0.jpg 0
    list_train.txt, list_val.txt         (may be missing)
    mask_train_v2/0000/0000_000_01_0303morning_0015_0.jpg
    mask_test_v2/0000/0000_000_01_0303morning_0015_0.jpg""",
)
PUBLISHED = {
    "train": {"images": 32_621, "identities": 1_041},
    "query": {"images": 11_659},
    "gallery": {"images": 82_161, "identities": 3_060},
}
_NAME = re.compile(r"\d+_\d+_(\d+)_")
_SCHEME = "0000_000_01_0303morning_0015_0.jpg (the third number is the camera)"


def msmt17(root: str | os.PathLike[str]) -> Dataset:
    """Read MSMT17, version 1 or 2 (the one with blurred faces).

    The training set is that of both its lists, train and val. The lists number people from 0, apart for training and
    test; here they count from 1. Cameras are 1 to 15.

    Counts: Wei et al., "Person Transfer GAN to Bridge Domain Gap for Person Re-Identification", CVPR 2018; layouts of
    both versions: `torchreid/data/datasets/image/msmt17.py` of github.com/KaiyangZhou/deep-person-reid.

    Args:
        root: MSMT17_V1 or MSMT17_V2, whatever it is called, or a folder up to two levels above it.

    Raises:
        FileNotFoundError: a folder, a list or a listed image is missing.
        ValueError: a list or file names that do not fit.
    """
    top = top_of(root, LAYOUT)
    test_folder, train_folder = (optional(top, f"mask_{name}_v2") or optional(top, name) for name in ("test", "train"))
    if test_folder is None:
        raise missing(top, "test or mask_test_v2", LAYOUT)
    query, gallery = (_lines(part(top, f"list_{name}.txt", LAYOUT)) for name in ("query", "gallery"))
    lists = [path for name in ("train", "val") if (path := optional(top, f"list_{name}.txt")) is not None]
    notes: tuple[str, ...] = ("The lists number people from 0, apart for training and test; here they count from 1.",)
    notes += _check_files([*query, *gallery], test_folder)
    train = None
    if lists and train_folder is not None:
        lines = sorted(line for path in lists for line in _lines(path))
        notes += _check_files(lines, train_folder)
        train = _split(lines, train_folder)
    elif lists or train_folder is not None:
        notes += (f"No training images: there {'are lists' if lists else 'is a folder'} alone.",)
    notes += unread(top, [test_folder, train_folder])
    asked, searched = _split(query, test_folder), _split(gallery, test_folder)
    notes += check_counts(LAYOUT.name, {"train": train, "query": asked, "gallery": searched}, PUBLISHED)
    return Dataset(LAYOUT.name, top, asked, searched, train, "market1501", notes=notes)


def _lines(path: Path) -> list[tuple[str, int]]:
    return sorted(list_lines(path, LAYOUT.name))


def _check_files(lines: list[tuple[str, int]], folder: Path) -> tuple[str, ...]:
    there, listed = image_names(folder, LAYOUT.name), [name for name, _ in lines]
    check_listed(listed, there, folder, LAYOUT.name)
    return unlisted(there, listed, folder.name)


def _split(lines: list[tuple[str, int]], folder: Path) -> Split:
    names = [name for name, _ in lines]
    cameras = [int(found[1]) for found in matched(names, _NAME, _SCHEME, f"{LAYOUT.name}: the lists of {folder.name}")]
    return split_from(folder, names, from_one(np.array([pid for _, pid in lines])), cameras)
