"""Tests of the poses nearest to a person's mean, of the choice of a few, and of the command that makes it."""

from __future__ import annotations

import itertools
import os

import numpy as np
import onnx_files
import pytest
import torch
from PIL import Image

from pose2id.cli import main
from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.poses import (
    KEYPOINTS,
    Pose,
    check_pose,
    choose_poses,
    draw,
    facing,
    nearest_to_mean,
    pose_distances,
    read,
    standard,
)
from pose2id.poses.medoids import k_medoids
from pose2id.poses.representative import direction
from pose2id.poses.sheet import contact_sheet

STANDING = standard()[0]
UPSIDE_DOWN = Pose(STANDING.keypoints * (1, -1) + (0, 1))


def without(pose, *names):
    points = pose.keypoints.copy()
    points[[KEYPOINTS.index(name) for name in names]] = np.nan
    return Pose(points)


def degrees(*angles):
    """Unit features in the plane, each some times as long."""
    turns = np.radians(angles)
    return np.stack([np.cos(turns), np.sin(turns)], axis=1) * (1 + np.arange(len(angles)))[:, None]


@pytest.fixture(scope="module")
def drawn():
    """Valid poses of drawn people, all different."""
    people = SyntheticPedestrians(10, num_cameras=3, images_per_camera=2, seed=2)
    found = (Pose(np.where(each.visible[:, None], each.keypoints, np.nan)) for each in people if each.visible.any())
    return [pose for pose in found if check_pose(pose)]


class TestNearestToMean:
    def test_by_hand(self):
        # Means: of a (cos 0 + cos 10 + cos 50) / 3 ... at about 19.6 degrees; of b at 100; c has one image.
        features = degrees(0, 10, 50, 90, 110, 99, 200)
        who = ["a", "a", "a", "b", "b", "b", "c"]
        np.testing.assert_array_equal(nearest_to_mean(features, who, [STANDING] * 7), [1, 5, 6])

    def test_images_without_a_valid_pose_count_in_the_mean_alone(self):
        features = degrees(0, 60, 50, 90, 110, 99, 200)
        who = ["a", "a", "a", "b", "b", "b", "c"]
        # The mean of a is near 37 degrees; without image 1 both others were equally far from it, and 0 the first.
        poses = [STANDING, None, STANDING, STANDING, STANDING, UPSIDE_DOWN, None]
        np.testing.assert_array_equal(nearest_to_mean(features, who, poses), [2, 3])
        np.testing.assert_array_equal(nearest_to_mean(features, who, [STANDING] + [None] * 6), [0])
        assert nearest_to_mean(features, who, [None] * 7).shape == (0,)

    def test_the_length_of_a_feature_does_not_matter(self):
        features = degrees(0, 10, 50)
        features[2] *= 1000  # were it not normalised, the mean would lie there
        np.testing.assert_array_equal(nearest_to_mean(features, [1, 1, 1], [STANDING] * 3), [1])

    def test_ties_go_to_the_first(self, rng):
        features = rng.standard_normal((2, 300)).astype(np.float32)
        for given in (features, features[::-1], np.tile(features[:1], (5, 1)), np.concatenate([features, -features])):
            assert nearest_to_mean(given, [7] * len(given), [STANDING] * len(given)).tolist() == [0]
        poses = [None, STANDING, STANDING]
        assert nearest_to_mean(np.tile(features[:1], (3, 1)), [7] * 3, poses).tolist() == [1]

    def test_a_literal_restatement_agrees_in_any_order(self, rng):
        who = rng.integers(0, 9, 60)
        features = rng.standard_normal((9, 5))[who] + rng.standard_normal((60, 5))
        poses = [STANDING if posed else None for posed in rng.random(60) < 0.6]
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        expected = set()
        for person in range(9):
            own = [i for i in range(60) if who[i] == person]
            mean = sum(unit[i] for i in own) / len(own)
            posed = [i for i in own if poses[i] is not None]
            if posed:
                cosines = [unit[i] @ mean / np.linalg.norm(mean) for i in posed]  # a normalised mean: the same image
                expected.add(posed[int(np.argmax(cosines))])
        assert set(nearest_to_mean(torch.tensor(features), torch.tensor(who), poses).tolist()) == expected
        order = rng.permutation(60)
        found = nearest_to_mean(features[order], who[order], [poses[i] for i in order])
        assert set(order[found].tolist()) == expected

    def test_texts_are_identities_as_they_stand(self):
        features = degrees(0, 90)
        assert nearest_to_mean(features, ["7", "007"], [STANDING] * 2).tolist() == [0, 1]
        assert nearest_to_mean(features, np.array([-1, 0]), [STANDING] * 2).tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"features": np.zeros((0, 2))}, "features must hold at least one row"),
            ({"identities": [1]}, r"identities must have shape \(2,\)"),
            ({"poses": [STANDING]}, "poses must hold one pose or None per row, 2, got 1"),
            ({"poses": [STANDING, STANDING.keypoints]}, r"poses\[1\] must be a Pose or None, got ndarray"),
            ({"size": (0, 1)}, "size must be at least 1"),
        ],
    )
    def test_bad_input(self, change, message):
        given = {"features": degrees(0, 9), "identities": [1, 2], "poses": [STANDING] * 2, **change}
        with pytest.raises((TypeError, ValueError), match=message):
            nearest_to_mean(**given)


class TestFacing:
    def test_drawn_people_who_walk_that_way(self):
        """Their true direction is known; ears say little of a back that is half turned."""
        people, errors = SyntheticPedestrians(1, occlusion=0.0), []
        for pid, way in itertools.product(range(1, 5), range(-150, 181, 30)):
            sample = people.render(pid, 1 + pid % 4, 0, yaw=way)
            pose = Pose(np.where(sample.visible[:, None], sample.keypoints, np.nan))
            if check_pose(pose):
                found = facing(pose)
                errors.append(abs((found - way + 180) % 360 - 180))
                if way % 90 == 0:
                    assert direction(found) == {0: "front", 90: "right", 180: "back", -90: "left"}[way]
        assert len(errors) > 40
        assert np.mean(errors) < 18
        assert max(errors) < 80

    def test_the_standard_poses(self):
        ways = [direction(facing(pose)) for pose in standard()]
        assert ways == ["front", "front", "right", "right", "back", "left", "front", "front"]

    def test_a_mirrored_pose_faces_the_other_way(self, drawn):
        for pose in [*standard(), *drawn]:
            assert facing(pose.flipped()) == pytest.approx(-facing(pose)) or facing(pose) == 180 == facing(
                pose.flipped()
            )

    def test_without_a_nose_the_visible_side_of_the_face_tells(self):
        behind = Pose(
            STANDING.flipped().keypoints * (-1, 1) + (1, 0)
        )  # left is left in the picture, as seen from behind
        face = ("nose", "right_eye", "left_eye")
        assert facing(without(behind, *face)) == 180
        narrow = behind.keypoints.copy()
        narrow[:, 0] = 0.5 + 0.5 * (narrow[:, 0] - 0.5)
        narrow = Pose(narrow)
        assert 95 < facing(without(narrow, *face, "left_ear")) < 150
        assert -150 < facing(without(narrow, *face, "right_ear")) < -95

    def test_one_shoulder_and_one_hip(self):
        """The other half is where this one says; without the nose nothing says left or right."""
        face = ("nose", "right_eye", "left_eye", "right_ear", "left_ear")
        for side in ("left", "right"):
            half = without(STANDING, *face, f"{side}_shoulder", f"{side}_hip")
            assert facing(half) == 0

    def test_nothing_to_measure_by(self):
        with pytest.raises(ValueError, match="pose must show the neck and, apart from it, a hip"):
            facing(without(STANDING, "neck"))
        with pytest.raises(TypeError, match="pose must be a Pose"):
            facing(STANDING.keypoints)


class TestDistances:
    def test_a_literal_restatement_agrees(self, drawn):
        poses, size = [*standard(), *drawn[:12]], (256, 128)

        def placed(pose):
            points = pose.keypoints * size[::-1]
            middle = np.nanmean(points[[KEYPOINTS.index("left_hip"), KEYPOINTS.index("right_hip")]], axis=0)
            neck = points[KEYPOINTS.index("neck")]
            return (points - neck) / np.linalg.norm(middle - neck)

        def way(points):
            x = dict(zip(KEYPOINTS, points[:, 0], strict=True))
            widths = (x["left_shoulder"] - x["right_shoulder"]) / 0.9, (x["left_hip"] - x["right_hip"]) / 0.5
            both = np.clip([np.mean(widths), x["nose"] / 0.45], -1, 1)
            return both / max(1, np.linalg.norm(both))

        found = pose_distances(poses, poses[:9], size=size)
        assert found.shape == (20, 9)
        compared = 0
        for i, j in itertools.product(range(20), range(9)):
            a, b = placed(poses[i]), placed(poses[j])
            total = 0.0
            for k in range(18):
                seen = ~np.isnan(a[k, 0]), ~np.isnan(b[k, 0])
                total += ((a[k] - b[k]) ** 2).sum() if all(seen) else 0.16 if any(seen) else 0.0
            turned = found[i, j] ** 2 - total / 18  # what is left is the direction: at most that of front and back
            assert -1e-5 < turned <= 0.25 + 1e-5
            if not np.isnan([way(a), way(b)]).any():
                assert turned == pytest.approx(0.0625 * ((way(a) - way(b)) ** 2).sum(), abs=1e-5)
                compared += 1
        assert compared > 80

    def test_place_and_size_do_not_matter_but_shape_does(self):
        smaller = Pose(STANDING.keypoints * 0.5 + (0.3, 0.1))
        wider = Pose(STANDING.keypoints * (0.5, 1) + (0.2, 0))
        near, far = pose_distances([STANDING], [smaller, wider])[0]
        assert near < 1e-4
        assert far > 0.1
        assert pose_distances([STANDING], [wider], size=(256, 128)) != pose_distances([STANDING], [wider], size=(9, 9))

    def test_symmetric_and_the_same_for_mirror_images(self, drawn):
        found = pose_distances(drawn, drawn)
        np.testing.assert_array_equal(found, found.T)
        assert not np.diag(found).any()
        mirrored = [pose.flipped() for pose in drawn]
        np.testing.assert_allclose(pose_distances(mirrored, mirrored), found, atol=1e-12)

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"others\[1\] must show the neck and"):
            pose_distances([STANDING], [STANDING, without(STANDING, "neck")])
        with pytest.raises(TypeError, match=r"poses\[0\] must be a Pose"):
            pose_distances([None], [STANDING])


def cost(distances, chosen):
    return distances[:, list(chosen)].min(1).sum()


class TestMedoids:
    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    def test_near_the_best_of_all_subsets(self, count, rng):
        best = 0
        for _ in range(20):
            points = rng.standard_normal((11, 2))
            distances = np.linalg.norm(points[:, None] - points, axis=2)
            found = k_medoids(distances, count)
            assert len(set(found)) == count
            least = min(cost(distances, some) for some in itertools.combinations(range(11), count))
            assert least - 1e-9 <= cost(distances, found) <= 1.15 * least
            best += cost(distances, found) <= least + 1e-9
            for i, other in itertools.product(range(count), set(range(11)) - set(found)):  # no exchange helps
                assert cost(distances, [*found[:i], *found[i + 1 :], other]) >= cost(distances, found) - 1e-9
        assert best == 20 if count == 1 else best >= 15

    def test_an_exchange_is_needed(self):
        """The greedy first choice lies between two groups, and belongs to neither."""
        points = np.array([-1.1, -1.0, -0.9, 0.05, 0.9, 1.0, 1.1, 1.2])
        distances = np.abs(points[:, None] - points)
        assert k_medoids(distances, 1) == [3]
        assert sorted(k_medoids(distances, 2)) == [1, 5]

    def test_groups_are_found_and_the_largest_comes_first(self, rng):
        centres = np.array([[0, 0], [10, 0], [0, 10]])
        who = np.repeat([0, 1, 2], [5, 20, 9])
        points = centres[who] + 0.1 * rng.standard_normal((34, 2))
        found = k_medoids(np.linalg.norm(points[:, None] - points, axis=2), 3)
        assert who[found].tolist()[0] == 1
        assert sorted(who[found]) == [0, 1, 2]

    def test_candidates_may_be_fewer_than_points(self, rng):
        distances = rng.random((30, 6))
        found = k_medoids(distances, 2)
        least = min(cost(distances, some) for some in itertools.combinations(range(6), 2))
        assert cost(distances, found) <= 1.05 * least
        assert sorted(k_medoids(distances, 6)) == list(range(6))

    def test_equal_costs_take_lower_indices(self):
        assert k_medoids(np.zeros((5, 5)), 3) == [0, 1, 2]
        assert k_medoids(np.ones((4, 4)) - np.eye(4), 2) == [0, 1]


class TestChoice:
    def test_the_choice_is_named_ordered_and_of_the_valid(self, drawn):
        given = [None, UPSIDE_DOWN, *drawn]
        chosen = choose_poses(given, 5)
        assert len({each.index for each in chosen}) == 5
        for place, each in enumerate(chosen, 1):
            assert each.pose == given[each.index]
            assert each.facing == facing(each.pose)
            assert each.pose.name == f"{place}-{direction(each.facing)}"
            assert not each.mirrored
        nearest = pose_distances(drawn, [each.pose for each in chosen]).argmin(1)
        assert [each.share for each in chosen] == [np.mean(nearest == i) for i in range(5)]

    def test_the_order_of_poses_does_not_matter(self, drawn, rng):
        expected = [each.pose for each in choose_poses(drawn, 6)]
        for _ in range(3):
            order = rng.permutation(len(drawn))
            found = choose_poses([drawn[i] for i in order], 6)
            assert [each.pose for each in found] == expected
            assert [drawn[order[each.index]] for each in found] == expected

    def test_mirrored_poses_give_the_mirrored_choice(self, drawn):
        expected = [each.pose.flipped() for each in choose_poses(drawn, 6)]
        found = choose_poses([pose.flipped() for pose in drawn], 6)
        assert [each.pose for each in found] == expected

    def test_with_mirror_images_left_and_right_are_covered_alike(self, drawn):
        right = [pose if facing(pose) >= 0 else pose.flipped() for pose in drawn]
        assert not any(direction(facing(each.pose)) == "left" for each in choose_poses(right, 8))
        chosen = choose_poses(right, 8, mirrored=True)
        ways = [direction(each.facing) for each in chosen]
        assert {"left", "right"} <= set(ways)
        for each in chosen:
            own = right[each.index]
            assert each.pose == (own.flipped() if each.mirrored else own)
        assert {each.mirrored for each in chosen} == {True, False}
        again = choose_poses([pose.flipped() for pose in right], 8, mirrored=True)
        both = [*right, *(pose.flipped() for pose in right)]
        costs = [pose_distances(both, [each.pose for each in some]).min(1).sum() for some in (chosen, again)]
        assert costs[0] == pytest.approx(costs[1])

    def test_fewer_different_valid_poses_than_asked_for(self, drawn):
        poses = [*drawn[:3], drawn[0], None, UPSIDE_DOWN]
        assert sorted(each.index for each in choose_poses(poses, 3)) == [0, 1, 2]
        with pytest.raises(ValueError, match="count must be at most 3, the number of different valid poses, got 4"):
            choose_poses(poses, 4)
        assert len(choose_poses(poses, 6, mirrored=True)) == 6
        with pytest.raises(
            ValueError, match="most 6, the number of different valid poses, mirror images included, got 7"
        ):
            choose_poses(poses, 7, mirrored=True)

    def test_equal_poses_are_one(self):
        (chosen,) = choose_poses([STANDING] * 5, 1)
        assert (chosen.index, chosen.share) == (0, 1.0)
        with pytest.raises(ValueError, match="at most 1"):
            choose_poses([STANDING] * 5, 2)

    def test_it_is_nearer_than_random_poses(self, drawn, rng):
        def mean_distance(some):
            return pose_distances(drawn, some).min(1).mean()

        random = [mean_distance([drawn[i] for i in rng.choice(len(drawn), 8, replace=False)]) for _ in range(50)]
        assert mean_distance([each.pose for each in choose_poses(drawn, 8)]) < min(random)

    def test_bad_input(self):
        for change, message in (
            ({"count": 0}, "count must be at least 1"),
            ({"mirrored": 1}, "mirrored must be True or False"),
            ({"size": 3}, "size must be"),
            ({"poses": [STANDING, 3]}, r"poses\[1\] must be a Pose or None, got int"),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                choose_poses(**{"poses": [STANDING], "count": 1, **change})

    def test_the_sheet_shows_crops_beside_poses(self):
        poses = [Pose(STANDING.keypoints * (0.5, 1) + (0.45, 0)), standard()[3]]
        chosen = choose_poses(poses, 4, mirrored=True)
        pixels = np.zeros((32, 16, 3), np.uint8)
        pixels[:, :8] = 255  # a crop that is white on its left
        sheet = contact_sheet(chosen, [pixels] * 4)
        assert sheet.size == (4 * 264, 284)
        for place, each in enumerate(chosen):
            left = 264 * place + 4
            assert sheet.getpixel((left + (100 if each.mirrored else 20), 100)) == (255, 255, 255)
            assert sheet.getpixel((left + (20 if each.mirrored else 100), 100)) == (0, 0, 0)
            beside = sheet.crop((left + 128, 0, left + 256, 256))
            np.testing.assert_array_equal(np.asarray(beside), np.asarray(draw(each.pose, (256, 128))))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Drawn people and a model."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("made")
    write_people(SyntheticPedestrians(5, num_cameras=2, images_per_camera=2), folder / "people", progress=False)
    (folder / "stripes.onnx").write_bytes(onnx_files.stripes())
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(made, *words):
    model = "--model", f"onnx:{made}/stripes.onnx", "--transform", "torchreid", "--workers", "0"
    return ["poses", f"{made}/people/table.csv", *model, "--out", "poses.json", *words]


class TestCommand:
    def test_chosen_poses_go_into_generate(self, made, folder, capsys):
        assert main(command(made, "-n", "3", "--sheet", "sheet.png")) == 0
        told = capsys.readouterr()
        assert told.out.startswith("wrote poses.json: 3 poses, of 5 people: 1-")
        assert told.err == ""
        poses = read("poses.json")
        assert [pose.name[:2] for pose in poses] == ["1-", "2-", "3-"]
        assert all(map(check_pose, poses))
        with Image.open("sheet.png") as sheet:
            assert sheet.size == (3 * 264, 284)
        image = sorted((made / "people" / "images").iterdir())[0]
        words = ["generate", image, "--poses", "poses.json", "--out", "generated", "--weights", "tiny", "--steps", 1]
        assert main([*map(str, words), "--size", "128x64", "--guidance", "1", "--device", "cpu"]) == 0
        assert sorted(path.name for path in (folder / "generated").iterdir() if path.is_dir()) == [
            "pose1",
            "pose2",
            "pose3",
        ]
        assert "may not be a person's" not in capsys.readouterr().err

    def test_nothing_is_replaced_unasked(self, made, folder, capsys):
        for name in ("poses.json", "sheet.png"):
            (folder / name).write_text("mine", encoding="utf-8")
            assert main(command(made, "-n", "2", "--sheet", "sheet.png")) == 2
            assert (
                f"{name} exists. Choose another name, or overwrite it (overwrite=True, --overwrite)."
                in capsys.readouterr().err
            )
            assert [path.name for path in folder.iterdir()] == [name]
            assert main(command(made, "-n", "2", "--sheet", "sheet.png", "--overwrite")) == 0
            assert b"mine" not in (folder / name).read_bytes()
            for path in list(folder.iterdir()):
                path.unlink()

    def test_both_files_or_none(self, made, folder, capsys, monkeypatch):
        """The poses are named last: a kill before leaves the sheet alone, an error nothing."""
        link = os.link

        def full(source, path):
            if path.name == "poses.json":
                assert [path.name for path in folder.glob("[!.]*")] == ["sheet.png"]
                raise FileExistsError
            link(source, path)

        monkeypatch.setattr(os, "link", full)
        assert main(command(made, "-n", "2", "--sheet", "sheet.png")) == 2
        assert "poses.json was created by another process in the meantime" in capsys.readouterr().err
        assert list(folder.iterdir()) == []

    def test_the_command_names_what_is_wrong_before_any_work(self, made, folder, capsys, monkeypatch):
        monkeypatch.setattr("pose2id.extraction.extract", None)
        (folder / "bare.csv").write_text("path,identity\na.png,1\n", encoding="utf-8")
        bare = command(made)
        bare[1] = "bare.csv"
        for words, message in (
            (["poses", "bare.csv", "--out", "poses.json"], "--model must be given"),
            (command(made, "-n", "0"), "-n must be at least 1, got 0"),
            (command(made, "-n", "6"), "-n must be at most 5, the number of people with a valid pose in TABLE, got 6"),
            (command(made, "-n", "11", "--mirrored"), "-n must be at most 10"),
            (command(made, "--sheet", "sheet.jpg"), "sheet.jpg must end in .png"),
            (command(made, "--out", "poses.txt"), "poses.txt must end in .json"),
            (command(made, "--out", "nowhere/poses.json"), "There is no folder nowhere"),
            (bare, "TABLE must hold valid poses, got none"),
        ):
            assert main(words) == 2
            assert message in capsys.readouterr().err
            assert [path.name for path in folder.iterdir()] == ["bare.csv"]
