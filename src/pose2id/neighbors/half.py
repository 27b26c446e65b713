"""Neighbour candidates by products in half precision: bfloat16 on CPUs that multiply it fast, float16 on CUDA.

It is more than twice as fast as float32. Its rounding is known row by row, so its distances bound the true ones from
both sides: what can be among the nearest is scored again, rows for which that decides too little are left open.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pose2id.io.rows import blocks
from pose2id.neighbors.space import FLOAT32_ROUNDING, Best, Candidates, Space, even_blocks, search_triangle, without

_EXTRA = 6  # columns that hold squared norms
_SAMPLE = 128  # rows that show whether half precision decides enough
_OPEN = 0.1  # the share of them that may stay open
_FASTER = 1.5  # than float32 must products in half precision be, to pay for what comes on top


@functools.cache
def half_dtype(device: torch.device) -> torch.dtype | None:
    """What to multiply in on a device: float16 on CUDA, bfloat16 on CPUs where a small trial shows that it is fast."""
    if device.type == "cuda":
        return torch.float16
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for _ in range(5):
        for dtype in seconds:
            y = x.to(dtype)
            start = time.perf_counter()
            torch.mm(y, y.T)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
        if seconds[torch.bfloat16] > 2 * seconds[torch.float32]:
            return None  # where it is emulated, it takes long
    return torch.bfloat16 if seconds[torch.float32] > _FASTER * seconds[torch.bfloat16] else None


def search_half(space: Space, count: int, k: int, dtype: torch.dtype) -> tuple[Candidates | None, str]:
    """`count` candidates of every row, by products in half precision.

    None where a sample of rows shows that these decide too little, among many rows at all but the same distance; or
    that they are not what they should be, and then also what is wrong.
    """
    halves = _Halves(space, dtype)
    side = max(1, min(math.isqrt(space.block_bytes // 8), space.block_bytes // (8 * (space.dim + _EXTRA))))
    parts = even_blocks(space.n, side)

    size = max(1, min(_SAMPLE, space.block_bytes // (16 * (space.dim + _EXTRA))))
    sample = torch.arange(0, space.n, math.ceil(space.n / size), device=space.device)
    best = Best(len(sample), count, space.device)
    scores = halves.scores(sample)
    for part in parts:
        block = scores(part).T
        without(sample, block, part, -torch.inf)
        best.update(slice(None), block, part.start)
    squared = -2 * best.scores
    if not halves.hold(squared, best.positions, sample):
        return None, f"products in {dtype} are less precise here than they should be"
    if space.rank(halves.candidates(squared, best.positions, sample, k), sample, k)[1].double().mean() < 1 - _OPEN:
        return None, ""

    best = search_triangle(parts, count, space.device, halves.scores)
    return halves.candidates(-2 * best.scores, best.positions, slice(None), k), ""


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
        for part in blocks(space.n, space.block_bytes // (24 * (space.dim + _EXTRA))):
            rows, rest = self._rounded(part)
            if self._rows is not None:
                self._rows[part] = rows
            moved = space.centred(part) - rows[:, :-_EXTRA].float()
            errors[part] = torch.linalg.vector_norm(moved, dim=1, dtype=torch.float64)
            residual = torch.maximum(residual, rest)
        # How far rounding, to float32 and to half precision, moves a row and the farthest moved of the others.
        errors += 2 * FLOAT32_ROUNDING * (space.norms + errors)
        self._moved = errors + errors.max()
        # What adding up the products may lose (twice that: not every processor rounds to nearest), and what h loses.
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        self._lost = 2 * FLOAT32_ROUNDING * (space.dim + 32) * (space.norms + space.norms.max()) ** 2
        self._lost += 4 * (residual + smallest)
        # What rounding the sum to half precision loses, twice that again.
        self._relative = torch.finfo(dtype).eps

    def scores(self, positions: slice | Tensor) -> Callable[[slice], Tensor]:
        """From a slice of rows to half of its negative squared distances (B, C) to the rows at `positions`."""
        right = self.right(positions).T
        return lambda part: torch.mm(self.left(part), right)

    def left(self, positions: slice | Tensor) -> Tensor:
        """Rows on the left of a product."""
        if self._rows is not None:
            return self._rows[positions]
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=self._space.device)
        pieces = blocks(len(positions), self._space.block_bytes // (24 * (self._space.dim + _EXTRA)))
        return torch.cat([self._rounded(positions[piece])[0] for piece in pieces])

    def right(self, positions: slice | Tensor) -> Tensor:
        """Rows on its right."""
        rows = self.left(positions)
        return torch.cat([rows[:, :-_EXTRA], rows[:, -3:], rows[:, -_EXTRA:-3]], 1)

    def hold(self, squared: Tensor, positions: Tensor, rows: Tensor) -> bool:
        """Whether (B, m) squared distances of `rows` from products, ascending, keep to their bounds."""
        for rank in (0, -1):
            exact = self._space.exact(rows, positions[:, rank])
            least, most = self._bounds(squared[:, rank], rows)
            if not ((least <= exact) & (exact <= most)).all():
                return False
        return True

    def candidates(self, squared: Tensor, positions: Tensor, rows: slice | Tensor, k: int) -> Candidates:
        """What (B, m) squared distances of `rows` from products, ascending, say."""
        most = self._bounds(squared[:, k - 1], rows)[1]
        # The largest product whose true distance may still be as small as the k-th is at most.
        limit = ((most + self._moved[rows]).square() + self._lost[rows]) / (1 - self._relative)
        floor = self._bounds(squared[:, -1], rows)[0]
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

    def _rounded(self, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Rows for the left, and the largest part of any h that three halves leave out."""
        x = self._space.centred(positions).to(self._dtype)
        rest = torch.linalg.vector_norm(x.float(), dim=1, dtype=torch.float64).square() / 2
        terms = []
        for _ in range(3):
            terms.append(rest.to(self._dtype))
            rest = rest - terms[-1].double()
        minus_one = torch.full((len(x), 3), -1, dtype=self._dtype, device=x.device)
        return torch.cat([x, torch.stack(terms, 1), minus_one], 1), rest.abs().max()
