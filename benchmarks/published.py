"""The published algorithms restated for comparison: vectorised where the originals are, loops where they loop.

`nearest` is nobody's: what one would write first in torch, with no word about ties and rounding.
"""

from __future__ import annotations

import numpy as np
import torch


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The whole (N, M) matrix of squared Euclidean distances."""
    total = x.square().sum(1, keepdim=True).expand(len(x), len(y)) + y.square().sum(1, keepdim=True).T.expand(
        len(x), len(y)
    )
    return total.addmm_(x, y.T, beta=1, alpha=-2)


def nearest(features: torch.Tensor, k: int, block: int = 1024) -> torch.Tensor:
    """(N, k) nearest others of each row, a block of rows at a time: product, diagonal masked, topk."""
    found = []
    for start in range(0, len(features), block):
        distances = squared_distances(features[start : start + block], features)
        distances.diagonal(start).fill_(torch.inf)
        found.append(distances.topk(k, largest=False).indices)
    return torch.cat(found)


def nfc(features: torch.Tensor, k1: int, k2: int) -> torch.Tensor:
    """Dense matrix, a dense mask for its diagonal, then Python loops over neighbours; normalised before and after."""
    features = torch.nn.functional.normalize(features)
    distances = squared_distances(features, features)
    distances[torch.eye(len(features)) == 1] = 1000
    nearest = distances.topk(k1, largest=False).indices
    mutual = [[j for j in nearest[i] if i in nearest[j][:k2]] for i in range(len(features))]
    result = features.clone()
    for i, members in enumerate(mutual):
        if members:
            result[i] += features[torch.stack(members)].sum(0)
    return torch.nn.functional.normalize(result)


def evaluate(qf, gf, q_pids, g_pids, q_camids, g_camids, max_rank=50):  # noqa: ANN001, ANN201
    """Dense distances, a full argsort of every row, then a Python loop over queries: (mAP, cmc)."""
    distances = squared_distances(torch.from_numpy(qf), torch.from_numpy(gf)).numpy()
    ranking = np.argsort(distances, axis=1)
    matches = (g_pids[ranking] == q_pids[:, None]).astype(np.int32)
    precisions, curves = [], []
    for query in range(len(q_pids)):
        order = ranking[query]
        keep = ~((g_pids[order] == q_pids[query]) & (g_camids[order] == q_camids[query]))
        found = matches[query][keep]
        if not found.any():
            continue
        curve = found.cumsum()
        precisions.append(float((curve / np.arange(1, len(found) + 1) * found).sum() / found.sum()))
        curves.append(np.minimum(curve, 1)[:max_rank])
    return float(np.mean(precisions)), np.mean(curves, axis=0)


def id2_score(features: torch.Tensor, pids: np.ndarray) -> float:
    """Centre by centre and sample by sample: mean squared distance of normalised features to their centre."""
    features = torch.nn.functional.normalize(features)
    centres = {}
    for pid in np.unique(pids):
        centres[pid] = features[torch.from_numpy(np.flatnonzero(pids == pid))].mean(0)
    total = [squared_distances(features[i : i + 1], centres[pid][None]).item() for i, pid in enumerate(pids)]
    return float(np.mean(total))


def re_ranking(qf: np.ndarray, gf: np.ndarray, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    """Dense matrices of all images against all, a loop over rows, weights in float16."""
    features = torch.from_numpy(np.concatenate([qf, gf]))
    total, num_queries = len(features), len(qf)
    original = squared_distances(features, features).numpy()
    original = np.transpose(original / original.max(axis=0))
    ranking = np.argsort(original, axis=1).astype(np.int32)
    weights = np.zeros_like(original, dtype=np.float16)

    def reciprocal(i: int, length: int) -> np.ndarray:
        forward = ranking[i, :length]
        return forward[np.where(ranking[forward, :length] == i)[0]]

    for i in range(total):
        core = reciprocal(i, k1 + 1)
        expanded = core
        for candidate in core:
            own = reciprocal(candidate, int(np.around(k1 / 2)) + 1)
            if len(np.intersect1d(own, core)) > 2 / 3 * len(own):
                expanded = np.append(expanded, own)
        expanded = np.unique(expanded)
        weight = np.exp(-original[i, expanded])
        weights[i, expanded] = weight / weight.sum()
    original = original[:num_queries]
    if k2 > 1:
        averaged = np.zeros_like(weights)
        for i in range(total):
            averaged[i] = weights[ranking[i, :k2]].mean(axis=0)
        weights = averaged
    inverted = [np.where(weights[:, i] != 0)[0] for i in range(total)]
    jaccard = np.zeros_like(original, dtype=np.float16)
    for i in range(num_queries):
        shared = np.zeros((1, total), dtype=np.float16)
        for j in np.where(weights[i] != 0)[0]:
            shared[0, inverted[j]] += np.minimum(weights[i, j], weights[inverted[j], j])
        jaccard[i] = 1 - shared / (2 - shared)
    return (jaccard * (1 - lambda_value) + original * lambda_value)[:, num_queries:]
