"""MARS: tracklets of people."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pose2id.datasets.dataset import Dataset, Split
from pose2id.datasets.layout import (
    Layout,
    check_counts,
    check_listed,
    image_names,
    optional,
    part,
    read_mat,
    split_from,
    text_of,
    top_of,
    unlisted,
    unread,
)

LAYOUT = Layout(
    "MARS",
    (("bbox_test",), ("bbox_train",)),
    """
MARS/
    bbox_test/0001/0001C1T0001F001.jpg      (00-1/ is junk, 0000/ distractors)
    bbox_train/0001/0001C1T0001F001.jpg     (this folder may be missing)
    info/    (from github.com/liangzheng06/MARS-evaluation)
        test_name.txt, tracks_test_info.mat, query_IDX.mat
        train_name.txt, tracks_train_info.mat""",
)
PUBLISHED = {
    "train": {"images": 509_914, "identities": 625, "tracklets": 8_298},
    "query": {"images": 114_493, "identities": 626, "tracklets": 1_980},
    "gallery": {"images": 566_596, "identities": 620, "tracklets": 10_200},
}


def mars(root: str | os.PathLike[str]) -> Dataset:
    """Read MARS: images with the tracklet that each belongs to, to be pooled for evaluation.

    The gallery is the tracklets that are no queries, as in the field's code: torchreid counts 9,330 of them, without
    the 870 of junk, which stay here with identity -1; 3,248 are distractors. The published evaluation searches among
    all 12,180 test tracklets, queries included (`test_mars.m` of github.com/liangzheng06/MARS-evaluation): there, a
    query's other cameras give it a few more matches, so figures differ. `tracklets` are the rows of
    tracks_train_info.mat and tracks_test_info.mat, from 0.

    Counts: Zheng et al., "MARS: A Video Benchmark for Large-Scale Person Re-Identification", ECCV 2016, and those .mat
    files themselves; `torchreid/data/datasets/video/mars.py` of github.com/KaiyangZhou/deep-person-reid.

    Args:
        root: MARS, whatever it is called, or a folder up to two levels above it.

    Raises:
        FileNotFoundError: a folder, a list or a listed image is missing.
        ValueError: lists and tracklets that do not fit one another.
    """
    top = top_of(root, LAYOUT)
    info = part(top, "info", LAYOUT)
    test_folder, train_folder = part(top, "bbox_test", LAYOUT), optional(top, "bbox_train")
    notes: tuple[str, ...] = ("The gallery is the test tracklets that are no query; the published code keeps all.",)
    notes += unread(top, [info, test_folder, train_folder])
    tracks, names, left_out = _tracks(info, test_folder, "test")
    is_query = np.zeros(len(tracks), dtype=bool)
    rows = np.ravel(read_mat(part(info, "query_IDX.mat", LAYOUT), LAYOUT.name, "query_IDX")["query_IDX"]).astype(
        np.int64
    )
    if len(rows) == 0 or rows.min() < 1 or rows.max() > len(tracks):
        raise ValueError(f"{LAYOUT.name}: query_IDX.mat must hold rows of tracks_test_info.mat, 1 to {len(tracks)}.")
    is_query[rows - 1] = True
    query, gallery = (_split(test_folder, names, tracks, np.flatnonzero(mask)) for mask in (is_query, ~is_query))
    notes += left_out
    train = None
    if train_folder is not None:
        tracks, names, left_out = _tracks(info, train_folder, "train")
        train = _split(train_folder, names, tracks, np.arange(len(tracks)))
        notes += left_out
    notes += check_counts(LAYOUT.name, {"train": train, "query": query, "gallery": gallery}, PUBLISHED)
    return Dataset(LAYOUT.name, top, query, gallery, train, "market1501", notes=notes)


def _tracks(info: Path, folder: Path, side: str) -> tuple[NDArray[np.int64], list[str], tuple[str, ...]]:
    """(T, 4) first and last image (from 1), identity and camera; the images' names; a note of images in no list."""
    path = part(info, f"tracks_{side}_info.mat", LAYOUT)
    key = f"track_{side}_info"
    tracks = np.asarray(read_mat(path, LAYOUT.name, key)[key]).astype(np.int64)
    names = text_of(part(info, f"{side}_name.txt", LAYOUT), LAYOUT.name).split()
    names = [f"{name[:4]}/{name}" for name in names]
    if tracks.ndim != 2 or tracks.shape[1] != 4 or not len(tracks):
        raise ValueError(f"{LAYOUT.name}: {path} must hold (T, 4) numbers, got shape {tracks.shape}.")
    first, last = tracks[:, 0], tracks[:, 1]
    if first.min() < 1 or (last < first).any() or last.max() > len(names):
        raise ValueError(f"{LAYOUT.name}: {path} must hold rows of {side}_name.txt, 1 to {len(names)}.")
    there = image_names(folder, LAYOUT.name)
    check_listed(names, there, folder, LAYOUT.name)
    return tracks, names, unlisted(there, names, folder.name)


def _split(folder: Path, names: list[str], tracks: NDArray[np.int64], rows: NDArray[np.int64]) -> Split:
    spans = [(int(first) - 1, int(last)) for first, last in tracks[rows, :2]]
    lengths = [stop - start for start, stop in spans]
    pids, cameras = (np.repeat(tracks[rows, column], lengths) for column in (2, 3))
    images = [name for start, stop in spans for name in names[start:stop]]
    people = np.array([-1 if name.startswith("00-1") else int(name[:4]) for name in images])
    if (people != pids).any():
        at = int(np.flatnonzero(people != pids)[0])
        raise ValueError(f"{LAYOUT.name}: the tracklet of {images[at]} must be of its identity, got {pids[at]}.")
    return split_from(folder, images, pids, cameras, tracklets=np.repeat(rows, lengths).astype(np.int64))
