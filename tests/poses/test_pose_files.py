from __future__ import annotations

import json

import numpy as np
import pytest

from pose2id.poses import KEYPOINTS, Pose, read, standard, write
from pose2id.poses.skeleton import COCO_KEYPOINTS

BODY_25 = [
    *("nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist"),
    *("mid_hip", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle"),
    *("right_eye", "left_eye", "right_ear", "left_ear"),
    *("left_big_toe", "left_small_toe", "left_heel", "right_big_toe", "right_small_toe", "right_heel"),
]
SIZE = (128, 64)


def numbers(pose, names=KEYPOINTS, *, pixels=False):
    """A flat list as OpenPose writes it, in the order of `names`."""
    flat = []
    for name in names:
        i = KEYPOINTS.index(name) if name in KEYPOINTS else None
        if i is not None and not pose.visible[i]:
            flat += [0, 0, 0]
            continue
        x, y = (0.5, 0.5) if i is None else pose.keypoints[i].tolist()
        flat += [x * 64 if pixels else x, y * 128 if pixels else y, 0.9]
    return flat


def person(pose, names=KEYPOINTS, *, pixels=False):
    return {"person_id": [-1], "pose_keypoints_2d": numbers(pose, names, pixels=pixels), "hand_left_keypoints_2d": []}


@pytest.fixture
def file(tmp_path):
    def save(data):
        path = tmp_path / "poses.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return path

    return save


ONE, WITHOUT_WRIST = standard()[0], standard()[2]


@pytest.mark.parametrize("names", [KEYPOINTS, BODY_25], ids=["18", "25"])
@pytest.mark.parametrize("pixels", [False, True])
def test_openpose(file, names, pixels):
    people = [person(ONE, names, pixels=pixels), person(WITHOUT_WRIST, names, pixels=pixels)]
    assert read(file({"version": 1.3, "people": people}), size=SIZE) == [ONE, WITHOUT_WRIST]


def test_strings_are_paths_and_names_are_empty(file):
    (pose,) = read(str(file({"people": [person(ONE)]})))
    assert pose == ONE
    assert pose.name == ""


@pytest.mark.parametrize("pixels", [False, True])
def test_controlnet(file, pixels):
    canvas = {"canvas_width": 64, "canvas_height": 128}
    one, two = ({"people": [person(p, pixels=pixels)], **canvas} for p in (ONE, WITHOUT_WRIST))
    assert read(file(one)) == [ONE]
    assert read(file([two, {"people": [], **canvas}, {**one, "animals": []}])) == [WITHOUT_WRIST, ONE]


def test_the_argument_goes_before_the_canvas(file):
    path = file({"people": [person(ONE, pixels=True)], "canvas_width": 640, "canvas_height": 1280})
    assert read(path, size=SIZE) == [ONE]
    np.testing.assert_allclose(read(path)[0].keypoints, ONE.keypoints / 10)


@pytest.mark.parametrize("pixels", [False, True])
def test_coco(file, pixels):
    expected = Pose.from_coco(ONE.to_coco())
    flat = numbers(ONE, COCO_KEYPOINTS, pixels=pixels)
    results = [{"image_id": 7, "category_id": 1, "keypoints": flat, "score": 0.8}] * 2
    assert read(file(results), size=SIZE) == [expected] * 2
    assert read(file(results[0]), size=SIZE) == [expected]
    assert read(file({"people": [{"pose_keypoints_2d": flat}]}), size=SIZE) == [expected]


def test_our_own(file):
    keypoints = [[0.5, 0.1], None, *[[0.25, 1.25]] * 16]
    front, unnamed = read(
        file({"source": "me", "poses": [{"name": "front", "keypoints": keypoints}, {"keypoints": keypoints}]})
    )
    assert (front.name, unnamed.name) == ("front", "")
    assert front == unnamed
    np.testing.assert_array_equal(front.keypoints[:3], [[0.5, 0.1], [np.nan, np.nan], [0.25, 1.25]])


def test_written_poses_are_read_back(tmp_path):
    path = tmp_path / "poses.json"
    poses = [*standard(), *(pose.flipped() for pose in standard()), Pose(ONE.keypoints / 3)]
    write(poses, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"exists\. Choose another name, or overwrite it"):
        write(poses[:1], path)
    assert path.read_bytes() == before
    write(poses, path, overwrite=True)
    back = read(path)
    assert back == poses
    assert [pose.name for pose in back] == [pose.name for pose in poses]
    for pose, same in zip(poses, back, strict=True):
        np.testing.assert_array_equal(pose.keypoints, same.keypoints)


def test_only_poses_are_written(tmp_path):
    with pytest.raises(TypeError, match=r"poses\[1\] must be a Pose, got ndarray"):
        write([ONE, ONE.keypoints], tmp_path / "poses.json")
    with pytest.raises(ValueError, match="at least one pose"):
        write([], tmp_path / "poses.json")
    with pytest.raises(TypeError, match="not iterable"):
        write(ONE, tmp_path / "poses.json")
    assert not list(tmp_path.iterdir())


def test_threshold(file):
    flat = numbers(ONE)
    flat[2], flat[5], flat[8], flat[11] = 0.29, 0.3, 0.0, 1.7
    path = file({"people": [{"pose_keypoints_2d": flat}]})
    np.testing.assert_array_equal(np.flatnonzero(~read(path)[0].visible), [0, 2])
    np.testing.assert_array_equal(np.flatnonzero(~read(path, threshold=0)[0].visible), [2])
    np.testing.assert_array_equal(np.flatnonzero(read(path, threshold=1)[0].visible), [3])
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\]"):
        read(path, threshold=30)


def test_what_is_not_visible_does_not_decide_on_pixels(file):
    flat = numbers(ONE)
    flat[:3] = [400, 300, 0.01]
    assert read(file({"people": [{"pose_keypoints_2d": flat}]}))[0].visible.sum() == 17


def test_people_of_whom_nothing_is_visible_are_left_out(file):
    nobody = {"pose_keypoints_2d": [0] * 54}
    assert read(file({"people": [nobody, person(ONE), nobody]})) == [ONE]
    null = {"pose_keypoints_2d": None, "hand_left_keypoints_2d": None}  # as ControlNet writes it
    assert read(file([{"people": [null, person(ONE)]}, {"people": [null]}])) == [ONE]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "Expecting property name"),
        ("", "it must be JSON, as written by OpenPose.*Expecting value"),
        ("[" * 100_000, "recursion|nested"),
        ({"people": []}, "no person with a visible keypoint"),
        ([], "no person with a visible keypoint"),
        ({"poses": []}, "no person with a visible keypoint"),
        ({"people": [{"pose_keypoints_2d": [0] * 54}]}, "no person with a visible keypoint"),
        ({}, r"the file must be an object with a list 'people', got \[\]"),
        (7, "the file must be an object with a list 'people', got int"),
        ([7], r"\[0\] must be an object with a list 'people', got int"),
        ({"persons": []}, r"with a list 'people', got \['persons'\]"),
        ({"people": {}}, "with a list 'people'"),
        ({"people": [{"pose_keypoints_2d": None}]}, "no person with a visible keypoint"),
        ({"people": [{"pose_keypoints_2d": 7}]}, r"people\[0\] must be an object with a list 'pose_keypoints_2d'"),
        ([{"people": []}, {"people": [person(ONE), {}]}], r"\[1\]\.people\[1\] must be an object with a list"),
        (
            {"people": [person(ONE), {"pose_keypoints_2d": [0] * 53}]},
            r"people\[1\] must have .*51, 54 or 75.*got shape \(53,\)",
        ),
        ({"people": [{"pose_keypoints_2d": [0] * 63}]}, r"got shape \(63,\)"),
        ({"people": [{"pose_keypoints_2d": ["0.5"] * 54}]}, r"people\[0\] must be an array of numbers"),
        ({"people": [{"pose_keypoints_2d": [0.5] * 53 + [None]}]}, r"people\[0\] must be an array of numbers"),
        ({"people": [{"pose_keypoints_2d": [[0.5]] * 54}]}, r"people\[0\] must have .*got shape \(54, 1\)"),
        ({"people": [{"pose_keypoints_2d": [10**400] * 54}]}, r"people\[0\] must be an array of numbers"),
        ({"people": [person(ONE, pixels=True)]}, r"is in pixels without canvas.*Pass size="),
        ([{"people": [person(ONE, pixels=True)]}], r"\[0\] is in pixels"),
        ({"people": [person(ONE, pixels=True)], "canvas_width": 0, "canvas_height": 9}, "canvas must be at least 1"),
        ({"people": [person(ONE, pixels=True)], "canvas_width": "9", "canvas_height": 9}, "canvas must be an integer"),
        (
            {"people": [person(ONE, pixels=True)], "canvas_width": 9, "canvas_height": 9},
            r"people\[0\]: keypoints\[\d+\]",
        ),
        ({"poses": [{"keypoints": [[0.5, 0.5]] * 17}]}, r"poses\[0\]\.keypoints: keypoints must have shape \(18, 2\)"),
        (
            {"poses": [{"keypoints": [[0.5]] * 18}]},
            r"poses\[0\]\.keypoints\[0\] \(nose\) must be \[x, y\] or null, got \[0.5\]",
        ),
        ({"poses": [{"keypoints": [None] * 18}]}, r"poses\[0\]\.keypoints: keypoints must have at least one visible"),
        (
            {"poses": [{"keypoints": [["a", "b"]] * 18}]},
            r"poses\[0\]\.keypoints: keypoints must be an array of numbers",
        ),
        ({"poses": [{"keypoints": [[30, 60]] * 18}]}, r"poses\[0\]\.keypoints: keypoints\[0\] \(nose\).*divide pixels"),
        ({"poses": [{"keypoints": [[0.5, 0.5]] * 18, "name": "../a"}]}, r"poses\[0\].*: name must be fit for a file"),
        ({"poses": [{"keypoints": [[0.5, 0.5]] * 18, "name": 1}]}, r"poses\[0\].*: expected string"),
        ({"poses": [7]}, r"poses\[0\] must be an object with a list 'keypoints', got int"),
        ({"poses": 7}, "with a list 'poses'"),
    ],
)
def test_errors_name_the_file_and_the_place(file, data, message):
    path = file(data)
    with pytest.raises(ValueError, match=message) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path} cannot be read as poses: ")


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "poses.json"
    path.write_bytes(b"\xff\xd8\xff\xe0 a picture")
    with pytest.raises(ValueError, match="cannot be read as poses"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.json")


def test_a_bad_size_is_an_error_in_any_file(file):
    with pytest.raises(ValueError, match=r"^size must be \(height, width\)"):
        read(file({"people": [person(ONE)]}), size=64)


def test_a_failure_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "poses.json"
    write([ONE], path)
    before = path.read_bytes()

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match=r"poses\.json cannot be written: No space left"):
        write([ONE, ONE], path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["poses.json"]
    assert path.read_bytes() == before
