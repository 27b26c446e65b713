"""Literal, slow restatements of what the library computes: float64, one row at a time, no blocks, no tricks."""

from __future__ import annotations

import numpy as np


def unit(x):
    """L2-normalised float64 rows; a zero row stays zero."""
    x = np.asarray(x, dtype=np.float64)
    norms = np.array([np.sqrt((row * row).sum()) for row in x]).reshape(-1, 1)
    return x / np.where(norms > 0, norms, 1)


def nearest(x, k, normalize=False):
    """k nearest others of every row by float64 distance, ties to the lower index."""
    x = unit(x) if normalize else np.asarray(x, dtype=np.float64)
    lists = []
    for i in range(len(x)):
        squared = ((x - x[i]) ** 2).sum(axis=1)
        order = sorted((j for j in range(len(x)) if j != i), key=lambda j: (squared[j], j))
        lists.append(order[:k])
    return lists


def nfc(x, k1, k2, normalize=True):
    """Algorithm 1, as printed."""
    z = unit(x) if normalize else np.asarray(x, dtype=np.float64)
    proposals, looks = nearest(z, k1), nearest(z, k2)
    out = z.copy()
    for i in range(len(z)):
        for j in proposals[i]:
            if i in looks[j]:
                out[i] = out[i] + z[j]
    return unit(out) if normalize else out


def fuse(features, generated, eta):
    """Eq. 9, as printed."""
    out = []
    for f, poses in zip(np.asarray(features, np.float64), np.asarray(generated, np.float64), strict=True):
        total = np.zeros_like(f)
        for pose in poses:
            total = total + pose
        fused = f + eta / len(poses) * total
        out.append(fused / np.sqrt((fused**2).sum()))
    return np.array(out)


def fuse_images(feature, images, pictures, eta):
    """Eq. 9 from images on, one picture at a time: `feature(picture, i)` in the place of image i (m=None: itself)."""
    out = []
    for i, image in enumerate(images):
        total = 0
        for m, picture in enumerate(pictures[i]):
            total = total + np.asarray(feature(picture, i, m), np.float64)
        fused = np.asarray(feature(image, i, None), np.float64)
        if len(pictures[i]):
            fused = fused + eta * total / len(pictures[i])
        out.append(fused / np.sqrt((fused**2).sum(axis=-1, keepdims=True)))
    return np.array(out)


def fuse_parts(features, generated, eta, visibility):
    """Eq. 9 part by part, over the generated images that show the part."""
    out = np.array(features, np.float64)
    for i, person in enumerate(out):
        for p, part in enumerate(person):
            weight, total = 0.0, np.zeros_like(part)
            for m in range(len(generated[i])):
                weight += float(visibility[i][m][p])
                total = total + float(visibility[i][m][p]) * np.asarray(generated[i][m][p], np.float64)
            fused = part + eta * total / weight if weight > 0 else part
            out[i, p] = fused / np.sqrt((fused**2).sum())
    return out


def generation_cosines(features, generated):
    """Mean cosines of originals to their own generated images, to others', and of generated images of one original."""

    def cosine(a, b):
        return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())

    own, other, among = [], [], []
    for i, f in enumerate(features):
        for j, poses in enumerate(generated):
            for m, g in enumerate(poses):
                (own if i == j else other).append(cosine(f, g))
                if i == j:
                    among += [cosine(g, poses[k]) for k in range(len(poses)) if k != m]
    return np.mean(own), np.mean(other), np.mean(among) if among else None


def id2(features, pids, convention):
    """ID² one identity at a time. "published": squared, over samples; "printed": Euclidean, over identities."""
    z, pids = unit(features), np.asarray(pids)
    samples, identities = [], []
    for pid in sorted(set(pids.tolist()) - {-1}):
        own = z[pids == pid]
        squared = ((own - own.mean(axis=0)) ** 2).sum(axis=1)
        samples += squared.tolist()
        identities.append(np.sqrt(squared).mean())
    return np.mean(samples) if convention == "published" else np.mean(identities)


def evaluate_rank(distmat, q_pids, g_pids, q_camids=None, g_camids=None, max_rank=50):
    """Market1501's protocol, one query and one rank at a time: (mAP, cmc, mINP, number of valid queries)."""
    aps, inps, cmcs = [], [], []
    for q in range(len(distmat)):
        ranked = sorted(range(len(g_pids)), key=lambda g: (distmat[q][g], g))
        right = []
        for g in ranked:
            if g_pids[g] == -1 or q_pids[q] == -1:
                continue
            if q_camids is not None and g_pids[g] == q_pids[q] and g_camids[g] == q_camids[q]:
                continue
            right.append(g_pids[g] == q_pids[q])
        if not any(right):
            continue
        hits, precisions = 0, []
        for rank, is_right in enumerate(right, 1):
            if is_right:
                hits += 1
                precisions.append(hits / rank)
                last = rank
        aps.append(np.mean(precisions))
        inps.append(hits / last)
        cmcs.append([any(right[:r]) for r in range(1, max_rank + 1)])
    return np.mean(aps), np.mean(cmcs, axis=0), np.mean(inps), len(aps)


def re_ranking(q_g, q_q, g_g, k1, k2, lambda_value, *, half=False):
    """k-reciprocal encoding from *squared* distances, set by set; `half`: with the published float16 rounding."""
    kind = np.float16 if half else np.float64
    original = np.block([[q_q, q_g], [q_g.T, g_g]]).astype(np.float32 if half else np.float64)
    original = (original / original.max(axis=0)).T
    n, num_queries = len(original), len(q_g)
    ranking = [sorted(range(n), key=lambda j: (original[i][j], j)) for i in range(n)]

    def reciprocal(i, length):
        return [j for j in ranking[i][:length] if i in ranking[j][:length]]

    weights = np.zeros((n, n), dtype=kind)
    for i in range(n):
        core = reciprocal(i, k1 + 1)
        expanded = set(core)
        for candidate in core:
            own = reciprocal(candidate, int(np.around(k1 / 2)) + 1)
            if len(set(own) & set(core)) > 2 / 3 * len(own):
                expanded |= set(own)
        members = sorted(expanded)
        weight = np.exp(-original[i, members])
        weights[i, members] = weight / weight.sum()
    if k2 > 1:
        weights = np.array([np.mean(weights[ranking[i][:k2]], axis=0) for i in range(n)]).astype(kind)
    out = np.zeros((num_queries, n - num_queries))
    for q in range(num_queries):
        for g in range(num_queries, n):
            shared = kind(0)
            for j in range(n):
                if weights[q, j] != 0 and weights[g, j] != 0:
                    shared = kind(shared + min(weights[q, j], weights[g, j]))
            jaccard = kind(1) - kind(shared / (kind(2) - shared))
            out[q, g - num_queries] = kind(jaccard * kind(1 - lambda_value)) + original[q, g] * lambda_value
    return out
