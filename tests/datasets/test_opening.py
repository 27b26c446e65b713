"""What is this folder? Every set is told by its layout, and what is none, or several, is said."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import trees

from pose2id import datasets, evaluate
from pose2id.datasets import READERS, open_dataset
from pose2id.datasets.opening import _LAYOUTS, _OPTIONS

TREES = {
    "Market1501": trees.market1501,
    "MSMT17": trees.msmt17,
    "CUHK03 (detected)": trees.cuhk03_mat,
    "MARS": trees.mars,
    "Occluded-REID": trees.occluded_reid,
    "SYSU-MM01": trees.sysu_mm01,
    "RegDB": trees.regdb,
    "VeRi-776": trees.veri776,
    "VehicleID (small)": trees.vehicleid,
}


@pytest.mark.parametrize("name", TREES)
def test_a_set_is_told_by_its_layout(name, tmp_path):
    TREES[name](tmp_path / "one" / "two")
    with pytest.warns(UserWarning, match=f"^{name.replace('(', '.').replace(')', '.')} is not as published"):
        found = open_dataset(str(tmp_path))
    assert found.name == name
    assert found.root == tmp_path / "one" / "two"


@pytest.mark.parametrize("key", _LAYOUTS)
@pytest.mark.parametrize("spelled", [str, str.upper, lambda key: key.replace("-", "_")])
def test_a_set_asked_for_by_name_says_what_it_lacks(key, spelled, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"(?s)^{_LAYOUTS[key].name}: .*Expected:"):
        open_dataset(tmp_path, name=spelled(key))


def test_three_levels_down_is_too_deep(tmp_path):
    trees.market1501(tmp_path / "a" / "b" / "c")
    with pytest.raises(ValueError, match=r"must hold images as identity/name\.jpg.*`pose2id table FOLDER OUT\.csv`"):
        open_dataset(tmp_path)


def test_two_candidates_are_listed_and_one_can_be_chosen(tmp_path):
    trees.market1501(tmp_path / "market")
    trees.veri776(tmp_path / "veri")
    with pytest.raises(ValueError, match=r"must hold one data set, got 2: Market1501 in .*market, VeRi-776 in .*veri"):
        open_dataset(tmp_path)
    with pytest.warns(UserWarning, match="VeRi-776 is not as published"):
        assert open_dataset(tmp_path, name="veri-776").name == "VeRi-776"
    trees.market1501(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"got 2: Market1501 in .*copy, Market1501 in .*market"):
        open_dataset(tmp_path, name="market1501")


def test_the_nearer_candidate_wins(tmp_path):
    trees.market1501(tmp_path)
    trees.market1501(tmp_path / "copy")
    with pytest.warns(UserWarning, match=r"query: 3 images"):
        assert open_dataset(tmp_path).root == tmp_path


def test_a_part_of_a_set_is_no_plain_folder(tmp_path):
    # Else Market1501's only folder left would be one identity of 5 images.
    trees.touch(tmp_path, "bounding_box_test/0001_c1s1_001051_03.jpg")
    with pytest.raises(FileNotFoundError, match=r"there is no query in .*(?s:.)*Found: bounding_box_test/"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("folder", ["DukeMTMC-reID", "dukemtmc", "Occluded_Duke", "P-DukeMTMC-reID", "sets/DukeMTMC"])
def test_dukemtmc_is_refused_by_its_name(folder, tmp_path):
    trees.touch(tmp_path, f"{folder}/query/1.jpg", f"{folder}/bounding_box_test/1.jpg")
    with pytest.raises(ValueError, match=r"DukeMTMC, .* is not supported, got .* withdrew it in 2019"):
        open_dataset(tmp_path if "/" in folder else tmp_path / folder)


def test_dukemtmc_is_refused_by_its_images(tmp_path):
    for folder in ("query", "bounding_box_test"):
        trees.touch(tmp_path, f"renamed/{folder}/0005_c2_f0046985.jpg")
    for options in ({}, {"name": "market1501"}):
        with pytest.raises(ValueError, match="withdrew it in 2019"):
            open_dataset(tmp_path, **options)
    with pytest.raises(ValueError, match="withdrew it in 2019"):
        open_dataset(tmp_path, name="DukeMTMC-reID")
    with pytest.raises(ValueError, match="withdrew it in 2019"):
        datasets.market1501(tmp_path)


def test_a_place_that_is_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no data set .*nowhere"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must hold images, got none"):
        open_dataset(tmp_path)
    for name, advice in (
        ("one.jpg", "got another file"),
        ("f.npz", "load_features"),
        ("M.zip", "Unpack it first"),
    ):
        with pytest.raises(ValueError, match=advice):
            open_dataset(trees.touch(tmp_path, name) / name)
    with pytest.raises(ValueError, match="must be a folder for the set 'mars', got a file"):
        open_dataset(tmp_path / "one.jpg", name="mars")
    with pytest.raises(ValueError, match=r"name must be one of market1501, .*, got 'market'"):
        open_dataset(tmp_path, name="market")


def test_options_are_of_their_sets_alone(tmp_path):
    trees.market1501(tmp_path)
    for option, value in {"boxes": "labeled", "direction": "visible-to-thermal", "trial": 1, "size": "small"}.items():
        with pytest.raises(
            ValueError, match=f"{option} is of {_OPTIONS[option]} alone, and the data set is market1501"
        ):
            open_dataset(tmp_path, **{option: value})
        assert option in inspect.signature(READERS[_OPTIONS[option]]).parameters


@pytest.mark.parametrize(
    ("tree", "options", "name"),
    [
        (trees.cuhk03_mat, {"boxes": "labeled"}, "CUHK03 (labeled)"),
        (trees.regdb, {"direction": "thermal-to-visible", "trial": 1}, "RegDB"),
        (trees.vehicleid, {"size": "large"}, "VehicleID (large)"),
    ],
)
def test_options_reach_their_reader(tree, options, name, tmp_path):
    with pytest.warns(UserWarning, match="not as published"):
        found = open_dataset(tree(tmp_path), **options)
    assert found.name == name
    if "direction" in options:
        assert set(found.query.camids.tolist()) == {2}
        assert found.train is not None


def test_a_table_is_told_by_its_ending(tmp_path):
    trees.folders(tmp_path)
    trees.write(tmp_path / "people.csv", "path,identity", "anna/1.jpg,anna", "ben/1.jpg,ben")
    assert open_dataset(tmp_path / "people.csv").query.pids.tolist() == ["anna", "ben"]
    (tmp_path / "people.csv").rename(tmp_path / "people.list")
    assert open_dataset(tmp_path / "people.list", name="table").name == "people"


def test_folders_by_name(tmp_path):
    # By its layout this is a set; whoever asks for folders gets them.
    trees.touch(tmp_path, "bounding_box_test/1.jpg", "anna/1.jpg")
    assert open_dataset(tmp_path, name="folders").query.pids.tolist() == ["anna", "bounding_box_test"]


def test_every_reader_is_public_and_has_a_tree():
    for key, reader in READERS.items():
        assert getattr(datasets, reader.__name__) is reader
        assert reader.__name__ in datasets.__all__
        assert key in _LAYOUTS or key in ("folders", "table")
    for layout in _LAYOUTS.values():
        assert all(name == name.lower() for marker in layout.markers for name in marker)


@pytest.mark.parametrize("folders", [("labeled",), ("CUHK03_NP", "boxes"), ("cuhk03-np",)])
def test_one_kind_of_boxes_in_the_layout_of_market1501(folders, tmp_path):
    trees.cuhk03_boxes(tmp_path / "both")
    top = tmp_path.joinpath("x", *folders)
    (tmp_path / "both" / "labeled").rename(top.parent.mkdir(parents=True) or top)
    with pytest.warns(UserWarning, match=r"CUHK03 \((detected|labeled)\) is not as published"):
        found = open_dataset(tmp_path / "x")
    assert found.name == ("CUHK03 (labeled)" if folders == ("labeled",) else "CUHK03 (detected)")
    top.rename(tmp_path / "plain")
    assert open_dataset(tmp_path / "plain").name == "plain"


def test_labels_are_those_that_evaluation_takes(tmp_path):
    rng = np.random.default_rng(0)
    trees.touch(tmp_path, *(f"{i}.jpg" for i in range(30)))
    people = rng.choice(["-1", "0", "7", "12"], 30)
    cameras = rng.integers(1, 4, 30)
    rows = [f"{i}.jpg,{people[i]},{cameras[i]},{'query' if i % 3 == 0 else 'gallery'}" for i in range(30)]
    trees.write(tmp_path / "t.csv", "path,identity,camera,split", *rows)
    data, x = open_dataset(tmp_path / "t.csv"), rng.normal(size=(30, 8))
    is_query = np.arange(30) % 3 == 0
    sides = [(data.query.pids, data.gallery.pids, data.query.camids, data.gallery.camids)]
    sides.append([labels[mask] for labels in (people.astype(int), cameras) for mask in (is_query, ~is_query)])
    found, wanted = (evaluate(x[is_query], x[~is_query], *labels) for labels in sides)
    assert found.mAP == wanted.mAP
    assert found.num_valid_queries == wanted.num_valid_queries
