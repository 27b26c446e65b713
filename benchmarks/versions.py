"""Seconds and memory of two versions of pose2id on the rows of core.py and neighbors.py, in one run.

    git worktree add --detach ../before 291e6ab
    python benchmarks/versions.py ../before/src src                 # every row
    python benchmarks/versions.py ../before/src src --only nfc --runs 9

Each version has a process of its own; the two take turns, so that whatever else the machine does slows both. `ratio` is
the median, pair by pair, of the first version's seconds to the second's (above 1 is faster), `of_minima` that of their
fastest runs. Memory as in core.py, each in a fresh process. One folder given twice shows how far noise goes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import core
import numpy as np
import torch

import pose2id


def rows() -> dict[str, tuple[Callable[[], Callable], Callable[[Callable], float]]]:
    """Row to what builds its call, and what measures its memory."""
    found: dict[str, tuple[Callable[[], Callable], Callable[[Callable], float]]] = {}
    for name, case in core.CASES.items():
        for n, backend in product(case.sizes, ("auto", "faiss", "torch") if name == "nfc" else ("auto",)):
            args = argparse.Namespace(backend=backend, max_memory=64)
            label = f"{name} {n}" + (f" {backend}" if name == "nfc" else "")
            found[label] = (lambda case=case, n=n, args=args: case.build(n, args)[0], case.peak)
    for n, dim, k, backend in product((3_000, 10_000), (64, 768), (2, 20), ("faiss", "torch")):
        found[f"neighbors {n}x{dim} k={k} {backend}"] = (partial(search, n, dim, k, backend), core.peak_above)
    found["nfc 4000 in 6 parts"] = (in_parts, core.peak_above)
    found["fuse 5000 of 8"] = (fusion, core.peak_above)
    return found


def in_parts() -> Callable:
    """NFC of features in parts, a third of which is hidden."""
    x = core.unit_features(4000, 0).reshape(4000, 6, -1)
    return partial(pose2id.nfc, x, visibility=np.arange(24_000).reshape(4000, 6) % 3 > 0)


def fusion() -> Callable:
    """Eq. 9 with 8 generated images."""
    x = core.unit_features(5000 * 9, 0)
    return partial(pose2id.fuse, x[:5000], x[5000:].reshape(5000, 8, -1), 2.0)


def search(n: int, dim: int, k: int, backend: str) -> Callable:
    """A search of neighbors.py, which itself needs this version's modules."""
    return partial(pose2id.nearest_neighbors, torch.from_numpy(core.unit_features(n, 0, dim)), k, backend=backend)


def serve() -> None:
    """Read names of rows; run each and write its seconds. The call of the last row is kept."""
    if not Path(pose2id.__file__).is_relative_to(os.environ["PYTHONPATH"]):
        raise SystemExit(f"{os.environ['PYTHONPATH']} holds no pose2id: {pose2id.__file__} was imported")
    name, call = "", None
    print("ready", flush=True)
    for line in map(str.strip, sys.stdin):
        if line != name:
            name, call = line, rows()[line][0]()
        print(core.interleaved([call], 1)[0][0], flush=True)


class Version:
    """One version of the library in a process of its own."""

    def __init__(self, source: str) -> None:
        self.environment = {**os.environ, "PYTHONPATH": str(Path(source).resolve())}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        self.answer()

    def answer(self) -> str:
        """The next line of the process."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a version's process has ended; see its error above")
        return line

    def seconds(self, row: str) -> float:
        """Of one run."""
        self.process.stdin.write(row + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def memory(self, row: str) -> float:
        """MB."""
        command = [sys.executable, __file__, "--memory-of", row]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, env=self.environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="the src folders of both versions, the older one first")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these")
    parser.add_argument("--runs", type=int, default=6, help="even, so that each is the first as often")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    if args.memory_of:
        build, peak = rows()[args.memory_of]
        print(peak(build()))
        return
    if len(args.sources) != 2:
        parser.error("two src folders are needed")
    chosen = [row for row in rows() if any(part in row for part in args.only)]
    if not chosen:
        parser.error(f"--only must name some of {', '.join(rows())}")
    core.print_machine()
    versions = [Version(source) for source in args.sources]
    for row in chosen:
        for version in versions:
            version.seconds(row)  # what is built and imported at first
        pairs = []
        for turn in range(args.runs):
            order = versions if turn % 2 else versions[::-1]
            seconds = {version: version.seconds(row) for version in order}
            pairs.append([seconds[version] for version in versions])
        before, after = zip(*pairs, strict=True)
        result = {
            "row": row,
            "before_s": round(statistics.median(before), 3),
            "after_s": round(statistics.median(after), 3),
            "ratio": round(statistics.median(first / second for first, second in pairs), 2),
            "of_minima": round(min(before) / min(after), 2),
        }
        if not args.no_memory:
            result["before_mb"], result["after_mb"] = (round(version.memory(row)) for version in versions)
        core.print_row(result, as_json=False)


if __name__ == "__main__":
    main()
