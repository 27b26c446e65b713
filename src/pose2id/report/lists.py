"""Which queries the page shows, and their ranked lists before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.plots.content import Entry, Pair, ranked_of
from pose2id.retrieval.evaluation import RankingProtocol

SAME = 1e-9  # average precisions nearer than that are the same: rounding
_LISTS = 4  # of each kind
_LENGTH = 10


@dataclass(frozen=True)
class Change:
    """How many queries rank better, the same and worse than before, by average precision."""

    helped: int
    same: int
    harmed: int


def change(before: NDArray[np.float64], after: NDArray[np.float64]) -> Change:
    """Count queries by their average precisions (Q,); nan, without a match, counts nowhere."""
    gain = (after - before)[np.isfinite(after - before)]
    helped, harmed = int((gain > SAME).sum()), int((gain < -SAME).sum())
    return Change(helped, len(gain) - helped - harmed, harmed)


def chosen_queries(
    before: NDArray[np.float64], after: NDArray[np.float64], *, most: int = _LISTS, seed: int = 0
) -> dict[str, list[int]]:
    """Rows of the queries that lost most, gained most, and of others drawn at random; of equals the first.

    Args:
        before: (Q,) average precisions, nan without a match.
        after: (Q,) likewise.
        most: of each kind.
        seed: of the draw.

    Returns:
        Under "harmed", "helped" and "random", at most `most` each, all different.
    """
    gain = after - before
    valid = np.flatnonzero(np.isfinite(gain))
    order = valid[np.argsort(gain[valid], kind="stable")]
    harmed = [int(query) for query in order[:most] if gain[query] < -SAME]
    order = valid[np.argsort(-gain[valid], kind="stable")]
    helped = [int(query) for query in order[:most] if gain[query] > SAME]
    others = np.setdiff1d(valid, harmed + helped)
    drawn = np.random.default_rng(seed).permutation(others)[:most]
    return {"harmed": harmed, "helped": helped, "random": drawn.tolist()}


@dataclass(frozen=True)
class Card:
    """An image of a list: its picture or None, its labels as text, and its entry of the ranked list."""

    picture: str | None
    labels: str
    entry: Entry | None = None

    @property
    def kind(self) -> str:
        """Right, wrong, junk, or the query."""
        if self.entry is None:
            return "query"
        return "junk" if self.entry.rank is None else "right" if self.entry.right else "wrong"

    @property
    def alt(self) -> str:
        """The picture in words."""
        if self.entry is None:
            return f"Query, {self.labels}"
        place = "Not counted" if self.entry.rank is None else f"Rank {self.entry.rank}, {self.kind}"
        return f"{place}, {self.labels}, distance {self.entry.distance:.3f}"


@dataclass(frozen=True)
class QueryLists:
    """A query with its ranked list before and after, and its average precisions."""

    query: Card
    before: list[Card]
    after: list[Card]
    precisions: tuple[float, float]

    @property
    def gain(self) -> float:
        """Of the average precision."""
        return self.precisions[1] - self.precisions[0]


def query_lists(
    chosen: dict[str, list[int]],
    sides: tuple[Pair, Pair],
    precisions: tuple[NDArray[np.float64], NDArray[np.float64]],
    rule: RankingProtocol,
    card: Callable[[str, int], Card],
) -> dict[str, list[QueryLists]]:
    """Ranked lists of chosen queries.

    Args:
        chosen: rows of queries by kind.
        sides: features of both sets, before and after.
        precisions: average precisions before and after.
        rule: what matches and what is dropped.
        card: the card of an image, from "query" or "gallery" and its row.
    """
    queries = [query for rows in chosen.values() for query in rows]
    before, after = (ranked_of(pair, rule, queries, _LENGTH) for pair in sides)
    lists = {
        query: QueryLists(
            card("query", query),
            _cards(first, card),
            _cards(second, card),
            (float(precisions[0][query]), float(precisions[1][query])),
        )
        for query, first, second in zip(queries, before, after, strict=True)
    }
    return {kind: [lists[query] for query in rows] for kind, rows in chosen.items()}


def _cards(entries: Sequence[Entry], card: Callable[[str, int], Card]) -> list[Card]:
    return [replace(card("gallery", entry.index), entry=entry) for entry in entries]


def labels_of_image(pids: Any, camids: Any, row: int) -> str:
    """What a card says of an image."""
    camera = "" if camids is None else f", camera {camids[row]}"
    return f"identity {pids[row]}{camera}"
