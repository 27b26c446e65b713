"""Exact nearest neighbours within groups and across them, as camera-aware methods need.

Found and proved as in `search`, in the same order: pairs that do not count have the score of minus infinity, which no
engine takes for a candidate.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pose2id.io.checks import BLOCK_BYTES, checked_choice
from pose2id.io.rows import blocks
from pose2id.neighbors.certificate import certified
from pose2id.neighbors.distance import full_precision
from pose2id.neighbors.engines import Half, Products, Scores
from pose2id.neighbors.search import Memory, distinct, plan_memory
from pose2id.neighbors.space import RowSource, Space

_TOGETHER = 1024  # rows of small groups that are searched at a time


def search_within(
    rows: RowSource, groups: Tensor, k: int, backend: str = "auto", max_memory: int | Memory | None = None
) -> Tensor:
    """Each row's k nearest others of its own group: (n, k) int64 on `rows.device`, -1 where there are fewer.

    Nearest first by float64 distance, equal ones by the lower index. Costs the distances within groups, of small ones
    together.

    Args:
        rows: checked rows.
        groups: (n,) int64, equal for rows of one group.
        k: number of neighbours, at least 1.
        backend: "auto" or "torch"; faiss cannot leave out rows.
        max_memory: as in `nearest_neighbors`.
    """
    memory, groups = _prepared(rows, groups, k, backend, max_memory)
    with full_precision(rows.device):
        kept, twin = distinct(_Labelled(rows, groups), k + 1, memory.block_bytes)
        found = torch.full((len(kept), k), -1, dtype=torch.int64, device=rows.device)
        order = torch.argsort(groups[kept], stable=True)  # within a group by index: so do positions
        for part, largest in _chunks(groups[kept]):
            members = kept[order[part]]
            count = min(k, largest - 1)
            if count:
                nearest = _search(_Grouped(rows, members, memory, groups, within=True), count)
                found[order[part], :count] = torch.where(nearest < 0, -1, members[nearest])
    return found if twin is None else found[twin]


def search_across(
    rows: RowSource, groups: Tensor, k: int, backend: str = "auto", max_memory: int | Memory | None = None
) -> Tensor:
    """Each row's k nearest of all other groups, otherwise as `search_within`. Costs as much as a search of all rows."""
    memory, groups = _prepared(rows, groups, k, backend, max_memory)
    found = torch.full((rows.n, k), -1, dtype=torch.int64, device=rows.device)
    if groups.max() == 0:
        return found
    with full_precision(rows.device):
        labelled = _Labelled(rows, groups)
        kept = distinct(labelled, k, memory.block_bytes)[0]
        # Of copies in many groups the first 2 k hold k of other groups than any row's own. All groups ask.
        searched = kept[distinct(_Labelled(rows, groups * 0, kept), 2 * k, memory.block_bytes)[0]]
        first, twin = distinct(labelled, 1, memory.block_bytes)
        only_asking = first[~torch.isin(first, searched)]
        chosen = torch.cat([searched, only_asking])
        space = _Grouped(rows, chosen, memory, groups, within=False, queries=len(only_asking))
        position = torch.empty_like(groups)
        position[chosen] = space.asking = torch.arange(len(chosen), device=rows.device)
        nearest = _search(space, min(k, len(searched)))[position[first if twin is None else first[twin]]]
        found[:, : nearest.shape[1]] = torch.where(nearest < 0, -1, searched[nearest])
    return found


def _prepared(
    rows: RowSource, groups: Tensor, k: int, backend: str, max_memory: int | Memory | None
) -> tuple[Memory, Tensor]:
    """What to do with memory, and groups numbered from 0."""
    checked_choice(backend, "backend", ("auto", "torch"))
    lists, copies = rows.n * (256 + 64 * k), 6 * rows.n * (rows.dim + 6)  # as a search of all rows
    memory = plan_memory(rows, k, max_memory, lists=lists, copies=copies)
    return memory, groups.to(rows.device).unique(return_inverse=True)[1]


def _chunks(groups: Tensor) -> Iterator[tuple[slice, int]]:
    """Slices of rows sorted by group: whole groups, small ones together; and the size of the largest group in each."""
    start = stop = largest = 0
    for size in groups.bincount().tolist():
        if stop + size - start > _TOGETHER and stop > start:
            yield slice(start, stop), largest
            start, largest = stop, 0
        stop, largest = stop + size, max(largest, size)
    yield slice(start, stop), largest


def _search(space: _Grouped, k: int) -> Tensor:
    return certified(space, k, (_MaskedHalf, _Masked), _Masked(space, torch.float64))


class _Grouped(Space):
    """Rows in groups; pairs count within groups, or across them."""

    def __init__(
        self, rows: RowSource, kept: Tensor, memory: Memory, groups: Tensor, *, within: bool, queries: int = 0
    ) -> None:
        super().__init__(rows, kept, *memory, own=not within, queries=queries)
        self._groups, self._within = groups[kept].int(), within

    def masked(self, score: Scores, rows: slice | Tensor) -> Scores:
        """`score` of `rows`, minus infinity where a pair does not count."""
        own = self._groups[rows]
        return lambda part: score(part).masked_fill_((self._groups[part, None] == own) != self._within, -torch.inf)


class _Masked(Products):
    """Products of a `_Grouped` space."""

    _space: _Grouped

    def scores(self, rows: slice | Tensor) -> Scores:
        """As `Products.scores`."""
        return self._space.masked(super().scores(rows), rows)


class _MaskedHalf(Half):
    """The same in half precision."""

    _space: _Grouped

    def scores(self, rows: slice | Tensor) -> Scores:
        """As `Half.scores`."""
        return self._space.masked(super().scores(rows), rows)


class _Labelled:
    """Rows, or those that are kept, followed by their group: equal where no search tells two rows apart."""

    def __init__(self, rows: RowSource, groups: Tensor, kept: Tensor | None = None) -> None:
        self._rows, self._groups, self._kept = rows, groups, kept
        self.n, self.dim, self.device = len(groups if kept is None else kept), rows.dim + 1, rows.device

    def read(self, index: slice | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `Rows.read`."""
        index = index if self._kept is None else self._kept[index]
        found = self._rows.read(index, dtype)
        return torch.cat([found, self._groups[index, None].to(found.dtype)], 1)

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
        """As `Rows.blocks`."""
        return blocks(self.n, block_bytes // (32 * self.dim))
