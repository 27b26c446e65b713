"""mAP, CMC and mINP, from features (rows at a time, never a full distance matrix) or from given distances.

Names at this boundary are the field's: qf, gf are query and gallery features, pids identity and camids camera labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pose2id.io.checks import (
    cameras_together,
    checked_choice,
    checked_count,
    checked_distances,
    labels_together,
    require_modules,
)
from pose2id.io.rows import Rows, checked_pair
from pose2id.neighbors.search import tying_distances
from pose2id.neighbors.visible_parts import mean_distances, query_blocks, query_memory

_METRICS = ("cosine", "euclidean")
JUNK_PID = -1
_MAX_RANK = 10**7  # the CMC curve has as many entries
_MAX_COSINE = 1.001  # rounding, in half precision too
_SHOWN_RANKS = (1, 5, 10)
_SAMPLED_QUERIES = 256
_LEAST_QUERIES = 3  # a few queries are better in reverse by chance


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Retrieval quality as fractions in [0, 1]; prints in percent.

    Attributes:
        mAP: mean average precision over the valid queries.
        cmc: (max_rank,) float64; cmc[r - 1] is Rank-r, the share of valid queries with a match among the first r.
        mINP: mean inverse negative penalty: number of matches over the rank of the last one (Ye et al., 2021).
        num_valid_queries: queries with at least one match in the gallery; the others count nowhere.
        average_precision: (Q,) float64, of each query; nan where it has no match. Of several trials one after another.
        trials: the results of several trials, whose means the others are (num_valid_queries is rounded); empty for one.

    Results are equal if all their values are.
    """

    mAP: float  # noqa: N815 - the field's name
    cmc: NDArray[np.float64] = field(repr=False)
    mINP: float  # noqa: N815
    num_valid_queries: int
    average_precision: NDArray[np.float64] = field(repr=False)
    trials: tuple[EvaluationResult, ...] = field(default=(), repr=False)

    @property
    def rank1(self) -> float:
        """Rank-1 accuracy."""
        return float(self.cmc[0])

    def rank(self, r: int) -> float:
        """Rank-r accuracy, r in 1..max_rank."""
        return float(self.cmc[checked_count(r, "r", most=len(self.cmc)) - 1])

    def to_dict(self) -> dict[str, float]:
        """Fractions by name: mAP, rank1, rank5, rank10, mINP, num_valid_queries; of several trials also mAP_std etc.

        Standard deviations are those of the trials at hand (divided by their number).
        """
        figures = self._figures()
        for name in list(figures) if self.trials else ():
            figures[f"{name}_std"] = float(np.std([trial._figures()[name] for trial in self.trials]))
        return {**figures, "num_valid_queries": self.num_valid_queries}

    def to_frame(self) -> Any:
        """`to_dict` as a pandas DataFrame of one row.

        Raises:
            ImportError: pandas is not installed.
        """
        require_modules("to_frame needs pandas", "pandas", "pandas")
        import pandas as pd  # noqa: PLC0415 - optional

        return pd.DataFrame([self.to_dict()])

    def _figures(self) -> dict[str, float]:
        ranks = {f"rank{r}": self.rank(r) for r in _SHOWN_RANKS if r <= len(self.cmc)}
        return {"mAP": self.mAP, **ranks, "mINP": self.mINP}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EvaluationResult):
            return NotImplemented
        if self.trials != other.trials:
            return False
        names = [field.name for field in fields(self) if field.name != "trials"]
        return all(np.array_equal(getattr(self, n), getattr(other, n), equal_nan=True) for n in names)

    def __hash__(self) -> int:
        return hash((self.mAP, self.mINP, self.num_valid_queries))

    def __str__(self) -> str:
        """One line in percent: mAP, Rank-1, Rank-5, Rank-10, mINP, number of valid queries."""
        ranks = "".join(f"  Rank-{r} {self.cmc[r - 1]:.2%}" for r in _SHOWN_RANKS if r <= len(self.cmc))
        trials = f", mean of {len(self.trials)} trials" if self.trials else ""
        return f"mAP {self.mAP:.2%}{ranks}  mINP {self.mINP:.2%}  ({self.num_valid_queries} valid queries{trials})"

    def _repr_html_(self) -> str:
        """A table for notebooks, in percent."""
        figures = self._figures()
        head = "".join(f"<th>{name.replace('rank', 'Rank-')}</th>" for name in figures)
        values = "".join(f"<td>{value:.2%}</td>" for value in figures.values())
        return f"<table><tr>{head}<th>valid queries</th></tr><tr>{values}<td>{self.num_valid_queries}</td></tr></table>"


def mean_of(results: Sequence[EvaluationResult]) -> EvaluationResult:
    """The mean over trials; of one trial its result."""
    if len(results) == 1:
        return results[0]
    return EvaluationResult(
        mAP=float(np.mean([result.mAP for result in results])),
        cmc=np.mean([result.cmc for result in results], axis=0),
        mINP=float(np.mean([result.mINP for result in results])),
        num_valid_queries=round(float(np.mean([result.num_valid_queries for result in results]))),
        average_precision=np.concatenate([result.average_precision for result in results]),
        trials=tuple(results),
    )


def evaluate(
    qf: Any,
    gf: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any = None,
    g_camids: Any = None,
    *,
    q_visibility: Any = None,
    g_visibility: Any = None,
    max_rank: int = 50,
    metric: str = "cosine",
    max_memory: int | None = None,
) -> EvaluationResult:
    """Rank the gallery for every query and measure mAP, CMC and mINP (Market1501's protocol, single-query).

    For each query, gallery images of its own identity *and* camera are dropped, and so are those of pid -1 (junk).
    Distractors (pid 0, or any identity without a query) stay and count as wrong. Queries without a match are skipped.
    Distances are computed in float32 (float64 where a set is float64), those of parts in float64, a block of rows at a
    time. Ties: images at equal distances, those with equal features and visibility among them, rank by gallery index.

    Args:
        qf: (Q, D) query features, or (Q, P, D) of parts, which are ranked as by `part_distances`; floating numpy array
            (memory-mapped too) or torch tensor.
        gf: (G, D) or (G, P, D) gallery features, on the same device.
        q_pids: (Q,) identities: integers, whole floats or strings, of one kind on both sides; a string that spells an
            integer is that integer.
        g_pids: (G,) identities.
        q_camids: (Q,) cameras, of the same kinds; give both or neither. Without them nothing is dropped by camera.
        g_camids: (G,) cameras.
        q_visibility: (Q, P) of the queries' parts, as in `part_distances`: None, booleans, or weights. Gallery images
            that share no visible part with a query come last, by index.
        g_visibility: (G, P) of the gallery's parts.
        max_rank: length of the CMC curve, at most 10**7.
        metric: "cosine": Euclidean distance of the L2-normalised features, which orders by cosine similarity; each part
            is normalised by itself. "euclidean": Euclidean distance of the features as they are.
        max_memory: bytes for working blocks, at least 1 MiB, but for the distances of one query to the whole gallery
            and about 100 bytes a gallery image. None: 32 MiB, but for those of 64 queries.

    Returns:
        Fractions in an `EvaluationResult`.
    """
    found, q, g = feature_distances(qf, gf, q_visibility, g_visibility, metric=metric, max_memory=max_memory)
    return measured(found, RankingProtocol(q, g, q_pids, g_pids, q_camids, g_camids), max_rank)


def feature_distances(
    qf: Any,
    gf: Any,
    q_visibility: Any = None,
    g_visibility: Any = None,
    *,
    metric: str = "cosine",
    max_memory: int | None = None,
) -> tuple[Iterator[NDArray[Any]], int, int]:
    """Each query's squared distances (of parts: distances) to the whole gallery, in fresh rows; then Q and G."""
    checked_choice(metric, "metric", _METRICS)
    block_bytes, least = query_memory(max_memory)
    q_rows, g_rows = (Rows(x, name, normalize=metric == "cosine", parts=True) for x, name in ((qf, "qf"), (gf, "gf")))
    checked_pair(q_rows, g_rows, "qf", "gf")
    q_shown, g_shown = q_rows.visibility(q_visibility, "q_visibility"), g_rows.visibility(g_visibility, "g_visibility")
    for shown, name in ((q_shown, "q_visibility"), (g_shown, "g_visibility")):
        if not shown.any():
            raise ValueError(f"{name} must show at least one part, got all 0. Is it inverted, or thresholded?")
    if metric == "euclidean":
        Rows.share_scale(q_rows, g_rows)

    def found() -> Iterator[Tensor]:
        if q_rows.in_parts:
            yield from (block for _, block, _ in mean_distances(q_rows, g_rows, q_shown, g_shown, block_bytes, least))
            return
        dtype, to_gallery = torch.promote_types(q_rows.dtype, g_rows.dtype), tying_distances(g_rows, block_bytes)
        for block in query_blocks(q_rows, g_rows, block_bytes, least):
            yield to_gallery(q_rows.read(block, dtype))

    return (row for block in found() for row in block.cpu().numpy()), q_rows.n, g_rows.n


def evaluate_rank(
    distmat: Any, q_pids: Any, g_pids: Any, q_camids: Any = None, g_camids: Any = None, *, max_rank: int = 50
) -> EvaluationResult:
    """`evaluate` from given distances, for example re-ranked or part-based ones. Same protocol, same tie rule.

    Args:
        distmat: (Q, G) distances, numpy array or torch tensor of any real dtype, small is near; infinity is allowed,
            NaN is not. Not modified. Warns if values are in [-1, 1] and mAP in reverse order is 3 times as high:
            similarities are no distances.
        q_pids: as in `evaluate`, and so are the other labels.
        g_pids: as in `evaluate`.
        q_camids: as in `evaluate`.
        g_camids: as in `evaluate`.
        max_rank: length of the CMC curve.

    Returns:
        Fractions in an `EvaluationResult`.
    """
    matrix = checked_matrix(distmat)
    labels = RankingProtocol(matrix.shape[0], matrix.shape[1], q_pids, g_pids, q_camids, g_camids)
    return measured_matrix(matrix, labels, max_rank)


def checked_matrix(distmat: Any) -> NDArray[Any]:
    """Given distances as a numpy array (Q, G)."""
    if isinstance(distmat, tuple):
        raise TypeError("distmat must be a whole matrix, got a tuple. Re-rank without topk.")
    return checked_distances(distmat, "distmat")


def measured_matrix(matrix: NDArray[Any], labels: RankingProtocol, max_rank: int) -> EvaluationResult:
    """What `labels` make of given distances; warns of similarities."""

    def distances() -> Iterator[NDArray[Any]]:
        for query, row in enumerate(matrix):
            if np.isnan(row).any():
                raise ValueError(f"distmat must not hold NaN; row {query} does. Find the feature that caused it.")
            yield _floating(row)

    result = measured(distances(), labels, max_rank)
    if result.mAP < 1 / 3 and matrix.min() >= -_MAX_COSINE and matrix.max() <= _MAX_COSINE:
        _warn_of_similarities(matrix, labels, result.average_precision)
    return result


def _floating(row: NDArray[Any]) -> NDArray[Any]:
    """Distances of a query as a fresh floating array, with the order and the ties of integers of any size."""
    if row.dtype.kind == "f":
        return row.copy()
    if row.dtype.itemsize == 8:  # not every 64-bit integer is a float
        row = np.unique(row, return_inverse=True)[1]
    return row.astype(np.float64)


def _warn_of_similarities(matrix: NDArray[Any], labels: RankingProtocol, precisions: NDArray[np.float64]) -> None:
    """Similarities in place of distances rank everything in reverse: warn where that shows in a sample of queries."""
    valid = np.flatnonzero(~np.isnan(precisions))
    sample = valid[:: -(-len(valid) // _SAMPLED_QUERIES)]
    reverse = np.mean([_precision(_match_ranks(-_floating(matrix[query]), query, labels)) for query in sample])
    if len(sample) >= _LEAST_QUERIES and reverse > 3 * precisions[sample].mean():
        given = f"in reverse order, mAP is {reverse:.1%} in place of {precisions[sample].mean():.1%}"
        warnings.warn(f"distmat looks like similarities: {given}. Pass 1 - similarity.", stacklevel=4)


class RankingProtocol:
    """Which gallery images are a query's matches, and which are dropped for it, by Market1501's rules."""

    collapses = False  # CMC goes by the first image of each identity

    def __init__(self, q: int, g: int, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any) -> None:
        self.q_pids, g_pids = labels_together({"q_pids": (q_pids, q), "g_pids": (g_pids, g)})
        self.g_pids = g_pids
        self.q_camids: NDArray[np.int64] | None
        self.g_camids: NDArray[np.int64] | None
        cameras = cameras_together({"q_camids": (q_camids, q), "g_camids": (g_camids, g)})
        self.q_camids, self.g_camids = cameras or (None, None)
        self._junk = np.flatnonzero(g_pids == JUNK_PID)
        self._by_pid = np.argsort(g_pids, kind="stable")
        self._sorted_pids = g_pids[self._by_pid]

    def of_query(self, query: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Gallery indices, ascending, of the query's matches, and of all images that are dropped for it."""
        pid = self.q_pids[query]
        if pid == JUNK_PID:
            return np.empty(0, np.int64), self._junk
        low, high = (np.searchsorted(self._sorted_pids, pid, side) for side in ("left", "right"))
        same_pid = self._by_pid[low:high]
        if self.q_camids is None or self.g_camids is None:
            return same_pid, self._junk
        same_camera = self.g_camids[same_pid] == self.q_camids[query]
        return same_pid[~same_camera], np.concatenate([same_pid[same_camera], self._junk])


def measured(distances: Iterator[NDArray[Any]], labels: RankingProtocol, max_rank: int) -> EvaluationResult:
    """Average precisions, CMC and mINP of the queries' rows of distances, which are overwritten."""
    max_rank = checked_count(max_rank, "max_rank", most=_MAX_RANK)
    first_match = np.zeros(max_rank, dtype=np.int64)
    precisions = np.full(len(labels.q_pids), np.nan)
    penalties: list[float] = []
    for query, row in enumerate(distances):
        ranks = _match_ranks(row, query, labels)
        if len(ranks) == 0:
            continue
        precisions[query] = _precision(ranks)
        penalties.append(len(ranks) / float(ranks[-1]))
        first = _collapsed(row, query, labels) if labels.collapses else ranks[0]
        if first <= max_rank:
            first_match[first - 1] += 1
    if not penalties:
        given = f"none of the {len(labels.q_pids)} queries has a match (in another camera, where cameras are given)"
        raise ValueError(f"q_pids must share an identity with g_pids, but {given}. Check pids and camids.")
    valid = len(penalties)
    return EvaluationResult(
        mAP=float(np.nanmean(precisions)),
        cmc=first_match.cumsum() / valid,
        mINP=float(np.mean(penalties)),
        num_valid_queries=valid,
        average_precision=precisions,
    )


def _match_ranks(row: NDArray[Any], query: int, labels: RankingProtocol) -> NDArray[np.int64]:
    """`_ranks` of a query's matches; `row` is overwritten."""
    matches, dropped = labels.of_query(query)
    # NaN compares false: what is dropped is nearer than nothing.
    row[dropped] = np.nan
    return _ranks(row, matches) if len(matches) else matches


def _collapsed(row: NDArray[Any], query: int, labels: RankingProtocol) -> int:
    """Rank of the query's identity among identities, each where its first image is; of a row after `_match_ranks`."""
    matches, _ = labels.of_query(query)
    first = matches[np.argmin(row[matches])]  # of equals the lowest index
    index = np.arange(len(row))
    nearer = (row < row[first]) | ((row == row[first]) & (index < first))
    return 1 + len(np.unique(labels.g_pids[nearer]))


def _precision(ranks: NDArray[np.int64]) -> float:
    """Average precision."""
    return float((np.arange(1, len(ranks) + 1) / ranks).mean())


def _ranks(row: NDArray[Any], matches: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranks, from 1, ascending, of the matches among all entries of `row` that are not NaN.

    Nothing is sorted but what is as near as the last match: only the number of nearer images counts.
    """
    order = np.argsort(row[matches], kind="stable")
    matches, own = matches[order], row[matches[order]]
    near = np.sort(row[row <= own[-1]])
    ranks = np.searchsorted(near, own, side="left") + 1
    tied = np.flatnonzero(np.searchsorted(near, own, side="right") > ranks)
    for position in tied:
        # Among equals the lower gallery index comes first.
        ranks[position] += np.count_nonzero(row[: matches[position]] == own[position])
    return ranks
