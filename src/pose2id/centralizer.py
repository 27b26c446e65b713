"""`Centralizer`: feature centralization inside an existing pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pose2id._inputs import (
    FeatureArray,
    Rows,
    checked_choice,
    checked_count,
    checked_memory,
    checked_number,
    checked_pair,
)
from pose2id.centralization import fuse, nfc
from pose2id.extractor import INPUTS, PARTS_NDIM, Extractor, checked_device, checked_transform, extract
from pose2id.neighbors import BACKENDS


class Centralizer:
    """Centralizes the features of any ReID model towards their identity's centre; trains and changes nothing.

    With features at hand, no model is needed:

        query_feats, gallery_feats = Centralizer(k1=2, k2=2).enhance(query_feats, gallery_feats)

    Args:
        extractor: the user's model (`pose2id.extractor.Extractor`): any callable from images to features. Only
            `extract` needs it.
        k1: how many neighbours a feature proposes (see `nfc`).
        k2: how many neighbours the other side looks at.
        eta: weight of generated images in `fuse` (eq. 9): Market1501 2, Occluded-ReID 1, SYSU-MM01 1/4.
        transform: picture to (3, H, W) float tensor; or a preset's name (`pose2id.extractor.PRESETS`), or a
            `pose2id.extractor.Preprocess(size, mean, std)`. None: images are tensors that the model takes as they are.
        inputs: "batch", or "images" for an extractor that reads paths or (H, W, 3) uint8 RGB arrays itself.
        batch_size: images per call of the extractor.
        device: where batches go; None: where the model is. The model is never moved.
        backend: "auto", "faiss" or "torch": who searches neighbours.
        max_memory: bytes for working blocks, see `pose2id.nearest_neighbors`.

    Raises:
        TypeError, ValueError: a parameter is out of range, named.
    """

    def __init__(
        self,
        extractor: Extractor | None = None,
        *,
        k1: int = 2,
        k2: int = 2,
        eta: float = 2.0,
        transform: Callable[[Image.Image], Tensor] | str | None = None,
        inputs: str = "batch",
        batch_size: int = 64,
        device: torch.device | str | None = None,
        backend: str = "auto",
        max_memory: int | None = None,
    ) -> None:
        if extractor is not None and not callable(extractor):
            raise TypeError(f"extractor must be callable, got {type(extractor).__name__}.")
        self.extractor = extractor
        self.k1 = checked_count(k1, "k1")
        self.k2 = checked_count(k2, "k2")
        self.eta = checked_number(eta, "eta", 0, 1e6)
        self.inputs = checked_choice(inputs, "inputs", INPUTS)
        self.transform = checked_transform(transform, self.inputs)
        self.batch_size = checked_count(batch_size, "batch_size")
        self.device = None if device is None else checked_device(device)
        self.backend = checked_choice(backend, "backend", BACKENDS)
        checked_memory(max_memory)
        self.max_memory = max_memory

    def enhance(
        self, query_feats: FeatureArray, gallery_feats: FeatureArray, *, joint: bool = False
    ) -> tuple[FeatureArray, FeatureArray]:
        """Centralize query and gallery features with their mutual nearest neighbours (`nfc`).

        The two sets are centralized apart by default: the authors hold that a query must not borrow from the gallery it
        is compared with, nor the gallery from queries that a deployed system has not seen yet (information leakage).

        Args:
            query_feats: (Q, D) raw or normalised features, floating numpy array or torch tensor. Not modified.
            gallery_feats: (G, D) features of the same model.
            joint: search neighbours in the union of both sets instead; figures are then not comparable with published
                ones.

        Returns:
            (query, gallery), L2-normalised, each in the container, dtype and device it came in.

        Raises:
            TypeError, ValueError: bad input, named; an empty set, or a row that is not finite.
        """
        query, gallery = Rows(query_feats, "query_feats"), Rows(gallery_feats, "gallery_feats")
        checked_pair(query, gallery, "query_feats", "gallery_feats")
        settings: dict[str, Any] = {"backend": self.backend, "max_memory": self.max_memory}
        if not joint:
            return nfc(query_feats, self.k1, self.k2, **settings), nfc(gallery_feats, self.k1, self.k2, **settings)
        dtype = torch.promote_types(query.dtype, gallery.dtype)
        both = torch.cat([rows.read(slice(None), dtype) for rows in (query, gallery)])
        enhanced = nfc(both, self.k1, self.k2, **settings)
        results = query.empty(), gallery.empty()
        query.write(results[0], slice(None), enhanced[: query.n])
        gallery.write(results[1], slice(None), enhanced[query.n :])
        return results  # type: ignore[return-value]

    def fuse(self, features: FeatureArray, generated: FeatureArray, eta: float | None = None) -> FeatureArray:
        """Eq. 9 on raw features (N, D) and (N, M, D) of generated images: `pose2id.fuse`; default: the own eta."""
        return fuse(features, generated, self.eta if eta is None else eta)

    def extract(
        self,
        images: Any,
        *,
        normalize: bool = True,
        progress: bool = True,
        return_visibility: bool = False,
        **side_inputs: Any,
    ) -> Any:
        """Features of images from the user's extractor, L2-normalised unless told otherwise.

        Args:
            images: sequence of paths, PIL pictures, (H, W, 3) uint8 RGB arrays or (3, H, W) float tensors in [0, 1], or
                one array of them; without a transform, tensors that the model takes as they are.
            normalize: L2-normalise each feature, or each part's. False gives the raw outputs, which `fuse` wants.
            progress: show a bar on a terminal.
            return_visibility: also return the visibility (N, P) that came with part features, or None.
            **side_inputs: keywords for the extractor (`cam_label=cams`). Tensors, arrays and lists have one entry per
                image and are sliced with the batch, and so are tuples of that length; anything else is passed on.

        Returns:
            (N, D) features, or (N, P, D) parts, in the container, dtype and device that the extractor returns.

        Raises:
            TypeError, ValueError: no extractor, bad or unreadable images (named), outputs that are no finite features.
        """
        if self.extractor is None:
            raise ValueError("extractor must be given to extract features: Centralizer(my_model, transform=...).")
        features, visibility = extract(
            self.extractor,
            images,
            transform=self.transform,
            inputs=self.inputs,
            batch_size=self.batch_size,
            device=self.device,
            progress=progress,
            side_inputs=side_inputs,
        )
        name = "extractor output"
        if features.ndim == PARTS_NDIM:
            name += f" (row = image * {features.shape[1]} + part)"
        # A view of the array that `extract` has just made: normalised where it lies.
        flat = features.reshape(-1, features.shape[-1])
        rows = Rows(flat, name, normalize=normalize)
        if normalize:
            for block in rows.blocks():
                rows.write(flat, block, rows.read(block))
        return (features, visibility) if return_visibility else features

    def __repr__(self) -> str:
        """The parameters."""
        model = "" if self.extractor is None else f"{type(self.extractor).__name__}, "
        return f"Centralizer({model}k1={self.k1}, k2={self.k2}, eta={self.eta:g}, backend={self.backend!r})"
