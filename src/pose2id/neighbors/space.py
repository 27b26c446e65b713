"""What a search looks at: rows centred and scaled, their exact distances, and what rounding may do to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import Rows, blocks, row_norms, sum_last

FLOAT32_ROUNDING = 2.0**-24
_CACHE_BYTES = 8 << 20  # three blocks of pairs stay in the cache


class RowSource(Protocol):
    """What is searched: `Rows`, or several of them as one."""

    n: int
    dim: int
    device: torch.device

    def read(self, index: slice | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `Rows.read`."""

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
        """As `Rows.blocks`."""


class Centre(NamedTuple):
    """What a set is centred and scaled by.

    Attributes:
        mean: (P, D / P) float64 of the parts.
        scale: a power of two, not less than the norm of any centred row.
        largest: (P,) float64, the largest norm of each centred part, divided by `scale`.
    """

    mean: Tensor
    scale: float
    largest: Tensor


class Centred:
    """The rows `kept` of a set, by position: centred and scaled when read, in float64.

    Centred, because the features of one model share a large mean that only costs precision; scaled by a power of two to
    norms of at most 1, the largest at least 1/2, so that no square overflows. Features in parts are centred part by
    part, over the rows that show the part; hidden parts are zero.

    Attributes:
        n: how many rows, the first ones, are searched.
        asking: positions of the rows that ask for neighbours: those that are searched, or `queries` rows after them.
        alike: whether those that ask are those that are searched.
        own: whether a row that asks may be among its own neighbours.
        available: how many neighbours a row can have.
        dim, device, block_bytes: columns, place, and what one block of temporaries may take.
        scale: what distances were divided by.
        centre: what rows are centred and scaled by: that of a larger set, if one is given, else their own.
    """

    def __init__(
        self,
        rows: RowSource,
        kept: Tensor,
        block_bytes: int,
        *,
        queries: int = 0,
        own: bool = False,
        visibility: Tensor | None = None,
        centre: Centre | None = None,
    ) -> None:
        self._rows, self._kept, self.block_bytes = rows, kept, block_bytes
        self.n, self.dim, self.device = len(kept) - queries, rows.dim, rows.device
        self.alike, self.own = queries == 0, own or queries > 0
        self.asking = torch.arange(self.n if queries else 0, len(kept), device=rows.device)
        self.available = self.n - (not self.own)
        self.read_bytes = 40 * rows.dim  # what one row takes while it is read and centred
        self._shown = torch.ones((len(kept), 1), dtype=torch.float64, device=rows.device)
        if visibility is not None:
            self._shown = (visibility[kept] > 0).double()
        if centre is None:
            self._find_centre()
        else:
            mean, self.scale, largest = centre
            self._mean, self.largest = mean.to(rows.device), largest.to(rows.device)

    def _find_centre(self) -> None:
        rows, kept = self._rows, self._kept
        parts, chunks = self._shown.shape[1], list(blocks(len(kept), self.block_bytes // self.read_bytes))
        share = self._shown / self._shown.sum(0).clamp(min=1)
        self._mean = torch.zeros((parts, rows.dim // parts), dtype=torch.float64, device=rows.device)
        for chunk in chunks:
            self._mean += self.read(kept[chunk]).mul_(share[chunk, :, None]).sum(0)
        self.scale = 1.0
        norms = torch.zeros(parts, dtype=torch.float64, device=rows.device)
        for chunk in chunks:
            norms = torch.maximum(norms, row_norms(self.centred64(chunk).flatten(0, 1)).view(-1, parts).amax(0))
        self.scale = 2.0 ** math.frexp(float(norms.max()))[1]
        self.largest = norms / self.scale

    @property
    def centre(self) -> Centre:
        """As in the class."""
        return Centre(self._mean, self.scale, self.largest)

    def read(self, rows: Tensor) -> Tensor:
        """(B, P, D / P) float64 rows of the set itself, as they are."""
        return self._rows.read(rows, torch.float64).view(len(rows), self._shown.shape[1], -1)

    def centred64(self, positions: slice | Tensor) -> Tensor:
        """(B, P, D / P) float64 rows."""
        rows = self.read(self._kept[positions]).sub_(self._mean)
        if len(self._mean) > 1:
            rows.mul_(self._shown[positions, :, None])
        return rows.div_(self.scale)

    def differences(self, first: Tensor, second: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of pairs of positions, and their (B, P, D / P) float64 differences, scaled but never rounded twice."""
        for part in blocks(len(first), self.block_bytes // (2 * self.read_bytes)):
            x, y = self.read(self._kept[first[part]]), self.read(self._kept[second[part]])
            yield part, x.sub_(y).div_(self.scale)

    def exact(self, first: Tensor, second: Tensor) -> Tensor:
        """(C,) float64 values by which pairs of positions are ordered."""
        raise NotImplementedError

    def distance(self, exact: Tensor) -> Tensor:
        """Distances, divided by `scale`, from what `exact` returns."""
        return exact

    def near(self, first: Tensor, second: Tensor) -> Tensor:
        """(C,) float64 distances of pairs of positions, each off by `wrong` at most, and quicker than exact ones."""
        return self.exact(first, second)

    def wrong(self, rows: Tensor, distances: Tensor) -> Tensor:
        """(B,) how far `near` may be off in distances (B,) of `rows`."""
        return torch.zeros_like(distances)

    def exclude(self, scores: Tensor, rows: Tensor, column: slice | Tensor) -> None:
        """Make rows the last in their own scores (B, column), unless they may be their own neighbours."""
        if self.own:
            return
        if isinstance(column, Tensor):
            scores.masked_fill_(rows[:, None] == column, -torch.inf)
        else:
            at = torch.nonzero((rows >= column.start) & (rows < column.stop)).flatten()
            scores[at, rows[at] - column.start] = -torch.inf


class Space(Centred):
    """Whole rows: float32 ones for the search, float64 ones for what these leave open.

    Attributes:
        copy: (n, D) float32 rows; None where memory has no room for them, then they are computed when needed.
        squares: (n,) float32 squared norms of these rows.
        norms: (n,) float64 norms of these rows.
        roundings: (n,) float64, how many roundings a squared distance from a product may be off: those of D products
            and sums, and of the rows. Subtracting one mean from all rows changes no distance by more than the rounding
            of the result.
    """

    def __init__(
        self,
        rows: RowSource,
        kept: Tensor,
        block_bytes: int,
        keep_copy: bool = True,
        *,
        queries: int = 0,
        own: bool = False,
        centre: Centre | None = None,
    ) -> None:
        super().__init__(rows, kept, block_bytes, queries=queries, own=own, centre=centre)
        self.copy = None
        if keep_copy:
            self.copy = torch.empty((len(kept), rows.dim), dtype=torch.float32, device=rows.device)
        self.squares = torch.empty(len(kept), dtype=torch.float32, device=rows.device)
        for part in blocks(len(kept), block_bytes // self.read_bytes):
            block = self.centred64(part).flatten(1).float()
            self.squares[part] = block.square().sum(1)
            if self.copy is not None:
                self.copy[part] = block
        self.norms = self.squares.double().sqrt()
        # D products and sums, 8 further roundings; a tenth more for the second order.
        self.roundings = (1.1 * rows.dim + 8) * (self.norms + self.norms.max()) ** 2

    def centred(self, positions: slice | Tensor) -> Tensor:
        """Float32 rows, as `copy` has them."""
        if self.copy is not None:
            # Indexing gathers the same rows several times as slowly.
            return self.copy[positions] if isinstance(positions, slice) else self.copy.index_select(0, positions)
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=self.device)
        result = torch.empty((len(positions), self.dim), dtype=torch.float32, device=self.device)
        for part in blocks(len(positions), self.block_bytes // (2 * self.read_bytes)):
            result[part] = self.centred64(positions[part]).flatten(1)
        return result

    def near(self, first: Tensor, second: Tensor) -> Tensor:
        """As `Centred.near`, from the differences of float32 rows."""
        result = torch.empty(len(first), dtype=torch.float64, device=self.device)
        for part in self._pairs(len(first)):
            difference = self.centred(first[part]).sub_(self.centred(second[part]))
            result[part] = torch.linalg.vector_norm(difference, dim=1, dtype=torch.float64)
        return result

    def _pairs(self, n: int) -> Iterator[slice]:
        """Blocks of pairs of float32 rows."""
        block_bytes = self.block_bytes
        if self.device.type != "cuda":
            block_bytes = min(block_bytes, _CACHE_BYTES * torch.get_num_threads())  # starting threads takes long
        return blocks(n, block_bytes // (24 * self.dim))

    def wrong(self, rows: Tensor, distances: Tensor) -> Tensor:
        """As `Centred.wrong`: rows were rounded to float32, then differences and squares."""
        return FLOAT32_ROUNDING * (1.1 * (self.norms[rows] + self.norms.max()) + 4 * distances)

    def exact(self, first: Tensor, second: Tensor) -> Tensor:
        """Float64 squared distances of pairs of positions."""
        result = torch.empty(len(first), dtype=torch.float64, device=self.device)
        for part, difference in self.differences(first, second):
            result[part] = sum_last(difference.flatten(1).square_())
        return result

    def distance(self, exact: Tensor) -> Tensor:
        """As `Centred.distance`."""
        return exact.sqrt()


class Uncentred(Space):
    """Whole rows whose `near` is precise for near rows, and the same from both sides and in every space.

    It compares rows as they are; where there is room for copies, with a further copy in the rows' own dtype.
    """

    def __init__(
        self,
        rows: Rows,
        kept: Tensor,
        block_bytes: int,
        keep_copy: bool,
        *,
        queries: int,
        centre: Centre | None = None,
    ) -> None:
        super().__init__(rows, kept, block_bytes, keep_copy, queries=queries, own=True, centre=centre)
        self._plain = None
        if keep_copy:
            self._plain = torch.empty((len(kept), rows.dim), dtype=rows.dtype, device=rows.device)
            for part in blocks(len(kept), block_bytes // self.read_bytes):
                self._plain[part] = rows.read(kept[part])

    def near(self, first: Tensor, second: Tensor) -> Tensor:
        """As `Centred.near`, from differences in the rows' own dtype."""
        result = torch.empty(len(first), dtype=torch.float64, device=self.device)
        for part in self._pairs(len(first)):
            difference = self._read_plain(first[part]).sub_(self._read_plain(second[part]))
            result[part] = sum_last(difference.square_())
        return result.sqrt_().div_(self.scale)

    def wrong(self, rows: Tensor, distances: Tensor) -> Tensor:
        """As `Centred.wrong`: normalised rows were rounded, then differences, squares and their sums."""
        norms = self.norms.max() + torch.linalg.vector_norm(self._mean) / self.scale
        return FLOAT32_ROUNDING * (2.2 * norms + (4 + math.log2(self.dim) / 2) * distances)

    def _read_plain(self, positions: Tensor) -> Tensor:
        return self._rows.read(self._kept[positions]) if self._plain is None else self._plain.index_select(0, positions)
