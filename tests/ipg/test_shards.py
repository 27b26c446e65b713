"""Generated pictures in shards behind URLs: what a folder would hold, whole or not there, read as from a folder."""

from __future__ import annotations

import builtins
import io
import itertools
import json
import os
import re
import secrets
import shutil
import sys
import tarfile
import threading
import zlib
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import tiny
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from huggingface_hub import HfFileSystem
from PIL import Image

from pose2id import Centralizer, Extractor, PictureFolder, poses
from pose2id.cli import main
from pose2id.extractor import Preprocess
from pose2id.io import urls
from pose2id.ipg import generate_files
from pose2id.ipg import shards as shards_module
from pose2id.ipg.batch import Written, missing_pictures
from pose2id.ipg.folder import read_note
from pose2id.ipg.shards import Shards, ShardWriter

FEW = poses.standard()[:2]
OPTIONS = {"poses": FEW, "num_inference_steps": 1, "progress": False}
NAMES = ("a.png", "cam1/a.jpg", "b.v2.50%.png", "ordner.x/Zoë 木.png")


@pytest.fixture(scope="module")
def generator():
    return tiny.generator()


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A directory of images whose names a tar and WebDataset could stumble over."""
    root = tmp_path_factory.mktemp("data") / "people"
    pixels = np.random.default_rng(1).integers(0, 256, (len(NAMES), 60, 30, 3), dtype=np.uint8)
    for name, picture in zip(NAMES, pixels, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / name)
    return root


@pytest.fixture(scope="module")
def folder(generator, people, tmp_path_factory):
    """What `generate_files` writes into a folder."""
    root = tmp_path_factory.mktemp("folder")
    generate_files(generator, [people], root, **OPTIONS)
    return root


_numbers = itertools.count()


@pytest.fixture(params=["memory", "file", "hf"])
def url(request, tmp_path, monkeypatch):
    """A folder that is not there yet; that of the Hub in a repository in which who has this token may write."""
    if request.param == "hf":
        monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
        request.getfixturevalue("hub").add("anna/pictures", {"README.md": b""})
        HfFileSystem.clear_instance_cache()
        return "hf://anna/pictures/deep/out"
    return f"memory://of-test-{next(_numbers)}/out" if request.param == "memory" else f"file://{tmp_path}/deep/out"


@pytest.fixture
def memory():
    return f"memory://of-test-{next(_numbers)}"


def paths(url):
    """Name to path of the files behind a URL; names of shards without their random part."""
    filesystem, path = fsspec.core.url_to_fs(url)
    found = filesystem.ls(path, detail=False) if filesystem.exists(path) else []
    names = {re.sub(r"(?<=\d)-[0-9a-f]{8}(?=\.)", "", path.rpartition("/")[2]): path for path in found}
    assert len(names) == len(found)
    return names


def listed(url):
    """Name to content of the files behind a URL."""
    filesystem, _ = fsspec.core.url_to_fs(url)
    return {name: filesystem.cat_file(path) for name, path in paths(url).items()}


def put(url, name, content):
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.makedirs(path, exist_ok=True)
    filesystem.pipe_file(paths(url).get(name, f"{path}/{name}"), content)


def members(content, tmp_path):
    (tmp_path / "shard.tar").write_bytes(content)
    with tarfile.open(tmp_path / "shard.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def sample(content, times=1):
    """An image's pictures as a caller hands them over, that are no PNG files at all."""
    return [(content * times, {"image": content.decode(), "pose": pose}) for pose in "xy"]


def fill(url, *names, **options):
    with ShardWriter(Shards(url), **options) as writer:
        for name in names:
            writer.write(name, sample(name.encode()))


def test_a_shard_holds_the_files_of_a_folder_as_webdataset_wants_them(generator, people, folder, url, tmp_path):
    assert generate_files(generator, [people], url, **OPTIONS) == Written(8, 0)
    found = listed(url)
    assert set(found) == {"pictures-000000.tar", "pictures-000000.json"}
    inside = members(found["pictures-000000.tar"], tmp_path)
    keys = {"a": "a", "cam1/a": "cam1/a", "b%2Ev2%2E50%25": "b.v2.50%", "ordner.x/Zoë 木": "ordner.x/Zoë 木"}
    expected = {f"{key}.pose{m}.png": folder / f"pose{m}" / f"{name}.png" for key, name in keys.items() for m in (1, 2)}
    assert inside == {member: path.read_bytes() for member, path in expected.items()}
    # WebDataset: files that follow each other, up to the first dot of the last part of their names, are one sample.
    split = [re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member).groups() for member in inside]
    samples = [(key, [end for _, end in some]) for key, some in itertools.groupby(split, lambda pair: pair[0])]
    assert sorted(samples) == sorted((key, ["pose1.png", "pose2.png"]) for key in keys)

    index = json.loads(found["pictures-000000.json"])
    assert index["size"] == len(found["pictures-000000.tar"])
    of_image = index["images"]["b.v2.50%"]
    for m, (offset, size, crc32, note) in enumerate(of_image["pictures"], 1):
        path = folder / f"pose{m}" / "b.v2.50%.png"
        assert found["pictures-000000.tar"][offset : offset + size] == path.read_bytes()
        assert crc32 == zlib.crc32(path.read_bytes())
        assert {"image": of_image["image"], **index["notes"][note]} == read_note(path)


def test_they_are_read_as_from_a_folder(generator, people, folder, url):
    generate_files(generator, [people], url, **OPTIONS)
    images = [people / name for name in NAMES]
    for given in (None, FEW):
        source = PictureFolder(url, given)
        assert repr(source) == f"PictureFolder({url!r}, num_poses=2)"
        of_folder = PictureFolder(folder, given)(images)
        for pictures, expected in zip(source(images), of_folder, strict=True):
            for picture, path in zip(pictures, expected, strict=True):
                with Image.open(path) as saved:
                    assert np.array_equal(picture, saved)

    def model(batch):
        return batch.flatten(1)[:, ::97]

    extractor = Extractor(model, transform=Preprocess((32, 16), (0.5,) * 3, (0.5,) * 3), batch_size=3)
    expected = Centralizer(extractor, generated=folder)(images, progress=False)
    assert torch.equal(Centralizer(extractor, generated=url)(images, progress=False), expected)
    assert [*PictureFolder(url, num_poses=0)(images)] == [[]] * len(images)
    # One of them alone, and fewer poses.
    one = Centralizer(extractor, generated=url, num_poses=1)(images[1:2], progress=False)
    assert torch.equal(one, Centralizer(extractor, generated=folder, num_poses=1)(images[1:2], progress=False))


def test_a_folder_with_shards_is_read_by_its_path(generator, people, folder, tmp_path):
    generate_files(generator, [people], f"file://{tmp_path}/out", **OPTIONS)
    images, copies = [people / "a.png", people / "b.v2.50%.png"], tmp_path / "copies"
    copied = PictureFolder(tmp_path / "out").files(images, copies)
    assert copied == [[copies / f"pose{m}" / path.name for m in (1, 2)] for path in images]
    expected = [[(folder / f"pose{m}" / path.name).read_bytes() for m in (1, 2)] for path in images]
    assert [[path.read_bytes() for path in row] for row in copied] == expected
    # Copies are kept, unless they are no more what they were.
    written = copied[0][0].stat().st_mtime_ns
    copied[1][1].write_bytes(b"other")
    PictureFolder(tmp_path / "out").files(images, copies)
    assert copied[0][0].stat().st_mtime_ns == written
    assert copied[1][1].read_bytes() == expected[1][1]


def test_a_second_run_writes_what_is_missing(generator, people, url):
    assert generate_files(generator, [people / "a.png"], url, root=people, **OPTIONS) == Written(2, 0)
    first = listed(url)
    settings = {"poses": FEW, "num_inference_steps": 1}
    assert missing_pictures(generator, [people], url, **settings) == 6
    assert listed(url) == first
    assert generate_files(generator, [people], url, **OPTIONS) == Written(6, 2)
    both = listed(url)
    assert set(both) == {f"pictures-00000{n}.{end}" for n in (0, 1) for end in ("tar", "json")}
    assert {name: both[name] for name in first} == first
    assert generate_files(generator, [people], url, **OPTIONS) == Written(0, 8)
    assert listed(url) == both


def test_others_are_not_put_before_them_unasked(generator, people, memory, caplog):
    image = [people / "a.png"]
    generate_files(generator, image, memory, **OPTIONS)
    before = listed(memory)
    other = {**OPTIONS, "seed": 1}
    with pytest.raises(FileExistsError, match=rf"2 files are .*; {memory}: pose1/a.png is the .*different in: seed\."):
        generate_files(generator, image, memory, **other)
    with pytest.raises(FileExistsError, match="must not hold pictures in more than 1 poses, got pose2"):
        generate_files(generator, image, memory, **{**OPTIONS, "poses": FEW[:1]})
    assert listed(memory) == before
    assert generate_files(generator, image, memory, overwrite=True, **other) == Written(2, 0)
    assert {name: listed(memory)[name] for name in before} == before
    assert generate_files(generator, image, memory, **other) == Written(0, 2)
    [[picture, _]] = PictureFolder(memory)(image)
    assert np.array_equal(picture, generator.generate(image, FEW, num_inference_steps=1, seed=1, progress=False)[0][0])
    # Further poses: an image's pictures stay together, and those of before fit.
    more = {**other, "poses": poses.standard()[:3]}
    assert generate_files(generator, image, memory, **more) == Written(3, 0)
    assert len(PictureFolder(memory).poses) == 3
    assert not caplog.messages


def test_many_images_are_many_shards(memory):
    names = [f"n{i}" for i in range(7)]
    fill(memory, *names, images=3)
    fill(memory, "late", images=3)
    assert sorted(listed(memory)) == sorted(f"pictures-00000{n}.{end}" for n in range(4) for end in ("tar", "json"))
    shards = Shards(memory)
    assert [*shards] == [*names, "late"]
    found = shards.find([f"/data/{name}.jpg" for name in names], 2)
    assert [*shards.contents(found)] == [[name.encode()] * 2 for name in names]
    assert found[6][1].note == {"image": "n6", "pose": "y"}
    by_size = f"{memory}/by-size"
    with ShardWriter(Shards(by_size), size=10_000) as writer:
        for name in names:
            writer.write(name, sample(name.encode(), 1500))
    assert len(listed(by_size)) == 2 * 4  # 7 images of twice 3,000 bytes


def test_more_images_than_are_asked_for_at_once(memory):
    names = [f"{i:03}" for i in range(70)]
    fill(memory, *names)
    shards = Shards(memory)
    for order in (names[::-1], names[::7] * 3):
        found = shards.find([f"{name}.jpg" for name in order], 2)
        assert [*shards.contents(found)] == [[name.encode()] * 2 for name in order]


def test_images_that_follow_each_other_come_together(memory, monkeypatch):
    asked = []
    ranges = MemoryFileSystem.cat_ranges

    def seen(filesystem, paths, starts, ends):
        asked.append([(end or 0) - (start or 0) for start, end in zip(starts, ends, strict=True)])
        return ranges(filesystem, paths, starts, ends)

    with ShardWriter(Shards(memory)) as writer:
        for name in "abcdef":
            writer.write(name, sample(name.encode(), 1 << 20))
    shards = Shards(memory)
    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", seen)
    small = shards.find(["a.jpg", "c.jpg", "b.jpg", "e.jpg"], 1)
    assert [*shards.contents(small)] == [[name * (1 << 20)] for name in (b"a", b"c", b"b", b"e")]
    assert asked.pop() == [1 << 20] * 4  # between them are pictures that nobody wants
    whole = shards.find(["f.jpg", "c.jpg", "b.jpg", "a.jpg"], 2)
    assert [[len(file) for file in files] for files in shards.contents(whole)] == [[1 << 20] * 2] * 4
    assert asked == [[2_097_664] * 4]  # two of them would be more than a request is for
    with ShardWriter(shards) as writer:
        for name in "xyz":
            writer.write(name, sample(name.encode(), 1000))
    asked.clear()
    assert [files[0][:1] for files in shards.contents(shards.find(["z.jpg", "x.jpg", "y.jpg"], 2))] == [
        b"z",
        b"x",
        b"y",
    ]
    assert asked[-1] == [6 * 1536 - 512 - 24]  # headers between them, and no padding behind the last


class KilledError(Exception):
    """In place of a signal that ends the process."""


def killed(*_, **__):
    raise KilledError


def test_a_shard_without_index_is_not_there(memory):
    fill(memory, "a")
    put(memory, "pictures-000001-00000000.tar", b"of a run that was killed")
    assert [*Shards(memory)] == ["a"]
    with pytest.raises(ValueError, match=r"must hold 2 pictures .* missing for 1 of 2: images\[1\] \(b.jpg\)"):
        Shards(memory).find(["a.jpg", "b.jpg"], 2)
    first = listed(memory)["pictures-000000.tar"]
    fill(memory, "b", "c", "d")
    shards = Shards(memory)
    assert [*shards.contents(shards.find(["d.jpg", "a.jpg"], 2))] == [[b"d"] * 2, [b"a"] * 2]
    filesystem, path = fsspec.core.url_to_fs(memory)
    assert filesystem.cat_file(f"{path}/pictures-000001-00000000.tar") == b"of a run that was killed"
    filesystem.rm_file(f"{path}/pictures-000001-00000000.tar")
    assert set(listed(memory)) == {f"pictures-00000{n}.{end}" for n in (0, 1) for end in ("tar", "json")}
    assert listed(memory)["pictures-000000.tar"] == first


@pytest.fixture
def failing(monkeypatch):
    """Make copies to files behind URLs fail in their middle: those that `when(path)` says; gives all paths.

    The Hub gets small files in one request, which fails.
    """

    def fail(when, error):
        def copy(source, target, length):
            at = str(getattr(target, "path", None) or target.name)
            tried.append(at)
            if when(at):
                target.write(source.read(10))
                raise error
            copyfileobj(source, target, length)

        def request(filesystem, path, content):
            tried.append(path)
            if when(path):
                raise error
            pipe_file(filesystem, path, content)

        copyfileobj, pipe_file, tried = shutil.copyfileobj, HfFileSystem.pipe_file, []
        monkeypatch.setattr(HfFileSystem, "pipe_file", request)
        monkeypatch.setattr(urls, "shutil", SimpleNamespace(copyfileobj=copy))
        monkeypatch.setattr(urls, "_WAITS", (0, 0, 0))
        return tried

    return fail


@pytest.mark.parametrize("where", [".tar", ".json"])
def test_nothing_is_left_of_a_shard_that_fails(url, failing, where):
    fill(url, "a")
    before = listed(url)
    tried = failing(lambda path: where in path, KilledError())
    with pytest.raises(OSError, match=rf"pictures-000001-[0-9a-f]{{8}}\{where} cannot be written: KilledError"):
        fill(url, "b")
    assert len(tried) == (1 if where == ".tar" else 2)
    # Under their names they appear whole: the Hub's files do.
    assert all(("/.pictures-" in path) != url.startswith("hf") for path in tried)
    assert listed(url) == before


@pytest.mark.parametrize("where", [".tar", ".json"])
def test_what_fails_for_a_moment_is_tried_again(url, failing, where, caplog):
    tried = failing(lambda path: where in path and len(tried) < 4, ConnectionResetError("reset by peer"))
    fill(url, "a", "b")
    assert len(tried) == (5 if where == ".tar" else 4)
    assert caplog.text.count("is written again") == (3 if where == ".tar" else 2)
    assert "reset by peer" in caplog.text
    assert set(listed(url)) == {"pictures-000000.tar", "pictures-000000.json"}
    shards = Shards(url)
    assert [*shards.contents(shards.find(["a.jpg", "b.jpg"], 2))] == [[b"a"] * 2, [b"b"] * 2]
    tried.clear()
    failing(lambda path: True, ConnectionResetError("reset by peer"))
    with pytest.raises(OSError, match="cannot be written: reset by peer"):
        fill(url, "c")
    assert set(listed(url)) == {"pictures-000000.tar", "pictures-000000.json"}


def test_a_list_beside_them_is_whole_or_as_before(url, failing):
    shards = Shards(url)
    shards.write_beside("list.csv", io.BytesIO(b"first of two"))
    shards.write_beside("list.csv", io.BytesIO(b"second of two"))
    failing(lambda path: True, KilledError())
    with pytest.raises(OSError, match=r"list\.csv cannot be written: KilledError"):
        shards.write_beside("list.csv", io.BytesIO(b"third, of which half is written"))
    assert listed(url) == {"list.csv": b"second of two"}
    shards.write_beside("list.csv", None)
    shards.write_beside("list.csv", None)
    assert listed(url) == {}


@pytest.mark.parametrize("url", ["hf"], indirect=True)
def test_what_is_too_large_for_one_request(url, failing, monkeypatch):
    monkeypatch.setattr(urls, "_AT_ONCE", 0)
    fill(url, "a")
    before = listed(url)
    assert set(before) == {"pictures-000000.tar", "pictures-000000.json"}
    failing(lambda path: ".tar" in path, KilledError())
    with pytest.raises(OSError, match="cannot be written: KilledError"):
        fill(url, "b")
    assert listed(url) == before
    assert [*Shards(url)] == ["a"]


def test_a_run_that_fails_keeps_whole_images(generator, people, memory, monkeypatch, folder):
    iterate, write = generator.generate_iter, ShardWriter.write
    written = threading.Semaphore(0)

    def interrupted(*args, **options):
        yield from itertools.islice(iterate(*args, **options), 3)
        for _ in range(3):
            assert written.acquire(timeout=60)
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "write", lambda *given: (write(*given), written.release()))
    monkeypatch.setattr(generator, "generate_iter", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        generate_files(generator, [people], memory, batch_size=2, **OPTIONS)
    monkeypatch.setattr(generator, "generate_iter", iterate)
    assert generate_files(generator, [people], memory, batch_size=2, **OPTIONS) == Written(2, 6)
    sources = PictureFolder(memory), PictureFolder(folder)
    for pictures, expected in zip(*(source([people / name for name in NAMES]) for source in sources), strict=True):
        assert [np.array(picture).shape for picture in pictures] == [(256, 128, 3)] * len(expected)


def test_the_first_error_is_the_one_that_is_raised(memory, monkeypatch, caplog):
    monkeypatch.setattr(MemoryFileSystem, "open", killed)

    def failing():
        with ShardWriter(Shards(memory)) as writer:
            writer.write("a", sample(b"a"))
            raise KeyError("the first")

    with pytest.raises(KeyError, match="the first"):
        failing()
    assert "cannot be written: KilledError" in caplog.text


def test_an_image_that_is_interrupted_leaves_the_others_whole(memory, monkeypatch, tmp_path):
    addfile, added = tarfile.TarFile.addfile, []

    def interrupted(tar, info, file):
        added.append(info.name)
        if len(added) == 4:
            tar.fileobj.write(b"half a picture")
            raise KeyboardInterrupt
        addfile(tar, info, file)

    monkeypatch.setattr(tarfile.TarFile, "addfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(memory, "a", "b")
    assert [*Shards(memory)] == ["a"]
    assert members(listed(memory)["pictures-000000.tar"], tmp_path) == {f"a.pose{m}.png": b"a" for m in (1, 2)}


@pytest.mark.parametrize("larger", ["first", "second"])
def test_two_runs_that_choose_one_number_lose_nothing(memory, monkeypatch, larger):
    opened, parts = MemoryFileSystem.open, iter(["11111111", "22222222"][:: 1 if larger == "second" else -1])

    def meanwhile(*args, **options):
        monkeypatch.setattr(MemoryFileSystem, "open", opened)
        fill(memory, "b", "both")
        read_meanwhile.refresh()
        return opened(*args, **options)

    read_meanwhile, writer = Shards(memory), ShardWriter(Shards(memory))
    writer.write("a", sample(b"a", 20_000))
    writer.write("both", sample(b"first"))
    monkeypatch.setattr(MemoryFileSystem, "open", meanwhile)
    token_hex = secrets.token_hex
    monkeypatch.setattr(shards_module, "secrets", SimpleNamespace(token_hex=lambda n: next(parts, token_hex(n))))
    writer.finish()
    filesystem, path = fsspec.core.url_to_fs(memory)
    ends = {f"pictures-000000-{part * 8}.{end}" for part in "12" for end in ("tar", "json")}
    assert {name.rpartition("/")[2] for name in filesystem.ls(path, detail=False)} == ends
    read_meanwhile.refresh()
    for shards in (Shards(memory), read_meanwhile):
        found = shards.find(["a.jpg", "b.jpg", "both.jpg"], 2)
        expected = b"first" if larger == "first" else b"both"
        assert [*shards.contents(found)] == [[b"a" * 20_000] * 2, [b"b"] * 2, [expected] * 2]


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_shard(generator, people, url, caplog, damage):
    image = [people / "a.png"]
    generate_files(generator, image, url, **OPTIONS)
    source = PictureFolder(url)
    filesystem, _ = fsspec.core.url_to_fs(url)
    if damage == "gone":
        filesystem.rm(paths(url)["pictures-000000.tar"])
    else:
        put(url, "pictures-000000.tar", listed(url)["pictures-000000.tar"][:-512])
    given = "it is gone" if damage == "gone" else r"it has \d+"
    with pytest.raises(
        ValueError, match=rf"pictures-000000-\w{{8}}.tar must have the \d+ bytes of its index, and {given}"
    ):
        source(image)
    assert not caplog.messages
    assert generate_files(generator, image, url, **OPTIONS) == Written(2, 0)
    assert len([line for line in caplog.messages if "are made anew" in line]) == 1
    [pictures] = source(image)
    assert len(pictures) == 2


def test_a_damaged_picture(memory):
    fill(memory, "a", "b")
    content = listed(memory)["pictures-000000.tar"]
    shards = Shards(memory)
    offset = shards.pictures("b")[1].offset
    put(memory, "pictures-000000.tar", content[:offset] + b"!" + content[offset + 1 :])
    a, b = shards.find(["a.jpg", "b.jpg"], 2)
    assert [*shards.contents([a, b[:1]])] == [[b"a"] * 2, [b"b"]]
    with pytest.raises(
        ValueError, match=r"pictures-000000-\w{8}.tar:b.pose2.png must be what its index says, and is damaged"
    ):
        [*shards.contents([b])]


INDEX = {"size": 1024, "notes": [{}], "images": {"x": {"image": None, "pictures": [[512, 3, 0, 0]]}}}
BAD = {
    "torn": json.dumps(INDEX)[:-5],
    "a list": "[]",
    "no size": json.dumps({**INDEX, "size": None}),
    "no notes": json.dumps({**INDEX, "notes": []}),
    "no numbers": json.dumps({**INDEX, "images": {"x": {"image": None, "pictures": [[512, 3.0, 0, 0]]}}}),
    "deep": "[" * 100_000,
    "outside": json.dumps({**INDEX, "size": 514}),
    **{
        name: json.dumps({**INDEX, "images": {name: INDEX["images"]["x"]}})
        for name in ("/etc/x", "../x", "a/../../x", "", "a//b")
    },
}


@pytest.mark.parametrize("name", ["a\\..\\..\\x", "a/c:/x", "c:x"])
def test_names_that_lead_out_of_a_folder_on_windows(memory, caplog, monkeypatch, name):
    put(memory, "pictures-000000-0123abcd.json", json.dumps(INDEX).replace('"x"', json.dumps(name)).encode())
    if os.name != "nt":
        assert [*Shards(memory)] == [name]
    monkeypatch.setattr(shards_module, "os", SimpleNamespace(name="nt", fspath=os.fspath))
    assert not len(Shards(memory))
    assert "path below a folder" in caplog.text


@pytest.mark.parametrize("bad", BAD)
def test_an_index_that_is_none_counts_as_none(memory, caplog, bad):
    put(memory, "pictures-000000-0123abcd.json", json.dumps(INDEX).encode())
    assert [*Shards(memory)] == ["x"]
    assert not caplog.messages
    put(memory, "pictures-000000-0123abcd.json", BAD[bad].encode())
    assert not len(Shards(memory))
    assert "pictures-000000-0123abcd.json is no whole index, and its shard is left out" in caplog.text
    fill(memory, "a")
    assert [*Shards(memory)] == ["a"]
    assert set(listed(memory)) == {"pictures-000000.json", "pictures-000001.json", "pictures-000001.tar"}
    assert listed(memory)["pictures-000000.json"].decode() == BAD[bad]


def test_pictures_of_other_people_and_poses_are_refused(generator, people, memory, tmp_path):
    image = [people / "a.png"]
    generate_files(generator, image, memory, **OPTIONS)
    with pytest.raises(ValueError, match=r"pictures-000000-\w{8}.tar:a.pose1.png is in another pose than poses\[0\]"):
        PictureFolder(memory, FEW[::-1])(image)
    Image.new("RGB", (30, 60), "red").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"pictures must be of images\[0\] .*a.pose1.png was made from another image"):
        PictureFolder(memory)([tmp_path / "a.png"])


def test_names(memory):
    fill(memory, "a", "cam1/a", "x.y")
    shards = Shards(memory)
    found = shards.find(["/data/cam1/a.jpg", "/data/cam2/a.jpg", "/data/x.y.jpg"], 2)
    assert [pictures[0].name for pictures in found] == ["cam1/a", "a", "x.y"]
    with pytest.raises(ValueError, match=r"images must have pictures of their own, but .* both get those of a"):
        shards.find(["/data/cam2/a.jpg", "/data/cam3/a.jpg"], 2)
    with pytest.raises(ValueError, match=rf"{memory} must hold 2 pictures .* missing for 1 of 2: images\[1\]"):
        shards.find(["a.jpg", "b.jpg"], 2)
    with pytest.raises(TypeError, match=r"images\[0\] must be a path"):
        shards.find([Image.new("RGB", (8, 8))], 2)
    for name, pictures in (("a", []), ("", sample(b"a")), ("../a", sample(b"a"))):
        with pytest.raises(ValueError, match="name must be"), ShardWriter(shards) as writer:
            writer.write(name, pictures)
    writer = ShardWriter(shards)
    writer.write("twice", sample(b"a"))
    with pytest.raises(ValueError, match="name must be that of a new image"):
        writer.write("twice", sample(b"a"))
    writer.finish()
    with pytest.raises(ValueError, match="must be of one image"), ShardWriter(shards) as writer:
        writer.write("two", [*sample(b"a"), *sample(b"b")])


def test_places_without_pictures(generator, people, memory, tmp_path):
    with pytest.raises(ValueError, match=r"directory must hold shards of pictures .*has none, got 'memory://"):
        PictureFolder(memory)
    fill(memory, "a")
    with pytest.raises(ValueError, match=r"num_poses must be at most 2, .* got 3"):
        PictureFolder(memory, num_poses=3)
    with pytest.raises(ValueError, match="grid must be False for a URL"):
        generate_files(generator, [people], memory, grid=True, **OPTIONS)
    with pytest.raises(ValueError, match="must be of a protocol that fsspec knows, got nowhere://"):
        PictureFolder("nowhere://a/b")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/out cannot be read: "):
        generate_files(generator, [people / "a.png"], f"file://{tmp_path}/file/out", **OPTIONS)


def test_a_url_must_not_be_a_path(generator, people, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a URL must be given as a string"):
        PictureFolder(Path("s3://bucket/x"))
    with pytest.raises(ValueError, match="a URL must be given as a string"):
        generate_files(generator, [people], Path("memory://x"), **OPTIONS)
    assert not [*tmp_path.iterdir()]
    assert not any(map(urls.is_url, [Path("a:b/c"), Path("C:/x"), PureWindowsPath("C:/x"), Path("x/s3:"), Path()]))


def test_packages_that_are_not_installed(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **options):
        if name.partition(".")[0] in missing:
            raise ImportError(f"No module named {name!r}")
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    missing = {"s3fs"}
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(ImportError, match=r"s3:// needs another package: pip install s3fs \("):
        PictureFolder("s3://bucket/generated")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(
        ImportError, match=r's3://b needs the extra "distributed": pip install "pose2id\[distributed\]"'
    ):
        PictureFolder("s3://b")


@pytest.fixture(scope="module")
def weights(generator, tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights") / "tiny"
    generator.save_pretrained(directory)
    return directory


MODEL = """
from pose2id import Extractor
from pose2id.extractor import Preprocess

extractor = Extractor(lambda batch: batch.mean(3).flatten(1), transform=Preprocess((8, 4), (0.5,) * 3, (0.2,) * 3))
"""


def test_the_commands(generator, weights, tmp_path, capsys, monkeypatch):
    (tmp_path / "my_shard_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    for name in ("p0/0.png", "p0/1.png", "p1/0.png", "p1/1.png"):
        Path("people", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)).save(Path("people", name))
    poses.write(FEW, "poses.json")
    url = f"file://{tmp_path}/out"
    generate = ["generate", "people", "--weights", str(weights), "--steps", "1", "--poses", "poses.json"]
    generate += ["--device", "cpu", "--out"]
    for more, told in (
        (["--dry-run"], "8 pictures to generate"),
        ([], f"wrote 8 pictures to {url}\n"),
        ([], f"wrote 0 pictures to {url}; 8 were there already\n"),
    ):
        assert main([*generate, url, *more]) == 0
        assert capsys.readouterr().out.startswith(told)
    assert sorted(listed(url)) == ["pictures-000000.json", "pictures-000000.tar"]
    assert main([*generate, "folder"]) == 0
    capsys.readouterr()
    evaluate = ["evaluate", "people", "--model", "my_shard_model:extractor", "--workers", "0", "--cache", "cache"]
    tables = []
    for place in (url, "folder", url):
        assert main([*evaluate, "--generated", place, "--json"]) == 0
        tables.append(json.loads(capsys.readouterr().out))
    assert tables[0] == tables[1] == tables[2]
    assert any(row["name"] == "IPG" for row in tables[0]["rows"])
    # Finished pictures are not drawn again.
    other = f"file://{tmp_path}/other"
    generate_files(generator, ["people"], other, root=".", **OPTIONS)
    assert [*Shards(other)] == [f"people/p{pid}/{i}" for pid in (0, 1) for i in (0, 1)]
    monkeypatch.setattr("pose2id.IdentityGenerator.from_pretrained", killed)
    capsys.readouterr()
    assert main([*evaluate, "--generated", other, "--weights", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == tables[0]["rows"]
    # Others are, beside those that are there.
    with pytest.raises(KilledError):
        main([*evaluate, "--generated", url, "--weights", "tiny"])
    with pytest.raises(KilledError):
        main([*evaluate, "--generated", f"file://{tmp_path}/none", "--weights", "tiny"])
    assert main([*evaluate, "--generated", f"file://{tmp_path}/none"]) == 2
    assert "pose2id: --generated must hold shards of pictures" in capsys.readouterr().err
