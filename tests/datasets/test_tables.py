"""Tables: columns by any of their names, splits, and cells that do not fit, by line."""

from __future__ import annotations

import re

import numpy as np
import pytest
import trees

from pose2id.datasets import read_table
from pose2id.datasets.tables import listed_images

FILES = [f"{i}.jpg" for i in range(8)]


@pytest.fixture
def write(tmp_path):
    trees.touch(tmp_path, *FILES)

    def written(*lines, encoding="utf-8", end="\n"):
        path = tmp_path / "people.csv"
        path.write_bytes((end.join(lines) + end).encode(encoding))
        return path

    return written


class Frame:
    """What a DataFrame is to the reader: columns, and their values by name."""

    def __init__(self, **columns):
        self.held = columns
        self.columns = list(columns)

    def __getitem__(self, name):
        return self.held[name]


class NAType:
    """As pandas calls the type of its missing value."""


def test_query_gallery_and_train(write, tmp_path):
    rows = [
        "0.jpg,anna,1,train",
        "1.jpg,ben,2,query",
        "2.jpg,-1,2,gallery",
        "3.jpg,ben,1,Gallery",
        "4.jpg,carl,1,query",
    ]
    found = read_table(write("path,identity,camera,split", *rows))
    assert (found.name, found.root, found.protocol, found.notes) == ("people", tmp_path, "market1501", ())
    assert found.train.paths == (str(tmp_path / "0.jpg"),)
    # The table's own order, so that rows of features stay where they are.
    assert found.query.paths == (str(tmp_path / "1.jpg"), str(tmp_path / "4.jpg"))
    assert found.query.pids.tolist() == ["ben", "carl"]
    assert found.gallery.pids.tolist() == ["-1", "ben"]
    assert found.gallery.camids.tolist() == ["2", "1"]
    assert str(found.gallery) == "2 images, 1 identities, 2 cameras; junk (-1): 1"


def test_without_splits_each_image_is_searched_among_the_others(write):
    found = read_table(write("path,identity", "0.jpg,7", "1.jpg,8"))
    assert found.query is found.gallery
    assert (found.protocol, found.train, found.query.camids) == ("leave-one-out", None, None)


def test_test_images_are_searched_among_one_another(write):
    found = read_table(write("path,identity,split", "0.jpg,7,train", "1.jpg,8,test", "2.jpg,8,test"))
    assert found.query is found.gallery
    assert found.protocol == "leave-one-out"
    assert len(found.query) == 2
    assert len(found.train) == 1


@pytest.mark.parametrize("path", ["path", "image", "file", "filename", "filepath"])
@pytest.mark.parametrize("identity", ["identity", "pid", "person", "vehicle", "label"])
def test_names_of_columns(path, identity, write):
    found = read_table(write(f"other, {path.upper()} ,{identity.title()}", "x, 1.jpg , 8 ", "y,2.jpg,9"))
    assert found.query.pids.tolist() == ["8", "9"]


@pytest.mark.parametrize("camera", ["camera", "camid", "cam"])
@pytest.mark.parametrize("split", ["split", "subset", "set"])
@pytest.mark.parametrize("words", [("query", "gallery"), ("probe", "DATABASE")])
def test_names_of_optional_columns_and_splits(camera, split, words, write):
    found = read_table(write(f"path,pid,{camera},{split}", f"1.jpg,8,c1,{words[0]}", f"2.jpg,8,c2,{words[1]}"))
    assert found.query.camids.tolist() == ["c1"]
    assert found.gallery.camids.tolist() == ["c2"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiters_and_encodings(delimiter, encoding, end, write, tmp_path):
    trees.touch(tmp_path, "Käthe, 1;.jpg")
    lines = [["path", "identity"], ['"Käthe, 1;.jpg"', "Käthe"], ["", ""], ["0.jpg", "b"]]
    found = read_table(write(*map(delimiter.join, lines), encoding=encoding, end=end))
    assert found.query.paths == (str(tmp_path / "Käthe, 1;.jpg"), str(tmp_path / "0.jpg"))
    assert found.query.pids.tolist() == ["Käthe", "b"]


def test_the_first_of_several_columns_counts_and_others_are_noted(write):
    found = read_table(write("label,identity,path,image", "horse,anna,0.jpg,x", "horse,ben,1.jpg,y"))
    assert found.query.pids.tolist() == ["anna", "ben"]
    assert found.notes == (
        "Read as path: column 'path', not 'image'.",
        "Read as identity: column 'identity', not 'label'.",
    )


def test_metadata_of_wildlife_datasets(tmp_path):
    trees.touch(tmp_path, "images/1.jpg", "images/2.jpg", "images/3.jpg", "images/4.jpg")
    frame = Frame(
        image_id=[1, 2, 3, 4],
        identity=np.array(["t1", "unknown", "t2", "t1"], dtype=object),
        path=[f"images/{i}.jpg" for i in (1, 2, 3, 4)],
        split=["train", "test", "test", "test"],
        date=[np.nan] * 4,
        bbox=[[0, 0, 1, 1]] * 4,
    )
    found = read_table(frame, root=tmp_path)
    assert found.train.pids.tolist() == ["t1"]
    assert found.query.pids.tolist() == ["t2", "t1"]
    assert found.notes == ('Left out: 1 images of identity "unknown".',)
    assert found.query.paths[0] == str(tmp_path / "images" / "3.jpg")


def test_cells_of_frames(tmp_path):
    trees.touch(tmp_path, *FILES)
    frame = Frame(path=[tmp_path / "0.jpg", "1.jpg"], pid=[np.int64(7), 7.0], cam=np.array([1.0, 2.0]))
    found = read_table(frame, root=tmp_path)
    assert found.query.pids.tolist() == ["7", "7"]
    assert found.query.camids.tolist() == ["1", "2"]
    for bad in (1.5, True, ["anna"]):
        with pytest.raises(TypeError, match=f"must hold text or whole numbers as identity, got {re.escape(repr(bad))}"):
            read_table(Frame(path=["0.jpg"], pid=[bad]), root=tmp_path)
    for empty in (None, float("nan"), np.float32("nan"), NAType(), " "):
        with pytest.raises(ValueError, match="each image's identity; empty cells are not allowed, got row 1"):
            read_table(Frame(path=["0.jpg", "1.jpg"], pid=[1, empty]), root=tmp_path)
    with pytest.raises(ValueError, match="The Frame must list at least one image"):
        read_table(Frame(path=[], pid=[]))
    with pytest.raises(TypeError, match="table must be the path of a CSV file or a DataFrame, got int"):
        read_table(3)


def test_a_real_dataframe(tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    trees.touch(tmp_path, *FILES)
    frame = pandas.DataFrame({"path": FILES[:3], "pid": [1, 2, 3], "cam": pandas.array([1, 2, 3], dtype="Int64")})
    assert read_table(frame, root=tmp_path).query.camids.tolist() == ["1", "2", "3"]
    frame.loc[1, "cam"] = pandas.NA
    with pytest.raises(ValueError, match="got row 1"):
        read_table(frame, root=tmp_path)


def test_paths_start_from_root_or_from_the_table(write, tmp_path, monkeypatch):
    path = write("path,pid", "0.jpg,1", f"{tmp_path}/1.jpg,2")
    monkeypatch.chdir("/")
    assert read_table(path).query.paths == (str(tmp_path / "0.jpg"), f"{tmp_path}/1.jpg")
    trees.touch(tmp_path, "elsewhere/0.jpg")
    assert read_table(path, root=tmp_path / "elsewhere").query.paths[0] == str(tmp_path / "elsewhere" / "0.jpg")
    monkeypatch.chdir(tmp_path)
    assert read_table(Frame(path=["0.jpg"], pid=[1])).query.paths == ("0.jpg",)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["path,camera", "0.jpg,1"],
            r"must have a column for identity \(identity: identity, pid, .*\), got path, camera",
        ),
        (["0.jpg,anna", "1.jpg,ben"], "must have a column for path and identity .* got 0.jpg, anna"),
        (["path,identity,identity", "0.jpg,1,2"], "must have one column 'identity', got several"),
        (["path,identity"], "must list at least one image, got none"),
        (["path,identity", "0.jpg,1", "1.jpg"], "must have 2 cells in each line, got 1 in line 3"),
        (["path,identity", "0.jpg,1,2"], "must have 2 cells in each line, got 3 in line 2"),
        (["path,identity", "0.jpg,", ",1", "1.jpg,"], "each image's path; empty cells are not allowed, got line 3"),
        (["path,identity", "0.jpg,", "", "1.jpg, "], "identity; empty cells are not allowed, got line 2, line 4"),
        (
            ["path,pid,cam", "0.jpg,1,", "1.jpg,1,2"],
            "camera .drop the column if there are none.; empty cells .* got line 2",
        ),
        (["path,pid,set", "0.jpg,1,val"], "must have a split of train, .*, test, got 'val' in line 2"),
        (
            ["path,pid", "0.jpg,1", "1.jpg,1", "x/../0.jpg,2"],
            "must have one row per image, got .*0.jpg in line 2 and line 4",
        ),
        (["path,pid,split", "0.jpg,1,query"], "must have images of query and gallery, or of test .*, got query"),
        (["path,pid,split", "0.jpg,1,train"], "or of test .*, got train"),
        (["path,pid,split", "0.jpg,1,test", "1.jpg,1,query", "2.jpg,1,gallery"], "got query and gallery and test"),
        (["path,pid", "0.jpg,1", "1.jpg,01"], "identity cells must differ as numbers too, got '01' and '1'"),
        (["path,pid,cam", "0.jpg,1,1", "1.jpg,1,001"], "camera cells must differ as numbers too, got '001' and '1'"),
        (["path,pid", "0.jpg,unknown"], "must have images of known identity, got 1 of 'unknown' alone"),
        (["path,pid", '0.jpg,"1'], "must be a CSV table, got an error in line 2"),
    ],
)
def test_tables_that_do_not_fit(lines, message, write):
    with pytest.raises(ValueError, match=message):
        read_table(write(*lines))


def test_missing_files_are_named_with_their_lines(write, tmp_path):
    lines = [f"gone{i}.jpg,1" for i in range(5)]
    with pytest.raises(
        FileNotFoundError, match=r"gone0\.jpg \(line 3\), .*gone2\.jpg \(line 5\), \.\.\. and 2 more\. Give"
    ):
        read_table(write("path,pid", "0.jpg,1", *lines))
    with pytest.raises(FileNotFoundError, match="There is no table"):
        read_table(tmp_path / "none.csv")


def test_optional_columns_without_any_cell_count_as_none(write):
    found = read_table(write("path,identity,camera,split", "0.jpg,anna,,", "1.jpg,anna, ,"))
    assert found.gallery.camids is None
    assert found.protocol == "leave-one-out"


def test_images_are_listed_whoever_is_on_them(write, tmp_path):
    rows = ["3.jpg,-1,,train", "0.jpg,anna,1,", "1.jpg,unknown,1,", f"{tmp_path}/2.jpg,01,x,val", "4.jpg,1,,"]
    assert listed_images(write("path,identity,camera,split", *rows)) == [tmp_path / f"{i}.jpg" for i in (3, 0, 2, 4)]
    for row, message in ((",anna", "each image's path"), ("./0.jpg,b", "one row per image")):
        with pytest.raises(ValueError, match=message):
            listed_images(write("path,identity", "0.jpg,a", row))
    gone = write("path,identity", "gone.jpg,a")
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg \(line 2\)\. Mend the paths, which start from the table's"):
        listed_images(gone)
    assert listed_images(gone, missing=True) == [tmp_path / "gone.jpg"]


def test_text_that_is_not_utf8(write):
    path = write("path,identity", "0.jpg,Käthe", encoding="latin-1")
    with pytest.raises(ValueError, match="must be UTF-8 text, got something else"):
        read_table(path)
