from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Hub
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
HUB = Hub()

# For tests that compile: PyTorch's compiler warns of PyTorch's own code when it is imported, and, for float32 on a GPU
# with tensor cores, of what those could do.
COMPILES = (
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled:UserWarning",
)


def _isolate_hub_client():
    # huggingface_hub reads these when it is imported, so they are set before any test can import it: no test reaches
    # the real Hub, nor the cache and the token of whoever runs the tests.
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")) or name == "TRANSFORMERS_OFFLINE":
            del os.environ[name]
    home = tempfile.mkdtemp(prefix="pose2id-hf-home-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ.update(HF_ENDPOINT=HUB.endpoint, HF_HOME=home, HF_HUB_DISABLE_TELEMETRY="1")


_isolate_hub_client()


# Files of tests that take longest, in this order.
_LONGEST = (
    "test_packaging",
    "test_batches",
    "test_weights",
    "test_benchmark",
    "test_training",
    "test_neighbors",
    "test_snippets",
    "test_fuzz",
    "test_generator",
    "test_memory",
    "test_interrupts",
    "test_training_runs",
    "test_generated_files",
    "test_hub",
    "test_import",
    "test_flops",
    "test_pairs",
    "test_pipeline",
    "test_part_neighbors",
    "test_real_pedestrians",
)


def pytest_addoption(parser):
    parser.addoption("--stress", action="store_true", help="full counts of kills, fuzz cases and examples")


def pytest_configure(config):
    # Before test modules are imported: their tests take the profile that is loaded then.
    settings.register_profile("default", max_examples=25, deadline=None)
    settings.register_profile("stress", max_examples=200, deadline=None)
    settings.load_profile("stress" if config.getoption("--stress") else "default")


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps the first run's precision and device for the whole process: no test hands them on."""
    yield
    state = sys.modules.get("accelerate.state")  # an extra, and slow to import
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def stress(request):
    """Whether full counts of kills and fuzz cases were asked for."""
    return request.config.getoption("--stress")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    # Before any fixture: models made in tests have the same weights in each run, so that a failure comes back.
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread_for_miniatures(request):
    # Small networks gain nothing from threads, and lose minutes to them where other processes want the cores.
    tests = request.path.stem
    miniature = request.path.parent.name in ("demo", "ipg", "training") and tests != "test_full_size"
    miniature |= tests == "test_real_pedestrians"
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if miniature else threads)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _levels_of_loggers():
    # Examples set them for the whole process: another file's tests would see more records.
    loggers = [logging.getLogger(), logging.getLogger("pose2id")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=["faiss", "torch"])
def backend(request):
    return request.param


@pytest.fixture
def golden():
    return lambda name: np.load(ROOT / "tests" / "golden" / f"{name}.npz")


@pytest.fixture(scope="session")
def two_nodes():
    """A running Ray cluster of two machines in miniature, one core each, and this process connected to it."""
    ray = pytest.importorskip("ray", reason='Ray is in the extra "distributed"')
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def hub():
    """The Hub that huggingface_hub talks to in tests: running, and empty."""
    HUB.clear()
    HUB.start()
    yield HUB
    HUB.stop()


def _there(path):
    if not path.exists():
        pytest.skip(f"what this test compares with is not on this machine: {path}")
    return path


@pytest.fixture(scope="session")
def real_features():
    """Loader of real features, of CUHK03 unless the name is another set's; they are not part of the project."""

    def load(name):
        file = name if name in ("3dpes", "pku_reid", "viper") else f"cuhk03_p1_det_{name}"
        return np.load(_there(SHARED / "data" / f"{file}.npz"))

    return load


@pytest.fixture(scope="session")
def published_vectors():
    """Loader of golden vectors, with their descriptions, that are too large for the project."""

    def load(name):
        path = _there(SHARED / "golden" / f"{name}.npz")
        return np.load(path), json.loads(path.with_suffix(".json").read_text())

    return load


def pytest_collection_modifyitems(items):
    # Long files first, so that no process is left alone with one at the end.
    items.sort(key=lambda item: _LONGEST.index(name) if (name := item.path.stem) in _LONGEST else len(_LONGEST))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def real_sides(name, model):
    """Query, gallery, then identities and cameras of both, of a set of ../shared/data."""
    path = SHARED / "data" / f"{name}.npz"
    if not path.is_file():
        pytest.skip("needs ../shared/data")
    data = np.load(path)
    query = data["is_query"].astype(bool)
    x = data[f"feat_{model}"].astype(np.float32)
    return x[query], x[~query], *(data[key][mask] for key in ("pids", "camids") for mask in (query, ~query))
