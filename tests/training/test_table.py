"""Tests of the tables of people, and of the commands that write them."""

from __future__ import annotations

import json
import pickle
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pose2id.cli import main
from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.io import whole_files as _outputs
from pose2id.io.images import image_files
from pose2id.poses import Pose, standard, write
from pose2id.training.table import PersonImage, read_table, table_of_folder, with_poses, with_valid_poses, write_table

HEADER = "path,identity,camera,keypoints\n"
HEIGHT, WIDTH = 32, 16


def keypoints(pose):
    """As a cell has them."""
    points = [point if seen else None for point, seen in zip(pose.keypoints.tolist(), pose.visible, strict=True)]
    return '"' + json.dumps(points) + '"'


def cell(points):
    return '"' + points.replace('"', '""') + '"'


@pytest.fixture
def table(tmp_path):
    """Writes a table and returns its path."""

    def with_content(content):
        path = tmp_path / "table.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return with_content


@pytest.fixture
def folder(tmp_path):
    """Makes images and returns their folder."""

    def of(*names, size=(WIDTH, HEIGHT)):
        for name in names:
            path = tmp_path / "people" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(path)
        return tmp_path / "people"

    return of


@pytest.fixture(scope="module")
def people():
    return SyntheticPedestrians(3, num_cameras=2, images_per_camera=2, seed=5)


def test_the_same_text_is_the_same_person(table):
    path = table(f"{HEADER}a.png, 1, 2,\nb.png,1 ,2,\nc.png,01,2,\n")
    assert [(image.identity, image.camera) for image in read_table(path)] == [("1", "2"), ("1", "2"), ("01", "2")]


def test_reading(table, tmp_path):
    front, back = standard()[:2]
    path = table(f"{HEADER}a.png,1,2,{keypoints(front)}\n/far/b.png,x y,,\nc/d.png,1,left,{keypoints(back)}\n")
    assert read_table(path) == [
        PersonImage(tmp_path / "a.png", "1", "2", front),
        PersonImage(Path("/far/b.png"), "x y"),
        PersonImage(tmp_path / "c" / "d.png", "1", "left", back),
    ]


def test_paths_are_those_of_the_table_wherever_one_stands(table, tmp_path, monkeypatch):
    table(f"{HEADER}a.png,1,,\n../b.png,1,,\n")
    monkeypatch.chdir(tmp_path.parent)
    found = read_table(f"{tmp_path.name}/table.csv")
    assert [image.path for image in found] == [Path(tmp_path.name, "a.png"), Path(tmp_path.name, "..", "b.png")]
    monkeypatch.chdir(tmp_path)
    assert [image.path for image in read_table("table.csv")] == [Path("a.png"), Path("../b.png")]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfpath,identity,camera,keypoints\na.png,\xc3\xa4,1,\n",  # a byte order mark, as Excel writes
        "path,identity,camera,keypoints\r\na.png,ä,1,\r\n",
        "\npath,identity,camera,keypoints\n\na.png,ä,1,\n\n",
        'path,identity,camera,keypoints\n"a.png","ä","1"," "',
        "age,camera,identity,path,colour\n30,1,ä,a.png,red\n",
    ],
)
def test_forms_of_the_same_table(content, table, tmp_path):
    assert read_table(table(content)) == [PersonImage(tmp_path / "a.png", "ä", "1")]


def test_columns_that_may_be_missing(table, tmp_path):
    assert read_table(table("identity,path\n1,a.png\n")) == [PersonImage(tmp_path / "a.png", "1")]


def test_a_keypoint_may_be_missing_or_outside(table):
    points = [None] * 16 + [[-0.5, 1.25], [0, 1]]
    (image,) = read_table(table(f"{HEADER}a.png,1,,{cell(json.dumps(points))}\n"))
    assert image.pose.visible.tolist() == [False] * 16 + [True, True]
    assert image.pose.keypoints[16:].tolist() == [[-0.5, 1.25], [0, 1]]


def test_round_trip(rng, tmp_path):
    given = []
    for i in range(50):
        points = rng.uniform(-1, 2, (18, 2))
        points[rng.random(18) < 0.3] = np.nan
        given.append(PersonImage(tmp_path / f"{i}.png", str(i % 7), str(i % 3), Pose(points)))
    halves = np.full((18, 2), np.nan)
    halves[:4] = [[0.0000005, 0.0000015], [-0.0000001, 0.1234565], [-1, 2], [1 / 3, 0.9999995]]
    given.append(PersonImage(tmp_path / "halves.png", "h", "", Pose(halves, "named")))
    odd = 'comma, "quote"\r and\nline ü.png'
    given += [PersonImage(tmp_path / odd, " spaces, too "), PersonImage(Path("/elsewhere/x.png"), "0007", "c")]
    write_table(given, tmp_path / "table.csv")
    found = read_table(tmp_path / "table.csv")
    assert found == given
    assert [image.pose and image.pose.key for image in found] == [image.pose and image.pose.key for image in given]
    assert found[50].pose.keypoints[1, 1] == round(found[50].pose.keypoints[1, 1], 6)
    assert "-0.0," not in (tmp_path / "table.csv").read_text()
    write_table(found, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "table.csv").read_bytes()


def test_written_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/images").mkdir(parents=True)
    given = ["data/images/a.png", "data/../data/b.png", "c.png", str(tmp_path / "data" / "d.png")]
    write_table([PersonImage(Path(path), "1") for path in given], "data/table.csv")
    written = [line.split(",")[0] for line in Path("data/table.csv").read_text().splitlines()[1:]]
    assert written == ["images/a.png", "b.png", (tmp_path / "c.png").as_posix(), "d.png"]
    # Images move with their table.
    Path("data").rename("moved")
    assert read_table("moved/table.csv")[0].path == Path("moved/images/a.png")


def test_paths_from_a_folder_that_moves_with_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/new").mkdir(parents=True)
    Path("linked").symlink_to("data/new")
    given = [PersonImage(Path(path), "1") for path in ("data/a.png", "data/new/b.png", "c.png")]
    absolute = [(Path.cwd() / image.path).as_posix() for image in given]

    def written(table):
        write_table(given, table, root="data")
        return [line.split(",")[0] for line in Path(table).read_text().splitlines()[1:]]

    assert written("data/new/table.csv") == ["../a.png", "b.png", absolute[2]]
    assert written("table.csv") == ["data/a.png", "data/new/b.png", "c.png"]
    # Whose ".." is data, not where the link stands; and a link to a folder that moved would lead elsewhere.
    assert written("linked/other.csv") == absolute


def test_a_table_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="or overwrite it"):
        write_table([PersonImage(Path("a.png"), "1")], path)
    assert path.read_text() == "precious"
    (tmp_path / "link.csv").symlink_to(path)
    write_table([PersonImage(tmp_path / "a.png", "1")], tmp_path / "link.csv", overwrite=True)
    assert (tmp_path / "link.csv").is_symlink()
    assert read_table(path) == read_table(tmp_path / "link.csv") == [PersonImage(tmp_path / "a.png", "1")]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(self, content):
        self.open("wb").close()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"table\.csv cannot be written: disk full"):
        write_table([PersonImage(Path("a.png"), "1")], tmp_path / "table.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "images must hold at least one image, got none"),
        (["a.png"], TypeError, r"images\[0\] must be a PersonImage .*got str"),
        (
            [PersonImage(Path("a.png"), "1"), PersonImage(Path("b/../a.png"), "2")],
            ValueError,
            r"each image once, got b/../a\.png again as images\[1\]",
        ),
        ([PersonImage(Path("caf\udce9.png"), "1")], ValueError, r"UTF-8 can hold, got .*caf\\udce9'. Rename the file"),
    ],
)
def test_what_no_table_can_hold(images, error, message, tmp_path):
    with pytest.raises(error, match=message):
        write_table(images, tmp_path / "table.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        (("a.png", "1"), TypeError, "path must be Path, got str"),
        ((Path("a.png"), 1), TypeError, "identity must be str, got int"),
        ((Path("a.png"), "1", 2), TypeError, "camera must be str, got int"),
        ((Path("a.png"), "1", "2", np.zeros((18, 2))), TypeError, r"pose must be Pose \| None, got ndarray"),
        ((Path("a.png"), " "), ValueError, r"identity must not be empty, got ' ' for a\.png"),
    ],
)
def test_what_no_image_of_a_person_is(attributes, error, message):
    with pytest.raises(error, match=message):
        PersonImage(*attributes)


def test_an_image_of_a_person_is_a_value():
    image = PersonImage(Path("a.png"), "1", "2", standard()[0])
    assert pickle.loads(pickle.dumps(image)) == image
    assert len({image, PersonImage(Path("a.png"), "1", "2", standard()[0])}) == 1
    assert image != PersonImage(Path("a.png"), "1", "2")


BAD = "must be empty or a JSON list of 18 entries"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 must be a header with path and identity.*got '' without path and identity"),
        ("a.png,1\nb.png,2\n", "line 1 must be a header.*got 'a.png,1' without path and identity"),
        ("\n\npath;identity\na.png;1\n", "line 3 must be a header.*got 'path;identity' without path and identity"),
        ("path,camera\na.png,1\n", "line 1 must be a header.*without identity"),
        ("path,identity\na.png,1\na\0b.png,1\n", "line 3.* must .*(NUL|no control characters, got 'a.x00b)"),
        ("path,identity\na\x1b[2J.png,1\n", r"line 2, column path must hold no control characters, got 'a\\x1b"),
        ("path,identity,path\na.png,1,b.png\n", "line 1 must name each column once, got path more than once"),
        (HEADER, "must have a line for each image below its header, got none"),
        (f"{HEADER}a.png,1,,\nb.png,1\n", "line 3 must have 4 cells, as the header, got 2"),
        (f"{HEADER}a.png,1,,[[0.5, 0.5], null]\n", "line 2 must have 4 cells.*got 6.*quotation marks"),
        (f"{HEADER},1,,\n", "line 2, column path must not be empty, got ''"),
        (f"{HEADER}a.png,1,,\n\nb.png, ,,\n", "line 4, column identity must not be empty, got ' '"),
        (f'{HEADER}"a\n.png",1,,\nb.png,,,\n', "line 4, column identity"),
        (f"{HEADER}a.png,1,,\nb.png,1,,\n./b/../a.png,2,,\n", r"line 4, column path must name another .* line 2"),
        (f'{HEADER}a.png,1,,\n"b.png,1,,\nc.png,1,,\n', "line 3 must be CSV"),
        (f'{HEADER}"a"x.png,1,,\n', "line 2 must be CSV"),
        (HEADER.encode() + b"a.png,1,,\ncaf\xe9.png,1,,\n", "line 3 must be UTF-8.*Save the table as UTF-8"),
        ("path,identity\n".encode("utf-16"), "line 1 must be UTF-8"),
        (f"{HEADER}a.png,1,,none\n", f"line 2, column keypoints {BAD}.*, got 'none'"),
        (f"{HEADER}a.png,1,,{'9' * 70}x\n", f"line 2, column keypoints {BAD}.*, got '{'9' * 60}...'"),
        (f"{HEADER}a.png,1,,{'[' * 9999}\n", f"line 2, column keypoints {BAD}"),
        (f"{HEADER}a.png,1,,{{}}\n", f"column keypoints {BAD}.*, got '{{}}'"),
        (f"{HEADER}a.png,1,,[null]\n", r"column keypoints: .*shape \(18, 2\).*got \(1, 2\)"),
        (
            HEADER + "a.png,1,," + cell(json.dumps([None] * 17 + [[1]])),
            r"keypoints\[17\] \(left_ear\) must be .*got \[1\]",
        ),
        (HEADER + "a.png,1,," + cell(json.dumps([None] * 17 + [[1, "x"]])), "column keypoints: .*array of numbers"),
        (HEADER + "a.png,1,," + cell(json.dumps([None] * 17 + [[1, [1]]])), "column keypoints: "),
        (HEADER + "a.png,1,," + cell(json.dumps([None] * 17 + [[1, 10**400]])), "column keypoints: "),
        (
            HEADER + "a.png,1,," + cell(json.dumps([None] * 17 + [[1, 32]])),
            r"column keypoints: .*\[17\].*lie in \[-1, 2\]",
        ),
        (HEADER + "a.png,1,," + cell(json.dumps([None] * 18)), "column keypoints: .*at least one visible keypoint"),
    ],
)
def test_bad_tables_are_named_with_line_and_column(content, message, table):
    path = table(content)
    with pytest.raises(ValueError, match=message) as error:
        read_table(path)
    assert str(error.value).startswith(str(path))


def test_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"table must be a CSV file, .*none\.csv cannot be read: No such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(OSError, match="table must be a CSV file, "):
        read_table(tmp_path)


def test_names_that_tell_identity_and_camera(folder, caplog):
    root = folder(
        "0002_c1s1_000451_03.jpg",
        "12_c2_7.jpg",
        "deeper/0002_c10_f0046302.png",
        "-1_c1s1_000401_03.jpg",
        "0000_c1s1_000151_01.jpg",
        ".hidden.jpg",
        ".hidden/x.jpg",
        "deeper/.thumbnails/y.jpg",
    )
    (root / "Thumbs.db").write_bytes(b"")
    assert table_of_folder(root) == [
        PersonImage(root / "0002_c1s1_000451_03.jpg", "0002", "1"),
        PersonImage(root / "12_c2_7.jpg", "12", "2"),
        PersonImage(root / "deeper" / "0002_c10_f0046302.png", "0002", "10"),
    ]
    assert caplog.messages == ["2 of 5 images left out: identities -1 (junk) and 0"]


def test_a_name_is_no_reason_to_read_the_image(tmp_path, caplog):
    (tmp_path / "1_c1.jpg").write_bytes(b"broken")
    assert table_of_folder(tmp_path) == [PersonImage(tmp_path / "1_c1.jpg", "1", "1")]
    assert not caplog.messages


def test_names_that_do_not_fit(folder):
    root = folder("1_c1.jpg", "a.jpg", "2-c1.jpg", "b.png", "-2_c1.jpg", "3_cx.png")
    with pytest.raises(
        ValueError, match=r"got 5 of 6 others: .*-2_c1\.jpg, .*2-c1\.jpg, .*3_cx\.png, \.\.\. and 2 more\."
    ):
        table_of_folder(root)
    with pytest.raises(ValueError, match=r"more\. Rename or move them, or list them in a CSV"):
        table_of_folder(root)
    in_folders = folder("f/anna/a.jpg", "f/bert/b.jpg") / "f"
    with pytest.raises(
        ValueError, match=r"b\.jpg\. identity=\"folder\" \(--identity folder\) takes them from the fold"
    ):
        table_of_folder(in_folders)


def test_folders_that_are_people(folder, monkeypatch):
    root = folder("anna/a.jpg", "anna/x_c3s2.jpg", "bert/c12_1.jpg", "bert/pic3_1.jpg", "0/c1.jpg")
    assert table_of_folder(root, identity="folder") == [
        PersonImage(root / "0" / "c1.jpg", "0"),
        PersonImage(root / "anna" / "a.jpg", "anna"),
        PersonImage(root / "anna" / "x_c3s2.jpg", "anna", "3"),
        PersonImage(root / "bert" / "c12_1.jpg", "bert", "12"),
        PersonImage(root / "bert" / "pic3_1.jpg", "bert"),
    ]
    monkeypatch.chdir(root)
    assert table_of_folder(".", identity="folder")[1] == PersonImage(Path("anna/a.jpg"), "anna")
    folder("stray.jpg")
    with pytest.raises(ValueError, match=r"must be in folders.* got 1 of 6 others: .*stray\.jpg\. Rename"):
        table_of_folder(root, identity="folder")
    with pytest.raises(ValueError, match=r"--identity name\) takes them from the names"):
        table_of_folder(folder("n/1_c1.jpg", "n/2_c1.jpg") / "n", identity="folder")


@pytest.mark.parametrize("junk", ["-1", "00-1", "-001", "0000", " -1 "])
def test_folders_of_junk_are_nobody(folder, caplog, junk):
    root = folder("007/a.jpg", "7/a.jpg", f"{junk}/a.jpg", f"deeper/{junk}/a.jpg")
    assert [image.identity for image in table_of_folder(root, identity="folder")] == ["007", "7"]
    assert caplog.messages == ["2 of 4 images left out: identities -1 (junk) and 0"]


def test_a_folder_0_is_a_person(folder):
    images = table_of_folder(folder("0/a.jpg", "1/a.jpg"), identity="folder")
    assert [image.identity for image in images] == ["0", "1"]


def test_lines_of_junk_are_nobody(tmp_path, caplog):
    path = tmp_path / "table.csv"
    path.write_text(
        "path,identity\n" + "".join(f"{i}.jpg,{who}\n" for i, who in enumerate(["-1", "0", "00-1", "0000", "-11"]))
    )
    assert [image.identity for image in read_table(path)] == ["0", "0000", "-11"]
    assert caplog.messages == [f"{path}: 2 of 5 images left out: identity -1 (junk)"]
    path.write_text("path,identity\na.jpg,-1\n")
    with pytest.raises(ValueError, match=r"must have a line for each image .* got 1 of identity -1 \(junk\)"):
        read_table(path)


def test_spaces_make_no_other_person(folder):
    with pytest.raises(ValueError, match=r"every person must have one folder, got 2 folders '1'"):
        table_of_folder(folder("1/a.jpg", " 1/a.jpg"), identity="folder")


def test_each_real_file_once(folder, tmp_path):
    root = folder("d/a.jpg", "d/b.jpg", ".hidden/c.jpg")
    for name, target in {"d/again": ".", "d/twice": ".", "d/up": "..", "a": "d"}.items():
        (root / name).symlink_to(target)
    folder("../elsewhere/e.jpg")
    (root / "f").symlink_to(tmp_path / "elsewhere")
    for name, target in {"g.jpg": "d/a.jpg", "h.jpg": ".hidden/c.jpg", "i.jpg": ".hidden/c.jpg"}.items():
        (root / name).symlink_to(root / target)
    assert sorted(image_files(root)) == [
        ("", str(root / "h.jpg")),
        ("d", str(root / "d" / "a.jpg")),
        ("d", str(root / "d" / "b.jpg")),
        ("f", str(root / "f" / "e.jpg")),
    ]


def test_folders_in_folders_that_would_make_one_person_of_two(folder):
    root = folder("anna/cam1/a.jpg", "bert/cam1/a.jpg", "bert/cam2/a.jpg")
    with pytest.raises(ValueError, match=r"got 2 folders 'cam1': .*anna.cam1, .*bert.cam1\. Move"):
        table_of_folder(root, identity="folder")
    assert len(table_of_folder(root / "bert", identity="folder")) == 2


def test_folders_at_different_depths(folder):
    root = folder("anna/cam1/a.jpg", "anna/cam2/a.jpg", "bert/a.jpg")
    with pytest.raises(ValueError, match=r"must all be at one depth .* got .*anna.cam2.a\.jpg, .*bert.a\.jpg\. Move"):
        table_of_folder(root, identity="folder")
    assert [image.identity for image in table_of_folder(root / "anna", identity="folder")] == ["cam1", "cam2"]


def test_folders_without_people(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*nowhere"):
        table_of_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="must hold image files, and has none"):
        table_of_folder(tmp_path)
    with pytest.raises(ValueError, match="must show people, got 2 of identities"):
        table_of_folder(folder("-1_c1.jpg", "0000_c2.jpg"))


def test_arguments_are_checked_before_the_folder_is_read(tmp_path):
    with pytest.raises(ValueError, match="identity must be one of 'name', 'folder', got 'file'"):
        table_of_folder(tmp_path, identity="file")
    with pytest.raises(ValueError, match="keypoints and detector must not both be given"):
        table_of_folder(tmp_path, keypoints=tmp_path, detector=lambda image: ([], []))


def in_pixels(pose, size, visible=18):
    """A person as OpenPose writes it."""
    points = np.nan_to_num(pose.keypoints) * size[::-1]
    seen = pose.visible & (np.arange(18) < visible)
    return {"pose_keypoints_2d": np.column_stack([points, seen]).ravel().tolist()}


def test_keypoints_from_files(folder, tmp_path):
    root = folder("1_c1.jpg", "2_c1.jpg", "3_c1.jpg", "deeper/1_c1.jpg", "5_c1.jpg")
    folder("4_c1.jpg", size=(64, 128))
    jsons = tmp_path / "jsons"
    (jsons / "deeper").mkdir(parents=True)
    front, other = standard()[0], standard()[3]
    write([front], jsons / "1_c1.json")
    people = [
        in_pixels(other, (HEIGHT, WIDTH), 9),
        in_pixels(front, (HEIGHT, WIDTH)),
        in_pixels(other, (HEIGHT, WIDTH)),
    ]
    assert front.visible.sum() == other.visible.sum() == 18
    (jsons / "2_c1.json").write_text(json.dumps({"people": people}))
    (jsons / "3_c1.json").write_text(json.dumps({"people": []}))
    (jsons / "4_c1.json").write_text(json.dumps({"people": [in_pixels(other, (128, 64))]}))
    (jsons / "deeper" / "1_c1.json").write_text(json.dumps({"people": people[:1] + people[2:]}))
    found = {
        image.path.relative_to(root).as_posix(): image.pose
        for image in table_of_folder(root, keypoints=jsons, progress=False)
    }
    assert found == {
        "1_c1.jpg": front,
        "2_c1.jpg": front,  # as many keypoints as the third
        "3_c1.jpg": None,
        "4_c1.jpg": other,
        "5_c1.jpg": None,
        "deeper/1_c1.jpg": other,
    }


def test_pixels_are_those_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    (tmp_path / "people").mkdir()
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "people" / "1_c1.jpg", exif=exif)
    (tmp_path / "1_c1.json").write_text(json.dumps({"people": [in_pixels(standard()[0], (HEIGHT, WIDTH))]}))
    (image,) = table_of_folder(tmp_path / "people", keypoints=tmp_path)
    assert image.pose == standard()[0]


def test_bad_keypoint_files(folder, tmp_path, caplog):
    root = folder("1_c1.jpg", "2_c1.jpg")
    with pytest.raises(
        ValueError, match=r"has none for any of 2 images\. Looked for .*none.1_c1\.json, .*2_c1\.json\."
    ):
        table_of_folder(root, keypoints=tmp_path / "none")
    (tmp_path / "2_c1.json").write_text("{}")
    for image in ("whole", "broken"):
        caplog.clear()
        if image == "broken":
            (root / "2_c1.jpg").write_bytes(b"broken")
        assert [row.pose for row in table_of_folder(root, keypoints=tmp_path)] == [None, None]
        assert "1 of 2 images have no file of keypoints" in caplog.text
        assert "1 of 2 images have keypoints that cannot be used" in caplog.text
        said = {"whole": "2_c1.json cannot be read as poses", "broken": "image 2_c1.jpg cannot be read"}[image]
        assert said in caplog.text


def test_openpose_appends_to_the_name_of_its_files(folder, tmp_path):
    root = folder("1_c1.jpg", "2_c1.jpg")
    write([standard()[0]], tmp_path / "1_c1_keypoints.json")
    write([standard()[1]], tmp_path / "2_c1.json")
    assert [row.pose for row in table_of_folder(root, keypoints=tmp_path)] == list(standard()[:2])


def detector_of(pose):
    """Finds `pose` on tall images, and nobody on others."""

    def detector(image):
        height, width = image.shape[:2]
        coco = pose.to_coco(size=(height, width))[None]
        return (coco[..., :2], coco[..., 2]) if height > width else ([], [])

    return detector


def test_keypoints_from_a_detector(folder):
    root = folder("1_c1.jpg", "3_c2.jpg")
    folder("2_c1.jpg", size=(HEIGHT, WIDTH))
    found = table_of_folder(root, detector=detector_of(standard()[0]), progress=False)
    assert [(image.identity, image.camera) for image in found] == [("1", "1"), ("2", "1"), ("3", "2")]
    expected = Pose.from_coco(standard()[0].to_coco())
    assert [image.pose for image in found] == [expected, None, expected]
    with pytest.raises(TypeError, match="model must be callable"):
        table_of_folder(root, detector="rtmlib")


def test_drawn_people_come_back_as_they_were_drawn(people, tmp_path):
    path = write_people(people, tmp_path / "new" / "drawn", progress=False)
    assert path == tmp_path / "new" / "drawn" / "table.csv"
    images = read_table(path)
    assert len(images) == len(people)
    for image, sample in zip(images, people, strict=True):
        with Image.open(image.path) as picture:
            np.testing.assert_array_equal(np.asarray(picture), sample.image)
        assert (int(image.identity), int(image.camera)) == (sample.pid, sample.camid)
        assert image.path.name == f"{sample.pid:04d}_c{sample.camid}_{sample.index}.png"
        np.testing.assert_array_equal(image.pose.visible, sample.visible)
        difference = image.pose.keypoints[sample.visible] - sample.keypoints[sample.visible]
        assert np.abs(difference).max() <= 5.1e-7
    # Their names say who they are, too.
    assert [(i.path, i.identity, i.camera) for i in table_of_folder(path.parent)] == [
        (i.path, i.identity, i.camera) for i in images
    ]
    assert sorted(item.name for item in path.parent.iterdir()) == ["images", "table.csv"]


def test_a_person_of_whom_nothing_is_visible_has_no_pose(people, tmp_path):
    samples = people[:2]
    samples[1].visible[:] = False
    images = read_table(write_people(samples, tmp_path))
    assert [image.pose is None for image in images] == [False, True]


def test_drawn_people_go_to_an_empty_folder(people, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    for target in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            write_people(people, target)
    assert [item.name for item in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_write_leaves_nothing_and_can_be_done_again(people, tmp_path, monkeypatch):
    samples, save = people[:4], Image.Image.save
    written = []

    def interrupted(self, target, *args):
        if len(written) == 2:
            Path(target).write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(target)
        save(self, target, *args)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_people(samples, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Image.Image, "save", save)
    assert len(read_table(write_people(samples, tmp_path))) == 4
    assert sorted(item.name for item in tmp_path.iterdir()) == ["images", "table.csv"]


def test_a_table_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    path, link = tmp_path / "table.csv", _outputs._link

    def late(source, target):
        path.write_text("precious")
        link(source, target)

    monkeypatch.setattr(_outputs, "_link", late)
    with pytest.raises(FileExistsError, match="created by another process"):
        write_table([PersonImage(Path("a.png"), "1")], path)
    assert path.read_text() == "precious"


def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["draw-people", "drawn", "--people", "2", "--cameras", "3", "--images", "1", "--seed", "7"]) == 0
    path = Path("drawn", "table.csv")
    assert capsys.readouterr().out == f"wrote {path}: 6 images of 2 people, 6 with keypoints, drawn by code\n"
    drawn = read_table(path)
    with Image.open(drawn[-1].path) as picture:
        sample = SyntheticPedestrians(2, num_cameras=3, images_per_camera=1, seed=7)[-1]
        np.testing.assert_array_equal(np.asarray(picture), sample.image)
    given = ["draw-people", "night", "--people", "2", "--cameras", "3", "--images", "1", "--seed", "7"]
    assert main([*given, "--infrared", "2", "3"]) == 0
    capsys.readouterr()
    infrared = [np.ptp(np.asarray(Image.open(image.path)).astype(int), axis=2).max() == 0 for image in drawn]
    assert not any(infrared)
    seen = read_table(Path("night", "table.csv"))
    assert [image.camera for image in seen if not np.ptp(np.asarray(Image.open(image.path)), axis=2).any()] == list(
        "2323"
    )

    Path("jsons", "images").mkdir(parents=True)
    for image in drawn[:2]:
        write([image.pose], Path("jsons", "images", image.path.stem + ".json"))
    command = ["table", "drawn", "people.csv"]
    assert main([*command, "--keypoints", "jsons"]) == 0
    assert capsys.readouterr().out == "wrote people.csv: 6 images of 2 people, 2 with keypoints\n"
    assert [image.pose for image in read_table("people.csv")] == [image.pose for image in drawn[:2]] + [None] * 4

    assert main(command) == 2
    assert "people.csv exists" in capsys.readouterr().err
    assert main([*command, "--identity", "folder", "--overwrite"]) == 0
    assert capsys.readouterr().out == (
        "wrote people.csv: 6 images of 1 people, 0 with keypoints\n"
        "To train on them, some need keypoints: --keypoints DIR or --detect.\n"
    )
    found = read_table("people.csv")
    assert [image.path for image in found] == [image.path for image in drawn]
    assert found[-1] == PersonImage(drawn[-1].path, "images", "3")


def test_the_command_detects(folder, tmp_path, capsys, monkeypatch):
    root, out = folder("1_c1.jpg", "2_c1.jpg"), tmp_path / "table.csv"
    folder("3_c1.jpg", size=(HEIGHT, WIDTH))
    rtmlib = types.SimpleNamespace(Body=lambda **_: detector_of(standard()[0]))
    monkeypatch.setitem(sys.modules, "rtmlib", rtmlib)
    assert main(["table", str(root), str(out), "--detect"]) == 0
    assert capsys.readouterr().out == f"wrote {out}: 3 images of 3 people, 2 with keypoints\n"
    assert [image.pose is None for image in read_table(out)] == [False, False, True]
    monkeypatch.setitem(sys.modules, "rtmlib", None)
    assert main(["table", str(root), str(out), "--detect", "--overwrite"]) == 2
    assert 'pip install "pose2id[pose]"' in capsys.readouterr().err


def upside_down(pose):
    return Pose(pose.keypoints * (1, -1) + (0, 1))


def test_the_command_leaves_out_poses_that_are_not_valid(folder, tmp_path, capsys, caplog):
    root, out = folder("1_c1.jpg", "2_c1.jpg", "3_c1.jpg"), str(tmp_path / "table.csv")
    for name, pose in (("1_c1", standard()[0]), ("2_c1", upside_down(standard()[1]))):
        write([pose], tmp_path / f"{name}.json")
    command = ["table", str(root), out, "--keypoints", str(tmp_path), "--overwrite"]
    assert main(command) == 0
    assert "2 with keypoints" in capsys.readouterr().out
    assert main([*command, "--poses", "valid"]) == 0
    assert capsys.readouterr().out == f"wrote {out}: 3 images of 3 people, 1 with keypoints\n"
    told = caplog.messages[-1]
    assert told.startswith("1 of 2 poses left out, not valid: 2_c1.jpg (positions: head height ")
    assert re.search(r"\. By rule: .*torso lean 1", told)
    assert [image.pose is None for image in read_table(out)] == [False, True, True]
    assert main(["table", str(root), out, "--poses", "valid", "--overwrite"]) == 2
    assert "--poses valid must come with keypoints" in capsys.readouterr().err


def test_whether_a_pose_is_valid_depends_on_its_image_s_proportions(folder):
    root = folder("1_c1.jpg", size=(60, 120))
    folder("2_c1.jpg", size=(120, 120))
    images = table_of_folder(root)
    found = with_valid_poses(with_poses(images, [standard()[2]] * 2))
    assert [image.pose for image in found] == [standard()[2], None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table", "nowhere", "table.csv"], "there is no directory nowhere"),
        (["table", ".", "table.txt"], "end in .csv"),
        (["table", ".", "no/table.csv"], "There is no folder no"),
        (["table", ".", "table.csv"], "must hold image files"),
        (["draw-people", "new", "--people", "0"], "--people must be at least 1"),
        (["draw-people", "new", "--cameras", "0"], "--cameras must be at least 1"),
        (["draw-people", "new", "--images", "0"], "--images must be at least 1"),
        (["draw-people", "new", "--seed", "-1"], "seed must be at least 0"),
    ],
)
def test_bad_words(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_words_that_exclude_one_another(capsys):
    with pytest.raises(SystemExit):
        main(["table", ".", "table.csv", "--detect", "--keypoints", "jsons"])
    assert "not allowed with" in capsys.readouterr().err
