"""Poses whose joints have changed places."""

from __future__ import annotations

import numpy as np
import pytest

from pose2id.poses import check_pose, scrambled, standard


def test_joints_change_places_and_nothing_else():
    for pose, original in zip(scrambled(10, seed=4), [*standard(), *standard()[:2]], strict=True):
        assert np.array_equal(pose.visible, original.visible)
        assert pose != original
        joints, originals = (np.sort(one.keypoints[one.visible], axis=0) for one in (pose, original))
        assert np.array_equal(joints, originals)


def test_nobody_can_take_them():
    assert not any(check_pose(pose) for seed in range(40) for pose in scrambled(seed=seed))


def test_seed_and_place_choose_a_pose():
    assert scrambled(3, seed=1) == scrambled(8, seed=1)[:3]
    assert len({pose.key for seed in range(4) for pose in scrambled(16, seed=seed)}) == 64
    assert [pose.name for pose in scrambled(2)] == ["random-1", "random-2"]


@pytest.mark.parametrize(("given", "message"), [({"count": 0}, "count must be"), ({"seed": -1}, "seed must be")])
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        scrambled(**given)
