"""Poses that nobody can take, to measure what bad poses cost."""

from __future__ import annotations

import numpy as np

from pose2id.io.checks import checked_count
from pose2id.poses.files import standard
from pose2id.poses.skeleton import Pose


def scrambled(count: int = 8, *, seed: int = 0) -> list[Pose]:
    """Standard poses in turn whose visible joints have changed places at random: the paper's "random" poses.

    Args:
        count: of poses, at least 1.
        seed: of the exchange. Pose m is a function of the seed and m alone.

    Returns:
        Poses named "random-1", "random-2", ...; `check_pose` refuses them.
    """
    seed = checked_count(seed, "seed", least=0)
    return [_scrambled(m, np.random.default_rng([seed, m])) for m in range(checked_count(count, "count"))]


def _scrambled(m: int, draws: np.random.Generator) -> Pose:
    pose = standard()[m % len(standard())]
    keypoints, visible = pose.keypoints.copy(), np.flatnonzero(pose.visible)
    keypoints[visible] = keypoints[draws.permutation(visible)]
    return Pose(keypoints, f"random-{m + 1}")
