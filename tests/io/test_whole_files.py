from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pose2id.io.whole_files import new_directory, new_file, whole_directory, whole_file


def test_a_new_file(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link.txt"
    link.symlink_to(path)
    assert new_file(path) == new_file(str(link)) == path.resolve()
    path.write_text("precious")
    assert new_file(link, overwrite=True) == path.resolve()
    for taken in (path, link):
        with pytest.raises(FileExistsError, match=rf"^{taken} exists\. Choose another name\.$"):
            new_file(taken)
        with pytest.raises(FileExistsError, match=rf"^{taken} exists\. Choose another name, or overwrite it\.$"):
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
