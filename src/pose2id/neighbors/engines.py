"""Engines find candidates: others of each row that are probably its nearest, and how near these may be.

One protocol for faiss, float32 and half precision. `search` scores what an engine finds and proves which lists are
right by the engine's own bounds, whatever the engine.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pose2id.io.rows import blocks
from pose2id.neighbors.distance import squared_euclidean
from pose2id.neighbors.space import FLOAT32_ROUNDING, Centred, Space

# From rows that are searched, a slice or positions, to their (C, B) scores.
Scores = Callable[[slice | Tensor], Tensor]
_SAMPLE = 128  # rows that show whether half precision decides enough
_GROUP = 8  # scores of which only the largest is looked at first
_EXTRA = 6  # columns that hold squared norms
_FASTER = 1.5  # than float32 must products in half precision be, to pay for what comes on top
_FAISS_REPAIR = (
    "Both faiss wheels install the module `faiss` and overwrite each other; repair it with "
    "`pip uninstall -y faiss-cpu faiss-gpu` and then `pip install --force-reinstall faiss-gpu` (Linux x86-64) "
    "or `pip install --force-reinstall faiss-cpu` (elsewhere)"
)


class UnusableError(Exception):
    """An engine cannot work here; carries the reason, empty where it is expected."""


class Engine(Protocol):
    """Finds candidates in a `Space`, which it is made with; raises `UnusableError` where it cannot.

    Scores may have any unit; of others of a row, what is nearer has the higher score, up to rounding.

    Attributes:
        trial: whether a sample of rows must show first that it decides most lists.
        sample: by how many rows it is judged.
    """

    trial: bool
    sample: int

    def nearest(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(B, count) float32 scores, descending, and int64 positions: the best others of each of `rows`, positions."""

    def least(self, scores: Tensor, rows: Tensor) -> Tensor:
        """(B, m) float64: the least that distances of `rows` may be which have these scores; infinite of -infinity."""

    def most(self, scores: Tensor, rows: Tensor) -> Tensor:
        """(B, m) float64: upper bounds, as in `least`."""


EngineMaker = Callable[[Any], Engine]


class Blocks:
    """Goes through the scores of all pairs in blocks; of one triangle where all rows ask, as distances are symmetric.

    Attributes:
        columns: slices of the rows that are searched.
        rows_at_a_time: how many rows should be compared with all columns at a time.
    """

    trial, sample = False, 32

    def __init__(self, space: Centred, side: int) -> None:
        self._searched = space
        self._side = max(1, side)
        evenly = math.ceil(space.n / math.ceil(space.n / self._side))
        self.columns = list(blocks(space.n, evenly))
        self.rows_at_a_time = max(1, space.block_bytes // (40 * max(space.dim, self.columns[0].stop)))

    def scores(self, rows: slice | Tensor) -> Scores:
        """Scores of `rows`, a slice or positions."""
        raise NotImplementedError

    def least(self, scores: Tensor, rows: Tensor) -> Tensor:
        """As `Engine.least`."""
        raise NotImplementedError

    def nearest(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As `Engine.nearest`."""
        space = self._searched
        best = Best(len(rows), count, space.device)
        everything = space.alike and len(rows) == space.n
        for j, part in enumerate(self.columns if everything else blocks(len(rows), self._side)):
            scores = self.scores(part if everything else rows[part])
            for column in self.columns[: j + 1] if everything else self.columns:
                block = scores(column)
                if not everything or column == part:
                    space.exclude(block.T, rows[part], column)
                else:
                    best.update(column, block, part.start)
                best.update(part, block.T, column.start)
        return best.scores, best.positions


class Products(Blocks):
    """Squared distances from products: in float32, or in float64 for what that leaves open. Scores are negative."""

    def __init__(self, space: Space, dtype: torch.dtype = torch.float32) -> None:
        self._space, self._dtype = space, dtype
        if dtype == torch.float64:
            super().__init__(space, space.block_bytes // space.read_bytes)
        else:
            super().__init__(space, min(math.isqrt(space.block_bytes // 16), space.block_bytes // (24 * space.dim)))
        # In float64 twice: the exact distances of which it must miss none are rounded, too.
        self._bound = torch.finfo(dtype).eps * space.roundings / (1 if dtype == torch.float64 else 2)

    def scores(self, rows: slice | Tensor) -> Scores:
        """Negative squared distances."""
        y, squares = self._read(rows)

        def score(part: slice | Tensor) -> Tensor:
            x, x_squares = self._read(part)
            return squared_euclidean(x, y, x_squares, squares).neg_()

        return score

    def _read(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        if self._dtype == torch.float32:
            return self._space.centred(rows), self._space.squares[rows]
        x = self._space.centred64(rows).flatten(1)
        return x, x.square().sum(1)

    def least(self, scores: Tensor, rows: Tensor) -> Tensor:
        """As `Engine.least`."""
        return scores.double().neg_().sub_(self._bound[rows, None]).clamp_(min=0).sqrt_()

    def most(self, scores: Tensor, rows: Tensor) -> Tensor:
        """As `Engine.most`."""
        return scores.double().neg_().add_(self._bound[rows, None]).clamp_(min=0).sqrt_()


class Faiss(Products):
    """faiss's flat index. Its bounds are those of float32 products, whatever it does."""

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        self._faiss = usable_faiss(gpu=space.device.type == "cuda")

    def nearest(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As `Engine.nearest`."""
        space = self._space
        searched = space.centred(slice(0, space.n))
        queries = searched if space.alike and len(rows) == space.n else space.centred(rows)
        found = self._knn(searched, queries, count + (not space.own))
        values, positions = (torch.from_numpy(array).to(space.device) for array in found)
        if not space.own:
            others = ~own_entry(positions, rows)
            values, positions = values[others].view(-1, count), positions[others].view(-1, count)
        return -values, positions

    def _knn(self, rows: Tensor, queries: Tensor, count: int) -> Any:
        arrays = queries.cpu().numpy(), rows.cpu().numpy()
        try:
            if rows.device.type != "cuda":
                return self._faiss.knn(*arrays, count)
            resources = self._faiss.StandardGpuResources()
            return self._faiss.knn_gpu(resources, *arrays, count, device=rows.device.index or 0)
        except Exception as error:  # a broken binary raises whatever it likes
            raise UnusableError(f"{error!r}. {_FAISS_REPAIR}.") from error


def usable_faiss(gpu: bool) -> Any:
    """The module faiss, if it has what is needed: a half-overwritten one imports without parts."""
    try:
        import faiss  # noqa: PLC0415 - slow to import and optional at run time
    except Exception as error:  # a broken binary raises whatever it likes
        raise UnusableError(f"importing it failed with {error!r}. {_FAISS_REPAIR}.") from error
    wanted = ("knn_gpu", "StandardGpuResources", "get_num_gpus") if gpu else ("knn",)
    missing = [name for name in wanted if not hasattr(faiss, name)]
    if missing and not (gpu and hasattr(faiss, "knn")):
        raise UnusableError(f"the installed module has no {', '.join(missing)}. {_FAISS_REPAIR}.")
    if missing or (gpu and faiss.get_num_gpus() == 0):
        raise UnusableError("the installed faiss finds no GPU. Take backend='torch', or features on the CPU.")
    return faiss


class Half(Blocks):
    """Products in half precision: bfloat16 on CPUs that multiply it fast, float16 on CUDA; twice as fast as float32.

    With h = |x|^2 / 2, -|x - y|^2 / 2 = x.y - h_x - h_y is the product of [x, h_x, -1] and [y, -1, h_y]. Three halves
    hold h to float32's precision. Rounding moves a row by |e|, so no distance changes by more than |e_x| + |e_y|:
    from a product follow bounds of the true distance, whatever the features.
    """

    def __init__(self, space: Space, dtype: torch.dtype | None = None, *, trial: bool = True) -> None:
        found = dtype or half_dtype(space.device)
        if found is None:
            raise UnusableError
        width = space.dim + _EXTRA
        super().__init__(space, min(math.isqrt(space.block_bytes // 8), space.block_bytes // (8 * width)))
        self._space, self._dtype, self.trial = space, found, trial
        self.sample = max(1, min(_SAMPLE, space.block_bytes // (16 * width)))
        total = len(space.squares)
        self._rows = None
        if space.copy is not None:
            self._rows = torch.empty((total, width), dtype=found, device=space.device)
        errors = torch.empty(total, dtype=torch.float64, device=space.device)
        residual = torch.zeros((), dtype=torch.float64, device=space.device)
        self._chunk = space.block_bytes // (24 * width)
        for part in blocks(total, self._chunk):
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
        smallest = torch.finfo(found).smallest_normal * torch.finfo(found).eps
        self._lost = 2 * FLOAT32_ROUNDING * (space.dim + 32) * (space.norms + space.norms.max()) ** 2
        self._lost += 4 * (residual + smallest)
        # What rounding the sum to half precision loses, twice that again.
        self._relative = torch.finfo(found).eps

    def scores(self, rows: slice | Tensor) -> Scores:
        """Half of negative squared distances."""
        y = self._left(rows)
        right = torch.cat([y[:, :-_EXTRA], y[:, -3:], y[:, -_EXTRA:-3]], 1).T
        return lambda part: torch.mm(self._left(part), right)

    def least(self, scores: Tensor, rows: Tensor) -> Tensor:
        """As `Engine.least`."""
        squared = scores.double().mul_(-2 * (1 - self._relative)).sub_(self._lost[rows, None])
        return squared.clamp_(min=0).sqrt_().sub_(self._moved[rows, None]).clamp_(min=0)

    def most(self, scores: Tensor, rows: Tensor) -> Tensor:
        """As `Engine.most`."""
        squared = scores.double().mul_(-2 * (1 + self._relative)).add_(self._lost[rows, None])
        return squared.clamp_(min=0).sqrt_().add_(self._moved[rows, None])

    def _left(self, rows: slice | Tensor) -> Tensor:
        if self._rows is not None:
            return self._rows[rows]
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self._space.device)
        return torch.cat([self._rounded(rows[piece])[0] for piece in blocks(len(rows), self._chunk)])

    def _rounded(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Rows for the left, and the largest part of any h that three halves leave out."""
        x = self._space.centred(rows).to(self._dtype)
        rest = torch.linalg.vector_norm(x.float(), dim=1, dtype=torch.float64).square() / 2
        terms = []
        for _ in range(3):
            terms.append(rest.to(self._dtype))
            rest = rest - terms[-1].double()
        minus_one = torch.full((len(x), 3), -1, dtype=self._dtype, device=x.device)
        return torch.cat([x, torch.stack(terms, 1), minus_one], 1), rest.abs().max()


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


class Best:
    """The best of each row, block by block: (B, count) float32 scores, descending, and (B, count) int64 positions."""

    def __init__(self, rows: int, count: int, device: torch.device) -> None:
        self.scores = torch.full((rows, count), -torch.inf, dtype=torch.float32, device=device)
        self.positions = torch.zeros((rows, count), dtype=torch.int64, device=device)

    def update(self, part: slice, block: Tensor, start: int) -> None:
        """Take in scores of the rows `part` for consecutive positions from `start` on."""
        count = self.scores.shape[1]
        found, at = largest(block, min(count, block.shape[1]))
        self.scores[part], chosen = torch.cat([self.scores[part], found], 1).topk(count, dim=1)
        self.positions[part] = torch.cat([self.positions[part], at + start], 1).gather(1, chosen)


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
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
    groups = largest(maxima, count)[1]
    members = torch.arange(_GROUP, device=scores.device)[:, None] * width
    rest = torch.arange(width * _GROUP, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([(groups[:, None] + members).flatten(1), rest], 1)
    values, at = scores.gather(1, columns).float().topk(count, dim=1)
    return values, columns.gather(1, at)


def own_entry(positions: Tensor, rows: Tensor) -> Tensor:
    """Which entry of each list (B, m) to drop: the row itself, or the last where copies pushed it off its list."""
    own = positions == rows[:, None]
    own[:, -1] |= ~own.any(1)
    return own
