"""One to one: are two images of one person? And open sets: is the person in the gallery at all?

Genuine pairs are a query and its matches by a protocol's rules, impostor pairs a query and all other gallery images
that the protocol does not drop for it. A pair is accepted where its distance is *below* the threshold.

Everything is exact for the distances at hand, and no distance matrix is kept: what stays in memory are the genuine
distances, and of the impostors' the nearest ones, about three times as many as the largest wanted rate admits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.io.checks import checked_count, checked_number
from pose2id.retrieval.evaluation import JUNK_PID, RankingProtocol, checked_matrix, feature_distances
from pose2id.retrieval.protocols import MARKET1501, EvaluationProtocol

RATES = (1e-2, 1e-3, 1e-4)
_MAX_RATE = 0.1  # nearer impostors than a rate admits are kept in memory
_REPLICATES = 200
_SPARE = 3.0  # resampled identities may have more impostors near than the sample has
_CONFIDENCE = 0.95

_Distances = Callable[[], Iterator[NDArray[Any]]]


@dataclass(frozen=True)
class OperatingPoint:
    """The largest threshold at which at most the wanted share of impostor pairs is accepted.

    All but `wanted` are nan where there are fewer than 1 / wanted impostor pairs: such a rate cannot be measured.

    Attributes:
        wanted: false-match rate asked for.
        threshold: distance below which a pair is accepted.
        fpr: share of the impostor pairs that it accepts, at most `wanted`.
        tpr: share of the genuine pairs that it accepts.
        threshold_interval: 95 % confidence interval of the threshold; its upper end may be infinite.
        fpr_interval: 95 % confidence interval of the false-match rate at this threshold.
    """

    wanted: float
    threshold: float
    fpr: float
    tpr: float
    threshold_interval: tuple[float, float]
    fpr_interval: tuple[float, float]


@dataclass(frozen=True)
class VerificationResult:
    """How well a threshold tells genuine from impostor pairs; rates are fractions, and print in percent.

    Attributes:
        eer: equal error rate: the least over all thresholds of the larger of false-match and false-non-match rate.
        points: one for each wanted rate.
        num_genuine: pairs of one person.
        num_impostor: pairs of two.
    """

    eer: float
    points: tuple[OperatingPoint, ...]
    num_genuine: int
    num_impostor: int

    def tpr(self, wanted: float) -> float:
        """TPR at one of the wanted rates; nan where there are too few impostor pairs."""
        return next(point.tpr for point in self.points if point.wanted == wanted)

    def __str__(self) -> str:
        """One line in percent."""
        rates = "".join(f"  TPR at FPR {point.wanted:g} {_percent(point.tpr)}" for point in self.points)
        return f"EER {self.eer:.2%}{rates}  ({self.num_genuine} genuine, {self.num_impostor} impostor pairs)"


@dataclass(frozen=True)
class OpenSetPoint:
    """Identification at a wanted false-positive identification rate; nan where fewer than 1 / wanted strangers search.

    Attributes:
        wanted: FPIR asked for.
        threshold: distance below which the nearest gallery image is an answer.
        fpir: share of strangers' queries that are answered, at most `wanted`.
        fnir: share of the other queries that are not answered, or answered with somebody else; 1 - fnir is the
            detection and identification rate at rank 1.
    """

    wanted: float
    threshold: float
    fpir: float
    fnir: float


@dataclass(frozen=True)
class OpenSetResult:
    """Search of a gallery that does not hold everybody.

    Attributes:
        points: one for each wanted rate.
        num_mated: queries with a match.
        num_strangers: queries without any gallery image of their identity that the protocol leaves them.
    """

    points: tuple[OpenSetPoint, ...]
    num_mated: int
    num_strangers: int

    def __str__(self) -> str:
        """One line in percent."""
        rates = "  ".join(f"FNIR at FPIR {point.wanted:g} {_percent(point.fnir)}" for point in self.points)
        return f"{rates}  ({self.num_mated} mated queries, {self.num_strangers} strangers)"


def verification(
    qf: Any,
    gf: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any = None,
    g_camids: Any = None,
    *,
    rates: Sequence[float] = RATES,
    protocol: EvaluationProtocol = MARKET1501,
    replicates: int = _REPLICATES,
    seed: int = 0,
) -> VerificationResult:
    """TPR at given FPR, EER, and thresholds with their confidence intervals, by cosine distance.

    The distance is 1 - cosine similarity, from products in float32 (float64 for float64 features), so thresholds are
    right to about 1e-6; of features in parts it is that of `part_distances`. Distances are computed twice.

    Intervals are percentiles of a bootstrap over identities: a pair of persons a, b counts w_a w_b times where they
    were drawn w_a and w_b times. Pairs that share a person are dependent, so an exact binomial interval, which takes
    them for independent draws, would be far too narrow. With few identities a bootstrap is too narrow as well. All
    images of one label are one identity, distractors (pid 0) too.

    Args:
        qf: (Q, D) or (Q, P, D) query features, as in `pose2id.evaluate`.
        gf: (G, D) or (G, P, D) gallery features.
        q_pids: (Q,) identities, as in `pose2id.evaluate`, and so are the other labels; queries of pid -1 are left out.
        g_pids: (G,) identities.
        q_camids: (Q,) cameras.
        g_camids: (G,) cameras.
        rates: wanted false-match rates, in (0, 0.1].
        protocol: whose rule says which pairs are dropped; one without draws of its own, such as `MARKET1501`.
        replicates: how many resampled sets the intervals come from.
        seed: of the resampling.

    Raises:
        ValueError: no genuine or no impostor pair is left.
    """
    distances, q, g = _from_features(qf, gf)
    labels = _rule(protocol)(q, g, q_pids, g_pids, q_camids, g_camids)
    return _verified(distances, labels, rates, replicates, seed)


def verification_rank(
    distmat: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any = None,
    g_camids: Any = None,
    *,
    rates: Sequence[float] = RATES,
    protocol: EvaluationProtocol = MARKET1501,
    replicates: int = _REPLICATES,
    seed: int = 0,
) -> VerificationResult:
    """`verification` from given distances (Q, G), as `pose2id.evaluate_rank` takes them."""
    matrix = checked_matrix(distmat)
    labels = _rule(protocol)(*matrix.shape, q_pids, g_pids, q_camids, g_camids)
    return _verified(lambda: _rows(matrix), labels, rates, replicates, seed)


def open_set(
    qf: Any,
    gf: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any = None,
    g_camids: Any = None,
    *,
    rates: Sequence[float] = (0.1, 0.01),
    protocol: EvaluationProtocol = MARKET1501,
) -> OpenSetResult:
    """FNIR at given FPIR: searches of strangers that find somebody, and of others that miss their own, at rank 1.

    Strangers' queries have an identity that the gallery has not (for a stranger whose name nobody knows any label of
    its own will do; pid -1 is left out). Equal distances: the lower gallery index is nearest.

    Args:
        qf: as in `verification`, and so are the other arrays; the distance is the same.
        gf: gallery features.
        q_pids: (Q,) identities, those of strangers among them.
        g_pids: (G,) identities.
        q_camids: (Q,) cameras.
        g_camids: (G,) cameras.
        rates: wanted false-positive identification rates, in (0, 0.1].
        protocol: as in `verification`.

    Raises:
        ValueError: no query has a match, or none is a stranger's.
    """
    distances, q, g = _from_features(qf, gf)
    return _searched(distances, _rule(protocol)(q, g, q_pids, g_pids, q_camids, g_camids), rates)


def open_set_rank(
    distmat: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any = None,
    g_camids: Any = None,
    *,
    rates: Sequence[float] = (0.1, 0.01),
    protocol: EvaluationProtocol = MARKET1501,
) -> OpenSetResult:
    """`open_set` from given distances (Q, G), as `pose2id.evaluate_rank` takes them."""
    matrix = checked_matrix(distmat)
    return _searched(lambda: _rows(matrix), _rule(protocol)(*matrix.shape, q_pids, g_pids, q_camids, g_camids), rates)


def _percent(rate: float) -> str:
    return "unknown (too few pairs)" if np.isnan(rate) else f"{rate:.2%}"


def _rule(protocol: EvaluationProtocol) -> Callable[..., RankingProtocol]:
    if protocol.draws is not None:
        raise ValueError(f"protocol must be without draws, got {protocol.name!r}. Pass the sets of one of its trials.")
    return protocol.rule


def _from_features(qf: Any, gf: Any) -> tuple[_Distances, int, int]:
    _, q, g = feature_distances(qf, gf)
    half = 2.0 if np.ndim(qf) == 2 else 1.0  # |x - y|² = 2 - 2 x·y

    def distances() -> Iterator[NDArray[Any]]:
        return (row / half for row in feature_distances(qf, gf)[0])

    return distances, q, g


def _rows(matrix: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for query, row in enumerate(matrix):
        if np.isnan(row).any():
            raise ValueError(f"distmat must not hold NaN; row {query} does. Find the feature that caused it.")
        yield row.astype(np.float64)


def _wanted(rates: Sequence[float]) -> list[float]:
    return [checked_number(rate, "rates", np.finfo(float).tiny, _MAX_RATE) for rate in rates]


def _allowed(rate: float, count: float) -> int:
    """How many of `count` a rate admits; 0.29 * 100 is 29, although it is a little less in floats."""
    return int(rate * count * (1 + 1e-12))


class _Pairs:
    """Numbers of pairs, and which gallery images are impostors to a query."""

    def __init__(self, labels: RankingProtocol) -> None:
        self.labels = labels
        self.names, numbers = np.unique(np.concatenate([labels.q_pids, labels.g_pids]), return_inverse=True)
        self.q_ids, self.g_ids = np.split(numbers, [len(labels.q_pids)])
        self.g = len(labels.g_pids)

    def of_query(self, query: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Gallery indices of its matches, and a mask (G,) of its impostors; none for junk."""
        matches, dropped = self.labels.of_query(query)
        impostors = np.full(self.g, self.labels.q_pids[query] != JUNK_PID)
        impostors[matches] = impostors[dropped] = False
        return matches, impostors

    def counts(self) -> tuple[int, int]:
        """Genuine and impostor pairs."""
        genuine = impostor = 0
        for query in range(len(self.q_ids)):
            matches, mask = self.of_query(query)
            genuine, impostor = genuine + len(matches), impostor + int(np.count_nonzero(mask))
        for kind, number in (("genuine", genuine), ("impostor", impostor)):
            if not number:
                raise ValueError(f"q_pids and g_pids must make a pair of either kind, got no {kind} one.")
        return genuine, impostor

    def weighted(self, weights: NDArray[np.int64]) -> NDArray[np.float64]:
        """(B,) impostor pairs where identities count as often as weights (B, identities) say."""
        total = np.zeros(len(weights))
        whole = weights @ np.bincount(self.g_ids, minlength=len(self.names))
        for query, own in enumerate(self.q_ids):
            if self.labels.q_pids[query] == JUNK_PID:
                continue
            _, impostors = self.of_query(query)
            others = np.bincount(self.g_ids[~impostors], minlength=len(self.names))
            left_out = np.flatnonzero(others)
            total += weights[:, own] * (whole - weights[:, left_out] @ others[left_out])
        return total


def _verified(
    distances: _Distances, labels: RankingProtocol, rates: Sequence[float], replicates: int, seed: int
) -> VerificationResult:
    wanted = _wanted(rates)
    checked_count(replicates, "replicates", least=2)
    pairs = _Pairs(labels)
    num_genuine, num_impostor = pairs.counts()
    most = min(num_impostor, 1 + int(_SPARE * max(wanted, default=0.0) * num_impostor))
    genuine, near, persons = _collected(distances(), pairs, most)
    found = [_threshold(rate, near, num_impostor) for rate in wanted]
    generator = np.random.default_rng(checked_count(seed, "seed", least=0))
    resampled = _resampled(pairs, near, persons, list(zip(wanted, found, strict=True)), replicates, generator)
    points = tuple(
        _point(rate, threshold, genuine, near, num_impostor, replicate)
        for rate, threshold, replicate in zip(wanted, found, resampled, strict=True)
    )
    eer = _equal_error_rate(distances(), pairs, genuine, num_impostor)
    return VerificationResult(eer, points, num_genuine, num_impostor)


def _collected(
    rows: Iterator[NDArray[Any]], pairs: _Pairs, most: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    """Genuine distances, ascending; the `most` smallest of impostors, ascending; the two identities of those."""
    genuine: list[NDArray[Any]] = []
    near, persons = np.empty(0), np.empty((2, 0), dtype=np.int64)
    kept, of_kept, size, bound = [near], [persons], 0, np.inf
    for query, row in enumerate(rows):
        matches, impostors = pairs.of_query(query)
        genuine.append(row[matches].astype(np.float64))
        new = np.flatnonzero(impostors & (row <= bound))
        kept.append(row[new].astype(np.float64))
        of_kept.append(np.stack([np.full(len(new), pairs.q_ids[query]), pairs.g_ids[new]]))
        size += len(new)
        if size > 2 * most:
            near, persons = _smallest(kept, of_kept, most)
            kept, of_kept, size, bound = [near], [persons], most, near[-1]
    near, persons = _smallest(kept, of_kept, most)
    return np.sort(np.concatenate(genuine)), near, persons


def _smallest(
    kept: list[NDArray[Any]], persons: list[NDArray[np.int64]], most: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    values = np.concatenate(kept)
    order = np.argsort(values, kind="stable")[:most]
    return values[order], np.concatenate(persons, axis=1)[:, order]


def _threshold(rate: float, near: NDArray[Any], num_impostor: int) -> float:
    allowed = _allowed(rate, num_impostor)
    return float(near[allowed]) if allowed else np.nan


def _resampled(
    pairs: _Pairs,
    near: NDArray[Any],
    persons: NDArray[np.int64],
    points: Sequence[tuple[float, float]],
    replicates: int,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """(points, replicates, 2): where identities are drawn again, the threshold, and the rate at the threshold given."""
    number = len(pairs.names)
    weights = generator.multinomial(number, np.full(number, 1 / number), size=replicates)
    result = np.full((len(points), replicates, 2), np.nan)
    accepted = [int(np.searchsorted(near, threshold)) for _, threshold in points]
    for replicate, total in enumerate(pairs.weighted(weights)):
        if total == 0:  # of few identities one may be drawn alone
            continue
        counts = weights[replicate, persons].prod(0).cumsum()
        for index, (rate, _) in enumerate(points):
            at = int(np.searchsorted(counts, _allowed(rate, total), side="right"))
            result[index, replicate, 0] = near[at] if at < len(near) else np.inf
            result[index, replicate, 1] = counts[accepted[index] - 1] / total if accepted[index] else 0.0
    return result


def _point(
    rate: float,
    threshold: float,
    genuine: NDArray[Any],
    near: NDArray[Any],
    num_impostor: int,
    resampled: NDArray[np.float64],
) -> OperatingPoint:
    if np.isnan(threshold):
        return OperatingPoint(rate, np.nan, np.nan, np.nan, (np.nan, np.nan), (np.nan, np.nan))
    return OperatingPoint(
        wanted=rate,
        threshold=threshold,
        fpr=float(np.searchsorted(near, threshold) / num_impostor),
        tpr=float(np.searchsorted(genuine, threshold) / len(genuine)),
        threshold_interval=_interval(resampled[:, 0]),
        fpr_interval=_interval(resampled[:, 1]),
    )


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Percentiles, each a value that occurs: nothing lies between a number and infinity."""
    values = values[~np.isnan(values)]
    if not len(values):
        return np.nan, np.nan
    outside = (1 - _CONFIDENCE) / 2
    low = np.quantile(values, outside, method="lower")
    return float(low), float(np.quantile(values, 1 - outside, method="higher"))


def _equal_error_rate(rows: Iterator[NDArray[Any]], pairs: _Pairs, genuine: NDArray[Any], num_impostor: int) -> float:
    """Where a threshold just accepts a genuine distance, no smaller one has as few false non-matches."""
    steps = np.zeros(len(genuine) + 1, dtype=np.int64)
    for query, row in enumerate(rows):
        _, impostors = pairs.of_query(query)
        np.add.at(steps, np.searchsorted(genuine, row[impostors].astype(np.float64)), 1)
    false_matches = steps.cumsum()[:-1] / num_impostor
    # Of equal genuine distances all are accepted.
    missed = 1 - np.searchsorted(genuine, genuine, side="right") / len(genuine)
    return float(min(1.0, np.maximum(false_matches, missed).min()))


def _searched(distances: _Distances, labels: RankingProtocol, rates: Sequence[float]) -> OpenSetResult:
    wanted, right, wrong, strangers = _wanted(rates), [], 0, []
    for query, row in enumerate(distances()):
        matches, dropped = labels.of_query(query)
        if labels.q_pids[query] == JUNK_PID:
            continue
        kept = np.delete(np.arange(len(row)), dropped)
        nearest = kept[np.argmin(row[kept])] if len(kept) else -1
        if not len(matches):
            strangers.append(float(row[nearest]) if len(kept) else np.inf)
        elif labels.g_pids[nearest] == labels.q_pids[query]:
            right.append(float(row[nearest]))
        else:
            wrong += 1
    mated = len(right) + wrong
    for kind, number in (("with a match", mated), ("of a stranger", len(strangers))):
        if not number:
            raise ValueError(f"q_pids must hold queries with a match and of strangers, got none {kind}.")
    found, alarms = np.sort(right), np.sort(strangers)
    return OpenSetResult(tuple(_open_point(rate, found, alarms, mated) for rate in wanted), mated, len(alarms))


def _open_point(rate: float, found: NDArray[Any], alarms: NDArray[Any], mated: int) -> OpenSetPoint:
    allowed = _allowed(rate, len(alarms))
    if allowed < 1:
        return OpenSetPoint(rate, np.nan, np.nan, np.nan)
    threshold = alarms[allowed]
    accepted = int(np.searchsorted(alarms, threshold))
    missed = 1 - np.searchsorted(found, threshold) / mated
    return OpenSetPoint(rate, float(threshold), accepted / len(alarms), float(missed))
