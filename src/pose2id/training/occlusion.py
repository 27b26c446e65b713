"""Something before the person: one part of the body, where keypoints show it, covered by a plain box."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pose2id.poses.skeleton import KEYPOINTS, Pose

Box = tuple[int, int, int, int]  # top, bottom, left, right, in pixels

# fmt: off
PARTS: Mapping[str, tuple[str, ...]] = {
    "head": ("nose", "neck", "right_eye", "left_eye", "right_ear", "left_ear"),
    "torso": ("right_shoulder", "left_shoulder", "right_hip", "left_hip"),
    "right arm": ("right_shoulder", "right_elbow", "right_wrist"),
    "left arm": ("left_shoulder", "left_elbow", "left_wrist"),
    "legs": ("right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle"),
}
# fmt: on
_MARGIN = 0.04  # of the image's height, around the keypoints, which lie inside the body
_LEAST = 2  # keypoints: one has no extent


def boxes(pose: Pose | None, size: tuple[int, int]) -> dict[str, Box]:
    """Where the parts of a body are.

    Args:
        pose: of the person on an image; None: unknown.
        size: (height, width) of the image in pixels.

    Returns:
        (top, bottom, left, right) in pixels, inside the image, of each of `PARTS` with two visible keypoints that lie
        in it at least in part; ends are exclusive.
    """
    found: dict[str, Box] = {}
    if pose is None:
        return found
    margin = _MARGIN * size[0]
    placed = pose.keypoints[:, ::-1] * size  # rows, columns
    for part, names in PARTS.items():
        points = placed[[KEYPOINTS.index(name) for name in names]]
        points = points[~np.isnan(points[:, 0])]
        if len(points) < _LEAST:
            continue
        first, last = points.min(axis=0) - margin, points.max(axis=0) + margin
        top, left = np.clip(np.floor(first), 0, size).astype(int).tolist()
        bottom, right = np.clip(np.ceil(last), 0, size).astype(int).tolist()
        if top < bottom and left < right:
            found[part] = top, bottom, left, right
    return found


def occluded(image: NDArray[np.uint8], pose: Pose | None, draws: np.random.Generator) -> NDArray[np.uint8]:
    """A copy of an image with a random part of the body covered in a random colour; grey on a grey image.

    Args:
        image: (H, W, 3) uint8; not modified.
        pose: of the person on it; where it shows no part, nothing is covered.
        draws: which part, which colour.

    Returns:
        (H, W, 3) uint8.
    """
    image, found = image.copy(), boxes(pose, image.shape[:2])
    if found:
        top, bottom, left, right = list(found.values())[draws.integers(len(found))]
        colour = draws.integers(256, size=3, dtype=np.uint8)
        is_grey = (image == image[..., :1]).all()  # infrared
        image[top:bottom, left:right] = colour[0] if is_grey else colour
    return image
