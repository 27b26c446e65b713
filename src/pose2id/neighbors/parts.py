"""Distances between features in parts: the mean over the parts that both images show, as BPBReID and KPR compare them.

With v the visibility of a part, 0 or 1 or anything between, the distance of q and g is the weighted mean over parts p

    d(q, g) = sum_p w_p |q_p - g_p| / sum_p w_p,   w_p = sqrt(v_qp v_gp)

of Euclidean distances: for booleans the plain mean over jointly visible parts. Images that share none are infinitely
far.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pose2id.io.checks import BLOCK_BYTES, checked_memory
from pose2id.io.rows import FeatureArray, Rows, as_container, blocks, checked_pair
from pose2id.neighbors.distance import full_precision, squared_euclidean
from pose2id.neighbors.search import distinct

_LEAST_QUERIES = 64  # unless memory is short: every block of them reads the whole gallery


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

    Raises:
        TypeError, ValueError: bad input, named; or distances beyond the range of float32.
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
        raise ValueError(
            f"qf and gf must be small enough for distances in {dtype}, got a distance of {largest:g}. Divide both by "
            "one number, or pass float64 features."
        )
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
