"""A set of rows in the precisions of a nearest-neighbour search, and the proofs that its results are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import blocks, row_norms, sum_last
from pose2id.neighbors.distance import squared_euclidean

FLOAT32_ROUNDING = 2.0**-24
_FLOAT64_ROUNDING = 2.0**-53
# From a block of columns to a function from a block of rows to their scores (B, C).
Products = Callable[[slice], Callable[[slice], Tensor]]
_CACHE_BYTES = 2 << 20
_GROUP = 8  # scores of which only the largest is looked at first


class RowSource(Protocol):
    """What is searched: `Rows`, or several of them as one."""

    n: int
    dim: int
    device: torch.device

    def read(self, index: slice | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `Rows.read`."""

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
        """As `Rows.blocks`."""


class Candidates(NamedTuple):
    """What a search found for some rows: m others of each.

    Attributes:
        positions: (B, m) int64.
        possible: (B, m) bool: which of them may be among the k nearest; at least k are.
        floor: (B,) float64: all rows that are no candidates are at least this far. Infinite: there are none.
    """

    positions: Tensor
    possible: Tensor
    floor: Tensor


class Space:
    """The rows `kept`, by position, in two precisions: float32 for the search, float64 for what it leaves open.

    Attributes:
        n, dim: number of rows and of columns.
        device: where they are.
        block_bytes: what one block of temporaries may take.
        copy: (n, D) float32 rows, centred and scaled; None where memory has no room for them, then they are computed
            when needed. Centred, because the features of one model share a large mean that only costs precision;
            scaled by a power of two to norms of at most 1, the largest at least 1/2, so that no square overflows.
        squares: (n,) float32 squared norms of these rows.
        norms: (n,) float64 norms of these rows.
        bound: (n,) float64, by how much a squared distance from a float32 product may differ from the true one: the
            rounding of D products and of the rows to float32. Subtracting the same mean from all rows changes no
            distance by more than the rounding of the result.
    """

    def __init__(self, rows: RowSource, kept: Tensor, block_bytes: int, *, keep_copy: bool = True) -> None:
        self._rows, self._kept, self.block_bytes = rows, kept, block_bytes
        self.n, self.dim, self.device = len(kept), rows.dim, rows.device
        self._read_bytes = 40 * rows.dim  # what one row takes while it is read and centred in float64
        self._parts = list(blocks(self.n, block_bytes // self._read_bytes))
        self._mean = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
        for part in self._parts:
            self._mean += (self._read(part) / self.n).sum(0)
        largest = max(float(row_norms(self._read(part) - self._mean).max()) for part in self._parts)
        self._scale = 2.0 ** math.frexp(largest)[1]
        self.copy = None
        if keep_copy:
            self.copy = torch.empty((self.n, rows.dim), dtype=torch.float32, device=rows.device)
        self.squares = torch.empty(self.n, dtype=torch.float32, device=rows.device)
        for part in self._parts:
            block = self._centred64(part).float()
            self.squares[part] = block.square().sum(1)
            if self.copy is not None:
                self.copy[part] = block
        self.norms = self.squares.double().sqrt()
        # D products and sums, 8 further roundings; a tenth more for the second order.
        self._roundings = (1.1 * rows.dim + 8) * (self.norms + self.norms.max()) ** 2
        self.bound = FLOAT32_ROUNDING * self._roundings

    def centred(self, positions: slice | Tensor) -> Tensor:
        """Float32 rows, as `copy` has them."""
        if self.copy is not None:
            # Indexing gathers the same rows several times as slowly.
            return self.copy[positions] if isinstance(positions, slice) else self.copy.index_select(0, positions)
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=self.device)
        result = torch.empty((len(positions), self.dim), dtype=torch.float32, device=self.device)
        for part in blocks(len(positions), self.block_bytes // (2 * self._read_bytes)):
            result[part] = self._centred64(positions[part])
        return result

    def scores(self, positions: slice | Tensor) -> Callable[[slice], Tensor]:
        """From a slice of rows to its (B, C) negative squared distances to the rows at `positions`, in float32."""
        y, squares = self.centred(positions), self.squares[positions]
        return lambda part: squared_euclidean(self.centred(part), y, self.squares[part], squares).neg_()

    def candidates(self, values: Tensor, positions: Tensor, rows: slice | Tensor, k: int) -> Candidates:
        """What (B, m) float32 squared distances of `rows`, ascending and wrong by at most `bound`, say."""
        values, bound = values.double(), self.bound[rows]
        possible = values <= (values[:, k - 1] + 2 * bound)[:, None]
        floor = (values[:, -1] - bound).clamp(min=0).sqrt()
        if positions.shape[1] == self.n - 1:
            floor.fill_(torch.inf)
        return Candidates(positions, possible, floor)

    def exact(self, first: Tensor, second: Tensor) -> Tensor:
        """Float64 distances of pairs of positions, all but exact."""
        return self._exact(first, second).sqrt()

    def rank(self, found: Candidates, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest (B, k) of `rows` in exact order, and which (B,) of these lists are certain.

        Possible candidates are scored by their differences to the others, whose distances float32 leaves all but
        exact. A list is certain if nothing but candidates can be as near as its last member. Where two of its
        distances are too close to tell their order, they are scored in float64.
        """
        result = torch.empty((len(rows), k), dtype=torch.int64, device=self.device)
        certain = torch.empty(len(rows), dtype=torch.bool, device=self.device)
        width = found.positions.shape[1]
        for part in blocks(len(rows), self.block_bytes // (64 * width)):
            own, positions = rows[part], found.positions[part]
            row, column = torch.nonzero(found.possible[part], as_tuple=True)
            distances = torch.full(positions.shape, torch.inf, dtype=torch.float64, device=self.device)
            distances[row, column] = self._scored(own[row], positions[row, column])
            distances, order = distances.sort(dim=1)
            positions = positions.gather(1, order)
            # Rows were rounded to float32, then differences and squares.
            wrong = FLOAT32_ROUNDING * (1.1 * (self.norms[own] + self.norms.max()) + 4 * distances[:, k - 1])
            certain[part] = found.floor[part] > distances[:, k - 1] + wrong
            tied = (distances[:, : k + 1].diff(dim=1) <= 3 * wrong[:, None]).any(1) & certain[part]
            for again in _chunks(tied, self.block_bytes // (64 * width)):
                row, column = torch.nonzero(distances[again].isfinite(), as_tuple=True)
                best = ExactBest(len(again), k, self.device)
                others = positions[again[row], column]
                best.add(row, others, self._exact(own[again[row]], others))
                positions[again, :k] = best.positions
            result[part] = positions[:, :k]
        return result, certain

    def rank_in_float64(self, rows: Tensor, k: int) -> Tensor:
        """The k nearest (B, k) of `rows` in exact order, by float64 products with all rows."""
        result = torch.empty((len(rows), k), dtype=torch.int64, device=self.device)
        # Every chunk reads all rows once: not too few at a time.
        for part in blocks(len(rows), self.block_bytes // (40 * max(self.dim, self._parts[0].stop))):
            result[part] = self._nearest_of(rows[part], k)
        return result

    def _nearest_of(self, rows: Tensor, k: int) -> Tensor:
        x = self._centred64(rows)
        squares = x.square().sum(1)
        # Twice: these distances are rounded, and so are the exact ones of which they must miss none.
        bound = 2 * _FLOAT64_ROUNDING * self._roundings[rows]
        nearest = torch.full((len(rows), k), torch.inf, dtype=torch.float64, device=self.device)
        best = ExactBest(len(rows), k, self.device)
        for part in self._parts:
            y = self._centred64(part)
            values = squared_euclidean(x, y, squares, y.square().sum(1))
            without(rows, values, part, torch.inf)
            nearest = torch.cat([nearest, values], 1).topk(k, dim=1, largest=False).values
            near = (values <= nearest[:, -1:] + 2 * bound[:, None]) & values.isfinite()
            row, column = torch.nonzero(near, as_tuple=True)
            other = column + part.start
            best.add(row, other, self._exact(rows[row], other))
        return best.positions

    def _scored(self, first: Tensor, second: Tensor) -> Tensor:
        """Float64 distances of pairs of positions, from the differences of float32 rows."""
        result = torch.empty(len(first), dtype=torch.float64, device=self.device)
        # On a CPU small blocks, which stay in its cache.
        block_bytes = self.block_bytes if self.device.type == "cuda" else min(self.block_bytes, _CACHE_BYTES)
        for part in blocks(len(first), block_bytes // (24 * self.dim)):
            difference = self.centred(first[part]).sub_(self.centred(second[part]))
            result[part] = torch.linalg.vector_norm(difference, dim=1, dtype=torch.float64)
        return result

    def _exact(self, first: Tensor, second: Tensor) -> Tensor:
        """Float64 squared distances of pairs of positions, scaled as `copy` is, so that no square overflows."""
        result = torch.empty(len(first), dtype=torch.float64, device=self.device)
        for part in blocks(len(first), self.block_bytes // (2 * self._read_bytes)):
            difference = self._read(first[part]).sub_(self._read(second[part])).div_(self._scale)
            result[part] = sum_last(difference.square_())
        return result

    def _centred64(self, positions: slice | Tensor) -> Tensor:
        return (self._read(positions) - self._mean) / self._scale

    def _read(self, positions: slice | Tensor) -> Tensor:
        return self._rows.read(self._kept[positions], torch.float64)


class Best:
    """The best of each row, block by block: (B, count) float32 scores, descending, and (B, count) int64 positions."""

    def __init__(self, rows: int, count: int, device: torch.device) -> None:
        self.scores = torch.full((rows, count), -torch.inf, dtype=torch.float32, device=device)
        self.positions = torch.zeros((rows, count), dtype=torch.int64, device=device)

    def update(self, part: slice, block: Tensor, start: int) -> None:
        """Take in scores of the rows `part` for consecutive positions from `start` on."""
        count = self.scores.shape[1]
        found, at = _largest(block, min(count, block.shape[1]))
        self.scores[part], chosen = torch.cat([self.scores[part], found], 1).topk(count, dim=1)
        self.positions[part] = torch.cat([self.positions[part], at + start], 1).gather(1, chosen)


def search_triangle(parts: list[slice], count: int, device: torch.device, products: Products) -> Best:
    """The best `count` others of every row, from the blocks of one triangle: each has some for rows and for columns."""
    best = Best(parts[-1].stop, count, device)
    for j, column in enumerate(parts):
        scores = products(column)
        for row in parts[: j + 1]:
            block = scores(row)
            if row == column:
                block.fill_diagonal_(-torch.inf)
            else:
                best.update(column, block.T, row.start)
            best.update(row, block, column.start)
    return best


def search_float32(space: Space, rows: Tensor, count: int, k: int) -> Candidates:
    """`count` candidates of each of the given positions, by float32 products with all rows."""
    side = max(1, min(math.isqrt(space.block_bytes // 16), space.block_bytes // (24 * space.dim)))
    if len(rows) == space.n:
        best = search_triangle(even_blocks(space.n, side), count, space.device, space.scores)
    else:
        best = Best(len(rows), count, space.device)
        for part in blocks(len(rows), side):
            own = rows[part]
            scores = space.scores(own)
            for column in blocks(space.n, side):
                block = scores(column).T
                without(own, block, column, -torch.inf)
                best.update(part, block, column.start)
    return space.candidates(-best.scores, best.positions, rows, k)


def even_blocks(n: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `range(n)`, all but the last equally long."""
    return list(blocks(n, math.ceil(n / math.ceil(n / size))))


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, count) largest entries of each row, descending float32, and their columns; equal ones in any order.

    Through the maxima of groups of columns, because topk is slow on long rows: what is among the largest is in one of
    the `count` groups with the largest maxima.
    """
    width = scores.shape[1] // _GROUP
    if width < 2 * count:
        values, columns = scores.float().topk(count, dim=1)
        return values, columns
    grouped = scores[:, : width * _GROUP]
    if scores.stride(0) == 1:  # a transposed matrix: many times faster so than along its columns
        maxima = grouped.T.unflatten(0, (_GROUP, width)).amax(0).T
    else:
        maxima = grouped.unflatten(1, (_GROUP, width)).amax(1)
    groups = _largest(maxima, count)[1]
    members = torch.arange(_GROUP, device=scores.device)[:, None] * width
    rest = torch.arange(width * _GROUP, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([(groups[:, None] + members).flatten(1), rest], 1)
    values, at = scores.gather(1, columns).float().topk(count, dim=1)
    return values, columns.gather(1, at)


class ExactBest:
    """The k nearest of each of some rows, pairs by pairs: (B, k) positions by exact distance, then by position."""

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.positions = torch.full((rows, k), 2**62, dtype=torch.int64, device=device)
        self._distances = torch.full((rows, k), torch.inf, dtype=torch.float64, device=device)

    def add(self, row: Tensor, positions: Tensor, distances: Tensor) -> None:
        """Take in pairs (C,) of row numbers and positions, with their float64 distances."""
        rows, k = self.positions.shape
        own = torch.arange(rows, device=row.device).repeat_interleave(k)
        row = torch.cat([own, row])
        positions = torch.cat([self.positions.flatten(), positions])
        distances = torch.cat([self._distances.flatten(), distances])
        order = torch.argsort(positions, stable=True)
        for key in (distances, row):
            order = order[torch.argsort(key[order], stable=True)]
        sizes = torch.bincount(row, minlength=rows)
        chosen = order[(sizes.cumsum(0) - sizes)[:, None] + torch.arange(k, device=row.device)]
        self.positions, self._distances = positions[chosen], distances[chosen]


def without(rows: Tensor, block: Tensor, part: slice, value: float) -> None:
    """Give the entries of a block (B, part) for the given positions themselves a value that makes them the last."""
    at = torch.nonzero((rows >= part.start) & (rows < part.stop)).flatten()
    block[at, rows[at] - part.start] = value


def _chunks(mask: Tensor, size: int) -> Iterator[Tensor]:
    positions = torch.nonzero(mask).flatten()
    return (positions[part] for part in blocks(len(positions), size))
