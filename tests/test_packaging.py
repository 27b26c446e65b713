from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from miniature import STRESS

import pose2id


def run(*command, cwd):
    found = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.packaging
def test_a_wheel_works_in_a_clean_environment(tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"pose2id-{pose2id.__version__}-py3-none-any.whl"
    files = zipfile.ZipFile(wheel).infolist()
    names = [file.filename for file in files]
    assert {"pose2id/py.typed", "pose2id/report/page.html"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith("pose2id") for name in names)
    assert sum(file.file_size for file in files if not file.filename.startswith("pose2id/demo/tiny/")) < 1.5e6
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    scripts = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    pip = sys.executable, "-m", "pip", "--python", scripts / "python"
    # Most of torch's files are never imported: to compile all of them takes longer than the rest.
    run(*pip, "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    run(*pip, "check", cwd=tmp_path)
    code = "import numpy, pose2id; print(pose2id.nfc(numpy.eye(4), backend='faiss').shape, pose2id.__file__)"
    printed = run(scripts / "python", "-c", f"{code}; from pose2id import *; print(IdentityGenerator)", cwd=tmp_path)
    assert printed.startswith("(4, 4)")
    assert str(tmp_path) in printed
    assert "IdentityGenerator" in printed
    assert "baseline" in run(scripts / "pose2id", "demo", "--people", "2", "--no-picture", cwd=tmp_path)


def test_every_file_is_python_3_10():
    for path in (ROOT / "src").rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), path.name, feature_version=(3, 10))


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == pose2id.__version__


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc, which Linux has")
def test_benchmarks_run_and_compare_outputs():
    command = [sys.executable, "benchmarks/core.py", "--n", "300", "--runs", "1", "--json"]
    assert run(*command, "--no-memory", cwd=ROOT).count('"speedup"') == 4
    assert '"published_mb"' in run(*command, "nfc", cwd=ROOT)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc, which Linux has")
def test_memory_is_linear():
    """8,000 rows: their distance matrix alone would be 256 MB."""
    command = [sys.executable, "benchmarks/core.py", "nfc", "--n", "8000", "--backend", "torch", "--memory-of"]
    ours, theirs = (float(run(*command, side, cwd=ROOT)) for side in ("ours", "published"))
    assert ours < 128
    assert theirs > 256


@STRESS
def test_benchmarks_of_post_processing_run_on_files_of_features(tmp_path):
    rng = np.random.default_rng(0)
    pids, cams = np.repeat(np.arange(20), 6), np.tile([0, 0, 0, 1, 1, 1], 20)
    x = (rng.standard_normal((20, 16))[pids] + rng.standard_normal((120, 16))).astype(np.float32)
    query = np.arange(120) % 6 == 0
    sides = {"query_feats": x[query], "gallery_feats": x[~query], "q_pids": pids[query], "g_pids": pids[~query]}
    np.savez(tmp_path / "mine.npz", **sides, q_camids=cams[query], g_camids=cams[~query])
    file, out = tmp_path / "mine.npz", tmp_path / "out"
    command = [sys.executable, "benchmarks/postprocessing.py", file, "--runs", "1", "--no-memory", "--json"]
    assert len([json.loads(row)["times_nfc"] for row in run(*command, cwd=ROOT).splitlines()]) == 5
    extraction = run(sys.executable, "benchmarks/extraction.py", "--images", "40", "--rounds", "1", cwd=ROOT)
    assert "extract adds" in extraction
    run(sys.executable, "benchmarks/does_it_help.py", "-", file, "--out", out, cwd=ROOT)
    measured = json.loads((out / "results.json").read_text())
    assert "mine" in str(measured)
    assert "rerank with cameras" in (out / "tables.md").read_text()
