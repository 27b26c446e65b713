"""Occluded-REID."""

from __future__ import annotations

import os
import re

from pose2id.datasets.dataset import Dataset
from pose2id.datasets.layout import Layout, check_counts, named_images, part, split_from, top_of, unread

LAYOUT = Layout(
    "Occluded-REID",
    (("occluded_body_images",), ("whole_body_images",)),
    """
Occluded_REID/
    occluded_body_images/001/001_01.tif    (the queries)
    whole_body_images/001/001_01.tif       (the gallery)""",
)
PUBLISHED = {
    "query": {"images": 1_000, "identities": 200},
    "gallery": {"images": 1_000, "identities": 200},
}
_NAME = re.compile(r"(\d+)_")
_SCHEME = "001_01.tif (identity, image)"


def occluded_reid(root: str | os.PathLike[str]) -> Dataset:
    """Read Occluded-REID: occluded images (camera 0) are searched for among whole ones (camera 1).

    It has no training images: models are trained on Market1501.

    Counts: Zhuo et al., "Occluded Person Re-identification", ICME 2018; folders and cameras as in
    `torchreid/data/datasets/image/occluded_reid.py` of github.com/VlSomers/bpbreid.

    Args:
        root: Occluded_REID, whatever it is called, or a folder up to two levels above it.

    Raises:
        FileNotFoundError: a folder is missing; the expected tree is shown.
        ValueError: an empty folder, or file names that do not fit.
    """
    top = top_of(root, LAYOUT)
    folders = [part(top, name, LAYOUT) for name in ("occluded_body_images", "whole_body_images")]
    splits = []
    for camera, folder in enumerate(folders):
        images = named_images(folder, _NAME, _SCHEME, LAYOUT.name)
        names = [name for name, _ in images]
        splits.append(split_from(folder, names, (int(found[1]) for _, found in images), [camera] * len(names)))
    query, gallery = splits
    notes = unread(top, folders) + check_counts(LAYOUT.name, {"query": query, "gallery": gallery}, PUBLISHED)
    return Dataset(LAYOUT.name, top, query, gallery, None, "occluded-reid", notes=notes)
