"""Each reader on its set in miniature: who is where, in which order; and on broken ones."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import trees
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat

from pose2id import datasets
from pose2id.datasets import cuhk03, layout, market1501, open_dataset

READERS = {
    "market1501": (datasets.market1501, trees.market1501, "market1501"),
    "msmt17": (datasets.msmt17, trees.msmt17, "market1501"),
    "cuhk03": (datasets.cuhk03, trees.cuhk03_mat, "cuhk03"),
    "cuhk03-np": (datasets.cuhk03, trees.cuhk03_boxes, "cuhk03"),
    "mars": (datasets.mars, trees.mars, "market1501"),
    "occluded-reid": (datasets.occluded_reid, trees.occluded_reid, "occluded-reid"),
    "sysu-mm01": (datasets.sysu_mm01, trees.sysu_mm01, "sysu-mm01"),
    "regdb": (datasets.regdb, trees.regdb, "regdb"),
    "veri-776": (datasets.veri776, trees.veri776, "market1501"),
    "vehicleid": (datasets.vehicleid, trees.vehicleid, "vehicleid"),
}
DIFFERS = "not as published"


def read(reader, *places, **options):
    """A miniature's data set: its counts are not the published ones."""
    with pytest.warns(UserWarning, match=DIFFERS) as caught:
        found = reader(*places, **options)
    assert len(caught) == 1
    return found


def names(split):
    return [Path(path).name for path in split.paths]


def listed(split):
    cameras = [None] * len(split) if split.camids is None else split.camids.tolist()
    return list(zip(names(split), split.pids.tolist(), cameras, strict=True))


@pytest.fixture(params=READERS)
def known(request):
    return READERS[request.param]


def test_every_image_is_in_one_split_or_named(known, tmp_path):
    reader, tree, protocol = known
    tree(tmp_path)
    found = read(reader, tmp_path)
    assert found.protocol == protocol
    splits = [found.query] + [split for split in (found.gallery, found.train) if split not in (None, found.query)]
    paths = [path for split in splits for path in split.paths]
    assert len(paths) == len(set(paths))
    assert all(Path(path).is_file() for path in paths)
    notes = " ".join(found.notes)
    for path in trees.images_below(tmp_path) - set(paths):
        named = [part for part in Path(path).relative_to(tmp_path).parts if part in notes]
        assert named or "Training images differ" in notes or "Not in the lists read: 2" in notes, path
    for split in splits:
        for labels in (split.pids, split.camids, split.tracklets):
            assert labels is None or labels.dtype == np.int64


@pytest.mark.parametrize("above", ["", "renamed", "sets/Some Set v1.0"])
def test_tops_may_be_nested_and_renamed(known, above, tmp_path):
    reader, tree, _ = known
    tree(tmp_path / above)
    found, opened = read(reader, tmp_path), read(open_dataset, tmp_path)
    for split in ("query", "gallery", "train"):
        one, other = getattr(found, split), getattr(opened, split)
        assert (one is None) == (other is None)
        assert one is None or (one.paths == other.paths and (one.pids == other.pids).all())
    assert str(found) == str(opened)
    assert found.root.samefile(tmp_path / above)


def test_the_order_is_that_of_the_names(known, tmp_path):
    reader, tree, _ = known
    found = read(reader, tree(tmp_path))
    for split in (found.query, found.gallery, found.train):
        if split is not None and found.protocol not in ("sysu-mm01",):
            by_camera = split.camids if found.protocol == "regdb" else np.zeros(len(split))
            keys = list(zip(by_camera.tolist(), split.paths, strict=True))
            assert keys == sorted(keys)


def test_folders_that_are_missing_are_named_beside_the_expected_tree(known, tmp_path):
    reader, tree, _ = known
    tree(tmp_path / "whole")
    for folder in sorted(path for path in (tmp_path / "whole").iterdir() if path.is_dir()):
        if any(word in folder.name for word in ("train_v2", "box_train", "image_train", "gt_bbox", "labeled")):
            continue  # may be missing
        shutil.copytree(tmp_path / "whole", tmp_path / "broken")
        shutil.rmtree(tmp_path / "broken" / folder.name)
        if folder.name in ("detected", "images_detected"):
            assert read(reader, tmp_path / "broken").name == "CUHK03 (labeled)"
        else:
            with pytest.raises(FileNotFoundError, match=r"(?s)Expected:\n.*/.*Found: ") as error:
                reader(tmp_path / "broken")
            assert folder.name.removeprefix("mask_") in str(error.value)
        shutil.rmtree(tmp_path / "broken")


def test_an_empty_folder_shows_the_tree(known, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)Expected:\n.*Found: nothing"):
        known[0](tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        known[0](tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="got a file"):
        known[0](trees.touch(tmp_path, "file.jpg") / "file.jpg")


def image_folder(root):
    """A folder of images that the reader walks through."""
    images = (path for path in sorted(root.rglob("*")) if path.suffix.lower() in trees.IMAGES)
    return next(path.parent for path in images if path.parent.name != "gt_bbox")


def test_files_that_are_no_images_are_named(known, tmp_path):
    reader, tree, _ = known
    trees.touch(image_folder(tree(tmp_path)), "notes.docx")
    with pytest.raises(ValueError, match=r"must hold images .*, got .*notes\.docx"):
        reader(tmp_path)


def test_what_systems_leave_behind_is_skipped(known, tmp_path):
    reader, tree, _ = known
    before = str(read(reader, tree(tmp_path)))
    folder = image_folder(tmp_path)
    trees.touch(folder, "THUMBS.DB", ".DS_Store", "._0001.jpg", "Desktop.ini", "list.TXT", ".hidden/0001.jpg")
    (folder / "loop").symlink_to(folder)
    assert str(read(reader, tmp_path)) == before


def test_broken_links_are_named(known, tmp_path):
    reader, tree, _ = known
    folder = image_folder(tree(tmp_path))
    (folder / "0001_gone.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(ValueError, match=r"0001_gone\.jpg"):
        reader(tmp_path)


def test_market1501(tmp_path):
    found = read(datasets.market1501, trees.market1501(tmp_path))
    assert listed(found.query) == [
        ("0001_c1s1_001051_00.jpg", 1, 1),
        ("0001_c2s1_000301_00.jpg", 1, 2),
        ("0003_c3s3_064744_00.jpg", 3, 3),
    ]
    assert listed(found.gallery)[:3] == [
        ("-1_c1s1_000401_03.jpg", -1, 1),
        ("-1_c5s2_000401_03.jpg", -1, 5),
        ("0000_c1s1_000151_01.jpg", 0, 1),
    ]
    assert str(found.gallery) == "5 images, 2 identities, 3 cameras; junk (-1): 2; distractors (0): 1"
    assert str(found.query) == "3 images, 2 identities, 3 cameras"
    assert found.train.pids.tolist() == [2, 2, 7]
    assert str(found).splitlines()[:5] == [
        f"Market1501, protocol market1501, in {tmp_path}",
        "split    images  identities  cameras  junk (-1)  distractors (0)",
        "train         3           2        3          0                0",
        "query         3           2        3          0                0",
        "gallery       5           2        3          2                1",
    ]
    assert "* Not read: gt_bbox." in str(found)
    assert "* Not as published: gallery: 5 images found, 19,732 published." in str(found)


def test_no_warning_where_counts_are_those_published(tmp_path, monkeypatch):
    counts = {
        "train": {"images": 3, "identities": 2},
        "query": {"images": 3},
        "gallery": {"images": 5, "identities": 2},
    }
    # The package's attribute of that name is the function.
    monkeypatch.setattr(import_module("pose2id.datasets.market1501"), "PUBLISHED", counts)
    trees.market1501(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert market1501(tmp_path).notes == ("Not read: gt_bbox.",)
    counts["gallery"]["identities"] = 750
    with pytest.warns(
        UserWarning, match=r"^Market1501 is not as published: gallery: 2 identities found, 750 published\.$"
    ):
        market1501(tmp_path)


def test_a_set_without_training_images(tmp_path):
    shutil.rmtree(trees.market1501(tmp_path) / "bounding_box_train")
    found = read(datasets.market1501, tmp_path)
    assert found.train is None
    assert "\ntrain" not in str(found)


def test_a_set_of_your_own_in_the_layout_of_market1501(tmp_path):
    root = trees.touch(
        tmp_path / "shop", "query/0000_c1_1.jpg", "bounding_box_test/0000_c12_2.jpg", "bounding_box_test/-1_c2_3.jpg"
    )
    found = datasets.market1501(tmp_path)  # no counts are published, so nothing warns
    assert (found.name, found.train, found.root) == ("shop", None, root)
    # Somebody numbered 0 whom a query asks for is no distractor.
    assert found.query.pids.tolist() == [1]
    assert listed(found.gallery) == [("-1_c2_3.jpg", -1, 2), ("0000_c12_2.jpg", 1, 12)]


@pytest.mark.parametrize("name", ["notes.jpg", "0001.jpg", "c1s1_0001.jpg", "-2_c1s1_1.jpg", "0001-c1s1.jpg"])
def test_names_that_do_not_fit_are_an_error(name, tmp_path):
    trees.touch(trees.market1501(tmp_path), f"query/{name}")
    with pytest.raises(ValueError, match=f"must hold images named like 0002_c1s1_000451_03.jpg .*, got {name}"):
        market1501(tmp_path)


def test_the_first_few_bad_names_are_enough(tmp_path):
    trees.touch(trees.market1501(tmp_path), *(f"query/bad{i}.jpg" for i in range(9)))
    with pytest.raises(ValueError, match=r"got bad0\.jpg, bad1\.jpg, bad2\.jpg, \.\.\. and 6 more\. Move"):
        market1501(tmp_path)


def test_a_file_in_the_place_of_a_folder(tmp_path):
    root = trees.market1501(tmp_path)
    shutil.rmtree(root / "query")
    (root / "query").touch()
    with pytest.raises(NotADirectoryError, match="query must be a folder of images, got a file"):
        market1501(root)


@pytest.mark.parametrize("masked", [False, True])
def test_msmt17(masked, tmp_path):
    found = read(datasets.msmt17, trees.msmt17(tmp_path, masked))
    # Counted from 1, since 0 would be a distractor; cameras are the third number.
    assert listed(found.query) == [
        ("0000_000_14_0302morning_0100_0.jpg", 1, 14),
        ("0005_001_15_0302noon_0100_0.jpg", 6, 15),
    ]
    assert found.gallery.pids.tolist() == [1, 6]
    assert listed(found.train) == [
        ("0000_000_01_0303morning_0015_0.jpg", 1, 1),
        ("0000_001_02_0303morning_0016_0.jpg", 1, 2),
        ("0001_003_12_0303noon_0015_1.jpg", 2, 12),
    ]
    folder = tmp_path / ("mask_test_v2" if masked else "test")
    assert found.query.paths[0] == str(folder / "0000" / "0000_000_14_0302morning_0100_0.jpg")


def test_msmt17_with_files_that_lists_lack_and_the_reverse(tmp_path):
    trees.touch(trees.msmt17(tmp_path), "mask_test_v2/0007/0007_000_01_0303morning_0015_0.jpg")
    found = read(datasets.msmt17, tmp_path)
    assert "Left out, in no list: 1 images of mask_test_v2 (0007/0007_000_01_0303morning_0015_0.jpg)." in found.notes
    (tmp_path / found.query.paths[0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 0000/0000_000_14_0302morning_0100_0\.jpg of its lists"):
        datasets.msmt17(tmp_path)


def test_msmt17_without_the_training_folder(tmp_path):
    shutil.rmtree(trees.msmt17(tmp_path) / "mask_train_v2")
    found = read(datasets.msmt17, tmp_path)
    assert found.train is None
    assert "No training images: there are lists alone." in found.notes


@pytest.mark.parametrize("line", ["0000/0000_000_01_x.jpg", "0000/0000_000_01_x.jpg one", "a b 3"])
def test_lines_of_lists_that_do_not_fit_are_named(line, tmp_path):
    trees.write(trees.msmt17(tmp_path) / "list_query.txt", "", line)
    with pytest.raises(ValueError, match=r"line 2 of .*list_query\.txt must be a name and a number"):
        datasets.msmt17(tmp_path)


def test_lists_that_are_empty_or_no_text_or_name_an_image_twice(tmp_path):
    path = trees.msmt17(tmp_path) / "list_query.txt"
    line = path.read_text().splitlines()[0]
    trees.write(path, line, line)
    with pytest.raises(ValueError, match="an image must be listed once"):
        datasets.msmt17(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be text"):
        datasets.msmt17(tmp_path)
    trees.write(path, "")
    with pytest.raises(ValueError, match="must list images, got an empty file"):
        datasets.msmt17(tmp_path)


@pytest.mark.parametrize("boxes", [None, "detected", "labeled"])
def test_cuhk03_from_the_protocols_file(boxes, tmp_path):
    found = read(cuhk03, trees.cuhk03_mat(tmp_path), boxes=boxes)
    kind = boxes or "detected"
    assert found.name == f"CUHK03 ({kind})"
    assert listed(found.query) == [
        ("1_002_1_01.png", 2, 1),
        ("1_002_2_03.png", 2, 2),
        ("5_003_1_01.png", 3, 1),
        ("5_003_2_03.png", 3, 2),
    ]
    assert len(found.gallery) == (6 if kind == "detected" else 5)
    assert listed(found.train) == [("1_001_1_01.png", 1, 1), ("1_001_2_03.png", 1, 2)]
    assert all(f"images_{kind}" in path for path in found.query.paths + found.gallery.paths + found.train.paths)


@pytest.mark.parametrize("boxes", [None, "detected", "labeled"])
def test_cuhk03_in_the_layout_of_market1501(boxes, tmp_path):
    found = read(cuhk03, trees.cuhk03_boxes(tmp_path), boxes=boxes)
    kind = boxes or "detected"
    assert found.name == f"CUHK03 ({kind})"
    assert listed(found.query) == [("0001_c1_1.png", 1, 1), ("0001_c2_6.png", 1, 2)]
    assert len(found.gallery) == (3 if kind == "detected" else 2)
    # One of the two folders says itself what it is, and cannot be the other.
    one = read(open_dataset, tmp_path / kind)
    assert (one.name, one.query.paths, one.protocol) == (found.name, found.query.paths, "cuhk03")
    other = "labeled" if kind == "detected" else "detected"
    with pytest.raises(FileNotFoundError, match=f"boxes must be what is in .*, '{kind}', got '{other}'"):
        cuhk03(tmp_path / kind, boxes=other)


def test_cuhk03_in_a_folder_of_its_name(tmp_path):
    shutil.copytree(trees.cuhk03_boxes(tmp_path / "both") / "labeled", tmp_path / "CUHK03-NP")
    found = read(open_dataset, tmp_path / "CUHK03-NP", boxes="labeled")
    assert found.name == "CUHK03 (labeled)"


def test_cuhk03_as_it_was_released_says_what_to_do(tmp_path):
    trees.touch(tmp_path, "cuhk03_release/cuhk-03.mat")
    with pytest.raises(
        FileNotFoundError, match=r"(?s)cuhk-03\.mat alone is not read: torchreid.*Found: cuhk03_release/"
    ):
        open_dataset(tmp_path)


def test_cuhk03_with_another_protocols_file(tmp_path):
    trees.cuhk03_mat(tmp_path)
    path = tmp_path / "cuhk03_new_protocol_config_detected.mat"
    savemat(path, {"filelist": 1})
    with pytest.raises(ValueError, match=r"must hold labels and camId and train_idx .* it holds filelist"):
        cuhk03(tmp_path)
    path.write_bytes(b"no mat")
    with pytest.raises(ValueError, match="cannot be read"):
        cuhk03(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no cuhk03_new_protocol_config_detected\.mat"):
        cuhk03(tmp_path)
    with pytest.raises(ValueError, match="boxes must be one of 'detected', 'labeled', got 'drawn'"):
        cuhk03(tmp_path, boxes="drawn")


def test_mars(tmp_path):
    found = read(datasets.mars, trees.mars(tmp_path))
    assert listed(found.query) == [("0002C1T0001F001.jpg", 2, 1), ("0002C1T0001F002.jpg", 2, 1)]
    assert found.query.tracklets.tolist() == [2, 2]
    assert list(zip(found.gallery.pids, found.gallery.camids, found.gallery.tracklets, strict=True)) == [
        (-1, 1, 0),
        (0, 2, 1),
        (0, 2, 1),
        (2, 2, 3),
        (2, 2, 3),
        (2, 6, 4),
        (2, 6, 4),
    ]
    assert str(found.gallery) == "7 images, 1 identities, 3 cameras, 4 tracklets; junk (-1): 1; distractors (0): 2"
    assert found.train.tracklets.tolist() == [0, 0, 1]
    assert "gallery: 4 tracklets found, 10,200 published" in str(found)


def test_mars_with_tracklets_that_do_not_fit(tmp_path):
    info = trees.mars(tmp_path) / "info"
    savemat(info / "query_IDX.mat", {"query_IDX": [[6]]})
    with pytest.raises(ValueError, match=r"query_IDX\.mat must hold rows of tracks_test_info\.mat, 1 to 5"):
        datasets.mars(tmp_path)
    savemat(info / "tracks_test_info.mat", {"track_test_info": np.array([[1, 10, 2, 1]])})
    with pytest.raises(ValueError, match=r"must hold rows of test_name\.txt, 1 to 9"):
        datasets.mars(tmp_path)
    savemat(info / "tracks_test_info.mat", {"track_test_info": np.array([[1, 9, 2, 1]])})
    savemat(info / "query_IDX.mat", {"query_IDX": [[1]]})
    with pytest.raises(ValueError, match=r"the tracklet of 00-1/00-1C1T0001F001\.jpg must be of its identity, got 2"):
        datasets.mars(tmp_path)


def test_occluded_reid(tmp_path):
    found = read(datasets.occluded_reid, trees.occluded_reid(tmp_path))
    assert listed(found.query) == [("001_01.tif", 1, 0), ("001_02.tif", 1, 0), ("200_01.TIF", 200, 0)]
    assert listed(found.gallery) == [("001_01.tif", 1, 1), ("001_02.tif", 1, 1), ("200_01.TIF", 200, 1)]
    assert "occluded_body_images" in found.query.paths[0]
    assert found.train is None


def test_sysu_mm01(tmp_path):
    found = read(datasets.sysu_mm01, trees.sysu_mm01(tmp_path))
    assert [Path(path).relative_to(tmp_path).as_posix() for path in found.query.paths] == [
        f"cam{camera}/{pid:04d}/{image:04d}.jpg" for pid in (6, 10) for camera in (3, 6) for image in (1, 2)
    ]
    assert set(zip(found.gallery.pids.tolist(), found.gallery.camids.tolist(), strict=True)) == {
        (pid, camera) for pid in (6, 10) for camera in (1, 2, 4, 5) if (pid, camera) != (6, 2)
    }
    assert len(found.gallery) == 14
    assert set(found.train.pids.tolist()) == {1, 2, 4}
    assert set(found.train.camids.tolist()) == set(range(1, 7))
    assert found.permutation == tmp_path / "exp" / "rand_perm_cam.mat"
    assert "Left out, of people in no list: 1 images (cam1/0333/0001.jpg)." in found.notes
    (tmp_path / "exp" / "rand_perm_cam.mat").unlink()
    (tmp_path / "exp" / "train_id.txt").unlink()
    (tmp_path / "exp" / "val_id.txt").unlink()
    found = read(datasets.sysu_mm01, tmp_path)
    assert (found.permutation, found.train) == (None, None)


def test_sysu_mm01_with_lists_that_do_not_fit(tmp_path):
    exp = trees.sysu_mm01(tmp_path) / "exp"
    trees.write(exp / "train_id.txt", "1,6")
    with pytest.raises(ValueError, match="for training or for testing, got both for 6"):
        datasets.sysu_mm01(tmp_path)
    trees.write(exp / "test_id.txt", "six")
    with pytest.raises(ValueError, match="must list identities as 6,10,17, got six"):
        datasets.sysu_mm01(tmp_path)
    trees.write(exp / "test_id.txt", "500")
    with pytest.raises(ValueError, match=r"must have visible and infrared images of the people of test_id\.txt"):
        datasets.sysu_mm01(tmp_path)
    trees.touch(tmp_path, "cam4/0001.jpg")
    with pytest.raises(ValueError, match=r"must hold images named like 0001/0001\.jpg, got 0001\.jpg"):
        datasets.sysu_mm01(tmp_path)


def test_regdb(tmp_path):
    found = read(datasets.regdb, trees.regdb(tmp_path))
    assert len(found.trials) == 2
    for (queries, galleries), people in zip(found.trials, ((4, 1), (2, 3)), strict=True):
        # In the lists' order: the second image comes first, and so does person 4.
        for split, rows, kind in ((found.query, queries, "Visible"), (found.gallery, galleries, "Thermal")):
            assert split.pids[rows].tolist() == [pid for pid in people for _ in range(2)]
            wanted = [
                f"{kind}/{pid}/male_back_{kind[0].lower()}_{1000 * pid + i:05d}_{pid}.bmp"
                for pid in people
                for i in (2, 1)
            ]
            assert [Path(split.paths[row]).relative_to(tmp_path).as_posix() for row in rows] == wanted
            assert rows.dtype == np.int64
    assert set(found.query.camids.tolist()) == {1}
    assert set(found.gallery.camids.tolist()) == {2}
    assert found.train is None
    assert "2 trials found, 10 published" in str(found)
    turned = read(datasets.regdb, tmp_path, direction="thermal-to-visible")
    assert (turned.query.paths, turned.gallery.paths) == (found.gallery.paths, found.query.paths)
    assert [rows.tolist() for rows in turned.trials[0]] == [rows.tolist() for rows in found.trials[0][::-1]]


def test_one_trial_of_regdb_has_its_training_images(tmp_path):
    found = read(datasets.regdb, trees.regdb(tmp_path), trial=2)
    assert len(found.trials) == 1
    assert set(found.query.pids.tolist()) == {2, 3}
    assert set(found.train.pids.tolist()) == {1, 4}
    assert found.train.camids.tolist() == [1] * 4 + [2] * 4
    assert "Not as published: train: 8 images found, 4,120 published." in found.notes
    with pytest.raises(ValueError, match="trial must be one of 1, 2, got 3"):
        datasets.regdb(tmp_path, trial=3)
    with pytest.raises(ValueError, match="direction must be one of"):
        datasets.regdb(tmp_path, direction="both")
    (tmp_path / "idx" / "train_thermal_2.txt").unlink()
    assert read(datasets.regdb, tmp_path, trial=2).train is None


def test_regdb_with_lists_that_do_not_fit(tmp_path):
    idx = trees.regdb(tmp_path) / "idx"
    lines = (idx / "test_visible_1.txt").read_text().splitlines()
    trees.write(idx / "test_visible_1.txt", *(line[:-1] + "0" for line in lines))
    with pytest.raises(ValueError, match="each label of trial 1 must be one folder"):
        datasets.regdb(tmp_path)
    trees.write(idx / "test_visible_1.txt", "Thermal/1/a.bmp 0")
    with pytest.raises(ValueError, match=r"must list images as Visible/1/name, got Thermal/1/a\.bmp"):
        datasets.regdb(tmp_path)
    (idx / "test_visible_1.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"pair of test_visible_T\.txt .* \(visible 2, thermal 1, 2\)"):
        datasets.regdb(tmp_path)


def test_veri776(tmp_path):
    found = read(datasets.veri776, trees.veri776(tmp_path))
    assert listed(found.query) == [("0002_c002_00030600_0.jpg", 2, 2), ("0005_c020_00074605_0.jpg", 5, 20)]
    assert found.gallery.camids.tolist() == [1, 2, 3]
    assert found.train.pids.tolist() == [1]


@pytest.mark.parametrize(
    ("size", "images"), [(None, [(1, 7), (2, 7), (3, 8)]), ("medium", [(2, 7), (4, 9)]), ("large", [(5, 11)])]
)
def test_vehicleid(size, images, tmp_path):
    found = read(datasets.vehicleid, trees.vehicleid(tmp_path), size=size)
    assert found.query is found.gallery
    assert listed(found.query) == [(f"{image:07d}.jpg", pid, None) for image, pid in images]
    assert found.train.pids.tolist() == [100, 101]
    assert found.name == f"VehicleID ({size or 'small'})"
    assert "query = gallery" in str(found)
    assert f"Not in the lists read: {7 - len(images) - 2} images." in found.notes


def test_vehicleid_without_a_listed_image(tmp_path):
    (trees.vehicleid(tmp_path) / "image" / "0000003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 0000003\.jpg of its lists"):
        datasets.vehicleid(tmp_path)
    with pytest.raises(ValueError, match="size must be one of 'small', 'medium', 'large', got 'huge'"):
        datasets.vehicleid(tmp_path, size="huge")


def test_folders(tmp_path):
    found = open_dataset(trees.folders(tmp_path / "people"))
    assert (found.name, found.protocol, found.train) == ("people", "leave-one-out", None)
    assert found.query is found.gallery
    assert found.query.pids.tolist() == ["anna"] * 3 + ["ben"] * 2
    assert found.query.camids is None
    assert names(found.query) == ["1.jpg", "2.JPG", "3.png", "1.jpg", "2.webp"]
    assert set(found.query.paths) == trees.images_below(tmp_path) - {str(tmp_path / "people" / ".cache" / "1.jpg")}
    assert str(found.query) == "5 images, 2 identities, no cameras"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("lonely.jpg", r"must hold images as identity/name\.jpg, got lonely\.jpg"),
        ("anna/camera1/4.jpg", r"must hold images as identity/name\.jpg, got anna/camera1/4\.jpg"),
        ("gallery/4.jpg", "got gallery, which look like splits"),
        ("anna/notes.pdf", r"got anna/notes\.pdf"),
    ],
)
def test_folders_with_something_else(extra, message, tmp_path):
    trees.touch(trees.folders(tmp_path), extra)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path)


def test_identities_that_are_one_number_are_refused(tmp_path):
    trees.touch(tmp_path, "1/a.jpg", "01/a.jpg")
    with pytest.raises(ValueError, match="identities must differ as numbers too, got '01' and '1'"):
        open_dataset(tmp_path)


def test_splits_check_their_labels():
    pids = np.array([1, 2])
    for bad, message in (
        ({"pids": pids[:1]}, r"pids must have shape \(2,\)"),
        ({"pids": pids.astype(np.float32)}, "pids must hold int64 or strings, got float32"),
        ({"pids": pids, "camids": pids.astype(np.int32)}, "camids must hold int64 or strings"),
        ({"pids": pids, "tracklets": pids.astype(str)}, "tracklets must hold int64, got <U"),
    ):
        with pytest.raises(ValueError, match=message):
            datasets.Split(("a", "b"), **bad)


def test_junk_and_distractors_of_words():
    split = datasets.Split(("a", "b", "c"), np.array(["-1", "0", "anna"]))
    # "0" is somebody, and who "-1" is nobody knows: evaluation takes it for junk.
    assert str(split) == "3 images, 2 identities, no cameras; junk (-1): 1"
    assert len(split) == 3


def test_people_count_from_one():
    assert layout.from_one(np.array([-1, 0, 4])).tolist() == [-1, 1, 5]


# A literal restatement of Market1501's rules: every image is found by its own, simplest means.
NAMES = st.tuples(
    st.sampled_from(["-1", "0000", "0001", "0002", "1501"]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 99),
    st.sampled_from(["jpg", "JPG", "png", "jpeg"]),
)


@given(images=st.dictionaries(NAMES, st.sampled_from(["query", "bounding_box_test", "bounding_box_train"]), min_size=3))
def test_market1501_equals_a_literal_restatement(images):
    with tempfile.TemporaryDirectory() as root:
        # -1 and 0000 are in the gallery alone; and each folder holds somebody.
        wanted = {folder: [(1, 1, "0001_c1s1_999999_00.jpg")] for folder in ("query", "bounding_box_test")}
        for (person, camera, sequence, frame, ending), drawn in images.items():
            folder = "bounding_box_test" if person in ("-1", "0000") else drawn
            name = f"{person}_c{camera}s{sequence}_{frame:06d}_00.{ending}"
            wanted.setdefault(folder, []).append((int(person), camera, name))
        for folder, rows in wanted.items():
            trees.touch(Path(root) / folder, *(name for _, _, name in rows))
        found = read(datasets.market1501, root)
        splits = {"query": found.query, "bounding_box_test": found.gallery, "bounding_box_train": found.train}
        for folder, split in splits.items():
            rows = [] if split is None else [(pid, camera, name) for name, pid, camera in listed(split)]
            assert rows == sorted(wanted.get(folder, []), key=lambda row: row[2])
            assert split is None or [Path(path).parent.name for path in split.paths] == [folder] * len(split)
        people = {pid for pid, _, _ in wanted["bounding_box_test"]} - {-1, 0}
        assert found.gallery.counts()[:2] == (len(wanted["bounding_box_test"]), len(people))
