"""Cleansing a data set: images whose features are too far from those of their person, or too near, are left out.

A wrong label, a box beside the person or somebody in front of them makes a feature that the person's others are far
from. The paper's rule is on distances' quantiles; what a distance is worth depends on the covariance behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pose2id.io.checks import checked_choice, checked_flag, checked_identities, checked_number, require_modules
from pose2id.io.rows import Rows, centred

COVARIANCES = ("spherical", "pooled", "ledoit-wolf")
QUANTILES = ("pooled", "identity")
FAR, NEAR = "far", "near"
_QUANTILE, _LARGEST_QUANTILE = 0.005, 0.49
_ROUNDING = 1e-9  # relative: distances that differ by less are one


@dataclass(frozen=True, eq=False)
class Cleansing:
    """Which images to keep.

    Attributes:
        kept: (N,) bool.
        distances: (N,) float64, of a feature to its identity's mean, without a unit (see `clean`); 0 where it was not
            judged.
        reasons: N texts: "" where the image is kept, "far" above the upper quantile, "near" below the lower one.
        num_unjudged: images that are kept because their identity has too few to tell.
        least: images that an identity needs to be judged.
    """

    kept: NDArray[np.bool_]
    distances: NDArray[np.float64]
    reasons: tuple[str, ...]
    num_unjudged: int
    least: int

    def __str__(self) -> str:
        """How many were dropped of how many, and why."""
        counts, n = Counter(self.reasons), len(self.kept)
        return (
            f"dropped {n - int(self.kept.sum())} of {n} images: {counts[FAR]} far from their person's mean, "
            f"{counts[NEAR]} near it; {self.num_unjudged} not judged, of people with fewer than {self.least} images"
        )


def clean(
    features: Any,
    identities: Any,
    *,
    quantile: float = _QUANTILE,
    covariance: str = "spherical",
    quantiles: str = "pooled",
    lower: bool = True,
    normalize: bool = True,
) -> Cleansing:
    """Find images to leave out by the distances of their features to their identity's mean (eq. 29-32, on features).

    An image is dropped if its Mahalanobis distance is above the 1 - p quantile of the distances, or below the p
    quantile. The covariance of a few images in hundreds of dimensions is singular, and by its pseudo-inverse all N
    images of an identity are at the same distance, sqrt(N - 1). So there are others:

        "spherical": one variance for all directions and identities, which makes it the Euclidean distance in another
            unit. It found most wrong labels on real features (docs, Train).
        "pooled": the covariance of all images around their identity's mean, with Ledoit-Wolf shrinkage.
        "ledoit-wolf": each identity's own, with Ledoit-Wolf shrinkage; distances are in units of the identity's root
            mean square, because shrinkage depends on how many images there are. Identities need 3 images.

    Distances have no unit: they count standard deviations. With "spherical" their root mean square over all images that
    are judged is sqrt(D), with "pooled" at most that, and over each identity 1 with "ledoit-wolf".

    Computed on the CPU in float64, with memory for five copies of the features.

    Args:
        features: (N, D) floating numpy array or torch tensor.
        identities: (N,) who is on the image: texts, as in a table (007 is not 7), or labels of the kinds that
            `pose2id.evaluate` takes.
        quantile: p, in [0, 0.49].
        covariance: one of the above.
        quantiles: "pooled": of the distances of all identities together; 2 p N images are dropped, wherever they are.
            "identity": of each identity by itself: for p = 0.005 this drops the farthest and the nearest image of every
            identity with 3 to 200 images.
        lower: drop the nearest, too, as the paper does. With "spherical" none had a wrong label when measured.
        normalize: L2-normalise the features.

    Returns:
        What to keep. Identities with one image have distance 0 and are kept; two images are equally far from their
        mean, so both are kept or both dropped.

    Raises:
        ImportError: covariance is "pooled" or "ledoit-wolf", and scikit-learn is not installed.
        ValueError: no images, or labels of another length.
    """
    p = check_rule(quantile, covariance, quantiles)
    checked_flag(lower, "lower")
    rows = Rows(features, "features", normalize=normalize)
    if rows.n == 0:
        raise ValueError("features must hold at least one row, got an empty set.")
    group, counts = _groups(identities, rows.n)
    residuals = _residuals(rows.read(slice(None), torch.float64).cpu().numpy(), group, counts)
    least = 3 if covariance == "ledoit-wolf" else 2
    judged = counts[group] >= least
    distances = np.zeros(rows.n)
    for members in _members(group, judged, each=covariance == "ledoit-wolf"):
        distances[members] = _distances(residuals[members], covariance)
    return _verdict(distances, _members(group, judged, each=quantiles == "identity"), p, lower, least)


def clean_people(people: Iterable[Any]) -> Cleansing:
    """`clean` with its defaults, with memory for the features of one person: large sets have a hundred gigabytes.

    Args:
        people: the features of one person after another, (N, D) floating arrays or tensors with at least two rows.

    Returns:
        What to keep, in the order in which the features came.
    """
    parts = []
    dim = 0
    for features in people:
        rows = Rows(features, "features", normalize=True)
        n, dim = rows.n, rows.dim
        x = centred(rows.read(slice(None), torch.float64).cpu().numpy(), np.zeros(n, np.int64), np.array([n]))
        parts.append(np.square(x).sum(1) * n / max(n - 1, 1))
    squares = np.concatenate(parts)
    mean = squares.mean()
    distances: NDArray[np.float64] = np.sqrt(squares * dim / mean) if mean > 0 else squares
    return _verdict(distances, [np.arange(len(distances))], _QUANTILE, True, 2)


def _verdict(
    distances: NDArray[np.float64], groups: Sequence[NDArray[np.int64]], p: float, lower: bool, least: int
) -> Cleansing:
    """By quantiles of each group's distances; rows of no group are kept."""
    far, near = np.zeros((2, len(distances)), dtype=bool)
    for members in groups:
        low, high = np.quantile(distances[members], [p, 1 - p])
        far[members] = distances[members] > high * (1 + _ROUNDING)
        near[members] = lower & (distances[members] < low * (1 - _ROUNDING))
    return Cleansing(
        kept=~(far | near),
        distances=distances,
        reasons=tuple(FAR if is_far else NEAR if is_near else "" for is_far, is_near in zip(far, near, strict=True)),
        num_unjudged=len(distances) - sum(len(members) for members in groups),
        least=least,
    )


def check_rule(quantile: Any, covariance: Any, quantiles: Any) -> float:
    """Raise as `clean` would for these, before features are there; p as a float."""
    checked_choice(covariance, "covariance", COVARIANCES)
    checked_choice(quantiles, "quantiles", QUANTILES)
    if covariance != "spherical":
        require_modules(f"covariance {covariance!r} needs scikit-learn", '"pose2id[train]"', "sklearn")
    return checked_number(quantile, "quantile", 0, _LARGEST_QUANTILE)


def _groups(identities: Any, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each row's identity as a number from 0, and the identities' numbers of rows."""
    labels = checked_identities(identities, "identities", n)
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return group, counts


def _residuals(x: NDArray[np.float64], group: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Features minus the mean of their identity, times sqrt(N / (N - 1)).

    A mean of N moves towards each of its own images, which leaves (N - 1) / N of the variance. With the factor images
    of small identities are as far from their means as others.
    """
    x = centred(x, group, counts)
    peak = np.abs(x).max()  # squares must neither overflow nor vanish; the distances have no unit
    x /= peak if peak > 0 else 1.0
    return x * np.sqrt(counts / np.maximum(counts - 1, 1))[group, None]


def _members(group: NDArray[np.int64], judged: NDArray[np.bool_], *, each: bool) -> list[NDArray[np.int64]]:
    """Indices of the rows that are judged: all together, or of each identity."""
    rows = np.flatnonzero(judged)
    if not each:
        return [rows] if len(rows) else []
    rows = rows[np.argsort(group[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(group[rows])) + 1) if len(rows) else []


def _distances(residuals: NDArray[np.float64], covariance: str) -> NDArray[np.float64]:
    if covariance == "spherical":
        return _mahalanobis(residuals, 1.0)
    from sklearn.covariance import ledoit_wolf_shrinkage  # noqa: PLC0415 - an extra

    found = _mahalanobis(residuals, float(ledoit_wolf_shrinkage(residuals, assume_centered=True)))
    if covariance == "pooled":
        return found
    scale = np.sqrt(np.square(found).mean())
    return found / scale if scale > 0 else found


def _mahalanobis(residuals: NDArray[np.float64], shrinkage: float) -> NDArray[np.float64]:
    """sqrt(r' C^-1 r) of each residual, with C = (1 - s) S + s tr(S) / D I, S their covariance."""
    n, dim = residuals.shape
    squares = np.square(residuals).sum(1)
    trace = squares.mean()
    if trace == 0:
        return squares
    # Ledoit and Wolf don't shrink residuals that are r and -r. What is added then keeps rounding errors small.
    floor = max(shrinkage / dim, _ROUNDING) * trace
    if shrinkage == 1:
        return np.sqrt(squares / floor)
    # In the eigenvectors of the smaller side: an identity's few images need no D x D matrix.
    if n > dim:
        values, vectors = np.linalg.eigh(residuals.T @ residuals / n)
        squares, values = np.square(residuals @ vectors), np.maximum(values, 0)
    else:
        values, vectors = np.linalg.eigh(residuals @ residuals.T / n)
        values = np.maximum(values, 0)
        squares = np.square(vectors) * values * n
    found: NDArray[np.float64] = np.sqrt((squares / ((1 - shrinkage) * values + floor)).sum(1))
    return found
