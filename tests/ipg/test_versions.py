"""The oldest versions that pyproject.toml allows are those that the second run of these tests takes."""

from __future__ import annotations

import re
import sys

import diffusers
import huggingface_hub
import safetensors
from conftest import ROOT


def test_the_oldest_versions_are_those_of_pyproject():
    oldest = dict(re.findall(r"^(\w+)==(.+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    allowed = dict(re.findall(r'^    "(\w+)>=([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert oldest.keys() == {"diffusers", "huggingface_hub", "safetensors"}
    for name, version in oldest.items():
        assert re.fullmatch(rf"{re.escape(allowed[name])}(\.0)?", version)
    if ".oldest" in sys.path or str(ROOT / ".oldest") in sys.path:
        for module in (diffusers, huggingface_hub, safetensors):
            assert module.__version__ == oldest[module.__name__]
            assert ROOT / ".oldest" in ROOT.joinpath(module.__file__).parents
