"""Roboflow `reid`: paths in, generated images on disk; centralized features in `ReIDModel.evaluate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id import Centralizer, Extractor, PictureFolder


def plug_in(model: Any, query: Any, gallery: Any, centralizer: Centralizer | None = None, **options: Any) -> Any:
    """`model.evaluate(query, gallery, **options)` of centralized features; cameras are used.

    Args:
        model: a `reid.ReIDModel`.
        query: a `reid.ReIDSplit`.
        gallery: another one, without an image of the first: a feature has one place.
        centralizer: None: as by default.
        **options: of `ReIDModel.evaluate`, such as protocol.
    """
    paths = [*query.image_paths, *gallery.image_paths]
    if len(set(paths)) < len(paths):
        raise ValueError("query and gallery must not share images.")
    published = model.extract_embeddings_from_paths

    def extract(image_paths: Sequence[str], **settings: Any) -> NDArray[np.float32]:
        rows = {path: row for row, path in enumerate(image_paths)}
        features: NDArray[np.float32] = published(image_paths, **settings)
        q, g = ([rows[path] for path in split.image_paths] for split in (query, gallery))
        features[q], features[g] = (centralizer or Centralizer()).enhance(
            features[q], features[g], query_camids=query.camids, gallery_camids=gallery.camids
        )
        return features

    model.extract_embeddings_from_paths = extract
    try:
        return model.evaluate(query, gallery, **options)
    finally:
        del model.extract_embeddings_from_paths


def with_generated(
    model: Any, image_paths: Sequence[str], directory: str | os.PathLike[str], eta: float = 2.0
) -> NDArray[np.float32]:
    """Eq. 9: features (N, D) of images fused with those of the pictures that `pose2id generate` wrote for them.

    The model reads files: generate first, to `directory`.
    """
    extractor = Extractor(model.extract_embeddings_from_paths, inputs="images", batch_size=32)
    found: NDArray[np.float32] = Centralizer(extractor, PictureFolder(directory), eta=eta)(image_paths)
    return found
