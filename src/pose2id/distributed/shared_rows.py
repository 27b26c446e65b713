"""The rows of a file on every worker: mapped where the machine sees that file, else sent through Ray."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pose2id.distributed.cluster import Cluster
from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import Rows, blocks
from pose2id.neighbors.space import Centre

_Look = tuple[int, int, str]  # at a file: bytes, time of last change, checksum of its first and last MiB


class SharedRows:
    """Rows of an .npy file that workers can read; made by `share`, and pickled to them.

    Attributes:
        centre: what all rows are centred and scaled by.
        sent: the blocks of rows in Ray's object store; None: every machine maps the file.
    """

    def __init__(
        self, path: Path, normalize: bool, centre: Centre, sent: tuple[list[Any], int] | None, look: _Look | None
    ) -> None:
        self._path, self._normalize, self.centre, self.sent, self._look = path, normalize, centre, sent, look
        self._mapped: NDArray[Any] | None = None

    def read(self, *indices: NDArray[np.int64]) -> Rows:
        """The rows at some indices, one array's after the other's; on the worker's GPU where it has one."""
        array = np.concatenate([self._read(index) for index in indices])
        if torch.cuda.is_available():
            return Rows(torch.from_numpy(array).cuda(), "features", normalize=self._normalize)
        return Rows(array, "features", normalize=self._normalize)

    def _read(self, index: NDArray[np.int64]) -> NDArray[Any]:
        if self.sent is None:
            if self._mapped is None:
                self._check_file()
                self._mapped = np.load(self._path, mmap_mode="r")
            return np.asarray(_taken(self._mapped, index))
        import ray  # noqa: PLC0415 - an extra

        refs, size = self.sent
        order, found = np.argsort(index // size, kind="stable"), []
        for at in np.unique(index // size).tolist():
            found.append(_taken(ray.get(refs[at]), index[index // size == at] - at * size))
        result = np.empty((len(index), found[0].shape[1]), found[0].dtype)
        result[order] = np.concatenate(found)
        return result

    def _check_file(self) -> None:
        # A machine that joined later was not asked when the rows were shared.
        found = _look()(str(self._path))
        if found == self._look:
            return
        given = f"{socket.gethostname()} has no {self._path}"
        if found is not None and self._look is not None:
            names = ("size", "time of last change", "checksum of the first and last MiB")
            differs = [name for name, theirs, mine in zip(names, found, self._look, strict=True) if theirs != mine]
            given = f"{socket.gethostname()} has another {self._path} (another {', '.join(differs)})"
        remedy = (
            "Leave the file as it is while workers run, and start again: machines are asked anew, and get rows sent"
        )
        raise RuntimeError(f"features must be the same file on every machine that maps them; {given}. {remedy}.")


def share(cluster: Cluster, path: Path, features: NDArray[Any], normalize: bool, centre: Centre) -> SharedRows:
    """Rows for the workers of a cluster.

    A machine sees the file if it has one of that name, with the same size, time of last change, and checksum of its
    first and last MiB. Where all machines see it they map it; else all blocks go into Ray's object store.
    """
    path = path.resolve()
    mine = _look()(str(path))
    if _seen_by_all(cluster, str(path), mine):
        return SharedRows(path, normalize, centre, None, mine)
    size = max(1, BLOCK_BYTES // (features.itemsize * features.shape[1]))
    sent = [cluster.ray.put(np.array(features[block])) for block in blocks(len(features), size)]
    return SharedRows(path, normalize, centre, (sent, size), None)


def _seen_by_all(cluster: Cluster, path: str, mine: _Look | None) -> bool:
    ray = cluster.ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    ask = ray.remote(num_cpus=0)(_look())
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    answers = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path)
        for node in nodes
    }
    for node, answer in answers.items():
        try:
            if ray.get(answer) != mine:
                return False
        except ray.exceptions.RayError:
            # One that has gone meanwhile has no say; of any other nothing is known.
            if any(other["NodeID"] == node and other["Alive"] for other in ray.nodes()):
                return False
    return True


def _look() -> Callable[[str], _Look | None]:
    # Within a function, so that it travels whole, to a machine without pose2id too: that is said later.
    def look(path: str) -> _Look | None:
        import hashlib  # noqa: PLC0415
        import os  # noqa: PLC0415

        try:
            with open(path, "rb") as file:
                about = os.fstat(file.fileno())
                ends = file.read(1 << 20)
                file.seek(max(0, about.st_size - (1 << 20)))
                ends += file.read(1 << 20)
        except OSError:
            return None
        return about.st_size, about.st_mtime_ns, hashlib.sha256(ends).hexdigest()

    return look


def _taken(array: NDArray[Any], index: NDArray[np.int64]) -> NDArray[Any]:
    """Rows of an array; of consecutive ones without a copy."""
    if len(index) and index[-1] - index[0] + 1 == len(index) and (np.diff(index) == 1).all():
        return array[index[0] : index[-1] + 1]
    return array[index]


def working(rows: SharedRows) -> Callable[[], Callable[[Any], Any]]:
    """What makes a worker's function, which runs tasks on the rows."""
    return functools.partial(_run_on, rows)


def _run_on(rows: SharedRows) -> Callable[[Any], Any]:
    return lambda task: task.run(rows)
