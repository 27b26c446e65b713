"""VeRi-776: vehicles."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pose2id.datasets.dataset import Dataset, Split
from pose2id.datasets.layout import Layout, check_counts, named_images, optional, part, split_from, top_of, unread

LAYOUT = Layout(
    "VeRi-776",
    (("image_query",), ("image_test",), ("image_train",)),
    """
VeRi/
    image_query/   0002_c002_00030600_0.jpg
    image_test/    0002_c001_00030605_1.jpg
    image_train/   0001_c001_00016450_0.jpg (this folder may be missing)""",
)
PUBLISHED = {
    "train": {"images": 37_778, "identities": 576},
    "query": {"images": 1_678, "identities": 200},
    "gallery": {"images": 11_579, "identities": 200},
}
_NAME = re.compile(r"(\d+)_c(\d+)_")
_SCHEME = "0002_c002_00030600_0.jpg (identity, camera)"


def veri776(root: str | os.PathLike[str]) -> Dataset:
    """Read VeRi-776. Cameras are 1 to 20, as in the file names; evaluation drops images of the query's camera.

    Counts and names: Liu et al., "PROVID: Progressive and Multimodal Vehicle Reidentification for Large-Scale Urban
    Surveillance", IEEE TMM 2018; `fastreid/data/datasets/veri.py` of github.com/JDAI-CV/fast-reid.

    Args:
        root: VeRi, whatever it is called, or a folder up to two levels above it.

    Raises:
        FileNotFoundError: a folder is missing; the expected tree is shown.
        ValueError: an empty folder, or file names that do not fit.
    """
    top = top_of(root, LAYOUT)
    query, gallery = (_images(part(top, name, LAYOUT)) for name in ("image_query", "image_test"))
    train_folder = optional(top, "image_train")
    train = None if train_folder is None else _images(train_folder)
    notes = unread(top, [*(part(top, name, LAYOUT) for name in ("image_query", "image_test")), train_folder])
    notes += check_counts(LAYOUT.name, {"train": train, "query": query, "gallery": gallery}, PUBLISHED)
    return Dataset(LAYOUT.name, top, query, gallery, train, "market1501", notes=notes)


def _images(folder: Path) -> Split:
    images = named_images(folder, _NAME, _SCHEME, LAYOUT.name)
    names = [name for name, _ in images]
    return split_from(folder, names, (int(found[1]) for _, found in images), (int(found[2]) for _, found in images))
