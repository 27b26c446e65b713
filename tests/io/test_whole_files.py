from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pose2id.io.whole_files import new_directory, new_file, whole_directory, whole_file, write_files


def test_a_new_file(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link.txt"
    link.symlink_to(path)
    assert new_file(path) == new_file(str(link)) == path.resolve()
    path.write_text("precious")
    assert new_file(link, overwrite=True) == path.resolve()
    for taken in (path, link):
        with pytest.raises(FileExistsError, match=rf"^{taken} exists\. Choose another name\.$"):
            new_file(taken)
        with pytest.raises(
            FileExistsError,
            match=rf"^{taken} exists\. Choose another name, or overwrite it \(overwrite=True, --overwrite\)\.$",
        ):
            new_file(taken, overwrite=False)
    with pytest.raises(FileNotFoundError, match=rf"^There is no folder {tmp_path}/no\.$"):
        new_file(tmp_path / "no" / "a.txt")
    assert new_file(tmp_path / "B.PNG", suffixes=(".svg", ".png")).name == "B.PNG"
    with pytest.raises(ValueError, match=rf"^{tmp_path}/b must end in \.svg or \.png\.$"):
        new_file(tmp_path / "b", suffixes=(".svg", ".png"))


def test_a_new_directory(tmp_path):
    assert new_directory(str(tmp_path)) == tmp_path
    assert new_directory(tmp_path / "new" / "deeper") == tmp_path / "new" / "deeper"
    (tmp_path / "a.txt").write_text("precious")
    for taken in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(FileExistsError, match=rf"^{taken} exists and is not empty\. Choose another\.$"):
            new_directory(taken)


KILLED = """
import os, signal, sys
from pathlib import Path
from pose2id.io.whole_files import whole_directory, whole_file
folder = Path(sys.argv[1])
with whole_directory(folder / "new", last="b.txt") as unfinished, whole_file(folder / "a.txt") as file:
    (unfinished / "b.txt").write_text("half")
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="nobody is asked there whether a process lives")
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    others = tmp_path / ".a.txt.0123456789abcdef"
    others.write_text("precious")
    (left,) = tmp_path.glob(".a.txt.*[!f]")
    assert left.read_text() == "half"
    with whole_file(tmp_path / "b.txt") as alive:
        alive.write_text("b")
        with whole_file(tmp_path / "a.txt") as file:
            assert set(tmp_path.glob(".*")) == {others, alive}
            file.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    with whole_directory(tmp_path / "new", last="b.txt") as unfinished:
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            new_directory(tmp_path / "new")
        for name in ("a.txt", "b.txt"):
            (unfinished / name).write_text("whole")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.txt", "b.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, "a.txt", "b.txt", "new"]


MOVING = """
import os, signal, sys
from pathlib import Path
from pose2id.io.whole_files import whole_directory
folder, event, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = []
def kill(name, _):
    if name == event:
        seen.append(name)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
with whole_directory(folder, last="b.txt") as unfinished:
    for name in ("a.txt", "b.txt", "c.txt"):
        (unfinished / name).write_text("new")
    (unfinished / "d").mkdir()
    (unfinished / "d" / "e.txt").write_text("new")
    sys.addaudithook(kill)
"""


@pytest.mark.skipif(os.name == "nt", reason="nobody is asked there whether a process lives")
@pytest.mark.parametrize(
    ("event", "number", "left"),
    [("os.rename", 1, []), ("os.rename", 3, ["a.txt", "c.txt"]), ("os.rename", 4, ["a.txt", "c.txt", "d"])],
)
def test_a_directory_killed_while_it_is_moved_is_begun_anew(tmp_path, event, number, left):
    killed = subprocess.run([sys.executable, "-c", MOVING, tmp_path, event, str(number)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in sorted(tmp_path.iterdir()) if not path.name.startswith(".")] == left
    with whole_directory(tmp_path, last="b.txt") as unfinished:
        (unfinished / "b.txt").write_text("again")
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


@pytest.mark.skipif(os.name == "nt", reason="nobody is asked there whether a process lives")
@pytest.mark.parametrize(("event", "number"), [("os.rename", 3), ("shutil.rmtree", 1)])
def test_what_is_whole_or_of_others_stays(tmp_path, event, number):
    killed = subprocess.run([sys.executable, "-c", MOVING, tmp_path, event, str(number)], check=False)
    assert killed.returncode == -signal.SIGKILL
    kept = {"a.txt"}
    if event == "os.rename":  # in place of a moved one
        (tmp_path / "other").write_text("precious")
        (tmp_path / "other").replace(tmp_path / "a.txt")
    else:
        kept = {"a.txt", "b.txt", "c.txt", "d"}
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        new_directory(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def together(folder, **options):
    write_files({folder / name: name.encode() for name in ("c.txt", "a.txt", "b.txt")}, **options)


def shown(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("replace", [True, False])
def test_files_that_belong_together(tmp_path, replace):
    together(tmp_path, replace=replace)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt", "c.txt"}
    assert shown(tmp_path) == {"a.txt": "a.txt", "b.txt": "b.txt", "c.txt": "c.txt"}


NAMING = """
import os, signal, sys
from pathlib import Path
from pose2id.io.whole_files import write_files
folder, event, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = []
def kill(name, _):
    if name == event:
        seen.append(name)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
write_files({folder / name: b"new" for name in ("c.txt", "a.txt", "b.txt")}, replace=event == "os.rename")
"""


@pytest.mark.skipif(os.name == "nt", reason="nobody is asked there whether a process lives")
@pytest.mark.parametrize("event", ["os.rename", "os.link"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_kill_between_names_leaves_no_last_file(tmp_path, event, number):
    killed = subprocess.run([sys.executable, "-c", NAMING, tmp_path, event, str(number)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert shown(tmp_path) == dict.fromkeys(["c.txt", "a.txt"][: number - 1], "new")
    assert len([path for path in tmp_path.glob(".*") if path.read_text() == "new"]) == 3 - (number - 1) * (
        event == "os.rename"
    )  # all were whole
    together(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt", "c.txt"}


@pytest.mark.parametrize("taken", ["a.txt", "b.txt", "c.txt"])
def test_files_that_belong_together_are_all_there_or_none(tmp_path, taken):
    (tmp_path / taken).write_text("precious")
    with pytest.raises(FileExistsError, match=rf"{taken} was created by another process in the meantime"):
        together(tmp_path, replace=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {taken: "precious"}
    (tmp_path / taken).unlink()
    (tmp_path / taken).mkdir()  # which no file replaces
    with pytest.raises(OSError, match=rf"{taken} cannot be written: Is a directory\."):
        together(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [taken]


def test_a_file_that_cannot_be_written_is_named_among_several(tmp_path, monkeypatch):
    write, given = Path.write_bytes, []

    def full(path, content):
        given.append(path)
        if len(given) == 2:
            raise OSError(28, "No space left")
        write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"[/\\]a\.txt cannot be written: No space left\.$"):
        together(tmp_path)
    assert list(tmp_path.iterdir()) == []


LONG = "a" * 300


@pytest.mark.parametrize("make", [new_file, new_directory])
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (f"{LONG}.txt", OSError, rf"{LONG}\.txt cannot be written: File name too long\."),
        ("file/a.txt", FileExistsError, r"file must be a folder, and .*file is a file\."),
        ("file/deeper/a.txt", FileExistsError, r"file.deeper must be a folder, and .*file is a file\."),
    ],
    ids=["long", "in a file", "below a file"],
)
def test_where_nothing_can_be_written(tmp_path, make, name, error, message):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(error, match=message):
        make(tmp_path / name)


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"a\\x00b' cannot be the name of a file: embedded null byte\."):
        new_file(tmp_path / "a\0b")


def test_the_longest_name_that_the_system_has(tmp_path):
    with whole_file(tmp_path / LONG[:255]) as unfinished:
        unfinished.write_text("whole")
    assert (tmp_path / LONG[:255]).read_text() == "whole"


def test_a_clean_up_that_fails_hides_no_error(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system", "clean-up")

    def write():
        with whole_file(tmp_path / "a.txt") as unfinished:
            unfinished.write_text("half")
            raise OSError(28, "No space left")

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(OSError, match=r"a\.txt cannot be written: No space left\."):
        write()
