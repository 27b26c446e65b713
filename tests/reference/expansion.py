"""Query expansion, literally: float64, one feature at a time."""

from __future__ import annotations

import numpy as np

from reference import unit


def weight(a, b, alpha):
    cosine = float(a @ b)
    return cosine**alpha if cosine > 0 else 0.0


def nearest(x, others, count):
    """The `count` nearest of unit rows `others` to x, ties to the lower index."""
    squared = ((others - x) ** 2).sum(axis=1)
    return sorted(range(len(others)), key=lambda j: (squared[j], j))[:count]


def query_expansion(queries, gallery, qe_k, alpha, qe_times):
    queries, gallery = unit(queries), unit(gallery)
    for _ in range(qe_times):
        sums = []
        for q in queries:
            total = q.copy()
            for j in nearest(q, gallery, qe_k - 1):
                total = total + weight(q, gallery[j], alpha) * gallery[j]
            sums.append(total)
        queries = unit(sums)
    return queries


def weighted_sums(features, qe_k, alpha):
    """Each feature and its qe_k - 1 nearest others by direction, each weighted by cosine^alpha, as they are."""
    features = np.asarray(features, np.float64)
    directions = unit(features)
    sums = []
    for i in range(len(features)):
        others = [j for j in range(len(features)) if j != i]
        total = features[i].copy()
        for place in nearest(directions[i], directions[others], qe_k - 1):
            j = others[place]
            total = total + weight(directions[i], directions[j], alpha) * features[j]
        sums.append(total)
    return np.array(sums)


def database_augmentation(gallery, qe_k, alpha, qe_times):
    gallery = unit(gallery)
    for _ in range(qe_times):
        gallery = unit(weighted_sums(gallery, qe_k, alpha))
    return gallery


def aqe(queries, gallery, qe_times, qe_k, alpha):
    both = np.concatenate([queries, gallery]).astype(np.float64)
    for _ in range(qe_times):
        both = weighted_sums(both, qe_k, alpha) / min(qe_k, len(both))
    return both[: len(queries)], both[len(queries) :]
