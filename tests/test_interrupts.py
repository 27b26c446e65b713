"""SIGINT while a command works: status 130, one line, nothing unfinished, and the same command works afterwards."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
import onnx_files
import pytest
import torch
from conftest import ROOT
from miniature import STRESS, miniature, people

import pose2id
from pose2id.cli import main

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
_PACKAGE = os.path.dirname(pose2id.__file__)
_MOMENTS = 8  # of each command, with --stress


def serve():
    """What runs in the `Commands` process: a line of JSON is a command, for a child; the answer is its exit status."""
    import accelerate  # noqa: F401, PLC0415 - once, and not in every child
    import diffusers  # noqa: F401, PLC0415
    import faiss  # noqa: F401, PLC0415
    import matplotlib.figure  # noqa: F401, PLC0415
    import scipy.io  # noqa: F401, PLC0415
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401, PLC0415

    import pose2id.demo.demo  # noqa: PLC0415
    import pose2id.training.run  # noqa: F401, PLC0415

    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _command(**json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def _command(argv, output, name, number):
    """Run a command, and interrupt it at the number-th call of a function: of this name, or of the package."""
    for stream, file in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{file}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    calls = itertools.count(1)

    def count(frame, event, _):
        code = frame.f_code
        # Python loses what is raised while a generator that nobody needs is closed.
        own = code.co_filename.startswith(_PACKAGE) and not code.co_flags & inspect.CO_GENERATOR
        if event == "call" and (code.co_name == name if name else own) and next(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)

    status = 1
    try:
        threading.setprofile(count)
        sys.setprofile(count)
        status = main(argv)
        sys.setprofile(None)
        Path(f"{output}.calls").write_text(str(next(calls) - 1))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # ending the interpreter takes seconds


class Commands:
    """A process that has imported everything, which takes seconds, and forks one for each command."""

    def __init__(self, folder):
        self._folder = folder
        paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import test_interrupts; test_interrupts.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )

    def run(self, argv, name=None, number=0):
        """A command's exit status, what it said on stderr, and how many calls it made."""
        output = self._folder / "said"
        line = {"argv": [str(word) for word in argv], "output": str(output), "name": name, "number": number}
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        return status, Path(f"{output}.err").read_text(), int(Path(f"{output}.calls").read_text())

    def close(self):
        self._process.communicate()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the commands are given."""
    folder = tmp_path_factory.mktemp("given")
    people(folder / "people", 2)
    miniature().save_pretrained(folder / "weights")
    (folder / "stripes.onnx").write_bytes(onnx_files.stripes())
    rng, pids = np.random.default_rng(0), np.repeat(np.arange(1, 7), 4)
    feats = rng.standard_normal((6, 8))[pids - 1] + rng.standard_normal((24, 8))
    labels = {"q_pids": pids, "g_pids": pids, "q_camids": np.tile([1, 2], 12), "g_camids": np.tile([2, 3], 12)}
    np.savez(folder / "features.npz", query_feats=feats, gallery_feats=feats + 0.1, **labels)
    return folder


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


TRAIN = (
    "train {given}/people/table.csv --out {out}/run --weights {given}/weights --steps 4 --batch-size 2 --device cpu "
    "--checkpoint-every 2 --validation-images 2 --validation-steps 1"
)
GENERATE = (
    "generate {given}/people/images --out {out}/pictures --weights {given}/weights --steps 2 --size 16x8 "
    "--batch-size 4 --device cpu --grid"
)
CLEAN = (
    "clean {given}/people/table.csv --out {out}/kept.csv --sheet {out}/dropped.png --model onnx:{given}/stripes.onnx "
    "--transform torchreid --workers 0"
)
POSES = (
    "poses {given}/people/table.csv -n 1 --out {out}/poses.json --sheet {out}/poses.png "
    "--model onnx:{given}/stripes.onnx --transform torchreid --workers 0"
)
# A command, the function in which it is interrupted, and at which of its calls: where files are half-written.
COMMANDS = {
    "generate": (GENERATE, "write_bytes", 42),
    "train": (TRAIN, "save_file", 9),
    "enhance": ("enhance {given}/features.npz {out}/enhanced.npz", "write_array", 2),
    "evaluate": ("evaluate {given}/features.npz", "evaluate", 2),
    "evaluate, re-ranked": ("evaluate {given}/features.npz", "k_reciprocal", 1),
    "convert": ("convert {given}/weights {out}/converted", "save_file", 3),
    "draw-people": ("draw-people {out}/people --people 2 --cameras 1", "putchunk", 8),
    "table": ("table {given}/people/images {out}/table.csv", "write_bytes", 1),
    "clean": (CLEAN, "write_bytes", 2),
    "poses": (POSES, "to_entries", 1),
    "demo": ("demo --no-generation --people 12 --picture {out}/demo.png", "putchunk", 3),
    "demo, generated": ("demo --people 3 --no-picture", "generate_iter", 2),
}
_ALWAYS = ("generate", "train", "enhance")
EACH = pytest.mark.parametrize("command", [c if c in _ALWAYS else pytest.param(c, marks=STRESS) for c in COMMANDS])


def unfinished(folder):
    """Hidden files, of which a run's lock is none: a crash must not let two trainings into one directory."""
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


@EACH
def test_an_interrupted_command_ends_cleanly_and_runs_again(command, commands, given, tmp_path):
    words, name, number = COMMANDS[command]
    argv = words.format(given=given, out=tmp_path).split()
    status, said, _ = commands.run(argv, name, number)
    assert (status, said.splitlines()[-1]) == (130, "pose2id: interrupted")
    assert "Traceback" not in said
    assert unfinished(tmp_path) == []
    assert commands.run(argv)[0] == 0
    assert unfinished(tmp_path) == []


@STRESS
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "demo, generated"])  # takes minutes
def test_a_command_interrupted_at_any_moment(command, commands, given, tmp_path):
    words, rng = COMMANDS[command][0], random.Random(command)
    (tmp_path / "whole").mkdir()
    calls = commands.run(words.format(given=given, out=tmp_path / "whole").split())[2]
    for moment in range(_MOMENTS):
        out = tmp_path / str(moment)
        out.mkdir()
        argv = words.format(given=given, out=out).split()
        status, said, _ = commands.run(argv, None, rng.randrange(1, calls + 1))
        assert (status, said.splitlines()[-1]) == (130, "pose2id: interrupted"), said
        assert "Traceback" not in said
        assert unfinished(out) == []
        status, said, _ = commands.run(argv)
        assert status == 0 or " exists" in said  # nothing but the last line was missing
        assert unfinished(out) == []
