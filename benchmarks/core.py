"""Speed and memory of nfc, evaluate, id2_score and k_reciprocal against restatements of the published algorithms.

    python benchmarks/core.py                 # everything, about 3 minutes on 2 cores
    python benchmarks/core.py nfc --n 5000    # one of them, smaller

Speed: both sides in one process, in turn, medians; outputs are compared first. Memory: each side in a process of its
own, peak resident memory during the call above what was there before it, the output taken off (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Threads that spin between small operations steal the cores from the next one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

import pose2id

sys.path.insert(0, str(Path(__file__).parent))
import published

DIM = 768


def features(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clustered float32 features, about ten an identity, and their identities (from 1)."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((max(1, n // 10), DIM), dtype=np.float32)
    pids = rng.integers(0, len(centres), n)
    x = rng.standard_normal((n, DIM), dtype=np.float32)
    x *= 1.5
    for block in range(0, n, 1024):
        x[block : block + 1024] += centres[pids[block : block + 1024]]
    return x, pids + 1


def nfc_case(n: int, backend: str) -> tuple[Callable, Callable, Callable]:
    x, _ = features(n, 0)
    tensor = torch.from_numpy(x)
    return (
        lambda: pose2id.nfc(x, 2, 2, backend=backend),
        lambda: published.nfc(tensor, 2, 2).numpy(),
        lambda ours, theirs: float(np.abs(ours - theirs).max()) < 1e-5,
    )


def evaluate_case(n: int, backend: str) -> tuple[Callable, Callable, Callable]:
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


def id2_case(n: int, backend: str) -> tuple[Callable, Callable, Callable]:
    x, pids = features(n, 4)
    tensor = torch.from_numpy(x)
    return (
        lambda: pose2id.id2_score(x, pids),
        lambda: published.id2_score(tensor, pids),
        lambda ours, theirs: abs(ours - theirs) < 1e-5,
    )


def rerank_case(n: int, backend: str) -> tuple[Callable, Callable, Callable]:
    x, _ = features(n, 5)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    qf, gf = x[: n // 5].copy(), x[n // 5 :].copy()
    return (
        lambda: pose2id.k_reciprocal(qf, gf, 20, 6, 0.3),
        lambda: published.re_ranking(qf, gf, 20, 6, 0.3),
        # The published weights are float16.
        lambda ours, theirs: float(np.abs(ours - theirs).max()) < 1e-2,
    )


CASES = {
    "nfc": (nfc_case, 20_000),
    "evaluate": (evaluate_case, 15_913),
    "id2_score": (id2_case, 20_000),
    "k_reciprocal": (rerank_case, 5_000),
}


def peak_above(call: Callable) -> float:
    """MB of resident memory at the peak of the call, above what was there before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    output = call()
    peak = resident("VmHWM")
    size = output.nbytes if isinstance(output, np.ndarray) else 0
    return peak - before - size / 1e6


def resident(key: str) -> float:
    """A line of /proc/self/status in MB."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="which (default: all)")
    parser.add_argument("--n", type=int, help="number of rows (default: the stated size of each)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--backend", default="auto", help="of nfc")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=["ours", "published"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.cases or list(CASES)
    if args.memory_of:
        build, n = CASES[names[0]]
        ours, theirs, _ = build(args.n or n, args.backend)
        print(peak_above(ours if args.memory_of == "ours" else theirs))
        return
    print(
        f"# {platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, d = {DIM}",
        file=sys.stderr,
    )
    for name in names:
        row = measure(name, args)
        print(json.dumps(row) if args.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def measure(name: str, args: argparse.Namespace) -> dict:
    """One row: seconds (medians), their ratio pair by pair, and MB at the peak."""
    build, n = CASES[name]
    n = args.n or n
    ours, theirs, agree = build(n, args.backend)
    if not agree(ours(), theirs()):
        raise SystemExit(f"{name}: the outputs differ")
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.runs):
        for call, times in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    memory = [
        float(
            subprocess.run(
                [sys.executable, __file__, name, "--memory-of", side, "--n", str(n), "--backend", args.backend],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for side in ("ours", "published")
    ]
    return {
        "case": name,
        "n": n,
        "ours_s": round(statistics.median(seconds[0]), 2),
        "published_s": round(statistics.median(seconds[1]), 2),
        "speedup": round(statistics.median(b / a for a, b in zip(*seconds, strict=True)), 2),
        "ours_mb": round(memory[0]),
        "published_mb": round(memory[1]),
    }


if __name__ == "__main__":
    main()
