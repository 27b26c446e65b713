"""Lists of nearest neighbours, proved right for any engine and any distance.

Candidates that may be among the nearest are scored, and bounds on all rounding prove most lists right (`_ranked`). What
an engine leaves open goes to the next one, what all leave open to float64 products (`_settled`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pose2id.io.rows import blocks
from pose2id.neighbors.engines import Blocks, Engine, EngineMaker, Products, UnusableError
from pose2id.neighbors.space import Centred

logger = logging.getLogger(__name__)
warned: set[str] = set()  # what was said once is not said again
_OPEN = 0.1  # the share of a sample's lists that may stay open
_LONGER = (0, 58, 250)  # candidates more, in turn, where too many lists stay open
_SAMPLED = 64  # times the sample: so many rows, and looking at a sample costs little


def certified(
    space: Centred, k: int, engines: Sequence[EngineMaker], in_float64: Blocks, *, forced: bool = False
) -> Tensor:
    """The k nearest of all rows that ask, in exact order: (B, k) positions, -1 where there are fewer.

    Lists that the first engine finds are scored and proved right; what it leaves open is asked of the next one.

    Args:
        space: the rows.
        k: number of neighbours, at most `space.available`.
        engines: engines, in turn; one that is as precise as float32 is the last that is asked.
        in_float64: products for what all of them leave open.
        forced: raise if an engine cannot be used.
    """
    nearest = torch.empty((len(space.asking), k), dtype=torch.int64, device=space.device)
    left = torch.arange(len(nearest), device=space.device)
    for make in engines:
        rows = space.asking[left]
        try:
            engine = make(space)
            nearest[left], certain = _searched(space, engine, rows, k)
        except UnusableError as error:
            name = getattr(getattr(make, "func", make), "__name__", type(make).__name__).lower()
            if forced:
                raise RuntimeError(f"backend={name!r} cannot be used: {error}") from error
            message = f"neighbours are searched without {name}: {error}"
            if str(error) and message not in warned:
                warned.add(message)
                logger.warning(message)
            continue
        left = left[~certain]
        if isinstance(engine, Products) or not len(left):
            break
    # Every chunk reads all rows once: not too few at a time.
    for part in blocks(len(left), in_float64.rows_at_a_time):
        nearest[left[part]] = _settled(space, in_float64, space.asking[left[part]], k)
    return nearest


def _searched(space: Centred, engine: Engine, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `_ranked` makes of an engine's candidates: more than k, for what rounding cannot tell apart.

    Short lists hold a group of up to so many copies at the k-th place. Where they decide too few lists of a sample of
    rows, as among the frames of a video, longer ones may hold the whole group.
    """
    at = torch.arange(0, len(rows), math.ceil(len(rows) / engine.sample), device=rows.device)
    count, most = min(k + min(k, 16) + 2, space.available), -1.0
    sampled = engine.trial or len(rows) >= _SAMPLED * len(at)
    for longer in [min(count + more, space.available) for more in _LONGER] if sampled else []:
        found = engine.nearest(rows[at], longer)
        _check_bounds(space, engine, *found, rows[at])
        decided = float(_ranked(space, engine, *found, rows[at], k)[1].double().mean())
        if decided > most:
            count, most = longer, decided
        if decided >= 1 - _OPEN or longer == space.available:
            break
    if engine.trial and most < 1 - _OPEN:
        raise UnusableError
    scores, positions = engine.nearest(rows, count)
    _check_bounds(space, engine, scores[at], positions[at], rows[at])  # whatever its arithmetic
    return _ranked(space, engine, scores, positions, rows, k)


def _check_bounds(space: Centred, engine: Engine, scores: Tensor, positions: Tensor, rows: Tensor) -> None:
    for rank in (slice(0, 1), slice(-1, None)):
        exact = space.distance(space.exact(rows, positions[:, rank].flatten()))[:, None]
        least, most = engine.least(scores[:, rank], rows), engine.most(scores[:, rank], rows)
        if not (least.isinf() | ((least <= exact) & (exact <= most))).all():
            raise UnusableError("its distances are further off than its arithmetic can be.")


def _ranked(
    space: Centred, engine: Engine, scores: Tensor, positions: Tensor, rows: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k nearest (B, k) of `rows` in exact order, and which (B,) of these lists are certain.

    Candidates (B, m) that may be among them are scored. A list is certain if nothing but candidates can be as near as
    its last member. Where two of its distances are too close to tell their order, they are scored exactly.
    """
    result = torch.empty((len(rows), k), dtype=torch.int64, device=rows.device)
    certain = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
    width = positions.shape[1]
    for part in blocks(len(rows), space.block_bytes // (64 * width)):
        own, others, score = rows[part], positions[part], scores[part]
        least = engine.least(score, own)
        floor = least[:, -1] if width < space.available else torch.full_like(least[:, -1], torch.inf)
        possible = (least <= engine.most(score[:, k - 1 : k], own)) & least.isfinite()
        row, column = torch.nonzero(possible, as_tuple=True)
        distances = torch.full_like(least, torch.inf)
        distances[row, column] = space.near(own[row], others[row, column])
        distances, order = distances.sort(dim=1)
        others = others.gather(1, order)
        wrong = space.wrong(own, distances[:, k - 1])
        certain[part] = (floor > distances[:, k - 1] + wrong) | floor.isinf()
        tied = (distances[:, : k + 1].diff(dim=1) <= 3 * wrong[:, None]).any(1) & certain[part]
        tied = torch.nonzero(tied).flatten()
        for piece in blocks(len(tied), space.block_bytes // (64 * width)):
            again = tied[piece]
            row, column = torch.nonzero(distances[again].isfinite(), as_tuple=True)
            best = _ExactBest(len(again), k, rows.device)
            best.add(row, others[again[row], column], space.exact(own[again[row]], others[again[row], column]))
            others[again, :k] = best.positions
        result[part] = torch.where(distances[:, :k].isinf(), -1, others[:, :k])
    return result, certain


def _settled(space: Centred, products: Blocks, rows: Tensor, k: int) -> Tensor:
    """The k nearest (B, k) of `rows` in exact order: all that float64 products don't rule out are scored."""
    best = _ExactBest(len(rows), k, rows.device)
    scores = products.scores(rows)
    for column in products.columns:
        block = scores(column).T
        space.exclude(block, rows, column)
        least = products.least(block, rows)
        # Those with the lowest bounds first: they tell of the others which may be as near.
        lowest = least <= least.kthvalue(min(k, least.shape[1]), dim=1, keepdim=True).values
        for chosen in (lowest, ~lowest):
            near = chosen & (least <= space.distance(best.exact[:, -1:])) & least.isfinite()
            row, other = torch.nonzero(near, as_tuple=True)
            best.add(row, other + column.start, space.exact(rows[row], other + column.start))
    return torch.where(best.exact.isinf(), -1, best.positions)


class _ExactBest:
    """The k nearest of each of some rows, pairs by pairs: (B, k) positions by exact distance, then by position."""

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.positions = torch.full((rows, k), 2**62, dtype=torch.int64, device=device)
        self.exact = torch.full((rows, k), torch.inf, dtype=torch.float64, device=device)

    def add(self, row: Tensor, positions: Tensor, exact: Tensor) -> None:
        """Take in pairs (C,) of row numbers and positions, with what they are ordered by."""
        rows, k = self.positions.shape
        own = torch.arange(rows, device=row.device).repeat_interleave(k)
        row = torch.cat([own, row])
        positions = torch.cat([self.positions.flatten(), positions])
        exact = torch.cat([self.exact.flatten(), exact])
        order = torch.argsort(positions, stable=True)
        for key in (exact, row):
            order = order[torch.argsort(key[order], stable=True)]
        sizes = torch.bincount(row, minlength=rows)
        chosen = order[(sizes.cumsum(0) - sizes)[:, None] + torch.arange(k, device=row.device)]
        self.positions, self.exact = positions[chosen], exact[chosen]
