from __future__ import annotations

import os
import subprocess
import sys

import pytest

FORKS = """
import os, signal, threading
import numpy as np, torch
import pose2id

X = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)

def computes():
    pose2id.nfc(X)

def fuses():
    pose2id.fuse(X, X[:, None])

def in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(computes()))
    thread.start()
    thread.join()
    assert found

def in_one_thread():
    torch.set_num_threads(1)
    computes()

def forked(function):
    if not (child := os.fork()):
        signal.alarm(20)
        try:
            function()
            os._exit(0)
        except RuntimeError as error:
            os._exit(3 if "forked" in str(error) and "'spawn'" in str(error) else 4)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

in_a_thread()
print(forked(computes))  # this thread has used none yet
computes()
print(*map(forked, (computes, lambda: pose2id.nfc(X[:5]), lambda: pose2id.id2_score(X[:6], [0, 1] * 3), fuses)))
print(*map(forked, (lambda: pose2id.fuse(X[:6], X[:6, None]), in_a_thread, in_one_thread)))
torch.set_num_threads(1)
print(forked(computes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, and OpenMP is GNU's")
def test_a_forked_process_is_refused_where_it_would_hang():
    run = subprocess.run(
        [sys.executable, "-c", FORKS],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout.split() == ["0", "3", "3", "3", "3", "0", "0", "0", "0"]
