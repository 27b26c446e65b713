"""A Ray cluster to work on: one that runs, or one that is started on this machine for the job."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from pose2id.io.checks import checked_count, require_modules

logger = logging.getLogger(__name__)
_SECONDS = 5  # for a cluster's head to answer


def _ray_module() -> ModuleType:
    require_modules('Several processes or machines need the extra "distributed"', '"pose2id[distributed]"', "ray")
    import ray  # noqa: PLC0415 - an extra

    return ray


@contextlib.contextmanager
def connected(address: str | None = None, workers: int | None = None) -> Iterator[Cluster]:
    """A connection to a Ray cluster, given back at the end.

    Args:
        address: "auto" (the cluster of this machine, as `ray start` left it), "host:port" of its head, or
            "ray://host:port" of Ray's client server. None: a cluster of this process's own, on this machine. Where
            Ray is connected already, that connection is used whatever the address, and kept.
        workers: how many there are to be; None: one a GPU, or where there is none, one a machine.

    Raises:
        ConnectionError: nothing answers at the address.
        ImportError: Ray is not installed.
    """
    count = None if workers is None else checked_count(workers, "workers")
    where = None if address in (None, "local", "auto") else _host_and_port(address)
    ray = _ray_module()
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, where)
    try:
        yield Cluster(ray, count)
    finally:
        if ours:
            ray.shutdown()


class Cluster:
    """What a connected cluster can hold: how many workers, and what each takes of it."""

    def __init__(self, ray: Any, workers: int | None) -> None:
        self.ray = ray
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        cores = [node["CPU"] for node in nodes if node.get("CPU", 0) > 0]  # a head may be there to hand out alone
        self.workers = workers or gpus or max(1, len(cores))
        # What Ray gives out for one worker, on one machine: a GPU, or where there are more workers, a part of one; and
        # as many cores as are there for that, which are the threads that it computes with.
        if gpus:
            share = 1 / math.ceil(self.workers / gpus)
            each = share * min(node.get("CPU", 0) / node["GPU"] for node in nodes if node.get("GPU", 0) > 0)
            self.takes = {"num_gpus": share, "num_cpus": float(int(each)) if each > 1 else each}
        else:
            self.takes = {"num_cpus": _cores_each(cores, self.workers)}


def _cores_each(machines: list[float], workers: int) -> float:
    """The most cores, which are threads, that each worker can have on any machine: others may work on the largest."""
    most = max(1, int(min(machines, default=1)))
    fitting = (c for c in range(most, 0, -1) if sum(int(cores // c) for cores in machines) >= workers)
    return float(next(fitting, 1 / math.ceil(workers / max(1, sum(machines)))))


def _connect(ray: Any, address: str | None, where: tuple[str, int] | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Nobody asked this machine to tell Ray's authors of its use. Tasks that are left behind by an error are no news.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if address in (None, "local"):
        logger.info("starting Ray on this machine, which takes some seconds")
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    if where is not None:
        _check_answers(where, address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"address must be that of a Ray cluster, and {address!r} can't be used: {error}"
        ) from error


def _host_and_port(address: Any) -> tuple[str, int]:
    host, _, port = address.removeprefix("ray://").rpartition(":") if isinstance(address, str) else ("", "", "")
    if not host or not port.isdecimal():
        raise ValueError(f"address must be 'auto', 'host:port' or 'ray://host:port', got {address!r}.")
    return host.strip("[]"), int(port)


def _check_answers(where: tuple[str, int], address: Any) -> None:
    """Ray itself tries for minutes."""
    try:
        socket.create_connection(where, timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        given = f"nothing answers at {address!r} ({error})"
        remedy = "Start a head there with `ray start --head`, or leave the address out to work on this machine"
        raise ConnectionError(f"address must be that of a Ray cluster; {given}. {remedy}.") from error
