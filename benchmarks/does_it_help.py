"""Does it help? Every method and re-ranking on real features: mAP, Rank-1, mINP, and gains with bootstrap intervals.

    python benchmarks/does_it_help.py DATA_DIR --out out/help [market1501.npz msmt17.npz ...]

DATA_DIR holds the sets of `SETS`, one array (N, D) of features of all images beside pids, camids and is_query; those
that are missing are passed over, and "-" means none. Further files are feature files of your own (query_feats,
gallery_feats, q_pids, g_pids, q_camids, g_camids). Nothing is chosen by a result: settings are the library's defaults
and the published ones. Drawn people that deceive the gate come last. All draws and the bootstrap have fixed seeds.

Each form of a set is written to OUT/forms as soon as it is measured, and is not measured again; delete OUT to start
anew. In the end OUT has results.json, tables.md and gains.png (extra "plots").
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pose2id import Centralizer, centre_cameras, evaluate_rank, evidence, graph_propagation, k_reciprocal
from pose2id.io.feature_files import load_features
from pose2id.io.rows import Rows
from pose2id.neighbors.search import tying_distances
from pose2id.retrieval.evaluation import RankingProtocol

CUHK03, LARGE = "cuhk03_p1_det_val100.npz", "cuhk03_p1_det_843.npz"
SETS = [  # name, file, features
    ("CUHK03, OSNet MSMT17", CUHK03, "feat_osnet_msmt17"),
    ("CUHK03, OSNet Market1501", CUHK03, "feat_osnet_market1501"),
    ("CUHK03, OSNet in-domain", CUHK03, "feat_osnet_lda256"),
    ("CUHK03, MobileNetV2 ImageNet", CUHK03, "feat_mobilenetv2_imagenet"),
    ("CUHK03, 843 people, OSNet MSMT17", LARGE, "feat_osnet_msmt17"),
    ("3DPeS, OSNet MSMT17", "3dpes.npz", "feat_osnet_msmt17"),
    ("3DPeS, retail-0288", "3dpes.npz", "feat_retail0288"),
    ("PKU-Reid, OSNet MSMT17", "pku_reid.npz", "feat_osnet_msmt17"),
    ("VIPeR, OSNet MSMT17", "viper.npz", "feat_osnet_msmt17"),
]
WHOLE, SINGLE, ONE, MIXED = "whole", "single-shot", "one query a person", "half appear once"
DERIVED = {SINGLE: 5, ONE: 3, MIXED: 3}  # draws, seeds 0, 1, ...
NOT_DERIVED = (LARGE, "viper.npz")
LOOK_ALIKE, STRONG = "drawn, people in 40 uniforms", "drawn, cameras stronger than people"
WRONG_CAMERAS = ("CUHK03, OSNet MSMT17", "CUHK03, OSNet in-domain", "PKU-Reid, OSNet MSMT17")
ALONE = ("CUHK03, OSNet MSMT17", "PKU-Reid, OSNet MSMT17")
SAMPLED = 40  # queries that are asked one at a time
AS_IS = "as is"
RESAMPLES, SEED = 1000, 0
MEASURES = ("mAP", "Rank-1", "mINP")

Distances = NDArray[np.float32]


@dataclass(frozen=True)
class Form:
    """A set, or a draw from one: features, identities and cameras of queries and gallery."""

    q: NDArray[np.float32]
    g: NDArray[np.float32]
    q_pids: NDArray[Any]
    g_pids: NDArray[Any]
    q_cams: NDArray[Any]
    g_cams: NDArray[Any]

    @property
    def labels(self) -> tuple[NDArray[Any], ...]:
        """For `evaluate_rank`."""
        return self.q_pids, self.g_pids, self.q_cams, self.g_cams

    def queries(self, rows: Any) -> Form:
        """Some of the queries."""
        return replace(self, q=self.q[rows], q_pids=self.q_pids[rows], q_cams=self.q_cams[rows])

    def gallery(self, rows: Any) -> Form:
        """A part of the gallery."""
        return replace(self, g=self.g[rows], g_pids=self.g_pids[rows], g_cams=self.g_cams[rows])


# Forms


def one_each(pids: NDArray[Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """One row of each person, ascending."""
    order = rng.permutation(len(pids))
    return np.sort(order[np.unique(pids[order], return_index=True)[1]])


def derived(form: Form, kind: str, seed: int) -> Form:
    """A draw: one gallery image a person, one query a person, or one gallery image of every other person."""
    rng = np.random.default_rng(seed)
    if kind == ONE:
        return form.queries(one_each(form.q_pids, rng))
    once = one_each(form.g_pids, rng)
    if kind == SINGLE:
        return form.gallery(once)
    people = np.unique(form.g_pids)
    several = rng.choice(people, len(people) // 2, replace=False)
    return form.gallery(np.union1d(once, np.flatnonzero(np.isin(form.g_pids, several))))


def read_set(path: Path, features: str) -> Form:
    """A set of DATA_DIR."""
    with np.load(path, allow_pickle=False) as file:
        query = file["is_query"].astype(bool)
        rows, pids, cams = file[features].astype(np.float32), file["pids"], file["camids"]
    return Form(rows[query], rows[~query], pids[query], pids[~query], cams[query], cams[~query])


def read_own(path: Path) -> Form:
    """A feature file with all labels."""
    file = load_features(path)
    labels = [file.q_pids, file.g_pids, file.q_camids, file.g_camids]
    if any(each is None for each in labels):
        raise SystemExit(f"{path} must hold q_pids, g_pids, q_camids and g_camids.")
    return Form(file.query_feats.astype(np.float32), file.gallery_feats.astype(np.float32), *map(np.asarray, labels))


def forms(data: str, own: list[Path]) -> Iterator[tuple[str, str, Callable[[], list[Form]]]]:
    """Name, kind and draws of everything that is measured; draws are made when asked for."""
    found = [entry for entry in SETS if (Path(data) / entry[1]).is_file()]
    for name, file, features in found:
        yield name, WHOLE, partial(draws_of, Path(data) / file, features, WHOLE)
    for path in own:
        yield path.stem, WHOLE, partial(draws_of, path, None, WHOLE)
    for kind in DERIVED:
        for name, file, features in found:
            if file not in NOT_DERIVED:
                yield name, kind, partial(draws_of, Path(data) / file, features, kind)
    yield LOOK_ALIKE, WHOLE, lambda: [drawn(groups=40, spread=0.5, noise=0.6, shift=0.3, images=1)]
    yield STRONG, WHOLE, lambda: [drawn(groups=300, spread=0.5, noise=0.6, shift=1.1, images=4)]


def drawn(*, groups: int, spread: float, noise: float, shift: float, images: int) -> Form:
    """300 people, each somewhere around the middle of a group, seen by two cameras: what deceives the gate."""
    rng, people, dim = np.random.default_rng(0), 300, 64
    middles = rng.normal(size=(groups, dim))[rng.integers(0, groups, people)]
    persons, cameras = middles + spread * rng.normal(size=(people, dim)), shift * rng.normal(size=(2, dim))
    g_pids, q_pids = np.repeat(np.arange(people), images), np.arange(people)
    g_cams = rng.integers(0, 2, len(g_pids))
    q_cams = (g_cams[::images] + 1) % 2
    q, g = (
        (persons[pids] + cameras[cams] + noise * rng.normal(size=(len(pids), dim))).astype(np.float32)
        for pids, cams in ((q_pids, q_cams), (g_pids, g_cams))
    )
    return Form(q, g, q_pids, g_pids, q_cams, g_cams)


def draws_of(path: Path, features: str | None, kind: str) -> list[Form]:
    """The set itself, or its draws."""
    whole = read_own(path) if features is None else read_set(path, features)
    return [whole] if kind == WHOLE else [derived(whole, kind, seed) for seed in range(DERIVED[kind])]


# Methods


def plain(q: Any, g: Any) -> Distances:
    """Distances of features that `evaluate` ranks by, with its rule for ties."""
    query, gallery = Rows(q, "q", normalize=True), Rows(g, "g", normalize=True)
    return tying_distances(gallery)(query.read(slice(None))).numpy().astype(np.float32)


def enhanced(form: Form, method: str, *, cameras: bool) -> Distances:
    """By `Centralizer.enhance`."""
    camids = {"query_camids": form.q_cams, "gallery_camids": form.g_cams} if cameras else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # NFC where the gate is shut
        return plain(*Centralizer(method=method).enhance(form.q, form.g, **camids))


def propagated(form: Form) -> Distances:
    """GCR on centred features."""
    cameras = form.q_cams, form.g_cams
    return plain(*graph_propagation(*centre_cameras(form.q, form.g, *cameras), *cameras))


def reranked(form: Form, *, cameras: bool) -> Distances:
    """By `Centralizer.rerank`."""
    camids = {"query_camids": form.q_cams, "gallery_camids": form.g_cams} if cameras else {}
    return Centralizer().rerank(form.q, form.g, **camids)


def ca_jaccard(form: Form) -> Distances:
    """The camera-aware Jaccard distance with its published parameters."""
    sizes = {"k1_within": 5, "k1_across": 20, "k2_within": 3, "k2_across": 3, "lambda_value": 0.3}
    return k_reciprocal(form.q, form.g, q_camids=form.q_cams, g_camids=form.g_cams, **sizes)


METHODS: dict[str, Callable[[Form], Distances]] = {
    AS_IS: lambda form: plain(form.q, form.g),
    "NFC": lambda form: enhanced(form, "nfc", cameras=False),
    "auto": lambda form: enhanced(form, "auto", cameras=False),
    "centring": lambda form: enhanced(form, "centring", cameras=True),
    "guarded with cameras": lambda form: enhanced(form, "guarded", cameras=True),
    "auto with cameras": lambda form: enhanced(form, "auto", cameras=True),
    "cameras, unguarded": lambda form: enhanced(form, "cameras", cameras=True),
    "GCR on centred": propagated,
    "k-reciprocal": lambda form: k_reciprocal(form.q, form.g, k1=20, k2=6, lambda_value=0.3),
    "CA-Jaccard": ca_jaccard,
    "rerank": lambda form: reranked(form, cameras=False),
    "rerank with cameras": lambda form: reranked(form, cameras=True),
}
SHOWN = ("NFC", "auto", "auto with cameras", "rerank with cameras")


# Measuring


def per_query(distances: Distances, form: Form) -> NDArray[np.float64]:
    """(Q, 3): average precision, whether the first is right, inverse penalty; nan without a match."""
    result = evaluate_rank(distances, *form.labels)
    protocol = RankingProtocol(len(form.q), len(form.g), *form.labels)
    values = np.full((len(form.q), 3), np.nan)
    values[:, 0] = result.average_precision
    for query in np.flatnonzero(~np.isnan(result.average_precision)):
        matches, dropped = protocol.of_query(query)
        row = np.delete(distances[query], dropped)
        right = np.delete(np.isin(np.arange(len(form.g)), matches), dropped)
        ranks = np.flatnonzero(right[np.argsort(row, kind="stable")]) + 1
        values[query, 1:] = ranks[0] == 1, len(ranks) / ranks[-1]
    found, own = (result.rank(1), result.mINP), np.nanmean(values[:, 1:], 0)
    if not np.allclose(found, own, atol=1e-9):
        raise AssertionError(f"Rank-1 and mINP must be those of evaluate_rank, {found}, got {own}.")
    return values


def summary(values: NDArray[np.float64], base: NDArray[np.float64], pids: NDArray[Any]) -> dict[str, Any]:
    """Values and paired gains over `base` in percent, with 95 % intervals over query identities."""
    valid = ~np.isnan(base[:, 0])
    values, base, owner = values[valid], base[valid], np.unique(pids[valid], return_inverse=True)[1]
    people = owner.max() + 1
    times = np.random.default_rng(SEED).multinomial(people, np.full(people, 1 / people), size=RESAMPLES)
    counts = times @ np.bincount(owner)

    def of(x: NDArray[np.float64]) -> dict[str, list[float]]:
        sums = np.stack([np.bincount(owner, column, people) for column in x.T], 1)
        drawn = times @ sums / counts[:, None]
        low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
        columns = zip(MEASURES, x.mean(0), low, high, strict=True)
        return {name: [round(100 * float(y), 3) for y in three] for name, *three in columns}

    return {"value": of(values), "gain": of(values - base)}


def measured(draws: list[Form]) -> dict[str, Any]:
    """Every method on all draws, whose queries are pooled by identity."""
    pids = np.concatenate([form.q_pids for form in draws])
    values = {
        name: np.concatenate([per_query(np.asarray(method(form)), form) for form in draws])
        for name, method in METHODS.items()
    }
    return {name: summary(found, values[AS_IS], pids) for name, found in values.items()}


def other_cameras(form: Form, method: Callable[[Form], Distances]) -> Distances:
    """Images of the query's own camera come last, so that none stands before a match."""
    return np.where(form.q_cams[:, None] == form.g_cams, np.float32(np.inf), method(form))


def absent(form: Form, method: Callable[[Form], Distances]) -> Distances:
    """Images of the query's own camera are not there when the method runs, camera by camera of the queries."""
    shared = np.isin(form.q_cams, form.g_cams)
    distances = np.full((len(form.q), len(form.g)), np.inf, dtype=np.float32)
    for camera in (None, *np.unique(form.q_cams[shared])):  # None: queries whose camera the gallery lacks
        asking = np.flatnonzero(~shared if camera is None else form.q_cams == camera)
        there = np.flatnonzero(form.g_cams != camera) if camera is not None else np.arange(len(form.g))
        if len(asking) and len(there):
            distances[np.ix_(asking, there)] = method(form.queries(asking).gallery(there))
    return distances


def with_wrong_cameras(form: Form, share: float, seed: int = 0) -> Form:
    """That share of the camera ids drawn anew among the others; 1: every id at random."""
    rng = np.random.default_rng(seed)
    names = np.unique(np.concatenate([form.q_cams, form.g_cams]))

    def wrong(cams: NDArray[Any]) -> NDArray[Any]:
        if share == 1:
            return rng.choice(names, len(cams))
        shifted = (np.searchsorted(names, cams) + rng.integers(1, len(names), len(cams))) % len(names)
        return np.where(rng.random(len(cams)) < share, names[shifted], cams)

    return replace(form, q_cams=wrong(form.q_cams), g_cams=wrong(form.g_cams))


def one_by_one(form: Form, method: Callable[[Form], Distances]) -> Distances:
    """Each query alone with the gallery."""
    return np.concatenate([method(form.queries([query])) for query in range(len(form.q))])


def special(name: str, draws: list[Form]) -> Iterator[tuple[str, list[Form], Callable[[Form], Distances]]]:
    """What else is asked of whole sets: other cameras only, wrong camera ids, queries one at a time."""
    both = ("auto with cameras", "rerank with cameras")
    for method in (AS_IS, *both):
        yield f"{method}; other cameras only", draws, partial(other_cameras, method=METHODS[method])
    for method in ("auto", *both):
        yield f"{method}; own camera absent", draws, partial(absent, method=METHODS[method])
    yield from wrong_cameras(name, draws, (0.2, 1.0))
    if name in ALONE:
        form = draws[0]
        sample = np.arange(0, len(form.q), -(-len(form.q) // SAMPLED))
        some = [form.queries(sample)]
        yield f"{AS_IS}; {len(sample)} queries", some, METHODS[AS_IS]
        for method in ("rerank", "rerank with cameras"):
            in_batch = METHODS[method](form)[sample]
            yield f"{method}; {len(sample)} queries, in the batch of all", some, lambda _, found=in_batch: found
            yield f"{method}; {len(sample)} queries, one at a time", some, partial(one_by_one, method=METHODS[method])


def wrong_cameras(
    name: str, draws: list[Form], shares: tuple[float, ...]
) -> Iterator[tuple[str, list[Form], Callable[[Form], Distances]]]:
    """Camera ids that are wrong; every draw has its own."""
    if name not in WRONG_CAMERAS:
        return
    seeds = {id(form): seed for seed, form in enumerate(draws)}
    for method in ("auto with cameras", "rerank with cameras"):
        for share in shares:
            how = "all camera ids random" if share == 1 else f"{share:.0%} of camera ids wrong"

            def asked(form: Form, method: str = method, share: float = share) -> Distances:
                return METHODS[method](with_wrong_cameras(form, share, seeds[id(form)]))

            yield f"{method}; {how}", draws, asked


def moved_alone(form: Form) -> list[float]:
    """The most that a value of a query, and of the gallery, moves by "auto" where a query with cameras is alone."""
    together = Centralizer().enhance(form.q, form.g, query_camids=form.q_cams, gallery_camids=form.g_cams)
    most = [0.0, 0.0]
    for query in range(0, len(form.q), -(-len(form.q) // SAMPLED)):
        one = form.queries([query])
        alone = Centralizer().enhance(one.q, one.g, query_camids=one.q_cams, gallery_camids=one.g_cams)
        before = together[0][query], together[1]
        most = [max(x, float(np.abs(a - b).max())) for x, a, b in zip(most, alone, before, strict=True)]
    return [round(x, 3) for x in most]


def record(name: str, kind: str, draws: list[Form]) -> dict[str, Any]:
    """Everything about one form."""
    first, methods = draws[0], measured(draws)
    asked = special(name, draws) if kind == WHOLE else wrong_cameras(name, draws, (1.0,)) if kind == SINGLE else ()
    for question, some, method in asked:
        values = np.concatenate([per_query(method(form), form) for form in some])
        methods[question] = summary(values, values, np.concatenate([form.q_pids for form in some]))
    people = len(np.unique(first.g_pids))
    return {
        "name": name,
        "kind": kind,
        "draws": len(draws),
        "queries": len(first.q),
        "gallery": len(first.g),
        "people": people,
        "images a person": round(len(first.g) / people, 1),
        "cameras": len(np.unique(np.concatenate([first.q_cams, first.g_cams]))),
        "gates": [round(evidence(form.g).gate, 3) for form in draws],
        "gates with cameras": [gate_with_cameras(form) for form in draws],
        "moved alone": moved_alone(first) if kind == WHOLE else None,
        "methods": methods,
    }


def gate_with_cameras(form: Form) -> float | None:
    """Of features with centred cameras; None where all cameras have too few images."""
    found = evidence(centre_cameras(form.q, form.g, form.q_cams, form.g_cams)[1], form.g_cams)
    return round(found.gate, 3) if found.k else None


# Tables and figure


def title(row: dict[str, Any]) -> str:
    """The set's name, and its form."""
    return row["name"] if row["kind"] == WHOLE else f"{row['name']}, {row['kind']}"


def pair(cell: dict[str, Any], base: dict[str, Any]) -> str:
    """MAP / Rank-1, each in italics where it is below `base`."""
    values = [(cell["value"][measure][0], base["value"][measure][0]) for measure in MEASURES[:2]]
    return " / ".join(f"*{x:.1f}*" if x < least - 0.049 else f"{x:.1f}" for x, least in values)


def with_interval(three: list[float], signed: bool) -> str:
    """A figure and its interval."""
    sign = "+" if signed else ""
    return f"{three[0]:{sign}.1f} ({three[1]:{sign}.1f}, {three[2]:{sign}.1f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def tables(rows: list[dict[str, Any]]) -> str:
    """All tables: values, gains with intervals, mINP, special questions, evidence."""
    names, found = list(METHODS), []
    for kind in (WHOLE, *DERIVED):
        some = [row for row in rows if row["kind"] == kind]
        if not some:
            continue
        cells = [[row["name"], *(pair(row["methods"][m], row["methods"][AS_IS]) for m in names)] for row in some]
        found += [f"## {kind}: mAP / Rank-1", table(["set", *names], cells)]
        for measure in MEASURES:
            cells = [
                [
                    row["name"],
                    with_interval(row["methods"][AS_IS]["value"][measure], signed=False),
                    *(with_interval(row["methods"][m]["gain"][measure], signed=True) for m in names[1:]),
                ]
                for row in some
            ]
            found += [f"## {kind}: gain in {measure}", table(["set", *names], cells)]
    asked = [
        [title(row), m, pair(x, x), f"{x['value']['mINP'][0]:.1f}"]
        for row in rows
        for m, x in row["methods"].items()
        if ";" in m
    ]
    found += ["## Other questions", table(["set", "method", "mAP / Rank-1", "mINP"], asked)]
    about = [
        [
            title(row),
            *(str(row[key]) for key in ("queries", "gallery", "people", "images a person", "cameras")),
            ", ".join(f"{gate:g}" for gate in row["gates"]),
            ", ".join("-" if gate is None else f"{gate:g}" for gate in row["gates with cameras"]),
            "" if row["moved alone"] is None else " / ".join(f"{x:.3f}" for x in row["moved alone"]),
        ]
        for row in rows
    ]
    head = [
        "set",
        "queries",
        "gallery",
        "people",
        "images a person",
        "cameras",
        "gate",
        "gate with cameras",
        "moved alone",
    ]
    return "\n\n".join([*found, "## Sets", table(head, about)]) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Gains in mAP and Rank-1 by set: bars with intervals, losses on a red ground."""
    from pose2id.plots import new_figure  # noqa: PLC0415 - an extra

    order = {WHOLE: 0, MIXED: 1, ONE: 2, SINGLE: 3}
    rows = [row for row in rows if row["name"] not in (LOOK_ALIKE, STRONG)]
    kept = [row for row in rows if row["kind"] == WHOLE or row["name"] in WRONG_CAMERAS]
    if not kept:
        return
    kept.sort(key=lambda row: (row["images a person"] == 1, order[row["kind"]]))
    figure = new_figure(10, 1.4 + 0.62 * len(kept))
    colours = dict(zip(SHOWN, ("#7f7f7f", "#9ecae1", "#3182bd", "#08306b"), strict=True))
    names = [f"{title(row)}\n{about(row)}" for row in kept]
    for axes, measure in zip(figure.subplots(1, 2, sharey=True), MEASURES[:2], strict=True):
        for at, method in enumerate(SHOWN):
            gains = np.array([row["methods"][method]["gain"][measure] for row in kept])
            places = np.arange(len(kept)) + 0.2 * (at - 1.5)
            error = np.abs(gains[:, 1:].T - gains[:, 0])
            axes.barh(places, gains[:, 0], 0.19, xerr=error, color=colours[method], label=method, zorder=2,
                      error_kw={"elinewidth": 0.8, "ecolor": "#444444"})  # fmt: skip
            for place, (gain, low, _) in zip(places, gains, strict=True):
                if gain < -0.5:
                    axes.text(low - 0.7, place, f"{gain:.1f}", ha="right", va="center", fontsize=6.5, color="#b2182b")
        left, right = axes.get_xlim()
        axes.axvspan(left - 8, 0, color="#fddbc7", alpha=0.6, zorder=0)
        axes.set_xlim(left - 8, right)
        axes.axvline(0, color="black", linewidth=0.8, zorder=3)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=1)
        axes.set_axisbelow(True)
        axes.set_title(f"Gain in {measure}, points (below 0: harm)", fontsize=10)
        for line in np.arange(len(kept) - 1) + 0.5:
            axes.axhline(line, color="#cccccc", linewidth=0.5)
    axes.set_yticks(range(len(kept)), names, fontsize=7.5)
    axes.set_ylim(len(kept) - 0.5, -0.5)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SHOWN), fontsize=9, frameon=False)
    figure.savefig(path, dpi=80)


def about(row: dict[str, Any]) -> str:
    """What kind of set it is."""
    images = row["images a person"]
    return f"{row['people']} people, {images:g} gallery image{'s' * (images != 1)} each, {row['cameras']} cameras"


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="directory of the sets; - for none")
    parser.add_argument("files", nargs="*", type=Path, help="feature files of your own")
    parser.add_argument("--out", type=Path, default=Path("out/does-it-help"))
    parser.add_argument("--only", default="", help="only forms whose title holds this; several runs may share OUT")
    args = parser.parse_args()
    logging.getLogger("pose2id").setLevel(logging.WARNING)
    (args.out / "forms").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, kind, make in forms(args.data, args.files):
        if args.only not in f"{name}, {kind}":
            continue
        kept = args.out / "forms" / (re.sub(r"\W+", "-", f"{name}-{kind}") + ".json")
        if not kept.is_file():
            print(f"{name}, {kind}", flush=True)
            kept.write_text(json.dumps(record(name, kind, make()), indent=1), encoding="utf-8")
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
    (args.out / "results.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (args.out / "tables.md").write_text(tables(rows), encoding="utf-8")
    draw(rows, args.out / "gains.png")
    print(f"{args.out}: results.json, tables.md, gains.png. {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
