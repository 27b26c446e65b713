"""k-reciprocal re-ranking (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017).

Distances are read a block of rows at a time and everything behind them is sparse: besides the (Q, G) result, memory
grows with (Q + G) k1, never with (Q + G)^2. All in float32; the published implementation rounds weights to float16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from pose2id._inputs import (
    BLOCK_BYTES,
    FeatureArray,
    Rows,
    as_container,
    blocks,
    checked_count,
    checked_distances,
    checked_number,
    checked_pair,
)
from pose2id.distance import full_precision
from pose2id.neighbors import tying_distances


def k_reciprocal(
    qf: FeatureArray,
    gf: FeatureArray,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    normalize: bool = True,
) -> FeatureArray:
    """Re-ranked distances of every query to every gallery image, from features.

    The original distance is the squared Euclidean one, divided for every image by its largest over query and gallery.

    Args:
        qf: (Q, D) query features, floating numpy array or torch tensor.
        gf: (G, D) gallery features, on the same device.
        k1: length of the neighbour lists.
        k2: length of the lists over which the encodings are averaged (local query expansion).
        lambda_value: weight in [0, 1] of the original distance; the Jaccard distance has the rest.
        normalize: L2-normalise the features first.

    Returns:
        (Q, G) float32 distances in the container and on the device of `qf`, for `evaluate_rank`.

    Raises:
        TypeError, ValueError: bad input, named.
    """
    q_rows, g_rows = Rows(qf, "qf", normalize=normalize), Rows(gf, "gf", normalize=normalize)
    checked_pair(q_rows, g_rows, "qf", "gf")
    if not normalize:
        Rows.share_scale(q_rows, g_rows)
    result = _rerank(_FeatureDistances(q_rows, g_rows), q_rows.n, k1, k2, lambda_value)
    return as_container(torch.from_numpy(result), qf)  # type: ignore[return-value]


def re_ranking(
    q_g_dist: Any, q_q_dist: Any, g_g_dist: Any, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> NDArray[np.float32] | Tensor:
    """Re-ranked distances from given ones, with the official implementation's signature and convention.

    The convention: distances come in *unsquared* (Euclidean) and are squared here, then divided column by column by the
    column's largest over query and gallery. Pass part-based or any other distances as they are.

    Args:
        q_g_dist: (Q, G) distances of queries to gallery images, numpy array or torch tensor of any real dtype.
        q_q_dist: (Q, Q) distances among queries.
        g_g_dist: (G, G) distances among gallery images.
        k1: as in `k_reciprocal`.
        k2: as in `k_reciprocal`.
        lambda_value: as in `k_reciprocal`.

    Returns:
        (Q, G) float32 distances in the container and on the device of `q_g_dist`.

    Raises:
        TypeError, ValueError: bad input, named.
    """
    distances = _GivenDistances(q_g_dist, q_q_dist, g_g_dist)
    result = _rerank(distances, distances.num_queries, k1, k2, lambda_value)
    return as_container(torch.from_numpy(result), q_g_dist)


class _Distances(Protocol):
    """Squared distances among n images, queries first."""

    n: int

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of consecutive rows: their indices and a fresh (B, n) float32 tensor."""

    def pairs(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float32]:
        """Single entries of the same matrix."""


class _FeatureDistances:
    def __init__(self, q_rows: Rows, g_rows: Rows) -> None:
        self._q_rows, self._g_rows = q_rows, g_rows
        self.n = q_rows.n + g_rows.n

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        to_queries, to_gallery = tying_distances(self._q_rows), tying_distances(self._g_rows)
        size = max(64, BLOCK_BYTES // (16 * self.n))
        for rows, offset in ((self._q_rows, 0), (self._g_rows, self._q_rows.n)):
            for part in blocks(rows.n, size):
                with full_precision(rows.device):
                    x = rows.read(part, torch.float32)
                    block = torch.cat([to_queries(x), to_gallery(x)], 1)
                yield slice(part.start + offset, part.stop + offset), block

    def pairs(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float32]:
        result = np.empty(len(first), dtype=np.float32)
        for part in blocks(len(first), BLOCK_BYTES // (16 * self._q_rows.dim)):
            difference = self._read(first[part]) - self._read(second[part])
            result[part] = difference.square().sum(1).cpu().numpy()
        return result

    def _read(self, index: NDArray[np.int64]) -> Tensor:
        at = torch.from_numpy(index).to(self._q_rows.device)
        out = torch.empty((len(at), self._q_rows.dim), dtype=torch.float32, device=at.device)
        is_query = at < self._q_rows.n
        out[is_query] = self._q_rows.read(at[is_query], torch.float32)
        out[~is_query] = self._g_rows.read(at[~is_query] - self._q_rows.n, torch.float32)
        return out


class _GivenDistances:
    def __init__(self, q_g_dist: Any, q_q_dist: Any, g_g_dist: Any) -> None:
        self._q_g = _finite(q_g_dist, "q_g_dist")
        self._q_q = _finite(q_q_dist, "q_q_dist")
        self._g_g = _finite(g_g_dist, "g_g_dist")
        self.num_queries, num_gallery = self._q_g.shape
        if 0 in self._q_g.shape:
            raise ValueError(f"q_g_dist must hold at least one query and one gallery image, got {self._q_g.shape}.")
        for name, matrix, size in (("q_q_dist", self._q_q, self.num_queries), ("g_g_dist", self._g_g, num_gallery)):
            if matrix.shape != (size, size):
                raise ValueError(f"{name} must have shape ({size}, {size}) to fit q_g_dist, got {matrix.shape}.")
        self.n = self.num_queries + num_gallery
        # A power of two, so that no square overflows or vanishes; only ratios count.
        largest = max(float(max(matrix.max(), -matrix.min())) for matrix in (self._q_g, self._q_q, self._g_g))
        self._scale = 2.0 ** math.frexp(largest)[1]

    # Row i here is column i of the whole matrix: the official code divides by columns and then transposes.
    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        for part in blocks(self.num_queries, max(1, BLOCK_BYTES // (16 * self.n))):
            yield part, self._squared(self._q_q[:, part].T, self._q_g[part])
        for part in blocks(self.n - self.num_queries, max(1, BLOCK_BYTES // (16 * self.n))):
            index = slice(part.start + self.num_queries, part.stop + self.num_queries)
            yield index, self._squared(self._q_g[:, part].T, self._g_g[:, part].T)

    def pairs(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float32]:
        q = self.num_queries
        result = np.empty(len(first))
        for a_query in (True, False):
            for b_query in (True, False):
                at = np.flatnonzero(((first < q) == a_query) & ((second < q) == b_query))
                a, b = first[at] - q * (not a_query), second[at] - q * (not b_query)
                if a_query:
                    result[at] = self._q_q[b, a] if b_query else self._q_g[a, b]
                else:
                    result[at] = self._q_g[b, a] if b_query else self._g_g[b, a]
        return np.square(result / self._scale).astype(np.float32)

    def _squared(self, left: NDArray[Any], right: NDArray[Any]) -> Tensor:
        rows = np.concatenate([left, right], 1).astype(np.float64) / self._scale
        return torch.from_numpy(np.square(rows).astype(np.float32))


def _finite(distances: Any, name: str) -> NDArray[Any]:
    matrix = checked_distances(distances, name)
    for row in range(len(matrix)):
        if not np.isfinite(matrix[row]).all():
            raise ValueError(f"{name} must be finite; row {row} holds NaN or infinity.")
    return matrix


def _rerank(distances: _Distances, num_queries: int, k1: int, k2: int, lambda_value: float) -> NDArray[np.float32]:
    k1, k2 = checked_count(k1, "k1"), checked_count(k2, "k2")
    lambda_value = checked_number(lambda_value, "lambda_value", 0, 1)
    n = distances.n
    length = min(n, max(k1 + 1, k2))
    ranking = np.empty((n, length), dtype=np.int64)
    largest = np.empty(n, dtype=np.float32)
    result = np.empty((num_queries, n - num_queries), dtype=np.float32)
    for index, squared in distances.rows():
        peak = squared.amax(1)
        peak = torch.where(peak > 0, peak, 1.0)  # all images alike
        squared.div_(peak[:, None])
        ranking[index] = _nearest(squared, length).cpu().numpy()
        largest[index] = peak.cpu().numpy()
        queries = slice(index.start, min(index.stop, num_queries))
        if queries.start < queries.stop:
            result[queries] = squared[: queries.stop - queries.start, num_queries:].cpu().numpy()

    reciprocal = _expanded_reciprocal(ranking, k1)
    row, column = reciprocal.nonzero()
    row, column = row.astype(np.int64), column.astype(np.int64)
    weight = np.exp(-distances.pairs(row, column) / largest[row])
    weight /= np.bincount(row, weights=weight, minlength=n)[row]
    encoding = sparse.csr_array((weight.astype(np.float32), (row, column)), shape=(n, n))
    if k2 > 1:
        encoding = (_lists(ranking[:, :k2]).astype(np.float32) @ encoding) / np.float32(min(k2, n))

    result *= np.float32(lambda_value)
    for query, jaccard in enumerate(_jaccard(encoding[:num_queries], encoding[num_queries:])):
        result[query] += (1 - lambda_value) * jaccard
    return result


def _nearest(distances: Tensor, count: int) -> Tensor:
    """(B, count) columns of the smallest entries of each row, equal ones by the lower column."""
    values, columns = distances.topk(count, dim=1, largest=False)
    columns, order = columns.sort(dim=1)
    columns = columns.gather(1, values.gather(1, order).argsort(dim=1, stable=True))
    # topk chooses freely among what equals its last value.
    torn = torch.nonzero((distances <= values[:, -1:]).sum(1) > count).flatten()
    for row in torn.tolist():
        columns[row] = distances[row].argsort(stable=True)[:count]
    return columns


def _lists(ranking: NDArray[np.int64]) -> Any:
    """Neighbour lists as a sparse 0/1 matrix: row i has ones at its list's columns."""
    n, length = ranking.shape
    indices, start = ranking.ravel(), np.arange(0, n * length + 1, length)
    return sparse.csr_array((np.ones(n * length, dtype=np.float32), indices, start), shape=(n, n))


def _expanded_reciprocal(ranking: NDArray[np.int64], k1: int) -> Any:
    """R*(i, k1): reciprocal neighbours, with those of each member whose own half-length set lies mostly inside."""
    nearest = _lists(ranking[:, : k1 + 1])
    half = _lists(ranking[:, : round(k1 / 2) + 1])  # Python and numpy both round halves to even
    reciprocal, half = nearest.multiply(nearest.T).tocsr(), half.multiply(half.T).tocsr()
    overlap = (reciprocal @ half.T).multiply(reciprocal).tocoo()
    inside = overlap.data > 2 / 3 * half.sum(1)[overlap.col]
    joined = sparse.csr_array(
        (np.ones(inside.sum(), dtype=np.float32), (overlap.row[inside], overlap.col[inside])), shape=reciprocal.shape
    )
    return (reciprocal + joined @ half).tocsr()


def _jaccard(queries: Any, gallery: Any) -> Iterator[NDArray[np.float64]]:
    """For each query, (G,) 1 - sum of minima / sum of maxima of rows that sum to 1, through the gallery's columns."""
    by_column = gallery.tocsc()
    for query in range(queries.shape[0]):
        low, high = queries.indptr[query : query + 2]
        columns = queries.indices[low:high]
        start, stop = by_column.indptr[columns], by_column.indptr[columns + 1]
        length = stop - start
        at = np.repeat(stop - length.cumsum(), length) + np.arange(length.sum())
        minima = np.minimum(by_column.data[at], np.repeat(queries.data[low:high], length))
        shared = np.bincount(by_column.indices[at], weights=minima, minlength=gallery.shape[0])
        yield 1 - shared / (2 - shared)
