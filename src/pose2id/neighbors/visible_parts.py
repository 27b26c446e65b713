"""Features in parts: distances over the parts that both images show, as BPBReID and KPR compare them, and neighbours.

With v the visibility of a part, 0 or 1 or anything between, the distance of q and g is the weighted mean over parts p

    d(q, g) = sum_p w_p |q_p - g_p| / sum_p w_p,   w_p = sqrt(v_qp v_gp)

of Euclidean distances: for booleans the plain mean over jointly visible parts. Images that share none are infinitely
far. Neighbours by it are exact, in linear memory: found and proved as those of whole features are (`certificate`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pose2id.io.checks import BLOCK_BYTES, checked_memory
from pose2id.io.rows import FeatureArray, Rows, as_container, blocks, checked_pair, square_root, sum_last
from pose2id.neighbors.certificate import certified
from pose2id.neighbors.distance import full_precision, squared_euclidean
from pose2id.neighbors.engines import Blocks, Scores
from pose2id.neighbors.search import Memory, distinct, plan_memory
from pose2id.neighbors.space import Centred

_LEAST_QUERIES = 64  # unless memory is short: every block of them reads the whole gallery
_WIDEST = 512  # columns in a block of bounds on a CPU: it stays in the cache


def part_distances(
    qf: FeatureArray,
    gf: FeatureArray,
    q_visibility: Any = None,
    g_visibility: Any = None,
    *,
    normalize: bool = True,
    max_memory: int | None = None,
) -> FeatureArray:
    """Distances of queries to gallery images in parts: the mean Euclidean distance over the parts that both show.

        d(q, g) = sum_p w_p |q_p - g_p| / sum_p w_p,   w_p = sqrt(v_qp v_gp)

    The distance of BPBReID and KPR: for boolean visibility the plain mean over jointly visible parts. For `re_ranking`,
    with the distances among queries and among gallery images; `evaluate` ranks by them without making this matrix.

    Args:
        qf: (Q, P, D) float16, bfloat16, float32 or float64 features of P parts each, Q at least 1; numpy array
            (memory-mapped too) or torch tensor. Whole features (Q, D) count as one part. Not modified.
        gf: (G, P, D) gallery features, G at least 1, on the same device.
        q_visibility: (Q, P) of the queries' parts, booleans or numbers in [0, 1], where 0 is hidden; smaller than
            1e-100 counts as 0. Booleans count as 0 and 1. None: every part is fully visible.
        g_visibility: (G, P), likewise; of another dtype if need be.
        normalize: L2-normalise each part first; a zero part stays the zero vector.
        max_memory: as in `evaluate`; on top comes the result.

    Returns:
        (Q, G) float32 distances, float64 where a set is float64, computed in float64, in the container and on the
        device of `qf`. All are finite: pairs that share no visible part get the largest distance of a single jointly
        visible part plus 1 (1 if there is none), as in BPBReID for booleans. Gallery images with equal visibility whose
        visible parts are equal are equally far.
    """
    block_bytes, least = query_memory(max_memory)
    q_rows, g_rows = (Rows(x, name, normalize=normalize, parts=True) for x, name in ((qf, "qf"), (gf, "gf")))
    checked_pair(q_rows, g_rows, "qf", "gf")
    q_shown, g_shown = q_rows.visibility(q_visibility, "q_visibility"), g_rows.visibility(g_visibility, "g_visibility")
    scale = 1.0 if normalize else Rows.share_scale(q_rows, g_rows)
    dtype = torch.promote_types(q_rows.dtype, g_rows.dtype)
    result = torch.empty((q_rows.n, g_rows.n), dtype=dtype, device=q_rows.device)
    largest = 0.0
    found = mean_distances(q_rows, g_rows, q_shown, g_shown, block_bytes, least)
    for block, distances, of_one_part in found:
        result[block] = distances * scale
        largest = max(largest, of_one_part * scale)
    if largest + 1 > torch.finfo(dtype).max:
        raise ValueError(f"qf and gf must be small enough for distances in {dtype}, got {largest:g}. Divide both.")
    result.masked_fill_(result.isinf(), largest + 1)
    return as_container(result, qf)  # type: ignore[return-value]


def query_memory(max_memory: int | None) -> tuple[int, int]:
    """Bytes for one block, and how many queries at least to compare with the whole gallery at a time."""
    given = checked_memory(max_memory)
    # Of what is given a part: several blocks are alive at a time.
    return (BLOCK_BYTES, _LEAST_QUERIES) if max_memory is None else (given // 3, 1)


def query_blocks(q_rows: Rows, g_rows: Rows, block_bytes: int, least: int) -> Iterator[slice]:
    """Slices of queries which, and whose float64 distances to the whole gallery, take half of `block_bytes`."""
    return blocks(q_rows.n, max(least, block_bytes // (16 * max(g_rows.n, 2 * q_rows.dim))))


def mean_distances(
    q_rows: Rows, g_rows: Rows, q_shown: Tensor, g_shown: Tensor, block_bytes: int, least: int
) -> Iterator[tuple[slice, Tensor, float]]:
    """Blocks of queries: (B, G) float64 distances, infinite for pairs that share no part, and the largest of one part.

    Gallery rows that nothing tells apart are compared once: a product may round equal columns differently.
    """
    kept, twin = distinct(Shown(g_rows, g_shown), 1, block_bytes // 4)
    columns = list(blocks(len(kept), block_bytes // (64 * g_rows.dim)))
    for block in query_blocks(q_rows, g_rows, block_bytes, least):
        with full_precision(q_rows.device):
            x = q_rows.by_part(q_rows.read(block, torch.float64))
            distances, largest = x.new_empty((len(x), len(kept))), x.new_zeros(())
            for column in columns:
                y = g_rows.by_part(g_rows.read(kept[column], torch.float64))
                total, weights = x.new_zeros((2, len(x), len(y)))
                for distance, weight in _by_shared_part(x, y, q_shown[block], g_shown[kept[column]]):
                    largest = torch.maximum(largest, distance.max())
                    total += distance.mul_(weight)
                    weights += weight
                distances[:, column] = torch.where(weights > 0, total / weights, torch.inf)
        yield block, (distances if twin is None else distances[:, twin]), float(largest)


def _by_shared_part(x: Tensor, y: Tensor, x_shown: Tensor, y_shown: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each part of x (B, P, D) and y (C, P, D): (B, C) Euclidean distances, 0 where not shared, and weights."""
    for p in range(x.shape[1]):
        x_p, y_p = x[:, p], y[:, p]
        squares = squared_euclidean(x_p, y_p, x_p.square().sum(1), y_p.square().sum(1))
        weight = torch.outer(x_shown[:, p], y_shown[:, p]).sqrt_()
        yield squares.clamp_(min=0).sqrt_().mul_(weight > 0), weight


class Shown:
    """Rows in which hidden parts are zero, followed by their visibility: equal where no distance tells two rows apart.

    Attributes:
        n, dim, device: as those of `Rows`; one more column for each part.
    """

    def __init__(self, rows: Rows, visibility: Tensor) -> None:
        self._rows, self._visibility = rows, visibility
        self.n, self.dim, self.device = rows.n, rows.dim + rows.parts, rows.device

    def read(self, index: slice | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `Rows.read`."""
        rows, visibility = self._rows.read(index, dtype), self._visibility[index]
        self._rows.by_part(rows).mul_((visibility > 0)[..., None])
        return torch.cat([rows, visibility.to(rows.dtype)], 1)

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
        """As `Rows.blocks`."""
        return blocks(self.n, block_bytes // (32 * self.dim))


def search(rows: Rows, visibility: Tensor, k: int, max_memory: int | Memory | None = None) -> Tensor:
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
    lists, copies = rows.n * (256 + 40 * rows.parts + 128 * k), 4 * rows.n * (rows.dim + 2 * rows.parts)
    memory = plan_memory(rows, k, max_memory, lists=lists, copies=copies)
    with full_precision(rows.device):
        kept, twin = distinct(Shown(rows, visibility), k + 1, memory.block_bytes // 4)
        space = PartSpace(rows, visibility, kept, memory.block_bytes)
        engine = partial(PartProducts, keep_copy=memory.copies)
        found = certified(space, k, [engine], PartProducts(space, torch.float64))
        neighbors = torch.where(found < 0, -1, kept[found])
        return neighbors if twin is None else neighbors[twin]


class PartSpace(Centred):
    """Rows in parts, by position, with their exact distances.

    Attributes:
        shares: (n, P) float64 visibility, divided by the largest of its row.
    """

    def __init__(self, rows: Rows, visibility: Tensor, kept: Tensor, block_bytes: int) -> None:
        super().__init__(rows, kept, block_bytes, visibility=visibility)
        self._visibility = visibility[kept]
        most = self._visibility.amax(1, keepdim=True)
        self.shares = self._visibility / torch.where(most > 0, most, 1.0)

    def exact(self, first: Tensor, second: Tensor) -> Tensor:
        """Float64 distances of pairs of positions, infinite where they share no part."""
        result = torch.empty(len(first), dtype=torch.float64, device=first.device)
        for part, difference in self.differences(first, second):
            weights = square_root(self._visibility[first[part]] * self._visibility[second[part]])
            lengths = torch.where(weights > 0, square_root(sum_last(difference.square_())), 0.0)
            total, weight = torch.zeros_like(lengths[:, 0]), torch.zeros_like(lengths[:, 0])
            for p in range(lengths.shape[1]):  # one order of sums everywhere
                total += weights[:, p] * lengths[:, p]
                weight += weights[:, p]
            result[part] = torch.where(weight > 0, total / weight, torch.inf)
        return result


class PartProducts(Blocks):
    """Lower bounds of distances of parts, from products in float32, or in float64; scores are negative bounds.

    With x, y the values of a part of two rows, and v, u its visibilities, divided by the largest of its row,

        v u (|x|^2 + |y|^2 - 2 x.y - error) = [-2 v x, v (|x|^2 - error), v] . [u y, u, u |y|^2]

    is one product, and its square root at most sqrt(v u) |x - y|, what the part adds to the weighted sum.
    """

    def __init__(self, space: PartSpace, dtype: torch.dtype = torch.float32, *, keep_copy: bool = False) -> None:
        self._parts, self._width = space.shares.shape[1], space.dim // space.shares.shape[1]
        widest = _WIDEST if space.device.type == "cpu" else 8 * _WIDEST
        row_bytes = 16 * (space.dim + 2 * self._parts)
        super().__init__(space, min(widest, math.isqrt(space.block_bytes // 48), space.block_bytes // row_bytes))
        self._space, self._dtype = space, dtype
        self._right = self._factors(slice(0, space.n), left=False) if keep_copy else None

    def scores(self, rows: slice | Tensor) -> Scores:
        """Negative lower bounds, -infinity for rows that share no part."""
        left, roots = self._factors(rows, left=True), self._space.shares[rows].sqrt().T
        # What sums and means round away, and what is too small for a product's dtype.
        rounding = torch.finfo(self._dtype).eps * (4 * self._parts + 16)
        vanishing = self._parts * (torch.finfo(self._dtype).tiny * 1e8) ** 0.5

        def score(part: slice | Tensor) -> Tensor:
            right = self._factors(part, left=False) if self._right is None else self._right[:, part]
            total = left.new_zeros((right.shape[1], left.shape[1]))
            for y, x in zip(right, left, strict=True):
                total += (y @ x.T).clamp_(min=0).sqrt_()
            weights = self._space.shares[part].sqrt() @ roots
            bounds = total.double().mul_(1 - rounding).sub_(vanishing).clamp_(min=0).div_(weights)
            return bounds.masked_fill_(weights == 0, torch.inf).neg_().to(self._dtype)

        return score

    def least(self, scores: Tensor, rows: Tensor) -> Tensor:
        """As `Engine.least`."""
        return -scores.double()

    def most(self, scores: Tensor, rows: Tensor) -> Tensor:
        """As `Engine.most`: nothing is known."""
        return torch.full_like(scores, torch.inf, dtype=torch.float64)

    def _factors(self, rows: slice | Tensor, *, left: bool) -> Tensor:
        """(P, B, D / P + 2) one side of the products."""
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self._space.device)
        result = torch.empty((self._parts, len(rows), self._width + 2), dtype=self._dtype, device=rows.device)
        for chunk in blocks(len(rows), self._space.block_bytes // (128 * self._space.dim)):
            share, x = self._space.shares[rows[chunk], :, None], self._space.centred64(rows[chunk])
            squares = x.square().sum(2, keepdim=True)
            if left:
                # D products and sums, 8 further roundings, a tenth more for the second order; twice, because the
                # distances that the bounds must not exceed are rounded, too.
                roundings = (1.1 * self._width + 8) * (squares.sqrt() + self._space.largest[:, None]) ** 2
                factors = x.mul_(-2 * share), share * (squares - torch.finfo(self._dtype).eps * roundings), share
            else:
                factors = x.mul_(share), share, share * squares
            target = result[:, chunk].transpose(0, 1)
            target[..., :-2], target[..., -2:-1], target[..., -1:] = factors
        return result
