"""Galleries in threads: many search while one changes them."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time

import numpy as np
import pytest
import torch
from miniature import STRESS

from pose2id import Centralizer, Gallery
from pose2id.gallery import gallery as module
from pose2id.gallery.locks import SharedLock

READERS, CHANGES = 4, 100
DIM, OF = 16, 20


@pytest.fixture(autouse=True)
def _watched():
    # Threads that wait for each other would wait for ever: say where, and end.
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def people(numbers):
    """Features of images by number: image i is always the same, of person i % 20, in camera i // 20 % 3."""
    centres = np.random.default_rng(0).standard_normal((OF, DIM))
    noise = np.stack([np.random.default_rng(100 + number).standard_normal(DIM) for number in numbers])
    numbers = np.asarray(numbers)
    return (centres[numbers % OF] + 0.2 * noise).astype(np.float32), numbers // OF % 3


def label(number):
    return f"label of {number}"


def add(gallery, numbers):
    x, camids = people(numbers)
    gallery.add(x, numbers, camids, [label(number) for number in numbers])


class Threads:
    """Threads that are all ended and asked for their errors at the end."""

    def __init__(self):
        self.stop, self.errors, self._threads = threading.Event(), [], []

    def start(self, function, *args):
        def run():
            try:
                function(*args)
            except BaseException as error:
                self.errors.append(error)
                self.stop.set()

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()
        return self._threads[-1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "deadlock"
        if self.errors:
            raise self.errors[0]


def look(gallery, at, lower, upper):
    """One search or another; whether what it found can be true of the gallery. Images lower to upper may be there."""
    x, camids = people([at % OF, at * 7 % OF])
    how = {"query_camids": camids} if at % 5 != 2 else {}
    rerank = ("k-reciprocal" if at % 3 else "camera") if at % 7 == 0 and how else None
    lowest = lower()
    distances, ids, labels = gallery.search(x, 5, **how, rerank=rerank)
    highest = upper()
    assert distances.shape == ids.shape == labels.shape == (2, 5)
    assert np.isfinite(distances).all()
    assert (np.diff(distances, axis=1) >= 0).all()
    for row in range(2):
        assert len(set(ids[row])) == 5
        assert [label(number) for number in ids[row]] == labels[row].tolist()
        assert all(lowest <= number < highest for number in ids[row])
    if rerank is None:
        assert all(number % OF == query for query, number in zip((at % OF, at * 7 % OF), ids[:, 0], strict=True))


ALWAYS, MORE = [("auto", 0.2), ("nfc", None)], [("guarded", None), ("cameras", None), ("centring", None)]


@pytest.mark.parametrize(("method", "share"), [*ALWAYS, *(pytest.param(*case, marks=STRESS) for case in MORE)])
def test_searches_beside_changes(method, share, tmp_path):
    gallery = Gallery(Centralizer(method=method), refit_share=share)
    first, last = [0], [120]  # images that may be there
    add(gallery, list(range(120)))
    searches, changing = [0] * READERS, threading.Event()

    def search(reader):
        at = reader
        while not threads.stop.is_set():
            look(gallery, at, lambda: first[0], lambda: last[0])
            if at % 11 == 0:
                assert len(gallery.ids) >= 100
                assert not np.isnan(gallery.features()).any()
                assert gallery.reason
                assert "x" not in gallery
            searches[reader] += changing.is_set()
            at += READERS
            time.sleep(0.005)  # or the one that changes seldom gets its turn

    with Threads() as threads:
        for reader in range(READERS):
            threads.start(search, reader)
        changing.set()
        for change in range(CHANGES):
            last[0] += 2
            add(gallery, [last[0] - 2, last[0] - 1])
            gallery.remove([first[0], first[0] + 1])
            first[0] += 2
            numbers = list(range(first[0] + 10, first[0] + 13))
            gallery.update(numbers, people(numbers)[0] * np.float32(1 + change % 3))
            if change % 10 == 5:
                gallery.refit()
            if change % 25 == 7:
                gallery.save(tmp_path / "g.safetensors")
            if threads.stop.is_set():
                break
            time.sleep(0)
        changing.clear()
        # Then, alone, it is what a gallery is that was never searched.
        gallery.refit()
        alone = Gallery(Centralizer(method=method), refit_share=None)
    assert min(searches) > 5, searches
    numbers = gallery.ids.tolist()
    assert numbers == list(range(first[0], last[0]))
    raw = gallery.features(raw=True)
    alone.add(raw, numbers, people(numbers)[1], [label(number) for number in numbers])
    assert np.array_equal(gallery.features(), alone.features())
    x, camids = people(range(20))
    for ours, theirs in zip(*(g.search(x, 6, query_camids=camids) for g in (gallery, alone)), strict=True):
        assert np.array_equal(ours, theirs)


def test_changes_from_many_threads_all_happen():
    gallery = Gallery(Centralizer(method="guarded"), refit_share=0.2)
    add(gallery, list(range(60)))

    def change(own):
        for at in range(15):
            number = 1000 * own + at
            add(gallery, [number])
            if at % 3 == 0:
                gallery.update([number], people([number])[0])
            if at % 3 == 1:
                gallery.remove([number])

    with Threads() as threads:
        for own in (1, 2, 3):
            threads.start(change, own)
        for thread in list(threads._threads):
            thread.join(60)
    kept = [1000 * own + at for own in (1, 2, 3) for at in range(15) if at % 3 != 1]
    assert sorted(gallery.ids) == [*range(60), *kept]
    for number in kept:
        assert np.array_equal(gallery.features([number], raw=True), people([number])[0])
    gallery.refit()
    assert gallery.search(people(range(20))[0], 1).labels[:, 0].tolist()[0].startswith("label of")


@pytest.mark.parametrize("change", ["refit", "add", "remove", "update"])
def test_a_query_in_the_middle_of_a_refit_does_not_wait(change, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()

    class Slow(module.Fit):
        def run(self):
            begun.set()
            assert may_end.wait(60)
            return super().run()

    gallery = Gallery(Centralizer(method="guarded"), refit_share=0.01)
    add(gallery, list(range(80)))
    x = people([3])[0]
    before = gallery.search(x, 5)
    monkeypatch.setattr(module, "Fit", Slow)
    changes = {
        "refit": gallery.refit,
        "add": lambda: add(gallery, [80, 81, 82, 83]),
        "remove": lambda: gallery.remove([3, 23, 43, 63]),
        "update": lambda: gallery.update([3, 23, 43, 63], people([4, 24, 44, 64])[0]),
    }
    answered = []
    with Threads() as threads:
        changer = threads.start(changes[change])
        assert begun.wait(60)

        def ask():
            answered.append(gallery.search(x, 5))
            answered.append((len(gallery), gallery.ids, gallery.features([3]), gallery.reason, repr(gallery)))

        asker = threads.start(ask)
        asker.join(30)
        waited, running = asker.is_alive(), changer.is_alive()
        may_end.set()
        asker.join(60)
    assert not waited
    assert running  # the refit had not ended
    for ours, theirs in zip(answered[0], before, strict=True):
        assert np.array_equal(ours, theirs)  # as before the change
    assert answered[1][0] == 80
    after = gallery.search(x, 5).ids.tolist()
    assert (after == before.ids.tolist()) == (change == "refit")
    assert len(gallery) == {"add": 84, "remove": 76}.get(change, 80)


def test_cameras_can_be_asked_for_while_new_ones_come():
    interval = sys.getswitchinterval()
    gallery, x = Gallery(refit_share=None), people(range(50))[0]
    gallery.add(x, camids=[f"first {at}" for at in range(50)])

    def ask():
        while not threads.stop.is_set():
            assert gallery.camids([0]).tolist() == ["first 0"]

    sys.setswitchinterval(1e-6)
    try:
        with Threads() as threads:
            threads.start(ask)
            for change in range(60):
                gallery.add(x, camids=[f"{change} {at}" for at in range(50)])
    finally:
        sys.setswitchinterval(interval)


def test_a_change_that_fails_leaves_the_gallery_open():
    gallery = Gallery(Centralizer(method="centring"), refit_share=None)
    add(gallery, list(range(70)))
    with Threads() as threads:

        def fail():
            for _ in range(3):
                with pytest.raises(ValueError, match="ids must be new"):
                    add(gallery, [3])
                with pytest.raises(KeyError):
                    gallery.remove([70])
                with pytest.raises(ValueError, match="none is known"):
                    Gallery(Centralizer(method="centring")).add(people([1])[0])

        threads.start(fail).join(60)
        threads.start(add, gallery, [70]).join(60)
        threads.start(gallery.search, people([1])[0]).join(60)
    assert len(gallery) == 71


def test_a_lock_lets_readers_in_together_and_a_writer_alone():
    lock, inside, order = SharedLock(), threading.Barrier(3), []
    entered, go = threading.Event(), threading.Event()

    def read():
        with lock.reading():
            inside.wait(30)  # only passed if all three are in
            entered.set()
            assert go.wait(30)
            order.append("reader")

    def write():
        with lock.writing():
            order.append("writer")
            time.sleep(0.05)
            order.append("writer")

    def read_late():
        with lock.reading():
            order.append("late")

    with Threads() as threads:
        for _ in range(3):
            threads.start(read)
        assert entered.wait(30)
        writers = [threads.start(write) for _ in range(2)]
        while lock._waiting < 2:
            time.sleep(0.001)
        late = threads.start(read_late)
        time.sleep(0.05)
        assert order == []
        go.set()
        for thread in (*writers, late):
            thread.join(30)
    assert order == ["reader"] * 3 + ["writer"] * 4 + ["late"]


def test_a_lock_is_free_again_after_errors():
    lock = SharedLock()
    for held in (lock.reading, lock.writing):
        with pytest.raises(ZeroDivisionError), held():
            1 / 0  # noqa: B018
    with Threads() as threads:
        done = []

        def both():
            with lock.writing():
                done.append("writer")
            with lock.reading():
                done.append("reader")

        threads.start(both).join(30)
    assert done == ["writer", "reader"]
