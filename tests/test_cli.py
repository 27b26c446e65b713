from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
from PIL import Image

import pose2id
from pose2id import Centralizer, centre_cameras, evaluate, evaluate_rank, evidence, id2_score, k_reciprocal, nfc
from pose2id.cli import main
from pose2id.demo import demo
from pose2id.io.feature_files import load_features


@pytest.fixture
def path(rng, tmp_path):
    centres = rng.standard_normal((10, 8))
    q_pids, g_pids = np.repeat(np.arange(1, 11), 2), np.repeat(np.arange(1, 11), 6)
    np.savez(
        tmp_path / "features.npz",
        query_feats=(centres[q_pids - 1] + 0.9 * rng.standard_normal((20, 8))).astype(np.float32),
        gallery_feats=(centres[g_pids - 1] + 0.9 * rng.standard_normal((60, 8))).astype(np.float32),
        q_pids=q_pids,
        g_pids=g_pids,
        q_camids=np.tile([1, 2], 10),
        g_camids=np.tile([1, 2, 3], 20),
        note=np.arange(3),
    )
    return tmp_path / "features.npz"


def test_enhance_writes_the_centralized_features_and_keeps_the_rest(path, tmp_path, capsys):
    out = tmp_path / "out.npz"
    with pytest.warns(UserWarning, match="method='nfc' may harm here"):
        assert main(["enhance", str(path), str(out), "--k1", "3"]) == 0
    before, after = load_features(path), load_features(out)
    q, g = nfc(before.query_feats, 3), nfc(before.gallery_feats, 3)
    np.testing.assert_array_equal(after.query_feats, q)
    np.testing.assert_array_equal(after.gallery_feats, g)
    np.testing.assert_array_equal(after.g_camids, before.g_camids)
    np.testing.assert_array_equal(after.others["note"], [0, 1, 2])
    assert capsys.readouterr().out == f"wrote {out}\n"
    joint = tmp_path / "joint.mat"
    with pytest.warns(UserWarning, match="method='nfc' may harm here"):
        assert main(["enhance", str(path), str(joint), "--method", "nfc", "--joint"]) == 0
    expected = nfc(np.concatenate([before.query_feats, before.gallery_feats]))
    np.testing.assert_array_equal(load_features(joint).query_feats, expected[: len(before.query_feats)])


METHODS = {"auto": "guarded", "guarded": "guarded", "cameras": "cameras: 3 cameras", "centring": "centring: 3 cameras"}


@pytest.mark.parametrize("method", [None, *METHODS])
def test_enhance_takes_cameras_from_the_file_and_says_what_ran(method, path, tmp_path, caplog):
    content = load_features(path)
    feats = content.query_feats, content.gallery_feats
    cameras = {"query_camids": content.q_camids, "gallery_camids": content.g_camids}
    words = [] if method is None else ["--method", method]
    assert main(["enhance", str(path), str(tmp_path / "out.npz"), *words]) == 0
    expected = Centralizer(method=method or "auto").enhance(*feats, **cameras)
    np.testing.assert_array_equal(load_features(tmp_path / "out.npz").gallery_feats, expected[1])
    (said,) = {record.message for record in caplog.records if record.levelno == logging.INFO}
    assert said.startswith(f"enhance: {METHODS[method or 'auto']}")
    assert "3 cameras" in said
    assert ("too close for strangers" in said) == (method not in ("cameras", "centring"))


@pytest.mark.parametrize("method", ["auto", "guarded"])
def test_enhance_without_cameras(method, path, tmp_path, caplog):
    content, out = load_features(path), tmp_path / "out.npz"
    assert main(["enhance", str(path), str(out), "--without-cameras", "--method", method]) == 0
    feats = content.query_feats, content.gallery_feats
    found, expected = load_features(out), Centralizer().enhance(*feats)
    np.testing.assert_array_equal(found.query_feats, expected[0])
    np.testing.assert_array_equal(found.g_camids, content.g_camids)
    assert "without cameras (none is known)" in caplog.text
    with_cameras = Centralizer().enhance(*feats, query_camids=content.q_camids, gallery_camids=content.g_camids)
    assert np.abs(with_cameras[1] - expected[1]).max() > 0.01


def test_the_method_is_said_on_stderr(path, tmp_path):
    command = [sys.executable, "-m", "pose2id", "enhance", str(path), str(tmp_path / "out.npz")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stderr.startswith(
        "enhance: guarded, 3 cameras centred, gate shut, no neighbours added. Links too close for "
    )
    assert found.stdout == f"wrote {tmp_path / 'out.npz'}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--joint"], "joint must be False with method='auto'"),
        (["--method", "guarded", "--k1", "3"], "--k1 and --k2 must be None with method='guarded'"),
        (["--method", "cameras", "--without-cameras"], "gallery_camids must name cameras"),
        (["--method", "best"], "method must be"),
    ],
)
def test_methods_that_cannot_run(words, message, path, tmp_path, capsys):
    assert main(["enhance", str(path), str(tmp_path / "out.npz"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


def test_enhance_never_replaces_a_file_unasked(path, capsys):
    before = path.read_bytes()
    assert main(["enhance", str(path), str(path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main(["enhance", str(path), str(path), "--overwrite"]) == 0
    assert path.read_bytes() != before


def test_evaluate_prints_what_the_functions_give(path, capsys):
    content = load_features(path)
    labels = content.q_pids, content.g_pids, content.q_camids, content.g_camids
    assert main(["evaluate", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = printed["rows"]
    q, g = content.query_feats, content.gallery_feats
    assert printed["evidence"] == vars(evidence(g))
    centred = centre_cameras(q, g, *labels[2:])[1]
    assert printed["evidence_with_cameras"] == vars(evidence(centred, labels[3]))
    new_q, new_g = nfc(q), nfc(g)
    cameras = {"query_camids": labels[2], "gallery_camids": labels[3]}
    results = {
        "baseline": evaluate(q, g, *labels),
        "NFC": evaluate(new_q, new_g, *labels),
        "auto": evaluate(*Centralizer().enhance(q, g), *labels),
        "auto, cameras": evaluate(*Centralizer().enhance(q, g, **cameras), *labels),
        "re-ranking": evaluate_rank(k_reciprocal(q, g), *labels),
        "NFC + re-ranking": evaluate_rank(k_reciprocal(new_q, new_g), *labels),
        "rerank": evaluate_rank(Centralizer().rerank(q, g), *labels),
        "rerank, cameras": evaluate_rank(Centralizer().rerank(q, g, **cameras), *labels),
    }
    assert [row["name"] for row in rows] == list(results)
    assert len({row["mAP"] for row in rows}) == 6  # no evidence: "auto" and "rerank" are the baseline
    for row, result in zip(rows, results.values(), strict=True):
        assert row["mAP"] == pytest.approx(result.mAP, abs=1e-12)
        assert [row["rank1"], row["rank5"], row["rank10"]] == pytest.approx([result.rank(r) for r in (1, 5, 10)])
        assert row["mINP"] == pytest.approx(result.mINP)
        assert row["num_valid_queries"] == result.num_valid_queries
    pids = np.concatenate(labels[:2])
    assert rows[1]["id2"] == pytest.approx(id2_score(np.concatenate([new_q, new_g]), pids))
    assert [row["id2"] is None for row in rows] == [False] * 4 + [True] * 4

    assert main(["evaluate", str(path), "--no-rerank"]) == 0
    sizes, _, head, *lines, _, sentence, with_cameras = capsys.readouterr().out.splitlines()
    assert sentence == str(evidence(g))
    found = evidence(centred, labels[3])
    assert with_cameras.startswith(f"With cameras: {found.numbers} At most 1: no neighbours are added, and cameras")
    assert sizes == "20 queries (20 with a match), 60 gallery images"
    assert head.split() == ["mAP", "Rank-1", "Rank-5", "Rank-10", "mINP", "ID²"]
    assert [re.split(" {2,}", line)[:2] for line in lines] == [
        [name, f"{100 * results[name].mAP:.2f}"] for name in ("baseline", "NFC", "auto", "auto, cameras")
    ]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--method", "centring"], ["NFC", "centring"]),
        (["--method", "guarded"], ["NFC", "guarded", "guarded, cameras"]),
        (["--method", "nfc"], ["NFC", "auto", "auto, cameras"]),
        (["--k1", "3"], ["NFC", "auto", "auto, cameras"]),
    ],
)
def test_evaluate_measures_another_method(words, names, path, capsys):
    assert main(["evaluate", str(path), "--json", "--no-rerank", *words]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["baseline", *names]


def test_demo_of_a_users_file(path, tmp_path, capsys):
    picture = tmp_path / "demo.png"
    assert main(["demo", str(path), "--picture", str(picture)]) == 0
    before = picture.read_bytes()
    assert main(["demo", str(path), "--picture", str(picture)]) == 2
    assert picture.read_bytes() == before
    assert main(["demo", str(path), "--picture", str(picture), "--overwrite"]) == 0
    printed = capsys.readouterr().out
    assert "NFC + re-ranking" in printed
    assert str(picture) in printed
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 500
    assert main(["demo", str(path), "--no-picture"]) == 0
    assert "picture" not in capsys.readouterr().out


def test_demo_without_the_extra_names_it_before_any_work(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo"]) == 2
    assert 'pip install "pose2id[plots]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "none.npz"], "There is no feature file none.npz"),
        (["evaluate", "none.pkl"], "end in .npz, .mat, .pt or .pth"),
        (["enhance", "none.npz", "out.npz"], "There is no feature file none.npz"),
        (["enhance", "none.npz", "out.txt"], "end in .npz or .mat"),
        (["enhance", "none.npz", "nowhere/out.npz"], "There is no folder nowhere"),
        (["demo", "--picture", "nowhere/out.png"], "There is no folder nowhere"),
        (["demo", "--picture", "out.gif"], "end in .png or .svg or .pdf"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("enhance {path} {out}.npz --k1 0", "--k1 must be at least 1"),
        ("enhance {path} {out}.npz --k2 0", "--k2 must be at least 1"),
        ("enhance {path} {out}.npz --k1 3 --method guarded", "--k1 and --k2 must be None with method='guarded'"),
        ("enhance {path} {out}.npz --method best", "--method must be one of"),
        ("enhance {path} {out}.npz --joint", "--joint must be False"),
        ("evaluate {path} --method best", "--method must be one of"),
        ("evaluate {path} --k2 0", "--k2 must be at least 1"),
        ("demo {path} --no-picture --k1 0", "--k1 must be at least 1"),
        ("demo --no-picture --people 0", "--people must be at least 1"),
        ("draw-people {out} --people 0", "--people must be at least 1"),
        ("draw-people {out} --cameras 0", "--cameras must be at least 1"),
        ("draw-people {out} --images 0", "--images must be at least 1"),
        ("draw-people {out} --seed -1", "--seed must be at least 0"),
        ("draw-people {out} --infrared 5", "--infrared must be at most 4, got 5"),
        ("table {out} {out}.csv", "FOLDER must be a directory of images"),
        ("table {folder} {out}.csv --keypoints {out}", "--keypoints must be a directory"),
        ("convert {out} {out}", "SRC must be a directory or a repository"),
        ("convert tiny {out} --vae {out}", "--vae must be a directory or a repository"),
        ("generate {out} --out {out}", "IMAGES must be files or directories"),
        ("evaluate {folder} --model timm:resnet18", "{folder} must hold images as identity/name.jpg"),
        ("generate {folder} --out {out} --weights tyni", "--weights must be a directory or a repository"),
        (
            "generate {folder} --out {out} --poses {table}",
            "{table} cannot be read as poses: it must be JSON, as written",
        ),
        ("generate {folder} --out {out} --size 99999999x8", "--size must be at most 65535"),
        ("generate {folder} --out {out} --device mps", "--device must be one that torch"),
    ],
)
def test_errors_name_the_option_as_it_was_typed(words, message, path, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 16)).save(tmp_path / "images" / "0001_c1.png")
    (tmp_path / "t.csv").write_text("path,identity\nimages/0001_c1.png,1\n")
    places = {"path": path, "out": tmp_path / "none", "folder": tmp_path / "images", "table": tmp_path / "t.csv"}
    assert main(words.format(**places).split()) == 2
    assert capsys.readouterr().err.startswith(f"pose2id: {message.format(**places)}")


def test_the_callers_logging_and_warnings_stay(path, tmp_path):
    code = f"""
import logging, sys, warnings
from pose2id.cli import main
loggers = [logging.getLogger(name) for name in (None, "pose2id.centralizer")]
before = [(logger.level, list(logger.handlers)) for logger in loggers], warnings.formatwarning
assert main(["enhance", {str(path)!r}, {str(tmp_path / "out.npz")!r}, "--method", "nfc"]) == 0
assert before == ([(logger.level, list(logger.handlers)) for logger in loggers], warnings.formatwarning)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    warning, told = found.stderr.splitlines()
    assert warning.startswith("method='nfc' may harm here")  # without the line of code that warns
    assert told.startswith("enhance: nfc, k1 2, k2 2")
    assert told.endswith("Cameras are not used.")


def test_what_others_say_of_kernels_that_nothing_uses_is_not_shown(tmp_path):
    """As bitsandbytes does, which diffusers imports where it is installed; its other warnings are shown."""
    (tmp_path / "noisy.py").write_text(
        "import logging\n"
        "for name in ('backends.cpu.ops', 'optim'):\n"
        "    logging.getLogger(f'bitsandbytes.{name}').warning('said by %s', name)\n"
    )
    words = ["extract", "people", "--model", "noisy:model", "--out", "f.npy"]
    (tmp_path / "people" / "anna").mkdir(parents=True)
    Image.new("RGB", (8, 16)).save(tmp_path / "people" / "anna" / "1.png")
    code = f"from pose2id.cli import main\nmain({words!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True, encoding="utf-8"
    )
    assert "said by optim" in done.stderr
    assert "cpu.ops" not in done.stderr


def test_bad_k_and_missing_labels(path, tmp_path, capsys):
    assert main(["evaluate", str(path), "--k1", "0"]) == 2
    assert "k1 must be at least 1" in capsys.readouterr().err
    content = load_features(path)
    np.savez(tmp_path / "bare.npz", query_feats=content.query_feats, gallery_feats=content.gallery_feats)
    assert main(["evaluate", str(tmp_path / "bare.npz")]) == 2
    assert "q_pids and g_pids must be given" in capsys.readouterr().err


def test_a_console_that_cannot_print_everything(path):
    command = [sys.executable, "-m", "pose2id", "evaluate", str(path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "baseline" in found.stdout


def test_the_ranked_lists_show_the_protocols_ranking(rng):
    qf, gf = rng.standard_normal((1, 4)), rng.standard_normal((30, 4))
    dropped = np.array([3, 7])
    x, y = reference.unit(qf), reference.unit(gf)
    expected = [i for i in np.argsort(((x - y) ** 2).sum(1)) if i not in (3, 7)]
    assert demo._ranking(qf, gf, 0, dropped).tolist() == expected


def test_the_installed_command():
    command = Path(sys.executable).with_name("pose2id")
    found = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == pose2id.__version__
    helped = subprocess.run(
        [sys.executable, "-m", "pose2id", "enhance", "--help"], capture_output=True, text=True, check=True
    )
    assert "query_feats (Q, D)" in helped.stdout
