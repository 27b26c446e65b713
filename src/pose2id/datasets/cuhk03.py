"""CUHK03 with the new protocol."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.datasets.dataset import Dataset, Split
from pose2id.datasets.layout import (
    Layout,
    candidates,
    check_counts,
    check_listed,
    checked_folder,
    image_names,
    missing,
    only,
    optional,
    read_mat,
    split_from,
    unlisted,
    unread,
)
from pose2id.datasets.market1501 import FOLDERS, read_boxes
from pose2id.datasets.market1501 import LAYOUT as MARKET1501
from pose2id.io.checks import checked_choice

BOXES = ("detected", "labeled")
LAYOUT = Layout(
    "CUHK03",
    (
        ("images_detected",),
        ("images_labeled",),
        ("cuhk03_new_protocol_config_detected.mat",),
        ("cuhk03_new_protocol_config_labeled.mat",),
        ("detected", "labeled"),
        ("cuhk03_release",),
        ("cuhk-03.mat",),
    ),
    """
cuhk03/
    images_detected/                           1_001_1_01.png (camera pair, person, camera, image)
    cuhk03_new_protocol_config_detected.mat    (from github.com/zhunzhong07/person-re-ranking)
or, in Market1501's layout, as the same authors offer it:
cuhk03-np/
    detected/
        bounding_box_test/, bounding_box_train/, query/
and the same for "labeled". cuhk-03.mat alone is not read: torchreid, for one, writes it to images_detected/.""",
)
PUBLISHED = {
    "detected": {
        "train": {"images": 7_365, "identities": 767},
        "query": {"images": 1_400, "identities": 700},
        "gallery": {"images": 5_332, "identities": 700},
    },
    "labeled": {
        "train": {"images": 7_368, "identities": 767},
        "query": {"images": 1_400, "identities": 700},
        "gallery": {"images": 5_328, "identities": 700},
    },
}


def cuhk03(root: str | os.PathLike[str], *, boxes: str | None = None) -> Dataset:
    """Read CUHK03 with the new protocol: 767 people for training, 700 for testing, two cameras.

    Two layouts are known: the images as written from cuhk-03.mat beside the protocol's .mat file, and folders as those
    of Market1501.

    Counts and protocol: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017;
    `CUHK03-NP/README.md` of github.com/zhunzhong07/person-re-ranking. Names of the images: torchreid's
    `torchreid/data/datasets/image/cuhk03.py`.

    Args:
        root: the folder of the set, whatever it is called, or one up to two levels above it.
        boxes: "detected" or "labeled"; None: what there is, "detected" where both are.

    Raises:
        FileNotFoundError: a folder or a listed image is missing; the expected tree is shown.
        ValueError: file names, or a .mat file, that do not fit.
    """
    folder = checked_folder(root)
    # A folder of one kind of boxes is recognised as Market1501's.
    layout = replace(LAYOUT, markers=LAYOUT.markers + MARKET1501.markers)
    found = candidates(folder, [layout])
    if not found:
        raise missing(folder, "images_detected", LAYOUT)
    top = only(found, folder)[1]
    if MARKET1501.fits(top):
        own = top.resolve().name.lower()
        chosen = _choice(boxes, [own] if own in BOXES else list(BOXES), top)
        splits, notes = _from_boxes(top)
    else:
        there = {kind: images for kind in BOXES if (images := _folder(top, kind)) is not None}
        if not there:
            raise missing(top, "images_detected, or detected/query", LAYOUT)
        chosen = _choice(boxes, list(there), top)
        images = there[chosen]
        splits, notes = _from_boxes(images) if MARKET1501.fits(images) else _from_mat(top, images, chosen)
        notes += unread(top, [images])
    name = f"{LAYOUT.name} ({chosen})"
    notes += check_counts(name, splits, PUBLISHED[chosen])
    query, gallery, train = splits.values()
    assert query is not None and gallery is not None  # noqa: PT018
    return Dataset(name, top, query, gallery, train, "cuhk03", notes=notes)


def _folder(top: Path, boxes: str) -> Path | None:
    """Where a kind of boxes lies: detected/ with Market1501's folders in it, or images_detected/."""
    nested = optional(top, boxes)
    if nested is not None and nested.is_dir() and MARKET1501.fits(nested):
        return nested
    return optional(top, f"images_{boxes}") or optional(top, f"cuhk03_{boxes}")  # torchreid's, the protocol's own name


def _choice(boxes: str | None, there: list[str], top: Path) -> str:
    chosen = there[0] if boxes is None else checked_choice(boxes, "boxes", BOXES)
    if chosen not in there:
        raise FileNotFoundError(f"boxes must be what is in {top}, {' or '.join(map(repr, there))}, got {boxes!r}.")
    return chosen


def _from_boxes(folder: Path) -> tuple[dict[str, Split | None], tuple[str, ...]]:
    query, gallery, train, _ = read_boxes(folder, LAYOUT)
    notes = unread(folder, [optional(folder, name) for name in FOLDERS.values()])
    return {"query": query, "gallery": gallery, "train": train}, notes


def _from_mat(top: Path, folder: Path, boxes: str) -> tuple[dict[str, Split | None], tuple[str, ...]]:
    name = f"cuhk03_new_protocol_config_{boxes}.mat"
    path = optional(top, name)
    if path is None:
        raise missing(top, name, LAYOUT)
    held = read_mat(path, LAYOUT.name, "filelist", "labels", "camId", "train_idx", "query_idx", "gallery_idx")
    names = np.array([str(np.ravel(cell)[0]) for cell in np.ravel(held["filelist"])])
    pids, cameras = (np.ravel(held[key]).astype(np.int64) for key in ("labels", "camId"))
    rows = {key: np.ravel(held[f"{key}_idx"]).astype(np.int64) - 1 for key in ("query", "gallery", "train")}
    listed = np.concatenate(list(rows.values()))
    if len({len(names), len(pids), len(cameras)}) > 1 or listed.min() < 0 or listed.max() >= len(names):
        raise ValueError(f"{LAYOUT.name}: {path} must have one label and camera per image, and rows of them.")
    there = image_names(folder, LAYOUT.name)
    check_listed(names[listed].tolist(), there, folder, LAYOUT.name)
    splits: dict[str, Split | None] = {key: _rows(folder, names, pids, cameras, at) for key, at in rows.items()}
    return splits, unlisted(there, names[listed].tolist(), folder.name)


def _rows(
    folder: Path, names: NDArray[Any], pids: NDArray[np.int64], cameras: NDArray[np.int64], at: NDArray[np.int64]
) -> Split:
    at = at[np.argsort(names[at], kind="stable")]
    return split_from(folder, names[at].tolist(), pids[at], cameras[at])
