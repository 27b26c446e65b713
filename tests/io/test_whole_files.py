from __future__ import annotations

import os
import signal
import subprocess
import sys

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
