"""What may be done with the features of one trial: as they are, with neighbours, with generated images, re-ranked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.centralization.nfc import nfc as published_nfc
from pose2id.centralizer import Centralizer
from pose2id.retrieval.rerank import k_reciprocal

Pair = tuple[NDArray[Any], NDArray[Any]]  # of the queries, of the gallery
SIDES = ("query", "gallery")


class Sets:
    """Queries and gallery of one trial, and what is made of them; what several rows share is made once.

    Args:
        pair: features (Q, D) and (G, D).
        camids: cameras of both; None where one has none.
        generated: features (Q, M, D) and (G, M, D) of generated images.
        centralizer: whose methods and parameters are used.
        alone: query and gallery are the same images: each is centralized as one of the gallery, never with itself.
    """

    def __init__(
        self, pair: Pair, camids: tuple[Any, Any], generated: Pair | None, centralizer: Centralizer, *, alone: bool
    ) -> None:
        self.pair, self.centralizer, self._generated, self._alone = pair, centralizer, generated, alone
        self._made: dict[str, Pair] = {}
        self._camids = camids if camids[0] is not None and camids[1] is not None else (None, None)

    @property
    def generated(self) -> Pair:
        """Features of generated images."""
        if self._generated is None:
            raise ValueError("generated must be given for rows with generated images (IPG).")
        return self._generated

    def source(self, name: str) -> Pair:
        """Both sides as they are ("baseline"), with all generated images ("IPG"), or with those of nobody ("control").

        The control has the mean of all people in each pose in the place of a person's own images.
        """
        if name not in self._made:
            generated = None
            if name == "control":
                mean = np.concatenate(self.generated).mean(axis=0)
                generated = tuple(np.broadcast_to(mean, x.shape) for x in self.generated)
            self._made[name] = self.pair if name == "baseline" else self.fused(generated)
        return self._made[name]

    def centralized(self, name: str) -> Pair:
        """A source by the published NFC."""
        key = f"{name} + NFC"
        if key not in self._made:
            self._made[key] = self.with_nfc(self.source(name))
        return self._made[key]

    def fused(self, generated: Any = None, sides: tuple[str, ...] = SIDES, eta: float | None = None) -> Pair:
        """Features of the sides with those of generated images; with none (M = 0) as they are."""
        of_images = self.generated if generated is None else generated
        query, gallery = (
            self.centralizer.fuse(x, of_x, eta) if side in sides and of_x.shape[1] else x
            for side, x, of_x in zip(SIDES, self.pair, of_images, strict=True)
        )
        return query, gallery

    def with_nfc(
        self, pair: Pair, sides: tuple[str, ...] = SIDES, k1: int | None = None, k2: int | None = None
    ) -> Pair:
        """Features of the sides by the published NFC, each set apart."""
        query, gallery = with_nfc(pair, self.centralizer, sides, k1, k2)
        return query, gallery

    def safe(self, pair: Pair, *, cameras: bool = False) -> Pair:
        """Both sides as `Centralizer.enhance` makes them by default, or by the method asked for."""
        camids = self._camids if cameras else (None, None)
        return safely(pair, camids, self.centralizer, alone=self._alone)

    def reranked(self, pair: Pair) -> NDArray[Any]:
        """Distances re-ranked as published (20, 6, 0.3)."""
        return k_reciprocal(*pair)

    def safely_reranked(self, *, cameras: bool = False) -> NDArray[Any]:
        """Distances as `Centralizer.rerank` gives them."""
        return unpublished(self.centralizer).rerank(*self.pair, **self._keywords(cameras=cameras))

    def _keywords(self, *, cameras: bool) -> dict[str, Any]:
        return dict(zip(("query_camids", "gallery_camids"), self._camids, strict=True)) if cameras else {}


Way = Callable[[Sets], "Pair | NDArray[Any]"]


def way_of(make: Callable[..., Any], *given: Any) -> Way:
    """A way that calls `make` with the sets and what is given."""
    return lambda sets: make(sets, *given)


def with_nfc(
    pair: Pair,
    centralizer: Centralizer,
    sides: tuple[str, ...] = SIDES,
    k1: int | None = None,
    k2: int | None = None,
) -> Pair:
    """The sides by the published NFC, with the parameters of a centralizer unless k1 and k2 are given."""
    options: dict[str, Any] = {name: getattr(centralizer, name) for name in ("backend", "neighbors", "max_memory")}
    k1, k2 = k1 or centralizer.k1, k2 or centralizer.k2
    query, gallery = (
        published_nfc(x, k1, k2, **options) if side in sides else x for side, x in zip(SIDES, pair, strict=True)
    )
    return query, gallery


def safely(pair: Pair, camids: tuple[Any, Any], centralizer: Centralizer, *, alone: bool) -> Pair:
    """Both sides by `Centralizer.enhance`; of the same images each is as it is in the gallery."""
    query, gallery = unpublished(centralizer).enhance(*pair, query_camids=camids[0], gallery_camids=camids[1])
    return (gallery, gallery) if alone else (query, gallery)


def unpublished(centralizer: Centralizer) -> Centralizer:
    """The same unless its method is NFC, which has rows of its own: then the default."""
    if centralizer.method != "nfc":
        return centralizer
    return Centralizer(backend=centralizer.backend, max_memory=centralizer.max_memory)
