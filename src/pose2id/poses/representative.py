"""Poses to generate people in: each person's most typical one (eq. 7-8), and a few of these that cover all directions.

Two poses are compared by their joints, measured from the neck in lengths of the torso, as in `validity`, and by which
way the body faces. A pose and another one are as far apart as their mirror images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pose2id.io.checks import checked_count, checked_flag, checked_identities, checked_size
from pose2id.io.rows import Rows, centred
from pose2id.poses.medoids import k_medoids
from pose2id.poses.skeleton import KEYPOINTS, Pose
from pose2id.poses.validity import Body, body_of, check_pose

DIRECTIONS = ("front", "right", "back", "left")
"""Where a body faces, a quarter turn from each to the next; left and right are the picture's."""
_SIZE = (256, 128)
_ROUNDING = 1e-12  # squared distances of features of length 1 that differ by less are one
# Widths of a body seen from the front and the way of the nose before the neck, seen from the side, in lengths of the
# torso: what 9 of 10 poses of CUHK03's training people stay below, rounded to what the standard poses have.
_SHOULDERS, _HIPS, _NOSE = 0.9, 0.5, 0.45
_UNSEEN = 0.4  # torso lengths: how far apart a joint is that one of two poses shows
_FACING = 0.25  # torso lengths for a unit of direction: front and back are 2 apart


@dataclass(frozen=True, eq=False)
class ChosenPose:
    """One of the poses that `choose_poses` chose.

    Attributes:
        pose: named by its number and direction, such as "1-front".
        index: of the pose that it is, among those given.
        mirrored: it is the mirror image of that pose.
        facing: where the body faces, in degrees; see `facing`.
        share: of the valid poses (with `mirrored` also of their mirror images) that are nearest to this one.
    """

    pose: Pose
    index: int
    mirrored: bool
    facing: float
    share: float


def nearest_to_mean(
    features: Any, identities: Any, poses: Sequence[Pose | None], *, size: tuple[int, int] = _SIZE
) -> NDArray[np.int64]:
    """The image of each identity whose feature is nearest to the identity's mean: it has the typical pose (eq. 7-8).

    The mean is that of all images of the identity, with a pose or not, after L2 normalisation; it is not normalised
    again, which would not change which of them is nearest. Only images with a valid pose (`check_pose`) can be chosen.
    Computed on the CPU in float64.

    Args:
        features: (N, D) floating numpy array or torch tensor; L2-normalised here.
        identities: (N,) who is on the image: texts, as in a table (007 is not 7), or labels of the kinds that
            `pose2id.evaluate` takes.
        poses: N poses, None where there is none.
        size: as of `check_pose`.

    Returns:
        Indices of images, ascending, one for each identity that has a valid pose. Of images that are equally near, as
        two alone always are, it is the first.

    Raises:
        ValueError: no images, or identities or poses of another number.
    """
    rows = Rows(features, "features", normalize=True)
    if rows.n == 0:
        raise ValueError("features must hold at least one row, got an empty set.")
    _, group, counts = np.unique(
        checked_identities(identities, "identities", rows.n), return_inverse=True, return_counts=True
    )
    if len(poses) != rows.n:
        raise ValueError(f"poses must hold one pose or None per row, {rows.n}, got {len(poses)}.")
    posed = np.zeros(rows.n, dtype=bool)
    posed[_valid(poses, size)] = True
    x = rows.read(slice(None), torch.float64).cpu().numpy()
    squares = np.where(posed, np.square(centred(x, group, counts)).sum(1), np.inf)
    least = np.full(len(counts), np.inf)
    np.minimum.at(least, group, squares)
    near = np.flatnonzero(posed & (squares <= least[group] + _ROUNDING))
    return np.sort(near[np.unique(group[near], return_index=True)[1]])


def facing(pose: Pose, *, size: tuple[int, int] = _SIZE) -> float:
    """Where a body faces, in degrees: 0 the camera, 90 the right of the picture, 180 away, -90 the left.

    It is the angle of (front, right). For an upright body turned by an angle, these are its cosine and sine:

    - front: how far the left shoulder is right of the right one, in parts of a body's width seen from the front, and
      the same of the hips; the mean of both, or what is visible of them. One shoulder counts double, from the neck.
    - right: how far the nose is right of the neck, in parts of its way in a profile. Without nose: the way that shows
      the side of the face (eyes and ears) of which more is visible, as far as `front` leaves room; none if equal.

    Args:
        pose: that shows the neck and a hip.
        size: as of `check_pose`.

    Returns:
        In (-180, 180]. The mirror image has the angle with the other sign.
    """
    if not isinstance(pose, Pose):
        raise TypeError(f"pose must be a Pose, got {type(pose).__name__}.")
    body = body_of(pose, checked_size(size))
    if not body.torso:
        raise ValueError("pose must show the neck and, apart from it, a hip, got one without. Leave it out.")
    front, right = _direction(body)
    angle = math.degrees(math.atan2(right, front))
    return 180.0 if angle == -180 else angle


def choose_poses(
    poses: Sequence[Pose | None], count: int = 8, *, size: tuple[int, int] = _SIZE, mirrored: bool = False
) -> list[ChosenPose]:
    """Poses that are near all others, in limbs and direction: k-medoids of the valid ones (`check_pose`).

    Partitioning around medoids on `pose_distances`, without chance: the same poses in another order give the same
    choice, unless two choices are equally good, of which one with lower indices is taken. Needs memory for a few
    matrices of N x N float64 numbers.

    Args:
        poses: N poses, such as those of `nearest_to_mean`, None where there is none.
        count: how many to choose. Equal poses are one.
        size: as of `check_pose`.
        mirrored: mirror images count, and may be chosen, as if they had been given too: then left and right are
            covered alike, even where people pass a camera in one direction.

    Returns:
        The choice; the first few of it are a smaller one, each that which brings poses nearest to their nearest.

    Raises:
        ValueError: fewer different valid poses than `count`.
    """
    number = checked_count(count, "count")
    indices = _valid(poses, size)
    given = [pose for i in indices if (pose := poses[i]) is not None]
    everything = [*given, *(pose.flipped() for pose in given)] if checked_flag(mirrored, "mirrored") else given
    candidates = sorted({pose: place for place, pose in reversed(list(enumerate(everything)))}.values())
    if len(candidates) < number:
        what = f"the number of different valid poses{', mirror images included' if mirrored else ''}"
        raise ValueError(f"count must be at most {len(candidates)}, {what}, got {number}.")
    distances = pose_distances(everything, [everything[i] for i in candidates], size=size)
    medoids = k_medoids(distances, number)
    shares = np.bincount(distances[:, medoids].argmin(1), minlength=number) / len(everything)
    chosen = []
    for place, (medoid, share) in enumerate(zip(medoids, shares.tolist(), strict=True), 1):
        pose = everything[candidates[medoid]]
        angle = facing(pose, size=size)
        named = replace(pose, name=f"{place}-{direction(angle)}")
        turned = candidates[medoid] >= len(given)
        chosen.append(ChosenPose(named, indices[candidates[medoid] % len(given)], turned, angle, share))
    return chosen


def direction(angle: float) -> str:
    """The one of `DIRECTIONS` within 45 degrees of an angle of `facing`: "front", "right", "back" or "left"."""
    return DIRECTIONS[round(angle / 90) % 4]


def pose_distances(
    poses: Sequence[Pose], others: Sequence[Pose], *, size: tuple[int, int] = _SIZE
) -> NDArray[np.float64]:
    """How different poses are, in torso lengths: 0 are poses of one shape and direction, wherever they are.

    The root of the mean over 18 keypoints of squared distances, measured from the neck, plus (0.25 d)², where d is the
    distance of the poses' directions (front, right), see `facing`: 2 between front and back. A keypoint that one pose
    alone shows counts as 0.4 apart, one that neither shows as 0. Mirrored, both, poses are as different.

    Args:
        poses: N poses that show the neck and a hip.
        others: C poses, likewise.
        size: as of `check_pose`.

    Returns:
        (N, C) float64.
    """
    (points, ways), (other_points, other_ways) = _described(poses, "poses", size), _described(others, "others", size)
    squares = _FACING**2 * sum(np.square(ways[:, None, i] - other_ways[:, i]) for i in range(2))
    for joint in range(len(KEYPOINTS)):
        a, b = points[:, joint], other_points[:, joint]
        apart = sum(np.square(a[:, None, i] - b[:, i]) for i in range(2))
        seen, other_seen = ~np.isnan(a[:, :1]), ~np.isnan(b[:, 0])
        apart = np.where(seen & other_seen, apart, np.where(seen ^ other_seen, _UNSEEN**2, 0.0))
        squares += apart / len(KEYPOINTS)
    found: NDArray[np.float64] = np.sqrt(squares)
    return found


def _valid(poses: Sequence[Pose | None], size: tuple[int, int]) -> list[int]:
    """Indices of the poses that are valid."""
    for i, pose in enumerate(poses):
        if not isinstance(pose, Pose | None):
            raise TypeError(f"poses[{i}] must be a Pose or None, got {type(pose).__name__}.")
    return [i for i, pose in enumerate(poses) if pose is not None and check_pose(pose, size=size)]


def _described(
    poses: Sequence[Pose], name: str, size: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N, 18, 2) places in torso lengths from the neck, NaN where not visible, and (N, 2) directions."""
    points, ways = np.full((len(poses), len(KEYPOINTS), 2), np.nan), np.zeros((len(poses), 2))
    checked_size(size)
    for i, pose in enumerate(poses):
        if not isinstance(pose, Pose):
            raise TypeError(f"{name}[{i}] must be a Pose, got {type(pose).__name__}.")
        body = body_of(pose, size)
        if not body.torso:
            raise ValueError(f"{name}[{i}] must show the neck and, apart from it, a hip. Leave it out.")
        ways[i] = _direction(body)
        for joint, keypoint in enumerate(KEYPOINTS):
            if keypoint in body.visible:
                points[i, joint] = np.divide(body.points[keypoint], body.torso)
    return points, ways


def _direction(body: Body) -> tuple[float, float]:
    """(front, right), at most 1 long."""
    widths = [
        width / full / body.torso
        for joint, full in (("shoulder", _SHOULDERS), ("hip", _HIPS))
        if (width := _width(body, joint)) is not None
    ]
    front = _clipped(sum(widths) / len(widths)) if widths else 0.0
    if "nose" in body.visible:
        right = _clipped(body.points["nose"][0] / _NOSE / body.torso)
    else:
        # Who turns to the right of the picture shows the right side of the face.
        seen = [sum(f"{side}_{part}" in body.visible for part in ("eye", "ear")) for side in ("left", "right")]
        right = float(np.sign(seen[1] - seen[0])) * math.sqrt(1 - front**2)
    length = max(1.0, math.hypot(front, right))
    return front / length, right / length


def _width(body: Body, joint: str) -> float | None:
    """How far the left one of a pair of joints is right of the right one."""
    left, right = (body.points.get(f"{side}_{joint}") for side in ("left", "right"))
    if left is not None and right is not None:
        return left[0] - right[0]
    if joint == "hip" or (left is None and right is None):
        return None
    return 2 * left[0] if left is not None else -2 * right[0] if right is not None else None


def _clipped(value: float) -> float:
    return min(max(value, -1.0), 1.0)
