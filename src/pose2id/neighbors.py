"""Exact nearest neighbours of every row among the other rows of its own set, in memory linear in the number of rows.

How a row walks through: it is centred, scaled and rounded to float32 (`_Space`); a backend, faiss or torch, returns
more candidates than needed with float32 distances (`_search`); a rounding bound proves most rows right, the others are
scored again in float64 (`_Space.settle`). The order is that of float64 distances between the caller's own values, equal
ones by the lower index. So the result does not depend on the backend, the block size or the number of threads.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pose2id._inputs import (
    BLOCK_BYTES,
    FeatureArray,
    Rows,
    as_container,
    blocks,
    checked_choice,
    checked_count,
    checked_memory,
)
from pose2id.distance import full_precision, squared_distances, squared_euclidean

logger = logging.getLogger(__name__)
_logged: list[str] = []

BACKENDS = ("auto", "faiss", "torch")
_FLOAT32_ROUNDING = 2.0**-24
_FLOAT64_ROUNDING = 2.0**-53
_FAISS_REPAIR = (
    "Both faiss wheels install the module `faiss` and overwrite each other; repair it with "
    "`pip uninstall -y faiss-cpu faiss-gpu` and then `pip install --force-reinstall faiss-gpu` (Linux x86-64) "
    "or `pip install --force-reinstall faiss-cpu` (elsewhere)"
)


def nearest_neighbors(
    features: FeatureArray,
    k: int,
    *,
    normalize: bool = False,
    backend: str = "auto",
    max_memory: int | None = None,
) -> FeatureArray:
    """Indices of the k nearest other rows of every row, nearest first, by Euclidean distance.

    Exact: ordered by the float64 distance between the given values; equal distances go to the lower index. A row is
    never its own neighbour; its exact copies are.

    Args:
        features: (N, D) float16, bfloat16, float32 or float64; numpy array (memory-mapped too) or torch tensor.
        k: number of neighbours, at least 1.
        normalize: compare L2-normalised rows; a zero row stays the zero vector, at distance 1 from every other.
        backend: "faiss" or "torch" forces one; "auto" takes faiss for CPU features on Linux, and for CUDA features
            where faiss has GPU code and sees the GPU; torch otherwise.
        max_memory: bytes that working blocks may take, at least 1 MiB; default 32 MiB. On top of it come the float32
            copy that is searched (4 N D bytes), the candidate lists (about 60 N (k + 2) bytes), and faiss itself.

    Returns:
        (N, min(k, N - 1)) int64 indices in the container and on the device of `features`.

    Raises:
        TypeError, ValueError: bad input, named.
        RuntimeError: backend="faiss" and faiss cannot do it; the message names the repair.
    """
    rows = Rows(features, "features", normalize=normalize)
    return as_container(search(rows, checked_count(k, "k"), backend, max_memory), features)  # type: ignore[return-value]


def search(rows: Rows, k: int, backend: str = "auto", max_memory: int | None = None) -> Tensor:
    """`nearest_neighbors` on checked rows: (n, min(k, n - 1)) int64 tensor on `rows.device`."""
    checked_choice(backend, "backend", BACKENDS)
    block_bytes = checked_memory(max_memory)
    k = min(k, rows.n - 1)
    if k < 1:
        return torch.empty((rows.n, 0), dtype=torch.int64, device=rows.device)
    with full_precision(rows.device):
        kept, twin = distinct(rows, k + 1, block_bytes)
        space = _Space(rows, kept, block_bytes)
        # Twice k and two more: a group of exact copies that straddles the k-th place still fits in.
        values, candidates = _search(space, min(2 * k + 2, space.n - 1), backend)
        neighbors = kept[space.settle(values, candidates, k)]
        return neighbors if twin is None else neighbors[twin]


def mutual(neighbors: Tensor, k1: int, k2: int) -> Tensor:
    """Which of the k1 nearest of each row have it among their own k2 nearest: (n, k1 at most) bool.

    A join of edges: i -> j counts if j -> i is among the edges to k2 neighbours.
    """
    n = len(neighbors)
    own = torch.arange(n, device=neighbors.device)[:, None]
    proposed, looks = neighbors[:, :k1], neighbors[:, :k2]
    edges = (own * n + looks).flatten().sort().values
    wanted = proposed * n + own
    at = torch.searchsorted(edges, wanted).clamp(max=len(edges) - 1)
    return edges[at] == wanted


def distinct(rows: Rows, copies: int, block_bytes: int) -> tuple[Tensor, Tensor | None]:
    """The first `copies` of equal rows, by index, and for every row its place among them (None: nothing was dropped).

    Of many exact copies only the k + 1 with the lowest indices can be among anybody's k nearest, and every later copy
    has the neighbours of the (k + 1)-th, its place here: the search never sees thousands of equal rows, which no
    candidate list could hold.
    """
    everything = torch.arange(rows.n, device=rows.device)
    keys = torch.empty(rows.n, dtype=torch.int64, device=rows.device)
    weights = torch.randint(2**62, (rows.dim,), generator=torch.Generator().manual_seed(0)).to(rows.device) * 2 + 1
    for block in rows.blocks(block_bytes):
        # Adding zero makes -0.0 and 0.0 one. Integer sums wrap around and do not depend on their order.
        bits = (rows.read(block, torch.float64) + 0.0).view(torch.int64)
        keys[block] = ((bits ^ (bits >> 32)) * weights).sum(1)
    order = torch.argsort(keys, stable=True)
    same_key = torch.nonzero(keys[order[1:]] == keys[order[:-1]]).flatten() + 1
    new_group = torch.ones(rows.n, dtype=torch.bool, device=rows.device)
    for part in blocks(len(same_key), block_bytes // (32 * rows.dim)):
        at = same_key[part]
        # Equal keys are likely, not certain, to be equal rows.
        new_group[at] = (rows.read(order[at], torch.float64) != rows.read(order[at - 1], torch.float64)).any(1)
    first = torch.cummax(torch.where(new_group, everything, 0), 0).values
    rank = everything - first
    if int(rank.max()) < copies:
        return everything, None
    kept = torch.sort(order[rank < copies]).values
    position = torch.empty_like(everything)
    position[kept] = torch.arange(len(kept), device=rows.device)
    twin = torch.empty_like(everything)
    twin[order] = position[order[first + rank.clamp(max=copies - 1)]]
    return kept, twin


def tying_distances(rows: Rows) -> Callable[[Tensor], Tensor]:
    """A function from x (B, D) to its (B, n) squared distances to all rows, in which equal rows are equally far.

    A product may round equal columns differently. NFC makes many of them, so equal rows are multiplied once.
    """
    block_bytes = BLOCK_BYTES // 4  # finding equal rows should not set the peak
    kept, twin = distinct(rows, 1, block_bytes)
    parts = list(blocks(len(kept), BLOCK_BYTES // (32 * rows.dim)))
    if twin is None:
        return lambda x: squared_distances(x, parts, lambda part: rows.read(part, x.dtype))
    return lambda x: squared_distances(x, parts, lambda part: rows.read(kept[part], x.dtype))[:, twin]


class _Space:
    """The rows `kept`, by position, in two precisions: float32 for the search, float64 to settle what it leaves open.

    Attributes:
        n: number of rows.
        side: rows and columns of one block of distances.
        copy: (n, D) float32 rows, centred and scaled. Centred, because the features of one model share a large mean
            that only costs precision; scaled by a power of two to norms of at most 1, so that no square overflows.
        squares: (n,) float32 squared norms of `copy`.
        bound: (n,) float64, by how much a squared distance of `copy` to any row may differ from the true one: the
            rounding of D products and of the rows to float32. Subtracting the same mean from all rows changes no
            distance by more than the rounding of the result.
    """

    def __init__(self, rows: Rows, kept: Tensor, block_bytes: int) -> None:
        self._rows, self._kept, self._block_bytes = rows, kept, block_bytes
        self.n = len(kept)
        self.side = max(64, int((block_bytes / 16) ** 0.5))
        self._parts = list(blocks(self.n, block_bytes // (32 * rows.dim)))
        self._mean = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
        for part in self._parts:
            self._mean += (self._read(part) / self.n).sum(0)
        largest = max(float((self._read(part) - self._mean).abs().max()) for part in self._parts) * rows.dim**0.5
        self._scale = 2.0 ** math.frexp(largest)[1]
        self.copy = torch.empty((self.n, rows.dim), dtype=torch.float32, device=rows.device)
        self.squares = torch.empty(self.n, dtype=torch.float32, device=rows.device)
        for part in self._parts:
            self.copy[part] = self._centred(part)
            self.squares[part] = self.copy[part].square().sum(1)
        norms = self.squares.double().sqrt()
        # D products and sums, 8 further roundings; a tenth more for the second order.
        self._roundings = (1.1 * rows.dim + 8) * (norms + norms.max()) ** 2
        self.bound = _FLOAT32_ROUNDING * self._roundings

    def distances(self, part: slice | Tensor, other: slice) -> Tensor:
        """Float32 squared distances between two sets of positions, wrong by at most `bound`."""
        return squared_euclidean(self.copy[part], self.copy[other], self.squares[part], self.squares[other])

    def holds(self, values: Tensor, candidates: Tensor) -> bool:
        """Whether a sample of a backend's float32 distances keeps to the bound, whatever arithmetic it used."""
        width = candidates.shape[1]
        sample = torch.arange(0, self.n, max(1, self.n // 64), device=candidates.device)
        exact = self._exact(sample.repeat_interleave(width), candidates[sample].flatten()).view(-1, width)
        return bool(((values[sample] - exact).abs() <= self.bound[sample, None]).all())

    def settle(self, values: Tensor, candidates: Tensor, k: int) -> Tensor:
        """(n, k) positions in exact order, from (n, m) candidates in the order of their float32 values.

        The k-th true distance is at most the k-th value plus the bound, and nothing that the search left out is nearer
        than the last value minus the bound: where these don't meet, the list is complete. Where the values in it are
        more than two bounds apart, their order is the true one. Rows whose list may be incomplete, because too many
        others are about as near, are multiplied again in float64.
        """
        values = values.double()
        complete = values[:, -1] > values[:, k - 1] + 2 * self.bound
        if candidates.shape[1] == self.n - 1:
            complete = torch.ones_like(complete)
        gaps = values.diff(dim=1)[:, :k]
        ordered = (gaps > 2 * self.bound[:, None]).all(1)
        result = candidates[:, :k].clone()

        width = candidates.shape[1]
        for rows in _chunks(complete & ~ordered, self._block_bytes // (32 * self._rows.dim * width)):
            result[rows] = self._best(rows.repeat_interleave(width), candidates[rows].flatten(), k)
        # Every chunk reads all rows once: not too few at a time.
        for rows in _chunks(~complete, max(128, self._block_bytes // (32 * self.n))):
            near = squared_distances(self._centred(rows), self._parts, self._centred)
            near[torch.arange(len(rows), device=near.device), rows] = torch.inf
            # Twice: these distances are rounded, and so are the exact ones of which they must miss none.
            bound = 2 * _FLOAT64_ROUNDING * self._roundings[rows]
            limit = near.kthvalue(k, dim=1).values + 2 * bound
            row, other = torch.nonzero(near <= limit[:, None], as_tuple=True)
            result[rows] = self._best(rows[row], other, k)
        return result

    def _best(self, first: Tensor, second: Tensor, k: int) -> Tensor:
        """For pairs grouped by `first`, each group's k best of `second`: by exact distance, then by position."""
        distance = self._exact(first, second)
        group, sizes = torch.unique_consecutive(first, return_inverse=True, return_counts=True)[1:]
        order = torch.argsort(second, stable=True)
        for key in (distance, group):
            order = order[torch.argsort(key[order], stable=True)]
        start = sizes.cumsum(0) - sizes
        return second[order[start[:, None] + torch.arange(k, device=first.device)]]

    def _exact(self, first: Tensor, second: Tensor) -> Tensor:
        """Float64 squared distances of pairs of positions, scaled as `copy` is, so that no square overflows."""
        result = torch.empty(len(first), dtype=torch.float64, device=first.device)
        for part in blocks(len(first), self._block_bytes // (32 * self._rows.dim)):
            # A single long row would be summed in pieces, one a thread; two rows are not.
            pairs = slice(part.start, part.stop) if part.stop - part.start > 1 else [part.start] * 2
            difference = (self._read(first[pairs]) - self._read(second[pairs])) / self._scale
            result[part] = difference.square().sum(1)[: part.stop - part.start]
        return result

    def _centred(self, positions: slice | Tensor) -> Tensor:
        return (self._read(positions) - self._mean) / self._scale

    def _read(self, positions: slice | Tensor) -> Tensor:
        return self._rows.read(self._kept[positions], torch.float64)


def _chunks(mask: Tensor, size: int) -> Iterator[Tensor]:
    positions = torch.nonzero(mask).flatten()
    return (positions[part] for part in blocks(len(positions), size))


def _search(space: _Space, count: int, backend: str) -> tuple[Tensor, Tensor]:
    """Each row's `count` nearest others by float32 distance: (n, count) values, ascending, and positions."""
    on_gpu = space.copy.device.type == "cuda"
    # On macOS and Windows faiss and torch bring an OpenMP runtime each, and the process may abort: only when forced.
    if backend == "faiss" or (backend == "auto" and (on_gpu or sys.platform == "linux")):
        faiss, problem = _faiss(on_gpu)
        if faiss is not None:
            try:
                found = _search_faiss(faiss, space.copy, count)
                if space.holds(*found):
                    return found
                problem = "its distances are further off than float32 arithmetic can be"
            except Exception as error:  # a broken binary raises whatever it likes
                problem = repr(error)
        if backend == "faiss":
            raise RuntimeError(f"backend='faiss' cannot be used: {problem}. {_FAISS_REPAIR}.")
        _log_once(problem)
    return _search_torch(space, count)


def _log_once(problem: str) -> None:
    if not _logged:
        _logged.append(problem)
        logger.warning("neighbours are searched with torch, faiss cannot be used: %s. %s.", problem, _FAISS_REPAIR)


def _faiss(gpu: bool) -> tuple[Any, str]:
    """The module if it has what is needed, else None and why: a half-overwritten faiss imports without parts."""
    try:
        import faiss  # noqa: PLC0415 - slow to import and optional at run time
    except Exception as error:  # a broken binary raises whatever it likes
        return None, f"importing it failed with {error!r}"
    wanted = ("knn_gpu", "StandardGpuResources", "get_num_gpus") if gpu else ("knn",)
    missing = [name for name in wanted if not hasattr(faiss, name)]
    if missing:
        return None, f"the installed module has no {', '.join(missing)}"
    if gpu and faiss.get_num_gpus() == 0:
        return None, "it sees no GPU"
    return faiss, ""


def _search_faiss(faiss: ModuleType, copy: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows = copy.cpu().numpy()
    if copy.device.type == "cuda":
        found = faiss.knn_gpu(faiss.StandardGpuResources(), rows, rows, count + 1, device=copy.device.index or 0)
    else:
        found = faiss.knn(rows, rows, count + 1)
    values, positions = (torch.from_numpy(array).to(copy.device) for array in found)
    is_self = positions == torch.arange(len(copy), device=copy.device)[:, None]
    # Equal rows can push a row off its own list: then the last candidate is one too many.
    is_self[:, -1] |= ~is_self.any(1)
    return values[~is_self].view(-1, count), positions[~is_self].view(-1, count)


def _search_torch(space: _Space, count: int) -> tuple[Tensor, Tensor]:
    device = space.copy.device
    values = torch.full((space.n, count), torch.inf, dtype=torch.float32, device=device)
    positions = torch.zeros((space.n, count), dtype=torch.int64, device=device)
    for part in blocks(space.n, space.side):
        for column in blocks(space.n, space.side):
            block = space.distances(part, column)
            if part == column:
                block.fill_diagonal_(torch.inf)
            found, at = block.topk(min(count, block.shape[1]), dim=1, largest=False)
            values[part], chosen = torch.cat([values[part], found], 1).topk(count, dim=1, largest=False)
            positions[part] = torch.cat([positions[part], at + column.start], 1).gather(1, chosen)
    return values, positions
