"""The table of the command line, the demo and the examples: each half of the method and re-ranking, measured alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.centralization.id2 import id2_score
from pose2id.centralization.nfc import nfc as published_nfc
from pose2id.centralizer import Centralizer
from pose2id.io.checks import checked_flags
from pose2id.io.feature_files import FeatureFile
from pose2id.retrieval.evaluation import EvaluationResult, evaluate, evaluate_rank
from pose2id.retrieval.rerank import k_reciprocal

_RANKS = (1, 5, 10)
_WITH_CAMERAS = ", cameras"

Pair = tuple[NDArray[Any], NDArray[Any]]  # of the queries, of the gallery


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table.

    Attributes:
        name: what was done to the features.
        result: retrieval quality.
        id2: ID² score of query and gallery together (published convention); None where only distances changed.
    """

    name: str
    result: EvaluationResult
    id2: float | None


def compare(
    features: FeatureFile,
    *,
    nfc: bool = True,
    rerank: bool = True,
    centralizer: Centralizer | None = None,
    generated: Pair | None = None,
    control: bool = False,
) -> list[Row]:
    """Measure the features as they are, with NFC, with the safe default, with generated images (IPG), and re-ranked.

    "NFC" is the published method. The row of the safe default is called by its method, "auto", and comes a second time
    with ", cameras" where both sets have cameras, as does "rerank": `Centralizer.rerank`.

    Args:
        features: features with identity labels; camera labels are used where both sets have them.
        nfc: measure the rows with the published NFC.
        rerank: measure published re-ranking (20, 6, 0.3), of all rows but those of the default, and the safe one.
        centralizer: whose `enhance`, `rerank` and `fuse` are measured; default `Centralizer()`. With method="nfc" its
            k1 and k2 are those of the rows with NFC, beside "auto".
        generated: features (Q, M, D) and (G, M, D) of generated images of the same images: measure the rows with IPG.
            Both they and `features` must then be the model's raw outputs.
        control: also measure IPG with the mean generated feature of all people in each pose. It carries no identity,
            yet changes the scores, ID² above all; only what IPG gains beyond it comes from the generated images.

    Returns:
        The rows, the baseline first.

    Raises:
        ValueError: the features have no identity labels, or no query has a match; or as in `fuse`.
    """
    checked_flags(nfc=nfc, rerank=rerank, control=control)
    labels, centralizer = _labels(features), centralizer or Centralizer()
    safe, pair, cameras = _unpublished(centralizer), _pair(features), _cameras(features)
    ways = {f"{safe.method}{suffix}": camids for suffix, camids in cameras.items()}
    if safe.method in ("cameras", "centring"):  # never without cameras
        ways = {safe.method: cameras.get(_WITH_CAMERAS, {})}
    sets: list[tuple[str, str | None, Pair]] = [("baseline", "re-ranking", pair)]
    if nfc:
        sets.append(("NFC", "NFC + re-ranking", with_nfc(pair, centralizer)))
    sets += [(name, None, safe.enhance(*pair, **camids)) for name, camids in ways.items()]
    sources = {} if generated is None else {"IPG": generated}
    if generated is not None and control:
        sources["control"] = _means(generated)
    for name, source in sources.items():
        fused = _fused(pair, source, centralizer, _number(source))
        sets.append((name, f"{name} + re-ranking", fused))
        if nfc:
            sets.append((f"{name} + NFC", f"{name} + NFC + re-ranking", with_nfc(fused, centralizer)))
        way, camids = next(iter(ways.items()))
        sets.append((f"{name} + {way}", None, safe.enhance(*fused, **camids)))
    pids = np.concatenate(labels[:2])
    rows = [Row(name, evaluate(*x, *labels), id2_score(np.concatenate(x), pids)) for name, _, x in sets]
    if rerank:
        rows += [Row(name, evaluate_rank(k_reciprocal(*x), *labels), None) for _, name, x in sets if name]
        for suffix, camids in cameras.items():
            rows.append(Row(f"rerank{suffix}", evaluate_rank(safe.rerank(*pair, **camids), *labels), None))
    return rows


def with_nfc(pair: Pair, centralizer: Centralizer) -> Pair:
    """Both sets by the published NFC, with the parameters of a centralizer."""
    options: dict[str, Any] = {name: getattr(centralizer, name) for name in ("backend", "neighbors", "max_memory")}
    query, gallery = (published_nfc(x, centralizer.k1, centralizer.k2, **options) for x in pair)
    return query, gallery


def by_number(
    features: FeatureFile, generated: Pair, *, centralizer: Centralizer | None = None
) -> dict[str, list[float]]:
    """Mean average precision by number of generated images, on both sides alike (the paper's Table 6).

    Args:
        features: raw features with identity labels.
        generated: raw features (Q, M, D) and (G, M, D) of their generated images; the first ones are taken.
        centralizer: as in `compare`.

    Returns:
        M + 1 fractions for "IPG", and for "IPG + NFC", as published: with 0 to M images. Those of 0 are the baseline's
        and NFC's.

    Raises:
        ValueError: as in `compare`.
    """
    labels, centralizer = _labels(features), centralizer or Centralizer()
    curves: dict[str, list[float]] = {"IPG": [], "IPG + NFC": []}
    for number in range(_number(generated) + 1):
        fused = _fused(_pair(features), generated, centralizer, number)
        curves["IPG"].append(evaluate(*fused, *labels).mAP)
        curves["IPG + NFC"].append(evaluate(*with_nfc(fused, centralizer), *labels).mAP)
    return curves


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, in percent; ID² as it is."""
    head = ["", "mAP", *(f"Rank-{r}" for r in _RANKS), "mINP", "ID²"]
    id2s = ["-" if row.id2 is None else f"{row.id2:.4f}" for row in rows]
    return _aligned([head, *([row.name, *_percent(row.result), id2] for row, id2 in zip(rows, id2s, strict=True))])


def number_table(curves: Mapping[str, Sequence[float]]) -> str:
    """What `by_number` gives as aligned text, in percent, one column per number of generated images."""
    numbers = range(max(map(len, curves.values())))
    return _aligned(
        [["mAP", *map(str, numbers)], *([name, *(f"{100 * v:.2f}" for v in mAPs)] for name, mAPs in curves.items())]
    )


def records(rows: Sequence[Row]) -> list[dict[str, str | float | int | None]]:
    """The rows for JSON, as fractions."""
    return [
        {
            "name": row.name,
            "mAP": row.result.mAP,
            **{f"rank{r}": row.result.rank(r) for r in _RANKS},
            "mINP": row.result.mINP,
            "id2": row.id2,
            "num_valid_queries": row.result.num_valid_queries,
        }
        for row in rows
    ]


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *values in cells:
        numbers = "  ".join(value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
        lines.append(f"{name.ljust(widths[0])}  {numbers}")
    return "\n".join(lines)


def _labels(features: FeatureFile) -> tuple[Any, ...]:
    if features.q_pids is None or features.g_pids is None:
        raise ValueError("q_pids and g_pids must be given to evaluate features (query_label, gallery_label in .mat).")
    return features.q_pids, features.g_pids, features.q_camids, features.g_camids


def _pair(features: FeatureFile) -> Pair:
    # Half precision would round what NFC gives back.
    query, gallery = (
        x.astype(np.float32) if x.dtype == np.float16 else x for x in (features.query_feats, features.gallery_feats)
    )
    return query, gallery


def _unpublished(centralizer: Centralizer) -> Centralizer:
    """The same unless its method is NFC, which has rows of its own: then the default."""
    if centralizer.method != "nfc":
        return centralizer
    return Centralizer(backend=centralizer.backend, max_memory=centralizer.max_memory)


def _cameras(features: FeatureFile) -> dict[str, dict[str, Any]]:
    """Keywords without cameras and, where both sets have them, with cameras; by what is added to a row's name."""
    if features.q_camids is None or features.g_camids is None:
        return {"": {}}
    return {"": {}, _WITH_CAMERAS: {"query_camids": features.q_camids, "gallery_camids": features.g_camids}}


def _number(generated: Pair) -> int:
    of_query, of_gallery = (int(x.shape[1]) for x in generated)
    if of_query != of_gallery:
        wanted = f"as many images of a query as of a gallery image, got {of_query} and {of_gallery}"
        raise ValueError(f"generated must have {wanted}. Pass the first {min(of_query, of_gallery)} of each.")
    return of_query


def _means(generated: Pair) -> Pair:
    """The mean of all people in each pose, for every image."""
    mean = np.concatenate(generated).mean(axis=0)
    query, gallery = (np.broadcast_to(mean, x.shape) for x in generated)
    return query, gallery


def _fused(pair: Pair, generated: Pair, centralizer: Centralizer, number: int) -> Pair:
    """Features with the first so many generated images (eq. 9); with none the features as they are."""
    if number == 0:
        return pair
    query, gallery = (centralizer.fuse(x, of_x[:, :number]) for x, of_x in zip(pair, generated, strict=True))
    return query, gallery


def _percent(result: EvaluationResult) -> list[str]:
    values = (result.mAP, *map(result.rank, _RANKS), result.mINP)
    return [f"{100 * value:.2f}" for value in values]
