"""A gallery's images, centralized: what a refit takes from all of them, and what single ones change until the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pose2id.centralization.cameras import Centres, mapped
from pose2id.centralization.guard import Evidence
from pose2id.gallery.columns import roomier
from pose2id.gallery.engines import EXTRA, filled, in_order
from pose2id.gallery.methods import Linked
from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import Rows, blocks, sum_last, unit
from pose2id.neighbors.distance import full_precision

_RESCORED = 64  # the nearest of a search, which are ordered by differences instead of products


class Fitted(NamedTuple):
    """What is frozen between refits, besides what a method keeps of its own.

    Attributes:
        centres: means of all images and of cameras; None: features are not centred.
        link_map: (D, D) float64 across cameras, or None.
        evidence: whether people repeat; None where no method asked.
        reason: which method, and why, in a sentence.
        n: how many images were there.
    """

    centres: Centres | None
    link_map: Tensor | None
    evidence: Evidence | None
    reason: str
    n: int


class State:
    """Images at places, and their centralized features."""

    def __init__(self, linked: Linked, fitted: Fitted) -> None:
        self.images, self.linked, self.fitted = linked.images, linked, fitted
        self.changes = 0

    def compared(self, raw: Tensor, cameras: Tensor) -> Tensor:
        """(B, D) float32 unit rows as methods compare them, with what is frozen of cameras."""
        rows = Rows(raw, "features", normalize=True)
        if self.fitted.centres is not None:
            rows = self.fitted.centres.applied(rows, cameras)
        if self.fitted.link_map is not None:
            rows = mapped(rows, self.fitted.link_map)
        return rows.read(slice(None))

    def insert(self, raw: Tensor, cameras: Tensor, places: Tensor | None = None) -> None:
        """Images at new places, or at places that are free."""
        images = self.images
        if places is None:
            places = torch.arange(images.n, images.n + len(raw), device=raw.device)
            capacity = roomier(len(images.raw), images.n + len(raw))
            for columns in (images, self.linked):
                columns.grow(capacity)
            images.n += len(raw)
            images.present[places] = False  # until their turn
        rows = self.compared(raw, cameras)
        images.raw[places], images.compared[places], images.cameras[places] = raw, rows, cameras
        for some in blocks(len(raw), images.block):
            images.present[places[some]] = True
            self.linked.insert(places[some], images.ask(rows[some]))
        self.changes += len(raw)

    def remove(self, places: Tensor) -> None:
        """Images leave a gap."""
        self.images.present[places] = False
        self.linked.remove(places)
        self.changes += len(places)

    def features(self, places: Tensor) -> Tensor:
        """(B, D) float32 centralized features."""
        result = torch.empty((len(places), self.images.raw.shape[1]), device=self.images.raw.device)
        for some in blocks(len(places), BLOCK_BYTES // (128 * result.shape[1])):
            result[some] = self.linked.features(places[some])
        return result

    def asking(self, raw: Tensor, cameras: Tensor) -> Iterator[tuple[slice, Asking]]:
        """Blocks of queries, centralized."""
        for some in blocks(len(raw), self.images.block):
            yield some, Asking(self, self.compared(raw[some], cameras[some]), cameras[some])


class Asking:
    """A block of queries, each centralized by itself.

    Attributes:
        x: (B, D) float32 unit features.
        scores: (B, n) float32 cosines with all centralized features, minus infinity for gaps.
    """

    def __init__(self, state: State, rows: Tensor, cameras: Tensor) -> None:
        self._state, images = state, state.images
        asked = images.ask(rows)
        row, place, weight = state.linked.links_of_queries(asked, cameras)
        self.x, products = rows, asked.similarities
        if len(row):
            source = state.linked.features(place) if state.linked.sums_of_sums else images.compared[place]
            self.x = unit(rows.clone().index_add_(0, row, source * weight[:, None].float()))
            with full_precision(rows.device):
                products = self.x @ images.compared[: images.n].T
        self.scores = state.linked.scores(products).masked_fill_(~images.alive, -torch.inf)

    def nearest(self, k: int, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, k) places of the nearest images, -1 for none, and their squared distances; without `excluded` (B, n)."""
        scores = self.scores if excluded is None else self.scores.masked_fill(excluded, -torch.inf)
        found, places = scores.topk(min(k + EXTRA, scores.shape[1]), dim=1)
        squares = (2 - 2 * found).clamp_(min=0)
        head = min(places.shape[1], _RESCORED)
        features = self._state.features(places[:, :head].flatten()).view(len(places), head, -1)
        squares[:, :head] = sum_last(features.sub_(self.x[:, None]).square_())
        squares.masked_fill_(found.isinf(), torch.inf)
        places = places.masked_fill(found.isinf(), -1)
        places[:, :head], squares[:, :head] = in_order(places[:, :head], squares[:, :head], head)
        return filled(places[:, :k], squares[:, :k].cummax(1).values, k)
