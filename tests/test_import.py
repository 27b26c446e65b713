from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import pose2id

HEAVY = ["cv2", "diffusers", "faiss", "matplotlib", "scipy", "sklearn", "torchvision", "timm"]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


LOADED = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"


def test_importing_everything_public_loads_nothing_heavy():
    assert run(f"import pose2id; {LOADED}") == "[]"
    # All names but the generator's, which is made of diffusers' classes.
    names = "', '".join(name for name in pose2id.__all__ if name != "IdentityGenerator")
    everything = f"import pose2id, pose2id.cli; [getattr(pose2id, name) for name in ('{names}')]"
    assert run(f"{everything}; {LOADED}") == "[]"


def test_that_check_can_fail():
    assert "faiss" in run(f"import faiss; {LOADED}")


def test_import_adds_under_half_a_second_to_torch():
    statement = "from pose2id import Centralizer, evaluate, id2_score, k_reciprocal, nfc"
    # Of the processor: what else runs on the machine does not count.
    code = f"import time, torch; start = time.process_time(); {statement}; print(time.process_time() - start)"
    assert min(float(run(code)) for _ in range(3)) < 0.5


@pytest.mark.parametrize("name", pose2id.__all__)
def test_public_names_are_lazy_typed_and_documented(name):
    value = getattr(pose2id, name)
    assert value.__name__ == name
    assert value.__doc__
    assert getattr(importlib.import_module(f"pose2id.{pose2id._HOME[name]}"), name) is value
    assert name in dir(pose2id)


@pytest.mark.parametrize("name", pose2id._SUBMODULES)
def test_submodules_load_by_attribute(name):
    assert run(f"import pose2id; print(pose2id.{name}.__name__)") == f"pose2id.{name}"
    assert name in dir(pose2id)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pose2id.nothing


def test_a_function_is_never_shadowed_by_a_module():
    code = "import pose2id.centralization; from pose2id import nfc; print(callable(nfc))"
    assert run(code) == "True"
