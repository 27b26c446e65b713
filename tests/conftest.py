from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


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
def real_features():
    """Loader of the real CUHK03 features; they are not part of the project."""

    def load(name):
        path = SHARED / "data" / f"cuhk03_p1_det_{name}.npz"
        if not path.exists():
            pytest.skip(f"the real CUHK03 features are not on this machine: {path}")
        return np.load(path)

    return load


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
