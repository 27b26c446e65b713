"""A gallery's images, centralized: what a refit takes from all of them, and what single ones change until the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pose2id.centralization.cameras import Centres
from pose2id.centralization.guard import Evidence
from pose2id.gallery.columns import roomier
from pose2id.gallery.engines import EXTRA, Inverted, Members, Products, filled, in_order, products, shuffled
from pose2id.gallery.methods import Linked
from pose2id.gallery.unknown import COHORT, scores
from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import Rows, blocks, sum_last, unit
from pose2id.neighbors.distance import full_precision
from pose2id.retrieval.guarded_rerank import PLAIN_K1, PLAIN_K2
from pose2id.retrieval.rerank import k_reciprocal_nearby

NEARBY, _TIMES = 300, 4  # images that re-ranking looks at: so many, or so many times those that are wanted
_CANDIDATES, _SAMPLE = 200, 2000  # of a large gallery: that are scored, and over which distances are largest
_SPACINGS = 51  # ranks whose distances show how strangers are spaced
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
        self._sample: dict[str, Tensor] = {}

    def compared(self, raw: Tensor, cameras: Tensor) -> Tensor:
        """(B, D) float32 unit rows as methods compare them, with what is frozen of cameras."""
        return compared(raw, cameras, self.fitted.centres, self.fitted.link_map)

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
            images.come(places[some])
            self.linked.insert(places[some], images.ask(rows[some]))
        self.changes += len(raw)

    def remove(self, places: Tensor) -> None:
        """Images leave a gap."""
        self.images.go(places)
        self.linked.remove(places)
        self.changes += len(places)

    def features(self, places: Tensor) -> Tensor:
        """(B, D) float32 centralized features."""
        result = torch.empty(
            (len(places), self.images.raw.shape[1]), dtype=torch.float32, device=self.images.raw.device
        )
        for some in blocks(len(places), BLOCK_BYTES // (128 * result.shape[1])):
            result[some] = self.linked.features(places[some])
        return result

    def plain_rows(self, places: Tensor) -> Tensor:
        """(B, D) float32 unit features as they came."""
        if self.fitted.centres is None:
            return self.images.compared.index_select(0, places)
        return unit(self.images.raw.index_select(0, places))

    def cosines(self, how: str, x: Tensor) -> Tensor:
        """(B, m) cosines of unit rows with the features that are re-ranked, of all images, gaps at infinity.

        Of a large gallery with those of a sample.
        """
        images = self.images
        if images.index is not None:
            if how not in self._sample:
                present = torch.nonzero(images.alive).flatten()
                chosen = shuffled(len(present))[:_SAMPLE]
                self._sample[how] = self.reranked_rows(how, present[chosen.to(present.device)])
            return products(x, self._sample[how])
        if how == "camera":
            found = self.linked.scores(images.products(x))
        elif self.fitted.centres is None:
            found = images.products(x)
        else:
            rows = images.raw[: images.n]
            lengths = torch.linalg.vector_norm(rows, dim=1)
            odd = torch.nonzero(~((lengths > 1e-15) & (lengths < 1e15))).flatten()  # squares that float32 cannot hold
            lengths[odd] = torch.linalg.vector_norm(rows[odd].double(), dim=1).float()
            found = products(x, rows).div_(lengths)
        return found.masked_fill_(~images.alive, torch.inf)

    def reranked_rows(self, how: str, places: Tensor) -> Tensor:
        """(B, D) float32 unit features that are re-ranked: centralized ones, or those that came."""
        return self.features(places) if how == "camera" else self.plain_rows(places)

    def farthest(self, how: str, places: Tensor, features: Tensor) -> Tensor:
        """(B,) largest squared distance of images to any other, measured once between two refits."""
        kept = self._farthest.get(how)
        if kept is None or len(kept) < self.images.n:
            grown = torch.full((len(self.images.raw),), torch.nan, dtype=torch.float32, device=features.device)
            if kept is not None:
                grown[: len(kept)] = kept
            self._farthest[how] = kept = grown
        unknown = kept[places].isnan()
        for some in blocks(int(unknown.sum()), self.images.block):
            kept[places[unknown][some]] = 2 - 2 * self.cosines(how, features[unknown][some]).amin(1)
        return kept[places]

    def spacings(self) -> Tensor:
        """(B, 51) squared distances of a sample of images to their nearest others, before neighbours are added."""
        places = torch.nonzero(self.images.alive).flatten()
        chosen = shuffled(len(places))[:_SAMPLE]
        places, found = places[chosen.to(places.device)], []
        for some in blocks(len(places), self.images.block):
            own = places[some]
            asked = self.images.ask(self.images.compared.index_select(0, own))
            found.append(asked.nearest(_SPACINGS, Members(None, own[:1]), own)[1][0])
        return torch.cat(found)

    def asking(self, raw: Tensor, cameras: Tensor) -> Iterator[tuple[slice, Asking]]:
        """Blocks of queries, centralized."""
        for some in blocks(len(raw), self.images.block):
            yield some, Asking(self, raw[some], cameras[some])


def compared(raw: Tensor, cameras: Tensor, centres: Centres | None, link_map: Tensor | None) -> Tensor:
    """(B, D) float32 unit rows, without their camera's mean, mapped: the same for an image alone and among others."""
    result = torch.empty_like(raw)
    for some in blocks(len(raw), BLOCK_BYTES // (32 * raw.shape[1])):
        x = _unit(raw[some].double())
        if centres is not None:
            x = _unit(x - centres.at(cameras[some]))
        if link_map is not None:
            x = _unit(x @ link_map)
        result[some] = x
    return result


def _unit(x: Tensor) -> Tensor:
    """Float64 rows, L2-normalised, in few steps: `unit` is for any range."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.div_(norms.clamp_(min=torch.finfo(torch.float64).tiny))


class Asking:
    """A block of queries, each centralized by itself.

    Attributes:
        x: (B, D) float32 unit features.
    """

    def __init__(self, state: State, raw: Tensor, cameras: Tensor) -> None:
        self._state, self._images, self._raw, self._cameras = state, state.images, raw, cameras
        rows = state.compared(raw, cameras)
        asked = self._images.ask(rows)
        row, place, weight = state.linked.links_of_queries(asked, cameras)
        self.x, self._compared, self._asked = rows, rows, asked
        self._cosines: Tensor | None = asked.similarities if isinstance(asked, Products) else None
        if len(row):
            sums = state.linked.sums_of_sums
            source = state.linked.features(place) if sums else self._images.compared.index_select(0, place)
            self.x = unit(rows.clone().index_add_(0, row, source * weight[:, None].float()))
            self._cosines = None

    def nearest(self, k: int, *, exclude: bool = False) -> tuple[Tensor, Tensor]:
        """(B, k) places of the nearest images, -1 for none, and their squared distances; without the own camera's."""
        if self._images.index is not None:
            return self._among_candidates(self._images.index, k, exclude=exclude)
        scores = self._scores()
        if exclude:
            scores.masked_fill_(self._own_camera(slice(None)), -torch.inf)
        found, places = scores.topk(min(k + EXTRA, scores.shape[1]), dim=1)
        squares = (2 - 2 * found).clamp_(min=0)
        head = min(places.shape[1], _RESCORED)
        features = self._state.features(places[:, :head].flatten()).view(len(places), head, -1)
        squares[:, :head] = sum_last(features.sub_(self.x[:, None]).square_())
        squares.masked_fill_(found.isinf(), torch.inf)
        places = places.masked_fill(found.isinf(), -1)
        places[:, :head], squares[:, :head] = in_order(places[:, :head], squares[:, :head], head)
        return filled(places[:, :k], squares[:, :k].cummax(1).values, k)

    def scores(self, *, centralized: bool, exclude: bool = False) -> Tensor:
        """(B,) how much nearer the nearest image is than strangers are (`unknown.scores`)."""
        if centralized:
            return scores(self.nearest(COHORT, exclude=exclude)[1])
        if not exclude:
            return scores(self._asked.nearest(COHORT, Members(None, self._cameras[:1]))[1][0])
        found = []
        for query in range(len(self.x)):
            view = self._own_camera(slice(query, query + 1))[0].long()
            asked = self._images.ask(self._compared[query : query + 1])
            found.append(scores(asked.nearest(COHORT, Members(view, torch.zeros_like(self._cameras[:1])))[1][0]))
        return torch.cat(found)

    def reranked(self, how: str, k: int, *, exclude: bool = False) -> tuple[Tensor, Tensor]:
        """The same by re-ranked distances: "camera" from centralized features, "k-reciprocal" from those that came."""
        places = torch.full((len(self.x), k), -1, dtype=torch.int64, device=self.x.device)
        distances = torch.full((len(self.x), k), torch.inf, dtype=torch.float32, device=self.x.device)
        for query in range(len(self.x)):
            others = ~self._own_camera(slice(query, query + 1))[0] if exclude else None
            found, of_query = self._nearby(how, slice(query, query + 1), k, others)
            if others is not None:
                found, of_query = found[others[found]], of_query[others[found]]
            order = of_query.argsort(stable=True)[:k]
            places[query, : len(order)], distances[query, : len(order)] = found[order], of_query[order]
        return places, distances

    def _scores(self) -> Tensor:
        """(B, n) cosines with centralized features, minus infinity for gaps."""
        cosines = self._images.products(self.x) if self._cosines is None else self._cosines
        return self._state.linked.scores(cosines).masked_fill(~self._images.alive, -torch.inf)

    def _own_camera(self, queries: slice) -> Tensor:
        """(B, n) which images are of the query's camera."""
        own = self._cameras[queries, None]
        return (self._images.cameras[: self._images.n] == own) & (own >= 0)

    def _among_candidates(self, index: Inverted, k: int, *, exclude: bool) -> tuple[Tensor, Tensor]:
        """Of candidates, and of images that are linked to them."""
        found = []
        for query in range(len(self.x)):
            others = ~self._own_camera(slice(query, query + 1))[0]
            mask = self._images.in_parts(others) if exclude else ()
            near = index.search(self.x[query : query + 1], max(_CANDIDATES, _TIMES * k), *mask)[0]
            near = near[near >= 0]
            near = torch.cat([near, self._state.linked.linked(near)]).unique()
            if exclude:
                near = near[others[near]]
            squares = sum_last(self._state.features(near).sub_(self.x[query]).square_())
            found.append(in_order(near[None], squares[None], k))
        places, squares = (torch.cat(values) for values in zip(*found, strict=True))
        return places, squares

    def _nearby(self, how: str, query: slice, k: int, others: Tensor | None) -> tuple[Tensor, Tensor]:
        """Places of the images near to a query, ascending, and re-ranked distances to them.

        With `others` (n,) bool, the nearest of these are there, too: images of the own camera may be nearer than all.
        """
        state, x = self._state, self.x[query]
        wanted = [(max(NEARBY, _TIMES * k), None)] + ([] if others is None else [(_TIMES * k, others)])
        if how != "camera":
            x = Rows(self._raw[query], "features", normalize=True).read(slice(None))
        cosines = state.cosines(how, x)
        if self._images.index is not None:
            rows, index = state.compared(self._raw[query], self._cameras[query]), self._images.index
            among = [() if mask is None else self._images.in_parts(mask) for _, mask in wanted]
            near = torch.cat([index.search(rows, count, *of)[0] for (count, _), of in zip(wanted, among, strict=True)])
            near = near[near >= 0].unique()
        else:
            alive = self._images.alive
            masks = [(count, alive if mask is None else alive & mask) for count, mask in wanted]
            near = torch.cat([_nearest_in(cosines[0], mask, count) for count, mask in masks]).unique()
        rows = state.reranked_rows(how, near)
        features = torch.cat([x, rows])
        with full_precision(x.device):
            squares = (2 - 2 * features @ features.T).clamp_(min=0).fill_diagonal_(0)
        largest = torch.cat([2 - 2 * cosines.amin(1), torch.maximum(state.farthest(how, near, rows), squares[0, 1:])])
        if how == "camera":
            cameras = torch.cat([self._cameras[query], self._images.cameras[near]])
            return near, k_reciprocal_nearby(squares, largest, cameras=cameras, lambda_value=_LAMBDA)
        return near, k_reciprocal_nearby(squares, largest, k1=PLAIN_K1, k2=PLAIN_K2)


def _nearest_in(cosines: Tensor, mask: Tensor, count: int) -> Tensor:
    """Places of the nearest in a mask (n,), at most `count`."""
    return cosines.masked_fill(~mask, -torch.inf).topk(min(count, int(mask.sum()))).indices
