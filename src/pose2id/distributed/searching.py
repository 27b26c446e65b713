"""Nearest neighbours of the rows of a file by many workers: exact, in pairs of blocks, or in inverted lists."""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pose2id.centralization.nfc import mutual_neighbors
from pose2id.distributed.shared_rows import SharedRows
from pose2id.distributed.workers import Workers, in_order
from pose2id.io.checks import BLOCK_BYTES, duration
from pose2id.io.rows import ChosenRows, Rows, blocks
from pose2id.neighbors.engines import UnusableError, own_entry, usable_faiss
from pose2id.neighbors.members import Compared
from pose2id.neighbors.pieces import first_lists, near_queries, nearest_between, nearest_of_queries, nearest_within
from pose2id.neighbors.search import distinct
from pose2id.neighbors.space import Space

logger = logging.getLogger(__name__)
_BLOCK_BYTES, _LEAST_BLOCK = 64 << 20, 4096  # of a block in float32; rows
_BLOCKS_A_WORKER = 2  # so many blocks or more, so that the last tasks are spread
LONGEST = 24 * 3600  # seconds of an exact search that is not asked for by exact=True
_TIMED = 5  # tasks tell how long all take
_LISTS, _TRAINED, _ROUNDS = 4, 64, 10  # lists a root of n, rows a list to train with, and how often
_SAMPLE = 1000  # rows whose exact mutual edges are found, to choose how many lists are looked at, and again to measure
_WANTED = 0.975  # of a sample's mutual edges must be in the lists that are looked at
_LOOK_BYTES = 8 << 30  # of the lists that rows look at, in one round
_NONE = np.iinfo(np.int64).max  # no candidate
_LOOKS = 8  # times a block's rows, looks at lists in a task: most rows look at several of them
_MOST_PROBES = 1024  # that are chosen unasked
RECALL = 0.9  # of mutual edges: with less, nothing is written
_EXTRA = 8  # candidates beyond those wanted: a product may order near ties wrongly


class NearestSoFar:
    """The k nearest of each row, task by task.

    Attributes:
        positions: (n, k) int64, -1 where there are fewer.
        values: (n, k) float64 each, infinite there; lists are ordered by the first.
    """

    def __init__(self, n: int, k: int, values: int = 1) -> None:
        self.positions = torch.full((n, k), -1, dtype=torch.int64, device="cpu")
        self.values = [torch.full((n, k), torch.inf, dtype=torch.float64, device="cpu") for _ in range(values)]

    def add(self, rows: slice | Tensor, *found: Tensor) -> None:
        """Take in further lists (B, m) of rows: positions and values."""
        kept = (self.positions, *self.values)
        both = [torch.cat([mine[rows], new], 1) for mine, new in zip(kept, found, strict=True)]
        for mine, new in zip(kept, first_lists(*both, k=self.positions.shape[1]), strict=True):
            mine[rows] = new


@dataclass(frozen=True, eq=False)
class _Pair:
    """A task: two blocks of rows, from both sides; or one block within itself."""

    first: slice
    second: slice
    index: tuple[NDArray[np.int64], ...]  # of their rows in the file
    k: int

    @property
    def products(self) -> float:
        one, other = self.first.stop - self.first.start, self.second.stop - self.second.start
        return one * other / (1 if self.first != self.second else 2)

    def run(self, rows: SharedRows) -> tuple[float, Any]:
        """Seconds, and lists of all rows of both blocks, positions counted in these."""
        start, read = time.perf_counter(), rows.read(*self.index)
        if len(self.index) == 1:
            found = nearest_within(read, self.k, rows.centre)
        else:
            found = nearest_between(read, len(self.index[0]), self.k, rows.centre)
        return time.perf_counter() - start, _sent(found)


@dataclass(frozen=True, eq=False)
class _Asking:
    """A task: rows that ask one block; `find` is `nearest_of_queries` or `near_queries`."""

    rows: slice  # of the lists
    asking: NDArray[np.int64]
    block: slice
    index: NDArray[np.int64]
    k: int
    find: Callable[..., tuple[Tensor, ...]]

    def run(self, rows: SharedRows) -> Any:
        read = rows.read(self.index, self.asking)
        return _sent(self.find(read, len(self.asking), self.k, rows.centre))


@dataclass(frozen=True, eq=False)
class _Read:
    """A task: centred rows."""

    index: NDArray[np.int64]

    def run(self, rows: SharedRows) -> NDArray[np.float32]:
        return np.asarray(_centred(rows, self.index)[1].numpy())


@dataclass(frozen=True, eq=False)
class _Assigned:
    """A task: to which lists a block of rows is nearest."""

    index: NDArray[np.int64]
    centroids: Any  # a reference
    probes: int

    def run(self, rows: SharedRows) -> NDArray[np.int32]:
        x = _centred(rows, self.index)[1].numpy()
        found = usable_faiss(gpu=False).knn(x, _fetched(self.centroids), self.probes)[1]
        return np.asarray(found, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class _InLists:
    """A task: some inverted lists, and the rows that look at each.

    `rows` (R,) are positions of all of them in the set and `index` their rows in the file; lists hold places in these.
    """

    rows: NDArray[np.int64]
    index: NDArray[np.int64]
    members: list[NDArray[np.int64]]
    asking: list[NDArray[np.int64]]
    count: int

    def run(self, rows: SharedRows) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Positions of rows that look, so many candidates of each (`_keys`), and how many rows were read."""
        faiss = usable_faiss(gpu=False)
        x = _centred(rows, self.index)[1].numpy()
        asked = np.unique(np.concatenate(self.asking))
        heap = faiss.ResultHeap(len(asked), self.count)
        for members, asking in zip(self.members, self.asking, strict=True):
            distances, found = faiss.knn(x[asking], x[members], min(heap.k, len(members)))
            heap.add_result_subset(np.searchsorted(asked, asking), distances, members[found])
        heap.finalize()
        none = (asked[:, None] == heap.I) | (heap.I < 0)
        return self.rows[asked], np.where(none, _NONE, _keys(heap.D, self.rows[heap.I])), len(self.rows)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """A task: candidates (B, m) of a block of rows, -1 for none, in exact order."""

    block: slice
    rows: NDArray[np.int64]  # positions of all that are compared
    index: NDArray[np.int64]  # their rows in the file
    candidates: NDArray[np.int64]
    k: int

    def run(self, rows: SharedRows) -> Any:
        read = rows.read(self.index)
        space = Space(read, torch.arange(read.n, device=read.device), BLOCK_BYTES, keep_copy=False, centre=rows.centre)
        positions = torch.from_numpy(np.array(self.candidates))
        row, column = torch.nonzero(positions >= 0, as_tuple=True)
        own = np.arange(self.block.start, self.block.stop)[row.numpy()]
        sides = [np.searchsorted(self.rows, side) for side in (own, positions[row, column].numpy())]
        exact = torch.full(positions.shape, torch.inf, dtype=torch.float64, device="cpu")
        exact[row, column] = space.exact(*(torch.from_numpy(side).to(read.device) for side in sides)).cpu()
        return _sent(first_lists(positions, exact, k=self.k))


class ComparedByWorkers(Compared):
    """`Compared` whose lists are searched by workers, those of one process bit for bit.

    Args:
        rows: all rows, L2-normalised.
        pool: workers that read them.
        block: rows of a block; None: as in `block_rows`.
        progress: show bars of tasks on a terminal.
    """

    def __init__(self, rows: Rows, pool: Workers, block: int | None, progress: bool) -> None:
        super().__init__(rows)
        self._pool, self._block = pool, block or block_rows(rows.n, rows.dim, pool.count)
        self._progress = progress

    def _members(self, rows: Rows, members: Tensor, asking: Tensor, count: int) -> tuple[Tensor, Tensor]:
        kept = members[distinct(ChosenRows(rows, members), count, BLOCK_BYTES)[0]]
        nearest = NearestSoFar(len(asking), count, values=2)
        tasks = [
            _Asking(part, asking[part].numpy(), block, kept[block].numpy(), count, near_queries)
            for part in blocks(len(asking), self._block)
            for block in blocks(len(kept), self._block)
        ]
        for place, found in shown(self._pool.results(tasks), "lists", len(tasks), self._progress):
            positions, *values = _received(found)
            nearest.add(tasks[place].rows, _moved(positions, tasks[place].block.start), *values)
        return kept[nearest.positions], nearest.values[1]


def block_rows(n: int, dim: int, count: int) -> int:
    """Rows of a block: by what it may take, and by the number of workers."""
    evenly = math.ceil(n / max(_BLOCKS_A_WORKER * count, math.ceil(4 * dim * n / _BLOCK_BYTES)))
    return max(1, min(n, max(_LEAST_BLOCK, evenly)))


class Recall(NamedTuple):
    """Mutual edges of a random sample of rows, exact and approximate.

    Attributes:
        rows: of the sample.
        edges: exact mutual edges of these.
        found: how many of them the approximate search found.
        false: how many edges it found that are none.
    """

    rows: int
    edges: int
    found: int
    false: int

    @property
    def share(self) -> float:
        """Recall, 1 where the sample has no mutual edge."""
        return self.found / self.edges if self.edges else 1.0

    def __str__(self) -> str:
        """In a sentence."""
        return (
            f"recall of mutual edges {self.share:.4f}: {self.found} of {self.edges} on a sample of {self.rows} rows; "
            f"{self.false} more that are none"
        )


class Searching:
    """A search of the rows `kept` (n,) of a file, by position; `k` neighbours of each.

    Args:
        pool: the workers.
        kept: indices of the rows in the file, ascending.
        dim: columns.
        k: length of the lists, less than n.
        block: rows of a block; None: by what a block may take and by the number of workers.
        put: puts an array where workers can have it.
        progress: show bars of tasks on a terminal.
    """

    def __init__(
        self,
        pool: Workers,
        kept: Tensor,
        dim: int,
        k: int,
        block: int | None,
        put: Callable[[Any], Any],
        *,
        progress: bool = False,
    ) -> None:
        self._pool, self._kept, self._k, self._put, self._progress = pool, kept.numpy(), k, put, progress
        self.n = len(kept)
        self.block = min(self.n, block or block_rows(self.n, dim, pool.count))
        self._blocks = list(blocks(self.n, self.block))

    def exact(self, longest: float) -> Tensor:
        """(n, k) positions of the nearest, those of a search in one process.

        Raises:
            RuntimeError: early tasks tell that all would take more than `longest` seconds.
        """
        nearest, tasks = NearestSoFar(self.n, self._k), list(self._pairs())
        logger.info("exact: pairs of blocks of %d rows, %d tasks", self.block, len(tasks))
        products = sum(task.products for task in tasks)
        # Each worker's first task starts libraries and reads from a cold disk.
        timed = min(self._pool.count + _TIMED, math.ceil(len(tasks) / 2))
        times: list[float] = []
        for task, (seconds, found) in self._results(tasks, "pairs of blocks"):
            times.append(seconds / task.products)
            if len(times) == timed:
                typical = statistics.median(times[self._pool.count :] or times)
                self._check_time(len(tasks), typical * products / self._pool.count, longest)
            positions, exact = _received(found)
            m = task.first.stop - task.first.start
            if task.first == task.second:
                nearest.add(task.first, _moved(positions, task.first.start), exact)
            else:
                nearest.add(task.first, _moved(positions[:m], task.second.start - m), exact[:m])
                nearest.add(task.second, _moved(positions[m:], task.first.start), exact[m:])
        return nearest.positions

    def _pairs(self) -> Iterator[_Pair]:
        for at, first in enumerate(self._blocks):
            for second in self._blocks[at:]:
                index = tuple(self._kept[part] for part in ((first,) if first == second else (first, second)))
                yield _Pair(first, second, index, self._k)

    def _check_time(self, tasks: int, seconds: float, longest: float) -> None:
        workers = self._pool.count
        logger.info("exact: %d tasks by %d workers take about %s", tasks, workers, duration(seconds))
        if seconds > longest:
            given = f"about {seconds / 3600:.3g} hours for {self.n} rows on {workers} workers"
            remedy = "Pass approximate=True, exact=True to wait all the same, or more workers"
            raise RuntimeError(
                f"exact must be True for a search of more than {longest / 3600:g} hours; {given}. {remedy}."
            )

    def approximate(self, k1: int, k2: int, probes: int | None) -> tuple[Tensor, int, int, Recall]:
        """Positions as of `exact`, mostly; how many lists there are, how many each row looks at, and the recall.

        Raises:
            RuntimeError: the recall is below `RECALL`.
        """
        number = min(int(_LISTS * math.sqrt(self.n)), self.n)
        drawn = torch.randperm(self.n, generator=torch.Generator().manual_seed(0), device="cpu")
        sample = drawn[: min(_SAMPLE, self.n // 2)], drawn[-min(_SAMPLE, self.n - self.n // 2) :]
        centroids = self._train(number, drawn.numpy())
        logger.info("approximate: exact mutual edges of a sample of %d rows", sum(map(len, sample)))
        edges = self._edges(torch.cat(sample), k1, k2)
        if probes is None:
            chosen = edges[torch.isin(edges[:, 0], sample[0])]
            probes = self._probes(chosen, centroids)
        probes = min(probes, number)
        logger.info("approximate: choosing %d of %d lists for each row", probes, number)
        positions = self._in_lists(centroids, probes)
        row, rank = torch.nonzero(mutual_neighbors(positions, k1, k2)[sample[1]], as_tuple=True)
        own = sample[1][row]
        found = own * self.n + positions[own, rank]
        exact = edges[torch.isin(edges[:, 0], sample[1])]
        right = int(torch.isin(exact[:, 0] * self.n + exact[:, 1], found).sum())
        recall = Recall(len(sample[1]), len(exact), right, len(found) - right)
        logger.info("approximate: %s", recall)
        if recall.share < RECALL:
            more = f"Pass nprobe={min(2 * probes, number)}, or leave" if probes < number else "Leave"
            remedy = f"{more} approximate out; nothing is written"
            raise RuntimeError(
                f"nprobe must give a recall of at least {RECALL}, got nprobe={probes}, {recall}. {remedy}."
            )
        return positions, number, probes, recall

    def _train(self, number: int, drawn: NDArray[np.int64]) -> NDArray[np.float32]:
        """Centroids (number, D) of centred rows."""
        faiss = usable_faiss(gpu=False)
        rows = np.sort(drawn[: _TRAINED * number])
        logger.info("approximate: training %d lists on %d rows", number, len(rows))
        index = [self._kept[rows[part]] for part in blocks(len(rows), self.block)]
        parts = self._shown([_Read(part) for part in index], "reading")
        x = np.concatenate(list(in_order(parts)))
        means = faiss.Kmeans(x.shape[1], number, niter=_ROUNDS, min_points_per_centroid=1, seed=0)
        means.train(x)
        return np.asarray(means.centroids, dtype=np.float32)

    def _edges(self, sample: Tensor, k1: int, k2: int) -> Tensor:
        """(E, 2) exact mutual edges of a sample of rows, from these."""
        nearest = self._of(sample)[:, :k1]
        others = nearest.unique()
        back = self._of(others)[:, :k2]
        row, rank = torch.nonzero(nearest >= 0, as_tuple=True)
        one, other = sample[row], nearest[row, rank]
        looks_back = (back[torch.searchsorted(others, other)] == one[:, None]).any(1)
        return torch.stack([one, other], 1)[looks_back]

    def _of(self, asking: Tensor) -> Tensor:
        """(B, k) exact nearest others of some rows."""
        nearest, index = NearestSoFar(len(asking), self._k + 1), self._kept[asking.numpy()]
        tasks = [
            _Asking(slice(None), index, block, self._kept[block], self._k + 1, nearest_of_queries)
            for block in self._blocks
        ]
        for task, found in self._results(tasks, "sample"):
            positions, exact = _received(found)
            nearest.add(task.rows, _moved(positions, task.block.start), exact)
        return nearest.positions[~own_entry(nearest.positions, asking)].view(len(asking), -1)

    def _probes(self, edges: Tensor, centroids: NDArray[np.float32]) -> int:
        """How many lists must be looked at, so that both sides of most edges are in the other one's lists."""
        if not len(edges):
            return 1
        ends, place = edges.flatten().unique(return_inverse=True)
        most = min(len(centroids), _MOST_PROBES)
        task = _Assigned(self._kept[ends.numpy()], self._put(centroids), most)
        ((_, order),) = self._results([task], "sample")
        of, ranks = torch.from_numpy(np.array(order)).long(), place.view(-1, 2)
        # Which rank the list of the other end has for each; the last one where it is further down.
        there = [of[ranks[:, a]] == of[ranks[:, b], :1] for a, b in ((0, 1), (1, 0))]
        first, second = (torch.where(at.any(1), at.int().argmax(1), most - 1) for at in there)
        needed = torch.maximum(first, second).sort().values + 1
        return int(needed[min(len(needed) - 1, math.ceil(_WANTED * len(needed)))])

    def _in_lists(self, centroids: NDArray[np.float32], probes: int) -> Tensor:
        """(n, k) positions of the nearest in lists, by exact distance."""
        near = self._near(centroids, probes)
        nearest = NearestSoFar(self.n, self._k)
        # One by one, as workers ask: each holds its rows' candidates, all of them another row in the worst case.
        parts = list(blocks(self.n, max(1, 2 * self.block // (near.shape[1] + 1))))
        logger.info("approximate: candidates by exact distance, %d tasks", len(parts))
        tasks = (self._candidates(part, _positions(near[part])) for part in parts)
        for place, found in self._shown(tasks, "exact order", len(parts)):
            nearest.add(parts[place], *_received(found))
        return nearest.positions

    def _near(self, centroids: NDArray[np.float32], probes: int) -> NDArray[np.int64]:
        """(n, k + some) candidates of each row, by float32 distances: see `_keys`."""
        faiss = usable_faiss(gpu=False)
        shared = self._put(centroids)
        own = self._looks(slice(0, self.n), shared, 1)[:, 0]
        members, starts = np.argsort(own, kind="stable"), np.searchsorted(np.sort(own), np.arange(len(centroids) + 1))
        near = np.full((self.n, self._k + _EXTRA), _NONE)
        order, read = _neighboring(centroids), 0
        # So many rows at a time as what they look at may take: more rounds read the lists' members more often.
        for part in blocks(self.n, max(1, _LOOK_BYTES // (4 * probes))):
            looks = self._looks(part, shared, probes)
            bounds = np.asarray(
                faiss.matrix_bucket_sort_inplace(looks, nbucket=len(centroids), nt=torch.get_num_threads())
            )
            groups = self._groups(order, np.diff(starts), np.diff(bounds))
            logger.info("approximate: searching the lists, %d tasks", len(groups))
            tasks = (
                self._in_group(
                    [members[starts[at] : starts[at + 1]] for at in group],
                    # Which rows look at a list comes out of the sort in any order.
                    [part.start + np.sort(looks.flat[bounds[at] : bounds[at + 1]]).astype(np.int64) for at in group],
                )
                for group in groups
            )
            for _, (rows, keys, count) in self._shown(tasks, "searching lists", len(groups)):
                near[rows] = np.sort(np.concatenate([near[rows], keys], 1), axis=1)[:, : near.shape[1]]
                read += count
        logger.info("approximate: workers read each row %.1f times for that", read / self.n)
        return near

    def _looks(self, part: slice, centroids: Any, probes: int) -> NDArray[np.int32]:
        """(B, probes) lists that are nearest to some rows."""
        looks = np.empty((part.stop - part.start, probes), dtype=np.int32)
        places = list(blocks(len(looks), self.block))
        of_part = self._kept[part]
        tasks = [_Assigned(of_part[place], centroids, probes) for place in places]
        for at, found in self._shown(tasks, "choosing lists"):
            looks[places[at]] = found
        return looks

    def _groups(self, order: list[int], members: NDArray[Any], asking: NDArray[Any]) -> list[list[int]]:
        """Lists that make a task: as many, in order, as have so many members and rows that look at them."""
        order = [at for at in order if members[at] and asking[at]]
        ends = np.cumsum([members[at] + asking[at] for at in order]) // (_LOOKS * self.block)
        return [[order[i] for i in np.flatnonzero(ends == end)] for end in np.unique(ends)]

    def _candidates(self, block: slice, candidates: NDArray[np.int64]) -> _Candidates:
        rows = np.unique(np.concatenate([np.arange(block.start, block.stop), candidates[candidates >= 0]]))
        return _Candidates(block, rows, self._kept[rows], candidates, self._k)

    def _in_group(self, members: list[NDArray[np.int64]], asking: list[NDArray[np.int64]]) -> _InLists:
        rows = np.unique(np.concatenate([*members, *asking]))
        here, there = ([np.searchsorted(rows, part) for part in parts] for parts in (members, asking))
        return _InLists(rows, self._kept[rows], here, there, self._k + 1 + _EXTRA)

    def _results(self, tasks: list[Any], what: str) -> Iterator[tuple[Any, Any]]:
        for place, found in self._shown(tasks, what):
            yield tasks[place], found

    def _shown(self, tasks: Iterable[Any], what: str, total: int | None = None) -> Iterator[tuple[int, Any]]:
        total = len(tasks) if isinstance(tasks, list) else total
        return shown(self._pool.results(tasks), what, total, self._progress)


def shown(
    results: Iterator[tuple[int, Any]], what: str, total: int | None, progress: bool
) -> Iterator[tuple[int, Any]]:
    """The results of tasks, with a bar on a terminal."""
    yield from tqdm(results, desc=what, total=total, unit="task", disable=None if progress else True)


def _keys(distances: NDArray[np.float32], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number for a squared distance and a position, which orders by both: bits of floats that are not negative."""
    bits = (np.maximum(distances, 0) + np.float32(0)).view(np.int32).astype(np.int64)
    return np.asarray((bits << 32) | positions)


def _positions(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions in keys, -1 where there is none."""
    return np.where(keys == _NONE, -1, keys & 0xFFFFFFFF)


def check_faiss() -> None:
    """RuntimeError where this process cannot search approximately."""
    try:
        if sys.platform != "linux":
            # faiss and torch bring an OpenMP runtime each, and the process may abort.
            raise UnusableError("it is used on Linux alone.")
        usable_faiss(gpu=False)
    except UnusableError as error:
        raise RuntimeError(f"approximate must be False where faiss cannot be used: {error}") from error


def _neighboring(centroids: NDArray[np.float32]) -> list[int]:
    """Lists in an order in which near ones are together: the same rows look at them."""
    faiss = usable_faiss(gpu=False)
    means = faiss.Kmeans(centroids.shape[1], math.isqrt(len(centroids)), niter=_ROUNDS, min_points_per_centroid=1)
    means.train(centroids)
    found: list[int] = np.argsort(means.assign(centroids)[1], kind="stable").tolist()
    return found


def _centred(rows: SharedRows, index: NDArray[np.int64]) -> tuple[Space, Tensor]:
    """The float32 rows in which lists are made."""
    read = rows.read(index)
    space = Space(read, torch.arange(read.n, device=read.device), BLOCK_BYTES, centre=rows.centre)
    return space, space.centred(slice(0, space.n)).cpu()


def _moved(positions: Tensor, start: int) -> Tensor:
    return torch.where(positions < 0, -1, positions + start)


def _sent(found: tuple[Tensor, ...]) -> Any:
    return tuple(values.cpu().numpy() for values in found)


def _received(found: Any) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.array(values)) for values in found)  # what Ray gives is read-only


def _fetched(reference: Any) -> Any:
    import ray  # noqa: PLC0415 - an extra

    return ray.get(reference)
