"""Graph convolution re-ranking, literally: float64, whole matrices."""

from __future__ import annotations

import numpy as np

from reference import unit


def laplacian(x, allowed, k, beta):
    """R^-1/2 S C^-1/2 of each row with itself and the k - 1 nearest that it is allowed to list."""
    n = len(x)
    s = np.zeros((n, n))
    for i in range(n):
        squared = ((x - x[i]) ** 2).sum(axis=1)
        others = sorted((j for j in range(n) if j != i and allowed[i, j]), key=lambda j: (squared[j], j))
        for j in [i, *others[: k - 1]]:
            if j == i or (x[i].any() and x[j].any()):
                s[i, j] = np.exp(x[i] @ x[j] / beta)
    return np.diag(s.sum(axis=1) ** -0.5) @ s @ np.diag(s.sum(axis=0) ** -0.5)


def graph_propagation(queries, gallery, q_camids=None, g_camids=None, k=6, k_across=6, rounds=3, alpha=0.5, beta=0.2):
    x = np.concatenate([unit(queries), unit(gallery)])
    everything = np.ones((len(x), len(x)), dtype=bool)
    for _ in range(rounds):
        mean = laplacian(x, everything, k, beta) @ x
        if q_camids is not None:
            cameras = np.concatenate([q_camids, g_camids])
            across = laplacian(x, cameras[:, None] != cameras[None, :], k_across, beta) @ x
            mean = (1 - alpha) * mean + alpha * across
        x = unit(mean)
    return x[: len(queries)], x[len(queries) :]
