"""k-reciprocal re-ranking (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017).

With camera ids CA-Jaccard (Chen et al., "CA-Jaccard: Camera-aware Jaccard Distance for Person Re-identification", CVPR
2024), whose published code is dense: only the lists differ (`_camera_lists`).

How images walk through: each gets a list of its nearest images (`search`, exact); lists that name each other become a
sparse encoding of every image (`_encodings`); block by block of queries, the Jaccard distance between encodings is
mixed with the original distance (`_rerank`). Nothing has (Q + G)^2 entries, and besides a dense result nothing Q x G:
memory is linear in Q + G. All but the lists is float32; the published implementation rounds to float16.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pose2id.io.checks import (
    BLOCK_BYTES,
    MIN_BLOCK_BYTES,
    cameras_together,
    checked_count,
    checked_distances,
    checked_memory,
    checked_number,
)
from pose2id.io.rows import FeatureArray, JoinedRows, Rows, as_container, blocks, checked_pair
from pose2id.neighbors.distance import full_precision, nearest_columns, squared_euclidean
from pose2id.neighbors.groups import search_across, search_within
from pose2id.neighbors.search import distinct, search
from pose2id.neighbors.space import RowSource


class CameraLists(NamedTuple):
    """How many images camera-aware lists hold, by `k_reciprocal`'s names."""

    k1_within: int = 5
    k1_across: int = 12
    k2_within: int = 2
    k2_across: int = 2


@overload
def k_reciprocal(
    qf: FeatureArray,
    gf: FeatureArray,
    k1: int | None = None,
    k2: int | None = None,
    lambda_value: float | None = None,
    *,
    q_camids: Any = None,
    g_camids: Any = None,
    k1_within: int = 5,
    k1_across: int = 12,
    k2_within: int = 2,
    k2_across: int = 2,
    normalize: bool = True,
    topk: None = None,
    backend: str = "auto",
    max_memory: int | None = None,
) -> FeatureArray: ...


@overload
def k_reciprocal(
    qf: FeatureArray,
    gf: FeatureArray,
    k1: int | None = None,
    k2: int | None = None,
    lambda_value: float | None = None,
    *,
    q_camids: Any = None,
    g_camids: Any = None,
    k1_within: int = 5,
    k1_across: int = 12,
    k2_within: int = 2,
    k2_across: int = 2,
    normalize: bool = True,
    topk: int,
    backend: str = "auto",
    max_memory: int | None = None,
) -> tuple[FeatureArray, FeatureArray]: ...


def k_reciprocal(
    qf: FeatureArray,
    gf: FeatureArray,
    k1: int | None = None,
    k2: int | None = None,
    lambda_value: float | None = None,
    *,
    q_camids: Any = None,
    g_camids: Any = None,
    k1_within: int = 5,
    k1_across: int = 12,
    k2_within: int = 2,
    k2_across: int = 2,
    normalize: bool = True,
    topk: int | None = None,
    backend: str = "auto",
    max_memory: int | None = None,
) -> FeatureArray | tuple[FeatureArray, FeatureArray]:
    """Re-ranked distances of every query to the gallery images, all or the nearest, from features.

        d*(q, g) = lambda d(q, g) + (1 - lambda) (1 - sum_i min(V_qi, V_gi) / sum_i max(V_qi, V_gi))

    d is the squared Euclidean distance, divided for every image by its largest over query and gallery. V_i encodes
    image i by the images that it shares its neighbourhood with, its k-reciprocal neighbours and theirs: weights
    exp(-d), scaled to sum 1, then averaged over the k2 nearest images. Neighbours are taken from query and gallery
    together. An image's list begins with the image itself; among exact copies the lower index comes first, so that of
    very many copies the last are not on their own lists.

    With camera ids, CA-Jaccard (Chen et al., CVPR 2024): images of one camera resemble each other and crowd the lists,
    so each image has one list of its own camera, itself first, and one of all others. V_i encodes image i by the images
    whose list of the same kind names it in turn, and is averaged over the first k2_within and k2_across of its two
    lists. Defaults suit centralized features; the published code has k1_within=5, k1_across=20, k2_within=3,
    k2_across=3, lambda_value=0.3. Lists are as short as cameras are small; the published code fills them up with images
    of the other kind.

    Args:
        qf: (Q, D) float16, bfloat16, float32 or float64 query features, Q at least 1; numpy array (memory-mapped too)
            or torch tensor. Not modified.
        gf: (G, D) gallery features, G at least 1, on the same device. Not modified.
        k1: how many neighbours besides the image itself are on its list, at least 1; more than there are means all.
            None: 20. Not for use with camera ids.
        k2: how many images an encoding is averaged over (local query expansion), itself included; 1 leaves it out.
            None: 6. Not for use with camera ids.
        lambda_value: weight in [0, 1] of the original distance; the Jaccard distance has the rest. None: 0.3, with
            camera ids 0.5.
        q_camids: (Q,) cameras: integers, whole floats or strings, as in `evaluate`; give both or neither. -1 is a
            camera like any other.
        g_camids: (G,) cameras.
        k1_within: how many neighbours of its own camera are on an image's list besides itself, at least 1.
        k1_across: one less than how many of other cameras are on its second list, as in the published code; at least 1.
        k2_within: over how many images of its own camera an encoding is averaged, itself included, at least 1.
        k2_across: over how many images of other cameras; 0 and k2_within=1 leave averaging out.
        normalize: L2-normalise the features first; a zero row stays the zero vector.
        topk: how many of the nearest gallery images to return for each query, at least 1; more than G means all. None:
            the distances to all of them, as one matrix.
        backend: "auto", "faiss" or "torch": who searches the neighbours (`pose2id.nearest_neighbors`); the lists are
            the same. With camera ids "auto" or "torch", as faiss cannot leave out a camera.
        max_memory: bytes that the search of neighbours may take, see `pose2id.nearest_neighbors`; blocks after it take
            as much, but no more than 32 MiB. On top come the result, one float32 copy of the features (4 (Q + G) D
            bytes), lists and encodings (about 4 kB an image for k1 = 20 and k2 = 6), and faiss itself.

    Returns:
        topk=None: (Q, G) float32 distances d*, for `evaluate_rank`; in [0, 1] up to rounding.

        Otherwise (distances, indices): (Q, min(topk, G)) float32 distances, ascending, and the int64 gallery indices
        that they belong to, equal distances by the lower index. These are the first columns of a stable sort of that
        matrix, which is never made.

        All in the container and on the device of `qf`. Neighbour lists are exact (float64, ties to the lower index);
        the rest is float32, so that distances may differ by about 1e-6 between block sizes, numbers of threads and
        devices. Equal gallery rows have equal original distances.

    Raises:
        RuntimeError: backend="faiss" and faiss cannot do it; the message names the repair.
    """
    lengths = (
        (k1_within, "k1_within", 1),
        (k1_across, "k1_across", 1),
        (k2_within, "k2_within", 1),
        (k2_across, "k2_across", 0),
    )
    lists = CameraLists(*(checked_count(*length) for length in lengths))
    aware = q_camids is not None or g_camids is not None
    if aware and not (k1 is None and k2 is None):
        raise ValueError(f"k1 and k2 must be None with cameras, whose lists have {', '.join(lists._fields)}.")
    if not aware and lists != CameraLists():
        raise ValueError(f"q_camids and g_camids must be given with {', '.join(lists._fields)}. Or set k1 and k2.")
    k1, k2 = checked_count(20 if k1 is None else k1, "k1"), checked_count(6 if k2 is None else k2, "k2")
    weight = (0.5 if aware else 0.3) if lambda_value is None else checked_number(lambda_value, "lambda_value", 0, 1)
    count = None if topk is None else checked_count(topk, "topk")
    block_bytes = min(checked_memory(max_memory), BLOCK_BYTES)
    queries, gallery = Rows(qf, "qf", normalize=normalize), Rows(gf, "gf", normalize=normalize)
    checked_pair(queries, gallery, "qf", "gf")
    cameras = cameras_together({"q_camids": (q_camids, queries.n), "g_camids": (g_camids, gallery.n)})

    rows = JoinedRows(queries, gallery)
    if cameras is None:
        ranking = search(rows, max(k1 + 1, k2), backend, max_memory, own=True).cpu().numpy()
        members, averaged = _expanded_reciprocal(ranking, k1), ranking[:, :k2]
    else:
        members, averaged = _camera_lists(rows, torch.from_numpy(np.concatenate(cameras)), lists, backend, max_memory)
    images = _FeatureDistances(queries, gallery, block_bytes)
    distances, indices = _rerank(images, members, averaged, weight, block_bytes, count)
    found = as_container(distances, qf)
    return found if count is None else (found, as_container(indices, qf))  # type: ignore[return-value]


def re_ranking(
    q_g_dist: Any, q_q_dist: Any, g_g_dist: Any, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> NDArray[np.float32] | Tensor:
    """Re-ranked distances from given ones, with the official implementation's signature and convention.

    The convention: distances come in *unsquared* (Euclidean) and are squared here, then divided column by column by the
    column's largest over query and gallery. Pass part-based or any other distances as they are. From features,
    `k_reciprocal` needs no matrices.

    Args:
        q_g_dist: (Q, G) finite distances of queries to gallery images, numpy array or torch tensor of any real dtype.
        q_q_dist: (Q, Q) finite distances among queries.
        g_g_dist: (G, G) finite distances among gallery images.
        k1: as in `k_reciprocal`.
        k2: as in `k_reciprocal`.
        lambda_value: as in `k_reciprocal`.

    Returns:
        (Q, G) float32 distances in the container and on the device of `q_g_dist`.
    """
    k1, k2 = checked_count(k1, "k1"), checked_count(k2, "k2")
    lambda_value = checked_number(lambda_value, "lambda_value", 0, 1)
    images = _GivenDistances(q_g_dist, q_q_dist, g_g_dist)
    ranking = images.ranking(max(k1 + 1, k2))
    members, averaged = _expanded_reciprocal(ranking, k1), ranking[:, :k2]
    return as_container(_rerank(images, members, averaged, lambda_value, BLOCK_BYTES)[0], q_g_dist)


class _FeatureDistances:
    """Squared distances among n images, queries first, row by row divided by the row's largest: from features.

    From one float32 copy of both sets: re-ranking needs distances, which a search does not keep. The copy is scaled and
    moved, because the mean that features of one model share would cost precision. The first row becomes the origin,
    exactly, so that rows which are all alike stay so. No row is further from it than twice any row's largest distance,
    so rounding stays small beside that.
    """

    def __init__(self, queries: Rows, gallery: Rows, block_bytes: int) -> None:
        rows = JoinedRows(queries, gallery)
        self.n, self.num_queries, self.device = rows.n, queries.n, rows.device
        parts = list(rows.blocks(block_bytes))
        origin = rows.read(slice(0, 1), torch.float64)
        extent = max(float((rows.read(part, torch.float64) - origin).abs().max()) for part in parts) * rows.dim**0.5
        scale = 2.0 ** math.frexp(extent)[1]
        self._copy = torch.empty((rows.n, rows.dim), dtype=torch.float32, device=rows.device)
        self._squares = torch.empty(rows.n, dtype=torch.float32, device=rows.device)
        for part in parts:
            self._copy[part] = (rows.read(part, torch.float64) - origin) / scale
            self._squares[part] = self._copy[part].square().sum(1)
        self._largest = self._row_maxima(block_bytes)
        kept, twin = distinct(gallery, 1, block_bytes)
        self._first_equal = None if twin is None else kept[twin]

    def pairs(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float32]:
        """(P,) single entries."""
        a, b = (torch.from_numpy(index).long().to(self.device) for index in (first, second))
        squared = torch.empty(len(a), dtype=torch.float32, device=self.device)
        # Small blocks stay in a CPU's cache and are three times as fast there; a GPU would take longer to start them.
        block_bytes = MIN_BLOCK_BYTES if self.device.type == "cpu" else BLOCK_BYTES
        for part in blocks(len(a), block_bytes // (8 * self._copy.shape[1])):
            difference = self._copy.index_select(0, a[part]).sub_(self._copy.index_select(0, b[part]))
            squared[part] = difference.square_().sum(1)
        return squared.div_(self._largest[a]).cpu().numpy()

    def to_gallery(self, queries: slice) -> Tensor:
        """(B, G) float32 entries of a block of queries, as a fresh tensor."""
        squared = self._squared(queries, slice(self.num_queries, self.n))
        if self._first_equal is not None:
            # A product may round equal columns differently.
            squared = squared[:, self._first_equal]
        return squared.div_(self._largest[queries, None])

    def _row_maxima(self, block_bytes: int) -> Tensor:
        largest = torch.zeros(self.n, dtype=torch.float32, device=self.device)
        sides = list(blocks(self.n, math.isqrt(block_bytes // 16)))
        for position, part in enumerate(sides):
            for other in sides[position:]:
                squared = self._squared(part, other)
                largest[part] = torch.maximum(largest[part], squared.amax(1))
                largest[other] = torch.maximum(largest[other], squared.amax(0))
        return torch.where(largest > 0, largest, 1.0)  # all images alike

    def _squared(self, part: slice, other: slice) -> Tensor:
        with full_precision(self.device):
            return squared_euclidean(self._copy[part], self._copy[other], self._squares[part], self._squares[other])


class _GivenDistances:
    """The same from the official implementation's matrices. Row i here is column i there: it divides by columns."""

    def __init__(self, q_g_dist: Any, q_q_dist: Any, g_g_dist: Any) -> None:
        self._q_g = _finite(q_g_dist, "q_g_dist")
        self._q_q = _finite(q_q_dist, "q_q_dist")
        self._g_g = _finite(g_g_dist, "g_g_dist")
        self.num_queries, num_gallery = self._q_g.shape
        for name, matrix, size in (("q_q_dist", self._q_q, self.num_queries), ("g_g_dist", self._g_g, num_gallery)):
            if matrix.shape != (size, size):
                raise ValueError(f"{name} must have shape ({size}, {size}) to fit q_g_dist, got {matrix.shape}.")
        self.n = self.num_queries + num_gallery
        self.device = torch.device("cpu")
        of_queries = np.maximum(_extent(self._q_q, 0), _extent(self._q_g, 1))
        of_gallery = np.maximum(_extent(self._q_g, 0), _extent(self._g_g, 0))
        extent = np.concatenate([of_queries, of_gallery]).astype(np.float64)
        # A power of two, so that no square overflows or vanishes; only ratios count.
        self._scale = 2.0 ** min(math.frexp(extent.max())[1], 1023)
        largest = self._squared(extent)
        self._largest: NDArray[np.float32] = np.where(largest > 0, largest, np.float32(1))

    def ranking(self, length: int) -> NDArray[np.int64]:
        """(n, length at most) indices of each image's nearest, ascending, equal ones by the lower index."""
        length = min(length, self.n)
        ranking = np.empty((self.n, length), dtype=np.int64)
        size = BLOCK_BYTES // (16 * self.n)
        for part in blocks(self.num_queries, size):
            ranking[part] = nearest_columns(self._relative([self._q_q[:, part].T, self._q_g[part]], part), length)
        for part in blocks(self.n - self.num_queries, size):
            index = slice(part.start + self.num_queries, part.stop + self.num_queries)
            ranking[index] = nearest_columns(
                self._relative([self._q_g[:, part].T, self._g_g[:, part].T], index), length
            )
        return ranking

    def pairs(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float32]:
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
        return self._squared(result) / self._largest[first]

    def to_gallery(self, queries: slice) -> Tensor:
        return self._relative([self._q_g[queries]], queries)

    def _relative(self, columns: list[NDArray[Any]], rows: slice) -> Tensor:
        squared = self._squared(np.concatenate(columns, 1).astype(np.float64))
        return torch.from_numpy(squared / self._largest[rows, None])

    def _squared(self, distances: NDArray[np.float64]) -> NDArray[np.float32]:
        return np.square(distances / self._scale).astype(np.float32)


class _LocalDistances:
    """The same among one query, the first, and some images near to it; the largest are those over all images."""

    def __init__(self, squares: Tensor, largest: Tensor) -> None:
        self.n, self.num_queries, self.device = len(squares), 1, squares.device
        self._relative = squares / torch.where(largest > 0, largest, 1.0)[:, None]

    def pairs(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float32]:
        a, b = (torch.from_numpy(index).long().to(self.device) for index in (first, second))
        return self._relative[a, b].cpu().numpy()

    def to_gallery(self, queries: slice) -> Tensor:
        return self._relative[queries, 1:].clone()


def k_reciprocal_nearby(
    squares: Tensor,
    largest: Tensor,
    *,
    k1: int = 20,
    k2: int = 6,
    cameras: Tensor | None = None,
    lambda_value: float = 0.3,
) -> Tensor:
    """Re-ranked distances (m - 1,) of one query to images nearby: `k_reciprocal` where their lists lie among them.

    Args:
        squares: (m, m) float32 squared distances of the query, the first, and of images nearby in their order.
        largest: (m,) of each, over all images.
        k1: as in `k_reciprocal`.
        k2: as in `k_reciprocal`.
        cameras: (m,) int64, for lists of the own and of other cameras instead, as long as `CameraLists` says.
        lambda_value: as in `k_reciprocal`.
    """
    if cameras is None:
        everyone = torch.ones_like(squares, dtype=torch.bool)
        ranking = _nearest_of(squares, everyone, max(k1 + 1, k2))
        members, averaged = _expanded_reciprocal(ranking, k1), ranking[:, :k2]
    else:
        lists, same = CameraLists(), cameras[:, None] == cameras
        own = torch.eye(len(squares), dtype=torch.bool, device=squares.device)
        within = _nearest_of(squares, same & ~own, max(lists.k1_within, lists.k2_within - 1))
        across = _nearest_of(squares, ~same, max(lists.k1_across + 1, lists.k2_across))
        members, averaged = _united(within, across, lists)
    images = _LocalDistances(squares, largest)
    return _rerank(images, members, averaged, lambda_value, BLOCK_BYTES)[0][0]


def _nearest_of(squares: Tensor, counts: Tensor, k: int) -> NDArray[np.int64]:
    """The k nearest of those that count, -1 where there are fewer."""
    values, found = squares.masked_fill(~counts, torch.inf).sort(dim=1, stable=True)
    return found.masked_fill_(values.isinf(), -1)[:, :k].cpu().numpy()


def _extent(matrix: NDArray[Any], axis: int) -> NDArray[Any]:
    """The largest absolute values along an axis, without a copy of the matrix."""
    return np.maximum(matrix.max(axis), -matrix.min(axis))


def _finite(distances: Any, name: str) -> NDArray[Any]:
    matrix = checked_distances(distances, name)
    if matrix.dtype.kind != "f" or matrix.dtype.itemsize > 8:
        with np.errstate(over="ignore"):  # infinity is refused
            matrix = matrix.astype(np.float64)
    for row in range(len(matrix)):
        if not np.isfinite(matrix[row]).all():
            raise ValueError(f"{name} must be finite; row {row} holds NaN or infinity.")
    if matrix.min() < -1e-3 * abs(matrix.max()):
        raise ValueError(f"{name} must hold distances, got values down to {matrix.min():g}. Are they similarities?")
    return matrix


def _rerank(
    images: _FeatureDistances | _GivenDistances | _LocalDistances,
    members: Any,
    averaged: NDArray[np.int64],
    lambda_value: float,
    block_bytes: int,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(Q, G) re-ranked distances, or the `count` least of each query; and then their columns.

    Args:
        images: their distances.
        members: (n, n) sparse; row i has ones at the images that encode image i.
        averaged: (n, m) indices of images, -1 for none, over which encodings are averaged.
        lambda_value: weight of the original distance.
        block_bytes: what a block of queries may take.
        count: how many distances of each query are wanted; None: all.
    """
    gallery_size = images.n - images.num_queries
    shape = images.num_queries, gallery_size if count is None else min(count, gallery_size)
    distances = torch.empty(shape, dtype=torch.float32, device=images.device)
    indices = torch.empty(shape if count else (0,), dtype=torch.int64, device=images.device)
    queries, gallery = _encodings(images, members, averaged)
    for part in blocks(images.num_queries, block_bytes // (16 * gallery_size)):
        jaccard = torch.from_numpy(_jaccard(queries[part], gallery)).to(images.device)
        block = images.to_gallery(part).mul_(lambda_value).add_(jaccard, alpha=1 - lambda_value)
        if count is not None:
            indices[part] = nearest_columns(block, shape[1])
            block = block.gather(1, indices[part])
        distances[part] = block
    return distances, indices


def _encodings(
    images: _FeatureDistances | _GivenDistances | _LocalDistances, members: Any, averaged: NDArray[np.int64]
) -> tuple[Any, Any]:
    """Sparse float32 encodings, (Q, n) of queries by row and (G, n) of gallery images by column; rows sum to 1 or 0."""
    row = np.repeat(np.arange(images.n), np.diff(members.indptr))
    weight = np.exp(-images.pairs(row, members.indices))
    weight /= np.bincount(row, weights=weight, minlength=images.n)[row]
    members.data = weight
    if averaged.shape[1] > 1:
        lists = _lists(averaged)
        members = lists @ members
        members.data /= np.repeat(np.diff(lists.indptr).astype(np.float32), np.diff(members.indptr))
    return members[: images.num_queries], members[images.num_queries :].tocsc()


def _lists(neighbors: NDArray[np.int64]) -> Any:
    """Neighbour lists as a sparse 0/1 matrix: row i has ones at its list's columns; -1 is none."""
    from scipy import sparse  # noqa: PLC0415 - slow to import

    n = len(neighbors)
    kind = np.int32 if neighbors.size < 2**31 else np.int64
    listed = neighbors >= 0
    indices = neighbors[listed].astype(kind)
    start = np.concatenate([[0], listed.sum(1).cumsum()]).astype(kind)
    return sparse.csr_array((np.ones(len(indices), dtype=np.float32), indices, start), shape=(n, n))


def _reciprocal(neighbors: NDArray[np.int64]) -> Any:
    """The part of neighbour lists that name each other, as `_lists`."""
    lists = _lists(neighbors)
    return lists.multiply(lists.T).tocsr()


def _camera_lists(
    rows: RowSource, cameras: Tensor, lists: CameraLists, backend: str, max_memory: int | None
) -> tuple[Any, NDArray[np.int64]]:
    """What encodes an image, and what encodings are averaged over, as `_rerank` takes them."""
    length = min(max(lists.k1_within, lists.k2_within - 1), rows.n)
    within = search_within(rows, cameras, length, backend, max_memory).cpu().numpy()
    length = min(max(lists.k1_across + 1, lists.k2_across), rows.n)
    return _united(within, search_across(rows, cameras, length, backend, max_memory).cpu().numpy(), lists)


def _united(within: NDArray[np.int64], across: NDArray[np.int64], lists: CameraLists) -> tuple[Any, NDArray[np.int64]]:
    """The same from the nearest others of the own and of other cameras."""
    within = np.concatenate([np.arange(len(within))[:, None], within], 1)  # an image is the first on its own list
    # No image is on both lists.
    members = _reciprocal(within[:, : lists.k1_within + 1]) + _reciprocal(across[:, : lists.k1_across + 1])
    return members, np.concatenate([within[:, : lists.k2_within], across[:, : lists.k2_across]], 1)


def _expanded_reciprocal(ranking: NDArray[np.int64], k1: int) -> Any:
    """R*(i, k1): reciprocal neighbours, with those of each member whose own half-length set lies mostly inside."""
    from scipy import sparse  # noqa: PLC0415 - slow to import

    # Python and numpy both round halves to even.
    reciprocal, half = _reciprocal(ranking[:, : k1 + 1]), _reciprocal(ranking[:, : round(k1 / 2) + 1])
    overlap = (reciprocal @ half.T).multiply(reciprocal).tocoo()
    inside = 3 * overlap.data > 2 * half.sum(1)[overlap.col]
    joined = sparse.csr_array(
        (np.ones(inside.sum(), dtype=np.float32), (overlap.row[inside], overlap.col[inside])), shape=reciprocal.shape
    )
    return (reciprocal + joined @ half).tocsr()


def _jaccard(queries: Any, gallery: Any) -> NDArray[np.float32]:
    """(B, G) 1 - sum of minima / sum of maxima of B sparse rows and G, these by column; all rows sum to 1."""
    result = np.empty((queries.shape[0], gallery.shape[0]), dtype=np.float32)
    for query in range(queries.shape[0]):
        low, high = queries.indptr[query : query + 2]
        columns = queries.indices[low:high]
        start, stop = gallery.indptr[columns], gallery.indptr[columns + 1]
        length = stop - start
        at = np.repeat(stop - length.cumsum(), length) + np.arange(length.sum())
        minima = np.minimum(gallery.data[at], np.repeat(queries.data[low:high], length))
        shared = np.bincount(gallery.indices[at], weights=minima, minlength=gallery.shape[0])
        result[query] = 1 - shared / (2 - shared)
    return result
