"""Drawings of poses, as DWPose makes them: the generator's weights were trained on these pixels.

DWPose draws with OpenCV: a limb is `fillConvexPoly` of `ellipse2Poly`, a joint is a filled `circle`. This module does
the same arithmetic without OpenCV. Points are (x, y).
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pose2id.io.checks import checked_size
from pose2id.poses.skeleton import LIMBS, PALETTE, Pose

_Integers: TypeAlias = NDArray[np.int64]

_HALF_THICKNESS = 1
_DISC = np.array([(x, y) for x in range(-2, 3) for y in range(-2, 3) if abs(x) + abs(y) <= 2])  # a circle of radius 2
_DIMMED = 0.6  # of limbs, so that joints stand out
# OpenCV's table of sines, a float32 of 7 decimals for each degree: more digits round some corners to other pixels.
_SINE = np.round(np.sin(np.radians(np.arange(361))), 7).astype(np.float32).astype(np.float64)
_COSINE = _SINE[(450 - np.arange(361)) % 360]
_ONE = 1 << 16  # of the fixed-point numbers in which OpenCV follows an edge from row to row


def draw(pose: Pose, size: tuple[int, int] = (128, 64)) -> Image.Image:
    """A pose on black: limbs 3 pixels thick in dimmed colours, and over them joints, 5 pixels across, in full colour.

    Thickness does not grow with the size. The published drawings are 128 x 64 and are resized for the networks: draw in
    that size for the generator. Keypoints that are not visible are left out, and so are their limbs.

    Args:
        pose: what to draw.
        size: (height, width) in pixels.

    Returns:
        RGB picture in the colours of `PALETTE`: the limb from the neck to the right shoulder is red.
    """
    if not isinstance(pose, Pose):
        raise TypeError(f"pose must be a Pose, got {type(pose).__name__}.")
    height, width = checked_size(size)
    joints, seen = pose.keypoints * (width, height), pose.visible
    limbs = [i for i, (first, second) in enumerate(LIMBS) if seen[first] and seen[second]]
    outlines = np.array([_outline(*joints[list(LIMBS[i])].tolist()) for i in limbs], np.int64).reshape(-1, 361, 2)
    edges = _edges(np.array(limbs, np.int64) + 1, outlines)
    canvas = np.zeros((height, width), dtype=np.uint8)  # indices into a palette: black, of limbs, of joints
    for value, row, first, stop in _spans(*edges, height, width):
        canvas[row, first:stop] = value
    values, x, y = _pixels(*_clipped(*edges, height, width))
    np.maximum.at(canvas, (y, x), values.astype(np.uint8))  # later limbs, of higher values, lie over earlier ones
    for i in np.flatnonzero(seen):
        disc = joints[i].astype(np.int64) + _DISC
        x, y = disc[((disc >= 0) & (disc < (width, height))).all(axis=1)].T
        canvas[y, x] = 1 + len(PALETTE) + i
    picture = Image.fromarray(canvas)
    picture.putpalette(np.array([(0, 0, 0), *np.multiply(PALETTE, _DIMMED), *PALETTE]).astype(np.uint8).tobytes())
    return picture.convert("RGB")


def _outline(start: list[float], end: list[float]) -> _Integers:
    """The (361, 2) corners of a limb: a thin ellipse, one for each degree."""
    # Truncated, not rounded, and from the second joint to the first: else pixels differ from the published ones.
    middle = int((start[0] + end[0]) / 2), int((start[1] + end[1]) / 2)
    along = start[0] - end[0], start[1] - end[1]
    angle = int(math.degrees(math.atan2(along[1], along[0]))) % 360
    u, v = int(math.hypot(*along) / 2) * _COSINE, _HALF_THICKNESS * _SINE
    x = middle[0] + u * _COSINE[angle] - v * _SINE[angle]
    y = middle[1] + u * _SINE[angle] + v * _COSINE[angle]
    return np.rint(np.column_stack([x, y])).astype(np.int64)


def _edges(values: _Integers, outlines: _Integers) -> tuple[_Integers, _Integers, _Integers]:
    """Value, start and end of the edges of outlines (L, 361, 2), outline after outline."""
    starts, ends = outlines[:, :-1].reshape(-1, 2), outlines[:, 1:].reshape(-1, 2)
    moves = np.flatnonzero((starts != ends).any(axis=1))
    return values[moves // 360], starts[moves], ends[moves]


def _spans(values: _Integers, starts: _Integers, ends: _Integers, height: int, width: int) -> list[list[int]]:
    """What lies between the edges of convex outlines: value, y, first x, and x after the last, in order of values.

    An edge counts in the rows from its upper end to above its lower end, where the next one begins.
    """
    upwards = (starts[:, 1] > ends[:, 1])[:, None]
    starts, ends = np.where(upwards, ends, starts), np.where(upwards, starts, ends)
    across, down = (ends - starts).T
    bottoms = np.full(1 + len(LIMBS), np.iinfo(np.int64).min)
    np.maximum.at(bottoms, values, ends[:, 1])
    slope = np.trunc((2 * _ONE * across + down) / np.maximum(2 * down, 1)).astype(np.int64)
    edge, row = _steps(np.where(down > 0, down + (ends[:, 1] == bottoms[values]), 0))
    x, y = starts[edge, 0] + (slope[edge] * row + _ONE // 2) // _ONE, starts[edge, 1] + row
    inside = (y >= 0) & (y < height)
    place = values[edge][inside], y[inside]
    left, right = np.full((2, 1 + len(LIMBS), height), [[[width]], [[-1]]])
    np.minimum.at(left, place, x[inside])
    np.maximum.at(right, place, x[inside])
    value, y = np.nonzero(left <= right)
    return np.column_stack([value, y, left[value, y].clip(0), right[value, y] + 1]).tolist()


def _pixels(values: _Integers, starts: _Integers, ends: _Integers) -> tuple[_Integers, _Integers, _Integers]:
    """Value, x and y of the pixels of lines, by Bresenham's rule: halves are rounded back to the left end."""
    backwards = (starts[:, 0] > ends[:, 0])[:, None]
    starts, ends = np.where(backwards, ends, starts), np.where(backwards, starts, ends)
    way = ends - starts
    length = np.abs(way).max(axis=1)
    line, step = _steps(length + 1)
    twice = 2 * np.maximum(length, 1)[line, None]
    x, y = (starts[line] - np.sign(way)[line] * ((twice // 2 - 2 * np.abs(way)[line] * step[:, None]) // twice)).T
    return values[line], x, y


def _steps(counts: _Integers) -> tuple[_Integers, _Integers]:
    """[0, 0, 0, 1, 1, ...] and [0, 1, 2, 0, 1, ...] for counts [3, 2, ...]."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - (np.cumsum(counts) - counts)[which]


def _clipped(
    values: _Integers, starts: _Integers, ends: _Integers, height: int, width: int
) -> tuple[_Integers, _Integers, _Integers]:
    """The lines inside the canvas; an end beyond a border moves to it, by whole pixels across."""
    for axis, last in ((1, height - 1), (0, width - 1)):
        inside = (np.maximum(starts, ends)[:, axis] >= 0) & (np.minimum(starts, ends)[:, axis] <= last)
        values, starts, ends = values[inside], starts[inside], ends[inside]
        for near, far in ((starts, ends), (ends, starts)):
            beyond = (near[:, axis] < 0) | (near[:, axis] > last)
            way, moved = (far - near)[beyond], (near[:, axis].clip(0, last) - near[:, axis])[beyond]
            near[beyond, 1 - axis] += np.trunc(moved * way[:, 1 - axis] / way[:, axis]).astype(np.int64)
            near[beyond, axis] += moved
    return values, starts, ends
