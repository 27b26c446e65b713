from __future__ import annotations

import pytest

from pose2id.io.whole_files import new_directory, new_file


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
