"""The table of the command line, the demo and the examples: baseline, NFC, re-ranking and both, measured alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.centralizer import Centralizer
from pose2id.evaluation import EvaluationResult, evaluate, evaluate_rank
from pose2id.feature_files import FeatureFile
from pose2id.id2 import id2_score
from pose2id.rerank import k_reciprocal

_RANKS = (1, 5, 10)


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
    features: FeatureFile, *, nfc: bool = True, rerank: bool = True, centralizer: Centralizer | None = None
) -> list[Row]:
    """Measure the features as they are, with NFC, with re-ranking (20, 6, 0.3) and with both.

    Args:
        features: features with identity labels; camera labels are used where both sets have them.
        nfc: measure the rows with NFC.
        rerank: measure the rows with re-ranking.
        centralizer: whose `enhance` is measured; default `Centralizer()`.

    Returns:
        One to four rows, the baseline first.

    Raises:
        ValueError: the features have no identity labels, or no query has a match.
    """
    if features.q_pids is None or features.g_pids is None:
        raise ValueError("q_pids and g_pids must be given to evaluate features (query_label, gallery_label in .mat).")
    labels = features.q_pids, features.g_pids, features.q_camids, features.g_camids
    # Half precision would round what NFC gives back.
    query, gallery = (_at_least_float32(x) for x in (features.query_feats, features.gallery_feats))
    sets = [("baseline", "re-ranking", query, gallery)]
    if nfc:
        enhanced = (centralizer or Centralizer()).enhance(query, gallery)
        sets.append(("NFC", "NFC + re-ranking", *enhanced))
    rows = [Row(name, evaluate(q, g, *labels), _id2(q, g, *labels[:2])) for name, _, q, g in sets]
    if rerank:
        rows += [Row(name, evaluate_rank(k_reciprocal(q, g), *labels), None) for _, name, q, g in sets]
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, in percent; ID² as it is."""
    head = ["", "mAP", *(f"Rank-{r}" for r in _RANKS), "mINP", "ID²"]
    cells = [head]
    for row in rows:
        percent = [f"{100 * value:.2f}" for value in (row.result.mAP, *_cmc(row.result), row.result.mINP)]
        cells.append([row.name, *percent, "-" if row.id2 is None else f"{row.id2:.4f}"])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *values in cells:
        numbers = "  ".join(value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
        lines.append(f"{name.ljust(widths[0])}  {numbers}")
    return "\n".join(lines)


def records(rows: Sequence[Row]) -> list[dict[str, str | float | int | None]]:
    """The rows for JSON, as fractions."""
    return [
        {
            "name": row.name,
            "mAP": row.result.mAP,
            **{f"rank{r}": value for r, value in zip(_RANKS, _cmc(row.result), strict=True)},
            "mINP": row.result.mINP,
            "id2": row.id2,
            "num_valid_queries": row.result.num_valid_queries,
        }
        for row in rows
    ]


def _at_least_float32(features: NDArray[Any]) -> NDArray[Any]:
    return features.astype(np.float32) if features.dtype == np.float16 else features


def _cmc(result: EvaluationResult) -> list[float]:
    return [result.rank(r) for r in _RANKS]


def _id2(q: NDArray[Any], g: NDArray[Any], q_pids: NDArray[np.int64], g_pids: NDArray[np.int64]) -> float:
    return id2_score(np.concatenate([q, g]), np.concatenate([q_pids, g_pids]))
