"""boxmot: its ReID backends as an extractor of crops, and a backend that centralizes what a tracker asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id import Centralizer, Extractor
from pose2id.io.images import load_image


def extractor_of(reid: Callable[..., NDArray[Any]]) -> Extractor:
    """`boxmot.reid.core.ReID(...)`, for paths, pictures or RGB crops. It resizes and normalises crops by itself."""

    def of_crops(crops: list[Any]) -> NDArray[Any]:
        # boxmot's crops are OpenCV's: blue first.
        return reid([np.array(load_image(crop, "crop"))[:, :, ::-1].copy() for crop in crops])

    return Extractor(of_crops, inputs="images")


class CentralizedBackend:
    """A ReID backend for boxmot's trackers: `get_features(boxes, frame)` of another one, centralized towards a gallery.

    Give it where a tracker takes a backend, or `ReID.from_backend(...)` of it.

    Args:
        backend: a backend of boxmot, such as `ReID(...).model`.
        gallery: (G, D) features of people seen before, by the same backend.
        centralizer: None: as by default; boxes whose people the gallery does not show keep their features.
    """

    def __init__(self, backend: Any, gallery: NDArray[Any], centralizer: Centralizer | None = None) -> None:
        self.backend, self.gallery = backend, gallery
        self.centralizer = centralizer or Centralizer()
        # What `ReID` asks a backend for a frame without boxes.
        self.device, self.half, self.input_shape = backend.device, backend.half, backend.input_shape
        self.inference_preprocess = backend.inference_preprocess

    def get_features(self, xyxys: NDArray[Any], img: NDArray[np.uint8]) -> NDArray[Any]:
        """L2-normalised features (N, D) of the boxes (N, 4) of a blue-first frame (H, W, 3)."""
        features: NDArray[Any] = self.backend.get_features(xyxys, img)
        if not len(features):
            return features
        return self.centralizer.enhance(features, self.gallery, camera_statistics="gallery")[0]
