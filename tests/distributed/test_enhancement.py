"""NFC of a file by many workers: the rows of one process bit for bit; approximately, with a recall that is told."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from pose2id import Centralizer, nfc
from pose2id.centralization.nfc import mutual_neighbors
from pose2id.cli import main
from pose2id.distributed import enhancement, searching, shared_rows
from pose2id.distributed.enhancement import enhance_file, nfc_file
from pose2id.distributed.searching import Searching
from pose2id.neighbors.search import nearest_neighbors

sys.path.append(str(ROOT / "benchmarks"))
# Workers don't find test modules.
pytest.importorskip("ray").cloudpickle.register_pickle_by_value(sys.modules[__name__])


RESULTS = searching.Workers.results
LISTS = pytest.mark.skipif(sys.platform != "linux", reason="approximate search is refused elsewhere")


def drawn(rng, n, dim, dtype):
    """Ties, near ties, zero rows and more copies than a list holds, spread over all blocks."""
    x = rng.standard_normal((n, dim))
    x[: n // 3] = rng.integers(-1, 2, (n // 3, dim))
    x[n // 2 : n // 2 + n // 8] = x[0]
    x[-(n // 8) :] = x[n // 4] * (1 + 1e-7 * rng.standard_normal((n // 8, 1)))
    x[[3, n // 2, n - 2]] = 0
    return x[rng.permutation(n)].astype(dtype)


def files(tmp_path, x):
    np.save(tmp_path / "in.npy", x)
    return tmp_path / "in.npy", tmp_path / "out.npy"


@pytest.fixture
def here(monkeypatch):
    run_here(monkeypatch)


def run_here(monkeypatch):
    """Tasks run in this process, in any order: starting workers takes seconds."""

    class Pool:
        def __init__(self, cluster, make):
            self._work, self.count = pickle.loads(pickle.dumps(make))(), cluster.workers

        def results(self, tasks):
            tasks = list(enumerate(tasks))
            return ((place, self._work(pickle.loads(pickle.dumps(task)))) for place, task in reversed(tasks))

        __enter__, __exit__ = lambda self: self, lambda *_: None

    put = SimpleNamespace(put=lambda array: array)
    monkeypatch.setattr(enhancement, "connected", lambda *_: nullcontext(SimpleNamespace(ray=put, workers=2)))
    monkeypatch.setattr(enhancement, "Workers", Pool)
    monkeypatch.setattr(shared_rows, "_seen_by_all", lambda *_: True)
    monkeypatch.setattr(searching, "_fetched", lambda array: array)


@pytest.mark.parametrize(
    ("dtype", "k1", "k2", "block", "normalize"),
    [
        (np.float16, 2, 2, 50, True),
        (np.float32, 2, 2, 1000, True),
        (np.float32, 3, 7, 37, False),
        (np.float32, 5, 1, 101, True),
        (np.float64, 2, 4, 73, True),
        (">f4", 1, 1, 64, True),
        (np.float32, 400, 300, 90, True),
    ],
)
def test_exact_is_one_process_bit_for_bit(here, rng, tmp_path, dtype, k1, k2, block, normalize):
    x = drawn(rng, 240, 6, dtype)
    source, out = files(tmp_path, x)
    done = nfc_file(source, out, k1, k2, block_rows=block, workers=2, normalize=normalize)
    expected = nfc(x, k1, k2, normalize=normalize)
    found = np.load(out)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.view(np.uint8), np.asarray(expected).view(np.uint8))
    assert (done.rows, done.recall) == (240, None)


def test_distances_that_only_the_whole_sets_scale_tells_apart(here, rng, tmp_path):
    x = np.ones((90, 2))
    x[:, 1] = rng.integers(0, 40, 90) * 1e-170
    source, out = files(tmp_path, x)
    nfc_file(source, out, 3, 3, block_rows=20)
    np.testing.assert_array_equal(np.load(out), nfc(x, 3, 3))


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_rows(here, rng, tmp_path, n):
    x = rng.standard_normal((n, 4)).astype(np.float32)
    source, out = files(tmp_path, x)
    nfc_file(source, out, 5, 5)
    np.testing.assert_array_equal(np.load(out), nfc(x, 5, 5))


@pytest.mark.parametrize("approximate", [False, pytest.param(True, marks=LISTS)])
def test_rows_through_the_object_store(two_nodes, rng, tmp_path, approximate, monkeypatch):
    x = drawn(rng, 200, 6, np.float32)
    source, out = files(tmp_path, x)
    monkeypatch.setattr(shared_rows, "_seen_by_all", lambda *_: False)
    monkeypatch.setattr(shared_rows, "BLOCK_BYTES", 30 * 6 * 4)  # blocks that are not the search's
    nfc_file(source, out, 2, 3, block_rows=70, approximate=approximate, nprobe=1000 if approximate else None)
    np.testing.assert_array_equal(np.load(out), nfc(x, 2, 3))


def test_who_sees_a_file(two_nodes, tmp_path):
    from pose2id.distributed.cluster import connected  # noqa: PLC0415

    (tmp_path / "there").write_bytes(b"rows")
    with connected() as cluster:
        look = shared_rows._look()
        assert shared_rows._seen_by_all(cluster, str(tmp_path / "there"), look(str(tmp_path / "there")))
        assert not shared_rows._seen_by_all(cluster, str(tmp_path / "there"), (4, 0, "another"))
    before = look(str(tmp_path / "there"))
    (tmp_path / "there").write_bytes(b"cols")
    os.utime(tmp_path / "there", ns=(before[1], before[1]))
    assert look(str(tmp_path / "there")) != before
    assert look(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r" has no .*in\.npy"),
        (np.zeros((3, 2), np.float32), r" has another .*in\.npy \(another .*checksum of"),
        (np.zeros((4, 2), np.float32), r" has another .*in\.npy \(another size, "),
    ],
)
def test_a_machine_that_joins_with_another_file(here, tmp_path, monkeypatch, content, message):
    source, out = files(tmp_path, np.eye(3, 2, dtype=np.float32))

    def change(*_):
        source.unlink()
        if content is not None:
            np.save(source, content)
        return True

    monkeypatch.setattr(shared_rows, "_seen_by_all", change)
    with pytest.raises(
        RuntimeError, match=f"features must be the same file .*; {socket.gethostname()}{message}.*again"
    ):
        nfc_file(source, out)
    assert not out.exists()


def test_workers_are_killed(two_nodes, rng, tmp_path, stress, caplog, monkeypatch):
    x = drawn(rng, 300, 6, np.float32)
    source, out = files(tmp_path, x)
    expected = nfc(x, 2, 2)
    for round_ in range(10 if stress else 1):
        kill(tmp_path / str(round_), monkeypatch, rng.random())
        nfc_file(source, out, block_rows=50, workers=2, overwrite=True)
        np.testing.assert_array_equal(np.load(out), expected)
        assert caplog.text.count("is replaced") == 2 * (round_ + 1)


def kill(folder, monkeypatch, moment):
    """The first task, and one so far into them, kill the first worker that begins them."""
    folder.mkdir()

    def results(self, tasks):
        tasks = list(tasks)
        for at in (0, 1 + int(moment * (len(tasks) - 1))):
            tasks[at] = _Deadly(tasks[at], folder / str(at))
        return RESULTS(self, tasks)

    monkeypatch.setattr(searching.Workers, "results", results)


class _Deadly:
    def __init__(self, task, mark):
        self._task, self._mark = task, mark

    def run(self, rows):
        if self._mark.exists():
            return self._task.run(rows)
        self._mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
        return None


def real_like(n, dim):
    from gallery import Drawn  # noqa: PLC0415 - a benchmark

    return Drawn(n, dim).images(n)[0]


@pytest.fixture(scope="module")
def approximate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("approximate")
    x = real_like(6000, 64)
    source, out = files(folder, x)
    with pytest.MonkeyPatch.context() as patched:
        run_here(patched)
        return x, source, out, nfc_file(source, out, approximate=True)


@LISTS
def test_approximate_recall_is_what_it_says(approximate):
    x, _, out, done = approximate
    exact = nfc(x)
    same = (np.load(out) == exact).all(1).mean()
    assert done.recall.share >= 0.95
    assert same >= done.recall.share - 0.03
    # The sample's edges, by the search of one process.
    is_mutual = mutual_neighbors(torch.from_numpy(nearest_neighbors(x, 2, normalize=True)), 2, 2)
    drawn_rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[-1000:]
    assert done.recall.edges == int(is_mutual[drawn_rows].sum())
    assert done.recall.rows == 1000
    assert 1 < done.probes < done.lists
    assert f"{done.recall.found} of {done.recall.edges} on a sample of 1000 rows" in str(done)


@LISTS
def test_all_lists_are_exact(here, rng, tmp_path):
    x = drawn(rng, 300, 6, np.float32)
    source, out = files(tmp_path, x)
    done = nfc_file(source, out, 2, 3, approximate=True, nprobe=10**6, workers=2)
    np.testing.assert_array_equal(np.load(out), nfc(x, 2, 3))
    assert done.recall.share == 1
    assert done.recall.false == 0
    assert done.probes == done.lists


@LISTS
def test_looks_in_rounds_find_the_same(here, approximate, tmp_path, monkeypatch):
    _, source, out, done = approximate
    monkeypatch.setattr(searching, "_LOOK_BYTES", 4 * done.probes * (done.rows // 3))
    rounds = []
    looks = Searching._looks
    monkeypatch.setattr(Searching, "_looks", lambda *args: rounds.append(args[1]) or looks(*args))
    assert str(nfc_file(source, tmp_path / "out.npy", approximate=True).recall) == str(done.recall)
    assert len(rounds) >= 4  # each row's own list, and three rounds or more
    assert (tmp_path / "out.npy").read_bytes() == out.read_bytes()


def test_keys_order_by_distance_and_then_by_position():
    distances = np.array([[0.5, 0.25, 0.25, 1e-30, -0.0, -1e-9, np.inf]], np.float32)
    positions = np.array([[7, 2**31 + 3, 4, 9, 6, 5, 1]])
    keys = searching._keys(distances, positions)
    assert searching._positions(np.sort(keys, axis=1)).tolist() == [[5, 6, 9, 4, 2**31 + 3, 7, 1]]
    assert searching._positions(np.array([searching._NONE, 3])).tolist() == [-1, 3]


@LISTS
def test_too_low_a_recall_writes_nothing(here, approximate, tmp_path):
    _, source, _, done = approximate
    message = r"nprobe must give a recall of at least 0.9, got nprobe=1, recall of mutual edges 0\..*Pass nprobe=2"
    with pytest.raises(RuntimeError, match=message):
        nfc_file(source, tmp_path / "out.npy", approximate=True, nprobe=1)
    assert list(tmp_path.iterdir()) == []
    assert done.probes > 1


@LISTS
def test_lists_without_faiss(here, rng, tmp_path, monkeypatch):
    source, out = files(tmp_path, drawn(rng, 100, 6, np.float32))
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = "approximate must be False where faiss cannot be used: importing it failed"
    with monkeypatch.context() as patched:
        patched.delattr(enhancement, "connected")  # said before Ray starts
        with pytest.raises(RuntimeError, match=message):
            nfc_file(source, out, approximate=True)
    nfc_file(source, out)
    np.testing.assert_array_equal(np.load(out), nfc(np.load(source)))


def test_an_exact_search_of_days_is_asked_for(here, rng, tmp_path, monkeypatch):
    source, out = files(tmp_path, drawn(rng, 100, 6, np.float32))
    monkeypatch.setattr(enhancement, "LONGEST", 1e-6)
    with pytest.raises(
        RuntimeError, match=r"exact must be True for a search of more than .* hours; about .*approximate"
    ):
        nfc_file(source, out, block_rows=30)
    assert not out.exists()
    nfc_file(source, out, block_rows=30, exact=True)
    assert out.exists()


@pytest.mark.parametrize(("first", "later", "refused"), [(1e9, 1e-9, False), (1e-9, 1e9, True)])
def test_first_tasks_do_not_tell_how_long_all_take(here, rng, tmp_path, monkeypatch, first, later, refused):
    source, out = files(tmp_path, drawn(rng, 100, 6, np.float32))
    run, times = searching._Pair.run, [later] * 10  # by two workers
    times[:2] = [first] * 2
    monkeypatch.setattr(searching._Pair, "run", lambda task, rows: (times.pop(0), run(task, rows)[1]))
    with pytest.raises(RuntimeError, match="exact must be True") if refused else nullcontext():
        nfc_file(source, out, block_rows=30)
    assert out.exists() != refused


def people(rng, n, cameras, dtype=np.float32):
    """Features of repeated people in cameras with offsets, and their cameras."""
    who, cams = rng.integers(0, n // 8, n), rng.integers(0, cameras, n)
    x = rng.standard_normal((n // 8, 12))[who] + 0.7 * rng.standard_normal((cameras, 12))[cams]
    x += 0.25 * rng.standard_normal((n, 12))
    x[5:30] = x[4]
    x[7] = 0
    return x.astype(dtype), cams


@pytest.mark.parametrize("cameras", [3, 12, 60, 1])
@pytest.mark.parametrize("method", ["auto", "guarded", "cameras", "centring"])
def test_other_methods_are_those_of_one_process_bit_for_bit(here, rng, tmp_path, method, cameras):
    x, camids = people(rng, 700, cameras, np.float64 if cameras == 12 else np.float32)
    camids[::50] = -1
    source, out = files(tmp_path, x)
    done = enhance_file(source, out, camids, method=method, block_rows=150)
    alone = Centralizer(method=method).enhance(x[:1], x, gallery_camids=camids, camera_statistics="gallery")[1]
    np.testing.assert_array_equal(np.load(out), alone)
    assert done.reason.startswith(method if method != "auto" else ("cameras", "guarded"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npy", "out.npy"]


def test_guarded_without_cameras(here, rng, tmp_path):
    x = people(rng, 600, 1)[0]
    source, out = files(tmp_path, x)
    done = enhance_file(source, out, block_rows=130)
    np.testing.assert_array_equal(np.load(out), Centralizer().enhance(x[:1], x)[1])
    assert "without cameras" in done.reason
    assert (np.load(out) != x).any()
    with pytest.raises(ValueError, match="camids must name cameras for method='cameras'"):
        enhance_file(source, tmp_path / "other.npy", method="cameras")


def test_commands(two_nodes, rng, tmp_path, capsys):
    x = drawn(rng, 120, 6, np.float32)
    source, out = files(tmp_path, x)
    expected = nfc(x, 3, 2)
    nfc_3 = ["--method", "nfc", "--k1", "3"]
    assert main(["enhance", str(source), "--out", str(out), *nfc_3, "--ray", "auto", "--workers", "2"]) == 0
    np.testing.assert_array_equal(np.load(out), expected)
    said = capsys.readouterr().out
    assert said.startswith("enhance: 120 features by 2 workers in ")
    assert said.endswith(f" s, exact. nfc, k1 3, k2 2, whatever the evidence\nwrote {out}\n")
    alone = tmp_path / "alone.npy"
    alone.write_bytes(b"before")
    assert main(["enhance", str(source), str(alone), *nfc_3]) == 2
    assert "alone.npy exists. Choose another name, or overwrite it" in capsys.readouterr().err
    assert main(["enhance", str(source), str(alone), *nfc_3, "--overwrite"]) == 0
    np.testing.assert_array_equal(np.load(alone), expected)


@pytest.mark.parametrize(
    ("method", "why"), [("guarded", "guarded, 2 cameras centred, gate 1.00."), ("auto", "cameras")]
)
def test_the_command_takes_cameras(two_nodes, rng, tmp_path, capsys, method, why):
    x, camids = people(rng, 300, 2)
    source, out = files(tmp_path, x)
    np.save(tmp_path / "cameras.npy", camids)
    words = ["--cameras", str(tmp_path / "cameras.npy"), "--workers", "1", "--method", method]
    assert main(["enhance", str(source), str(out), *words]) == 0
    alone = Centralizer(method=method).enhance(x[:1], x, gallery_camids=camids, camera_statistics="gallery")[1]
    np.testing.assert_array_equal(np.load(out), alone)
    assert why in capsys.readouterr().out


@LISTS
def test_the_command_tells_the_recall(here, rng, tmp_path, capsys):
    source, out = files(tmp_path, drawn(rng, 120, 6, np.float32))
    out.write_bytes(b"before")
    words = ["--method", "nfc", "--workers", "2", "--approximate", "--overwrite"]
    assert main(["enhance", str(source), str(out), *words]) == 0
    found = (
        r"lists looked at; recall of mutual edges [01]\.\d+: \d+ of \d+ on a sample of \d+ rows; \d+ more that are none"
    )
    assert re.search(found, capsys.readouterr().out)
    assert np.load(out).shape == (120, 6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{npy}", "OUT must be given once"),
        ("{npy} {out}.npy --out {out}.npy", "OUT must be given once"),
        ("{npy} {out}.npz --workers 2", "must end in .npy"),
        ("{none}.npy {out}.npy --workers 2", "There is no feature file"),
        ("{none}.npy {out}.npy --method nfc", "There is no feature file"),
        ("{npy} {out}.npy", "--method must be 'nfc' for an .npy file without --workers or --ray, got 'auto'"),
        ("{npy} {out}.npy --method guarded", "--method must be 'nfc' for an .npy file without --workers or --ray"),
        ("{npy} {out}.npy --method guarded --workers 2 --k1 3", "--k1 must come with --method nfc, not guarded"),
        ("{npy} {out}.npy --cameras {npy} --workers 2 --approximate", "--approximate must come with --method nfc"),
        ("{npy} {out}.npy --cameras {npy} --workers 2 --method nfc", "--cameras must come with another method"),
        (
            "{npy} {out}.npy --cameras {none}.npy --workers 2",
            "--cameras must be an .npy file of one camera for each row",
        ),
        ("{npy} {out}.npy --cameras {flat} --workers 2 --method best", "--method must be one of"),
        ("{npy} {out}.npy --cameras {npy} --workers 2", "--cameras must"),
        ("{npy} {out}.npy --method centring --workers 2", "--cameras must name cameras"),
        ("{npy} {out}.npy --method best", "--method must be one of"),
        ("{npy} {out}.npy --joint --workers 2", "--joint must be left out"),
        ("{npy} {out}.npy --workers 0", "--workers must be at least 1"),
        ("{npy} {out}.npy --k1 0 --workers 1 --method nfc", "--k1 must be at least 1"),
        ("{npy} {out}.npy --approximate", "--approximate must come with --workers or --ray"),
        ("{npy} {out}.npy --workers 1 --nprobe 3 --method nfc", "--nprobe must come with --approximate"),
        (
            "{npy} {out}.npy --workers 1 --approximate --exact --method nfc",
            "--exact must be False with approximate=True",
        ),
        ("{npy} {npy} --workers 1", "in.npy exists"),
        ("{npy} {out}.npy --ray nowhere", "--ray must be 'auto', 'host:port'"),
        ("{flat} {out}.npy --workers 1", "must have shape (N, D)"),
        ("{bad} {out}.npy --workers 1", "must be finite"),
        ("{ints} {out}.npy --workers 1", "of dtype float16"),
        ("{out}.npz {out}2.npz --workers 2", "--workers must be left out for "),
    ],
)
def test_errors(two_nodes, words, message, tmp_path, capsys):
    source, _ = files(tmp_path, np.eye(5))
    names = {"npy": source, "out": tmp_path / "out", "none": tmp_path / "none"}
    for name, x in (("flat", np.ones(5)), ("bad", np.full((5, 2), np.nan)), ("ints", np.ones((5, 2), np.int64))):
        names[name] = tmp_path / f"{name}.npy"
        np.save(names[name], x)
    before = sorted(tmp_path.iterdir())
    assert main(["enhance", *words.format(**names).split()]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
