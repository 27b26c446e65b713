"""`extract` by workers: the file of one process, bit for bit, whatever dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pose2id import Extractor
from pose2id.cli import main
from pose2id.distributed import extraction
from pose2id.distributed.cluster import connected
from pose2id.distributed.extraction import extract
from pose2id.extraction import extract as extract_alone
from pose2id.extractor import Preprocess
from pose2id.io.images import load_image
from pose2id.models import LoadedModel

# Workers don't find test modules.
pytest.importorskip("ray").cloudpickle.register_pickle_by_value(sys.modules[__name__])
N = 60


class Stripes(nn.Module):
    def forward(self, batch):
        # As a product, whose last digits depend on the size of the batch.
        return batch.flatten(1) @ torch.linspace(-1, 1, 3 * 16 * 8 * 7, dtype=batch.dtype).reshape(-1, 7)


def model(key="a", inputs="batch"):
    if inputs == "images":
        return LoadedModel(Extractor(means_of_files, inputs="images", batch_size=5), key, "means")
    transform = Preprocess((16, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return LoadedModel(Extractor(Stripes(), transform=transform, batch_size=5), key, "stripes")


def means_of_files(files):
    return np.stack([np.asarray(load_image(file, "")).mean((0, 1)) for file in files])


@pytest.fixture
def paths(rng, tmp_path):
    found = []
    for i in range(N):
        found.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)).save(found[-1])
    return found


@pytest.fixture
def alone(paths, tmp_path):
    return extract_alone(model().extractor, paths, tmp_path / "alone.npy", key="a", progress=False)


def test_the_file_of_one_process(two_nodes, paths, alone, tmp_path, caplog):
    out = tmp_path / "f.npy"
    with connected(workers=2) as cluster:
        found = extract(cluster, model, paths, out, progress=False)
        assert out.read_bytes() == (tmp_path / "alone.npy").read_bytes()
        assert (tmp_path / "f.npy.json").read_text() == (tmp_path / "alone.npy.json").read_text()
        assert found.shape == (N, 7)
        with pytest.raises(FileExistsError, match="exists, of other model"):
            extract(cluster, lambda: model("b"), paths, out, progress=False)
        assert not list(tmp_path.glob("*.partial*"))


def test_models_that_read_images_themselves(two_nodes, paths, tmp_path):
    with connected(workers=2) as cluster:
        found = extract(cluster, lambda: model(inputs="images"), paths, tmp_path / "f.npy", progress=False)
    np.testing.assert_array_equal(found, means_of_files(paths).astype(np.float32))


def test_an_unreadable_image_is_named_and_a_second_run_goes_on(two_nodes, paths, alone, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pose2id.extraction._SAVED_ROWS", 5)
    whole, out = paths[47].read_bytes(), tmp_path / "f.npy"
    paths[47].write_bytes(whole[:50])
    # One worker: what comes before is done.
    with connected(workers=1) as cluster:
        with pytest.raises(ValueError, match=r"^images\[47\] cannot be read: .*47\.png"):
            extract(cluster, model, paths, out, progress=False)
        assert not out.exists()
        paths[47].write_bytes(whole)
        # Its bytes were in the key of what was begun.
        extract(cluster, model, paths, out, progress=False)
    np.testing.assert_array_equal(np.load(out), alone)


@pytest.mark.parametrize("attempt", range(2))
def test_a_killed_worker(two_nodes, paths, alone, tmp_path, caplog, attempt):
    def deadly():
        loaded = model()

        def forward(batch):
            try:
                if torch.isclose(batch.sum(), whole_sum):
                    (tmp_path / "killed").touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
            return Stripes()(batch)

        return LoadedModel(Extractor(forward, transform=loaded.extractor.transform, batch_size=5), "a", "stripes")

    first = 5 * (attempt * 6 + 2)
    transform = model().extractor.transform
    whole_sum = torch.stack([transform(load_image(path, "")) for path in paths[first : first + 5]]).sum()
    with connected(workers=2) as cluster:
        found = extract(cluster, deadly, paths, tmp_path / "f.npy", progress=False)
    assert (tmp_path / "killed").exists()
    assert "a worker died at task" in caplog.text
    np.testing.assert_array_equal(found, alone)


def test_models_that_differ_are_refused(two_nodes, paths, tmp_path):
    (tmp_path / "there").mkdir()

    def differing():
        (tmp_path / "there" / str(os.getpid())).touch()
        loaded = model(str(os.getpid()))

        def forward(batch):
            while len(list((tmp_path / "there").iterdir())) < 2:
                time.sleep(0.01)
            return Stripes()(batch)

        return LoadedModel(Extractor(forward, transform=loaded.extractor.transform, batch_size=5), loaded.digest, "x")

    with connected(workers=2) as cluster, pytest.raises(ValueError, match="model must be the same on all machines"):
        extract(cluster, differing, paths * 5, tmp_path / "f.npy", progress=False)
    assert not (tmp_path / "f.npy").exists()


def test_tasks_are_whole_batches_and_not_too_large(paths, monkeypatch):
    size = paths[0].stat().st_size
    for limit, lengths in ((32 << 20, [20, 20, 18]), (6 * size, [10, 10, 10, 10, 10, 8]), (1, [5] * 11 + [3])):
        monkeypatch.setattr(extraction, "_TASK_BYTES", limit)
        tasks = list(extraction._tasks(paths, 2, 5, "a", read=True))
        assert [len(task.paths) for task in tasks] == lengths
        assert [name for task in tasks for name in task.paths] == list(map(str, paths[2:]))
        assert [task.first for task in tasks] == [2 + sum(lengths[:i]) for i in range(len(lengths))]
        assert all(task.contents == [Path(name).read_bytes() for name in task.paths] for task in tasks)


def test_no_transform(two_nodes, paths, tmp_path):
    with connected(workers=1) as cluster, pytest.raises(ValueError, match="extractor must have a transform"):
        extract(cluster, lambda: LoadedModel(Extractor(Stripes()), "a", "x"), paths, tmp_path / "f.npy", progress=False)


def test_the_command(two_nodes, paths, tmp_path, monkeypatch, capsys):
    (tmp_path / "stripes.py").write_text(
        "from pose2id import Extractor\n\n\ndef sums(batch):\n    return batch.flatten(1)[:, ::50]\n\n\n"
        "def model():\n    return Extractor(sums, transform='saai', batch_size=8)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["extract", ".", "--all-images", "--model", "stripes:model", "--out"]
    assert main([*command, "by_workers.npy", "--processes", "2"]) == 0
    assert "by_workers.npy: features of 60 images" in capsys.readouterr().out
    assert main([*command, "alone.npy"]) == 0
    assert (tmp_path / "by_workers.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes()
    assert (tmp_path / "by_workers.npy.csv").read_bytes() == (tmp_path / "alone.npy.csv").read_bytes()
    sys.modules.pop("stripes", None)
    assert main([*command, "other.npy", "--ray", "nowhere"]) == 2
    assert "--ray must be 'auto', 'host:port' or 'ray://host:port', got 'nowhere'" in capsys.readouterr().err
    # Before Ray is asked for.
    for words, message in (
        (["--model", "stripes"], "--model must be module:callable"),
        (["--transform", "no"], "one of"),
    ):
        assert main([*command, "other.npy", "--ray", "nowhere", *words]) == 2
        assert message in capsys.readouterr().err
    assert main([*command, "other.npy", "--processes", "0"]) == 2
    assert "--processes must be at least 1, got 0." in capsys.readouterr().err
