"""Neighbour candidates by products in half precision: bfloat16 on CPUs that multiply it fast, float16 on CUDA.

It is more than twice as fast as float32. Its rounding is known row by row, so its distances bound the true ones from
both sides: what can be among the nearest is scored again, rows for which that decides too little are left open.
"""

from __future__ import annotations

import functools
import math
import time

import torch
from torch import Tensor

from pose2id._inputs import blocks
from pose2id._space import FLOAT32_ROUNDING, Candidates, Space

_GROUP = 8  # columns of which only the largest is looked at first
_EXTRA = 6  # columns that hold squared norms
_FASTER = 1.5  # than float32 must products in half precision be, to pay for what comes on top


@functools.cache
def half_dtype(device: torch.device) -> torch.dtype | None:
    """What to multiply in on a device: float16 on CUDA, bfloat16 on CPUs where a small trial shows that it is fast."""
    if device.type == "cuda":
        return torch.float16
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for _ in range(5):
        for dtype in seconds:
            y = x.to(dtype)
            start = time.perf_counter()
            torch.mm(y, y.T)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return torch.bfloat16 if seconds[torch.float32] > _FASTER * seconds[torch.bfloat16] else None


def search_half(space: Space, count: int, k: int, dtype: torch.dtype) -> Candidates | None:
    """`count` candidates of every row, by products in half precision; None: these are not what they should be.

    Only the blocks of one triangle are multiplied: each has candidates for its rows and for its columns.
    """
    halves = _Halves(space, dtype)
    scores = torch.full((space.n, count), -torch.inf, dtype=torch.float32, device=space.device)
    positions = torch.zeros((space.n, count), dtype=torch.int64, device=space.device)

    def update(part: slice, block: Tensor, start: int) -> None:
        found, at = _largest(block, min(count, block.shape[1]))
        scores[part], chosen = torch.cat([scores[part], found], 1).topk(count, dim=1)
        positions[part] = torch.cat([positions[part], at + start], 1).gather(1, chosen)

    side = min(int((space.block_bytes / 8) ** 0.5), space.block_bytes // (8 * (space.dim + _EXTRA)))
    number = math.ceil(space.n / max(1, side))
    parts = list(blocks(space.n, math.ceil(space.n / number)))
    for j, column in enumerate(parts):
        right = halves.right(column)
        for row in parts[: j + 1]:
            block = torch.mm(halves.left(row), right.T)
            if row == column:
                block.fill_diagonal_(-torch.inf)
            else:
                update(column, block.T, row.start)
            update(row, block, column.start)
    return halves.candidates(scores.mul_(-2), positions, k)


class _Halves:
    """The rows of a `Space` in half precision, laid out so that one product gives half of every squared distance.

    With h = |x|^2 / 2, -|x - y|^2 / 2 = x.y - h_x - h_y is the product of [x, h_x, -1] and [y, -1, h_y]. Three halves
    hold h to float32's precision. Rounding moves a row by |e|, so no distance changes by more than |e_x| + |e_y|:
    from a product follow bounds of the true distance, whatever the features.
    """

    def __init__(self, space: Space, dtype: torch.dtype) -> None:
        self._space, self._dtype = space, dtype
        errors = torch.empty(space.n, dtype=torch.float64, device=space.device)
        residual = torch.zeros((), dtype=torch.float64, device=space.device)
        self._rows = None
        if space.copy is not None:
            self._rows = torch.empty((space.n, space.dim + _EXTRA), dtype=dtype, device=space.device)
        for part in blocks(space.n, space.block_bytes // (64 * (space.dim + _EXTRA))):
            rows = self._rounded(part)
            if self._rows is not None:
                self._rows[part] = rows
            x, h = rows[:, :-_EXTRA], rows[:, -_EXTRA:-3].double().sum(1)
            errors[part] = torch.linalg.vector_norm(space.centred(part) - x.float(), dim=1, dtype=torch.float64)
            residual = torch.maximum(residual, (x.double().square().sum(1) / 2 - h).abs().max())
        # How far rounding, to float32 and to half precision, moves a row and the farthest moved of the others.
        errors += 2 * FLOAT32_ROUNDING * (space.norms + errors)
        self._moved = errors + errors.max()
        # What adding up the products may lose (twice that: not every processor rounds to nearest), and what h loses.
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        self._lost = 2 * FLOAT32_ROUNDING * (space.dim + 32) * (space.norms + space.norms.max()) ** 2
        self._lost += 4 * (residual + smallest)
        # What rounding the sum to half precision loses, twice that again.
        self._relative = torch.finfo(dtype).eps

    def left(self, part: slice) -> Tensor:
        """Rows on the left of a product."""
        if self._rows is not None:
            return self._rows[part]
        size = self._space.block_bytes // (64 * (self._space.dim + _EXTRA))
        pieces = blocks(part.stop - part.start, size)
        return torch.cat([self._rounded(slice(part.start + p.start, part.start + p.stop)) for p in pieces])

    def right(self, part: slice) -> Tensor:
        """Rows on its right."""
        rows = self.left(part)
        return torch.cat([rows[:, :-_EXTRA], rows[:, -3:], rows[:, -_EXTRA:-3]], 1)

    def candidates(self, squared: Tensor, positions: Tensor, k: int) -> Candidates | None:
        """What (n, m) squared distances from products, ascending, say; None if a sample breaks their bounds."""
        rows, exact = self._space.sample(positions)
        for rank in (0, -1):
            least, most = self._bounds(squared[rows, rank], rows)
            if not ((least <= exact[:, rank]) & (exact[:, rank] <= most)).all():
                return None
        everything = slice(None)
        most = self._bounds(squared[:, k - 1], everything)[1]
        # The largest product whose true distance may still be as small as the k-th is at most.
        limit = ((most + self._moved).square() + self._lost) / (1 - self._relative)
        floor = self._bounds(squared[:, -1], everything)[0]
        if positions.shape[1] == self._space.n - 1:
            floor.fill_(torch.inf)
        # Rounded to float32, upwards: the comparison needs no copy in float64.
        return Candidates(positions, squared <= (limit * (1 + 1e-6)).float()[:, None], floor)

    def _bounds(self, squared: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The least and the most that true distances (B,) of `rows` may be where products say `squared` (B,)."""
        low = squared.double() * (1 - self._relative) - self._lost[rows]
        high = squared.double() * (1 + self._relative) + self._lost[rows]
        moved = self._moved[rows]
        return (low.clamp(min=0).sqrt() - moved).clamp(min=0), high.clamp(min=0).sqrt() + moved

    def _rounded(self, part: slice) -> Tensor:
        x = self._space.centred(part).to(self._dtype)
        rest = x.double().square().sum(1) / 2
        terms = []
        for _ in range(3):
            terms.append(rest.to(self._dtype))
            rest = rest - terms[-1].double()
        minus_one = torch.full((len(x), 3), -1, dtype=self._dtype, device=x.device)
        return torch.cat([x, torch.stack(terms, 1), minus_one], 1)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, count) largest entries of each row, descending float32, and their columns; equal ones in any order.

    Through the maxima of groups of columns, because topk is slow on long rows: what is among the largest is in one of
    the `count` groups with the largest maxima.
    """
    width = scores.shape[1] // _GROUP
    if width < 2 * count:
        values, columns = scores.float().topk(count, dim=1)
        return values, columns
    grouped = scores[:, : width * _GROUP]
    if scores.stride(0) == 1:  # a transposed matrix: many times faster so than along its columns
        maxima = grouped.T.unflatten(0, (_GROUP, width)).amax(0).T
    else:
        maxima = grouped.unflatten(1, (_GROUP, width)).amax(1)
    groups = _largest(maxima, count)[1]
    members = torch.arange(_GROUP, device=scores.device)[:, None] * width
    rest = torch.arange(width * _GROUP, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([(groups[:, None] + members).flatten(1), rest], 1)
    values, at = scores.gather(1, columns).float().topk(count, dim=1)
    return values, columns.gather(1, at)
