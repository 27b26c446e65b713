"""What a live gallery costs: one query, one image more, memory, beside a flat search and beside computing all again.

    python benchmarks/gallery.py                            # 10,000 x 512, about 2 minutes on 2 cores
    python benchmarks/gallery.py --sizes 100000 1000000     # x 256, an hour
    python benchmarks/gallery.py --accuracy FOLDER          # real features, streamed image by image
    python benchmarks/gallery.py --unknown FOLDER           # people who are not in the gallery
    python benchmarks/gallery.py --reranked FOLDER          # one query among its nearest images, and among all

Milliseconds are medians of single calls, in turn with faiss's flat search of the same rows; memory is what the process
grew by, beside the features (Linux). Drawn features are about as hard for inverted lists as OSNet's of CUHK03 (8,177
images, 361 lists: 95 % of the ten nearest are found in 25 of them, CUHK03's in 16), with cosines 0.87 and 0.75 to the
nearest and the tenth image (there 0.87 and 0.73).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

import pose2id
from pose2id import Centralizer, Gallery
from pose2id.gallery import state

IMAGES, CAMERAS = 10, 6  # of a person; in all
FALL, SPREAD = 0.75, 0.5  # deviations along axis i are i^-FALL; of images around their person, and of cameras
CASES = {"no cameras": "auto", "cameras": "auto", "guarded, cameras": "guarded"}


class Drawn:
    """People, cameras and noise with one falling spectrum."""

    def __init__(self, n: int, dim: int) -> None:
        self.rng = np.random.default_rng(0)
        self.spread = (np.arange(1, dim + 1) ** -FALL).astype(np.float32)
        self.people = self.normal(max(1, n // IMAGES))
        self.offsets = SPREAD * self.normal(CAMERAS)

    def normal(self, n: int) -> Any:
        """(n, D) draws with the spectrum."""
        return self.rng.standard_normal((n, len(self.spread)), dtype=np.float32) * self.spread

    def images(self, n: int) -> tuple[Any, Any]:
        """Features (n, D) of images, and their cameras."""
        cameras = self.rng.integers(0, CAMERAS, n)
        features = np.empty((n, len(self.spread)), dtype=np.float32)
        for start in range(0, n, 1 << 14):
            part = slice(start, min(start + (1 << 14), n))
            people = self.people[self.rng.integers(0, len(self.people), part.stop - start)]
            noise = SPREAD * self.normal(part.stop - start)
            features[part] = people + self.offsets[cameras[part]] + noise
        return features, cameras


def milliseconds(*calls: Callable[[int], Any], runs: int) -> list[float]:
    """Medians of calls, in turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    for run in range(runs):
        for call, of_call in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call(run)
            of_call.append(time.perf_counter() - start)
    return [1000 * statistics.median(of_call) for of_call in seconds]


def resident() -> int:
    """Bytes of this process in memory, after giving back what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(n: int, dim: int, case: str, runs: int, exact: bool) -> dict[str, Any]:
    """One size and method."""
    drawn = Drawn(n, dim)
    images, cameras = drawn.images(n)
    queries, of_queries = drawn.images(2 * runs)
    more, of_more = drawn.images(runs)
    known = case != "no cameras"

    def camids(values: Any, at: Any = slice(None)) -> Any:
        return values[at] if known else None

    Gallery(Centralizer(method=CASES[case])).add(images[:2000], camids=camids(cameras, slice(2000)))  # imports
    before = resident()
    start = time.perf_counter()
    options: dict[str, Any] = {"exact_up_to": None} if exact else {}
    gallery = Gallery(Centralizer(method=CASES[case]), refit_share=None, **options)
    gallery.add(images, camids=camids(cameras))
    fit = time.perf_counter() - start
    memory = (resident() - before) / n
    flat = faiss.IndexFlatL2(dim)
    flat.add(images / np.linalg.norm(images, axis=1, keepdims=True))
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    how = "camera" if known else "k-reciprocal"

    def search(run: int, **options: Any) -> Any:
        at = slice(run, run + 1)
        return gallery.search(queries[at], 10, query_camids=camids(of_queries, at), **options)

    rows: dict[str, Any] = {"reason": gallery.reason, "fit, s": fit, "memory / features": memory / (4 * dim)}
    rows["bytes an image beside 2.3 times the features"] = memory - 2.3 * 4 * dim
    rows["recall"] = gallery.recall
    for run in range(runs):  # what is measured once an image is known then
        search(run, rerank=how)
    index = gallery._content.state.images.index
    flat_ms, query_ms, rerank_ms, lists_ms = milliseconds(
        lambda run: flat.search(unit[run : run + 1], 10),
        search,
        lambda run: search(runs + run, rerank=how),
        lambda run: index and index.search(torch.from_numpy(unit[run : run + 1]), 10),
        runs=runs,
    )
    add_ms, flat_too = milliseconds(
        lambda run: gallery.add(more[run : run + 1], camids=camids(of_more, slice(run, run + 1))),
        lambda run: flat.search(unit[run : run + 1], 10),
        runs=runs,
    )
    rows |= {"flat, ms": flat_ms, "query, ms": query_ms, "re-ranked, ms": rerank_ms}
    rows |= {"inverted lists alone, ms": lists_ms} if index else {}
    rows |= {"add, ms": add_ms, "flat beside add, ms": flat_too}
    if n <= 10_000:
        cams = {"query_camids": camids(of_queries, slice(1)), "gallery_camids": camids(cameras)}
        rows["enhance again, ms"], rows["k_reciprocal again, ms"] = milliseconds(
            lambda run: Centralizer(method=CASES[case]).enhance(queries[:1], images, **cams),
            lambda run: pose2id.k_reciprocal(queries[:1], images, 10, 3),
            runs=3,
        )
    return rows


SETS = (
    ("cuhk03_p1_det_val100", "osnet_msmt17"),
    ("cuhk03_p1_det_val100", "osnet_lda256"),
    ("cuhk03_p1_det_val100", "osnet_market1501"),
    ("3dpes", "osnet_msmt17"),
    ("3dpes", "retail0288"),
    ("viper", "osnet_msmt17"),
    ("pku_reid", "osnet_msmt17"),
    ("cuhk03_p1_det_843", "osnet_msmt17"),
)


def streamed(folder: Path, name: str, model: str, known: bool, orders: int) -> dict[str, Any]:
    """MAP and Rank-1 in percent: of `enhance`, and of galleries that got their images one by one in random order."""
    data = np.load(folder / f"{name}.npz")
    is_query = data["is_query"].astype(bool)
    features = data[f"feat_{model}"].astype(np.float32)
    q, g = features[is_query], features[~is_query]
    labels = [data[key][mask] for key in ("pids", "camids") for mask in (is_query, ~is_query)]
    q_cams, g_cams = labels[2:]
    cams = {"query_camids": q_cams, "gallery_camids": g_cams} if known else {}
    batch = pose2id.evaluate(*Centralizer().enhance(q, g, **cams, camera_statistics="gallery"), *labels)
    found, refitted = [], []
    for order in range(orders):
        gallery = Gallery()
        for at in np.random.default_rng(order).permutation(len(g)).tolist():
            gallery.add(g[at : at + 1], ids=[at], camids=g_cams[at : at + 1] if known else None)
        asked = {"query_camids": q_cams} if known else {}
        found.append(pose2id.evaluate_rank(matrix(gallery.search(q, len(g), **asked), len(g)), *labels))
        if order == 0:
            gallery.refit()
            refitted.append(pose2id.evaluate_rank(matrix(gallery.search(q, len(g), **asked), len(g)), *labels))
    return {
        "enhance": figures(batch),
        "streamed": [figures(result) for result in found],
        "refitted": figures(refitted[0]),
        "queries": len(q),
    }


def reranked(folder: Path, name: str, model: str, known: bool, orders: int) -> dict[str, Any]:
    """Re-ranking among the nearest 300 images beside that over all, in percent: up to 60 queries, other cameras.

    Queries whose first image is another; how many of ten images are the same; Rank-1 and precision among ten of both.
    """
    data = np.load(folder / f"{name}.npz")
    is_query = data["is_query"].astype(bool)
    features = data[f"feat_{model}"].astype(np.float32)
    q, q_pids, q_cams = (
        x[is_query][:: max(1, int(is_query.sum()) // 60)] for x in (features, data["pids"], data["camids"])
    )
    gallery = Gallery()
    gallery.add(features[~is_query], camids=data["camids"][~is_query] if known else None)
    options: dict[str, Any] = {"rerank": "k-reciprocal"}
    if known:
        options = {"rerank": "camera", "query_camids": q_cams, "exclude_camera": True}
    near = gallery.search(q, 10, **options).ids
    kept, state.NEARBY = state.NEARBY, len(gallery)
    try:
        every = gallery.search(q, 10, **options).ids
    finally:
        state.NEARBY = kept
    same = [len({*a} & {*b}) / 10 for a, b in zip(near, every, strict=True)]
    row = [float((near[:, 0] != every[:, 0]).mean()), float(np.mean(same))]
    for ids in (near, every):
        right = data["pids"][~is_query][ids] == q_pids[:, None]
        row += [float(right[:, 0].mean()), float(right.mean())]
    names = ("first differs", "ten the same", "Rank-1", "of ten", "Rank-1, all", "of ten, all")
    return {key: round(100 * value, 1) for key, value in zip(names, row, strict=True)}


def unknown(folder: Path, name: str, model: str, known: bool, splits: int) -> dict[str, Any]:
    """Share of strangers who are taken for somebody (FPR), and of people in the gallery who are (TPR), in percent.

    Half of the people are in the gallery, seen by other cameras than their queries. Thresholds for 10 % and 1 %:
    without labels, and with the queries of half of the strangers, measured on those of the others.
    """
    data = np.load(folder / f"{name}.npz")
    is_query = data["is_query"].astype(bool)
    features = data[f"feat_{model}"].astype(np.float32)
    pids, cams = data["pids"], data["camids"]
    rates: dict[str, list[list[float]]] = {}
    for split in range(splits):
        rng = np.random.default_rng(split)
        people = rng.permutation(np.unique(pids[is_query]))
        asking = {person: rng.choice(cams[is_query & (pids == person)]) for person in people.tolist()}
        of_query = cams == np.array([asking.get(person, -1) for person in pids.tolist()])
        inside, tuning, strangers = np.split(people, [len(people) // 2, 3 * len(people) // 4])
        here = ~is_query & ~of_query & np.isin(pids, inside)
        gallery = Gallery()
        gallery.add(features[here], camids=cams[here] if known else None)
        genuine, tuned, others = (
            np.flatnonzero(is_query & of_query & np.isin(pids, some))
            for some in (np.intersect1d(inside, pids[here]), tuning, strangers)
        )
        for rate in (0.1, 0.01):
            cameras = cams[tuned] if known else None
            labelled = gallery.calibrate(impostor=features[tuned], impostor_camids=cameras, fpr=rate)
            for kind, threshold in (("without labels", gallery.calibrate(fpr=rate)), ("with labels", labelled)):
                found = [
                    gallery.search(features[at], 1, query_camids=cams[at] if known else None, threshold=threshold)
                    for at in (others, genuine)
                ]
                shares = [float((result.ids >= 0).mean()) for result in found]
                rates.setdefault(f"{kind}, {rate:.0%}", []).append(shares)
    return {kind: [round(100 * float(x), 1) for x in np.mean(rows, 0)] for kind, rows in rates.items()}


def matrix(result: Any, n: int) -> Any:
    """Distances (Q, n) of a search for all images, whose ids count them."""
    distances = np.empty((len(result.ids), n), dtype=np.float32)
    np.put_along_axis(distances, result.ids, result.distances, 1)
    return distances


def figures(result: Any) -> list[float]:
    return [round(100 * result.mAP, 2), round(100 * result.rank(1), 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000], help="images")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="methods")
    parser.add_argument("--dim", type=int, help="of features; else 512 up to 10,000 images, and 256 beyond")
    parser.add_argument("--exact", action="store_true", help="without inverted lists, at all sizes")
    parser.add_argument("--runs", type=int, default=60, help="single calls")
    parser.add_argument("--accuracy", type=Path, help="folder of real features")
    parser.add_argument("--unknown", type=Path, help="folder of real features")
    parser.add_argument("--reranked", type=Path, help="folder of real features")
    parser.add_argument("--orders", type=int, default=3, help="random orders of images, or splits of people")
    options = parser.parse_args()
    measures = ((streamed, options.accuracy), (unknown, options.unknown), (reranked, options.reranked))
    for measured, folder in measures:
        for name, model in SETS if folder is not None else ():
            for known in (False, True):
                row = measured(folder, name, model, known, options.orders)
                print(f"{name} {model}{', cameras' if known else ''}: {row}", flush=True)
    if any(folder is not None for _, folder in measures):
        return
    for n in options.sizes:
        dim = options.dim or (512 if n <= 10_000 else 256)
        for case in options.cases:
            print(f"\n{n:,} x {dim}, {case}")
            with multiprocessing.get_context("spawn").Pool(1) as process:  # whose memory is its own
                rows = process.apply(measure, (n, dim, case, options.runs, options.exact))
            for name, value in rows.items():
                print(f"  {name}: {value if isinstance(value, str) else format(value, '.4g')}", flush=True)


if __name__ == "__main__":
    main()
