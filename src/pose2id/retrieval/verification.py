"""One or the other: are two images of the same person (verification), and is this person known (open set)?

Retrieval figures rank; a live system needs a threshold, and what it lets through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.io.checks import checked_count, checked_number
from pose2id.retrieval.evaluation import JUNK_PID, RankingProtocol, checked_matrix, feature_distances
from pose2id.retrieval.protocols import MARKET1501, EvaluationProtocol

_RATES = (1e-2, 1e-3, 1e-4)
_OPEN_RATES = (0.1, 0.01)
_BINS = 1 << 16
_LEAST = 1000  # nearest pairs that are kept


@dataclass(frozen=True)
class Verification:
    """How well a threshold on the distance tells the same person from others; fractions, nan where nothing tells.

    Attributes:
        tpr: by false-positive rate: the share of pairs of one person that a threshold accepts which accepts at most
            that share of the other pairs. nan where there are fewer than 1 / rate other pairs.
        eer: equal error rate: the share of both kinds that is decided wrongly where the two are alike.
        threshold: largest distance at which at most `rate` of the other pairs are accepted.
        interval: 95 % of the thresholds so found on people drawn anew; see `verification`.
        rate: the wanted false-match rate of the threshold.
        dir: open set, by false-positive identification rate (FPIR): the share of queries of known people whose nearest
            kept image is theirs and within the threshold at which so many of the unknown are taken for somebody. nan
            where there are fewer than 1 / FPIR unknown queries.
        num_positive, num_negative: pairs of one person, and of two.
        num_known, num_unknown: queries with and without a match in the gallery.
    """

    tpr: dict[float, float]
    eer: float
    threshold: float
    interval: tuple[float, float]
    rate: float
    dir: dict[float, float]
    num_positive: int
    num_negative: int
    num_known: int
    num_unknown: int

    def to_dict(self) -> dict[str, Any]:
        """All figures by name; rates are part of the names."""
        return {
            **{f"tpr_at_fpr_{rate:g}": value for rate, value in self.tpr.items()},
            "eer": self.eer,
            "threshold": self.threshold,
            "threshold_low": self.interval[0],
            "threshold_high": self.interval[1],
            "rate": self.rate,
            **{f"dir_at_fpir_{rate:g}": value for rate, value in self.dir.items()},
            **{name: getattr(self, name) for name in ("num_positive", "num_negative", "num_known", "num_unknown")},
        }

    def __str__(self) -> str:
        """Three lines, in percent; what too few pairs cannot tell is left out, and said."""
        known = [f"TPR {value:.2%} at FPR {rate:g}" for rate, value in self.tpr.items() if not math.isnan(value)]
        few = [f"{rate:g}" for rate, value in self.tpr.items() if math.isnan(value)]
        lines = [f"EER {self.eer:.2%}  {'  '.join(known)}"]
        lines[0] += f"  (too few pairs for FPR {', '.join(few)})" if few else ""
        low, high = self.interval
        told = "no threshold: too few pairs of two people" if math.isnan(self.threshold) else f"{self.threshold:.4f}"
        lines.append(f"threshold for a false-match rate of {self.rate:g}: {told} ({low:.4f} to {high:.4f})")
        if self.num_unknown:
            found = [f"{value:.2%} at FPIR {rate:g}" for rate, value in self.dir.items() if not math.isnan(value)]
            lines.append(f"open set: {'  '.join(found) or 'too few unknown queries'}  ({self.num_unknown} unknown)")
        return "\n".join(lines)


def verification(
    qf: Any,
    gf: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any = None,
    g_camids: Any = None,
    *,
    protocol: EvaluationProtocol = MARKET1501,
    distmat: Any = None,
    rates: Sequence[float] = _RATES,
    rate: float = 1e-3,
    open_rates: Sequence[float] = _OPEN_RATES,
    num_samples: int = 200,
    seed: int = 0,
) -> Verification:
    """Verification and open-set figures over all pairs of a query and a gallery image that the protocol keeps.

    Pairs are not independent: one image is in many, and one person in more. So the interval of the threshold is not
    binomial: people are drawn anew with replacement, `num_samples` times, queries and gallery alike; each time the
    threshold is found on the pairs of the people drawn, and the interval holds 95 % of these thresholds. It says how
    far a threshold tuned on such people is to be trusted on other people like them, and nothing of another place.

    Thresholds and rates are exact; the equal error rate is exact to a bin of 1/65,536 of the distances' range. Memory:
    about 12 bytes for each of the nearest pairs of two people, four times as many as the largest rate lets through.

    Args:
        qf: (Q, D) query features, or (Q, P, D) of parts, as in `pose2id.evaluate`; None with `distmat`.
        gf: (G, D) or (G, P, D) gallery features; None with `distmat`.
        q_pids: (Q,) identities, as in `pose2id.evaluate`, and so are the other labels.
        g_pids: (G,) identities.
        q_camids: (Q,) cameras.
        g_camids: (G,) cameras.
        protocol: one with a single trial: which pairs are dropped.
        distmat: (Q, G) distances in the place of features.
        rates: false-positive rates, in (0, 1).
        rate: the false-match rate that the threshold is for.
        open_rates: false-positive identification rates.
        num_samples: draws of people for the interval, at least 20.
        seed: of the draws.

    Returns:
        Thresholds and distances are Euclidean distances of the L2-normalised features, in [0, 2], or those of
        `distmat`.

    Raises:
        ValueError: a protocol of several trials, or no pair of one of both kinds.
    """
    rates, open_rates = (
        tuple(checked_number(x, name, 0, 1) for x in values)
        for values, name in ((rates, "rates"), (open_rates, "open_rates"))
    )
    rate = checked_number(rate, "rate", 0, 1)
    checked_count(num_samples, "num_samples", least=20)
    if protocol.num_trials > 1:
        raise ValueError(f"protocol must have one trial, got {protocol.name!r} with {protocol.num_trials}.")
    labels = q_pids, g_pids, q_camids, g_camids
    pairs = _Pairs(*_distances(qf, gf, distmat), protocol, labels, max(rate, *rates))
    return Verification(
        tpr={r: pairs.accepted(r) for r in rates},
        eer=pairs.equal_error(),
        threshold=_threshold(pairs.nearest, pairs.num_negative, rate),
        interval=pairs.interval(rate, num_samples, seed),
        rate=rate,
        dir={r: pairs.identified(r) for r in open_rates},
        num_positive=len(pairs.positive),
        num_negative=pairs.num_negative,
        num_known=len(pairs.known),
        num_unknown=len(pairs.unknown),
    )


def _distances(qf: Any, gf: Any, distmat: Any) -> tuple[Iterator[NDArray[Any]], int, int, float, float]:
    """Rows of distances, Q and G, and the range that the distances are in."""
    if distmat is not None:
        if qf is not None or gf is not None:
            raise ValueError("qf and gf must be None with distmat.")
        matrix = checked_matrix(distmat)
        rows = (np.array(row, dtype=np.float64) for row in matrix)
        return rows, *matrix.shape, float(matrix.min()), float(matrix.max())
    found, q, g = feature_distances(qf, gf)
    in_parts = getattr(qf, "ndim", 2) == 3
    return (row if in_parts else np.sqrt(np.clip(row, 0, None)) for row in found), q, g, 0.0, 2.001


class _Pairs:
    """Distances of the kept pairs: all of one person; of two people the nearest, and how many there are how far."""

    def __init__(
        self,
        rows: Iterator[NDArray[Any]],
        q: int,
        g: int,
        low: float,
        high: float,
        protocol: EvaluationProtocol,
        labels: tuple[Any, ...],
        rate: float,
    ) -> None:
        self.rule: RankingProtocol = protocol.rule(q, g, *labels)
        self._edges = np.linspace(low, max(high, np.nextafter(low, np.inf)), _BINS + 1)
        self._counts = np.zeros(_BINS)
        most, limit = max(_LEAST, math.ceil(4 * rate * q * g)), math.inf
        positive: list[NDArray[Any]] = []
        kept: list[tuple[NDArray[Any], ...]] = []
        self.known: list[tuple[float, bool]] = []
        self.unknown: list[tuple[float, bool]] = []
        held = self.num_negative = 0
        for query, row in enumerate(rows):
            matches, dropped = self.rule.of_query(query)
            others = np.ones(g, dtype=bool)
            others[dropped] = others[matches] = False
            others_at = np.flatnonzero(others)
            positive.append(row[matches])
            self._counts += np.histogram(row[others_at], self._edges)[0]
            self.num_negative += len(others_at)
            self._note_nearest(row, np.union1d(matches, others_at), matches)
            near = others_at[row[others_at] <= limit]
            kept.append((row[near], np.full(len(near), query, np.int32), near.astype(np.int32)))
            held += len(near)
            if held > 2 * most:
                kept = [_smallest(kept, most)]
                held, limit = most, float(kept[0][0].max())
        self.positive = np.sort(np.concatenate(positive))
        if not len(self.positive) or not self.num_negative:
            given = f"{len(self.positive)} and {self.num_negative}"
            raise ValueError(f"q_pids and g_pids must give pairs of one person and of two, got {given}.")
        nearest, of_query, of_gallery = _smallest(kept, most)
        order = np.argsort(nearest, kind="stable")
        self.nearest, self._of_query, self._of_gallery = nearest[order], of_query[order], of_gallery[order]

    def _note_nearest(self, row: NDArray[Any], kept: NDArray[np.int64], matches: NDArray[np.int64]) -> None:
        if len(kept):
            nearest = kept[np.argmin(row[kept])]  # of equals the lowest index
            (self.known if len(matches) else self.unknown).append((float(row[nearest]), bool(nearest in matches)))

    def accepted(self, rate: float) -> float:
        """The share of pairs of one person within the threshold of a rate."""
        threshold = _threshold(self.nearest, self.num_negative, rate)
        if math.isnan(threshold):
            return math.nan
        return float(np.searchsorted(self.positive, threshold, side="right") / len(self.positive))

    def equal_error(self) -> float:
        """Where the shares missed and accepted are nearest to each other: their mean."""
        missed = 1 - np.searchsorted(self.positive, self._edges[1:], side="right") / len(self.positive)
        accepted = self._counts.cumsum() / self.num_negative
        best = int(np.argmin(np.abs(missed - accepted)))
        return float((missed[best] + accepted[best]) / 2)

    def interval(self, rate: float, num_samples: int, seed: int) -> tuple[float, float]:
        """95 % of the thresholds on people drawn anew."""
        if self.num_negative * rate < 1:
            return math.nan, math.nan
        q_pids, g_pids = self.rule.q_pids, self.rule.g_pids
        people = np.unique(np.concatenate([q_pids, g_pids]))
        of_query, of_gallery = np.searchsorted(people, q_pids), np.searchsorted(people, g_pids)
        real = g_pids != JUNK_PID
        rng, found = np.random.default_rng(seed), []
        for _ in range(num_samples):
            times = np.bincount(rng.integers(0, len(people), len(people)), minlength=len(people))
            # All pairs of two people, counted: an image of the gallery is of another person or of the query's.
            in_gallery = np.bincount(of_gallery[real], weights=times[of_gallery[real]], minlength=len(people))
            total = float((times[of_query] * (in_gallery.sum() - in_gallery[of_query])).sum())
            weight = times[of_query[self._of_query]] * times[of_gallery[self._of_gallery]]
            within = int(np.searchsorted(weight.cumsum(), rate * total, side="right"))
            found.append(float(self.nearest[max(within - 1, 0)]))
        low, high = np.quantile(found, (0.025, 0.975), method="nearest")
        return float(low), float(high)

    def identified(self, rate: float) -> float:
        """Detection and identification rate at a false-positive identification rate."""
        if not self.known:
            return math.nan
        threshold = _threshold(np.sort([distance for distance, _ in self.unknown]), len(self.unknown), rate)
        if math.isnan(threshold):
            return math.nan
        return float(np.mean([right and distance <= threshold for distance, right in self.known]))


def _smallest(kept: Sequence[tuple[NDArray[Any], ...]], most: int) -> tuple[NDArray[Any], ...]:
    """The pairs with the smallest distances, at most so many, in no order."""
    columns = tuple(np.concatenate(column) for column in zip(*kept, strict=True))
    if len(columns[0]) <= most:
        return columns
    at = np.argpartition(columns[0], most - 1)[:most]
    return tuple(column[at] for column in columns)


def _threshold(nearest: NDArray[Any], count: int, rate: float) -> float:
    """The largest distance at which at most `rate` of `count` others are accepted, whose nearest ones are sorted.

    nan where the rate allows for less than one of them.
    """
    allowed = math.floor(rate * count + 1e-9)
    if allowed < 1:
        return math.nan
    if allowed >= len(nearest):
        return float(nearest[-1])
    # Equal distances are accepted together: those beyond what is allowed keep the equal ones out.
    at = allowed if nearest[allowed] > nearest[allowed - 1] else int(np.searchsorted(nearest, nearest[allowed]))
    return float(nearest[at - 1]) if at else float(np.nextafter(nearest[0], -np.inf))
