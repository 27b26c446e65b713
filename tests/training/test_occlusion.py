"""Occluders on references: which boxes, of what, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from miniature import assert_equal, miniature, people, weights

from pose2id.ipg.pixels import load_reference
from pose2id.poses import KEYPOINTS, Pose, standard
from pose2id.training import occlusion
from pose2id.training.occlusion import PARTS, boxes, occluded
from pose2id.training.pairs import Pairs, PairSettings, select
from pose2id.training.run import train
from pose2id.training.settings import TrainingSettings

SETTINGS = PairSettings(seed=7, image_size=(16, 8), identity_size=(24, 12), latent_shape=(4, 8, 4))
IMAGE = np.random.default_rng(1).integers(0, 256, (128, 64, 3), dtype=np.uint8)
FRONT = standard()[0]


def only(*names):
    keypoints = np.full((18, 2), np.nan)
    for name in names:
        keypoints[KEYPOINTS.index(name)] = FRONT.keypoints[KEYPOINTS.index(name)]
    return Pose(keypoints)


def changed(pose, seed, image=IMAGE):
    """The covered box and its values."""
    result = occluded(image, pose, np.random.default_rng(seed))
    differs = (result != image).any(2)
    rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
    return box, result[box[0] : box[1], box[2] : box[3]].reshape(-1, 3)


def test_boxes_hold_their_keypoints_and_lie_in_the_image():
    generator = np.random.default_rng(0)
    for _ in range(200):
        pose = Pose(generator.uniform(-1, 2, (18, 2)))
        for part, (top, bottom, left, right) in boxes(pose, (40, 30)).items():
            assert 0 <= top < bottom <= 40
            assert 0 <= left < right <= 30
            for name in PARTS[part]:
                x, y = pose.keypoints[KEYPOINTS.index(name)] * (30, 40)
                if 0 <= x < 30 and 0 <= y < 40:
                    assert top <= y < bottom
                    assert left <= x < right
    assert list(boxes(FRONT, (128, 64))) == list(PARTS)
    rows = {part: box[:2] for part, box in boxes(FRONT, (128, 64)).items()}
    assert rows["head"][0] < rows["torso"][0] < rows["legs"][0]
    assert rows["head"][1] < rows["torso"][1] < rows["legs"][1]


@pytest.mark.parametrize(
    ("pose", "parts"),
    [
        (None, set()),
        (only("nose"), set()),  # one keypoint has no extent
        (only("nose", "left_wrist", "right_knee"), set()),
        (only("nose", "left_eye"), {"head"}),
        (only("right_hip", "left_hip"), {"torso", "legs"}),
        (only("left_elbow", "left_wrist"), {"left arm"}),
        (Pose(np.subtract(FRONT.keypoints, (0, 1.05))), set()),  # above the image
        (Pose(np.subtract(only("nose", "neck").keypoints, (1, 0))), set()),  # beside it
    ],
)
def test_parts_without_keypoints_are_not_covered(pose, parts):
    found = boxes(pose, (128, 64))
    assert set(found) == parts
    if not found:
        assert np.array_equal(occluded(IMAGE, pose, np.random.default_rng(0)), IMAGE)


def test_one_part_is_covered_in_one_colour():
    expected = boxes(FRONT, IMAGE.shape[:2])
    seen, colours = [], set()
    for seed in range(100):
        box, values = changed(FRONT, seed)
        assert (values == values[0]).all()
        colours.add(tuple(values[0].tolist()))
        seen.append(next(part for part, of_part in expected.items() if np.abs(np.subtract(of_part, box)).max() <= 1))
    assert set(seen) == set(PARTS)
    assert len(colours) > 95
    before = IMAGE.copy()
    assert changed(FRONT, 5)[0] == changed(FRONT, 5)[0]
    assert np.array_equal(IMAGE, before)


def test_occluders_of_infrared_images_are_grey():
    grey = np.repeat(IMAGE[..., :1], 3, axis=2)
    for seed in range(20):
        _, values = changed(FRONT, seed, grey)
        assert (values[:, :1] == values).all()
    assert any(np.ptp(changed(FRONT, seed)[1][0].astype(int)) for seed in range(5))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    table = people(tmp_path_factory.mktemp("occluded") / "people")
    return [replace(image, pose=None) if i == 2 else image for i, image in enumerate(table)]


@pytest.mark.parametrize("variants", [None, 3])
def test_occluders_are_all_that_changes_in_a_sample(images, variants):
    selection = select(images)
    without, never, some, always = (
        Pairs(selection, replace(SETTINGS, variants=variants, **given))
        for given in ({}, {"occlude": 0.0}, {"occlude": 0.5}, {"occlude": 1.0})
    )
    again, covered = Pairs(selection, some.settings), []
    for n in range(40):
        sample, plain = some[n], without[n]
        for name in plain:
            assert torch.equal(plain[name], never[n][name])
            assert torch.equal(sample[name], again[n][name])
            if name not in ("reference", "identity"):
                assert torch.equal(plain[name], sample[name])
                assert torch.equal(plain[name], always[n][name])
        covered.append(not torch.equal(sample["reference"], plain["reference"]))
        assert covered[-1] is not torch.equal(sample["identity"], plain["identity"])
    assert 10 < sum(covered) < 30


def test_a_reference_without_keypoints_stays(images, monkeypatch):
    selection = select(images)
    bare = next(i for i, image in enumerate(selection.images) if image.pose is None)
    plain = replace(SETTINGS, flip=0.0, erase=0.0)
    without, always = (Pairs(selection, replace(plain, occlude=share)) for share in (0.0, 1.0))
    for variant in range(5):
        assert torch.equal(always.reference(bare, variant)["reference"], without.reference(bare, variant)["reference"])
    other = (bare + 1) % len(selection.images)
    given = []
    monkeypatch.setattr(
        "pose2id.training.pairs.occluded", lambda image, pose, draws: given.append((image, pose)) or image
    )
    always.reference(other, 0)
    ((image, pose),) = given
    assert pose == selection.images[other].pose
    assert np.array_equal(image, np.asarray(load_reference(selection.images[other].path, "x")))  # before it is mirrored


@pytest.mark.parametrize("cached", [{}, {"cache": True, "reference_variants": 2}])
def test_a_run_that_stopped_goes_on_to_the_same_weights(images, tmp_path, cached):
    options = {"batch_size": 2, "validation_images": 0, "occlude": 0.7, "device": "cpu", "progress": False, **cached}
    whole = train(miniature(), images, tmp_path / "whole", steps=4, **options)
    train(miniature(), images, tmp_path / "parts", steps=2, **options)
    parts = train(miniature(), images, tmp_path / "parts", steps=4, **options)
    assert_equal(weights(parts.weights), weights(whole.weights))
    without = train(miniature(), images, tmp_path / "without", steps=4, **{**options, "occlude": 0.0})
    first, other = weights(whole.weights), weights(without.weights)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(ValueError, match=r"occlude 0\.7 then, 0\.2 now"):
        train(miniature(), images, tmp_path / "whole", steps=4, **{**options, "occlude": 0.2})


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_probability(share):
    assert TrainingSettings().occlude == 0
    with pytest.raises(ValueError, match=r"occlude must be in \[0, 1\]"):
        TrainingSettings(occlude=share)


def test_every_keypoint_of_a_part_has_a_name():
    assert {name for names in occlusion.PARTS.values() for name in names} == set(KEYPOINTS)
