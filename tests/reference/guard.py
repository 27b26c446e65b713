"""Evidence that people repeat, and the sums that it supports (rules A and B), as docs and docstrings say: row by row.

Everything is told by matrices of similarities, rounded so that s_ij and s_ji are one number. Images of an unknown
camera are a camera of their own.
"""

from __future__ import annotations

import math

import numpy as np

from . import parts as of_parts
from . import unit

DIGITS = 12
LEAST = 16  # images of a camera that has lists
SAFETY, OF_GALLERY, OF_QUERY = 1.2, 0.8, 1.6


def cosines(x, y):
    """Similarities of unit rows."""
    return np.round(x @ y.T, DIGITS)


def part_similarities(x, y, v, u):
    """1 - d^2 / 2 of the mean distance over the parts that both show; -1 where they share none."""
    found = np.empty((len(x), len(y)))
    for i in range(len(x)):
        for j in range(len(y)):
            d = of_parts.distance(x[i], y[j], v[i], u[j])
            found[i, j] = round(1 - min(d, 2.0) ** 2 / 2, DIGITS)
    return found


def ranked(similarities, members, itself=None):
    """Members by falling similarity to one row, the lower index first where it is equal."""
    others = np.array([j for j in members if j != itself], dtype=int)
    return others[np.argsort(-similarities[others], kind="stable")].tolist()


class OneCamera:
    """What every row sees in one camera: near images, the level of strangers, and how these are spaced."""

    def __init__(self, s, members, longest, *, among, median=None):
        deepest = min(50, len(members) // 4)
        k = min(longest, deepest // 2)
        self.k, self.near, self.deep, self.x, self.level, self.last, scale = k, [], [], [], [], [], []
        for i in range(len(s)):
            order = ranked(s[i], members, i if among else None)
            x = [-math.log(max(1 - s[i, j], 1e-6)) for j in order]
            self.near.append(order[:k])
            self.x.append(x[:k])
            self.level.append(x[k])  # that of rank k + 1
            spacings = [rank * (x[rank - 1] - x[rank]) for rank in range(k + 1, deepest + 1)]
            scale.append(sum(spacings) / len(spacings))
            self.deep.append(order[k : 2 * k - 1])
            self.last.append(s[i, order[2 * k - 1]])
        self.median = float(np.median(scale)) if median is None else median
        count = deepest - k
        self.scale = [(count * own + 10 * self.median) / (count + 10) for own in scale]

    def surplus(self, row, x):
        """By how many scales x is nearer than the level of strangers."""
        above = x - self.level[row]
        return float(above / self.scale[row]) if self.scale[row] > 0 else math.copysign(math.inf, above)


def supported(seen, lists, cameras):
    """Links nearer than strangers on both sides: (row, neighbour, rank, -log p). A neighbour looks at the row's camera.

    `seen` are what rows of `cameras` see; `lists` what gallery images see.
    """
    found = []
    for camera, ahead in seen.items():
        for i in range(len(cameras)):
            back = lists.get(cameras[i], lists[camera])
            for rank, j in enumerate(ahead.near[i], 1):
                one, other = ahead.surplus(i, ahead.x[i][rank - 1]), back.surplus(j, ahead.x[i][rank - 1])
                if one > 0 and other > 0:
                    found.append((i, j, rank, min(one - math.log(ahead.k), other - math.log(back.k))))
    return found


def members_of(cameras):
    return {c: [j for j in range(len(cameras)) if cameras[j] == c] for c in sorted(set(cameras))}


class Evidence:
    """Of a gallery, from its similarities and its images' cameras; k is 0 where it is too small."""

    def __init__(self, s, cameras=None):
        self.cameras = [0] * len(s) if cameras is None else [int(c) for c in cameras]
        groups = members_of(self.cameras)
        self.members = {c: rows for c, rows in groups.items() if len(rows) >= LEAST}
        self.n = self.k = 0
        self.expected = self.lower = self.gate = 0.0
        if not self.members:
            return
        trials = [self._trial(s, k) for k in ((6, 12, 24) if len(groups) == 1 else (6, 12))]
        most = max(trial["n"] for trial in trials)
        chosen = next(trial for trial in trials if trial["n"] >= 0.6 * most)
        vars(self).update(chosen)

    def _trial(self, s, k):
        lists = {c: OneCamera(s, rows, k, among=True) for c, rows in self.members.items()}
        links = supported(lists, lists, self.cameras)
        agree = asked = 0
        for of in lists.values():
            for i in range(len(s)):
                back = lists.get(self.cameras[i], of)
                for j in of.deep[i]:
                    asked += 1
                    agree += s[i, j] >= back.last[j]
        share = max(agree, 1) / asked
        n = sum(u > -np.log(0.05) for *_, u in links)
        rows = len(s) * len(lists)
        expected = 0.05 * rows * share
        lower = (n - 3 * np.sqrt(2 * n)) / expected
        gate = min(max(lower - 1, 0.0), 1.0)
        return {
            "k": k,
            "n": n,
            "expected": expected,
            "lower": lower,
            "gate": gate,
            "lists": lists,
            "links": links,
            "strengths": np.array([u for *_, u in links]),
            "share": share,
            "rows": rows,
        }

    def weight(self, u):
        """G (1 - strangers expected with that p or smaller / links seen with it)."""
        seen = (self.strengths >= u).sum() / self.rows
        confidence = 1 - SAFETY * self.share * np.exp(-u) / max(seen, 1e-9)
        return self.gate * min(max(confidence, 0.0), 1.0)


def guarded(q, g, to, found, q_cameras=None, shown=None):
    """Queries and gallery with their supported neighbours.

    q, g: unit rows, whole or in parts; to: similarities of queries to the gallery; found: `Evidence` of the gallery;
    shown: visibility of the gallery's parts.
    """
    q_cameras = [0] * len(q) if q_cameras is None else [int(c) for c in q_cameras]
    if found.gate == 0:
        return q, g

    def part(j, rows):
        return rows[j] if shown is None else np.asarray(shown[j], np.float64)[:, None] * rows[j]

    people, summed = np.ones(len(g)), g.copy()
    for i, j, rank, u in found.links:
        w = found.weight(u)
        people[i] += w
        summed[i] = summed[i] + OF_GALLERY * w / np.sqrt(rank) * part(j, g)
    summed = normalised(summed)
    seen = {
        camera: OneCamera(to, rows, found.k, among=False, median=found.lists[camera].median)
        for camera, rows in found.members.items()
    }
    asked = q.copy()
    for i, j, rank, u in supported(seen, found.lists, q_cameras):
        w = found.weight(u) / people[j]
        asked[i] = asked[i] + OF_QUERY * w / np.sqrt(rank) * part(j, summed)
    return normalised(asked), summed


def normalised(rows):
    return unit(rows) if rows.ndim == 2 else of_parts.unit(rows)
