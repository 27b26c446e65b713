"""NFC of a file by many workers, beside one process: time, memory of this process, recall, what Ray costs.

    python benchmarks/scale.py                                        # exact 20,000 and 60,000, approximate 100,000
    python benchmarks/scale.py --exact 1000000 --approximate 10000000 --ray auto --folder /shared
    python benchmarks/scale.py --exact 100000 --approximate 100000 --no-alone --plan 1000000 100000000

Features are drawn as in benchmarks/gallery.py. "one process" is `nfc(out=)` of the same file, whose result an exact
search must equal bit for bit. Memory is the peak of what the process that asks holds beside pages of files, sampled,
above what it had after imports.
`--plan` reckons larger runs from the phases of each size, by what each phase's work grows with; run that size to check.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import core
import numpy as np
from gallery import Drawn

from pose2id import nfc
from pose2id.distributed.cluster import connected
from pose2id.distributed.enhancement import enhance_file, nfc_file
from pose2id.distributed.searching import block_rows
from pose2id.distributed.workers import Workers


def measured(call: Any) -> dict[str, Any]:
    """Seconds and MB of a call, and what it says of itself."""
    said: list[str] = []
    start = time.perf_counter()
    held = core.anonymous_above(lambda: said.append(str(call())), every=0.05)
    return {"s": time.perf_counter() - start, "MB": held, "said": said[0]}


def alone(source: Path, out: Path) -> dict[str, Any]:
    """One process, and what it had before."""
    nfc(np.eye(3))
    found = measured(lambda: nfc(np.load(source, mmap_mode="r"), out=out))
    return {"s": found["s"], "MB": found["MB"]}


# The log's line with which a phase begins: the power of n with which the work of the workers grows (None: there is
# none), and that of this process. Lists are 4 roots of n, of n rows in all. From 100,000 to 1,000,000 drawn rows the
# lists that a row looks at grew from 85 to 170, and the tasks that read it from 18 to 66.
PHASES = {
    "reading": (None, 1),
    "exact: pairs": (2, 2),
    "approximate: training": (None, 1),
    "approximate: exact mutual": (1, 0),
    "approximate: choosing": (1.5, 1.3),
    "approximate: searching": (1.8, 1.56),
    "approximate: candidates": (1, 1),
    "summing": (None, 1),
}


class Phases(logging.Handler):
    """When each phase began, and what the log says."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[str, float, float]] = []  # by the clock, and in this process's processor time

    def emit(self, record: logging.LogRecord) -> None:
        """Note the time of a phase's first line."""
        message = record.getMessage()
        print(f"    {message}", flush=True)
        self._begin([name for name in PHASES if message.startswith(name)])

    def _begin(self, names: list[str]) -> None:
        self.begun += [(name, time.perf_counter(), time.process_time()) for name in names]

    def seconds(self) -> dict[str, tuple[float, float]]:
        """Of each phase, until the next one began: by the clock, and of this process."""
        self._begin(["end"])
        pairs = zip(self.begun, self.begun[1:], strict=False)
        found: dict[str, tuple[float, float]] = {}
        for (name, at, used), (_, later, used_later) in pairs:
            clock, own = found.get(name, (0.0, 0.0))
            found[name] = clock + later - at, own + used_later - used
        return found


def many(source: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Many workers."""
    nfc(np.eye(3))
    phases = Phases()
    logging.getLogger("pose2id").addHandler(phases)
    logging.getLogger("pose2id").setLevel(logging.INFO)
    found = measured(lambda: nfc_file(source, out, **options))
    return {**found, "phases": phases.seconds()}


def with_cameras(source: Path, out: Path, camids: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The safe default with cameras, by many workers."""
    found = measured(lambda: enhance_file(source, out, camids, **options))
    return {**found, "kB a row": 1000 * found["MB"] / len(camids)}


def plan(n: int, dim: int, measured: int, phases: dict[str, tuple[float, float]], workers: int, planned: int) -> None:
    """Print what n rows take of so many workers like those that were measured."""
    print(f"  {n:,} x {dim} by {planned} workers, reckoned from {measured:,} by {workers}:")
    for name, (seconds, own) in phases.items():
        power, of_this = PHASES[name]
        beside = (n / measured) ** of_this * (seconds if power is None else own)
        shared = 0 if power is None else seconds * (n / measured) ** power * workers / planned
        print(f"    {name:26s} workers {shared:12,.0f} s, this process {beside:10,.0f} s")
    if "exact: pairs" in phases:
        block = block_rows(n, dim, planned)
        count = math.ceil(n / block)
        pairs = count * (count + 1) // 2
        print(f"    {count:,} blocks of {block:,} rows, {pairs:,} tasks, {pairs * 8 * block * dim / 1e9:,.0f} GB read")


def empty(tasks: int, address: str | None, workers: int | None) -> dict[str, Any]:
    """Seconds until Ray and workers have begun, and milliseconds a task that does nothing."""
    start = time.perf_counter()
    # The function goes by value: workers don't find this file.
    with connected(address, workers) as cluster, Workers(cluster, lambda: lambda task: task) as pool:
        list(pool.results(range(cluster.workers)))
        begun = time.perf_counter() - start
        each = []
        for _ in range(3):
            start = time.perf_counter()
            list(pool.results(range(tasks)))
            each.append(1000 * (time.perf_counter() - start) / tasks)
    return {"workers": cluster.workers, "start, s": begun, "empty task, ms": statistics.median(each)}


def apart(function: Any, *args: Any) -> dict[str, Any]:
    """In a process of its own, whose memory is told apart."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        found: dict[str, Any] = process.apply(function, args)
    return found


def same(one: Path, other: Path) -> bool:
    """Whether two arrays are the same, bit for bit."""
    x, y = np.load(one, mmap_mode="r"), np.load(other, mmap_mode="r")
    parts = range(0, len(x), 1 << 14)
    return all(np.array_equal(x[i : i + (1 << 14)].view(np.uint8), y[i : i + (1 << 14)].view(np.uint8)) for i in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", type=int, nargs="*", default=[20_000, 60_000], help="rows")
    parser.add_argument("--approximate", type=int, nargs="*", default=[100_000], help="rows")
    parser.add_argument("--cameras", type=int, nargs="*", default=[], help="rows; the safe default with 6 cameras")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--nprobe", type=int)
    parser.add_argument("--ray", help="address of a cluster")
    parser.add_argument("--no-alone", action="store_true", help="not in one process")
    parser.add_argument("--plan", type=int, nargs="*", default=[], help="rows of larger runs, reckoned from each size")
    parser.add_argument("--plan-workers", type=int, default=2, help="how many those have (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where files lie, seen by all machines")
    options = parser.parse_args()
    cluster = {"address": options.ray, "workers": options.workers}
    print(f"Ray: {apart(empty, 1000, options.ray, options.workers)}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for how, sizes in (("exact", options.exact), ("approximate", options.approximate)):
            for n in sizes:
                source, one, other = (Path(folder) / f"{n}_{name}.npy" for name in ("in", "one", "many"))
                np.save(source, Drawn(n, options.dim).images(n)[0])
                print(f"\n{n:,} x {options.dim}, {how}")
                if not options.no_alone:
                    print(f"  one process: {apart(alone, source, one)}", flush=True)
                given = {"exact": True} if how == "exact" else {"approximate": True, "nprobe": options.nprobe}
                done = apart(many, source, other, {**cluster, **given})
                phases = done.pop("phases")
                print(f"  workers: {done}", flush=True)
                shown = (f"{name} {clock:.1f} (this process {own:.1f})" for name, (clock, own) in phases.items())
                print("  phases, s: " + ", ".join(shown))
                for larger in options.plan:
                    plan(larger, options.dim, n, phases, options.workers, options.plan_workers)
                if how == "exact" and not options.no_alone:
                    print(f"  the same file: {same(one, other)}", flush=True)
                for path in Path(folder).iterdir():
                    path.unlink()
        for n in options.cameras:
            features, camids = Drawn(n, options.dim).images(n)
            np.save(Path(folder) / "in.npy", features)
            done = apart(with_cameras, Path(folder) / "in.npy", Path(folder) / f"{n}_out.npy", camids, cluster)
            print(f"\n{n:,} x {options.dim}, 6 cameras, workers: {done}", flush=True)


if __name__ == "__main__":
    main()
