from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pose2id import Centralizer, Extractor, PictureFolder
from pose2id.extractor import Preprocess
from pose2id.io.images import content_key
from pose2id.ipg.folder import find, read_note
from pose2id.poses import standard


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def relative(found, root):
    return [[file.relative_to(root).as_posix() for file in files] for files in found]


def test_pose_folders(tmp_path):
    make(tmp_path, *(f"pose{m}/{name}" for m in range(1, 12) for name in ("b.jpg", "a.png", "c.x.jpeg", "._a.png")))
    make(tmp_path, "sheets/a.png", "pose1/notes.txt")
    found = find(tmp_path, ["/data/a.jpg", Path("b.jpg"), "c.x.tif"], 11)
    assert relative(found, tmp_path) == [
        [f"pose{m}/{name}" for m in range(1, 12)] for name in ("a.png", "b.jpg", "c.x.jpeg")
    ]
    assert relative(find(str(tmp_path), ["b.jpg"], 2), tmp_path) == [["pose1/b.jpg", "pose2/b.jpg"]]


def test_the_same_file_twice_is_one_image(tmp_path):
    make(tmp_path, "pose1/a.png")
    assert relative(find(tmp_path, ["a.jpg", "a.jpg", os.path.abspath("a.jpg")], 1), tmp_path) == [["pose1/a.png"]] * 3


def test_nested_pose_folders_tell_images_of_one_name_apart(tmp_path):
    names = [f"cam{c}/{pid}/0001" for c in (1, 2) for pid in ("0001", "0002")]
    make(tmp_path, *(f"pose{m}/{name}.png" for m in (1, 2) for name in names), "pose1/0001.png", "pose2/0001.png")
    images = [f"/data/sysu/{name}.jpg" for name in names]
    found = relative(find(tmp_path, images, 2), tmp_path)
    assert found == [[f"pose1/{name}.png", f"pose2/{name}.png"] for name in names]


def test_all_pose_folders_have_an_image_under_one_name(tmp_path):
    make(tmp_path, "pose1/cam1/0001.png", "pose2/0001.png")
    with pytest.raises(ValueError, match=r"missing for 1 of 1: images\[0\]"):
        find(tmp_path, ["/data/cam1/0001.jpg"], 2)


def test_names_are_taken_from_the_whole_path(tmp_path, monkeypatch):
    make(tmp_path, "generated/pose1/cam1/0001/0001.png", "data/cam1/0001/0001.jpg")
    monkeypatch.chdir(tmp_path / "data" / "cam1" / "0001")
    assert len(find(tmp_path / "generated", ["0001.jpg"], 1)[0]) == 1


def test_images_that_would_share_pictures(tmp_path):
    make(tmp_path, "pose1/0001.png")
    with pytest.raises(ValueError, match=r"images\[0\] \(.*cam1.*\) and images\[1\] \(.*cam2.*would both get those of"):
        find(tmp_path, ["/data/cam1/0001.jpg", "/data/cam2/0001.jpg"], 1)


def test_the_images_own_extension_comes_first(tmp_path):
    make(tmp_path, "pose1/a.png", "pose1/a.jpg")
    assert relative(find(tmp_path, ["a.jpg"], 1), tmp_path) == [["pose1/a.jpg"]]
    with pytest.raises(ValueError, match=r"one picture for images\[0\].*a\.jpg.*a\.png.*Remove all but one"):
        find(tmp_path, ["a.tif"], 1)


def test_a_folder_for_each_image(tmp_path):
    make(tmp_path, *(f"cam1/0001/pose{m}.png" for m in range(1, 11)), "cam1/0001/sheet.png", "cam1/0001/Sheet_2.JPG")
    make(tmp_path, "cam2/0001/front.JPG", "cam2/0001/back.webp", "cam2/0001/x.txt", "cam2/0001/.hidden.png")
    images = ["/data/cam1/0001.jpg", "/data/cam2/0001.jpg"]
    assert relative(find(tmp_path, images[:1], 10), tmp_path) == [[f"cam1/0001/pose{m}.png" for m in range(1, 11)]]
    assert relative(find(tmp_path, images, 2), tmp_path) == [
        ["cam1/0001/pose1.png", "cam1/0001/pose2.png"],
        ["cam2/0001/back.webp", "cam2/0001/front.JPG"],
    ]
    with pytest.raises(ValueError, match=r"3 pictures of every image; they are missing for 1 of 2: images\[1\]"):
        find(tmp_path, images, 3)


def test_missing_pictures_are_named_together(tmp_path):
    make(tmp_path, "pose1/0.png", "pose2/0.png", "pose1/1.png", "pose2/2.png")
    images = [f"/data/{i}.jpg" for i in range(7)]
    message = (
        r"2 pictures of every image; they are missing for 6 of 7: images\[1\] \(/data/1.jpg\), "
        r"images\[2\] \(/data/2.jpg\), images\[3\] \(/data/3.jpg\), \.\.\. and 3 more\. Looked for .*pose1\.\.pose2"
    )
    with pytest.raises(ValueError, match=message):
        find(tmp_path, images, 2)
    with pytest.raises(ValueError, match=r"missing for 1 of 1: images\[0\] \(/data/9.jpg\)\. Looked for"):
        find(tmp_path / "pose1", ["/data/9.jpg"], 1)


def test_too_few_pose_folders(tmp_path):
    make(tmp_path, "pose1/a.png", "pose2/a.png", "pose4/a.png")
    with pytest.raises(ValueError, match=r"num_poses must be at most 2, the number of folders.*got 4"):
        find(tmp_path, ["a.png"], 4)


@pytest.mark.parametrize(
    ("directory", "images", "count", "error", "message"),
    [
        (3, ["a.png"], 1, TypeError, "PathLike.* not .?int"),
        ("missing", ["a.png"], 1, ValueError, "directory must exist, got 'missing'"),
        (".", ["a.png", np.zeros((2, 2, 3))], 1, TypeError, r"images\[1\] must be a path.*got ndarray"),
        (".", ["a.png"], 0, ValueError, "count must be at least 1"),
    ],
)
def test_bad_arguments(directory, images, count, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        find(directory, images, count)


class TestCentralizer:
    @pytest.fixture
    def data(self, rng, tmp_path):
        """7 images, 3 generated images each, as arrays (7, 4, 8, 4, 3) with the original first, and as files."""
        arrays = rng.integers(0, 256, (7, 4, 8, 4, 3), dtype=np.uint8)
        images = [tmp_path / "data" / f"{i}.png" for i in range(7)]
        for i in range(7):
            for m in range(4):
                path = images[i] if m == 0 else tmp_path / "generated" / f"pose{m}" / images[i].name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(arrays[i, m]).save(path)
        return arrays, images, tmp_path / "generated"

    def test_a_directory_in_place_of_a_generator(self, data):
        arrays, images, directory = data

        def read(paths):
            return np.stack([np.asarray(Image.open(path)).mean((0, 1)) for path in paths])

        centralizer = Centralizer(read, inputs="images", generated=directory, num_poses=3, batch_size=2)
        raw = arrays.mean((2, 3), dtype=np.float64)
        np.testing.assert_allclose(centralizer(images), centralizer.fuse(raw[:, 0], raw[:, 1:]), atol=1e-12)
        by_parts = Centralizer(Extractor(read, inputs="images"), PictureFolder(directory, num_poses=3))
        np.testing.assert_array_equal(by_parts(images), centralizer(images))
        order = [3, 0, 6]
        found = centralizer.extract_generated([images[i] for i in order])
        np.testing.assert_allclose(found, raw[order, 1:])

    def test_through_a_transform(self, data):
        arrays, images, directory = data

        def extractor(batch):
            return batch.double().mean((2, 3))

        centralizer = Centralizer(extractor, transform="transreid", generated=str(directory), num_poses=3, batch_size=4)
        by_hand = Centralizer(extractor, transform="transreid")
        raw = np.stack([by_hand.extract(list(person), normalize=False).numpy() for person in arrays])
        np.testing.assert_allclose(centralizer(images), by_hand.fuse(raw[:, 0], raw[:, 1:]), atol=1e-12)

    def test_nothing_runs_when_pictures_are_missing(self, data):
        _, images, directory = data
        calls = []
        centralizer = Centralizer(calls.append, transform="transreid", generated=directory, num_poses=3)
        (directory / "pose2" / "5.png").unlink()
        with pytest.raises(ValueError, match=r"missing for 1 of 7: images\[5\]"):
            centralizer(images)
        with pytest.raises(TypeError, match=r"images\[0\] must be a path"):
            centralizer([Image.new("RGB", (2, 2))])
        assert calls == []

    def test_a_broken_picture_is_named(self, data):
        _, images, directory = data
        (directory / "pose2" / "5.png").write_bytes(b"no picture")
        centralizer = Centralizer(lambda x: x.mean((2, 3)), transform="pmt", generated=directory, num_poses=3)
        message = rf"generated image 2 of images\[5\] cannot be read: {re.escape(str(directory))}"
        with pytest.raises(ValueError, match=message):
            centralizer(images)

    def test_pose_inputs_belong_to_the_folders(self, data):
        _, images, directory = data
        poses = pytest.importorskip("pose2id.poses")
        seen = []

        def extractor(batch, keypoints=None):
            seen.append(None if keypoints is None else keypoints.tolist())
            return batch.mean((2, 3))

        values = {pose.key: m for m, pose in enumerate(poses.standard())}
        Centralizer(
            extractor,
            transform="transreid",
            generated=directory,
            num_poses=3,
            batch_size=100,
            pose_inputs={"keypoints": lambda pose: np.array([values[pose.key]])},
        )(images)
        assert seen == [None, [[0], [1], [2]] * 7]

    @pytest.mark.parametrize(
        ("generated", "count", "error", "message"),
        [
            ("missing", 1, ValueError, "directory must exist"),
            (3, 1, TypeError, "PathLike.* not .?int"),
            (None, 4, ValueError, "num_poses must be at most 3"),
        ],
    )
    def test_bad_directories_are_refused_at_once(self, generated, count, error, message, data):
        with pytest.raises(error, match=message):
            Centralizer(len, transform="pmt", generated=data[2] if generated is None else generated, num_poses=count)
        with pytest.raises(error, match=message):
            PictureFolder(data[2] if generated is None else generated, num_poses=count)


class TestNotes:
    """What generated pictures say that they were made from."""

    @pytest.fixture
    def original(self, tmp_path):
        Image.new("RGB", (10, 20), "red").save(tmp_path / "a.png")
        return tmp_path / "a.png"

    @pytest.fixture
    def directory(self, tmp_path, original):
        with Image.open(original) as picture:
            key = content_key(picture)
        for m, pose in enumerate(standard()[:2]):
            self.save(tmp_path / "gen" / f"pose{m + 1}" / "a.png", image=key, pose=pose.key)
        return tmp_path / "gen"

    def save(self, path, **note):
        text = PngImagePlugin.PngInfo()
        text.add_text("pose2id", json.dumps(note))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 20), "blue").save(path, pnginfo=text)

    def call(self, directory, images, **options):
        options = {"transform": Preprocess((20, 10), (0, 0, 0), (1, 1, 1)), "num_poses": 2, **options}
        return Centralizer(lambda batch: batch.mean((2, 3)), generated=directory, **options)(images, progress=False)

    def test_that_fit(self, directory, original):
        expected = np.array([1.0, 0.0, 2.0]) / np.sqrt(5)
        np.testing.assert_allclose(self.call(directory, [original])[0], expected, atol=1e-6)
        np.testing.assert_allclose(self.call(directory, [original], poses=standard()[:2])[0], expected, atol=1e-6)

    def test_of_another_image(self, directory, original):
        Image.new("RGB", (10, 20), "green").save(original)
        with pytest.raises(
            ValueError, match=r"images\[0\] .*a\.png\), and .*pose1.*a\.png was made from another image"
        ):
            self.call(directory, [original])

    def test_in_another_pose(self, directory, original):
        with pytest.raises(ValueError, match=r"pose1.*a\.png is in another pose than poses\[0\]"):
            self.call(directory, [original], poses=standard()[2:4])
        with pytest.raises(ValueError, match=r"pose1.*a\.png is in another pose than poses\[0\]"):
            PictureFolder(directory, standard()[2:4])([original])
        with Image.open(original) as picture:
            key = content_key(picture)
        other = original.with_name("b.png")
        other.write_bytes(original.read_bytes())
        for m in (1, 2):
            self.save(directory / f"pose{m}" / "b.png", image=key, pose=standard()[2 * m - 2].key)
        with pytest.raises(
            ValueError, match=r"pose2.*b\.png is in another pose than those of other images in its folder"
        ):
            self.call(directory, [original, other])

    def test_of_other_programs(self, directory, original):
        for file in directory.rglob("*.png"):
            Image.new("RGB", (10, 20), "blue").save(file)
        Image.new("RGB", (10, 20), "green").save(original)
        assert self.call(directory, [original]).shape == (1, 3)

    @pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n and no more"])
    def test_of_what_is_no_picture(self, tmp_path, content):
        (tmp_path / "x.png").write_bytes(content)
        assert read_note(tmp_path / "x.png") == {}

    def test_of_a_note_that_is_none(self, tmp_path):
        text = PngImagePlugin.PngInfo()
        text.add_text("pose2id", "[" * 100_000)
        Image.new("RGB", (10, 20)).save(tmp_path / "x.png", pnginfo=text)
        assert read_note(tmp_path / "x.png") == {}
