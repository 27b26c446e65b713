"""Training samples: what is drawn, from what alone, and which images it is drawn from."""

from __future__ import annotations

import itertools
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from miniature import STRESS, miniature, people
from PIL import Image
from torch.utils.data import DataLoader

from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.ipg import IdentityGenerator
from pose2id.ipg.pixels import load_poses, load_reference, pixels
from pose2id.poses import KEYPOINTS, Pose, standard
from pose2id.training.augmentation import augment
from pose2id.training.cache import Latents, build, identity_features
from pose2id.training.pairs import Pairs, PairSettings, is_drawable, require_pairs, select
from pose2id.training.table import PersonImage, read_table

SETTINGS = PairSettings(seed=7, image_size=(16, 8), identity_size=(24, 12), latent_shape=(4, 8, 4))
PLAIN = {"flip": 0.0, "erase": 0.0}
ARE_TENSORS = ("pose", "noise", "timestep", "unconditional", "target", "reference", "identity")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """3 people, 3 images of each; the last one of the first person has no pose."""
    table = people(tmp_path_factory.mktemp("pairs") / "people")
    return [replace(image, pose=None) if i == 2 else image for i, image in enumerate(table)]


@pytest.fixture(scope="module")
def selection(images):
    return select(images)


def pairs(selection, **changed):
    return Pairs(selection, replace(SETTINGS, **changed))


class NoPictures:
    """In place of `Latents`: samples without pictures, for those who draw thousands."""

    @staticmethod
    def take(target, reference, variant):
        return {"places": torch.tensor([target, reference, variant if isinstance(variant, int) else -1])}


def drawn(selection, count, **changed):
    """Samples without pictures, stacked by name."""
    some = pairs(selection, **changed)
    some.latents = NoPictures()
    samples = [some[n] for n in range(count)]
    return {name: torch.stack([sample[name] for sample in samples]).numpy() for name in samples[0]}


@pytest.fixture(scope="module")
def many(selection):
    return drawn(selection, 2000)


def assert_same(sample, other):
    assert sample.keys() == other.keys()
    for name in sample:
        assert torch.equal(sample[name], other[name]), name


@pytest.mark.parametrize("variants", [None, 3])
def test_a_sample_depends_on_its_number_and_the_seed_alone(selection, variants):
    first, second = pairs(selection, variants=variants), pairs(selection, variants=variants)
    samples = [first[n] for n in range(20)]
    for n in (19, 3, 3, 0, 11):
        assert_same(second[n], samples[n])
    assert_same(second[10**9 + 1], first[10**9 + 1])
    for one, other in itertools.combinations(samples[:5], 2):
        assert not torch.equal(one["noise"], other["noise"])
    elsewhere = pairs(selection, variants=variants, seed=8)
    assert not torch.equal(elsewhere[0]["noise"], samples[0]["noise"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
def test_workers_draw_the_same_samples(selection):
    some = pairs(selection)
    order = [[5, 0], [16, 3], [2, 9]]
    expected = [torch.utils.data.default_collate([some[n] for n in batch]) for batch in order]
    for batch, wanted in zip(DataLoader(some, batch_sampler=order, num_workers=2), expected, strict=True):
        assert_same(batch, wanted)


def test_infrared_files_of_one_and_of_three_channels_are_the_same_samples(tmp_path):
    drawn = SyntheticPedestrians(2, num_cameras=2, images_per_camera=2, seed=5, size=(32, 16), infrared_cameras=(2,))
    table = read_table(write_people(drawn, tmp_path / "three", progress=False))
    infrared = [image for image in table if image.camera == "2"]
    assert len(infrared) == 4
    three = [pairs(select(table))[n] for n in range(16)]
    for image in infrared:
        picture = Image.open(image.path)
        assert picture.mode == "RGB"
        picture.convert("L").save(image.path)
    one = pairs(select(table))
    for n, sample in enumerate(three):
        assert_same(one[n], sample)


def test_torch_keeps_its_own_draws(selection):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = pairs(selection)[4]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_same(pairs(selection)[4], first)


def test_every_target_once_in_an_epoch(selection, many):
    epochs = many["places"][:, 0][: 2000 // 8 * 8].reshape(-1, 8)
    assert (np.sort(epochs, axis=1) == selection.targets).all()
    assert len({tuple(epoch) for epoch in epochs}) > 200  # each in an order of its own


def test_a_reference_is_another_image_of_the_person(selection, many):
    target, reference, _ = many["places"].T
    identities = np.array([image.identity for image in selection.images])
    assert (identities[target] == identities[reference]).all()
    assert (target != reference).all()
    # All others serve, each as often as any, those without a pose too.
    counts = {i: np.unique(reference[target == i], return_counts=True) for i in selection.targets}
    for i, (others, times) in counts.items():
        assert others.tolist() == [j for j in np.flatnonzero(identities == identities[i]) if j != i]
        assert (abs(times - 125) < 4 * np.sqrt(62.5)).all()
    assert 2 in counts[0][0]
    assert 2 not in target


def test_pictures_are_read_as_the_generator_reads_them(selection):
    some = pairs(selection, **PLAIN)
    some_numbers = drawn(selection, 16, **PLAIN)["places"]
    for n, (target, reference, _) in enumerate(some_numbers):
        sample = some[n]
        assert tuple(sample) == ARE_TENSORS
        shown, seen = (load_reference(selection.images[i].path, "image") for i in (target, reference))
        ((_, drawing),) = load_poses([selection.images[target].pose])
        assert torch.equal(sample["target"], pixels(shown, (16, 8)))
        assert torch.equal(sample["reference"], pixels(seen, (16, 8)))
        assert torch.equal(sample["identity"], pixels(seen, (24, 12)))
        assert torch.equal(sample["pose"], pixels(drawing, (16, 8)))
        assert sample["pose"].min() == 0
        assert 0.1 < sample["pose"].max() <= 1
        assert [sample[name].dtype for name in ("noise", "timestep", "unconditional")] == [
            torch.float32,
            torch.int64,
            torch.bool,
        ]


@pytest.mark.parametrize("variants", [None, 2])
def test_augmentation_is_for_references_only(selection, variants):
    plain = pairs(selection, variants=variants, **PLAIN)
    for flip, erase in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5)):
        changed = pairs(selection, variants=variants, flip=flip, erase=erase)
        for n in range(6):
            given, before = changed[n], plain[n]
            for name in ("pose", "noise", "timestep", "unconditional", "target"):
                assert torch.equal(given[name], before[name]), name
            if flip == 1 or erase == 1:
                assert not torch.equal(given["reference"], before["reference"])
            if (flip, erase) == (1, 0):
                picture = Image.open(selection.images[self_reference(selection, n, variants)].path)
                mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                assert torch.equal(given["reference"], pixels(mirrored, (16, 8)))
                assert torch.equal(given["identity"], pixels(mirrored, (24, 12)))


def self_reference(selection, n, variants):
    return drawn(selection, n + 1, variants=variants)["places"][n][1]


def test_both_networks_see_one_augmentation(selection):
    some = pairs(selection, identity_size=(16, 8), flip=0.5, erase=1.0)
    for n in range(10):
        assert torch.equal(some[n]["reference"], some[n]["identity"])


def test_variants(selection):
    some = pairs(selection, variants=3, erase=1.0)
    places = drawn(selection, 200, variants=3, erase=1.0)["places"]
    assert set(places[:, 2]) == {0, 1, 2}
    seen = {}
    for n in range(60):
        reference = some[n]["reference"]
        assert torch.equal(seen.setdefault(tuple(places[n][1:]), reference), reference)
    for one, other in itertools.combinations(seen.values(), 2):
        assert not torch.equal(one, other)


def test_variants_of_each_image_are_its_own(images, tmp_path):
    shutil.copy(images[0].path, tmp_path / "copy.png")
    twins = select([images[0], replace(images[0], path=tmp_path / "copy.png")])
    some = pairs(twins, variants=2, flip=0.0, erase=1.0)
    seen = [some.reference(i, variant)["reference"] for i in range(2) for variant in range(2)]
    for one, other in itertools.combinations(seen, 2):
        assert not torch.equal(one, other)


def test_noise_is_normal(many):
    noise = many["noise"].astype(float)  # 256,000 numbers
    assert abs(noise.mean()) < 4 / 500
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert np.mean(abs(noise) > 1.96) == pytest.approx(0.05, abs=0.003)
    means = noise.mean((2, 3)) * np.sqrt(32)  # no channel is shifted
    assert means.std() == pytest.approx(1, abs=0.05)


def test_noise_offset(selection, many):
    shifted = drawn(selection, 500, noise_offset=0.5)
    for name in many.keys() - {"noise"}:
        assert np.array_equal(shifted[name], many[name][:500])
    added = (shifted["noise"] - many["noise"][:500]).reshape(500, 4, -1)
    np.testing.assert_allclose(added, added[:, :, :1].repeat(32, 2), atol=1e-6)  # one number a channel
    assert added[:, :, 0].std() == pytest.approx(0.5, abs=0.04)
    assert abs(np.corrcoef(added[:, :, 0].T)[np.triu_indices(4, 1)]).max() < 0.15
    smaller = drawn(selection, 20, noise_offset=0.05)
    np.testing.assert_allclose((smaller["noise"] - many["noise"][:20]).reshape(20, 4, -1), added[:20] / 10, atol=1e-6)


def test_timesteps_are_uniform(selection, many):
    timesteps = many["timestep"]
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    counts = np.histogram(timesteps, 20, (0, 1000))[0]
    assert (abs(counts - 100) < 4 * np.sqrt(95)).all()
    few = drawn(selection, 1000, num_train_timesteps=10)["timestep"]
    assert (abs(np.bincount(few, minlength=10) - 100) < 4 * np.sqrt(90)).all()


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_unconditional_ratio(selection, many, ratio):
    found = many if ratio == 0.1 else drawn(selection, 500, unconditional_ratio=ratio)
    count = len(found["unconditional"])
    assert abs(found["unconditional"].sum() - ratio * count) <= 4 * np.sqrt(count * ratio * (1 - ratio))
    # Nothing else changes with it.
    assert np.array_equal(found["noise"][:100], many["noise"][:100])
    assert np.array_equal(found["places"][:100], many["places"][:100])


def test_latents_are_those_of_the_pictures(selection, tmp_path):
    generator = miniature()
    some = pairs(selection, identity_size=(16, 8), variants=3)
    build(tmp_path, some, generator, progress=False)
    kept = pairs(selection, identity_size=(16, 8), variants=3)
    kept.latents = Latents(tmp_path, kept)
    for n in range(0, 80, 7):
        sample, other = some[n], kept[n]
        assert {*other} == {"pose", "noise", "timestep", "unconditional", "target_latents", "reference_latents"} | {
            "features"
        }
        for name in ("pose", "noise", "timestep", "unconditional"):
            assert torch.equal(sample[name], other[name])
        computed = {
            "target_latents": generator.encode_images(sample["target"][None]),
            "reference_latents": generator.encode_images(sample["reference"][None]),
            "features": identity_features(generator.networks, sample["identity"][None]),
        }
        for name, value in computed.items():
            torch.testing.assert_close(other[name], value[0], atol=1e-5, rtol=1e-5)


def test_latents_are_built_once_for_a_key(selection, tmp_path, monkeypatch):
    generator = miniature()
    some = pairs(selection, identity_size=(16, 8), variants=1)
    build(tmp_path, some, generator, progress=False)
    files = sorted(path.name for path in (tmp_path / "latents").iterdir())
    before = {name: (tmp_path / "latents" / name).stat().st_mtime_ns for name in files}

    def written():
        return {name for name in files if (tmp_path / "latents" / name).stat().st_mtime_ns != before[name]}

    with monkeypatch.context() as patch:
        patch.setattr(IdentityGenerator, "encode_images", None)  # nothing is computed
        build(tmp_path, some, generator, progress=False)
    assert written() == set()
    other = pairs(selection, identity_size=(16, 8), variants=1, seed=8)
    for of_which, by_which in ((other, generator), (some, generator), (some, miniature(salt="other"))):
        build(tmp_path, of_which, by_which, progress=False)
        assert written() == set(files)
        before = {name: (tmp_path / "latents" / name).stat().st_mtime_ns for name in files}
    generator = by_which
    # Without its key, it was not finished.
    (tmp_path / "latents" / "key.json").unlink()
    (tmp_path / "latents" / "features.npy").write_bytes(b"half")
    build(tmp_path, some, generator, progress=False)
    assert sorted(path.name for path in (tmp_path / "latents").iterdir()) == files
    Latents(tmp_path, some).take(0, 1, 0)


def test_latents_of_other_targets_are_others(selection, tmp_path):
    """As many of the same images, by other rules of poses."""
    generator = miniature()
    for targets in (selection.targets[1:], selection.targets[:-1]):
        some = Pairs(
            replace(selection, targets=targets),
            replace(SETTINGS, flip=0.0, erase=0.0, identity_size=(16, 8), variants=1),
        )
        build(tmp_path, some, generator, progress=False)
        found = Latents(tmp_path, some).take(targets[0], targets[1], 0)["target_latents"]
        expected = generator.encode_images(some.target(targets[0])[None])[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=[] if damage == "cut off" or name == "targets.npy" else STRESS)
        for name in ("targets.npy", "references.npy", "features.npy")
        for damage in ("cut off", "garbage", "missing", "another's")
    ],
)
def test_damaged_latents_are_built_again(selection, tmp_path, name, damage):
    some = pairs(selection, identity_size=(16, 8), variants=1)
    build(tmp_path, some, miniature(), progress=False)
    file = tmp_path / "latents" / name
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "another's":
        np.save(file, np.zeros((3, 2), np.float32))
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut off" else b"garbage")
    build(tmp_path, some, miniature(), progress=False)
    assert file.read_bytes() == whole


def test_drawable_poses():
    everything = Pose(np.full((18, 2), 0.5))
    assert is_drawable(everything)
    assert not is_drawable(None)
    points = np.full((18, 2), 0.5)
    for i, name in enumerate(KEYPOINTS):
        without = points.copy()
        without[i] = np.nan
        assert is_drawable(Pose(without)) == (name != "neck"), name
    hips = [i for i, name in enumerate(KEYPOINTS) if name.endswith("hip")]
    assert len(hips) == 2
    without = points.copy()
    without[hips] = np.nan
    assert not is_drawable(Pose(without))
    needed = [KEYPOINTS.index("neck"), hips[0]]
    others = [i for i in range(18) if i not in needed]
    for count in (7, 8):
        some = np.full((18, 2), np.nan)
        some[needed + others[: count - 2]] = 0.5
        assert is_drawable(Pose(some)) == (count >= 8)


def test_selection_of_a_good_table(selection, images):
    assert selection.images == images
    assert selection.targets == [0, 1, 3, 4, 5, 6, 7, 8]
    assert (selection.unreadable, selection.alone, selection.without_pose) == ([], [], 1)
    assert str(selection) == "9 images of 3 people: 8 targets, 1 references only (1 without a drawable pose)"


def test_what_cannot_be_used_is_left_out_and_named(images, tmp_path):
    pose = images[0].pose
    kept = [replace(image, identity="kept") for image in images[:2]]
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(images[0].path.read_bytes()[:200])
    Image.new("RGB", (7, 20)).save(tmp_path / "narrow.png")
    (tmp_path / "folder.png").mkdir()
    broken = ["text.png", "half.png", "narrow.png", "folder.png", "missing.png"]
    unreadable = [PersonImage(tmp_path / name, "kept", "", pose) for name in broken]
    alone = replace(images[3], identity="alone")
    widow = [replace(images[4], identity="widow"), PersonImage(tmp_path / "text.png", "widow", "", pose)]
    faceless = [replace(image, identity="faceless", pose=None) for image in images[5:7]]
    table = [alone, unreadable[0], kept[0], *faceless, *unreadable[1:], *widow, kept[1]]
    selection = select(table)
    assert selection.images == kept
    assert selection.targets == [0, 1]
    assert {image.path for image in selection.alone} == {image.path for image in (alone, widow[0], *faceless)}
    assert len(selection.unreadable) == 6
    report = str(selection)
    assert report.startswith("2 images of 1 people: 2 targets, 0 references only\n")
    assert "left out, unreadable: 6 (" in report
    assert "left out, no second image or no pose of the person: 4 (" in report
    for name in broken:
        assert str(tmp_path / name) in report
    for image in selection.alone:
        assert str(image.path) in report


def test_only_valid_poses(images):
    """Poses by `check_pose`; the images whose pose is not valid are references."""
    overturned = [replace(image, pose=Pose(image.pose.keypoints * (1, -1) + (0, 1))) for image in images[3:5]]
    good = replace(images[5], pose=standard()[0])
    lost = [replace(image, identity="lost") for image in overturned]
    table = [*overturned, good, *lost]
    everything, valid = select(table), select(table, poses="valid")
    assert everything.targets == [0, 1, 2, 3, 4]
    assert everything.refused == []
    assert valid.images == [*overturned, good]
    assert valid.targets == [2]
    assert valid.alone == lost
    assert [name for name, _ in valid.refused] == [image.path.name for image in [*overturned, *lost]]
    assert all(": " in reason for _, reason in valid.refused)
    counts, names, alone = str(valid).splitlines()
    assert counts == "3 images of 1 people: 1 targets, 2 references only (2 whose pose is not valid)"
    assert names.startswith(f"poses that are not valid: {overturned[0].path.name}: ")
    assert names.count("; ") >= 3  # those of images that are left out, too
    assert alone.startswith("left out, ")
    assert str(everything) == "5 images of 2 people: 5 targets, 0 references only"
    neckless = good.pose.keypoints.copy()
    neckless[KEYPOINTS.index("neck")] = np.nan
    found = select(
        [replace(overturned[0], pose=Pose(neckless)), replace(overturned[1], pose=None), good], poses="valid"
    )
    assert found.targets == [2]
    assert found.refused == [(overturned[0].path.name, "occlusion: neck 0 visible, at least 1")]
    assert "1 targets, 2 references only (2 without a drawable pose)" in str(found)
    with pytest.raises(ValueError, match=r"(?s)of which none can be used.*poses that are not valid: ") as caught:
        select([replace(image, pose=Pose(neckless)) for image in overturned], poses="valid")
    assert "--poses" not in str(caught.value).replace("--poses valid", "")  # which would not help
    with pytest.raises(ValueError, match=r"(?s)of which none can be used.*--poses all.*poses that are not valid: "):
        select([*overturned, *lost], poses="valid")
    with pytest.raises(ValueError, match="poses must be one of 'all', 'valid', got 'some'"):
        select(table, poses="some")


def test_a_pose_is_valid_in_its_own_image_s_proportions(images, tmp_path):
    table = []
    for i, size in enumerate(((64, 128), (128, 128))):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", size).save(path)
        table.append(PersonImage(path, "1", "", standard()[2]))
    assert select(table, poses="valid").targets == [0]


def test_a_report_is_not_endless(images, tmp_path):
    missing = [PersonImage(tmp_path / f"missing{i}.png", "1") for i in range(100)]
    report = str(select([*images, *missing]))
    assert "unreadable: 100 (" in report
    assert "missing4.png" in report
    assert "missing5.png" not in report
    assert "; ... and " in report


def test_no_image_can_be_read(images, tmp_path):
    missing = [replace(image, path=tmp_path / image.path.name) for image in images]
    with pytest.raises(ValueError, match="images must be files that can be read, got 9 of which none can") as caught:
        select(missing)
    assert str(missing[0].path) in str(caught.value)
    assert "Paths start at the table's folder" in str(caught.value)
    require_pairs(missing)  # a table alone doesn't tell


@pytest.mark.parametrize("what", ["no images", "one image each", "no poses"])
def test_nothing_is_left(images, tmp_path, what):
    given = {
        "no images": [],
        "one image each": images[::3],
        "no poses": [replace(image, pose=None) for image in images],
    }[what]
    with pytest.raises(ValueError, match="images must hold two images of a person at least") as caught:
        select(given)
    assert f"got {len(given)} images of which none can be used" in str(caught.value)
    told = {
        "no images": "0 have such a pose, 0 people have two images or more",
        "one image each": "3 have such a pose, 0 people have two images or more. 0 images",
        "no poses": "0 have such a pose, 3 people have two images or more. Add keypoints: `pose2id table --keypoints",
    }
    assert told[what] in str(caught.value)
    with pytest.raises(ValueError, match=r"images must hold two images of a person at least.* of which none can"):
        require_pairs(given)


def test_images_may_move(selection, images, tmp_path):
    """What a sample shows is a function of the table's order, not of folders."""
    moved = []
    for image in images:
        path = tmp_path / image.path.name
        shutil.copy(image.path, path)
        moved.append(replace(image, path=path))
    assert_same(Pairs(select(moved), SETTINGS)[5], pairs(selection)[5])


PICTURE = np.random.default_rng(3).integers(1, 256, (60, 30, 3), np.uint8)


def augmented(seed, **options):
    return augment(PICTURE, np.random.default_rng(seed), **{"flip": 0.0, "erase": 0.0, **options})


def test_augmentation_is_a_function_of_the_draws():
    before = PICTURE.copy()
    for seed in range(20):
        options = {"flip": 0.5, "erase": 0.5, "shift": True}
        first = augmented(seed, **options)
        assert np.array_equal(augmented(seed, **options), first)
        assert first.shape == PICTURE.shape
        assert first.dtype == np.uint8
        assert not np.shares_memory(first, PICTURE)
        first[:] = 0
    assert np.array_equal(PICTURE, before)
    assert np.array_equal(augmented(0), PICTURE)


def test_flip():
    assert np.array_equal(augmented(0, flip=1.0), PICTURE[:, ::-1])
    flipped = [np.array_equal(augmented(seed, flip=0.3), PICTURE[:, ::-1]) for seed in range(300)]
    assert abs(sum(flipped) - 90) < 4 * np.sqrt(63)


def test_erasing():
    shares, aspects, corners = [], [], []
    for seed in range(300):
        changed = (augmented(seed, erase=1.0) != PICTURE).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.97  # one rectangle
        shares.append(tall * wide / changed.size)
        aspects.append(tall / wide)
        corners.append((rows[0], columns[0], 60 - rows[-1], 30 - columns[-1]))
    # 2 to 40 % of the image, height to width 0.3 to 3.3, before sides are rounded to pixels.
    assert 0.015 < min(shares) < 0.04
    assert 0.3 < max(shares) < 0.42
    assert 0.25 < min(aspects) < 0.45
    assert 2.5 < max(aspects) < 4
    assert (np.min(corners, axis=0) <= [2, 2, 2, 2]).all()  # anywhere, up to the border
    erased = [not np.array_equal(augmented(seed, erase=0.3), PICTURE) for seed in range(300)]
    assert abs(sum(erased) - 90) < 4 * np.sqrt(63)


@pytest.mark.parametrize("color", [(100, 100, 100), (100, 100, 101)], ids=["grey", "coloured"])
def test_erased_pixels_are_random(color):
    plain = np.full((60, 30, 3), color, np.uint8)
    values = []
    for seed in range(50):
        changed = augment(plain, np.random.default_rng(seed), flip=0.0, erase=1.0)
        values.append(changed[(changed != plain).any(2)])
    values = np.concatenate(values)
    assert values.mean() == pytest.approx(127.5, abs=2)
    assert values.min() == 0
    assert values.max() == 255
    alike = (values == values[:, :1]).all(1).mean()
    assert alike == 1 if len({*color}) == 1 else alike < 0.01  # infrared stays infrared


def test_shift():
    moved = set()
    for seed in range(200):
        shifted = augmented(seed, shift=True)
        found = [
            (down, right)
            for down in range(-3, 4)
            for right in range(-1, 2)
            if np.array_equal(
                shifted[max(down, 0) : 60 + min(down, 0), max(right, 0) : 30 + min(right, 0)],
                PICTURE[max(-down, 0) : 60 + min(-down, 0), max(-right, 0) : 30 + min(-right, 0)],
            )
        ]
        ((down, right),) = found
        moved.add((down, right))
        if down > 0:
            assert np.array_equal(shifted[:down], shifted[down : down + 1].repeat(down, 0))  # the edge, repeated
        if right < 0:
            assert np.array_equal(shifted[:, right:], shifted[:, right - 1 : right].repeat(-right, 1))
    assert len(moved) == 21
    # Too small to be moved.
    small = PICTURE[:10, :10]
    assert np.array_equal(augment(small, np.random.default_rng(0), flip=0.0, erase=0.0, shift=True), small)


@pytest.mark.parametrize("shape", [(8, 8), (8, 200), (200, 8)])
def test_pictures_of_any_shape(shape):
    picture = np.zeros((*shape, 3), np.uint8)
    for seed in range(50):
        changed = augment(picture, np.random.default_rng(seed), flip=1.0, erase=1.0, shift=True)
        assert changed.shape == picture.shape


def test_workers_that_are_spawned_get_little(selection, tmp_path):
    # What is pickled for each of them; the standard on Windows and macOS, and on Linux from Python 3.14 on.
    kept = pairs(selection, variants=2, identity_size=(16, 8))
    build(tmp_path, kept, miniature(), progress=False)
    kept.latents = Latents(tmp_path, kept)
    before = kept[3]
    copied = pickle.loads(pickle.dumps(kept))
    assert all(torch.equal(copied[3][name], tensor) for name, tensor in before.items())
    assert len(pickle.dumps(kept.latents)) < 1000
