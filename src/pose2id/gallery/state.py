"""A gallery's images, centralized: what a refit takes from all of them, and what single ones change until the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pose2id.centralization.cameras import Centres, mapped
from pose2id.centralization.guard import Evidence
from pose2id.gallery.columns import roomier
from pose2id.gallery.engines import EXTRA, filled, in_order, products
from pose2id.gallery.methods import Linked
from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import Rows, blocks, sum_last, unit
from pose2id.neighbors.distance import full_precision
from pose2id.retrieval.guarded_rerank import PLAIN_K1, PLAIN_K2
from pose2id.retrieval.rerank import k_reciprocal_nearby

NEARBY, _TIMES = 300, 4  # images that re-ranking looks at: so many, or so many times those that are wanted
_LAMBDA = 0.5  # weight of the original distance in camera-aware re-ranking, as in `k_reciprocal`
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
        self._farthest: dict[str, Tensor] = {}

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
        for known in self._farthest.values():
            known[places[places < len(known)]] = torch.nan
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

    def plain_rows(self, places: Tensor) -> Tensor:
        """(B, D) float32 unit features as they came."""
        if self.fitted.centres is None:
            return self.images.compared.index_select(0, places)
        return unit(self.images.raw.index_select(0, places))

    def plain(self, x: Tensor) -> Tensor:
        """(B, n) cosines of unit rows with features as they came, minus infinity for gaps."""
        if self.fitted.centres is None:
            scores = self.images.products(x)
        else:
            rows = self.images.raw[: self.images.n]
            scores = products(x, rows).div_(torch.linalg.vector_norm(rows, dim=1))
        return scores.masked_fill_(~self.images.alive, -torch.inf)

    def farthest(self, how: str, places: Tensor, features: Tensor) -> Tensor:
        """(B,) largest squared distance of images to any other, measured once between two refits."""
        kept = self._farthest.get(how)
        if kept is None or len(kept) < self.images.n:
            grown = torch.full((len(self.images.raw),), torch.nan, device=features.device)
            if kept is not None:
                grown[: len(kept)] = kept
            self._farthest[how] = kept = grown
        unknown = kept[places].isnan()
        for some in blocks(int(unknown.sum()), self.images.block):
            rows = features[unknown][some]
            scores = self.linked.scores(self.images.products(rows)) if how == "camera" else self.plain(rows)
            scores = scores.masked_fill_(~self.images.alive, torch.inf)
            kept[places[unknown][some]] = 2 - 2 * scores.amin(1)
        return kept[places]

    def asking(self, raw: Tensor, cameras: Tensor) -> Iterator[tuple[slice, Asking]]:
        """Blocks of queries, centralized."""
        for some in blocks(len(raw), self.images.block):
            yield some, Asking(self, raw[some], cameras[some])


class Asking:
    """A block of queries, each centralized by itself.

    Attributes:
        x: (B, D) float32 unit features.
        scores: (B, n) float32 cosines with all centralized features, minus infinity for gaps.
    """

    def __init__(self, state: State, raw: Tensor, cameras: Tensor) -> None:
        self._state, self._images, self._raw, self._cameras = state, state.images, raw, cameras
        rows = state.compared(raw, cameras)
        asked = self._images.ask(rows)
        row, place, weight = state.linked.links_of_queries(asked, cameras)
        self.x, cosines = rows, asked.similarities
        if len(row):
            sums = state.linked.sums_of_sums
            source = state.linked.features(place) if sums else self._images.compared.index_select(0, place)
            self.x = unit(rows.clone().index_add_(0, row, source * weight[:, None].float()))
            cosines = self._images.products(self.x)
        self.scores = state.linked.scores(cosines).masked_fill_(~self._images.alive, -torch.inf)

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

    def reranked(self, how: str, k: int, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same by re-ranked distances: "camera" from centralized features, "k-reciprocal" from those that came."""
        every, places = [], []
        for query in range(len(self.x)):
            if how == "camera":
                row, scores = self.x[query : query + 1], self.scores[query]
            else:
                row = Rows(self._raw[query : query + 1], "features", normalize=True).read(slice(None))
                scores = self._state.plain(row)[0]
            found, distances = self._nearby(how, row, scores, self._cameras[query : query + 1], k)
            if excluded is not None:
                distances = distances.masked_fill(excluded[query, found], torch.inf)
            order = distances.argsort(stable=True)[:k]
            missing = distances[order].isinf()
            of_query = filled(found[order].masked_fill(missing, -1)[None], distances[order][None], k)
            places.append(of_query[0])
            every.append(of_query[1])
        return torch.cat(places), torch.cat(every)

    def _nearby(self, how: str, row: Tensor, scores: Tensor, camera: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Places of the images near to a query, ascending, and re-ranked distances to them."""
        state, alive = self._state, int(self._images.alive.sum())
        near = scores.topk(min(max(NEARBY, _TIMES * k), alive)).indices.sort().values
        features = torch.cat([row, state.features(near) if how == "camera" else state.plain_rows(near)])
        with full_precision(row.device):
            squares = (2 - 2 * features @ features.T).clamp_(min=0).fill_diagonal_(0)
        reach = state.farthest(how, near, features[1:])
        largest = torch.cat([(2 - 2 * scores[self._images.alive].min())[None], torch.maximum(reach, squares[0, 1:])])
        if how == "camera":
            cameras = torch.cat([camera, self._images.cameras[near]])
            found = k_reciprocal_nearby(squares, largest, cameras=cameras, lambda_value=_LAMBDA)
        else:
            found = k_reciprocal_nearby(squares, largest, k1=PLAIN_K1, k2=PLAIN_K2)
        return near, found
