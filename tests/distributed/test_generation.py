"""Pictures of many workers: those of a single process, whatever dies; broken images end in a list."""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from miniature import miniature
from PIL import Image

from pose2id import IdentityGenerator, PictureFolder, Sampling, poses
from pose2id.cli import main
from pose2id.distributed import generation
from pose2id.distributed.cluster import connected
from pose2id.distributed.generation import generate_on, generation_workers
from pose2id.ipg import batch, generate_files
from pose2id.ipg.folder import read_note

# Workers don't find test modules.
ray = pytest.importorskip("ray")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

OPTIONS = {"poses": poses.standard()[:2], "sampling": Sampling(steps=3, size=(16, 8)), "batch_size": 4}
IMAGES = 24
STEPS = 40  # so many that an interruption comes before the end
NOT_UTF8 = [os.fsdecode(b"not-utf-8-\xff.png")] if sys.platform == "linux" else []


def loading(weights):
    """A worker's generator."""
    return IdentityGenerator.from_pretrained(weights, device="cpu")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Weights, images, and the files of a single process."""
    folder = tmp_path_factory.mktemp("given")
    miniature().save_pretrained(folder / "weights")
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        path = folder / "people" / f"cam{i % 2}" / f"{i:02}.{('png', 'jpg')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    generator = IdentityGenerator.from_pretrained(folder / "weights", device="cpu")
    generate_files(generator, [folder / "people"], folder / "single", grid=True, progress=False, **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def third(two_nodes):
    node = two_nodes.add_node(num_cpus=1)
    yield node
    if node in two_nodes.worker_nodes:
        two_nodes.remove_node(node)
    wait_for_machines(2)


def wait_for_machines(count):
    """Until the cluster knows which are gone: other tests count them."""
    soon = time.monotonic() + 120
    while sum(node["Alive"] for node in ray.nodes()) > count:
        assert time.monotonic() < soon, ray.nodes()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def workers(given, third):
    """One on each of three machines."""
    load = partial(loading, given / "weights")
    with connected(workers=3) as cluster, generation_workers(cluster, load) as workers:
        yield workers


def run(workers, given, out, **options):
    return generate_on(workers, [given / "people"], out, progress=False, **{**OPTIONS, **options})


def below(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def assert_as_by_one_process(out, given, but=(), grid=False):
    """The same files, with the same notes, of the same pixels but for the last digits."""
    expected = {name for name in below(given / "single") if grid or not name.startswith("sheets")}
    assert below(out) == expected - set(but)
    for name in below(out):
        assert read_note(out / name) == read_note(given / "single" / name) != {}
        with Image.open(out / name) as picture, Image.open(given / "single" / name) as other:
            assert np.abs(np.asarray(picture, int) - np.asarray(other, int)).max() <= 2


def test_the_files_of_a_single_process(workers, given, tmp_path):
    done = run(workers, given, tmp_path, grid=True)
    assert (done.written, done.kept, done.broken) == (2 * IMAGES, 0, {})
    assert_as_by_one_process(tmp_path, given, grid=True)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in below(tmp_path)}
    done = run(workers, given, tmp_path, grid=True)
    assert (done.written, done.kept) == (0, 2 * IMAGES)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in below(tmp_path)} == before


def test_shards_behind_a_url(workers, given, tmp_path):
    """This process alone writes them, and reads the images: `single`'s pictures, and a list of what was left out."""
    shutil.copytree(given / "people", tmp_path / "people")
    (tmp_path / "people" / "broken.png").write_bytes(b"no picture")
    url, images = f"file://{tmp_path}/out", sorted((tmp_path / "people").glob("cam*/*"))
    for written, kept in ((2 * IMAGES, 0), (0, 2 * IMAGES)):
        done = run(workers, tmp_path, url)
        assert (done.written, done.kept, len(done.broken)) == (written, kept, 1)
    names = {re.sub(r"-\w{8}", "", name) for name in below(tmp_path / "out")}
    assert names == {"pictures-000000.json", "pictures-000000.tar", "broken.csv"}
    sources = PictureFolder(url).files(images, tmp_path / "copies"), PictureFolder(given / "single")(images)
    for copies, files in zip(*sources, strict=True):
        for copy, file in zip(copies, files, strict=True):
            assert read_note(copy) == read_note(file) != {}
            with Image.open(copy) as picture, Image.open(file) as other:
                assert np.abs(np.asarray(picture, int) - np.asarray(other, int)).max() <= 2
    (tmp_path / "people" / "broken.png").unlink()
    assert run(workers, tmp_path, url).kept == 2 * IMAGES
    assert "broken.csv" not in below(tmp_path / "out")


def test_only_what_is_missing_is_generated(workers, given, tmp_path):
    shutil.copytree(given / "single", tmp_path / "out")
    missing = ["pose1/cam0/00.png", "pose2/cam0/00.png", "pose2/cam1/05.png"]
    for name in missing:
        (tmp_path / "out" / name).unlink()
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in below(tmp_path / "out")}
    done = run(workers, given, tmp_path / "out", grid=True)
    assert (done.written, done.kept) == (3, 2 * IMAGES - 3)
    assert_as_by_one_process(tmp_path / "out", given, grid=True)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before


def test_other_pictures_are_not_replaced(workers, given, tmp_path):
    shutil.copytree(given / "single", tmp_path / "out")
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in below(tmp_path / "out")}
    with pytest.raises(FileExistsError, match="different in: seed"):
        run(workers, given, tmp_path / "out", sampling=Sampling(steps=3, size=(16, 8), seed=1))
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in below(tmp_path / "out")} == before


def reading(monkeypatch, note):
    """Call `note(how many)` when an image is read for a task."""
    read, read_bytes = [], Path.read_bytes

    def noted(path):
        if path.parent.name.startswith("cam"):
            read.append(path)
            note(len(read))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", noted)
    return read


def test_files_are_read_as_they_are_needed(workers, given, tmp_path, monkeypatch):
    done, ahead = [], []

    def results(tasks):
        for place, result in workers.results(tasks):
            if isinstance(result[1], list):
                done.extend(result[1])
            yield place, result

    read = reading(monkeypatch, lambda count: ahead.append(count - len(done)))
    run(SimpleNamespace(count=workers.count, results=results), given, tmp_path)
    assert len(read) == len(done) == IMAGES
    assert max(ahead) <= 3 * 2 * 2  # each worker holds two batches


@pytest.mark.parametrize(("pictures", "poses_each"), [(192, 8), (32, 3), (32, 5), (4, 8)])
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_tasks_are_whole_batches(tmp_path, monkeypatch, pictures, poses_each, size):
    (tmp_path / "image").write_bytes(b"x" * size)
    monkeypatch.setattr(generation, "_TASK_BYTES", 5_000_000)
    count, at_once = 1000, max(1, pictures // poses_each)
    job = SimpleNamespace(
        incomplete=dict.fromkeys(range(count), 1),
        poses=[None] * poses_each,
        names=["image"] * count,
        keys=["key"] * count,
        paths=[tmp_path / "image"] * count,
        broken={},
    )
    lengths = []

    def results(tasks):
        for place, task in enumerate(tasks):
            lengths.append(len(task.keywords["images"]))
            yield place, (0.001, [[]] * lengths[-1])

    given = generation._Run(job, None, {}, at_once, 2).pictures(SimpleNamespace(results=results))
    assert [i for i, _ in given] == list(range(count))
    assert not [length for length in lengths[:-1] if length % at_once]
    if size == 10 and pictures == 32:
        assert max(lengths) > at_once


def process(worker):
    time.sleep(0.02)
    return os.getpid()


def begun(workers):
    """PIDs of workers that take tasks."""
    return {pid for _, pid in workers.results([process] * 6)}


def test_a_machine_that_goes(two_nodes, third, workers, given, tmp_path, monkeypatch, caplog):
    pids, soon = set(), time.monotonic() + 300
    while len(pids) < 3:
        assert time.monotonic() < soon, pids
        pids |= begun(workers)
    # Before its worker gets tasks.
    reading(monkeypatch, lambda count: count == 1 and two_nodes.remove_node(third, allow_graceful=False))
    assert run(workers, given, tmp_path).written == 2 * IMAGES
    assert_as_by_one_process(tmp_path, given)
    assert "a worker died" in caplog.text


@pytest.mark.parametrize("moment", range(20))
def test_a_worker_killed_at_a_random_moment(workers, given, tmp_path, monkeypatch, caplog, moment, stress):
    if moment > 1 and not stress:
        pytest.skip("only with --stress")
    rng, save, saved = random.Random(moment), batch._save, []
    # Half of the images are left then, and it gets tasks that it cannot do.
    at, dying = rng.randint(1, IMAGES // 2), rng.choice(sorted(begun(workers)))
    reading(monkeypatch, lambda count: count == at and os.kill(dying, signal.SIGKILL))
    monkeypatch.setattr(batch, "_save", lambda *to: save(*to) or saved.append(to))
    done = run(workers, given, tmp_path)
    assert (done.written, done.broken) == (2 * IMAGES, {})
    assert len(saved) == 2 * IMAGES  # none twice
    assert_as_by_one_process(tmp_path, given)
    assert "is replaced" in caplog.text


@pytest.fixture
def with_broken(given, tmp_path):
    """The images, three of them broken: unreadable, too small, generated."""
    people = tmp_path / "people"
    shutil.copytree(given / "people", people)
    (people / "cam0" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("RGB", (4, 4)).save(people / "cam0" / "02.png")
    shutil.copy(given / "single" / "pose1" / "cam0" / "00.png", people / "cam0" / "04.png")
    if NOT_UTF8:
        (people / "cam0" / NOT_UTF8[0]).write_bytes(b"no picture")
    return people


def listed(out):
    with (out / "broken.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}


def test_broken_images_end_in_a_list(workers, given, with_broken, tmp_path):
    out = tmp_path / "out"
    done = generate_on(workers, [with_broken], out, progress=False, **OPTIONS)
    names = ("00", "02", "04")
    broken = [*(f"{name}.png" for name in names), *NOT_UTF8]
    assert list(done.broken) == [with_broken / "cam0" / name for name in broken]
    reasons = listed(out)
    assert list(reasons) == broken
    assert reasons["00.png"].startswith("image cam0/00 cannot be read: ")
    assert "must be at least 8 pixels" in reasons["02.png"]
    assert reasons["04.png"].endswith("04.png was generated by pose2id.")
    (out / "broken.csv").rename(tmp_path / "broken.csv")
    assert_as_by_one_process(out, given, but=[f"pose{pose}/cam0/{name}.png" for name in names for pose in (1, 2)])
    (tmp_path / "broken.csv").rename(out / "broken.csv")
    assert run(workers, given, out).broken == {}
    assert_as_by_one_process(out, given)


def test_images_that_change_or_go_during_the_run(workers, given, tmp_path, monkeypatch):
    people, job = tmp_path / "people", generation.Job
    shutil.copytree(given / "people", people)

    def meanwhile(*args, **options):
        made = job(*args, **options)
        (people / "cam0" / "00.png").unlink()
        shutil.copy(people / "cam0" / "04.png", people / "cam0" / "02.png")
        return made

    monkeypatch.setattr(generation, "Job", meanwhile)
    done = generate_on(workers, [people], tmp_path / "out", progress=False, **OPTIONS)
    assert (done.written, done.kept) == (2 * IMAGES - 4, 0)
    assert "No such file" in done.broken[people / "cam0" / "00.png"]
    assert done.broken[people / "cam0" / "02.png"] == "image cam0/02 was changed during the run."


def test_bad_input_reaches_no_worker_or_comes_back(workers, given, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        generate_on(workers, [tmp_path / "nobody"], tmp_path / "out")
    with pytest.raises(ValueError, match="at most 1000"):
        run(workers, given, tmp_path / "out", sampling=Sampling(steps=1001))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        run(workers, given, tmp_path / "out", batch_size=0)
    assert not (tmp_path / "out").exists()


def test_workers_of_other_weights_are_refused():
    class Worker:
        def __init__(self, generator):
            self.generator, self.note = generator, batch.generator_note(generator)

    settings = generation._Settings(OPTIONS["poses"], OPTIONS["sampling"], 4)
    made_from, images_at_once = generation._agreed(Worker(miniature()), settings)
    assert images_at_once == 2
    image = generation._Image("a", "key", b"")
    _, results = generation._pictures(Worker(miniature()), settings, made_from, [image])
    assert results[0].startswith("image a cannot be read: ")
    with pytest.raises(ValueError, match=r"and differ in dtype: float32 and float64; generator: "):
        generation._pictures(Worker(miniature().to(dtype=torch.float64)), settings, made_from, [image])


@pytest.fixture
def command(given, tmp_path, workers, monkeypatch):
    """The command, on the workers that are there."""

    class Kept:
        count = workers.count
        results = workers.results

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(generation, "generation_workers", lambda cluster, load: Kept())
    poses.write(OPTIONS["poses"], tmp_path / "poses.json")

    def run(*words, images=given / "people"):
        return main([str(word) for word in ("generate", images, *fixed(given, tmp_path), *words)])

    return run


def fixed(given, folder):
    """Words that mean `OPTIONS`."""
    words = (
        "--weights",
        given / "weights",
        "--out",
        folder / "out",
        "--poses",
        folder / "poses.json",
        "--device",
        "cpu",
    )
    return (*words, "--steps", 3, "--size", "16x8", "--batch-size", 4)


def test_the_command(command, given, with_broken, tmp_path, capsys):
    assert command("--ray", "auto") == 0
    out = tmp_path / "out"
    printed = capsys.readouterr().out.splitlines()[-1]  # Ray tells of workers that tests before have killed
    assert printed.startswith(f"wrote {2 * IMAGES} pictures to {out} (")
    assert printed.endswith(" pictures/s of 3 workers)")
    assert_as_by_one_process(out, given)
    assert command("--workers", 3) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed == f"wrote 0 pictures to {out}; {2 * IMAGES} were there already"
    assert command("--workers", 3, images=with_broken) == 1
    said = capsys.readouterr().err
    assert f"images left out: {3 + len(NOT_UTF8)}, all in {out / 'broken.csv'}:\nimage cam0/00 cannot be read: " in said
    assert len(listed(out)) == 3 + len(NOT_UTF8)


def test_images_of_a_table_that_are_not_there_are_listed(workers, given, tmp_path):
    # One of them elsewhere: the others' names don't depend on it.
    gone = [given / "people" / "cam0" / "gone.png", Path("/gone") / "cam0" / "00.png"]
    rows = [(path, "a") for path in (given / "people" / "cam0" / "00.png", *gone, given / "people" / "cam1" / "01.jpg")]
    with (tmp_path / "people.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "identity"), *rows])
    out = tmp_path / "out"
    done = generate_on(workers, [tmp_path / "people.csv"], out, progress=False, **OPTIONS)
    assert (done.written, list(done.broken)) == (4, gone)
    assert all("No such file" in done.broken[path] for path in gone)
    assert list(listed(out)) == ["gone.png", "00.png"]
    assert below(out) == {"broken.csv", *(f"pose{m}/{name}.png" for m in (1, 2) for name in ("cam0/00", "cam1/01"))}
    (tmp_path / "gone.csv").write_text("path,identity\ngone.png,a\n")
    with pytest.raises(FileNotFoundError, match=r"gone\.csv must list images that are there; missing: .*gone\.png"):
        generate_on(workers, [tmp_path / "gone.csv"], out, progress=False, **OPTIONS)


def test_a_full_disk(command, tmp_path, capsys, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if path.parent.name == "cam1":
            write(path, content[:4])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with connected(workers=1):
        assert command("--workers", 1) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    names = below(tmp_path / "out")
    assert names
    assert all(name.startswith(("pose1/cam0", "pose2/cam0")) for name in names)


def test_what_the_command_says_no_to(command, tmp_path, capsys, monkeypatch):
    assert command("--workers", 0) == 2
    assert "--workers must be at least 1" in capsys.readouterr().err
    assert command("--ray", "head") == 2
    assert "--ray must be 'auto', 'host:port' or 'ray://host:port', got 'head'." in capsys.readouterr().err
    assert command("--ray", "auto", "--dry-run") == 2
    assert "--dry-run must not be given with --ray" in capsys.readouterr().err
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert command("--ray", "127.0.0.1:1") == 2
    assert "--ray must be that of a Ray cluster; nothing answers at '127.0.0.1:1'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command("--workers", 2) == 2
    assert 'pip install "pose2id[distributed]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@contextmanager
def started(given, tmp_path, *launcher, words=()):
    """The command in a process of its own, which ends here at the latest."""
    poses.write(OPTIONS["poses"], tmp_path / "poses.json")
    given = ["-m", "pose2id", "generate", given / "people", *fixed(given, tmp_path), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    python = [sys.executable, *map(str, launcher), *map(str, given)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background jobs ignore SIGINT, and what they start does too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(python, **pipes, env=environment)
    signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield process
        finally:
            process.terminate()  # on which a launcher ends its processes
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            process.kill()


@pytest.fixture
def room(two_nodes, workers):
    """For one more worker, and the one whose machine has gone."""
    machines = sum(node["Alive"] for node in ray.nodes())
    node = two_nodes.add_node(num_cpus=2)
    yield
    two_nodes.remove_node(node)
    wait_for_machines(machines)


def test_an_interrupted_command_leaves_whole_files_and_goes_on(two_nodes, room, workers, given, tmp_path):
    out, soon = tmp_path / "out", time.monotonic() + 300
    words = ("--ray", two_nodes.address, "--workers", 1, "--steps", STEPS)
    with started(given, tmp_path, words=words) as process:
        while not any(out.rglob("*.png")) and process.poll() is None and time.monotonic() < soon:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
    names = below(out)
    assert 0 < len(names) < 2 * IMAGES, said
    assert (process.returncode, said.splitlines()[-1]) == (130, "pose2id: interrupted"), said
    assert "Traceback" not in said
    assert not [name for name in names if Path(name).name.startswith(".")]
    assert all(read_note(out / name)["num_inference_steps"] == STEPS for name in names)
    done = run(workers, given, out, sampling=Sampling(steps=STEPS, size=(16, 8)))
    assert (done.written, done.kept) == (2 * IMAGES - len(names), len(names))


def test_two_processes_of_a_launcher(given, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    with started(given, tmp_path, *launcher, words=("--grid",)) as process:
        printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert printed == f"wrote {2 * IMAGES} pictures to {tmp_path / 'out'}\n"
    assert_as_by_one_process(tmp_path / "out", given, grid=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "cuda:1"), "--device must be 'cpu' or 'cuda', or be left out, where a launcher started several"),
        (("--workers", "2"), "--workers must not be given to each of several processes"),
        (("--device", "cpu"), 'pip install "pose2id[distributed]"'),
    ],
)
def test_what_one_of_several_processes_says_no_to(given, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["generate", str(given / "people"), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_each_image_is_one_process_s(given, tmp_path):
    generator = IdentityGenerator.from_pretrained(given / "weights", device="cpu")
    counts = []
    for index in range(3):
        options = {**OPTIONS, "share": (index, 3), "progress": False}
        done = generate_files(generator, [given / "people"], tmp_path, **options)
        assert done.kept == 0
        counts.append(done.written)
        assert generate_files(generator, [given / "people"], tmp_path, **options).kept == done.written
    assert sum(counts) == 2 * IMAGES
    assert min(counts) > 0
    assert_as_by_one_process(tmp_path, given)
    with pytest.raises(ValueError, match="share's index must be at most 2, got 3"):
        generate_files(generator, [given / "people"], tmp_path, **{**options, "share": (3, 3)})
