"""Tests of the drawn pedestrians and of the colour-stripe descriptor."""

import hashlib
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from pose2id.demo.people import Sample, SyntheticPedestrians
from pose2id.demo.stripes import colour_stripes

NOSE, NECK, R_SHOULDER, L_SHOULDER, R_HIP, L_HIP = 0, 1, 2, 5, 8, 11
R_EYE, L_EYE, R_EAR, L_EAR = 14, 15, 16, 17
WRISTS_AND_ANKLES = (4, 7, 10, 13)


def digest(sample):
    parts = (sample.image, sample.keypoints, sample.visible)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def mean_average_precision(features, pids, camids, queries, gallery):
    """The Market-1501 protocol, written as literally as it can be."""
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    precisions = []
    for query in queries:
        ranked = sorted(gallery, key=lambda item: float(((features[item] - features[query]) ** 2).sum()))
        ranked = [item for item in ranked if pids[item] != pids[query] or camids[item] != camids[query]]
        hits = [rank for rank, item in enumerate(ranked, 1) if pids[item] == pids[query]]
        precisions.append(np.mean([number / rank for number, rank in enumerate(hits, 1)]))
    return float(np.mean(precisions))


@pytest.fixture(scope="module")
def small():
    return SyntheticPedestrians(16, num_cameras=3, images_per_camera=2)


@pytest.fixture(scope="module")
def small_samples(small):
    return list(small)


@pytest.fixture(scope="module")
def small_images(small_samples):
    return np.stack([sample.image for sample in small_samples])


def test_samples_have_the_promised_shapes_types_and_ranges(small, small_samples):
    assert len(small) == len(small_samples) == 16 * 3 * 2
    for sample, pid, camid in zip(small_samples, small.pids, small.camids, strict=True):
        assert sample.image.shape == (128, 64, 3)
        assert sample.image.dtype == np.uint8
        assert sample.keypoints.shape == (18, 2)
        assert sample.keypoints.dtype == np.float32
        assert np.isfinite(sample.keypoints).all()
        assert sample.visible.shape == (18,)
        assert sample.visible.dtype == np.bool_
        assert (sample.pid, sample.camid) == (pid, camid)
        shown = sample.keypoints[sample.visible]
        assert ((shown >= 0) & (shown < 1)).all()
    assert small.pids.dtype == small.camids.dtype == np.int64
    assert [sample.index for sample in small_samples[:4]] == [0, 1, 0, 1]
    assert set(small.pids) == set(range(1, 17))
    assert set(small.camids) == {1, 2, 3}
    assert "not real people" in small.name


def test_pictures_are_neither_flat_nor_saturated(small_images):
    assert small_images.std(axis=(1, 2, 3)).min() > 10
    assert 50 < small_images.mean() < 180
    assert np.mean((small_images == 0) | (small_images == 255)) < 0.15


def test_samples_and_labels_cannot_be_changed(small, small_samples):
    with pytest.raises(FrozenInstanceError):
        small_samples[0].pid = 5
    with pytest.raises(ValueError, match="read-only"):
        small.pids[0] = 5


def test_same_picture_in_any_order_and_in_any_subset(small_samples):
    fewer = SyntheticPedestrians(3, num_cameras=2, images_per_camera=1, first_pid=7)
    wanted = [digest(sample) for sample in small_samples if sample.pid in (7, 8, 9) and sample.camid < 3]
    backwards = [digest(fewer[position]) for position in reversed(range(len(fewer)))][::-1]
    assert backwards == wanted[::2]


def test_same_picture_in_another_process(small_samples):
    code = (
        "import sys, hashlib\n"
        "from pose2id.demo import SyntheticPedestrians\n"
        "s = SyntheticPedestrians(2, num_cameras=3).render(2, 3, 1)\n"
        "parts = (s.image, s.keypoints, s.visible)\n"
        "sys.stdout.write(hashlib.sha256(b''.join(part.tobytes() for part in parts)).hexdigest())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = next(s for s in small_samples if (s.pid, s.camid, s.index) == (2, 3, 1))
    assert done.stdout == digest(here)


def test_pickled_copy_draws_the_same(small, small_samples):
    assert digest(pickle.loads(pickle.dumps(small))[5]) == digest(small_samples[5])


def test_seed_person_camera_and_index_each_change_the_picture():
    people = SyntheticPedestrians(2, num_cameras=2)
    pictures = [people.render(*key) for key in ((1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1))]
    pictures.append(SyntheticPedestrians(2, seed=1).render(1, 1, 0))
    assert len({digest(picture) for picture in pictures}) == 5


def test_a_person_keeps_the_looks_and_others_differ():
    people = SyntheticPedestrians(30)
    assert people._look(4) is people._look(4)
    tops = {tuple(people._look(pid).colours["top"]) for pid in range(1, 31)}
    assert len(tops) == 30
    assert len({people._look(pid).bag for pid in range(1, 31)}) == 4
    assert len({people._look(pid).bottom for pid in range(1, 31)}) == 3


def test_size_scales_the_drawing():
    small = SyntheticPedestrians(2, num_cameras=2).render(2, 2, 1)
    large = SyntheticPedestrians(2, num_cameras=2, size=(256, 128)).render(2, 2, 1)
    wide = SyntheticPedestrians(2, num_cameras=2, size=(96, 96)).render(2, 2, 1)
    assert large.image.shape == (256, 128, 3)
    assert wide.image.shape == (96, 96, 3)
    assert np.array_equal(small.keypoints, large.keypoints)
    assert np.array_equal(small.keypoints, wide.keypoints)
    shrunk = large.image.reshape(128, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small.image).mean() < 16


def test_sequence_access(small, small_samples):
    assert digest(small[-1]) == digest(small_samples[-1])
    assert [digest(sample) for sample in small[2:7:2]] == [digest(sample) for sample in small_samples[2:7:2]]
    assert isinstance(small[np.int64(3)], Sample)
    for position in (len(small), -len(small) - 1):
        with pytest.raises(IndexError, match="index must be in"):
            small[position]
    with pytest.raises(TypeError):
        small["1"]


def test_query_gallery_takes_one_query_per_person_and_camera(small):
    queries, gallery = small.query_gallery()
    assert queries.dtype == gallery.dtype == np.int64
    assert sorted([*queries, *gallery]) == list(range(len(small)))
    pairs = list(zip(small.pids[queries].tolist(), small.camids[queries].tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) == 16 * 3
    assert all(small[int(query)].index == 0 for query in queries[:5])


def test_query_gallery_needs_a_gallery():
    with pytest.raises(ValueError, match="images_per_camera of at least 2"):
        SyntheticPedestrians(2, images_per_camera=1).query_gallery()


def on_figure(mask, keypoints, joints):
    height, width = mask.shape
    columns = np.clip(keypoints[joints, 0] * width, 0, width - 1).astype(int)
    rows = np.clip(keypoints[joints, 1] * height, 0, height - 1).astype(int)
    return mask[rows, columns]


def test_visible_keypoints_lie_on_the_figure():
    people = SyntheticPedestrians(40, num_cameras=2, occlusion=0.0)
    hits, mirrored_hits, limb_hits = [], [], []
    for pid in range(1, 41):
        sample = people.render(pid, 1 + pid % 2, 0)
        mask = people._layers(pid, 1 + pid % 2, 0, None).figure[..., 3] > 127
        joints = np.flatnonzero(sample.visible)
        limbs = [joint for joint in WRISTS_AND_ANKLES if sample.visible[joint]]
        hits += on_figure(mask, sample.keypoints, joints).tolist()
        limb_hits += on_figure(mask, sample.keypoints, limbs).tolist()
        mirrored_hits += on_figure(mask[:, ::-1], sample.keypoints, limbs).tolist()
    assert np.mean(hits) > 0.99
    assert np.mean(limb_hits) > 0.99
    assert np.mean(mirrored_hits) < 0.8


def test_figure_changes_the_picture_at_visible_limbs():
    people = SyntheticPedestrians(20, num_cameras=2, occlusion=0.0)
    changes = []
    for pid in range(1, 21):
        sample = people.render(pid, 1, 0)
        layers = people._layers(pid, 1, 0, None)
        empty = replace(layers, figure=np.zeros_like(layers.figure)).develop(people._camera(1), people.size)
        change = np.abs(sample.image.astype(int) - empty).max(axis=-1)
        limbs = [joint for joint in WRISTS_AND_ANKLES if sample.visible[joint]]
        changes += on_figure(change, sample.keypoints, limbs).tolist()
        assert np.median(change[:4, :4]) < 5
    assert np.mean(np.array(changes) > 8) > 0.85


@pytest.mark.parametrize("pid", range(1, 9))
def test_left_and_right_follow_the_walking_direction(pid):
    people = SyntheticPedestrians(8, occlusion=0.0)
    front, side, back, other = (people.render(pid, 1, 0, yaw=yaw).keypoints[:, 0] for yaw in (0, 90, 180, 270.0))
    for right, left in ((R_SHOULDER, L_SHOULDER), (R_HIP, L_HIP), (R_EYE, L_EYE), (R_EAR, L_EAR)):
        assert front[right] < front[left]
        assert back[right] > back[left]
    assert side[NOSE] > side[NECK]
    assert other[NOSE] < other[NECK]
    assert abs(side[R_HIP] - side[L_HIP]) < abs(front[R_HIP] - front[L_HIP]) / 2


def test_face_is_visible_from_the_front_only():
    people = SyntheticPedestrians(20, occlusion=0.0)
    eyes = []
    for pid in range(1, 21):
        front, side, back = (people.render(pid, 1, 0, yaw=yaw) for yaw in (0, 90, 180))
        long_hair = people._look(pid).hair == "long"
        in_frame = (front.keypoints[NOSE] > 0).all() and (front.keypoints[[R_EYE, L_EYE], 1] > 0).all()
        assert front.visible[NOSE] or not in_frame
        assert not back.visible[[NOSE, R_EYE, L_EYE]].any()
        assert not side.visible[L_EAR]
        assert side.visible[R_EAR] == (not long_hair and side.keypoints[R_EAR, 1] > 0)
        eyes.append(side.visible[[R_EYE, L_EYE]])
    right, left = np.mean(eyes, axis=0)
    assert right > 0.8
    assert left < 0.4


def test_skin_is_seen_at_the_nose_from_the_front_only():
    people = SyntheticPedestrians(30, occlusion=0.0)
    nearer = []
    for pid in range(1, 31):
        look = people._look(pid)
        if look.hair == "bald":
            continue
        distances = []
        for yaw in (0.0, np.pi):
            layers = people._layers(pid, 1, 0, yaw)
            x, y = layers.keypoints[NOSE, :2] * (128, 128)
            pixel = layers.figure[int(max(y, 0)), int(x), :3]
            distances.append(np.abs(pixel - look.colours["skin"]).sum())
        nearer.append(distances[0] < distances[1])
    assert np.mean(nearer) > 0.9


def test_covered_keypoints_are_not_visible():
    free = SyntheticPedestrians(30, occlusion=0.0)
    covered = SyntheticPedestrians(30, occlusion=1.0)
    lost = 0
    for pid in range(1, 31):
        before, after = free.render(pid, 2, 1), covered.render(pid, 2, 1)
        assert np.array_equal(before.keypoints, after.keypoints)
        assert not (after.visible & ~before.visible).any()
        occluder = covered._layers(pid, 2, 1, None).occluder[..., 3] > 127
        behind = on_figure(occluder, before.keypoints, np.flatnonzero(before.visible))
        assert np.array_equal(after.visible[before.visible], ~behind)
        lost += int(behind.sum())
    assert lost > 60


def test_occlusion_is_the_share_of_covered_pictures():
    people = SyntheticPedestrians(100, occlusion=0.25)
    share = np.mean([people._layers(pid, 1, 0, None).occluder is not None for pid in range(1, 101)])
    assert 0.12 < share < 0.4


def test_keypoints_outside_the_picture_are_not_visible():
    people = SyntheticPedestrians(60, occlusion=0.0)
    samples = [people.render(pid, camid, 0) for pid in range(1, 61) for camid in (1, 3)]
    keypoints = np.concatenate([sample.keypoints for sample in samples])
    visible = np.concatenate([sample.visible for sample in samples])
    outside = ((keypoints < 0) | (keypoints >= 1)).any(axis=1)
    assert outside.any()
    assert not visible[outside].any()
    assert visible.mean() > 0.6


def test_infrared_pictures_are_grey_and_the_others_unchanged():
    people = SyntheticPedestrians(4, num_cameras=2, infrared_cameras=(2,))
    plain = SyntheticPedestrians(4, num_cameras=2)
    for pid in range(1, 5):
        grey = people.render(pid, 2, 0)
        assert np.ptp(grey.image.astype(int), axis=-1).max() == 0
        assert np.array_equal(grey.keypoints, plain.render(pid, 2, 0).keypoints)
        assert np.ptp(people.render(pid, 1, 0).image.astype(int), axis=-1).max() > 20
        assert digest(people.render(pid, 1, 0)) == digest(plain.render(pid, 1, 0))


def test_infrared_brightness_of_clothes_does_not_follow_their_colour():
    people = SyntheticPedestrians(150)
    looks = [people._look(pid) for pid in range(1, 151)]
    colour = [look.colours["top"].mean() for look in looks]
    infrared = [look.infrared["top"].mean() for look in looks]
    assert abs(np.corrcoef(colour, infrared)[0, 1]) < 0.3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_identities": 0}, ValueError, r"num_identities must be at least 1.*got 0"),
        ({"num_identities": 2.5}, TypeError, "num_identities must be an integer, got 2.5"),
        ({"num_identities": True}, TypeError, "num_identities must be an integer, got True"),
        ({"num_cameras": 0}, ValueError, "num_cameras must be at least 1"),
        ({"images_per_camera": -1}, ValueError, "images_per_camera must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": 2**32}, ValueError, "seed must be at most 4294967295"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({"first_pid": 0}, ValueError, "first_pid must be at least 1"),
        ({"size": (128,)}, TypeError, "size must be a pair"),
        ({"size": 128}, TypeError, "size must be a pair"),
        ({"size": (128, 4)}, ValueError, r"size\[1\] must be at least 16"),
        ({"infrared_cameras": (5,)}, ValueError, "infrared_cameras must be at most 4, got 5"),
        ({"infrared_cameras": 2}, TypeError, "infrared_cameras must be a collection"),
        ({"occlusion": 1.5}, ValueError, r"occlusion must be in \[0, 1\], got 1.5"),
        ({"occlusion": float("nan")}, ValueError, "occlusion must be in"),
        ({"occlusion": "0.2"}, TypeError, "occlusion must be a number"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        SyntheticPedestrians(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ((0, 1, 0), ValueError, "pid must be at least 1"),
        ((1, 5, 0), ValueError, "camid must be at most 4, got 5"),
        ((1, 1, -1), ValueError, "index must be at least 0"),
        ((1.0, 1, 0), TypeError, "pid must be an integer"),
    ],
)
def test_render_names_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        SyntheticPedestrians().render(*call)


def test_render_names_a_bad_yaw():
    with pytest.raises(TypeError, match="yaw must be a number"):
        SyntheticPedestrians().render(1, 1, 0, yaw="front")
    with pytest.raises(ValueError, match="yaw must be in"):
        SyntheticPedestrians().render(1, 1, 0, yaw=float("inf"))


def test_descriptor_shape_type_and_range(small_images):
    features = colour_stripes(small_images, stripes=5, bins=7)
    assert features.shape == (len(small_images), 5 * 3 * 7)
    assert features.dtype == np.float32
    assert features.min() >= 0
    assert features.max() <= 1
    assert np.ptp(np.linalg.norm(features, axis=1)) > 0.01
    assert colour_stripes(small_images[:0]).shape == (0, 8 * 3 * 8)


def test_descriptor_takes_an_array_or_a_sequence(small_images):
    separate = colour_stripes([*small_images[:20], np.tile(small_images[0], (2, 2, 1))])
    np.testing.assert_allclose(separate[:20], colour_stripes(small_images[:20]), atol=1e-6)
    assert separate.shape[0] == 21


def test_descriptor_is_the_histogram_of_a_flat_picture():
    features = colour_stripes(np.full((1, 16, 8, 3), 200, dtype=np.uint8), stripes=2, bins=8).reshape(2, 3, 8) ** 2
    position = 0.43 * 7
    expected = np.zeros(8)
    expected[3], expected[4] = 0.6 * (4 - position), 0.6 * (position - 3)
    np.testing.assert_allclose(features[0, 2], expected, atol=1e-6)
    np.testing.assert_allclose(features[0, 0], 0, atol=1e-6)
    np.testing.assert_allclose(features[0], features[1], atol=1e-6)


def test_descriptor_ignores_mirroring_and_a_colour_cast_but_not_turning_upside_down(small_images):
    features = colour_stripes(small_images)
    np.testing.assert_allclose(colour_stripes(small_images[:, :, ::-1]), features, atol=1e-5)
    cast = np.clip(small_images * np.array([0.95, 0.8, 0.7]), 0, 255).astype(np.uint8)
    by_cast = np.linalg.norm(colour_stripes(cast) - features, axis=1)
    by_turning = np.linalg.norm(colour_stripes(small_images[:, ::-1]) - features, axis=1)
    assert by_cast.mean() < 0.3 * by_turning.mean()


def test_descriptor_separates_people_only_middlingly(small, small_images):
    features = colour_stripes(small_images)
    distances = np.linalg.norm(features[:, None] - features[None], axis=-1)
    other_camera = small.camids[:, None] != small.camids[None]
    same = small.pids[:, None] == small.pids[None]
    assert distances[same & other_camera].mean() < 0.93 * distances[~same & other_camera].mean()
    score = mean_average_precision(features, small.pids, small.camids, *small.query_gallery())
    assert 0.4 < score < 0.85


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (np.zeros((2, 16, 8, 3)), {}, TypeError, "images must be uint8"),
        (np.zeros((16, 8, 3), dtype=np.uint8), {}, ValueError, r"images must have the shape \(N, H, W, 3\)"),
        ([np.zeros((16, 8), dtype=np.uint8)], {}, ValueError, r"images\[0\] must have the shape \(H, W, 3\)"),
        ([[1, 2]], {}, TypeError, r"images\[0\] must be a NumPy array"),
        (np.zeros((1, 4, 8, 3), dtype=np.uint8), {}, ValueError, "at least 8 rows high"),
        (np.zeros((1, 16, 8, 3), dtype=np.uint8), {"stripes": 0}, ValueError, "stripes must be at least 1, got 0"),
        (np.zeros((1, 16, 8, 3), dtype=np.uint8), {"bins": 1}, ValueError, "bins must be at least 2, got 1"),
        (np.zeros((1, 16, 8, 3), dtype=np.uint8), {"bins": 8.0}, TypeError, "bins must be an integer, got 8.0"),
    ],
)
def test_descriptor_names_bad_arguments(images, options, error, message):
    with pytest.raises(error, match=message):
        colour_stripes(images, **options)


def test_the_smallest_pictures_have_walls_of_bricks_too():
    drawn = SyntheticPedestrians(4, num_cameras=8, images_per_camera=1, seed=1, size=(16, 16))
    for person in range(1, 5):
        for camera in range(1, 9):
            assert drawn.render(person, camera, 0).image.shape == (16, 16, 3)
