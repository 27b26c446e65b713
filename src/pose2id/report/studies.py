"""The tables and curves of the paper (arXiv 2503.00938v2), on a person's own features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pose2id.centralizer import Centralizer
from pose2id.io.checks import checked_choice, checked_count
from pose2id.io.feature_files import FeatureFile
from pose2id.report.comparison import Comparison, checked_generated, measure
from pose2id.report.ways import SIDES, Pair, Sets, Way, way_of
from pose2id.retrieval.protocols import MARKET1501, EvaluationProtocol

_ETAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_KS = range(1, 7)
_SIDES: Mapping[str, tuple[str, ...]] = {
    "nothing": (),
    "the gallery": ("gallery",),
    "the queries": ("query",),
    "both": SIDES,
}
_BOTH = "IPG + NFC"


def study(
    name: str,
    features: FeatureFile,
    *,
    protocol: EvaluationProtocol = MARKET1501,
    paths: tuple[Sequence[str], Sequence[str]] | None = None,
    centralizer: Centralizer | None = None,
    generated: Pair | None = None,
    subsets: int = 5,
    seed: int = 0,
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> Comparison:
    """The rows of one of the paper's tables or figures.

    | name | rows |
    |---|---|
    | "1", "8", "9", "10" | as it is, NFC, IPG, both: other data sets and models in the paper |
    | "2" | the same: what each half does |
    | "3" | NFC of nothing, of the gallery, of the queries, of both |
    | "4" | IPG likewise |
    | "5" | as it is, IPG, both: a model without ReID training in the paper |
    | "6" | M = 0 to all generated images of the gallery, of the queries, of both |
    | "7" | as it is and both, each also re-ranked |
    | "eta" | IPG by its weight (Figure 8) |
    | "k" | NFC by k1 and k2 (Figure 9) |
    | "same-pose" | images replaced by the first generated one, meant for one in the image's own pose (Figure 7) |

    Args:
        name: which; "1", "8", "9", "10" and "2" do without generated images, and then have rows without IPG.
        features: the model's raw features with identity labels.
        protocol: as in `compare`.
        paths: as in `compare`.
        centralizer: whose eta, k1 and k2 are used.
        generated: as in `compare`; "4", "5", "6", "eta" and "same-pose" need them.
        subsets: for "6": a row's figures are the mean over so many of the sets of M generated images.
        seed: which sets of M.
        published: the paper's figures, as of `report.published.figures`.

    Returns:
        The rows. Names of rows that the paper has, too, are those of `report.published`.
    """
    check_study(name, generated=generated is not None)
    checked_count(subsets, "subsets")
    number = checked_generated(generated)
    ways = _STUDIES[name](number, np.random.default_rng(seed), subsets)
    options: dict[str, Any] = {"protocol": protocol, "paths": paths, "centralizer": centralizer}
    return measure(ways, features, **options, generated=generated, published=published)


def check_study(name: str, *, generated: bool) -> None:
    """Raise unless there is such a table, and generated images where its rows are of them."""
    checked_choice(name, "table", tuple(_STUDIES))
    if not generated and name in ("4", "5", "6", "eta", "same-pose"):
        raise ValueError(f"generated must be given for table {name!r}, whose rows are of generated images.")


_Ways = dict[str, "Way | Sequence[Way]"]


def _halves(number: int, *_: Any) -> _Ways:
    ways: _Ways = {"baseline": _plain, "NFC": lambda sets: sets.centralized("baseline")}
    return ways | ({"IPG": _ipg, _BOTH: _whole} if number else {})


def _nfc_of_sides(*_: Any) -> _Ways:
    return {
        f"NFC of {name}": way_of(lambda sets, sides: sets.with_nfc(sets.pair, sides), sides)
        for name, sides in _SIDES.items()
    }


def _ipg_of_sides(*_: Any) -> _Ways:
    return {
        f"IPG of {name}": way_of(lambda sets, sides: sets.fused(sides=sides), sides) for name, sides in _SIDES.items()
    }


def _untrained(*_: Any) -> _Ways:
    return {"baseline": _plain, "IPG": _ipg, _BOTH: _whole}


def _numbers(number: int, rng: np.random.Generator, subsets: int) -> _Ways:
    ways: _Ways = {}
    for name, sides in list(_SIDES.items())[1:]:
        for m in range(number + 1):
            chosen = _subsets(number, m, rng, subsets)
            ways[f"IPG of {name}, M = {m}"] = [way_of(_of_poses, which, sides) for which in chosen]
    return ways


def _subsets(number: int, m: int, rng: np.random.Generator, most: int) -> list[tuple[int, ...]]:
    """Different sets of m of the images, at random; all of them where there are no more."""
    wanted = min(most, math.comb(number, m))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < wanted:
        found[tuple(sorted(rng.choice(number, m, replace=False).tolist()))] = None
    return list(found)


def _of_poses(sets: Sets, which: tuple[int, ...], sides: tuple[str, ...]) -> Pair:
    return sets.fused(tuple(x[:, list(which)] for x in sets.generated), sides)


def _with_re_ranking(number: int, *_: Any) -> _Ways:
    best, way = (_BOTH, _whole) if number else ("NFC", lambda sets: sets.centralized("baseline"))
    return {
        "baseline": _plain,
        "re-ranking": lambda sets: sets.reranked(sets.pair),
        best: way,
        f"{best} + re-ranking": lambda sets: sets.reranked(way(sets)),
    }


def _etas(*_: Any) -> _Ways:
    return {f"eta = {eta:g}": way_of(lambda sets, eta: sets.fused(eta=eta), eta) for eta in _ETAS}


def _neighbours(*_: Any) -> _Ways:
    ways: _Ways = {"baseline": _plain}
    for k1 in _KS:
        for k2 in _KS:
            ways[f"k1 = {k1}, k2 = {k2}"] = way_of(lambda sets, *k: sets.with_nfc(sets.pair, SIDES, *k), k1, k2)
    return ways


def _replaced(*_: Any) -> _Ways:
    return {f"generated in place of {name}": way_of(_first_picture, sides) for name, sides in _SIDES.items()}


def _first_picture(sets: Sets, sides: tuple[str, ...]) -> Pair:
    query, gallery = (
        of_x[:, 0] if side in sides else x for side, x, of_x in zip(SIDES, sets.pair, sets.generated, strict=True)
    )
    return query, gallery


def _plain(sets: Sets) -> Pair:
    return sets.pair


def _ipg(sets: Sets) -> Pair:
    return sets.source("IPG")


def _whole(sets: Sets) -> Pair:
    return sets.centralized("IPG")


_STUDIES: Mapping[str, Callable[..., _Ways]] = {
    "1": _halves,
    "2": _halves,
    "3": _nfc_of_sides,
    "4": _ipg_of_sides,
    "5": _untrained,
    "6": _numbers,
    "7": _with_re_ranking,
    "8": _halves,
    "9": _halves,
    "10": _halves,
    "eta": _etas,
    "k": _neighbours,
    "same-pose": _replaced,
}
