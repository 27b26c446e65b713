"""The camera-aware Jaccard distance (Chen et al., CVPR 2024) as its authors publish it: dense, set by set, in float64.

Facts: arXiv 2311.10605, and the published code's re-ranking: distances are squared and divided by the largest of each
image; on a list of one kind, own camera or others, images of the other kind come last, 999 further away; both lists are
cut to one more than k1, though the image itself is on that of its own camera alone.
"""

from __future__ import annotations

import numpy as np

PUSHED = 999.0


def ca_jaccard(x, cameras, num_queries, within, across, average_within, average_across, weight, *, fill=True):
    """(Q, G) distances of rows x, queries first; without `fill` no list has images that were pushed away."""
    x, cameras = np.asarray(x, np.float64), np.asarray(cameras)
    n = len(x)
    original = np.array([((x - row) ** 2).sum(1) for row in x])
    original /= original.max(axis=1, keepdims=True)
    alike = cameras[:, None] == cameras

    def rankings(pushed):
        order = np.argsort(original + PUSHED * pushed, axis=1, kind="stable")
        return [[j for j in order[i].tolist() if fill or not pushed[i, j]] for i in range(n)]

    own, others = rankings(~alike), rankings(alike)
    if not fill:  # copies of a lower index don't push an image off its own list
        own = [[i, *(j for j in own[i] if j != i)] for i in range(n)]
    v = np.zeros((n, n))
    for i in range(n):
        members = set()
        for ranking, length in ((own, within + 1), (others, across + 1)):
            members |= {j for j in ranking[i][:length] if i in ranking[j][:length]}
        members = sorted(members)
        v[i, members] = np.exp(-original[i, members])
        v[i] /= v[i].sum()
    v = np.array([np.mean(v[own[i][:average_within] + others[i][:average_across]], axis=0) for i in range(n)])
    jaccard = np.empty((num_queries, n - num_queries))
    for q in range(num_queries):
        for g in range(num_queries, n):
            jaccard[q, g - num_queries] = 1 - np.minimum(v[q], v[g]).sum() / np.maximum(v[q], v[g]).sum()
    return (1 - weight) * jaccard + weight * original[:num_queries, num_queries:]
