"""Nearest neighbours within a set: speed and memory of exact searches, their mistakes, and what approximation costs.

    python benchmarks/neighbors.py                                                    # all four tables, small
    python benchmarks/neighbors.py exact --n 5000 10000 20000 --dim 768 3840 --k 2 20
    python benchmarks/neighbors.py exact --n 100000 --device cuda                     # without faiss's own rows
    python benchmarks/neighbors.py duplicates --dim 768
    python benchmarks/neighbors.py tracklets --n 6000 20000 --dim 512
    python benchmarks/neighbors.py approximate --n 20000 --dim 768

exact: unit rows in clusters; seconds are medians of interleaved runs, `ratio` is the median, pair by pair, of the first
method's seconds to this one's (above 1 is faster), memory as in core.py, but faiss is loaded before. Methods must agree
first.
duplicates: rows with 2, 5, 13 and 200 copies and pairs 1e-7 apart; how many rows get another set of neighbours than
float64 gives with ties to the lower index (`wrong_sets`), and how many get one that is further away (`further`).
tracklets: frames of videos at cosine 0.9999 to each other; `ratio` is to independent random rows of the same size.
approximate: building and searching, as a ratio to faiss flat; the recall of the k nearest; and the share of NFC's
mutual pairs (k1 = k2 = 2) that are none in the exact lists (`false_pairs`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

# Threads that spin between small operations steal the cores from the next one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import faiss
import numpy as np
import torch
from scipy.spatial.distance import cdist

from pose2id import nearest_neighbors
from pose2id.neighbors.search import mutual

sys.path.insert(0, str(Path(__file__).parent))
import core
import published

# From unit rows (N, D) and k to (N, k) indices.
Search = Callable[[np.ndarray, int], np.ndarray]


def others(found: np.ndarray, k: int) -> np.ndarray:
    """The first k of k + 1 neighbours, without the row itself. Places that an index left empty (-1) hold the row."""
    own = np.arange(len(found))[:, None]
    found = np.where(found < 0, own, found)
    order = np.argsort(found == own, axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)[:, :k]


def faiss_flat(x: np.ndarray, k: int, metric: int = faiss.METRIC_L2) -> np.ndarray:
    return others(faiss.knn(x, x, k + 1, metric=metric)[1], k)


def torch_topk(x: np.ndarray, k: int, device: str = "cpu") -> np.ndarray:
    return published.nearest(torch.from_numpy(x).to(device), k).cpu().numpy()


def ours(x: np.ndarray, k: int, backend: str, device: str = "cpu") -> np.ndarray:
    return nearest_neighbors(torch.from_numpy(x).to(device), k, backend=backend).cpu().numpy()


def exact_searches(device: str) -> dict[str, Search]:
    """The first one is what the others are compared with."""
    backends = ("faiss", "torch", "auto") if device == "cpu" else ("torch", "auto")
    searches: dict[str, Search] = {"faiss_flat": faiss_flat} if device == "cpu" else {}
    searches["torch_topk"] = partial(torch_topk, device=device)
    return searches | {f"pose2id_{backend}": partial(ours, backend=backend, device=device) for backend in backends}


def grid(args: argparse.Namespace, default_n: int) -> Iterator[tuple[int, int, int]]:
    """(n, dim, k) as asked for."""
    return product(args.n or (default_n,), args.dim, args.k)


def same_sets(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) whether rows hold the same neighbours, in whatever order."""
    return (np.sort(a, axis=1) == np.sort(b, axis=1)).all(1)


def exact(args: argparse.Namespace) -> Iterator[dict]:
    """Seconds, ratios and memory of exact searches over a grid."""
    searches = exact_searches(args.device)
    for n, dim, k in grid(args, 5000):
        x = core.unit_features(n, 0, dim)
        calls = [partial(search, x, k) for search in searches.values()]
        found = [call() for call in calls]
        for name, neighbors in zip(searches, found, strict=True):
            differing = 1 - same_sets(neighbors, found[-1]).mean()
            if differing > 1e-3:  # what float32 may leave open
                raise SystemExit(f"{name}: {differing:.2%} of rows have other neighbours")
        seconds = core.interleaved(calls, args.runs)
        for name, times in zip(searches, seconds, strict=True):
            ratios = [first / own for first, own in zip(seconds[0], times, strict=True)]
            row = {"n": n, "dim": dim, "k": k, "method": name, "seconds": round(statistics.median(times), 3)}
            row["ratio"] = round(statistics.median(ratios), 2)
            if args.device == "cpu":
                words = ["exact", "--n", n, "--dim", dim, "--k", k, "--memory-of", name]
                row["mb"] = round(core.in_fresh_process(__file__, *words))
            yield row


def with_copies(n: int, dim: int, seed: int) -> np.ndarray:
    """Unit rows in clusters: three groups each of 2, 5, 13 and 200 equal rows, and n / 40 pairs 1e-7 apart."""
    rng = np.random.default_rng(seed)
    x = core.unit_features(n, seed, dim)
    for copies in (2, 5, 13, 200):
        for _ in range(3):
            rows = rng.choice(n, min(copies, n), replace=False)
            x[rows] = x[rows[0]]
    first, second = rng.choice(n, (2, n // 40), replace=False)
    x[second] = x[first] * (1 + 1e-7 * rng.standard_normal((len(first), dim))).astype(np.float32)
    return x


def duplicates(args: argparse.Namespace) -> Iterator[dict]:
    """Mistakes of exact searches on rows with copies, counted against float64."""
    searches = {
        **exact_searches("cpu"),
        "faiss_inner_product": partial(faiss_flat, metric=faiss.METRIC_INNER_PRODUCT),
    }
    for n, dim, k in grid(args, 4000):
        wrong: dict[str, list[int]] = {name: [] for name in searches}
        further: dict[str, list[int]] = {name: [] for name in searches}
        for seed in range(args.runs):
            x = with_copies(n, dim, seed)
            distances = cdist(x.astype(np.float64), x.astype(np.float64), "sqeuclidean")
            np.fill_diagonal(distances, np.inf)
            right = np.argsort(distances, axis=1, kind="stable")[:, :k]
            reach = np.take_along_axis(distances, right, axis=1).sum(1)
            for name, search in searches.items():
                found = search(x, k)
                wrong[name].append(int((~same_sets(found, right)).sum()))
                sums = np.sort(np.take_along_axis(distances, found, axis=1)).sum(1)
                further[name].append(int((sums > reach).sum()))
        for name in searches:
            yield {"n": n, "dim": dim, "k": k, "method": name, "wrong_sets": wrong[name], "further": further[name]}


def of_tracklets(n: int, dim: int, frames: int) -> np.ndarray:
    """Unit rows in tracklets of so many frames, which have cosine 0.9999 to each other."""
    rng = np.random.default_rng(0)
    people = np.repeat(rng.standard_normal((-(-n // frames), dim)), frames, axis=0)[:n]
    x = people + 0.01 * rng.standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def tracklets(args: argparse.Namespace) -> Iterator[dict]:
    """Seconds of the search by default, by how many frames a tracklet has; the first row's have one."""
    for n, dim, k in grid(args, 6000):
        lengths = (1, 10, 60, 150, 500)
        calls = [partial(ours, of_tracklets(n, dim, frames), k, "auto") for frames in lengths]
        seconds = core.interleaved(calls, args.runs)
        for frames, times in zip(lengths, seconds, strict=True):
            ratios = [own / random for own, random in zip(times, seconds[0], strict=True)]
            row = {"n": n, "dim": dim, "k": k, "frames": frames, "seconds": round(statistics.median(times), 3)}
            yield {**row, "ratio": round(statistics.median(ratios), 2)}


def ivf(x: np.ndarray, k: int, nprobe: int) -> np.ndarray:
    lists = max(1, min(round(4 * len(x) ** 0.5), len(x) // 40))  # faiss wants 39 rows a list to train
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(x.shape[1]), x.shape[1], lists)
    index.train(x)
    index.add(x)
    index.nprobe = nprobe
    return others(index.search(x, k + 1)[1], k)


def graph(x: np.ndarray, k: int, kind: Callable, links: int) -> np.ndarray:
    index = kind(x.shape[1], links)
    index.add(x)
    return others(index.search(x, k + 1)[1], k)


def approximate(args: argparse.Namespace) -> Iterator[dict]:
    """Speed of approximate searches, and what they miss."""
    searches: dict[str, Search] = {"faiss_flat": faiss_flat, "pose2id_auto": partial(ours, backend="auto")}
    searches |= {f"ivf_nprobe_{nprobe}": partial(ivf, nprobe=nprobe) for nprobe in (4, 8, 16, 32)}
    searches["hnsw"] = partial(graph, kind=faiss.IndexHNSWFlat, links=32)
    searches["nn_descent"] = partial(graph, kind=faiss.IndexNNDescentFlat, links=64)
    for n, dim, k in grid(args, 5000):
        x = core.unit_features(n, 0, dim)
        right = ours(x, k, "auto")
        pairs = mutual_pairs(right)
        seconds = core.interleaved([partial(search, x, k) for search in searches.values()], args.runs)
        for (name, search), times in zip(searches.items(), seconds, strict=True):
            found = search(x, k)
            ratios = [first / own for first, own in zip(seconds[0], times, strict=True)]
            found_pairs = mutual_pairs(found)
            hits = (found[:, :, None] == right[:, None, :]).any(1)
            yield {
                "n": n,
                "dim": dim,
                "k": k,
                "method": name,
                "seconds": round(statistics.median(times), 3),
                "ratio": round(statistics.median(ratios), 2),
                "recall": round(float(hits.mean()), 3),
                "false_pairs": round(len(found_pairs - pairs) / max(1, len(found_pairs)), 3),
            }


def mutual_pairs(neighbors: np.ndarray) -> set[tuple[int, int]]:
    """Pairs (i, j) that are among each other's two nearest."""
    nearest = torch.from_numpy(neighbors[:, :2])
    row, rank = torch.nonzero(mutual(nearest, 2, 2), as_tuple=True)
    pairs = zip(row.tolist(), nearest[row, rank].tolist(), strict=True)
    return {(i, j) for i, j in pairs if i != j}


TABLES = {"exact": exact, "duplicates": duplicates, "tracklets": tracklets, "approximate": approximate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which (default: all)")
    parser.add_argument(
        "--n", type=int, nargs="+", help="numbers of rows (default: 5000; duplicates: 4000; tracklets: 6000)"
    )
    parser.add_argument("--dim", type=int, nargs="+", default=[768])
    parser.add_argument("--k", type=int, nargs="+", default=[2])
    parser.add_argument("--runs", type=int, default=3, help="of duplicates: data sets")
    parser.add_argument("--device", default="cpu", help="of exact")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        x = core.unit_features(args.n[0], 0, args.dim[0])
        print(core.peak_above(partial(exact_searches("cpu")[args.memory_of], x, args.k[0])))
        return
    core.print_machine()
    for name in args.tables or TABLES:
        for row in TABLES[name](args):
            core.print_row({"table": name, **row}, args.json)


if __name__ == "__main__":
    main()
