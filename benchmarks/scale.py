"""NFC of a file by many workers, beside one process: time, memory of this process, recall, what Ray costs.

    python benchmarks/scale.py                                        # exact 20,000 and 60,000, approximate 100,000
    python benchmarks/scale.py --exact 1000000 --approximate 10000000 --ray auto --folder /shared

Features are drawn as in benchmarks/gallery.py. "one process" is `nfc(out=)` of the same file, whose result an exact
search must equal bit for bit. Memory is the peak of the process that asks, beside the one that it had after imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from gallery import Drawn

from pose2id import nfc
from pose2id.distributed.cluster import connected
from pose2id.distributed.enhancement import nfc_file
from pose2id.distributed.workers import Workers


def peak() -> float:
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(source: Path, out: Path) -> dict[str, Any]:
    """One process, and what it had before."""
    nfc(np.eye(3))
    before, start = peak(), time.perf_counter()
    nfc(np.load(source, mmap_mode="r"), out=out)
    return {"s": time.perf_counter() - start, "MB": peak() - before}


def many(source: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Many workers."""
    nfc(np.eye(3))
    before, start = peak(), time.perf_counter()
    done = nfc_file(source, out, **options)
    return {"s": time.perf_counter() - start, "MB": peak() - before, "said": str(done)}


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
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--nprobe", type=int)
    parser.add_argument("--ray", help="address of a cluster")
    parser.add_argument("--no-alone", action="store_true", help="not in one process")
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
                print(f"  workers: {apart(many, source, other, {**cluster, **given})}", flush=True)
                if not options.no_alone:
                    print(f"  the same file: {same(one, other)}", flush=True)
                for path in Path(folder).iterdir():
                    path.unlink()


if __name__ == "__main__":
    main()
