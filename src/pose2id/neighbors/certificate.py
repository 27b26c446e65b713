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
from torch.nn.functional import pad

from pose2id.io.rows import blocks
from pose2id.neighbors.engines import Blocks, Engine, EngineMaker, Products, Scores, UnusableError
from pose2id.neighbors.space import Centred, Space

logger = logging.getLogger(__name__)
warned: set[str] = set()  # what was said once is not said again
_OPEN = 0.1  # the share of a sample's lists that may stay open
# Candidates more, in turn, where too many lists stay open, by `Engine.trial`: what comes after a trial takes long.
_LONGER = {True: (0, 58, 250), False: (0, 36)}
_SAMPLED = 64  # times the sample: so many rows, and looking at a sample costs little
# As measured on tracklets of 10 to 3,000 frames:
_AROUND = 32  # one of so many open lists becomes a centre, if more than one of so many lists is open
_NEARBY = (64, 8, 2)  # one of so many rows may be near a centre, in turn, until enough lists are settled
_SETTLED = 8  # so many lists a centre are enough
_SAVED = 1 << 16  # products that a group must save


def certified(
    space: Centred,
    k: int,
    engines: Sequence[EngineMaker],
    in_float64: Blocks,
    *,
    forced: bool = False,
    near: Tensor | None = None,
) -> Tensor:
    """The k nearest of all rows that ask, in exact order: (B, k) positions, -1 where there are fewer.

    Lists that the first engine finds are scored and proved right; what it leaves open is asked of the next one.

    Args:
        space: the rows.
        k: number of neighbours, at most `space.available`.
        engines: engines, in turn; one that is as precise as float32 is the last that is asked.
        in_float64: products for what all of them leave open.
        forced: raise if an engine cannot be used.
        near: (B, k) float64 to be filled with what `space.near` says of the pairs.
    """
    nearest = torch.full((len(space.asking), k), -1, dtype=torch.int64, device=space.device)
    left = torch.arange(len(nearest), device=space.device)
    for make in engines:
        rows = space.asking[left]
        try:
            engine = make(space)
            nearest[left], distances, certain = _searched(space, engine, rows, k)
        except UnusableError as error:
            name = getattr(getattr(make, "func", make), "__name__", type(make).__name__).lower()
            if forced:
                raise RuntimeError(f"backend={name!r} cannot be used: {error}") from error
            message = f"neighbours are searched without {name}: {error}"
            if str(error) and message not in warned:
                warned.add(message)
                logger.warning(message)
            continue
        if near is not None:
            near[left] = distances
        left = left[~certain]
        if isinstance(engine, Products) or not len(left):
            break
    rest = left
    if isinstance(space, Space) and space.device.type == "cpu":  # a GPU multiplies faster than it starts many groups
        left = _settled_nearby(space, in_float64, nearest, left, k)
    # Every chunk reads all rows once: not too few at a time.
    for part in blocks(len(left), in_float64.rows_at_a_time):
        nearest[left[part]] = _settled(space, in_float64, space.asking[left[part]], k)
    if near is not None:
        near[rest] = _near(space, space.asking[rest], nearest[rest])
    return nearest


def _near(space: Centred, rows: Tensor, positions: Tensor) -> Tensor:
    """(B, k) what `space.near` says of rows and the positions on their lists; infinite where there is none."""
    row, column = torch.nonzero(positions >= 0, as_tuple=True)
    distances = torch.full(positions.shape, torch.inf, dtype=torch.float64, device=rows.device)
    distances[row, column] = space.near(rows[row], positions[row, column])
    return distances


def _searched(space: Centred, engine: Engine, rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `_ranked` makes of an engine's candidates: more than k, for what rounding cannot tell apart.

    Short lists hold a group of up to so many copies at the k-th place. Where they decide too few lists of a sample of
    rows, as among the frames of a video, longer ones may hold the whole group.
    """
    at = torch.arange(0, len(rows), math.ceil(len(rows) / engine.sample), device=rows.device)
    count, most = min(k + min(k, 16) + 2, space.available), -1.0
    sampled = engine.trial or len(rows) >= _SAMPLED * len(at)
    for longer in [min(count + more, space.available) for more in _LONGER[engine.trial]] if sampled else []:
        found = engine.nearest(rows[at], longer)
        if engine.trial:
            _check_bounds(space, engine, *found, rows[at])
        decided = float(_ranked(space, engine, *found, rows[at], k)[2].double().mean())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest (B, k) of `rows` in exact order, their `space.near`, and which (B,) of these lists are certain.

    Candidates (B, m) that may be among them are scored. A list is certain if nothing but candidates can be as near as
    its last member. Those whose distances are too close to tell their order are scored exactly.
    """
    result = torch.empty((len(rows), k), dtype=torch.int64, device=rows.device)
    near = torch.empty((len(rows), k), dtype=torch.float64, device=rows.device)
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
        _order_ties(space, own, others, distances, 3 * wrong, certain[part])
        result[part], near[part] = torch.where(distances[:, :k].isinf(), -1, others[:, :k]), distances[:, :k]
    return result, near, certain


def _order_ties(
    space: Centred, rows: Tensor, positions: Tensor, distances: Tensor, close: Tensor, certain: Tensor
) -> None:
    """Put candidates (B, m) and their distances, ascending but for rounding, in exact order, in lists that are certain.

    Candidates that follow each other at distances of at most `close` (B,) are a group; each keeps its places.
    """
    tied = (distances.diff(dim=1) <= close[:, None]) & distances[:, 1:].isfinite() & certain[:, None]
    group = pad(~tied, (1, 0)).cumsum(1)
    row, column = torch.nonzero(pad(tied, (1, 0)) | pad(tied, (0, 1)), as_tuple=True)
    found = positions[row, column]
    exact = space.exact(rows[row], found)
    order = torch.argsort(found, stable=True)
    for key in (exact, row * (group.shape[1] + 1) + group[row, column]):
        order = order[torch.argsort(key[order], stable=True)]
    positions[row, column], distances[row, column] = found[order], distances[row, column][order]


def _settled_nearby(space: Space, products: Blocks, nearest: Tensor, left: Tensor, k: int) -> Tensor:
    """Settle those of the lists `left` that few rows can be on, as among frames of a video; which others are left.

    Let z be the last on the list of x. Rows farther from a centre c than |c - x| + |x - z| are farther from x than z:
    only those within the largest such radius of a group are multiplied, in float64.
    """
    coarse, most = Products(space), max(1, space.block_bytes // (16 * space.n))
    while _AROUND * len(left) > space.n:
        centres = space.asking[left[:: max(_AROUND, math.ceil(len(left) / most))]]
        scores = coarse.scores(centres)
        for share in _NEARBY:
            group, radius = _groups(space, coarse, scores, centres, nearest, left, share)
            sizes = torch.bincount(group + 1, minlength=len(centres) + 1)[1:]
            sizes[sizes * space.n < _SAVED] = 0
            if sizes.sum() >= _SETTLED * len(centres):
                break
        else:
            break
        radius[sizes == 0] = -1
        near = []  # pairs of a centre and what is within its radius
        for column in coarse.columns:
            within = coarse.least(scores(column).T, centres) <= radius[:, None]
            near.append(torch.nonzero(within) + torch.tensor([0, column.start], device=space.device))
        of, others = torch.cat(near).T
        for c in torch.nonzero(sizes).flatten().tolist():
            mine, around = left[group == c], others[of == c]
            columns = [around[piece] for piece in blocks(len(around), products.columns[0].stop)]
            for part in blocks(len(mine), products.rows_at_a_time):
                nearest[mine[part]] = _settled(space, products, space.asking[mine[part]], k, columns)
        left = left[(group < 0) | (sizes[group] == 0)]
    return left


def _groups(
    space: Space, products: Products, scores: Scores, centres: Tensor, nearest: Tensor, left: Tensor, share: int
) -> tuple[Tensor, Tensor]:
    """(B,) numbers of centres that lists `left` go to, -1: none, and (C,) radii in which is all that may be on them.

    `scores` of the centres. No radius holds more than about one of `share` rows.
    """
    seen = torch.arange(0, space.n, 16, device=space.device)
    most = products.least(scores(seen).T, centres).kthvalue(max(1, len(seen) // share), dim=1, keepdim=True).values
    group, radius = torch.full_like(left, -1), most.new_full((len(centres),), -1)
    for part in blocks(len(left), space.block_bytes // (32 * len(centres))):
        rows, last = space.asking[left[part]], nearest[left[part], -1]
        known = space.distance(space.exact(rows, last.clamp(min=0))).masked_fill_(last < 0, torch.inf)
        wanted = products.most(scores(rows).T, centres).add_(known).mul_(1 + 1e-9)  # more than all rounding
        # Not the nearest, but the first that is hardly farther: few centres have large groups.
        fits = wanted <= torch.minimum(most, 3 * wanted.amin(0))
        row = torch.nonzero(fits.any(0)).flatten()
        chosen = fits[:, row].byte().argmax(0)
        group[part.start + row] = chosen
        radius.scatter_reduce_(0, chosen, wanted[chosen, row], "amax")
    return group, radius


def _settled(
    space: Centred, products: Blocks, rows: Tensor, k: int, columns: Sequence[slice | Tensor] | None = None
) -> Tensor:
    """The k nearest (B, k) of `rows` in exact order: all of `columns` that float64 products don't rule out are scored.

    `columns`: slices, or positions, of rows that are searched; None: all.
    """
    best = _ExactBest(len(rows), k, rows.device)
    scores = products.scores(rows)
    everything = torch.arange(space.n, device=rows.device)
    for column in columns or products.columns:
        others = everything[column]
        block = scores(column).T
        space.exclude(block, rows, column)
        least = products.least(block, rows)
        # Those with the lowest bounds first: they tell of the others which may be as near.
        lowest = least <= least.kthvalue(min(k, least.shape[1]), dim=1, keepdim=True).values
        for chosen in (lowest, ~lowest):
            near = chosen & (least <= space.distance(best.exact[:, -1:])) & least.isfinite()
            row, other = torch.nonzero(near, as_tuple=True)
            best.add(row, others[other], space.exact(rows[row], others[other]))
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
