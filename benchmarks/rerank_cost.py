"""Time and memory of re-ranking against the number of images, beside a dense restatement of the published algorithm.

    python benchmarks/rerank_cost.py --out rerank-cost.csv --picture rerank-cost.png  # an hour or two
    python benchmarks/rerank_cost.py --images 2000 5000 --only dense k-reciprocal

Drawn features of 768 columns, an eighth of them queries, 15 cameras, 30 images of a person; at the largest size 11,659
queries and 82,161 gallery images, as MSMT17 has. Each figure is of a process of its own: seconds of one call, and the
peak of its memory above what was there before, the output apart (Linux). Each method re-ranks for
the 100 nearest, but for the dense one, which has all distances.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import core
import numpy as np
import published

import pose2id

MSMT17 = 11_659 + 82_161
IMAGES = (2000, 5000, 10_000, 20_000, 50_000, MSMT17)
DIM, CAMERAS, OF_A_PERSON, TOPK = 768, 15, 30, 100
DENSE_BYTES = 22  # an image pair, at the peak: distances, ranks and weights, some of them twice
METHODS = ("dense", "k-reciprocal", "k-reciprocal, cameras", "rerank, cameras")


def drawn(n: int) -> tuple[Any, ...]:
    """Queries, gallery and their cameras: people and cameras move a feature by as much as noise does."""
    rng, queries = np.random.default_rng(0), 11_659 if n == MSMT17 else n // 8
    people = rng.standard_normal((n // OF_A_PERSON, DIM), dtype=np.float32)
    offsets = rng.standard_normal((CAMERAS, DIM), dtype=np.float32)
    cameras = rng.integers(0, CAMERAS, n)
    x = 1.5 * rng.standard_normal((n, DIM), dtype=np.float32)
    for start in range(0, n, 1024):
        rows = slice(start, min(start + 1024, n))
        x[rows] += people[rng.integers(0, len(people), rows.stop - start)] + offsets[cameras[rows]]
    return x[:queries], x[queries:], cameras[:queries], cameras[queries:]


def call(method: str, n: int) -> Any:
    """A method on drawn images; nothing is computed yet."""
    q, g, q_camids, g_camids = drawn(n)
    if method == "dense":
        return lambda: published.re_ranking(q, g, 20, 6, 0.3)
    if method == "k-reciprocal":
        return lambda: pose2id.k_reciprocal(q, g, topk=TOPK)
    if method == "k-reciprocal, cameras":
        return lambda: pose2id.k_reciprocal(q, g, q_camids=q_camids, g_camids=g_camids, topk=TOPK)
    return lambda: pose2id.Centralizer().rerank(q, g, query_camids=q_camids, gallery_camids=g_camids, topk=TOPK)


def measured(method: str, n: int) -> None:
    """Print seconds and MB of one call, in this process."""
    call(method, 500)()  # what is imported and chosen at the first use
    work, seconds = call(method, n), []

    def timed() -> Any:
        start = time.perf_counter()
        output = work()
        seconds.append(time.perf_counter() - start)
        return output

    peak = core.peak_above(timed)
    print(seconds[0], peak)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Both figures against the number of images, on logarithmic axes."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        for axis, column in zip(axes, ("seconds", "mb"), strict=True):
            axis.plot([row["images"] for row in of_method], [row[column] for row in of_method], "o-", label=method)
    for axis, title in zip(axes, ("seconds", "MB of memory, features and output apart"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="images, queries and gallery", title=title)
        sizes = sorted({row["images"] for row in rows})
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axis.minorticks_off()
        axis.grid(visible=True, which="major", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help=str(METHODS))
    parser.add_argument("--dense-gb", type=float, default=16, help="no dense call that would take more (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="CSV")
    parser.add_argument("--picture", type=Path, metavar="PNG")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measured(args.measure[0], int(args.measure[1]))
        return
    core.print_machine()
    rows = []
    for n in args.images:
        for method in args.only:
            if method == "dense" and DENSE_BYTES * n * n > 1e9 * args.dense_gb:
                print(f"{n} images, dense: left out, about {DENSE_BYTES * n * n / 1e9:.0f} GB", flush=True)
                continue
            command = [sys.executable, __file__, "--measure", method, str(n)]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            rows.append({"images": n, "method": method, "seconds": float(found[0]), "mb": float(found[1])})
            print(f"{n} images, {method}: {rows[-1]['seconds']:.1f} s, {rows[-1]['mb']:.0f} MB", flush=True)
            if args.out:
                write(rows, args.out)
    if args.picture:
        draw(rows, args.picture)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
