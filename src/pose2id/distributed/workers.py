"""Workers load once what they work with and take tasks until none is left; a worker that dies loses none of them."""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pose2id
from pose2id.distributed.cluster import Cluster

logger = logging.getLogger(__name__)
_AHEAD = 2  # tasks that a worker holds: the next one is there when one ends
_DEATHS = 3  # of workers: while one task was theirs, or before they had begun
_PATIENCE = 30  # seconds without any worker, before that is said
_ANSWER = 1  # seconds for a worker without a task to say that it lives


class Workers:
    """Processes of a cluster, each with what `make` gives it; a context, at whose end they end.

    A worker that dies, alone or with its machine, or whose disk is full, has its tasks go to others; one that dies is
    replaced.

    Args:
        cluster: to work on.
        make: called once by each worker, gives the function that takes a task. Both travel by pickle; references to
            objects of Ray in them are followed.
    """

    def __init__(self, cluster: Cluster, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._ray, self._cluster, self.count = cluster.ray, cluster, cluster.workers
        self._make = make
        self._worker = self._ray.remote(_worker_class())
        self._starting: dict[Any, Any] = {}  # workers, by what says that they are there, and then that they have begun
        self._checked: set[Any] = set()  # those of them that have the right version
        # The tasks (place, task) of each worker that has begun, by their results to come, in the order of its work.
        self._held: dict[Any, dict[Any, tuple[int, Any]]] = {}
        self._again: deque[tuple[int, Any]] = deque()
        self._deaths: dict[int | None, int] = {}  # by place of a task; None: of workers that had not begun
        self._full: OSError | None = None  # of the last worker without room on its disk

    def __enter__(self) -> Workers:
        for _ in range(self.count):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._starting.values(), *self._held]:
            self._ray.kill(worker)
        del self._make  # what it refers to may fill the object store

    def _start(self) -> None:
        worker = self._worker.options(**self._cluster.takes, max_restarts=0, max_task_retries=0).remote()
        self._starting[worker.check.remote(pose2id.__version__)] = worker

    def results(self, tasks: Iterable[Any], ahead: int | None = None) -> Iterator[tuple[int, Any]]:
        """What the workers make of tasks: (place of the task, result), as they are done.

        Tasks are drawn as workers become free, so they may come from a generator of any length.

        Args:
            tasks: what the workers' function takes, in order.
            ahead: how many tasks are drawn at most from the first whose result is open on; None: any number.

        Raises:
            RuntimeError: a worker has another version of pose2id or none; a task has ended three workers; three workers
                ended before any had begun; an error that pickle cannot carry.
            OSError: no worker's disk has room.
            Exception: what the function, or `make`, raised: of one task, and no other result comes.
        """
        self._deaths.clear()
        try:
            yield from self._run(enumerate(tasks), ahead)
        finally:
            # What comes of tasks that were given up, for an error or by the caller, is nobody's.
            self._again.clear()
            for held in self._held.values():
                held.clear()

    def _run(self, tasks: Iterator[tuple[int, Any]], ahead: int | None) -> Iterator[tuple[int, Any]]:
        waiting = _Ahead(tasks, ahead)
        self._replace_idle()
        self._hand_out(waiting)
        # Before a worker has begun nothing can be handed out.
        while any(self._held.values()) or (self._starting and not self._held):
            done = self._wait()
            if done in self._starting:
                self._begin(done)
            elif (result := self._take(done)) is not None:
                yield result
            if self._again:
                self._replace_idle()
            self._hand_out(waiting)
        if not self._held:
            remedy = "Look into the log for what became of them, and start again"
            raise self._full or RuntimeError(f"workers must be left while there are tasks, and all are gone. {remedy}.")

    def _replace_idle(self) -> None:
        """Replace workers that died while they had no task: the next one they were handed would be taken for guilty."""
        asked = {worker.check.remote(pose2id.__version__): worker for worker, held in self._held.items() if not held}
        if not asked:
            return
        # Who does not answer in time may still be at a task that was given up.
        for answer in self._ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER)[0]:
            try:
                self._ray.get(answer)
            except self._ray.exceptions.RayError as error:
                self._given_up(asked[answer])
                logger.warning("a worker died while it had no task, and is replaced: %s", _first_line(error))
                self._start()

    def _hand_out(self, tasks: _Ahead) -> None:
        # One each, then a second, so that the last tasks are spread.
        for count in range(_AHEAD):
            for worker, held in self._held.items():
                if len(held) > count:
                    continue
                given = self._again.popleft() if self._again else tasks.next(self._oldest())
                if given is None:
                    return
                held[worker.work.remote(given[1])] = given

    def _oldest(self) -> int | None:
        """The first task whose result is open."""
        return min((place for held in self._held.values() for place, _ in held.values()), default=None)

    def _wait(self) -> Any:
        waited_for = [*self._starting, *(result for held in self._held.values() for result in held)]
        while True:
            some = any(self._held.values())
            done, _ = self._ray.wait(waited_for, num_returns=1, timeout=None if some else _PATIENCE)
            if done:
                return done[0]
            if self._checked.intersection(self._starting.values()):
                continue  # they are there, and load what they work with
            if self._full is not None:
                raise self._full
            free = {name: self._ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
            logger.warning("no worker could begin yet: each takes %s, free are %s", self._cluster.takes, free)

    def _begin(self, done: Any) -> None:
        """A worker is there, and gets what it works with; or it has that, and is ready."""
        worker = self._starting.pop(done)
        try:
            self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            # Where others work, it may be this one's machine: a full disk, no network.
            if worker not in self._checked or not self._held:
                raise error.cause from error
            self._ray.kill(worker)
            self._replace(None, "as they began", error.cause)
        except self._ray.exceptions.UnserializableException as error:
            raise RuntimeError(f"a worker could not begin, for an error that cannot travel: {error}") from error
        except self._ray.exceptions.RayError as error:
            self._replace(None, "as they began", error)
        else:
            if worker in self._checked:
                self._held[worker] = {}
                self._deaths.pop(None, None)
            else:
                self._checked.add(worker)
                self._starting[worker.make.remote(self._make)] = worker

    def _take(self, done: Any) -> tuple[int, Any] | None:
        """A task's result; None if it has to be done again."""
        worker = next(worker for worker, held in self._held.items() if done in held)
        try:
            result = self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, OSError) or error.cause.errno != errno.ENOSPC:
                raise error.cause from error
            self._full = error.cause
            self._again += self._given_up(worker)
            logger.warning("a worker gets no more tasks: %s", error.cause)
        except self._ray.exceptions.UnserializableException as error:
            raise RuntimeError(f"a task failed with an error that cannot travel: {error}") from error
        except self._ray.exceptions.RayError as error:
            tasks = self._given_up(worker)
            self._again += tasks
            place = tasks[0][0]  # it works in order
            self._replace(place, f"at task {place + 1}", error)
        else:
            return self._held[worker].pop(done)[0], result
        return None

    def _given_up(self, worker: Any) -> list[tuple[int, Any]]:
        """What a worker held, that gets no more."""
        self._ray.kill(worker)  # it may live, where only its result was lost
        return list(self._held.pop(worker).values())

    def _replace(self, place: int | None, when: str, error: Exception) -> None:
        """Start another worker for one that died."""
        self._deaths[place] = self._deaths.get(place, 0) + 1
        if self._deaths[place] < _DEATHS:
            logger.warning("a worker died %s, and is replaced: %s", when, _first_line(error))
            self._start()
        elif place is None and (self._held or self._starting):
            logger.warning("a worker died %s, and is not replaced: %s", when, _first_line(error))
        else:
            remedy = "Give each worker more memory (fewer workers), or look at what they were at"
            raise RuntimeError(f"{_DEATHS} workers died {when}. {remedy}. The last died of: {error}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def in_order(results: Iterable[tuple[int, Any]]) -> Iterator[Any]:
    """The results of `Workers.results` in the order of their tasks; `ahead` bounds how many wait for an earlier one."""
    early: dict[int, Any] = {}
    due = 0
    for place, result in results:
        early[place] = result
        while due in early:
            yield early.pop(due)
            due += 1


class _Ahead:
    """Tasks with their places, drawn one by one, and none too far ahead of the oldest open one."""

    def __init__(self, tasks: Iterator[tuple[int, Any]], ahead: int | None) -> None:
        self._tasks, self._ahead, self._next = tasks, ahead, 0

    def next(self, oldest: int | None) -> tuple[int, Any] | None:
        if self._ahead is not None and oldest is not None and self._next - oldest >= self._ahead:
            return None
        given = next(self._tasks, None)
        self._next += given is not None
        return given


def _worker_class() -> type:
    # Within a function, so that it travels whole: a machine without pose2id, or with another one, can say so.
    class Worker:
        def check(self, version: str) -> None:
            import socket  # noqa: PLC0415

            try:
                from pose2id import __version__ as found  # noqa: PLC0415
            except ImportError:
                found = "none"
            if found != version:
                given = f"{socket.gethostname()} has pose2id {found}, and this process {version}"
                raise RuntimeError(f"each worker must have the version of the process that it works for; {given}.")

        def make(self, make: Any) -> None:
            self._work = make()

        def work(self, task: Any) -> Any:
            return self._work(task)

    return Worker
