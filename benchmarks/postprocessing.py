"""Speed and memory of `Centralizer.enhance` and `rerank` beside nfc and k-reciprocal re-ranking, in one run.

    python benchmarks/postprocessing.py                       # cuhk03 and market1501, about 15 minutes on 2 cores
    python benchmarks/postprocessing.py pairs many city       # cameras of 2, 4 and 200 images: 500, 5,000 and 100
    python benchmarks/postprocessing.py msmt17 --runs 1       # hours
    python benchmarks/postprocessing.py market1501.npz        # features of your own, a file with cameras

Drawn features have the sizes of the sets that they are named after. Seconds are medians, each method in turn; memory
is the peak of a process of its own above what was there before, without the output (Linux). Sets of more than 50,000
images are re-ranked for the 100 nearest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import core
import numpy as np

import pose2id
from pose2id.io.feature_files import load_features

SIZES = {  # queries, gallery, columns, cameras, images of a person
    "cuhk03": (1686, 6491, 512, 2, 10),
    "market1501": (3368, 15_913, 768, 6, 20),
    "msmt17": (11_659, 82_161, 768, 15, 30),
    "city": (3368, 20_000, 512, 100, 10),
    "pairs": (200, 1000, 512, 500, 5),
    "many": (3368, 20_000, 512, 5000, 10),
}
LARGE, TOPK = 50_000, 100


def drawn(name: str) -> tuple[Any, ...]:
    """Features and cameras: people and cameras move a feature by as much as noise does."""
    queries, gallery, dim, cameras, images = SIZES[name]
    n, rng = queries + gallery, np.random.default_rng(0)
    people = rng.standard_normal((max(1, n // images), dim), dtype=np.float32)
    offsets = rng.standard_normal((cameras, dim), dtype=np.float32)
    cams = rng.permutation(np.arange(n) % cameras)
    x = 1.5 * rng.standard_normal((n, dim), dtype=np.float32)
    for block in range(0, n, 1024):
        rows = slice(block, min(block + 1024, n))
        x[rows] += people[rng.integers(0, len(people), rows.stop - rows.start)] + offsets[cams[rows]]
    return x[:queries], x[queries:], cams[:queries], cams[queries:]


def read(name: str) -> tuple[Any, ...]:
    """Query, gallery and their cameras: drawn, or of a feature file."""
    if name in SIZES:
        return drawn(name)
    file = load_features(name)
    if file.q_camids is None or file.g_camids is None:
        raise SystemExit(f"{name} must hold q_camids and g_camids.")
    return file.query_feats, file.gallery_feats, np.asarray(file.q_camids), np.asarray(file.g_camids)


def methods(name: str) -> dict[str, Callable[[], Any]]:
    """What is measured; ratios are to the first."""
    q, g, q_cams, g_cams = read(name)
    cameras = {"query_camids": q_cams, "gallery_camids": g_cams}
    topk = TOPK if len(q) + len(g) > LARGE else None
    auto = pose2id.Centralizer()
    return {
        "nfc": lambda: (pose2id.nfc(q), pose2id.nfc(g)),
        "auto": partial(auto.enhance, q, g),
        "auto, cameras": partial(auto.enhance, q, g, **cameras),
        "k-reciprocal": partial(pose2id.k_reciprocal, q, g, 20, 6, 0.3, topk=topk),
        "rerank, cameras": partial(auto.rerank, q, g, **cameras, topk=topk),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=["cuhk03", "market1501"], help=f"{', '.join(SIZES)}, or files")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="methods (default: all)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="only seconds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        q, g, *_ = drawn("pairs")
        pose2id.Centralizer().enhance(q, g)  # what is imported at the first use
        print(core.peak_above(methods(args.sets[0])[args.memory_of]))
        return
    core.print_machine()
    for name in args.sets:
        calls = {method: call for method, call in methods(name).items() if method in (args.only or [method])}
        next(iter(calls.values()))()  # what is imported at the first use
        seconds = dict(zip(calls, core.interleaved(list(calls.values()), args.runs), strict=True))
        for method, times in seconds.items():
            row = {"set": name, "method": method, "s": round(statistics.median(times), 2)}
            if "nfc" in seconds:
                ratios = [own / nfc for own, nfc in zip(times, seconds["nfc"], strict=True)]
                row["times_nfc"] = round(statistics.median(ratios), 2)
            if not args.no_memory:
                row["mb"] = round(core.in_fresh_process(__file__, name, "--memory-of", method))
            core.print_row(row, args.json)


if __name__ == "__main__":
    main()
