"""Plain folders: root/identity/*.jpg."""

from __future__ import annotations

import os

import numpy as np

from pose2id.datasets.dataset import Dataset, Split
from pose2id.datasets.layout import checked_folder, image_names
from pose2id.datasets.tables import check_words
from pose2id.io.checks import first_few

_SPLITS = {"train", "training", "val", "validation", "test", "query", "probe", "gallery"}


def folders(root: str | os.PathLike[str]) -> Dataset:
    """Read folders of images, one per identity: each image is searched for among all others.

    Args:
        root: the folder that holds one folder per identity, whose name is the identity.

    Returns:
        A data set without cameras, whose query and gallery are one; identities are strings.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, or it is a file.
        ValueError: images beside the folders or below their own level, other files, folders named like splits, or
            names that would be one number ("1" and "01").
    """
    top = checked_folder(root)
    names = image_names(top, "Folders of identities")
    misplaced = [image for image in names if image.count("/") != 1]
    if misplaced:
        raise ValueError(
            f"{top} must hold images as identity/name.jpg, got {first_few(misplaced)}. It is no data set known by its "
            "folders either. List your images in a CSV with the columns path, identity, camera, split (read_table); "
            "`pose2id table FOLDER OUT.csv` writes one where names or folders tell who it is."
        )
    people = [image.partition("/")[0] for image in names]
    taken = sorted({person for person in people if person.lower() in _SPLITS})
    if taken:
        raise ValueError(
            f"{top} must hold one folder per identity, got {first_few(taken)}, which look like splits. List your "
            "images in a CSV with the columns path, identity, split: read_table."
        )
    check_words(people, "identities")
    split = Split(tuple(os.path.join(top, image) for image in names), np.array(people, dtype=str))
    return Dataset(top.resolve().name, top, split, split, None, "leave-one-out")
