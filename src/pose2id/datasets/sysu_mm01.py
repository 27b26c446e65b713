"""SYSU-MM01: visible and infrared images."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pose2id.datasets.dataset import Dataset, Split
from pose2id.datasets.layout import (
    Layout,
    check_counts,
    image_names,
    optional,
    part,
    split_from,
    text_of,
    top_of,
    unread,
)
from pose2id.io.checks import first_few

VISIBLE, INFRARED = (1, 2, 4, 5), (3, 6)
LAYOUT = Layout(
    "SYSU-MM01",
    (("cam3", "cam6"), ("cam1", "exp"), ("cam3", "exp")),
    """
SYSU-MM01/
    cam1/, cam2/, cam4/, cam5/ (visible)    0001/0001.jpg (identity, image)
    cam3/, cam6/ (infrared)
    exp/
        test_id.txt                         6,10,17, ...
        train_id.txt, val_id.txt            (may be missing)
        rand_perm_cam.mat                   (may be missing; from github.com/wuancong/SYSU-MM01)""",
)
PUBLISHED = {
    "train": {"images": 34_167, "identities": 395},
    "query": {"images": 3_803, "identities": 96},
    "gallery": {"identities": 96},
}
_NAME = re.compile(r"(\d+)/\d+\.\w+")


def sysu_mm01(root: str | os.PathLike[str]) -> Dataset:
    """Read SYSU-MM01: infrared images of cameras 3 and 6 are searched for among visible ones of 1, 2, 4 and 5.

    The gallery is every visible image of the people for testing: the protocol draws from it, by `permutation` or by
    itself, and leaves cameras 4 and 5 out for indoor search. Images are in the order of identity, camera, file name.
    Training images are those of train_id.txt and val_id.txt, of all cameras.

    Counts: Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017 (22,258 visible and 11,909
    infrared images for training and validation); folders as in `data_manager.py` of
    github.com/mangye16/Cross-Modal-Re-ID-baseline. No count is published for the visible images that galleries are
    drawn from.

    Args:
        root: SYSU-MM01, whatever it is called, or a folder up to two levels above it.

    Raises:
        FileNotFoundError: a folder or exp/test_id.txt is missing; the expected tree is shown.
        ValueError: lists or file names that do not fit, or nobody to test with.
    """
    top = top_of(root, LAYOUT)
    exp = part(top, "exp", LAYOUT)
    test = _people(part(exp, "test_id.txt", LAYOUT))
    lists = [path for name in ("train_id.txt", "val_id.txt") if (path := optional(exp, name)) is not None]
    training = [pid for path in lists for pid in _people(path)]
    both = sorted(set(test) & set(training))
    if both:
        raise ValueError(f"{LAYOUT.name}: people must be for training or for testing, got both for {first_few(both)}.")
    folders = {camera: part(top, f"cam{camera}", LAYOUT) for camera in (*VISIBLE, *INFRARED)}
    images = [image for camera, folder in folders.items() for image in _images(folder, camera)]
    query, gallery = (_split(top, images, test, cameras) for cameras in (INFRARED, VISIBLE))
    if not len(query) or not len(gallery):
        raise ValueError(f"{LAYOUT.name}: {top} must have visible and infrared images of the people of test_id.txt.")
    train = _split(top, images, training, (*VISIBLE, *INFRARED)) if lists else None
    notes = unread(top, [exp, *folders.values()])
    others = sorted(name for pid, _, name in images if pid not in {*test, *training})
    if others:
        notes += (f"Left out, of people in no list: {len(others):,} images ({first_few(others)}).",)
    notes += check_counts(LAYOUT.name, {"train": train, "query": query, "gallery": gallery}, PUBLISHED)
    permutation = optional(exp, "rand_perm_cam.mat")
    return Dataset(LAYOUT.name, top, query, gallery, train, "sysu-mm01", permutation=permutation, notes=notes)


def _people(path: Path) -> list[int]:
    words = text_of(path, LAYOUT.name).replace(",", " ").split()
    bad = [word for word in words if not word.isdecimal()]
    if bad or not words:
        raise ValueError(f"{LAYOUT.name}: {path} must list identities as 6,10,17, got {first_few(bad) or 'none'}.")
    return [int(word) for word in words]


def _images(folder: Path, camera: int) -> list[tuple[int, int, str]]:
    """(identity, camera, name from the set's folder) of a camera's images."""
    names = image_names(folder, LAYOUT.name)
    bad = [name for name in names if not _NAME.fullmatch(name)]
    if bad:
        raise ValueError(f"{LAYOUT.name}: {folder} must hold images named like 0001/0001.jpg, got {first_few(bad)}.")
    return [(int(name.partition("/")[0]), camera, f"{folder.name}/{name}") for name in names]


def _split(top: Path, images: list[tuple[int, int, str]], people: list[int], cameras: tuple[int, ...]) -> Split:
    wanted = set(people)
    chosen = sorted(image for image in images if image[0] in wanted and image[1] in cameras)
    return split_from(
        top, [name for _, _, name in chosen], [pid for pid, _, _ in chosen], [cam for _, cam, _ in chosen]
    )
