"""Exact nearest neighbours, in memory linear in the number of rows, and support for custom searches.

Steps: a row is centred, scaled and rounded to float32 (`space.Space`); an engine finds more candidates
than needed (`engines`); they are scored, and lists proved right (`certificate`). The order is that of float64 distances
between the caller's own values, equal ones by the lower index. So the result does not depend on the engine, the block
size or the number of threads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pose2id.io.checks import BLOCK_BYTES, MIN_BLOCK_BYTES, checked_choice, checked_count, checked_memory
from pose2id.io.rows import ChosenRows, FeatureArray, JoinedRows, Rows, as_container, blocks, checked_pair
from pose2id.neighbors.certificate import certified
from pose2id.neighbors.distance import full_precision, squared_euclidean
from pose2id.neighbors.engines import EngineMaker, Faiss, Half, Products, half_dtype, own_entry
from pose2id.neighbors.space import RowSource, Space, Uncentred

BACKENDS = ("auto", "faiss", "torch")
# Where "auto" takes torch on CPUs that multiply bfloat16 fast, as measured with benchmarks/neighbors.py: elsewhere the
# products are too small a part of the work, or too many lists stay open.
_TORCH_MIN_ROWS, _TORCH_MIN_COLUMNS, _TORCH_MAX_K = 3000, 256, 32
# What lists take of memory for every row: keys of equal rows, norms and bounds; and for every neighbour asked for.
_ROW_BYTES, _NEIGHBOR_BYTES = 256, 64


class NeighborSearch(Protocol):
    """A search of your own, exact or not; with faiss: `lambda q, rows, k: faiss.knn(q, rows, k)[::-1]`."""

    def __call__(self, queries: Any, rows: Any, k: int) -> tuple[Any, Any]:
        """The nearest rows of each query.

        Args:
            queries: (Q, D) float32 or float64, a numpy array or torch tensor. It may be `rows` itself.
            rows: (N, D), of the same container and dtype.
            k: number of neighbours.

        Returns:
            (Q, k) integer indices of rows, nearest first, -1 where there are fewer, the query itself included where it
            is one of the rows; and (Q, k) Euclidean distances. In the container of `queries`, or any array of numbers.
        """


def checked_search(neighbors: Any, backend: Any) -> Any:
    """A search of a caller's own, which no backend goes with, or None."""
    if neighbors is not None and not callable(neighbors):
        given = f"got {neighbors!r}. An engine of the library is chosen by backend="
        raise TypeError(f"neighbors must be a function (queries, rows, k) -> (indices, distances), {given}.")
    if neighbors is not None and backend != "auto":
        raise ValueError(f"backend must be 'auto' with neighbors=, which searches in its place, got {backend!r}.")
    return neighbors


class Memory(NamedTuple):
    """Bytes for one block of temporaries, and whether there is room for copies of all rows."""

    block_bytes: int
    copies: bool


def nearest_neighbors(
    features: FeatureArray,
    k: int,
    *,
    normalize: bool = False,
    backend: str | Sequence[EngineMaker] = "auto",
    max_memory: int | None = None,
) -> FeatureArray:
    """Indices of the k nearest other rows of every row, nearest first, by Euclidean distance.

    Exact: ordered by the float64 distance between the given values; equal distances go to the lower index. A row is
    never its own neighbour; its exact copies are.

    Args:
        features: (N, D) float16, bfloat16, float32 or float64; numpy array (memory-mapped too) or torch tensor.
        k: number of neighbours, at least 1.
        normalize: compare L2-normalised rows; a zero row stays the zero vector, at distance 1 from every other.
        backend: "faiss" or "torch" forces one; "auto" takes torch on CUDA, on macOS and Windows, and on CPUs
            that multiply bfloat16 fast for at least 3,000 rows of at least 256 columns and k up to 32; faiss elsewhere.
            Or engines of your own, see `pose2id.neighbors.engines.Engine`, in the order in which they are asked.
        max_memory: bytes that the search may take, at least 1 MiB and half of that above what lists of neighbours
            need, N (256 + 64 k). Where it has no room for copies of all rows (6 N D bytes), rows are read again and
            again, so that memory-mapped features may be larger than memory. faiss's own memory is not in it. None:
            copies, lists, and 32 MiB for blocks.

    Returns:
        (N, min(k, N - 1)) int64 indices in the container and on the device of `features`.

    Raises:
        RuntimeError: backend="faiss" and faiss cannot do it; the message names the repair.
    """
    rows = Rows(features, "features", normalize=normalize)
    return as_container(search(rows, checked_count(k, "k"), backend, max_memory), features)  # type: ignore[return-value]


def exact_neighbors(
    queries: FeatureArray,
    rows: FeatureArray,
    k: int,
    *,
    backend: str | Sequence[EngineMaker] = "auto",
    max_memory: int | None = None,
) -> tuple[FeatureArray, FeatureArray]:
    """The k nearest rows of each query, a `NeighborSearch`: exact, ordered as by `nearest_neighbors`.

    Args:
        queries: (Q, D) floating numpy array or torch tensor, Q at least 1; `rows` itself is searched twice as fast.
        rows: (N, D), N at least 1, on the same device.
        k: number of neighbours, at least 1. A query that is one of the rows is its own neighbour, at distance 0.
        backend: as in `nearest_neighbors`.
        max_memory: as in `nearest_neighbors`, N + Q rows.

    Returns:
        (Q, k) int64 indices, -1 where there are fewer rows, and Euclidean distances, infinite there, in float32 or, for
        float64 input, float64; both in the container and on the device of `queries`.
    """
    k, alike = checked_count(k, "k"), queries is rows
    searched = Rows(rows, "rows")
    asking = searched if alike else Rows(queries, "queries")
    checked_pair(asking, searched, "queries", "rows")
    count, dtype = min(k, searched.n), torch.promote_types(asking.dtype, searched.dtype)
    indices = torch.full((asking.n, k), -1, dtype=torch.int64, device=searched.device)
    distances = torch.full((asking.n, k), torch.inf, dtype=dtype, device=searched.device)
    indices[:, :count], found = _search(searched, None if alike else asking, count, backend, max_memory, own=True)
    distances[:, :count] = found()
    return as_container(indices, queries), as_container(distances, queries)  # type: ignore[return-value]


def neighbors_of_rows(rows: Rows, k: int, neighbors: NeighborSearch) -> Tensor:
    """Each row's k nearest others, as a caller's search finds them: (n, min(k, n - 1)) int64 on `rows.device`.

    The search is asked once for all rows, as one array in the caller's container, normalised if `rows` are. Each row is
    dropped from its own list; where copies pushed it off, the last entry is one too many. Missing entries are -1.
    """
    k = min(k, rows.n - 1)
    if k < 1:
        return torch.empty((rows.n, 0), dtype=torch.int64, device=rows.device)
    array = as_container(rows.read(slice(None)), rows.empty(0))
    found = neighbors(array, array, k + 1)
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(f"neighbors must return (indices, distances), got {type(found).__name__}.")
    indices, distances = (x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.array(x)) for x in found)
    for name, values in (("indices", indices), ("distances", distances)):
        if tuple(values.shape) != (rows.n, k + 1):
            given = f"got {tuple(values.shape)}"
            raise ValueError(f"neighbors must return {name} of shape {(rows.n, k + 1)}, a list per query, {given}.")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"neighbors must return integer indices first, got {indices.dtype}. Are distances first?")
    if (distances[:, 1:] < distances[:, :-1]).any():
        raise ValueError("neighbors must return the nearest first, got distances that fall. Are they similarities?")
    indices = indices.to(rows.device, torch.int64)
    if int(indices.min()) < -1 or int(indices.max()) >= rows.n:
        raise ValueError(f"neighbors must return indices in [-1, {rows.n}), got {indices.min()} to {indices.max()}.")
    in_order = indices.sort(1).values
    if ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any():
        raise ValueError("neighbors must list each row at most once for a query.")
    own = torch.arange(rows.n, device=rows.device)
    return indices[~own_entry(indices, own)].view(rows.n, k)


def search(
    rows: RowSource,
    k: int,
    backend: str | Sequence[EngineMaker] = "auto",
    max_memory: int | Memory | None = None,
    *,
    own: bool = False,
) -> Tensor:
    """`nearest_neighbors` on checked rows: (n, min(k, n - 1)) int64 tensor on `rows.device`.

    With `own` a row counts among its neighbours, in its place by distance and index: (n, min(k, n)).
    """
    return _search(rows, None, min(k, rows.n - (not own)), backend, max_memory, own=own)[0]


def search_members(
    rows: Rows, members: Tensor, asking: Tensor, k: int, backend: str, max_memory: int | None
) -> tuple[Tensor, Tensor]:
    """The k nearest members of rows, among which a row may be itself: (B, k) int64 indices and float64 distances.

    Args:
        rows: checked rows.
        members: ascending indices of the rows that may be neighbours.
        asking: (B,) ascending indices of the rows that ask, B at least 1.
        k: number of neighbours, from 1 to the number of members.
        backend: as in `nearest_neighbors`.
        max_memory: likewise.
    """
    n = min(len(members) + len(asking), rows.n)
    lists, copies = n * (_ROW_BYTES + _NEIGHBOR_BYTES * k), (6 + rows.dtype.itemsize) * n * (rows.dim + 6)
    memory = plan_memory(rows, k, max_memory, lists=lists, copies=copies)
    _check_room(memory, backend, max_memory)
    with full_precision(rows.device):
        kept = members[distinct(ChosenRows(rows, members), k, memory.block_bytes)[0]]
        position = torch.full((rows.n,), -1, dtype=torch.int64, device=rows.device)
        position[kept] = torch.arange(len(kept), device=rows.device)
        others = asking[position[asking] < 0]
        position[others] = torch.arange(len(kept), len(kept) + len(others), device=rows.device)
        space = Uncentred(rows, torch.cat([kept, others]), *memory, queries=len(others))
        if len(asking) > len(others):
            space.asking, space.alike = position[asking], len(others) == 0 and len(asking) == len(kept)
        near, exact = (
            torch.empty((len(asking), k), dtype=torch.float64, device=rows.device),
            Products(space, torch.float64),
        )
        found = certified(space, k, default_engines(space, k, backend), exact, forced=backend == "faiss", near=near)
    return kept[found], near * space.scale


def _search(
    rows: Any, queries: Rows | None, k: int, backend: Any, max_memory: int | Memory | None, *, own: bool
) -> tuple[Tensor, Callable[[], Tensor]]:
    """The k nearest rows of each query, of each row itself without queries, and what computes their distances."""
    if isinstance(backend, str) or not (isinstance(backend, (list, tuple)) and all(map(callable, backend))):
        checked_choice(backend, "backend", BACKENDS)
    everything = rows if queries is None else JoinedRows(rows, queries)
    lists, copies = everything.n * (_ROW_BYTES + _NEIGHBOR_BYTES * k), 6 * everything.n * (rows.dim + 6)
    memory = plan_memory(everything, k, max_memory, lists=lists, copies=copies)
    _check_room(memory, backend, max_memory)
    if k < 1:
        empty = torch.empty((rows.n, 0), dtype=torch.int64, device=rows.device)
        return empty, empty.double
    with full_precision(rows.device):
        kept, twin = distinct(rows, k + (not own), memory.block_bytes)
        asking = torch.arange(rows.n, everything.n, device=rows.device)
        chosen = torch.cat([kept, asking])
        space = Space(everything, chosen, *memory, queries=len(asking), own=own)
        engines = default_engines(space, k, backend) if isinstance(backend, str) else backend
        found = certified(space, k, engines, Products(space, torch.float64), forced=backend == "faiss")
    place = slice(None) if twin is None or queries is not None else twin

    def distances() -> Tensor:
        exact = space.exact(space.asking.repeat_interleave(k), found.flatten()).view(-1, k)
        return (space.distance(exact) * space.scale)[place]

    return kept[found][place], distances


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


def distinct(rows: RowSource, copies: int, block_bytes: int) -> tuple[Tensor, Tensor | None]:
    """The first `copies` of equal rows, by index, and for every row its place among them (None: nothing was dropped).

    Of many exact copies only the k + 1 with the lowest indices can be among anybody's k nearest, and every later copy
    has the neighbours of the (k + 1)-th, its place here: the search never sees thousands of equal rows, which no
    candidate list could hold.
    """
    everything = torch.arange(rows.n, device=rows.device)
    keys = torch.empty(rows.n, dtype=torch.int64, device=rows.device)
    drawn = torch.Generator().manual_seed(0)
    weights = torch.randint(2**62, (rows.dim,), generator=drawn, device="cpu").to(rows.device) * 2 + 1
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


def tying_distances(rows: RowSource, block_bytes: int = BLOCK_BYTES) -> Callable[[Tensor], Tensor]:
    """A function from x (B, D) to its (B, n) squared distances to all rows, in which equal rows are equally far.

    A product may round equal columns differently. NFC makes many of them, so equal rows are multiplied once.
    """
    kept, twin = distinct(rows, 1, block_bytes // 4)  # finding equal rows should not set the peak
    parts = list(blocks(len(kept), block_bytes // (32 * rows.dim)))

    def distances(x: Tensor) -> Tensor:
        squares, result = x.square().sum(1), x.new_empty((len(x), len(kept)))
        with full_precision(x.device):
            for part in parts:
                y = rows.read(part if twin is None else kept[part], x.dtype)
                result[:, part] = squared_euclidean(x, y, squares, y.square().sum(1))
        return result if twin is None else result[:, twin]

    return distances


def plan_memory(rows: RowSource, k: int, max_memory: int | Memory | None, *, lists: int, copies: int) -> Memory:
    """What to do with `max_memory` bytes, of which lists of neighbours need some, and copies of all rows others."""
    if isinstance(max_memory, Memory):
        return max_memory
    if max_memory is None:
        # A GPU wants large blocks: it takes longer to start small ones than to compute them.
        return Memory((16 if rows.device.type == "cuda" else 1) * BLOCK_BYTES, copies=True)
    room, least = checked_memory(max_memory) - lists, MIN_BLOCK_BYTES // 2
    if room < least:
        wanted = f"{lists + least} bytes for lists of {k} neighbours of {rows.n} rows"
        raise ValueError(f"max_memory must be at least {wanted}, got {max_memory}.")
    # A part, because several blocks may be alive, and the allocator keeps some.
    if room - copies >= least:
        return Memory(min((room - copies) // 4, BLOCK_BYTES), copies=True)
    return Memory(min(room // 4, 8 * BLOCK_BYTES), copies=False)


def _check_room(memory: Memory, backend: Any, max_memory: int | Memory | None) -> None:
    if backend == "faiss" and not memory.copies:
        raise ValueError(f"max_memory={max_memory} has no room for the copy that backend='faiss' needs. Take 'torch'.")


def default_engines(space: Space, k: int, backend: str = "auto") -> Sequence[EngineMaker]:
    """The engines that are asked, in order."""
    torch_engines = (Half, Products)
    if backend == "faiss":
        return (Faiss,)
    # On macOS and Windows faiss and torch bring an OpenMP runtime each, and the process may abort. faiss needs a copy
    # of all rows, on a GPU through host memory.
    if backend == "torch" or sys.platform != "linux" or space.copy is None or space.device.type == "cuda":
        return torch_engines
    large = space.n >= _TORCH_MIN_ROWS and space.dim >= _TORCH_MIN_COLUMNS and k <= _TORCH_MAX_K
    return torch_engines if large and half_dtype(space.device) is not None else (Faiss, *torch_engines)
