"""Features of many files: equal to the extractor's own, reused, resumed, never half-written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pose2id import Extractor, extraction
from pose2id.extraction import extract
from pose2id.extractor import Preprocess
from pose2id.models import digest_of

TRANSFORM = Preprocess((16, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
N = 23


class Means(nn.Module):
    """Means of 4 stripes, scaled; counts the images that it saw."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen = 0

    def forward(self, batch, cams=None):
        self.seen += len(batch)
        features = batch.unflatten(2, (4, -1)).mean((3, 4)).flatten(1) * self.scale
        return features if cams is None else features + cams[:, None]


@pytest.fixture
def paths(rng, tmp_path):
    found = []
    for i in range(N):
        found.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)).save(found[-1])
    return found


def extractor(**options):
    return Extractor(Means(), transform=TRANSFORM, batch_size=5, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_features_are_the_extractors_own(flip, workers, paths, tmp_path):
    found = extract(extractor(flip=flip), paths, tmp_path / "f.npy", key="a", workers=workers, progress=False)
    expected = extractor(flip=flip)(paths, normalize=False, progress=False)
    np.testing.assert_array_equal(found, expected.numpy())
    assert isinstance(found, np.memmap)
    assert found.dtype == np.float32
    assert not found.flags.writeable
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".png") == ["f.npy", "f.npy.json"]


def test_models_that_read_images_themselves(paths, tmp_path):
    model = Extractor(lambda batch: np.stack([np.asarray(Image.open(x)).mean((0, 1)) for x in batch]), inputs="images")
    found = extract(model, paths, tmp_path / "f.npy", workers=2, progress=False)
    np.testing.assert_allclose(found, model(paths, normalize=False, progress=False), rtol=1e-6)


def test_side_inputs_follow_their_images(paths, tmp_path):
    cams = torch.arange(N)
    options = {"key": "a", "progress": False}
    found = extract(extractor(), paths, tmp_path / "f.npy", side_inputs={"cams": cams}, **options)
    np.testing.assert_array_equal(found, extractor()(paths, normalize=False, progress=False, cams=cams).numpy())
    with pytest.raises(FileExistsError, match="of other side_inputs"):
        extract(extractor(), paths, tmp_path / "f.npy", side_inputs={"cams": cams + 1}, **options)


def test_the_same_is_used_again_and_anything_else_is_not(paths, tmp_path):
    model, out = extractor(), tmp_path / "f.npy"
    before = np.array(extract(model, paths, out, key="a", progress=False))
    assert model.model.seen == N
    again = extract(model, paths, out, key="a", progress=False)
    assert model.model.seen == N
    np.testing.assert_array_equal(again, before)
    Image.new("RGB", (10, 20)).save(paths[3])
    for changed, key, others in ((paths, "a", {}), (paths[::-1], "a", {}), (paths[1:], "a", {}), (paths, "b", {})):
        with pytest.raises(FileExistsError, match=r"f\.npy exists, of other (images|images, count|model, images)\."):
            extract(model, changed, out, key=key, progress=False, **others)
    np.testing.assert_array_equal(np.load(out), before)
    assert model.model.seen == N
    found = extract(model, paths, out, key="a", progress=False, overwrite=True)
    assert (found[3] != before[3]).any()
    np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(before, 3, 0))


def test_an_unknown_model_is_never_used_again(paths, tmp_path):
    model, out = extractor(), tmp_path / "f.npy"
    extract(model, paths, out, progress=False)
    with pytest.raises(FileExistsError, match="unknown origin"):
        extract(model, paths, out, progress=False)
    with pytest.raises(FileExistsError, match="unknown origin"):
        extract(model, paths, out, key="a", progress=False)
    extract(model, paths, out, progress=False, overwrite=True)
    assert model.model.seen == 2 * N


def test_files_of_unknown_origin_are_kept(paths, tmp_path):
    np.save(tmp_path / "f.npy", np.ones(3))
    with pytest.raises(FileExistsError, match="unknown origin"):
        extract(extractor(), paths, tmp_path / "f.npy", key="a", progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), np.ones(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_what_is_done_is_kept(workers, paths, tmp_path, monkeypatch):
    monkeypatch.setattr("pose2id.extraction._SAVED_ROWS", 5)
    whole = paths[17].read_bytes()
    paths[17].write_bytes(whole[:50])
    model, out = extractor(), tmp_path / "f.npy"
    with pytest.raises(ValueError, match=r"^images\[17\] cannot be read: .*17\.png"):
        extract(model, paths, out, key="a", workers=workers, progress=False)
    assert not out.exists()
    # Another image stands there now: of other images nothing is used again.
    paths[17].write_bytes(whole)
    expected = extractor()(paths, normalize=False, progress=False).numpy()
    np.testing.assert_array_equal(extract(model, paths, out, key="a", progress=False), expected)


def test_a_failed_run_goes_on_where_it_was(paths, tmp_path, monkeypatch):
    monkeypatch.setattr("pose2id.extraction._SAVED_ROWS", 5)
    model, out = extractor(), tmp_path / "f.npy"
    forward = model.model.forward

    def breaks(batch):
        if model.model.seen >= 15:
            raise RuntimeError("out of memory")
        return forward(batch)

    monkeypatch.setattr(model.model, "forward", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        extract(model, paths, out, key="a", progress=False)
    assert not out.exists()
    other = extractor()
    found = extract(other, paths, out, key="a", progress=False)
    assert other.model.seen == N - 15
    np.testing.assert_array_equal(found, extractor()(paths, normalize=False, progress=False).numpy())
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".png") == ["f.npy", "f.npy.json"]


@pytest.mark.parametrize("damage", ["torn journal", "no journal", "other model", "torn rows"])
def test_what_is_left_of_another_run_is_not_used(damage, paths, tmp_path):
    out, partial, journal = (tmp_path / name for name in ("f.npy", "f.npy.partial", "f.npy.partial.json"))
    made = np.array(extract(extractor(), paths, out, key="a", progress=False))
    note = {**json.loads((tmp_path / "f.npy.json").read_text()), "done": 10, "dim": made.shape[1]}
    np.save(tmp_path / "wrong.npy", np.full_like(made, 7))
    (tmp_path / "wrong.npy").rename(partial)
    out.unlink()
    if damage == "torn rows":
        partial.write_bytes(partial.read_bytes()[:200])
    text = json.dumps({**note, "model": "b"} if damage == "other model" else note)
    if damage != "no journal":
        journal.write_text(text[: len(text) // 2] if damage == "torn journal" else text)
    model = extractor()
    np.testing.assert_array_equal(extract(model, paths, out, key="a", progress=False), made)
    assert model.model.seen == N


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import pose2id.extraction as extraction
from test_extraction import extractor
extraction._SAVED_ROWS = 1
model = extractor()
forward = model.model.forward
def slow(batch):
    time.sleep(0.1)
    print("batch", flush=True)
    return forward(batch)
model.model.forward = slow
paths = [{folder!r} + f"/{{i}}.png" for i in range({n})]
extraction.extract(model, paths, {out!r}, key="a", workers={workers}, progress=False)
"""


@pytest.mark.parametrize(("batches", "workers"), [(1, 0), (3, 2)])
def test_a_killed_run_goes_on_where_it_was(batches, workers, paths, tmp_path):
    out = tmp_path / "f.npy"
    tests = os.path.dirname(__file__)
    code = KILLED.format(tests=tests, folder=str(tmp_path), n=N, out=str(out), workers=workers)
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(batches + 1):
            assert process.stdout.readline() == "batch\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    model = extractor()
    found = extract(model, paths, out, key="a", progress=False)
    assert N - 5 * (batches + 1) <= model.model.seen <= N - 5 * batches
    np.testing.assert_array_equal(found, extractor()(paths, normalize=False, progress=False).numpy())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"paths": []}, ValueError, "paths must hold at least one image file"),
        ({"paths": ["none.png"]}, FileNotFoundError, r"1 are missing: none\.png"),
        ({"workers": -1}, ValueError, "workers must be at least 0"),
        ({"amp": 1}, TypeError, "amp must be"),
        ({"out": "f.npz"}, ValueError, r"must end in \.npy"),
        ({"out": "nowhere/f.npy"}, FileNotFoundError, "There is no folder"),
    ],
)
def test_bad_arguments(change, error, message, paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        extract(extractor(), **{"paths": paths, "out": "f.npy", "progress": False, **change})
    assert not list(tmp_path.glob("f.np*"))


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, True])
def test_a_model_on_a_gpu(amp, paths, tmp_path):
    model = extractor()
    model.model.cuda()
    expected = extractor()(paths, normalize=False, progress=False).numpy()
    found = extract(model, paths, tmp_path / "f.npy", key="a", workers=2, amp=amp, progress=False)
    np.testing.assert_allclose(found, expected, atol=2e-2 if amp else 1e-5)
    assert next(model.model.parameters()).is_cuda


def test_a_full_disk_is_named_and_the_run_goes_on(paths, tmp_path, monkeypatch):
    model, out = extractor(), tmp_path / "f.npy"
    run = extraction._Run
    add = run.add

    def full(self, features):
        if self.done >= 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, features)

    with monkeypatch.context() as patch:
        patch.setattr(run, "add", full)
        with pytest.raises(OSError, match=r"f\.npy cannot be written: No space left on device. Run again to go on"):
            extract(model, paths, out, key="a", progress=False)
    assert not out.exists()
    other = extractor()
    found = extract(other, paths, out, key="a", progress=False)
    assert other.model.seen == N - 10
    np.testing.assert_array_equal(found, extractor()(paths, normalize=False, progress=False).numpy())


def test_killed_between_the_file_and_its_note(paths, tmp_path, monkeypatch):
    """The file has its name, the note is not written: it is found in the journal."""
    out = tmp_path / "f.npy"
    extract(extractor(), paths, out, key="old", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "_settle", lambda *_: None)
        extract(extractor(), paths, out, key="a", progress=False, overwrite=True)
    assert not (tmp_path / "f.npy.json").exists()
    model = extractor()
    extract(model, paths, out, key="a", progress=False)
    assert model.model.seen == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".png") == ["f.npy", "f.npy.json"]


def test_a_model_without_a_transform_reads_no_files(paths, tmp_path):
    with pytest.raises(ValueError, match="extractor must have a transform, or inputs='images'"):
        extract(Extractor(Means()), paths, tmp_path / "f.npy", progress=False)


def test_two_runs_do_not_write_one_file(paths, tmp_path):
    pytest.importorskip("fcntl", reason="needs locks of Unix")
    other = extraction._locked(tmp_path / "f.npy.partial")
    with pytest.raises(FileExistsError, match=r"f\.npy\.partial is being written by another process"):
        extract(extractor(), paths, tmp_path / "f.npy", key="a", progress=False)
    other.close()
    extract(extractor(), paths, tmp_path / "f.npy", key="a", progress=False)


def test_parts_are_refused(paths, tmp_path):
    model = Extractor(lambda batch: batch.mean(3).transpose(1, 2), transform=TRANSFORM)
    with pytest.raises(ValueError, match=r"extractor must return features \(B, D\) for a file, got \(23, 16, 3\)"):
        extract(model, paths, tmp_path / "f.npy", progress=False)


def test_mixed_precision_is_near_and_is_another_model(paths, tmp_path):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3 * 16 * 8, 6)

        def forward(self, batch):
            return self.layer(batch.flatten(1))

    model = Extractor(Linear(), transform=TRANSFORM)
    full = extract(model, paths, tmp_path / "f.npy", key="a", progress=False)
    half = extract(model, paths, tmp_path / "h.npy", key="a", amp=True, progress=False)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()
    with pytest.raises(FileExistsError, match="of other amp"):
        extract(model, paths, tmp_path / "h.npy", key="a", progress=False)


def test_memory_does_not_grow_with_the_number_of_images(paths, tmp_path):
    """The rows are a file: writing them takes no array of all of them."""
    found = extract(extractor(), paths * 40, tmp_path / "f.npy", key="a", progress=False)
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found[:N], found[-N:])


def test_digests_tell_models_apart():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    digest = digest_of(Extractor(model, transform=TRANSFORM))
    assert digest == digest_of(Extractor(model, transform=TRANSFORM, batch_size=3))
    others = [
        Extractor(nn.Linear(4, 2), transform=TRANSFORM),
        Extractor(nn.Linear(4, 2, bias=False), transform=TRANSFORM),
        Extractor(model, transform="transreid"),
        Extractor(model, transform=TRANSFORM, flip=True),
        Extractor(nn.Sequential(model), transform=TRANSFORM),
    ]
    digests = [digest_of(other) for other in others]
    assert len({digest, *digests}) == 6
    slopes = [nn.Sequential(nn.LeakyReLU(slope)) for slope in (0.1, 0.3)]
    assert len({digest_of(Extractor(other, transform=TRANSFORM)) for other in slopes}) == 2
    strides = [nn.Conv2d(3, 2, 1, stride) for stride in (1, 2)]
    strides[1].load_state_dict(strides[0].state_dict())
    assert len({digest_of(Extractor(other, transform=TRANSFORM)) for other in strides}) == 2
    assert digest_of(Extractor(model.forward, transform=TRANSFORM)) != digest
    assert digest_of(Extractor(lambda batch: batch, transform=TRANSFORM)) is None
    assert digest_of(Extractor(model, transform=lambda image: image)) is None
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert digest_of(Extractor(model, transform=TRANSFORM)) != digest


def test_a_second_run_cannot_begin_in_the_file_that_is_being_finished(paths, tmp_path, monkeypatch):
    pytest.importorskip("fcntl", reason="needs locks of Unix")
    out, tried = tmp_path / "f.npy", []
    replace = extraction.Path.replace

    def locked(path, target):
        done = replace(path, target)
        if target == out:
            tried.append(True)
            # As another run would that had opened the file before it got its name.
            with pytest.raises(FileExistsError, match="is being written by another process"):
                extraction._locked(out)
        return done

    monkeypatch.setattr(extraction.Path, "replace", locked)
    expected = extractor()(paths, normalize=False, progress=False)
    np.testing.assert_array_equal(extract(extractor(), paths, out, key="a", progress=False), expected.numpy())
    assert tried
