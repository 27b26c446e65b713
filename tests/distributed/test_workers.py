"""Tasks on a Ray cluster of two machines in miniature: nothing lost, nothing twice, whatever dies."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import time
from pathlib import Path

import pytest

import pose2id
from pose2id.distributed.cluster import Cluster, _cores_each, connected
from pose2id.distributed.workers import Workers, in_order

# Workers don't find test modules.
pytest.importorskip("ray").cloudpickle.register_pickle_by_value(sys.modules[__name__])


def results(cluster, make, tasks):
    with Workers(cluster, make) as workers:
        yield from workers.results(tasks)


def squares():
    """A worker's function, made once by each: the square, and the process that computed it."""
    return lambda x: (x * x, os.getpid())


def slow():
    def work(x):
        time.sleep(0.05)
        return x, os.getpid()

    return work


def inverses():
    return lambda x: 1 / x


def seen_by(folder, count):
    """A worker's function, whose first task waits until so many workers are there."""

    def make():
        def work(x):
            (folder / str(os.getpid())).touch()
            while len(list(folder.iterdir())) < count:
                time.sleep(0.01)
            return x, os.getpid()

        return work

    return make


def wait_until_gone(pids):
    """Until Ray has buried them, so that what they are asked next fails at once."""
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)


def test_each_task_once_by_two_workers(two_nodes, tmp_path):
    with connected() as cluster:
        assert cluster.workers == 2
        assert cluster.takes == {"num_cpus": 1.0}
        found = dict(results(cluster, seen_by(tmp_path, 2), iter(range(20))))
    assert sorted(found) == list(range(20))
    assert all(found[i][0] == i for i in found)
    assert len({pid for _, pid in found.values()} - {os.getpid()}) == 2


def test_results_in_order_and_tasks_not_far_ahead(two_nodes):
    drawn = []

    def make():
        return lambda x: time.sleep(0.3 if x == 0 else 0.01) or x

    with connected(workers=2) as cluster, Workers(cluster, make) as workers:
        tasks = (drawn.append(i) or i for i in range(40))
        for due, x in enumerate(in_order(workers.results(tasks, ahead=8))):
            assert x == due
            assert due or len(drawn) <= 8  # the first took long
    assert drawn == list(range(40))


def test_no_tasks(two_nodes):
    with connected(workers=1) as cluster:
        assert list(results(cluster, squares, [])) == []


def test_tasks_again_for_the_same_workers(two_nodes):
    with connected(workers=1) as cluster, Workers(cluster, squares) as workers:
        ((place, (nine, first)),) = workers.results([3])
        again = dict(workers.results([4, 5]))
    assert (place, nine) == (0, 9)
    assert again == {0: (16, first), 1: (25, first)}


def test_tasks_that_were_given_up_are_forgotten(two_nodes):
    with connected(workers=1) as cluster, Workers(cluster, inverses) as workers:
        with pytest.raises(ZeroDivisionError):
            list(workers.results([1, 0, 3]))
        next(workers.results(range(1, 6)))
        assert list(workers.results([4, 2])) == [(0, 0.25), (1, 0.5)]


def test_tasks_are_drawn_as_they_are_needed(two_nodes):
    drawn, came = [], 0
    with connected(workers=2) as cluster:
        for _ in results(cluster, slow, (drawn.append(i) or i for i in range(30))):
            came += 1
            assert len(drawn) - came <= 4
    assert drawn == list(range(30))


@pytest.mark.parametrize("moment", range(2))
def test_a_killed_worker_loses_nothing(two_nodes, caplog, moment):
    found = []
    with connected(workers=2) as cluster:
        for place, (x, pid) in results(cluster, slow, range(12)):
            assert place == x
            if len(found) == 5 * moment:
                os.kill(pid, signal.SIGKILL)
            found.append(x)
    assert sorted(found) == list(range(12))
    assert "a worker died at task" in caplog.text
    assert "is replaced" in caplog.text


def test_a_task_that_kills_its_workers_ends_the_run(two_nodes):
    def deadly():
        # By then what was done before has been told.
        return lambda x: time.sleep(0.5) or os._exit(1) if x == 3 else x

    with (
        connected(workers=2) as cluster,
        pytest.raises(RuntimeError, match=r"3 workers died at task 4\. Give each .*The last died of: "),
    ):
        list(results(cluster, deadly, range(8)))


def test_workers_that_died_between_two_jobs(two_nodes, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("pose2id.distributed.workers._ANSWER", 30)
    with connected(workers=6) as cluster, Workers(cluster, seen_by(tmp_path, 6)) as workers:
        pids = {pid for _, (_, pid) in workers.results(range(12))}
        assert len(pids) == 6
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until_gone(pids)
        assert [x for _, (x, _) in workers.results([7])] == [7]
    assert caplog.text.count("a worker died while it had no task, and is replaced") == 6


def test_workers_that_die_as_they_begin(two_nodes):
    with connected(workers=1) as cluster, pytest.raises(RuntimeError, match="3 workers died as they began"):
        list(results(cluster, lambda: os._exit(1), range(8)))


def test_errors_of_tasks_and_of_making_are_raised(two_nodes):
    def fails():
        raise ValueError("weights must be whole, got half.")

    with connected(workers=2) as cluster:
        with pytest.raises(ZeroDivisionError):
            list(results(cluster, lambda: lambda x: 1 // x, [1, 2, 0]))
        with pytest.raises(ValueError, match="weights must be whole, got half"):
            list(results(cluster, fails, [1]))
        with pytest.raises(FileNotFoundError, match="no/such/file"):
            list(results(cluster, lambda: open, ["no/such/file"]))


def test_a_full_disk_of_one_worker(two_nodes, tmp_path, caplog):
    def make():
        try:
            (tmp_path / "full").touch(exist_ok=False)
        except FileExistsError:

            def fine(x):
                while not (tmp_path / "tried").exists():
                    time.sleep(0.01)
                return x

            return fine

        def full(x):
            (tmp_path / "tried").touch()
            raise OSError(errno.ENOSPC, "No space left on device", f"/disk/{x}")

        return full

    with connected(workers=2) as cluster:
        assert sorted(results(cluster, make, "abcdefg")) == list(enumerate("abcdefg"))
        assert "a worker gets no more tasks: [Errno 28] No space left on device: '/disk/" in caplog.text
        (tmp_path / "full").unlink()
    with connected(workers=1) as cluster, Workers(cluster, make) as workers:
        for _ in range(2):  # and again
            with pytest.raises(OSError, match="No space left on device"):
                list(workers.results("abcdefg"))


def test_a_full_disk_and_a_worker_that_finds_no_place(two_nodes, monkeypatch):
    def make():
        def full(x):
            raise OSError(errno.ENOSPC, "No space left on device", f"/disk/{x}")

        return full

    monkeypatch.setattr("pose2id.distributed.workers._PATIENCE", 1)
    with connected(workers=2) as cluster:
        cluster.workers = 3
        with pytest.raises(OSError, match="No space left on device"):
            list(results(cluster, make, "abcdefg"))


class TwoWords(Exception):  # noqa: N818
    """Pickle cannot make it anew."""

    def __init__(self, one, two):
        super().__init__(one + two)


def test_an_error_that_cannot_travel(two_nodes):
    def make():
        def work(x):
            raise TwoWords("a", "b")

        return work

    with connected(workers=1) as cluster, pytest.raises(RuntimeError, match="an error that cannot travel"):
        list(results(cluster, make, [1]))


def test_workers_that_cannot_begin_while_others_work(two_nodes, tmp_path, caplog):
    def make():
        try:
            (tmp_path / "first").touch(exist_ok=False)
        except FileExistsError:
            raise OSError(errno.EIO, "network down") from None
        return lambda x: time.sleep(0.2) or x

    with connected(workers=2) as cluster:
        assert sorted(results(cluster, make, range(15))) == [(i, i) for i in range(15)]
    assert "a worker died as they began" in caplog.text


def test_references_in_what_workers_are_made_of(two_nodes):
    ray = pytest.importorskip("ray")
    with connected(workers=1) as cluster:
        number = ray.put(5)

        def make(number=number):
            return lambda x: x * ray.get(number)

        assert list(results(cluster, make, [2])) == [(0, 10)]


@pytest.mark.parametrize(
    ("machines", "workers", "each"),
    [
        ([2], 1, 2),
        ([2], 2, 1),
        ([2], 8, 0.25),
        ([64, 64], 3, 32),
        ([4, 64], 2, 4),
        ([0.5, 2], 1, 1),
        ([1, 1], 2, 1),
        ([], 1, 1),
    ],
)
def test_cores_for_each_worker(machines, workers, each):
    assert _cores_each(machines, workers) == each


@pytest.mark.parametrize(
    ("gpus", "cores", "workers", "count", "takes"),
    [
        ([2, 1], 8, None, 3, (1, 4)),
        ([2], 8, 3, 3, (1 / 2, 2)),
        ([1], 8, 4, 4, (1 / 4, 2)),
        ([8], 8, 8, 8, (1, 1)),
        ([8], 4, 8, 8, (1, 0.5)),
        ([1], 0, 1, 1, (1, 0)),
    ],
)
def test_gpus_for_each_worker(gpus, cores, workers, count, takes):
    class Ray:
        def nodes(self):
            machines = [{"CPU": cores, "GPU": n} for n in gpus]
            return [{"Alive": True, "Resources": each} for each in [{"CPU": 4}, *machines]]

    cluster = Cluster(Ray(), workers)
    assert cluster.workers == count
    assert cluster.takes == {"num_gpus": takes[0], "num_cpus": takes[1]}


def test_another_version_on_a_worker(two_nodes, monkeypatch):
    monkeypatch.setattr(pose2id, "__version__", "0.0.1")
    with (
        connected(workers=1) as cluster,
        pytest.raises(RuntimeError, match=r"has pose2id .*, and this process 0\.0\.1"),
    ):
        list(results(cluster, squares, [1]))


def test_a_machine_goes(two_nodes, caplog):
    def make():
        import ray  # noqa: PLC0415

        return lambda x: time.sleep(0.05) or (x, ray.get_runtime_context().get_node_id())

    third = two_nodes.add_node(num_cpus=1)
    found, gone = [], False

    def tasks():
        """As many as it takes until that is noticed."""
        yield from itertools.takewhile(lambda i: i < 2000 and "is replaced" not in caplog.text, itertools.count())

    with connected(workers=3) as cluster:
        for place, (x, machine) in results(cluster, make, tasks()):
            assert place == x
            found.append(x)
            if machine == third.node_id and not gone:
                two_nodes.remove_node(third, allow_graceful=False)
                gone = True
    assert sorted(found) == list(range(len(found)))
    assert "is replaced" in caplog.text  # that one finds no place, and nobody waits for it


@pytest.mark.parametrize("address", ["cluster", "ray://", "head:port", 5])
def test_addresses_that_are_none(address):
    with pytest.raises(ValueError, match="address must be 'auto', 'host:port' or 'ray://host:port', got "):  # noqa: SIM117
        with connected(address):
            pass


def test_nothing_answers(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("ray"), "is_initialized", lambda: False)
    for address in ("127.0.0.1:1", "ray://localhost:1", "127.0.0.1:99999"):
        with pytest.raises(ConnectionError, match=r"nothing answers at '.*Start a head there"), connected(address):
            pass
