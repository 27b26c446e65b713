"""Speed and memory of nfc, evaluate, id2_score and k_reciprocal against restatements of the published algorithms.

    python benchmarks/core.py                                   # those four, about 8 minutes on 2 cores
    python benchmarks/core.py nfc --n 5000 --backend faiss torch
    python benchmarks/core.py market1501 market1501_top         # re-ranking at Market1501's size: ours alone
    python benchmarks/core.py gallery_100k_top                  # 1,000 queries, 100,000 gallery images, 100 nearest
    python benchmarks/core.py nfc_file --max-memory 64          # nfc from file to file

Speed: both sides in one process, in turn, medians; outputs are compared first. Memory: each side in a process of its
own, peak resident memory during the call above what was there before it, the output taken off (Linux); of nfc_file
the peak of anonymous memory, since pages of mapped files count as resident but can be dropped at any time.

The last four cases would take the published code 8 GB and more: they are compared only with --published.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Threads that spin between small operations steal the cores from the next one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

import pose2id

sys.path.insert(0, str(Path(__file__).parent))
import published

DIM = 768

# Ours, the published one, and whether their outputs agree.
Sides = tuple[Callable, Callable, Callable]


def features(n: int, seed: int, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    """Clustered float32 features, about ten an identity, and their identities (from 1)."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((max(1, n // 10), dim), dtype=np.float32)
    pids = rng.integers(0, len(centres), n)
    x = rng.standard_normal((n, dim), dtype=np.float32)
    x *= 1.5
    for block in range(0, n, 1024):
        x[block : block + 1024] += centres[pids[block : block + 1024]]
    return x, pids + 1


def unit_features(n: int, seed: int, dim: int = DIM) -> np.ndarray:
    x, _ = features(n, seed, dim)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def nfc_case(n: int, args: argparse.Namespace) -> Sides:
    x, _ = features(n, 0)
    tensor = torch.from_numpy(x)
    return (
        lambda: pose2id.nfc(x, 2, 2, backend=args.backend),
        lambda: published.nfc(tensor, 2, 2).numpy(),
        lambda ours, theirs: float(np.abs(ours - theirs).max()) < 1e-5,
    )


def nfc_file_case(n: int, args: argparse.Namespace) -> Sides:
    folder = tempfile.TemporaryDirectory()
    source = Path(folder.name, "features.npy")
    np.save(source, features(n, 0)[0])

    def ours() -> np.ndarray:
        target = Path(folder.name, "centralized.npy")  # of `folder`, which is removed with this function
        target.unlink(missing_ok=True)
        mapped = np.load(source, mmap_mode="r")
        return pose2id.nfc(mapped, 2, 2, backend=args.backend, max_memory=args.max_memory << 20, out=target)

    return (
        ours,
        lambda: published.nfc(torch.from_numpy(np.load(source)), 2, 2).numpy(),
        lambda ours, theirs: float(np.abs(ours - theirs).max()) < 1e-5,
    )


def evaluate_case(n: int, args: argparse.Namespace) -> Sides:
    num_queries = round(n * 3368 / 15913)
    qf, q_pids = features(num_queries, 1)
    gf, g_pids = features(n, 2)
    q_pids = g_pids[np.arange(num_queries) % n]
    for block in range(0, num_queries, 1024):  # queries near images of their own identity
        qf[block : block + 1024] += 0.7 * gf[np.arange(block, min(block + 1024, num_queries)) % n]
    qf /= np.linalg.norm(qf, axis=1, keepdims=True)
    gf /= np.linalg.norm(gf, axis=1, keepdims=True)
    cameras = np.random.default_rng(3)
    labels = (q_pids, g_pids, cameras.integers(0, 6, num_queries), cameras.integers(0, 6, n))
    return (
        lambda: pose2id.evaluate(qf, gf, *labels),
        lambda: published.evaluate(qf, gf, *labels),
        lambda ours, theirs: abs(ours.mAP - theirs[0]) < 1e-6 and float(np.abs(ours.cmc - theirs[1]).max()) < 1e-3,
    )


def id2_case(n: int, args: argparse.Namespace) -> Sides:
    x, pids = features(n, 4)
    tensor = torch.from_numpy(x)
    return (
        lambda: pose2id.id2_score(x, pids),
        lambda: published.id2_score(tensor, pids),
        lambda ours, theirs: abs(ours - theirs) < 1e-5,
    )


def rerank_case(
    n: int, args: argparse.Namespace, *, query_share: float = 0.2, dim: int = DIM, topk: int | None = None
) -> Sides:
    x = unit_features(n, 5, dim)
    num_queries = round(n * query_share)
    qf, gf = x[:num_queries].copy(), x[num_queries:].copy()
    return (
        lambda: pose2id.k_reciprocal(qf, gf, 20, 6, 0.3, topk=topk, backend=args.backend),
        lambda: published.re_ranking(qf, gf, 20, 6, 0.3),
        # The published weights are float16.
        lambda ours, theirs: (
            float(np.abs(ours - theirs if topk is None else ours[0] - np.sort(theirs)[:, :topk]).max()) < 1e-2
        ),
    )


def peak_above(call: Callable) -> float:
    """MB of resident memory at the peak of the call, above what was there before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    output = call()
    peak = resident("VmHWM")
    arrays = output if isinstance(output, tuple) else (output,)
    return peak - before - sum(array.nbytes for array in arrays if isinstance(array, np.ndarray)) / 1e6


def anonymous_above(call: Callable, every: float = 0.002) -> float:
    """MB of anonymous memory (no pages of files) at the peak of the call, above what was there before; sampled."""
    before = peak = resident("RssAnon")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(every):
            peak = max(peak, resident("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return peak - before


def resident(key: str) -> float:
    """A line of /proc/self/status in MB."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        build: from a number of rows and the options to both sides.
        sizes: numbers of rows.
        searches: whether --backend says anything to it.
        compared: measured against the published algorithm, and by default.
        peak: what is measured of memory.
    """

    build: Callable[[int, argparse.Namespace], Sides]
    sizes: tuple[int, ...]
    searches: bool = False
    compared: bool = True
    peak: Callable[[Callable], float] = peak_above


market1501 = partial(rerank_case, query_share=3368 / 19_281)
CASES = {
    "nfc": Case(nfc_case, (10_000, 20_000), searches=True),
    "evaluate": Case(evaluate_case, (15_913,)),
    "id2_score": Case(id2_case, (10_000, 20_000)),
    "k_reciprocal": Case(rerank_case, (5_000, 10_000), searches=True),
    "market1501": Case(market1501, (19_281,), searches=True, compared=False),
    "market1501_top": Case(partial(market1501, topk=100), (19_281,), searches=True, compared=False),
    "gallery_100k_top": Case(
        partial(rerank_case, query_share=1 / 101, dim=256, topk=100), (101_000,), searches=True, compared=False
    ),
    "nfc_file": Case(nfc_file_case, (40_000,), searches=True, compared=False, peak=anonymous_above),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="which (default: those that are compared)")
    parser.add_argument("--n", type=int, nargs="+", help="numbers of rows (default: the stated sizes of each)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--backend", nargs="+", default=["auto"], help="who searches neighbours")
    parser.add_argument("--max-memory", type=int, default=64, help="of nfc_file, in MiB")
    parser.add_argument("--published", action="store_true", help="compare the last four cases too")
    parser.add_argument("--no-memory", action="store_true", help="only seconds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=["ours", "published"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.cases or [name for name, case in CASES.items() if case.compared]
    if args.memory_of:
        case = CASES[names[0]]
        args.backend = args.backend[0]
        ours, theirs, _ = case.build(args.n[0], args)
        print(case.peak(ours if args.memory_of == "ours" else theirs))
        return
    print_machine()
    for name in names:
        case = CASES[name]
        for n in args.n or case.sizes:
            for backend in args.backend if case.searches else ["-"]:
                row = measure(name, n, argparse.Namespace(**{**vars(args), "backend": backend}))
                print_row(row, args.json)


def measure(name: str, n: int, args: argparse.Namespace) -> dict:
    """One row: seconds (medians), their ratio pair by pair, and MB at the peak."""
    case = CASES[name]
    ours, theirs, agree = case.build(n, args)
    compared = case.compared or args.published
    first = ours()
    if compared and not agree(first, theirs()):
        raise SystemExit(f"{name}: the outputs differ")
    seconds = interleaved([ours, theirs] if compared else [ours], args.runs)
    words = [name, "--n", n, "--backend", args.backend, "--max-memory", args.max_memory]
    row = {"case": name, "n": n, "backend": args.backend, "ours_s": round(statistics.median(seconds[0]), 2)}
    if not args.no_memory:
        row["ours_mb"] = round(in_fresh_process(__file__, *words, "--memory-of", "ours"))
    if compared:
        row["published_s"] = round(statistics.median(seconds[1]), 2)
        row["speedup"] = round(statistics.median(b / a for a, b in zip(*seconds, strict=True)), 2)
        if not args.no_memory:
            row["published_mb"] = round(in_fresh_process(__file__, *words, "--memory-of", "published"))
    return row


def interleaved(calls: Sequence[Callable], runs: int) -> list[list[float]]:
    """Seconds of each call in each run: in turn, so that whatever else the machine does slows all of them."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return seconds


def in_fresh_process(script: str, *words: object) -> float:
    """The number that a script prints."""
    command = [sys.executable, script, *map(str, words)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_machine() -> None:
    print(
        f"# {platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads",
        file=sys.stderr,
    )


def print_row(row: dict, as_json: bool) -> None:
    print(json.dumps(row) if as_json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
