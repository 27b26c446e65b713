"""Literal, slow restatements for features in parts (N, P, D) with visibility (N, P): float64, one pair at a time."""

from __future__ import annotations

import math

import numpy as np


def unit(x):
    """Each part L2-normalised in float64; a zero part stays zero."""
    x = np.array(x, dtype=np.float64)
    for row in x:
        for p in range(len(row)):
            norm = np.sqrt((row[p] * row[p]).sum())
            if norm > 0:
                row[p] = row[p] / norm
    return x


def distance(x, y, v, u):
    """The weighted mean, over the parts that both show, of Euclidean distances; infinite if they share none."""
    total, weights = 0.0, 0.0
    for p in range(len(x)):
        weight = math.sqrt(float(v[p]) * float(u[p]))
        if weight > 0:
            total += weight * math.sqrt(((x[p] - y[p]) ** 2).sum())
            weights += weight
    return total / weights if weights > 0 else math.inf


def distances(x, y, v, u):
    """The matrix; pairs that share no part get the largest distance of one shared part plus 1."""
    far = 0.0
    for i in range(len(x)):
        for j in range(len(y)):
            for p in range(x.shape[1]):
                if v[i][p] * u[j][p] > 0:
                    far = max(far, math.sqrt(((x[i][p] - y[j][p]) ** 2).sum()))
    found = [[distance(x[i], y[j], v[i], u[j]) for j in range(len(y))] for i in range(len(x))]
    return np.array([[far + 1 if math.isinf(d) else d for d in row] for row in found])


def nearest(x, v, k):
    """k nearest others of every row, ties to the lower index; rows that share no part are no neighbours."""
    lists = []
    for i in range(len(x)):
        found = [(distance(x[i], x[j], v[i], v[j]), j) for j in range(len(x)) if j != i]
        lists.append([j for d, j in sorted(found) if math.isfinite(d)][:k])
    return lists


def nfc(x, v, k1, k2, normalize=True):
    """Algorithm 1 part by part: a neighbour adds a part as far as it shows it."""
    z = unit(x) if normalize else np.array(x, dtype=np.float64)
    proposals, looks = nearest(z, v, k1), nearest(z, v, k2)
    out = z.copy()
    for i in range(len(z)):
        for j in proposals[i]:
            if i in looks[j]:
                for p in range(z.shape[1]):
                    out[i, p] = out[i, p] + float(v[j][p]) * z[j, p]
    return unit(out) if normalize else out
