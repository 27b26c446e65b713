from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import pose2id
from pose2id.poses import KEYPOINTS, LIMBS, PALETTE, Pose, standard
from pose2id.poses.skeleton import COCO_KEYPOINTS

SCHEME = np.linspace(0.1, 0.9, 36).reshape(18, 2)


@pytest.fixture
def facts():
    return json.loads((ROOT / "tests" / "golden" / "standard_poses.json").read_text(encoding="utf-8"))["poses"]


def test_the_tables_fit_together():
    assert len(set(KEYPOINTS)) == len(set(PALETTE)) == 18
    assert len(set(LIMBS)) == 17
    assert set(COCO_KEYPOINTS) == set(KEYPOINTS) - {"neck"}
    # A tree: every joint but the neck, the root, is the end of one limb.
    assert sorted(end for _, end in LIMBS) == [i for i, name in enumerate(KEYPOINTS) if name != "neck"]
    for start, end in LIMBS:
        sides = {name.split("_")[0] for name in (KEYPOINTS[start], KEYPOINTS[end])} & {"left", "right"}
        assert len(sides) <= 1


def test_keypoints_are_a_read_only_copy():
    given = SCHEME.astype(np.float32)
    given[3] = np.nan
    pose = Pose(given, "a")
    before = given.copy()
    given[:] = 0
    np.testing.assert_array_equal(pose.keypoints, before)
    assert pose.keypoints.dtype == np.float64
    assert pose.visible.dtype == bool
    np.testing.assert_array_equal(pose.visible, np.arange(18) != 3)
    with pytest.raises(ValueError, match="read-only"):
        pose.keypoints[0] = 0
    with pytest.raises(AttributeError):
        pose.name = "b"
    assert repr(pose) == f"Pose('a', 17 of 18 keypoints visible, {pose.key[:8]})"


@pytest.mark.parametrize(
    "given", [SCHEME.tolist(), tuple(map(tuple, SCHEME)), torch.tensor(SCHEME), SCHEME[::-1][::-1]]
)
def test_keypoints_may_come_in_any_container(given):
    assert Pose(given) == Pose(SCHEME)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pose: pickle.loads(pickle.dumps(pose))])
def test_copies_are_read_only_too(copied):
    pose = Pose(SCHEME, "a")
    same = copied(pose)
    assert same == pose
    assert same.name == "a"
    assert not same.keypoints.flags.writeable
    assert dataclasses.replace(pose, name="b").name == "b"


def test_one_keypoint_is_enough_and_may_lie_outside():
    for x, y in ((0.5, 0.5), (-1, 2), (2, -1), (0, 0)):
        keypoints = np.full((18, 2), np.nan)
        keypoints[7] = x, y
        assert Pose(keypoints).visible.sum() == 1


def changed(index, value):
    keypoints = SCHEME.copy()
    keypoints[index] = value
    return keypoints


@pytest.mark.parametrize(
    ("keypoints", "error", "message"),
    [
        (SCHEME[:17], ValueError, r"shape \(18, 2\), got \(17, 2\)\. Pose\.from_coco"),
        (np.zeros((18, 3)), ValueError, r"got \(18, 3\)"),
        (
            changed(3, (0.5, np.inf)),
            ValueError,
            r"keypoints\[3\] \(right_elbow\) must lie in \[-1, 2\].*got \[0.5, inf\]",
        ),
        (changed(5, (-1.1, 0)), ValueError, r"keypoints\[5\] \(left_shoulder\) must lie in.*divide pixels"),
        (changed(1, (30, 60)), ValueError, r"keypoints\[1\] \(neck\) must lie in"),
        (changed((4, 0), np.nan), ValueError, r"keypoints\[4\] \(right_wrist\) must have both coordinates"),
        (np.full((18, 2), np.nan), ValueError, r"at least one visible keypoint.*Leave this pose out"),
        ("nobody", TypeError, "must be an array of numbers, got str"),
        (None, TypeError, "must be an array of numbers"),
        ([[1, 2], [3]], TypeError, "must be an array of numbers, got list"),
        ([["0.5", "0.5"]] * 18, TypeError, "must be an array of numbers, got list of <U3"),
        (np.ones((18, 2), dtype=bool), TypeError, "must be an array of numbers"),
        (SCHEME + 0j, TypeError, "must be an array of numbers"),
    ],
)
def test_bad_keypoints_are_named(keypoints, error, message):
    with pytest.raises(error, match=message):
        Pose(keypoints)


@pytest.mark.parametrize("name", ["1", "front", "front view", "a-b_c.d", "vue de côté 2", ""])
def test_names_are_fit_for_files(name):
    assert Pose(SCHEME, name).name == name


@pytest.mark.parametrize("name", ["../a", "/a", "a\\b", "..", ".", ".a", "a ", "a.", "a\n", "a:b", "-a", "a\0"])
def test_names_cannot_leave_their_folder(name):
    with pytest.raises(ValueError, match="name must be fit for a file name"):
        Pose(SCHEME, name)


def test_names_are_strings():
    with pytest.raises(TypeError, match="expected string"):
        Pose(SCHEME, 1)


def test_key_restated():
    pose = Pose(changed(3, np.nan))
    numbers = [0 if math.isnan(v) else round(v * 10**6) for v in pose.keypoints.reshape(-1).tolist()]
    text = b"".join(v.to_bytes(8, "little", signed=True) for v in numbers) + bytes(i != 3 for i in range(18))
    assert pose.key == hashlib.sha256(text).hexdigest()


def test_key_and_equality_are_of_rounded_keypoints_and_visibility():
    pose = Pose(changed(0, (0.0, 0.25)), "a")
    same = [
        Pose(pose.keypoints),
        Pose(pose.keypoints, "b"),
        Pose(changed(0, (-0.0, 0.25))),
        Pose(changed(0, (-1e-9, 0.25 + 1e-9))),
        Pose(pose.keypoints.astype(">f8")),
        Pose(np.asfortranarray(pose.keypoints)),
    ]
    assert {pose, *same} == {pose}
    assert {p.key for p in same} == {pose.key}
    others = [
        Pose(changed(0, (0.0, 0.250002))),
        Pose(changed(0, (0.0, 0.250001))),
        Pose(changed(0, (np.nan, np.nan))),
        Pose(pose.keypoints[::-1]),
    ]
    assert len({pose.key, *(p.key for p in others)}) == 5
    # A keypoint in the corner is not one that is missing.
    assert Pose(changed(0, (0, 0))) != Pose(changed(0, np.nan))
    assert pose != "a"
    assert pose != pose.key


def test_flipped():
    pose = Pose(changed(3, np.nan), "a")
    flipped = pose.flipped()
    for i, name in enumerate(KEYPOINTS):
        swapped = {"left": "right", "right": "left"}
        j = KEYPOINTS.index("_".join(swapped.get(word, word) for word in name.split("_")))
        np.testing.assert_allclose(flipped.keypoints[j], [1 - pose.keypoints[i, 0], pose.keypoints[i, 1]], atol=5e-7)
    assert not flipped.visible[KEYPOINTS.index("left_elbow")]
    assert flipped != pose
    assert flipped.name == "a-flipped"
    assert flipped.flipped() == pose
    assert flipped.flipped().name == "a"
    assert Pose(SCHEME).flipped().name == ""


@given(st.lists(st.one_of(st.floats(-1, 2), st.integers(-2_000_000, 4_000_000).map(lambda n: n / 2e6)), min_size=18))
def test_twice_flipped_is_the_pose(places):
    """Half millionths, which a difference from 1 rounds to either side, are among them."""
    pose = Pose(np.column_stack([places[:18], places[17::-1]]))
    assert pose.flipped().flipped() == pose
    assert np.abs(pose.flipped().flipped().keypoints - pose.keypoints).max() <= 0.501e-6
    rounded = Pose(np.rint(pose.keypoints * 1e6) / 1e6)
    assert rounded == pose
    assert rounded.flipped() == pose.flipped()


def test_flipping_keeps_the_range():
    assert Pose(changed(0, (-1, 0))).flipped().keypoints[0, 0] == 2
    assert Pose(changed(0, (2, 0))).flipped().keypoints[0, 0] == -1


def test_coco_by_names():
    coco = np.column_stack([np.linspace(0.1, 0.9, 17), np.linspace(0.8, 0.2, 17), np.ones(17)])
    pose = Pose.from_coco(coco, name="a")
    assert pose.name == "a"
    for i, name in enumerate(COCO_KEYPOINTS):
        np.testing.assert_array_equal(pose.keypoints[KEYPOINTS.index(name)], coco[i, :2])
    shoulders = [COCO_KEYPOINTS.index("left_shoulder"), COCO_KEYPOINTS.index("right_shoulder")]
    np.testing.assert_allclose(pose.keypoints[1], coco[shoulders, :2].mean(0))
    np.testing.assert_array_equal(pose.to_coco(), coco)
    assert Pose.from_coco(coco[:, :2]) == pose
    assert Pose.from_coco(coco * (64, 128, 1), size=(128, 64)) == pose
    np.testing.assert_allclose(pose.to_coco(size=(128, 64)), coco * (64, 128, 1))


def test_published_order_of_coco():
    """The order of COCO's annotations, restated as indices of OpenPose's joints."""
    assert [KEYPOINTS.index(name) for name in COCO_KEYPOINTS] == [
        *(0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10),
    ]


def test_the_neck_needs_both_shoulders():
    coco = np.column_stack([np.full((17, 2), 0.5), np.ones(17)])
    for shoulder in (5, 6):
        hidden = coco.copy()
        hidden[shoulder, 2] = 0
        pose = Pose.from_coco(hidden)
        assert not pose.visible[1]
        assert pose.visible.sum() == 16
        np.testing.assert_array_equal(pose.to_coco()[shoulder], [0, 0, 0])
        assert pose.to_coco()[:, 2].sum() == 16


def test_threshold_of_coco():
    coco = np.column_stack([np.full((17, 2), 0.5), np.full(17, 0.3)])
    coco[0, 2], coco[1, 2], coco[2, 2] = 0.2999, 2, np.nan
    coco[3] = 0
    np.testing.assert_array_equal(np.flatnonzero(~Pose.from_coco(coco).visible), [0, 14, 17])
    np.testing.assert_array_equal(np.flatnonzero(~Pose.from_coco(coco, threshold=0).visible), [14, 17])
    np.testing.assert_array_equal(np.flatnonzero(Pose.from_coco(coco, threshold=1).visible), [15])
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        Pose.from_coco(coco, threshold=2)


def test_bad_coco():
    with pytest.raises(ValueError, match=r"COCO's shape \(17, 2\) or \(17, 3\), got \(18, 2\)"):
        Pose.from_coco(SCHEME)
    with pytest.raises(ValueError, match="divide pixels"):
        Pose.from_coco(np.full((17, 2), 30.0))
    with pytest.raises(ValueError, match="at least one visible"):
        Pose.from_coco(np.zeros((17, 3)))
    with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
        Pose.from_coco(np.full((17, 2), 30.0), size=64)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        standard()[0].to_coco(size=(0, 64))


def test_standard_poses(facts):
    poses = standard()
    assert [pose.name for pose in poses] == list("12345678")
    assert standard() is poses
    for pose in poses:
        fact = facts[pose.name]
        assert pose.key == fact["key"]
        for place, there, pixel in zip(pose.keypoints, pose.visible, fact["keypoints_px"], strict=True):
            assert ([int(v) for v in place * (64, 128)] if there else None) == pixel


def test_it_is_a_lazy_submodule():
    assert pose2id.poses.Pose is Pose
