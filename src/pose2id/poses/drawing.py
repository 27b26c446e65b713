"""Drawn poses as DWPose draws them: what the generator's weights were trained on, and nothing else will do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from pose2id.io.checks import checked_size
from pose2id.poses.skeleton import LIMBS, PALETTE, Pose

_HALF_THICKNESS = 1
_RADIUS = 2
_DIMMED = 0.6  # of limbs, so that joints stand out
_REPAIR = (
    "Poses are drawn with OpenCV, whose module cv2 {}. Repair it: "
    "pip install --force-reinstall --no-deps opencv-python-headless"
)


def draw(pose: Pose, size: tuple[int, int] = (128, 64)) -> Image.Image:
    """A pose on black: limbs 3 pixels thick in dimmed colours, and over them joints, 5 pixels across, in full colour.

    Thickness does not grow with the size. The published drawings are 128 x 64 and are resized for the networks: draw in
    that size for the generator. Keypoints that are not visible are left out, and so are their limbs.

    Args:
        pose: what to draw.
        size: (height, width) in pixels.

    Returns:
        RGB picture in the colours of `PALETTE`: the limb from the neck to the right shoulder is red.

    Raises:
        ImportError: OpenCV is missing or damaged.
        TypeError, ValueError: not a pose, or not a size.
    """
    if not isinstance(pose, Pose):
        raise TypeError(f"pose must be a Pose, got {type(pose).__name__}.")
    height, width = checked_size(size)
    cv2 = _opencv()
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    joints = [None if math.isnan(x) else (x * width, y * height) for x, y in pose.keypoints.tolist()]
    for (first, second), colour in zip(LIMBS, PALETTE, strict=False):  # one colour more than limbs
        start, end = joints[first], joints[second]
        if start is None or end is None:
            continue
        # Truncated, not rounded, and from the second joint to the first: else pixels differ from the published ones.
        middle = (int((start[0] + end[0]) / 2), int((start[1] + end[1]) / 2))
        along = (start[0] - end[0], start[1] - end[1])
        axes = (int(math.hypot(*along) / 2), _HALF_THICKNESS)
        angle = int(math.degrees(math.atan2(along[1], along[0])))
        cv2.fillConvexPoly(canvas, cv2.ellipse2Poly(middle, axes, angle, 0, 360, 1), colour)
    canvas = (canvas * _DIMMED).astype(np.uint8)
    for joint, colour in zip(joints, PALETTE, strict=True):
        if joint is not None:
            cv2.circle(canvas, (int(joint[0]), int(joint[1])), _RADIUS, colour, thickness=-1)
    return Image.fromarray(canvas)


def _opencv() -> Any:
    try:
        import cv2  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(_REPAIR.format(f"cannot be imported ({error})")) from error
    # The wheels of OpenCV share their files: removing one of them leaves an empty cv2 of the other.
    if not hasattr(cv2, "fillConvexPoly"):
        raise ImportError(_REPAIR.format("is empty"))
    return cv2
