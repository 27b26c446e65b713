"""Exact nearest neighbours of features in parts, by the distance of `part_distances`, in linear memory.

How a row walks through: float32 products give lower bounds of its distances to all others (`_Space._bounds`), and the
others with the lowest bounds are scored in float64. If the k-th of them is nearer than the lowest bound of what was
left out, the list is complete. If not, bounds from float64 products, far tighter, say which others may still be nearer,
and all of those are scored. Equal distances go to the lower index.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pose2id.io.rows import Rows, blocks, row_norms, square_root, sum_last
from pose2id.neighbors.distance import full_precision
from pose2id.neighbors.parts import Shown
from pose2id.neighbors.search import distinct, plan_memory
from pose2id.neighbors.space import ExactBest

_WIDEST = 512  # columns in a block of distances; more gain nothing


def search(rows: Rows, visibility: Tensor, k: int, max_memory: int | None = None) -> Tensor:
    """Each row's k nearest others, nearest first: (n, min(k, n - 1)) int64 tensor on `rows.device`.

    A row is never its own neighbour. Rows that share no visible part are no neighbours: lists that are shorter for it
    end in -1.

    Args:
        rows: features in parts.
        visibility: (n, P) float64 weights of the parts, as `Rows.visibility` gives them.
        k: number of neighbours, at least 1.
        max_memory: bytes for lists, about n (256 + 40 P + 128 k), for working blocks, and for a float32 copy of all
            rows; where that does not fit in, rows are read again and again. None: as many bytes as lists and copy take,
            and 32 MiB.

    Raises:
        ValueError: max_memory has no room for the lists.
    """
    k = min(k, rows.n - 1)
    if k < 1:
        return torch.empty((rows.n, 0), dtype=torch.int64, device=rows.device)
    lists, copy = rows.n * (256 + 40 * rows.parts + 128 * k), 4 * rows.n * (rows.dim + 2 * rows.parts)
    block_bytes, keep_copy = plan_memory(rows, k, max_memory, lists=lists, copies=copy)
    with full_precision(rows.device):
        kept, twin = distinct(Shown(rows, visibility), k + 1, block_bytes // 4)
        found = _Space(rows, visibility, kept, block_bytes, keep_copy=keep_copy).nearest(k)
        neighbors = torch.where(found < 0, -1, kept[found])
        return neighbors if twin is None else neighbors[twin]


class _Space:
    """The rows `kept`, by position: their distances, and lower bounds of them from matrix products.

    With x, y the values of a part of two rows, centred and scaled, and v, u its visibilities, divided by the largest of
    its row,

        v u (|x|^2 + |y|^2 - 2 x.y - error) = [-2 v x, v (|x|^2 - error), v] . [u y, u, u |y|^2]

    is one product, and its square root at most sqrt(v u) |x - y|, what the part adds to the weighted sum. Centred,
    because the features of one model share a large mean that only costs precision.
    """

    def __init__(self, rows: Rows, visibility: Tensor, kept: Tensor, block_bytes: int, *, keep_copy: bool) -> None:
        self._rows, self._kept, self._block_bytes = rows, kept, block_bytes
        self.n, self._width = len(kept), rows.dim // rows.parts
        self._visibility = visibility[kept]
        most = self._visibility.amax(1, keepdim=True)
        self._shares = self._visibility / torch.where(most > 0, most, 1.0)
        self._columns = list(blocks(self.n, min(_WIDEST, block_bytes // (16 * rows.dim))))

        shown = (self._visibility > 0).double()
        chunks = list(blocks(self.n, block_bytes // (32 * rows.dim)))
        self._mean = torch.zeros((rows.parts, self._width), dtype=torch.float64, device=rows.device)
        for chunk in chunks:
            self._mean += (self._read(chunk) * (shown[chunk] / shown.sum(0).clamp(min=1))[..., None]).sum(0)
        norms = torch.zeros(rows.parts, dtype=torch.float64, device=rows.device)
        for chunk in chunks:
            centred = (self._read(chunk) - self._mean) * shown[chunk, :, None]
            norms = torch.maximum(norms, row_norms(centred.flatten(0, 1)).view(-1, rows.parts).amax(0))
        self._scale = 2.0 ** math.frexp(float(norms.max()))[1]
        self._largest = norms / self._scale
        self._right: Tensor | None = None
        if keep_copy:
            self._right = self._factors(torch.arange(self.n, device=rows.device), torch.float32, left=False)

    def nearest(self, k: int) -> Tensor:
        """(n, k) positions, -1 where there are no more neighbours."""
        count = min(2 * k + 2, self.n - 1)
        bounds, candidates = self._candidates(count)
        left_out = bounds[:, -1] if count < self.n - 1 else torch.full_like(bounds[:, -1], torch.inf)
        # In the order of their positions, which a stable sort by distance keeps among equals.
        candidates, order = candidates.sort(dim=1)
        everything = torch.arange(self.n, device=candidates.device)
        distances = self._distances(everything.repeat_interleave(count), candidates.flatten()).view(-1, count)
        distances.masked_fill_(bounds.gather(1, order).isinf(), torch.inf)
        distances, order = distances.sort(dim=1, stable=True)
        neighbors = candidates.gather(1, order)[:, :k].masked_fill_(distances[:, :k].isinf(), -1)

        unsure = torch.nonzero((distances[:, k - 1] >= left_out) & left_out.isfinite()).flatten()
        for chunk in blocks(len(unsure), self._chunk_size(torch.float64)):
            neighbors[unsure[chunk]] = self._nearest_of(unsure[chunk], k)
        return neighbors

    def _candidates(self, count: int) -> tuple[Tensor, Tensor]:
        """Each row's `count` others with the lowest bounds: (n, count) bounds, ascending, and positions."""
        bounds = torch.empty((self.n, count), dtype=torch.float64, device=self._kept.device)
        positions = torch.empty((self.n, count), dtype=torch.int64, device=self._kept.device)
        for chunk in blocks(self.n, self._chunk_size(torch.float32)):
            rows = torch.arange(chunk.start, chunk.stop, device=positions.device)
            left = self._factors(rows, torch.float32, left=True)
            bounds[chunk], positions[chunk] = self._lowest_bounds(left, rows, count)
        return bounds, positions

    def _nearest_of(self, rows: Tensor, k: int) -> Tensor:
        """(B, k) positions for rows with at least k neighbours, from bounds in float64."""
        left = self._factors(rows, torch.float64, left=True)
        nearby = self._lowest_bounds(left, rows, k)[1]
        limit = self._distances(rows.repeat_interleave(k), nearby.flatten()).view(-1, k).amax(1, keepdim=True)
        best = ExactBest(len(rows), k, rows.device)
        for column in self._columns:
            row, other = torch.nonzero(self._bounds(left, rows, column) <= limit, as_tuple=True)
            other += column.start
            best.add(row, other, self._distances(rows[row], other))
        return best.positions

    def _lowest_bounds(self, left: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` others of each of `rows` with the lowest bounds: (B, count) bounds, ascending, and positions."""
        bounds = torch.full((len(rows), count), torch.inf, dtype=torch.float64, device=rows.device)
        positions = torch.zeros((len(rows), count), dtype=torch.int64, device=rows.device)
        for column in self._columns:
            found, at = _lowest(self._bounds(left, rows, column), count)
            bounds, chosen = _lowest(torch.cat([bounds, found], 1), count)
            positions = torch.cat([positions, at + column.start], 1).gather(1, chosen)
        return bounds, positions

    def _chunk_size(self, dtype: torch.dtype) -> int:
        """How many rows are compared with all others at a time: each time reads all rows."""
        of_a_row: int = (
            torch.finfo(dtype).bits // 8 * (self._rows.dim + 2 * self._rows.parts) + 32 * self._columns[0].stop
        )
        return max(1, self._block_bytes // (2 * of_a_row))

    def _bounds(self, left: Tensor, rows: Tensor, column: slice) -> Tensor:
        """(B, C) float64 lower bounds of distances, infinite for rows that share no part and of a row to itself."""
        if self._right is None or left.dtype != self._right.dtype:
            right = self._factors(torch.arange(column.start, column.stop, device=rows.device), left.dtype, left=False)
        else:
            right = self._right[:, column]
        total = left.new_zeros((len(rows), right.shape[1]))
        for x, y in zip(left, right, strict=True):
            total += (x @ y.T).clamp_(min=0).sqrt_()
        weights = self._shares[rows].sqrt() @ self._shares[column].sqrt().T
        # What sums and means round away, and what is too small for a product's dtype.
        rounding, vanishing = torch.finfo(left.dtype).eps * (4 * len(left) + 16), torch.finfo(left.dtype).tiny * 1e8
        bounds = total.double().mul_(1 - rounding).sub_(len(left) * vanishing**0.5).clamp_(min=0).div_(weights)
        bounds.masked_fill_(weights == 0, torch.inf)
        own = torch.nonzero((rows >= column.start) & (rows < column.stop)).flatten()
        bounds[own, rows[own] - column.start] = torch.inf
        return bounds

    def _factors(self, positions: Tensor, dtype: torch.dtype, *, left: bool) -> Tensor:
        """(P, B, D + 2) one side of the products."""
        result = torch.empty((self._rows.parts, len(positions), self._width + 2), dtype=dtype, device=positions.device)
        for chunk in blocks(len(positions), self._block_bytes // (128 * self._rows.dim)):
            share = self._shares[positions[chunk], :, None]
            x = self._read(positions[chunk]).sub_(self._mean).div_(self._scale).masked_fill_(share == 0, 0)
            squares = x.square().sum(2, keepdim=True)
            if left:
                # D products and sums, 8 further roundings, a tenth more for the second order; twice, because the
                # distances that the bounds must not exceed are rounded, too.
                roundings = (1.1 * self._width + 8) * (squares.sqrt() + self._largest[:, None]) ** 2
                factors = x.mul_(-2 * share), share * (squares - torch.finfo(dtype).eps * roundings), share
            else:
                factors = x.mul_(share), share, share * squares
            target = result[:, chunk].transpose(0, 1)
            target[..., :-2], target[..., -2:-1], target[..., -1:] = factors
        return result

    def _distances(self, first: Tensor, second: Tensor) -> Tensor:
        """Float64 distances of pairs of positions, divided by the scale, so that no square overflows."""
        result = torch.empty(len(first), dtype=torch.float64, device=first.device)
        for chunk in blocks(len(first), self._block_bytes // (48 * self._rows.dim)):
            weights = square_root(self._visibility[first[chunk]] * self._visibility[second[chunk]])
            difference = self._read(first[chunk]).sub_(self._read(second[chunk])).div_(self._scale)
            lengths = torch.where(weights > 0, square_root(sum_last(difference.square_())), 0.0)
            total, weight = torch.zeros_like(lengths[:, 0]), torch.zeros_like(lengths[:, 0])
            for p in range(self._rows.parts):  # one order of sums everywhere
                total += weights[:, p] * lengths[:, p]
                weight += weights[:, p]
            result[chunk] = torch.where(weight > 0, total / weight, torch.inf)
        return result

    def _read(self, positions: slice | Tensor) -> Tensor:
        """(B, P, D) float64 rows."""
        return self._rows.by_part(self._rows.read(self._kept[positions], torch.float64))


def _lowest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    found = values.topk(min(count, values.shape[1]), dim=1, largest=False)
    return found.values, found.indices
