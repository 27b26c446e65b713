"""Nearest rows among some members of a set, such as the images of one camera, with their cosine similarities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import JoinedRows, Rows, blocks
from pose2id.neighbors.distance import full_precision, nearest_columns, squared_euclidean
from pose2id.neighbors.engines import own_entry
from pose2id.neighbors.search import search_members
from pose2id.neighbors.visible_parts import mean_distances, query_memory

FEW_LISTS = 8  # lists of so few members are searched for all rows; of more, for those that ask


class Compared:
    """Normalised rows that are searched, and how: whole, or by the mean distance of their visible parts.

    Lists are exact: by float64 distance, equal ones by the lower index. A similarity is the cosine 1 - d^2 / 2; of rows
    in parts that of their mean distance d, of parts in one vector the mean over the parts. A zero row has cosine 0 with
    all others.

    Args:
        rows: L2-normalised rows.
        visibility: (n, P) float64 weights of parts, or None for rows that are compared as one vector.
        backend: as in `pose2id.nearest_neighbors`.
        max_memory: likewise, for each search.
    """

    def __init__(
        self, rows: Rows, visibility: Tensor | None = None, backend: str = "auto", max_memory: int | None = None
    ) -> None:
        self.rows, self._visibility = rows, visibility
        self._backend, self._max_memory = backend, max_memory
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._all = torch.arange(rows.n, device=rows.device)
        self.directed = self._all[rows.directions > 0]  # rows that are not zero, ascending

    def nearest(
        self, k: int, members: Tensor | None = None, asking: Tensor | None = None, *, keep: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The k nearest others of rows among the members: (B, k) int64 indices of rows, and float64 similarities.

        Args:
            k: length of the lists; missing entries are -1, with similarity -infinity.
            members: ascending indices of the rows that may be neighbours; None: all.
            asking: ascending indices of the rows that ask; None: all.
            keep: how many neighbours of all rows to keep for a later call with the same members.
        """
        if members is not None and asking is None:
            for kept, *found in self._kept:
                if k <= found[0].shape[1] and torch.equal(kept, members):
                    return found[0][:, :k], found[1][:, :k]
            if keep:
                indices, similarities = self.nearest(k, members, self._all)
                self._kept.append((members, indices[:, :keep].clone(), similarities[:, :keep].clone()))
                return indices, similarities
        return self._lists(members, None, self._all if asking is None else asking, k)

    def nearest_to(
        self, queries: Rows, k: int, members: Tensor | None = None, visibility: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k nearest members of rows of another set, with the visibility of their parts: as in `nearest`."""
        if self._visibility is not None:
            assert visibility is not None
            return _padded(*self._by_parts(queries, visibility, min(k, self.rows.n)), k)
        return self._lists(members, queries, torch.arange(queries.n, device=queries.device) + self.rows.n, k)

    def nearest_of_few(self, k: int, members: Tensor, queries: Rows | None = None) -> tuple[Tensor, Tensor]:
        """The k nearest of some members, a large share of them, for all whole rows or for queries: as in `nearest`.

        By products in float64, so that copies may come in any order.
        """
        rows = self.rows if queries is None else queries
        others = self.rows.read(members, torch.float64)
        squares = others.square().sum(1)
        place = torch.full((self.rows.n,), -1, dtype=torch.int64, device=self.rows.device)
        place[members] = torch.arange(len(members), device=self.rows.device)
        indices = torch.empty((rows.n, k), dtype=torch.int64, device=rows.device)
        similarities = torch.empty((rows.n, k), dtype=torch.float64, device=rows.device)
        for block in blocks(rows.n, BLOCK_BYTES // (32 * max(len(members), rows.dim))):
            x = rows.read(block, torch.float64)
            with full_precision(rows.device):
                distances = squared_euclidean(x, others, x.square().sum(1), squares)
            if queries is None:
                own = torch.nonzero(place[block] >= 0).flatten()
                distances[own, place[block][own]] = torch.inf
            found, at = distances.topk(k, dim=1, largest=False)
            indices[block] = members[at]
            directions = rows.directions[block, None] + self.rows.directions[indices[block]]
            similarities[block] = (directions - found) / (2 * rows.parts)
        return indices, similarities

    def _lists(self, members: Tensor | None, queries: Rows | None, asking: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Lists of members, for rows by index, which are not on their own; queries come after the rows themselves."""
        members = self._all if members is None else members
        count = min(k + (queries is None), len(members))
        if count < 1 or not len(asking):
            nothing = torch.empty((len(asking), 0), dtype=torch.int64, device=asking.device)
            return _padded(nothing, nothing.double(), k)
        if self._visibility is not None:
            found, similarities = self._by_parts(self.rows, self._visibility, count)
        else:
            rows = self.rows if queries is None else JoinedRows(self.rows, queries)
            found, distances = self._members(rows, members, asking, count)
            directions = rows.directions[asking, None] + rows.directions[found]
            similarities = (directions - distances.square_()) / (2 * rows.parts)
        if queries is None:
            found, similarities = _without(found, similarities, asking, k)
        return _padded(found, similarities, k)

    def _members(self, rows: Rows, members: Tensor, asking: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return search_members(rows, members, asking, count, self._backend, self._max_memory)

    def _by_parts(self, queries: Rows, visibility: Tensor, count: int) -> tuple[Tensor, Tensor]:
        assert self._visibility is not None
        indices = torch.empty((queries.n, count), dtype=torch.int64, device=queries.device)
        similarities = torch.empty((queries.n, count), dtype=torch.float64, device=queries.device)
        memory = query_memory(self._max_memory)
        for block, distances, _ in mean_distances(queries, self.rows, visibility, self._visibility, *memory):
            indices[block] = nearest_columns(distances, count)
            # Rows that share no part are as far as any can be. Products round the two sides of a pair differently; in
            # float32 they are one number, but for about one pair in 10^8.
            squares = distances.gather(1, indices[block]).clamp(max=2).square().float()
            similarities[block] = 1 - squares.double() / 2
        return indices, similarities


def merged(lists: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k nearest over lists of different members: (B, k) indices and similarities, equal ones by the lower index."""
    indices, similarities = (torch.cat(values, 1) for values in zip(*lists, strict=True))
    order = torch.argsort(indices, dim=1, stable=True)
    order = order.gather(1, torch.argsort(-similarities.gather(1, order), dim=1, stable=True))[:, :k]
    return indices.gather(1, order), similarities.gather(1, order)


def _without(found: Tensor, similarities: Tensor, own: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Lists without the rows that they are of; all others of shorter lists, the missing entry last."""
    if found.shape[1] > k:
        kept = ~own_entry(found, own)
        found, similarities = (values[kept].view(len(own), -1) for values in (found, similarities))
        return found, similarities
    missing = found == own[:, None]
    order = missing.byte().argsort(dim=1, stable=True)
    found, similarities = found.masked_fill(missing, -1), similarities.masked_fill(missing, -torch.inf)
    return found.gather(1, order), similarities.gather(1, order)


def _padded(indices: Tensor, similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    missing = (0, k - indices.shape[1])
    return pad(indices, missing, value=-1), pad(similarities, missing, value=-torch.inf)


class Links:
    """Weighted links from rows to rows: three arrays of one length, ascending by row.

    Attributes:
        row, column: int64 indices.
        weight: float64.
    """

    def __init__(self, row: Tensor, column: Tensor, weight: Tensor) -> None:
        order = torch.argsort(row, stable=True)
        self.row, self.column, self.weight = row[order], column[order], weight[order]

    def chosen(self, mask: Tensor) -> Links:
        """Those for which `mask` is True."""
        return Links(self.row[mask], self.column[mask], self.weight[mask])

    def sums(
        self, source: Rows, block: slice, visibility: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """(B, D) sums over the links of the rows of a block: weight times the row of `source` at the column."""
        dtype = dtype or source.dtype
        low, high = torch.searchsorted(self.row, torch.tensor([block.start, block.stop], device=self.row.device))
        own, column, weight = (x[low:high] for x in (self.row, self.column, self.weight))
        own = own - block.start
        total = torch.zeros((block.stop - block.start, source.dim), dtype=dtype, device=source.device)
        if not len(own):
            return total
        # Link by link of each row: a fixed order of sums on every device, and no (rows, links, D) temporary.
        counts = torch.bincount(own, minlength=len(total))
        rank = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts)[own]
        order = torch.argsort(rank, stable=True)
        for piece in torch.split(order, torch.bincount(rank).tolist()):
            added = source.read(column[piece], dtype)
            if visibility is not None:
                source.by_part(added).mul_(visibility[column[piece], :, None].to(added.dtype))
            total[own[piece]] += added.mul_(weight[piece, None].to(added.dtype))
        return total


def in_blocks(rows: Rows) -> Iterator[slice]:
    """Blocks of rows for sums of links: the rows, what is added and what is written are alive."""
    return blocks(rows.n, BLOCK_BYTES // (64 * rows.dim))
