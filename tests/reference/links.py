"""Camera-aware centralization as docs and docstrings say: centring, contrast links, map, sums; row by row, dense.

Unknown cameras are -1.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from . import unit
from .guard import LEAST, Evidence, cosines, guarded, ranked

WITHIN, OVERALL = 7, 20  # neighbours in one camera, and over all but one
FEW = 10  # cameras of fewer images share one list


def centred(q, g, q_cameras, g_cameras, statistics="both"):
    """Unit rows without the mean of all and their camera's shrunk offset."""
    q, g = unit(q), unit(g)
    seen = [(x, int(c)) for x, c in zip(g, g_cameras, strict=True)]
    if statistics == "both":
        seen = [(x, int(c)) for x, c in zip(q, q_cameras, strict=True)] + seen
    cameras = sorted({c for _, c in seen} - {-1})
    if len(cameras) < 2:
        return q, g
    mean = sum(x for x, _ in seen) / len(seen)
    offsets = {}
    for camera in cameras:
        own = [x for x, c in seen if c == camera]
        offset = sum(own) / len(own) - mean
        offsets[camera] = len(own) / (len(own) + 30) * offset

    def without(x, camera):
        return x - mean - offsets.get(int(camera), 0 * mean)

    return tuple(
        unit([without(x, c) for x, c in zip(rows, of_rows, strict=True)])
        for rows, of_rows in ((q, q_cameras), (g, g_cameras))
    )


def contrast(s, ends):
    """How far s stands out between the last (0) and the first (1) of a list."""
    first, last = ends
    return min(max((s - last) / max(first - last, 1e-6), 0.0), 1.0)


def ends(similarities, members, itself, count):
    """First and last similarity of a list of `count` members at most."""
    order = ranked(similarities, members, itself)[:count]
    return similarities[order[0]], similarities[order[-1]]


def lists_of(cameras, among):
    """Names of the lists that cameras have: their own number, or one for all that are unknown or rare in `among`."""
    return ["few" if c == -1 or 0 < among.count(c) < FEW else c for c in cameras]


def links(x, x_cameras, y, y_cameras, itself):
    """(N, M) weights of links of unit rows x to unit rows y; `itself`: y is x, and no row is linked to itself."""
    x_cameras, y_cameras = [int(c) for c in x_cameras], [int(c) for c in y_cameras]
    to, among = cosines(x, y), cosines(y, y)
    weights = np.zeros(to.shape)
    length = min(OVERALL, len(y) - 2)
    if length < 1:
        return weights
    everybody, x_lists, y_lists = range(len(y)), lists_of(x_cameras, y_cameras), lists_of(y_cameras, y_cameras)
    members = {name: [j for j in everybody if y_lists[j] == name] for name in y_lists}

    @cache
    def behind(j, name):
        return ends(among[j], members[name], j, WITHIN)

    @cache
    def behind_overall(j):
        return ends(among[j], everybody, j, length + 1)

    for i in range(len(x)):
        own = i if itself else None
        overall = ends(to[i], everybody, own, length + 1)
        for name, images in members.items():
            order = ranked(to[i], images, own)[:WITHIN]
            if len(order) < 3:
                continue
            ahead = to[i, order[0]], to[i, order[-1]]
            looks_at = x_lists[i] if len(members.get(x_lists[i], [])) >= 3 else name
            for j in order[:-1]:
                s = to[i, j]
                near = min(contrast(s, ahead), contrast(s, behind(j, looks_at))) ** 2
                weights[i, j] = min(near, contrast(s, overall), contrast(s, behind_overall(j)))
    return weights


def differ(a, b):
    """Whether two images are known to be of different cameras."""
    return int(a) != int(b) and -1 not in (int(a), int(b))


def link_map(x, cameras=None, weights=None):
    """The matrix that shrinks what differs between linked rows; `weights`: their links, if known."""
    if weights is None:
        every = [-1] * len(x) if cameras is None else cameras
        weights = links(x, every, x, every, True)
    dim, total, scatter = x.shape[1], 0.0, np.zeros((x.shape[1], x.shape[1]))
    for i in range(len(x)):
        for j in np.flatnonzero(weights[i]):
            if cameras is None or differ(cameras[i], cameras[j]):
                total += weights[i, j]
                scatter += weights[i, j] * np.outer(x[i] - x[j], x[i] - x[j])
    if total < 1 or np.trace(scatter / total) < 1e-12:  # too few, or copies
        return np.eye(dim)
    e, vectors = np.linalg.eigh(scatter / total)
    shrinkage = (3 if cameras is None else 1) + dim / total
    return vectors @ np.diag((np.maximum(e, 0) + shrinkage * e.mean()) ** -0.5) @ vectors.T


def summed(x, x_cameras, y, y_cameras, itself, num_cameras):
    """Unit rows with what they are linked to, images of other cameras counting more."""
    weights, out = links(x, x_cameras, y, y_cameras, itself), x.copy()
    for i in range(len(x)):
        for j in np.flatnonzero(weights[i]):
            factor = 1 + 1 / (max(num_cameras, 2) - 1) if differ(x_cameras[i], y_cameras[j]) else 1
            out[i] = out[i] + weights[i, j] * factor * y[j]
    return unit(out)


def known(cameras):
    return len({int(c) for c in cameras} - {-1})


def camera_sums(q, g, q_cameras, g_cameras):
    """C1 of rows that are centred already: map, then sums; queries meet the gallery alone."""
    matrix, number = link_map(g, g_cameras), known(g_cameras)
    q, g = unit(q @ matrix), unit(g @ matrix)
    return summed(q, q_cameras, g, g_cameras, False, number), summed(g, g_cameras, g, g_cameras, True, number)


def usable(g_cameras):
    """Whether half of the gallery is in known cameras of at least 16 images."""
    cameras = [int(c) for c in g_cameras]
    return 2 * sum(c != -1 and cameras.count(c) >= LEAST for c in cameras) >= len(cameras) and known(cameras) > 0


def enhanced(q, g, q_cameras, g_cameras, statistics="both"):
    """By method: C0 "centring", C1 "cameras", B "guarded" and C "auto", of `Centralizer.enhance` with cameras."""
    found = {"centring": centred(q, g, q_cameras, g_cameras, statistics)}
    x, y = found["centring"]
    if known(g_cameras):
        found["cameras"] = camera_sums(x, y, q_cameras, g_cameras)
    if not usable(g_cameras):
        x, y = unit(q), unit(g)
        found["guarded"] = found["auto"] = guarded(x, y, cosines(x, y), Evidence(cosines(y, y)))
        return found
    evidence = Evidence(cosines(y, y), g_cameras)
    found["guarded"] = guarded(x, y, cosines(x, y), evidence, q_cameras)
    found["auto"] = found["cameras"] if evidence.gate >= 0.5 else found["guarded"]
    return found


def joint_features(q, g, q_cameras, g_cameras):
    """What C2 compares: both sets together centred, mapped and summed."""
    q, g = centred(q, g, q_cameras, g_cameras)
    x, cameras = np.concatenate([q, g]), [*map(int, q_cameras), *map(int, g_cameras)]
    x = unit(x @ link_map(x, cameras))
    return summed(x, cameras, x, cameras, True, known(cameras))
