"""Code bases in miniature: what pose2id plugs into, with the published names, signatures and outputs.

Written from those, none of their code. Networks are small and random.
"""

from __future__ import annotations

import numpy as np


def ranked(distances, q_pids, g_pids, q_camids, g_camids):
    """Average precision (Q,) and CMC (G,), one query at a time: images of its identity and camera are no candidates."""
    precisions, hits = [], np.zeros(len(g_pids))
    for row, pid, camera in zip(np.asarray(distances), q_pids, q_camids, strict=True):
        found, right, precision, first = 0, 0, 0.0, None
        for g in np.argsort(row, kind="stable"):
            if g_pids[g] == pid and g_camids[g] == camera:
                continue
            found += 1
            if g_pids[g] == pid:
                right += 1
                precision += right / found
                first = found if first is None else first
        if right:
            precisions.append(precision / right)
            hits[first - 1 :] += 1
    return np.array(precisions), hits / len(precisions)
