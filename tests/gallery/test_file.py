"""Galleries as files: they come back the same, are whole whatever ends a save, and damage is told."""

from __future__ import annotations

import itertools
import os
import random
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from pose2id import Centralizer, Gallery
from pose2id.gallery import file as gallery_file

METHODS = ("auto", "guarded", "cameras", "centring", "nfc")
WITH_CAMERAS = [*((method, True) for method in METHODS), ("auto", False), ("guarded", False), ("nfc", False)]
STATES = 4  # of the gallery that `serve` saves


def people(n, seed=0, dim=16, of=40):
    """Features of people, each seen several times, and cameras, of which each sees everybody."""
    rng, at = np.random.default_rng(seed), np.arange(n)
    centres = np.random.default_rng(99).standard_normal((of, dim))
    return (centres[at % of] + 0.25 * rng.standard_normal((n, dim))).astype(np.float32), at // of % 3


def lived_in(method, cameras, *, strings=False, tensors=False):
    """A gallery with gaps and images that came after its last refit."""
    x, camids = people(150)
    x = torch.from_numpy(x) if tensors else x
    ids = [f"image {at}" if strings else 7 * at for at in range(150)]
    labels = [[f"Zoë {at % 40}", at, at / 8, None][at % 4] for at in range(150)]
    camids = np.array([["left", "right", "4"][c] for c in camids]) if strings else camids
    gallery = Gallery(Centralizer(method=method), metadata={"model": "m", "list": [1, None]}, refit_share=None)
    for some in (slice(0, 120), slice(120, 150)):
        gallery.add(x[some], ids[some], camids[some] if cameras else None, labels[some])
    gallery.remove([ids[3], ids[77], ids[130]])
    gallery.update(ids[10:12], x[20:22] * 1.5 + 0.1)
    return gallery


def found(gallery, *, cameras, words):
    """Everything that can be asked of a gallery, as bytes and lists."""
    x, camids = people(60, seed=5)
    x = torch.from_numpy(x) if isinstance(gallery.features(), torch.Tensor) else x
    camids = [["left", "right", "new"][c] for c in camids] if words else [*camids[:-1], 3]
    known = {"query_camids": camids} if cameras else {}
    asked = [
        gallery.search(x, 5, **known),
        gallery.search(x, 200, **known, exclude_camera=cameras),
        gallery.search(x[:3], 5, rerank="k-reciprocal"),
    ]
    if cameras:
        asked.append(gallery.search(x[:3], 5, query_camids=camids[:3], rerank="camera"))
    arrays = [gallery.features(), gallery.features(raw=True), *(result.distances for result in asked)]
    told = [gallery.ids, *(values for result in asked for values in result[1:])]
    facts = len(gallery), gallery.dim, gallery.reason, gallery.evidence, gallery.metadata, gallery.refit_share
    settings = gallery.centralizer.method, gallery.centralizer.k1, gallery.centralizer.k2
    return (
        [(type(array), array.dtype, tuple(array.shape), np.asarray(array).tobytes()) for array in arrays],
        [(values.dtype, values.tolist()) for values in told],
        (*facts, *settings),
    )


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("method", "cameras"), WITH_CAMERAS)
@pytest.mark.parametrize(("strings", "tensors", "mmap"), [(False, False, True), (True, True, False)])
def test_a_gallery_comes_back_and_lives_on_the_same(method, cameras, strings, tensors, mmap, tmp_path):
    path, words = tmp_path / "g.safetensors", strings and cameras
    gallery = lived_in(method, cameras, strings=strings, tensors=tensors)
    gallery.save(path)
    whole = path.read_bytes()
    before = found(gallery, cameras=cameras, words=words)
    assert found(Gallery.load(path, mmap=not mmap), cameras=cameras, words=words) == before
    loaded = Gallery.load(path, mmap=mmap)
    assert found(loaded, cameras=cameras, words=words) == before
    x, camids = people(12, seed=8)
    x = torch.from_numpy(x) if tensors else x
    camids = [["left", "right", "third"][c] for c in camids] if words else camids
    for change in (
        lambda g: g.add(x, [f"n{at}" for at in range(12)] if strings else None, camids if cameras else None),
        lambda g: g.remove(g.ids[[0, 40, -2]]),
        lambda g: g.update(g.ids[[5, -1]], x[:2] * 2),
        lambda g: g.refit(),
    ):
        change(gallery)
        change(loaded)
        after = found(gallery, cameras=cameras, words=words)
        assert after != before
        assert found(loaded, cameras=cameras, words=words) == after
        before = after
    assert path.read_bytes() == whole
    loaded.save(path)
    assert found(Gallery.load(path), cameras=cameras, words=words) == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dim", [None, 16])
@pytest.mark.parametrize("emptied", [False, True])
def test_an_empty_gallery_comes_back_empty(dim, emptied, mmap, tmp_path):
    gallery = Gallery(Centralizer(k1=3, k2=4), dim=dim, metadata={"who": "nobody"})
    if emptied:
        gallery.remove(gallery.add(people(5)[0]))
    gallery.save(tmp_path / "g.safetensors")
    loaded = Gallery.load(tmp_path / "g.safetensors", mmap=mmap)
    assert (len(loaded), loaded.dim, loaded.metadata) == (0, 16 if emptied else dim, {"who": "nobody"})
    assert (loaded.search(people(2)[0], 3).ids == -1).all()
    for one in (gallery, loaded):
        one.add(people(50)[0])
    assert loaded.ids[0] == (5 if emptied else 0)
    assert found(loaded, cameras=False, words=False) == found(gallery, cameras=False, words=False)


def test_arrays_left_in_the_file_are_aligned(tmp_path):
    # numpy copies what is not aligned, at each query.
    for method in ("guarded", "cameras"):
        gallery = lived_in(method, True)
        gallery.add(people(1, seed=3)[0], camids=[0])  # an odd number of booleans
        gallery.save(tmp_path / "g.safetensors")
        state = Gallery.load(tmp_path / "g.safetensors", mmap=True)._content.state
        columns = [getattr(some, name) for some in (state.images, state.linked) for name in some.columns]
        assert len(columns) >= 6
        assert [array.data_ptr() % array.element_size() for array in columns] == [0] * len(columns)


# ---- Other processes.


def states():
    """Galleries of different sizes, which differ in everything."""
    made = []
    for at in range(STATES):
        n = 300 + 40 * at
        gallery = Gallery(Centralizer(method="centring"), refit_share=None)
        x, camids = people(n, seed=at, dim=256)
        gallery.add(x, np.arange(n) * STATES + at, camids, [f"{at}/{row}" for row in range(n)])
        made.append(gallery)
    return made


def serve(path):
    """Of a process that forks one for each line, a number from which to count saves, and how many: 0 for ever."""
    torch.set_num_threads(1)
    galleries = states()
    for line in sys.stdin:
        number, count = map(int, line.split())
        if not (child := os.fork()):
            _save_again_and_again(galleries, path, number, count)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def _save_again_and_again(galleries, path, number, count):
    try:
        done = os.open(f"{path}.done", os.O_WRONLY | os.O_CREAT)
        for at in range(number, number + count) if count else itertools.count(number):
            gallery = galleries[at % STATES]
            gallery.metadata = {"number": at}
            gallery.save(path)
            os.pwrite(done, at.to_bytes(8, "little"), 0)
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
        os._exit(1)
    os._exit(0)


class Savers:
    """A process that has imported everything, which takes seconds, and forks one for each series of saves."""

    def __init__(self, path):
        paths = [str(ROOT / "tests"), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.path = path
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import test_file; test_file.serve({str(path)!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )

    def start(self, number, count=0):
        """A process that saves: its id."""
        self._process.stdin.write(f"{number} {count}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self):
        """Its exit status, once it has ended."""
        return int(self._process.stdout.readline())

    def done(self):
        """The number of the last save that returned."""
        return int.from_bytes(Path(f"{self.path}.done").read_bytes(), "little")

    def close(self):
        self._process.communicate()


@pytest.fixture(scope="module")
def expected():
    x = people(5, seed=9, dim=256)[0]
    made = []
    for gallery in states():
        distances, ids, labels = gallery.search(x, 4)
        made.append((gallery.ids.tolist(), gallery.features(raw=True), gallery.features(), distances, ids, labels))
    return x, made


def number_of(gallery, expected):
    """Which save a gallery is of; all of it must be."""
    x, made = expected
    number = gallery.metadata["number"]
    got = gallery.ids.tolist(), gallery.features(raw=True), gallery.features(), *gallery.search(x, 4)
    for ours, theirs in zip(got, made[number % STATES], strict=True):
        assert np.array_equal(ours, theirs), number
    return number


@pytest.fixture
def savers(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    savers = Savers(tmp_path / "g.safetensors")
    yield savers
    savers.close()


def test_a_save_that_is_killed_leaves_a_whole_gallery(savers, expected, tmp_path, stress):
    moments, last, left = random.Random(0), 0, 0
    savers.start(0, 1)
    assert savers.end() == 0
    for kills in range(200):
        if kills >= (100 if stress else 10) and left:  # some must be killed while they write
            break
        child = savers.start(last + 1)
        time.sleep(moments.uniform(0.01, 0.15))
        os.kill(child, 9)
        assert savers.end() == -9
        number = number_of(Gallery.load(savers.path), expected)
        assert number in (savers.done(), savers.done() + 1)
        assert number >= last
        last = number
        assert len(leftovers(tmp_path)) <= 1  # the next process has removed what the one before left
        left += len(leftovers(tmp_path))
    assert last > 10
    assert left
    savers.start(last + 1, 1)
    assert savers.end() == 0
    assert leftovers(tmp_path) == []
    assert number_of(Gallery.load(savers.path), expected) == last + 1


def test_a_gallery_is_consistent_while_another_process_replaces_it(savers, expected, stress):
    savers.start(0, 1)
    assert savers.end() == 0
    first = Gallery.load(savers.path, mmap=True)
    child, numbers, loads = savers.start(1), [], 0
    stop = time.monotonic() + (20 if stress else 3)
    try:
        while time.monotonic() < stop:
            for _ in range(10):  # opened often, looked at now and then
                gallery = Gallery.load(savers.path, mmap=loads % 4 > 0)
                at = gallery.metadata["number"] % STATES
                assert len(gallery) == len(expected[1][at][0])
                assert gallery.search(expected[0][:1], 1).labels[0, 0] == expected[1][at][5][0, 0]
                loads += 1
            numbers.append(number_of(gallery, expected))
    finally:
        os.kill(child, 9)
        assert savers.end() == -9
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 10
    assert number_of(first, expected) == 0  # the file that it was opened from


# ---- Damage.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a gallery's file, and where its arrays begin."""
    path = tmp_path_factory.mktemp("whole") / "g.safetensors"
    lived_in("guarded", True, strings=True).save(path)
    data = path.read_bytes()
    return data, 8 + int.from_bytes(data[:8], "little")


def test_a_flipped_byte_is_told(whole, tmp_path, stress):
    data, start = whole
    path, rng = tmp_path / "g.safetensors", random.Random(1)
    positions = [*range(8), start - 1, start, len(data) - 1]
    positions += range(8, start) if stress else rng.sample(range(8, start), 25)
    positions += rng.sample(range(start, len(data)), 2000 if stress else 25)
    opened = 0
    for at in positions:
        flipped = bytearray(data)
        flipped[at] ^= rng.choice([1, 2, 4, 16, 32, 128, 255])
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"g\.safetensors"):
            Gallery.load(path)
        with pytest.raises(ValueError, match=r"g\.safetensors") if at < start else suppress(ValueError):
            Gallery.load(path, mmap=True)
            opened += 1
    assert opened > 5  # arrays are not read


def test_a_shortened_or_longer_file_is_told(whole, tmp_path):
    data, start = whole
    path = tmp_path / "g.safetensors"
    lengths = [0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, (start + len(data)) // 2, len(data) - 1]
    for damaged in (*(data[:length] for length in lengths), data + b"\0", data[8:], data * 2):
        path.write_bytes(damaged)
        for mmap in (False, True):
            with pytest.raises(ValueError, match=r"g\.safetensors"):
                Gallery.load(path, mmap=mmap)
    path.write_bytes(data)
    assert len(Gallery.load(path)) == 147


def test_names_are_checked_wherever_arrays_are(whole, tmp_path):
    data, start = whole
    path = tmp_path / "g.safetensors"
    path.write_bytes(data[:start] + data[start:].replace(b'"image 20"', b'"image 2O"', 1))
    assert path.read_bytes() != data
    for mmap in (False, True):
        with pytest.raises(ValueError, match="names changed"):
            Gallery.load(path, mmap=mmap)


def others(folder):
    """Files that are no gallery, all with a gallery's ending."""
    (folder / "text.safetensors").write_text("not a gallery")
    (folder / "empty.safetensors").write_bytes(b"")
    with (folder / "npz.safetensors").open("wb") as file:
        np.savez(file, a=np.ones(3))
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")
    save_file({"a": torch.ones(3)}, folder / "list.safetensors", metadata={"pose2id": "[1]"})
    return sorted(folder.glob("*.safetensors"))


def test_other_files_are_neither_loaded_nor_replaced(tmp_path):
    gallery = Gallery(dim=3)
    files = others(tmp_path)
    assert len(files) == 5
    for path in files:
        data = path.read_bytes()
        for mmap in (False, True):
            with pytest.raises(ValueError, match=path.name):
                Gallery.load(path, mmap=mmap)
        with pytest.raises(FileExistsError, match=f"{path.name} is not a gallery"):
            gallery.save(path)
        assert path.read_bytes() == data
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        Gallery.load(folder)
    with pytest.raises(FileExistsError, match="is not a gallery"):
        gallery.save(folder)
    with pytest.raises(FileNotFoundError):
        Gallery.load(tmp_path / "none.safetensors")
    assert leftovers(tmp_path) == []


def test_a_later_version_is_refused_and_so_is_another_method(tmp_path, monkeypatch):
    path = tmp_path / "g.safetensors"
    gallery = Gallery(Centralizer(method="guarded"))
    gallery.save(path)
    with pytest.raises(ValueError, match=r"method.*guarded.*nfc"):
        Gallery.load(path, Centralizer(method="nfc"))
    assert Gallery.load(path, given := Centralizer(method="guarded")).centralizer is given
    with monkeypatch.context() as patch:
        patch.setattr(gallery_file, "VERSION", 2)
        gallery.save(path)
    with pytest.raises(ValueError, match=r"g\.safetensors must be of version 1, got version 2"):
        Gallery.load(path)
    gallery.save(path)  # a gallery all the same
    Gallery.load(path)


def test_a_save_that_fails_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "g.safetensors"
    gallery = lived_in("nfc", False)
    gallery.save(path)
    whole = path.read_bytes()
    gallery.remove([0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))  # as a full disk
        with pytest.raises(OSError, match=r"g\.safetensors cannot be written"):
            gallery.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gallery.metadata = {"set": {1}}
    with pytest.raises(TypeError):
        gallery.save(path)
    assert path.read_bytes() == whole
    assert leftovers(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="no folder"):
        gallery.save(tmp_path / "none" / "g.safetensors")
    with pytest.raises(FileExistsError, match="is a file"):
        gallery.save(path / "g.safetensors")
    with pytest.raises(ValueError, match="must end in"):
        gallery.save(tmp_path / "g.pt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(OSError, match=r"g\.safetensors cannot be written"):
        Gallery(dim=3).save(folder / "g.safetensors")
