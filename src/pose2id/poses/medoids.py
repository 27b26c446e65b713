"""k-medoids: a few of many that are near all others. Partitioning around medoids, without chance.

The greedy choice (BUILD) is followed by exchanges of one medoid for one candidate, the best one first (SWAP), until
none makes the sum of distances less. Sums that differ by rounding are equal, and of equals the lower index is taken.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-12  # of the largest distance, for each point


def k_medoids(distances: NDArray[np.float64], count: int) -> list[int]:
    """Candidates that make the sum of all points' distances, to the nearest of them, small: no exchange lowers it.

    Args:
        distances: (N, C) from point to candidate, not negative. They need not be a metric.
        count: of medoids, at most C.

    Returns:
        Indices of candidates, in an order in which the first few of them are a greedy choice among all.
    """
    chosen = _greedy(distances, count)
    tolerance = _tolerance(distances)
    while True:
        deltas = _exchanges(distances, chosen)
        if deltas.min(initial=0.0) >= -tolerance:
            break
        candidate, place = np.argwhere(deltas <= deltas.min() + tolerance)[0]
        chosen[place] = int(candidate)
    chosen.sort()
    return [chosen[i] for i in _greedy(distances[:, chosen], count)]


def _tolerance(distances: NDArray[np.float64]) -> float:
    return float(_ROUNDING * len(distances) * distances.max(initial=0.0))


def _greedy(distances: NDArray[np.float64], count: int) -> list[int]:
    """Each candidate in turn lowers the sum most."""
    tolerance, chosen = _tolerance(distances), list[int]()
    nearest = np.full(len(distances), np.inf)
    for _ in range(count):
        sums = np.minimum(nearest[:, None], distances).sum(0)
        sums[chosen] = np.inf
        chosen.append(int(np.argmax(sums <= sums.min() + tolerance)))
        nearest = np.minimum(nearest, distances[:, chosen[-1]])
    return chosen


def _exchanges(distances: NDArray[np.float64], chosen: list[int]) -> NDArray[np.float64]:
    """(C, K) by how much the sum changes with a candidate in the place of a medoid; infinite for medoids."""
    to_chosen = distances[:, chosen]
    own = to_chosen.argmin(1)
    ranked = np.sort(to_chosen, axis=1)
    first = ranked[:, 0]
    second = ranked[:, 1] if len(chosen) > 1 else np.full(len(distances), np.inf)
    deltas = np.zeros((distances.shape[1], len(chosen)))
    for place in range(len(chosen)):
        lost = own == place
        staying = np.minimum(distances[~lost], first[~lost, None]).sum(0) - first[~lost].sum()
        deltas[:, place] = staying + np.minimum(distances[lost], second[lost, None]).sum(0) - first[lost].sum()
    deltas[chosen] = np.inf
    return deltas
