from __future__ import annotations

import hashlib
import io
import json
import math
import random
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from pose2id.poses import KEYPOINTS, LIMBS, PALETTE, Pose, draw, drawing, standard

FACTS = json.loads((ROOT / "tests" / "golden" / "standard_poses.json").read_text(encoding="utf-8"))["poses"]
POSES = [*standard(), *(pose.flipped() for pose in standard())]
PINNED = "1f16874a82f83ba1c37e8f5e9745e3a6e7b93080fc23778bdbbe0dc12875d142"
DIAMOND = [(x, y) for x in range(-2, 3) for y in range(-2, 3) if abs(x) + abs(y) <= 2]


def outline(middle, half_length, angle):
    """The thin ellipse of a limb as a polygon: a corner per degree, rounded to pixels."""
    turn = math.radians(angle)
    corners = []
    for degree in range(361):
        along, across = half_length * math.cos(math.radians(degree)), math.sin(math.radians(degree))
        x = middle[0] + along * math.cos(turn) - across * math.sin(turn)
        y = middle[1] + along * math.sin(turn) + across * math.cos(turn)
        if corners[-1:] != [(round(x), round(y))]:
            corners.append((round(x), round(y)))
    return corners


def line(start, end):
    """From left to right, one pixel for each step along the longer axis, halves rounded back."""
    start, end = sorted([start, end])
    way = [end[0] - start[0], end[1] - start[1]]
    steps = max(map(abs, way))
    for k in range(steps + 1):
        x, y = (int(math.copysign(math.ceil(abs(w) * k / steps - 0.5), w)) if steps else 0 for w in way)
        yield start[0] + x, start[1] + y


def filled(corners):
    """What lies between the outermost pixels of a convex outline, row by row."""
    rows = {}
    for start, end in zip(corners, [*corners[1:], corners[0]], strict=True):
        for x, y in line(start, end):
            rows.setdefault(y, []).append(x)
    return [(x, y) for y, xs in rows.items() for x in range(min(xs), max(xs) + 1)]


def drawn_slowly(pose, size=(128, 64)):
    """The drawing without OpenCV, pixel by pixel."""
    height, width = size
    canvas = np.zeros((height, width, 3), dtype=np.uint8)

    def paint(pixels, colour):
        for x, y in pixels:
            if 0 <= x < width and 0 <= y < height:
                canvas[y, x] = colour

    joints = [(x * width, y * height) for x, y in pose.keypoints.tolist()]
    for limb, (i, j) in enumerate(LIMBS):
        if pose.visible[i] and pose.visible[j]:
            (x1, y1), (x2, y2) = joints[i], joints[j]
            middle = int((x1 + x2) / 2), int((y1 + y2) / 2)
            half_length = int(math.sqrt((x1 - x2) ** 2 + (y1 - y2) ** 2) / 2)
            angle = int(math.degrees(math.atan2(y1 - y2, x1 - x2)))
            paint(filled(outline(middle, half_length, angle)), PALETTE[limb])
    canvas = np.trunc(canvas * 0.6).astype(np.uint8)
    for (x, y), colour, there in zip(joints, PALETTE, pose.visible, strict=True):
        if there:
            paint([(int(x) + dx, int(y) + dy) for dx, dy in DIAMOND], colour)
    return canvas


@pytest.mark.parametrize("pose", POSES, ids=lambda pose: pose.name)
def test_pixel_by_pixel(pose):
    np.testing.assert_array_equal(np.array(draw(pose)), drawn_slowly(pose))


def test_other_sizes_and_poses(rng):
    """Rounded ties of slanted outlines may differ, by single pixels."""
    different = total = 0
    for _ in range(40):
        pose = Pose(rng.uniform(0.05, 0.95, (18, 2)))
        size = tuple(int(side) for side in rng.integers(30, 200, 2))
        found = np.array(draw(pose, size))
        assert found.shape == (*size, 3)
        different += (found != drawn_slowly(pose, size)).any(-1).sum()
        total += (found != 0).any(-1).sum()
    assert different < 1e-3 * total


def drawn_by_opencv(cv2, pose, size):
    """As DWPose does it."""
    height, width = size
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    joints = [(x * width, y * height) for x, y in pose.keypoints.tolist()]
    for (i, j), colour in zip(LIMBS, PALETTE, strict=False):
        if pose.visible[i] and pose.visible[j]:
            (x1, y1), (x2, y2) = joints[i], joints[j]
            length, angle = math.hypot(x1 - x2, y1 - y2), math.degrees(math.atan2(y1 - y2, x1 - x2))
            middle = int((x1 + x2) / 2), int((y1 + y2) / 2)
            cv2.fillConvexPoly(canvas, cv2.ellipse2Poly(middle, (int(length / 2), 1), int(angle), 0, 360, 1), colour)
    canvas = (canvas * 0.6).astype(np.uint8)
    for (x, y), colour, there in zip(joints, PALETTE, pose.visible, strict=True):
        if there:
            cv2.circle(canvas, (int(x), int(y)), 2, colour, thickness=-1)
    return canvas


def random_poses(count):
    """Poses and sizes: in the picture, around it, and as far outside as a pose may be."""
    rng = random.Random(0)
    for i in range(count):
        low, high = ((0, 1), (-0.2, 1.2), (-1, 2))[i % 3]
        points = [[rng.uniform(low, high), rng.uniform(low, high)] for _ in KEYPOINTS]
        hidden = [j > 0 and rng.random() < 0.15 for j in range(len(KEYPOINTS))]
        pose = Pose(np.where(np.array(hidden)[:, None], np.nan, points))
        most = 3000 if i % 50 == 46 else 300
        yield pose, ((128, 64), (256, 128), (rng.randint(1, most), rng.randint(1, most)))[i % 50 % 4 % 3]


def test_random_poses_as_opencv_draws_them(stress):
    cv2 = pytest.importorskip("cv2", reason="compares with OpenCV: pip install opencv-python-headless")
    for pose, size in random_poses(2000 if stress else 300):
        np.testing.assert_array_equal(np.array(draw(pose, size)), drawn_by_opencv(cv2, pose, size))


def test_opencv_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert draw(standard()[0]).size == (64, 128)


def test_random_poses_pinned():
    """As OpenCV 4.10 and 5.0 draw them."""
    digest = hashlib.sha256()
    for pose, size in random_poses(100):
        digest.update(np.array(draw(pose, size)).tobytes())
    assert digest.hexdigest() == PINNED


def as_published(array):
    """The published files: red and blue swapped, JPEG of quality 95 with 4:2:0 colours, decoded."""
    stored = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array[..., ::-1])).save(stored, "JPEG", quality=95, subsampling="4:2:0")
    return np.array(Image.open(stored))[..., ::-1]


@pytest.mark.parametrize("pose", standard(), ids=lambda pose: pose.name)
def test_the_published_files_come_from_this_drawing(pose):
    """How far the published JPEG files are from their drawings is known: as far as ours from its own JPEG."""
    drawing = np.array(draw(pose)).astype(float)
    error = np.abs(as_published(np.array(draw(pose))) - drawing).mean()
    assert error == pytest.approx(FACTS[pose.name]["mae_before_jpeg"], abs=6e-5)


@pytest.mark.parametrize("mutation", ["palette order", "quality", "one joint", "not dimmed"])
def test_that_check_can_fail(mutation, monkeypatch):
    pose = standard()[0]
    if mutation == "one joint":
        keypoints = pose.keypoints.copy()
        keypoints[4] += 1 / 64, 0
        pose = Pose(keypoints)
    if mutation == "not dimmed":
        monkeypatch.setattr(drawing, "_DIMMED", 1.0)
    array = np.array(draw(pose))
    array = array[..., ::-1] if mutation == "palette order" else array
    error = np.abs(as_published(array) - array.astype(float)).mean()
    if mutation == "quality":
        stored = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(array[..., ::-1])).save(stored, "JPEG", quality=94, subsampling="4:2:0")
        error = np.abs(np.array(Image.open(stored))[..., ::-1] - array.astype(float)).mean()
    assert abs(error - FACTS["1"]["mae_before_jpeg"]) > 1e-3


@pytest.mark.parametrize("pose", standard(), ids=lambda pose: pose.name)
def test_pinned(pose):
    """Other pixels are other poses than those that the weights were trained on."""
    assert hashlib.sha256(np.array(draw(pose)).tobytes()).hexdigest() == FACTS[pose.name]["sha256_drawing"]


@pytest.mark.parametrize("pose", standard(), ids=lambda pose: pose.name)
def test_joints_are_where_the_published_ones_are(pose):
    array = np.array(draw(pose))
    pixels = FACTS[pose.name]["keypoints_px"]
    seen = 0
    for i, pixel in enumerate(pixels):
        later = [other for other in pixels[i + 1 :] if other is not None]
        if pixel is None or any(abs(pixel[0] - x) + abs(pixel[1] - y) <= 2 for x, y in later):
            continue
        assert tuple(array[pixel[1], pixel[0]]) == PALETTE[i], KEYPOINTS[i]
        seen += 1
    assert seen >= 13
    # Full colours belong to joints alone: those of missing ones are nowhere.
    for i, pixel in enumerate(pixels):
        if pixel is None:
            assert not (array == PALETTE[i]).all(-1).any()


def only(**places):
    keypoints = np.full((18, 2), np.nan)
    for name, place in places.items():
        keypoints[KEYPOINTS.index(name)] = place
    return Pose(keypoints)


def test_a_joint_is_a_diamond():
    array = np.array(draw(only(nose=(0.5, 0.5))))
    assert {(x - 32, y - 64) for y, x in np.argwhere(array.any(-1))} == set(DIAMOND)
    assert len(DIAMOND) == 13


def test_a_limb_is_red_from_the_neck_to_the_right_shoulder():
    array = np.array(draw(only(neck=(0.25, 0.5), right_shoulder=(0.75, 0.5))))
    assert tuple(array[64, 32]) == (153, 0, 0)
    assert (array[60:69, 32].any(-1)).sum() == 3
    assert not np.array(draw(only(neck=(0.25, 0.5), right_elbow=(0.75, 0.5))))[64, 32].any()


def test_limbs_are_clipped_at_the_border():
    array = np.array(draw(only(neck=(0.5, 0.5), right_shoulder=(1.5, 0.5))))
    assert tuple(array[64, 63]) == (153, 0, 0)
    assert np.array(draw(only(neck=(1.9, -0.9)))).max() == 0


def test_result():
    picture = draw(standard()[0], (256, 128))
    assert picture.mode == "RGB"
    assert picture.size == (128, 256)
    # Thickness stays: a joint is 13 pixels in any size.
    assert (np.array(draw(only(nose=(0.5, 0.5)), (512, 256))).any(-1)).sum() == 13


def test_bad_input():
    with pytest.raises(TypeError, match="pose must be a Pose, got ndarray"):
        draw(standard()[0].keypoints)
    for size in (64, (64,), "ab", None):
        with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
            draw(standard()[0], size)
    with pytest.raises(TypeError, match="size must be an integer"):
        draw(standard()[0], (128.0, 64))
