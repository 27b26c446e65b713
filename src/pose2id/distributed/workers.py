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


class Workers:
    """Processes of a cluster, each with what `make` gives it; a context, at whose end they end.

    A worker that dies, alone or with its machine, is replaced, and its tasks go to others; those of a worker whose disk
    is full go to others too, and it gets no more.

    Args:
        cluster: to work on.
        make: called once by each worker, gives the function that takes a task. Both travel by pickle.
    """

    def __init__(self, cluster: Cluster, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._ray, self._cluster, self.count = cluster.ray, cluster, cluster.workers
        self._make = self._ray.cloudpickle.dumps(make)
        self._worker = self._ray.remote(_worker_class())
        self._starting: dict[Any, Any] = {}  # workers, by what says that they have begun
        # The tasks (place, task) of each worker that has begun, by their results to come, in the order of its work.
        self._held: dict[Any, dict[Any, tuple[int, Any]]] = {}
        self._full: set[Any] = set()  # workers that get no more
        self._again: deque[tuple[int, Any]] = deque()
        self._deaths: dict[int | None, int] = {}  # by place of a task; None: of workers that had not begun
        for _ in range(cluster.workers):
            self._start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._starting.values(), *self._held]:
            self._ray.kill(worker)

    def _start(self) -> None:
        worker = self._worker.options(**self._cluster.takes, max_restarts=0, max_task_retries=0).remote()
        self._starting[worker.start.remote(pose2id.__version__, self._make)] = worker

    def results(self, tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """What the workers make of tasks: (place of the task, result), as they are done.

        Tasks are drawn as workers become free, so they may come from a generator of any length.

        Args:
            tasks: what the workers' function takes, in order.

        Raises:
            RuntimeError: a worker has another version of pose2id or none; a task has ended three workers; three workers
                ended before they had begun.
            OSError: no worker's disk has room.
            Exception: what the function, or `make`, raised: of one task, and no other result comes.
        """
        self._deaths.clear()
        try:
            yield from self._run(enumerate(tasks))
        finally:
            # What comes of tasks that were given up, for an error or by the caller, is nobody's.
            self._again.clear()
            for held in self._held.values():
                held.clear()

    def _run(self, tasks: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        self._hand_out(tasks)
        # Before a worker has begun nothing can be handed out.
        while any(self._held.values()) or (self._starting and self._full.issuperset(self._held)):
            done = self._wait()
            if done in self._starting:
                self._begin(done)
            elif (result := self._take(done)) is not None:
                yield result
            self._hand_out(tasks)

    def _hand_out(self, tasks: Iterator[tuple[int, Any]]) -> None:
        # One each, then a second, so that the last tasks are spread.
        for count in range(_AHEAD):
            for worker, held in self._held.items():
                if len(held) > count or worker in self._full:
                    continue
                given = self._again.popleft() if self._again else next(tasks, None)
                if given is None:
                    return
                held[worker.work.remote(given[1])] = given

    def _wait(self) -> Any:
        waited_for = [*self._starting, *(result for held in self._held.values() for result in held)]
        while True:
            done, _ = self._ray.wait(waited_for, num_returns=1, timeout=None if self._held else _PATIENCE)
            if done:
                return done[0]
            free = {name: self._ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
            logger.warning("no worker could begin yet: each takes %s, free are %s", self._cluster.takes, free)

    def _begin(self, done: Any) -> None:
        worker = self._starting.pop(done)
        try:
            self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            self._replace(None, "as they began", error)
        else:
            self._held[worker] = {}

    def _take(self, done: Any) -> tuple[int, Any] | None:
        """A task's result; None if it has to be done again."""
        worker = next(worker for worker, held in self._held.items() if done in held)
        try:
            result = self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, OSError) or error.cause.errno != errno.ENOSPC:
                raise error.cause from None
            self._again.append(self._held[worker].pop(done))
            self._full.add(worker)
            logger.warning("a worker gets no more tasks: %s", error.cause)
            if not self._starting and self._full.issuperset(self._held):
                raise error.cause from None
        except self._ray.exceptions.RayError as error:
            self._ray.kill(worker)  # where only its result was lost
            tasks = list(self._held.pop(worker).values())
            self._again += tasks
            place = tasks[0][0]  # it works in order
            if worker not in self._full:
                self._replace(place, f"at task {place + 1}", error)
        else:
            return self._held[worker].pop(done)[0], result
        return None

    def _replace(self, place: int | None, when: str, error: Exception) -> None:
        """Start another worker for one that died."""
        self._deaths[place] = self._deaths.get(place, 0) + 1
        if self._deaths[place] == _DEATHS:
            raise RuntimeError(f"{_DEATHS} workers died {when}, the last of: {error}") from error
        logger.warning("a worker died %s, and is replaced: %s", when, str(error).splitlines()[0])
        self._start()


def _worker_class() -> type:
    # Within a function, so that it travels whole: a machine without pose2id, or with another one, can say so.
    class Worker:
        def start(self, version: str, make: bytes) -> None:
            import pickle  # noqa: PLC0415
            import socket  # noqa: PLC0415

            try:
                from pose2id import __version__ as found  # noqa: PLC0415
            except ImportError:
                found = "none"
            if found != version:
                given = f"{socket.gethostname()} has pose2id {found}, and this process {version}"
                raise RuntimeError(f"each worker must have the version of the process that it works for; {given}.")
            self._work = pickle.loads(make)()

        def work(self, task: Any) -> Any:
            return self._work(task)

    return Worker
