"""Exact nearest neighbours of every row among the other rows of its own set, in memory linear in the number of rows.

How a row walks through: it is centred, scaled and rounded to float32 (`_space.Space`); a backend finds more candidates
than needed (`_candidates`); those that may be among the nearest are scored, and a bound on all rounding proves most
lists right (`Space.rank`); what half precision leaves open is searched in float32, what that leaves open in float64.
The order is that of float64 distances between the caller's own values, equal ones by the lower index. So the result
does not depend on the backend, the block size or the number of threads.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pose2id.io.checks import BLOCK_BYTES, MIN_BLOCK_BYTES, checked_choice, checked_count, checked_memory
from pose2id.io.rows import FeatureArray, Rows, as_container, blocks
from pose2id.neighbors.distance import full_precision, squared_distances
from pose2id.neighbors.half import half_dtype, search_half
from pose2id.neighbors.space import Candidates, RowSource, Space, search_float32

logger = logging.getLogger(__name__)
_logged: set[str] = set()

BACKENDS = ("auto", "faiss", "torch")
# Where "auto" takes torch on CPUs that multiply bfloat16 fast, as measured with benchmarks/neighbors.py: elsewhere the
# products are too small a part of the work, or too many lists stay open.
_TORCH_MIN_ROWS, _TORCH_MIN_COLUMNS, _TORCH_MAX_K = 3000, 256, 32
# What lists take of memory for every row: keys of equal rows, norms and bounds; and for every neighbour asked for.
_ROW_BYTES, _NEIGHBOR_BYTES = 256, 64
_SAMPLE = 64  # rows by which faiss's arithmetic is checked
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
        backend: "faiss" or "torch" forces one; "auto" takes torch on CUDA, on macOS and Windows, and on CPUs
            that multiply bfloat16 fast for at least 3,000 rows of at least 256 columns and k up to 32; faiss elsewhere.
        max_memory: bytes that the search may take, at least 1 MiB and half of that above what lists of neighbours
            need, N (256 + 64 k). Where it has no room for copies of all rows (6 N D bytes), rows are read again and
            again, so that memory-mapped features may be larger than memory. faiss's own memory is not in it. None:
            copies, lists, and 32 MiB for blocks.

    Returns:
        (N, min(k, N - 1)) int64 indices in the container and on the device of `features`.

    Raises:
        TypeError, ValueError: bad input, named.
        RuntimeError: backend="faiss" and faiss cannot do it; the message names the repair.
    """
    rows = Rows(features, "features", normalize=normalize)
    return as_container(search(rows, checked_count(k, "k"), backend, max_memory), features)  # type: ignore[return-value]


def search(rows: RowSource, k: int, backend: str = "auto", max_memory: int | None = None) -> Tensor:
    """`nearest_neighbors` on checked rows: (n, min(k, n - 1)) int64 tensor on `rows.device`."""
    checked_choice(backend, "backend", BACKENDS)
    k = min(k, rows.n - 1)
    block_bytes, keep_copy = _budget(rows, k, max_memory)
    if backend == "faiss" and not keep_copy:
        raise ValueError(
            f"backend='faiss' searches a float32 copy of all rows, for which max_memory={max_memory} has no room. "
            "Allow more memory, or take backend='torch'."
        )
    if k < 1:
        return torch.empty((rows.n, 0), dtype=torch.int64, device=rows.device)
    with full_precision(rows.device):
        kept, twin = distinct(rows, k + 1, block_bytes)
        space = Space(rows, kept, block_bytes, keep_copy=keep_copy)
        # More than k, for what rounding cannot tell apart: a group of up to so many copies at the k-th place fits in.
        count = min(k + min(k, 16) + 2, space.n - 1)
        found, in_half = _candidates(space, count, k, backend)
        nearest, certain = space.rank(found, torch.arange(space.n, device=space.device), k)
        if in_half:
            rest = torch.nonzero(~certain).flatten()
            nearest[rest], certain[rest] = space.rank(search_float32(space, rest, count, k), rest, k)
        rest = torch.nonzero(~certain).flatten()
        nearest[rest] = space.rank_in_float64(rest, k)
        neighbors = kept[nearest]
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


def distinct(rows: RowSource, copies: int, block_bytes: int) -> tuple[Tensor, Tensor | None]:
    """The first `copies` of equal rows, by index, and for every row its place among them (None: nothing was dropped).

    Of many exact copies only the k + 1 with the lowest indices can be among anybody's k nearest, and every later copy
    has the neighbours of the (k + 1)-th, its place here: the search never sees thousands of equal rows, which no
    candidate list could hold.
    """
    everything = torch.arange(rows.n, device=rows.device)
    keys = torch.empty(rows.n, dtype=torch.int64, device=rows.device)
    weights = (
        torch.randint(2**62, (rows.dim,), generator=torch.Generator().manual_seed(0), device="cpu").to(rows.device) * 2
        + 1
    )
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
    if twin is None:
        return lambda x: squared_distances(x, parts, lambda part: rows.read(part, x.dtype))
    return lambda x: squared_distances(x, parts, lambda part: rows.read(kept[part], x.dtype))[:, twin]


def _budget(rows: RowSource, k: int, max_memory: int | None) -> tuple[int, bool]:
    """`plan_memory` of a search with copies in float32 and half precision."""
    lists = rows.n * (_ROW_BYTES + _NEIGHBOR_BYTES * k)
    return plan_memory(rows, k, max_memory, lists=lists, copies=6 * rows.n * (rows.dim + 6))


def plan_memory(rows: RowSource, k: int, max_memory: int | None, *, lists: int, copies: int) -> tuple[int, bool]:
    """Bytes for one block of temporaries, and whether there is memory for copies of all rows besides the lists."""
    if max_memory is None:
        # A GPU wants large blocks: it takes longer to start small ones than to compute them.
        return (16 if rows.device.type == "cuda" else 1) * BLOCK_BYTES, True
    room, least = checked_memory(max_memory) - lists, MIN_BLOCK_BYTES // 2
    if room < least:
        raise ValueError(
            f"max_memory must be at least {lists + least} bytes for lists of {k} neighbours of {rows.n} rows, got "
            f"{max_memory}."
        )
    # A part, because several blocks may be alive, and the allocator keeps some.
    if room - copies >= least:
        return min((room - copies) // 4, BLOCK_BYTES), True
    return min(room // 3, 8 * BLOCK_BYTES), False


def _candidates(space: Space, count: int, k: int, backend: str) -> tuple[Candidates, bool]:
    """`count` candidates of every row, and whether half precision found them."""
    if backend == "faiss" or (backend == "auto" and not _takes_torch(space, k)):
        found, problem = _search_faiss(space, count, k)
        if found is not None:
            return found, False
        if backend == "faiss":
            raise RuntimeError(f"backend='faiss' cannot be used: {problem}. {_FAISS_REPAIR}.")
        _log_once(f"neighbours are searched with torch, faiss cannot be used: {problem}. {_FAISS_REPAIR}.")
    dtype = half_dtype(space.device)
    if dtype is not None:
        found, problem = search_half(space, count, k, dtype)
        if found is not None:
            return found, True
        if problem:
            _log_once(f"neighbours are searched in float32: {problem}.")
    return search_float32(space, torch.arange(space.n, device=space.device), count, k), False


def _takes_torch(space: Space, k: int) -> bool:
    # On macOS and Windows faiss and torch bring an OpenMP runtime each, and the process may abort. faiss needs a copy
    # of all rows, on a GPU through host memory.
    if sys.platform != "linux" or space.copy is None or space.device.type == "cuda":
        return True
    return (
        space.n >= _TORCH_MIN_ROWS
        and space.dim >= _TORCH_MIN_COLUMNS
        and k <= _TORCH_MAX_K
        and half_dtype(space.device) is not None
    )


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.warning(message)


def _search_faiss(space: Space, count: int, k: int) -> tuple[Candidates | None, str]:
    """Candidates of every row by faiss's float32 distances; or None, and why faiss cannot be used."""
    faiss, problem = _faiss(space.device.type == "cuda")
    if faiss is None or space.copy is None:
        return None, problem
    rows = space.copy.cpu().numpy()
    try:
        if space.device.type == "cuda":
            device = space.device.index or 0
            found = faiss.knn_gpu(faiss.StandardGpuResources(), rows, rows, count + 1, device=device)
        else:
            found = faiss.knn(rows, rows, count + 1)
    except Exception as error:  # a broken binary raises whatever it likes
        return None, repr(error)
    values, positions = (torch.from_numpy(array).to(space.device) for array in found)
    is_self = positions == torch.arange(space.n, device=space.device)[:, None]
    # Equal rows can push a row off its own list: then the last candidate is one too many.
    is_self[:, -1] |= ~is_self.any(1)
    values, positions = values[~is_self].view(-1, count), positions[~is_self].view(-1, count)
    # Whatever arithmetic it used.
    sample = torch.arange(0, space.n, math.ceil(space.n / _SAMPLE), device=space.device)
    exact = space.exact(sample, positions[sample, -1]).square()
    if not ((values[sample, -1] - exact).abs() <= space.bound[sample]).all():
        return None, "its distances are further off than float32 arithmetic can be"
    return space.candidates(values, positions, slice(None), k), ""


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
