"""`Beside`: calls in order, beside their caller; how errors and interruptions end them."""

from __future__ import annotations

import threading

import pytest

from pose2id.io.beside import Beside


def test_calls_are_done_in_order_by_another_thread():
    done = []
    with Beside(most=2) as beside:
        for i in range(20):
            beside.do(lambda i=i: done.append((i, threading.current_thread())))
    assert [i for i, _ in done] == list(range(20))
    assert {thread for _, thread in done}.isdisjoint({threading.current_thread()})


def test_no_more_than_a_few_calls_wait():
    go, done, begun = threading.Event(), [], threading.Semaphore(0)

    def work():
        begun.release()
        go.wait(10)
        done.append(1)

    with Beside(most=2) as beside:
        beside.do(work)
        begun.acquire()
        beside.do(work)
        third = threading.Thread(target=beside.do, args=(work,))
        third.start()
        third.join(0.05)
        assert third.is_alive()
        assert done == []
        go.set()
        third.join()
    assert done == [1, 1, 1]


def test_an_error_ends_the_calls_and_is_raised_once():
    done = []

    def fails():
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Beside(most=10) as beside:  # noqa: PT012
        for call in (lambda: done.append(1), fails, lambda: done.append(2), lambda: done.append(3)):
            beside.do(call)
    assert done == [1]
    with pytest.raises(OSError, match="full"), Beside(most=1) as beside:  # noqa: PT012
        beside.do(fails)
        beside.do(done.append, 4)
        pytest.fail("the second call raises the first one's error")
    assert done == [1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_caller_waits_for_the_call_that_is_being_done_alone(error):
    begun, go, done = threading.Event(), threading.Event(), []

    def work():
        begun.set()
        go.wait(10)
        done.append("first")

    with pytest.raises(error), Beside(most=10) as beside:  # noqa: PT012
        beside.do(work)
        beside.do(done.append, "second")
        begun.wait(10)
        threading.Timer(0.05, go.set).start()
        raise error
    assert done == ["first"]
