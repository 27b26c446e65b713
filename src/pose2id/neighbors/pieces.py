"""Pieces of a search of one set: what pieces find, merged by exact values, is what `search` finds in the whole.

All pieces are centred and scaled as the whole set is, so that a pair has one exact value in whichever piece it is
looked at. Many exact copies are dropped before (`search.distinct`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import Rows, blocks
from pose2id.neighbors.certificate import certified
from pose2id.neighbors.distance import full_precision
from pose2id.neighbors.engines import Best, Blocks, EngineMaker, Faiss, Half, Products
from pose2id.neighbors.search import default_engines
from pose2id.neighbors.space import Centre, Space, Uncentred

Lists = tuple[Tensor, Tensor]  # (B, k) int64, -1 where there are fewer, and what they are ordered by, infinite there


def nearest_within(rows: Rows, k: int, centre: Centre) -> Lists:
    """The k nearest others of each row: (n, k) positions and float64 exact values, which are squared distances."""
    return _lists(Space(rows, _all(rows), _block_bytes(rows), centre=centre), k)


def nearest_between(rows: Rows, boundary: int, k: int, centre: Centre) -> Lists:
    """Of each row before the boundary the k nearest behind it, and of each row behind it the k nearest before it.

    One product of each pair serves both sides. As `nearest_within`.
    """
    return _lists(_Halves(rows, boundary, _block_bytes(rows), centre), k)


def nearest_of_queries(rows: Rows, queries: int, k: int, centre: Centre) -> Lists:
    """Of each of the last rows, so many, the k nearest of those before them: (queries, k), as `nearest_within`."""
    return _lists(Space(rows, _all(rows), _block_bytes(rows), queries=queries, centre=centre), k)


def near_queries(rows: Rows, queries: int, k: int, centre: Centre) -> tuple[Tensor, Tensor, Tensor]:
    """As `nearest_of_queries`, with the distances (queries, k) that `search_members` gives."""
    space = Uncentred(rows, _all(rows), _block_bytes(rows), keep_copy=True, queries=queries, centre=centre)
    near = torch.full((queries, k), torch.inf, dtype=torch.float64, device=rows.device)
    found = _lists(space, k, near[:, : min(k, space.available)])
    return *found, near * space.scale


def first_lists(indices: Tensor, exact: Tensor, *others: Tensor, k: int) -> tuple[Tensor, ...]:
    """The first k of lists (B, L), by exact value, equal ones by the lower index, and others of their values."""
    order = torch.argsort(indices, dim=1, stable=True)
    order = order.gather(1, torch.argsort(exact.gather(1, order), dim=1, stable=True))[:, :k]
    return tuple(values.gather(1, order) for values in (indices, exact, *others))


def _lists(space: Space, k: int, near: Tensor | None = None) -> Lists:
    count = min(k, space.available)
    positions = torch.full((len(space.asking), k), -1, dtype=torch.int64, device=space.device)
    exact = torch.full(positions.shape, torch.inf, dtype=torch.float64, device=space.device)
    if count < 1:
        return positions, exact
    with full_precision(space.device):
        engines = default_engines(space, k)
        if isinstance(space, _Halves):
            engines = [_BOTH[engine] for engine in engines]
        positions[:, :count] = certified(space, count, engines, Products(space, torch.float64), near=near)
        row, column = torch.nonzero(positions >= 0, as_tuple=True)
        exact[row, column] = space.exact(space.asking[row], positions[row, column])
    return positions, exact


def _all(rows: Rows) -> Tensor:
    return torch.arange(rows.n, device=rows.device)


def _block_bytes(rows: Rows) -> int:
    return BLOCK_BYTES * (16 if rows.device.type == "cuda" else 1)


class _Halves(Space):
    """Two sets, one before the boundary and one behind it, of which pairs count across it alone."""

    def __init__(self, rows: Rows, boundary: int, block_bytes: int, centre: Centre) -> None:
        super().__init__(rows, _all(rows), block_bytes, own=True, centre=centre)
        self.boundary, self.available = boundary, max(boundary, rows.n - boundary)

    def exclude(self, scores: Tensor, rows: Tensor, column: slice | Tensor) -> None:
        """Make all on the row's own side the last in its scores (B, column)."""
        if isinstance(column, slice):
            column = torch.arange(column.start, column.stop, device=self.device)
        scores.masked_fill_((rows[:, None] < self.boundary) == (column < self.boundary), -torch.inf)


class _Both(Blocks):
    """Each pair of `_Halves` once, for both of its sides."""

    _searched: _Halves

    def nearest(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As `Engine.nearest`."""
        space = self._searched
        if len(rows) < space.n:
            return super().nearest(rows, count)
        best = Best(space.n, count, space.device)
        for part in blocks(space.n - space.boundary, self._side):
            behind = slice(space.boundary + part.start, space.boundary + part.stop)
            scores = self.scores(behind)
            for before in blocks(space.boundary, self._side):
                block = scores(before)
                best.update(before, block, behind.start)
                best.update(behind, block.T, before.start)
        return best.scores, best.positions


class _BothProducts(_Both, Products):
    pass


class _BothHalf(_Both, Half):
    pass


class _BothFaiss(Faiss):
    """faiss's flat index, of one side after the other."""

    _space: _Halves

    def nearest(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As `Engine.nearest`."""
        space = self._space
        best = Best(len(rows), count, space.device)
        for before, others in ((True, slice(space.boundary, space.n)), (False, slice(0, space.boundary))):
            own = torch.nonzero((rows < space.boundary) == before).flatten()
            if len(own):
                length = min(count, others.stop - others.start)
                found = self._knn(space.centred(others), space.centred(rows[own]), length)
                values, positions = (torch.from_numpy(array).to(space.device) for array in found)
                best.scores[own, :length], best.positions[own, :length] = -values, positions + others.start
        return best.scores, best.positions


_BOTH: dict[EngineMaker, EngineMaker] = {Faiss: _BothFaiss, Half: _BothHalf, Products: _BothProducts}
