"""What the figures show, as numbers: ranked lists, distances of pairs, maps of identities; pictures in one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pose2id.io.checks import checked_count, checked_labels, checked_size
from pose2id.io.images import load_image
from pose2id.io.rows import Rows
from pose2id.retrieval.evaluation import JUNK_PID, RankingProtocol, feature_distances

_BINS = 4096  # of distances in [0, 2]
_LEAST_MAPPED = 3
Pair = tuple[Any, Any]  # features of queries and gallery


@dataclass(frozen=True)
class Entry:
    """One gallery image of a ranked list.

    Attributes:
        index: its row in the gallery.
        distance: from the query.
        rank: its rank from 1; None where the protocol drops it for this query (junk).
        right: it shows the query's identity and counts.
    """

    index: int
    distance: float
    rank: int | None
    right: bool


def ranked(
    distances: NDArray[Any],
    matches: NDArray[np.int64],
    dropped: NDArray[np.int64],
    length: int = 10,
    most_junk: int = 2,
) -> list[Entry]:
    """The first images of a query's ranked list, with the nearest ones of those that are dropped in their places.

    Args:
        distances: (G,) of the query; equal ones rank by gallery index.
        matches: gallery indices that are right.
        dropped: gallery indices that do not count for this query.
        length: images that count, at most.
        most_junk: dropped images, at most.
    """
    is_match, is_dropped = (np.isin(np.arange(len(distances)), of) for of in (matches, dropped))
    entries: list[Entry] = []
    rank = junk = 0
    for index in np.argsort(distances, kind="stable").tolist():
        if is_dropped[index]:
            junk += 1
            if junk <= most_junk:
                entries.append(Entry(index, float(distances[index]), None, right=False))
            continue
        rank += 1
        entries.append(Entry(index, float(distances[index]), rank, bool(is_match[index])))
        if rank == length:
            break
    return entries


def ranked_of(features: Pair, rule: RankingProtocol, queries: Sequence[int], length: int = 10) -> list[list[Entry]]:
    """`ranked` of some queries, by Euclidean distance of L2-normalised features.

    Args:
        features: (Q, D) and (G, D).
        rule: what matches and what is dropped.
        queries: rows of queries.
        length: images that count, at most.
    """
    if not len(queries):
        return []
    rows = _distances(features, np.asarray(queries))
    return [ranked(row, *rule.of_query(query), length) for query, row in zip(queries, rows, strict=True)]


def _distances(features: Pair, queries: NDArray[np.int64]) -> Iterator[NDArray[np.float64]]:
    """Each query's Euclidean distances to the whole gallery; of parts, the mean over them."""
    rows, _, _ = feature_distances(features[0][queries], features[1])
    squared = features[1].ndim == 2  # those of whole features
    for row in rows:
        exact = row.astype(np.float64)  # float32 would make ties of distances that are none
        yield np.sqrt(np.maximum(exact, 0)) if squared else exact


@dataclass(frozen=True, eq=False)
class PairDistances:
    """How far apart pairs of a query and a gallery image are; each pair that counts is in one of 4096 bins of [0, 2].

    Attributes:
        edges: (B + 1,) of the bins.
        positive: (B,) int64, pairs of one identity.
        negative: (B,) int64, pairs of two.
        threshold: where as large a share of positive pairs is farther apart as of negative pairs is nearer; nan where
            there are no pairs of one kind.
        equal_error: that share.
        num_queries: of how many queries all pairs were counted.
    """

    edges: NDArray[np.float64]
    positive: NDArray[np.int64]
    negative: NDArray[np.int64]
    threshold: float
    equal_error: float
    num_queries: int

    def coarse(self, bins: int = 64) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Edges of fewer bins (a power of 2), and the share of positive and of negative pairs in each."""
        shares = [
            counts.reshape(bins, -1).sum(axis=1) / max(1, counts.sum()) for counts in (self.positive, self.negative)
        ]
        return self.edges[:: _BINS // bins], shares[0], shares[1]


def pair_distances(
    features: Pair, rule: RankingProtocol, *, max_queries: int | None = None, seed: int = 0
) -> PairDistances:
    """Count all pairs that the protocol counts, a query at a time: memory grows with G alone.

    Args:
        features: (Q, D) and (G, D); their L2-normalised rows are compared.
        rule: what matches and what is dropped.
        max_queries: of more queries, that many are drawn; None: all.
        seed: of the draw.
    """
    queries = np.flatnonzero(rule.q_pids != JUNK_PID)
    if max_queries is not None and len(queries) > checked_count(max_queries, "max_queries"):
        queries = np.sort(np.random.default_rng(seed).choice(queries, max_queries, replace=False))
    positive, negative = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
    for query, row in zip(queries.tolist(), _distances(features, queries), strict=True):
        matches, dropped = rule.of_query(query)
        bins = np.minimum(row * (_BINS / 2), _BINS - 1).astype(np.int64)
        own = np.bincount(bins[matches], minlength=_BINS)
        positive += own
        negative += np.bincount(bins, minlength=_BINS) - own - np.bincount(bins[np.unique(dropped)], minlength=_BINS)
    edges = np.linspace(0, 2, _BINS + 1)
    return PairDistances(edges, positive, negative, *_equal_error(edges, positive, negative), len(queries))


def _equal_error(
    edges: NDArray[np.float64], positive: NDArray[np.int64], negative: NDArray[np.int64]
) -> tuple[float, float]:
    if not positive.sum() or not negative.sum():
        return float("nan"), float("nan")
    missed = 1 - positive.cumsum() / positive.sum()
    accepted = negative.cumsum() / negative.sum()
    at = int(np.argmin(np.abs(missed - accepted)))
    return float(edges[at + 1]), float((missed[at] + accepted[at]) / 2)


def mapped_images(labels: NDArray[np.int64], num_identities: int = 10, most_images: int = 1000) -> NDArray[np.int64]:
    """Rows, ascending, of the images of the identities with the most images; never -1 and 0.

    Args:
        labels: (N,) identities.
        num_identities: at least 1.
        most_images: in all; of more, the first ones of each identity.
    """
    checked_count(num_identities, "num_identities")
    identities, counts = np.unique(labels[labels > 0], return_counts=True)
    chosen = identities[np.argsort(-counts, kind="stable")[:num_identities]]
    each = most_images // max(1, len(chosen))
    return np.sort(np.concatenate([np.empty(0, np.int64), *(np.flatnonzero(labels == pid)[:each] for pid in chosen)]))


def map_of(
    features: Any, pids: Any, *, name: str = "features", num_identities: int = 10, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """t-SNE of the images of the identities with the most images.

    Args:
        features: (N, D), L2-normalised here.
        pids: (N,) identities, as in `pose2id.evaluate`.
        name: of the features, for errors.
        num_identities: at least 1.
        seed: of the t-SNE.

    Returns:
        (n, 2) places, and (n,) which of the chosen identities each is, from 0.
    """
    from sklearn.manifold import TSNE  # noqa: PLC0415 - an extra

    rows = Rows(features, name, normalize=True)
    labels = checked_labels(pids, "pids", rows.n)
    shown = mapped_images(labels, num_identities)
    if len(shown) < _LEAST_MAPPED:
        raise ValueError(f"pids must have at least 3 images of identities above 0, got {len(shown)}.")
    unit = rows.read(torch.from_numpy(shown).to(rows.device)).cpu().numpy()
    tsne = TSNE(perplexity=min(15.0, (len(unit) - 1) / 3), init="pca", random_state=seed)
    places = tsne.fit_transform(unit).astype(np.float64)
    return places, np.unique(labels[shown], return_inverse=True)[1]


def letterboxed(
    item: Any, name: str, size: tuple[int, int], fill: tuple[int, int, int] = (235, 235, 235)
) -> Image.Image:
    """A picture as large as fits into a size, its aspect kept, in the middle of plain `fill`.

    Args:
        item: a path, PIL picture, (H, W, 3) uint8 RGB array or (3, H, W) float tensor in [0, 1].
        name: of the picture, for errors.
        size: (height, width) in pixels.
        fill: RGB.
    """
    height, width = checked_size(size)
    picture = load_image(item, name)
    scale = min(width / picture.width, height / picture.height)
    inner = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    canvas = Image.new("RGB", (width, height), fill)
    resized = picture if picture.size == inner else picture.resize(inner, Image.Resampling.LANCZOS)
    canvas.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas
