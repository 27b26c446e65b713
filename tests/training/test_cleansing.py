"""Tests of data cleansing, on features, and of the command that cleanses a table."""

from __future__ import annotations

import csv
import os
import signal
import sys
from dataclasses import replace

import numpy as np
import onnx_files
import pytest
import torch
from PIL import Image

from pose2id.cli import main
from pose2id.training import clean, read_table
from pose2id.training.cleansed_table import SHEET_PAIRS, CleansedTable, contact_sheet, farthest_dropped
from pose2id.training.cleansing import COVARIANCES, Cleansing, clean_people
from pose2id.training.table import PersonImage

pytest.importorskip("sklearn", reason="needs scikit-learn")
SKLEARN_COVARIANCES = [name for name in COVARIANCES if name != "spherical"]
EACH = pytest.mark.parametrize("covariance", COVARIANCES)


def people(rng, counts, dim=12, spread=1.0):
    """Features around a centre for each identity, and who each is of, in random order."""
    centres = 5 * rng.standard_normal((len(counts), dim))
    who = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    shape = rng.standard_normal((dim, dim))  # directions of different, correlated variances
    return centres[who] + spread * rng.standard_normal((len(who), dim)) @ shape, who


def literal_distances(features, who, covariance, normalize):
    """Row by row, with scikit-learn's covariance matrix and a linear solve."""
    from sklearn.covariance import LedoitWolf  # noqa: PLC0415

    rows = [row / np.linalg.norm(row) if normalize else row for row in np.asarray(features, np.float64)]
    residuals = {}
    for i, row in enumerate(rows):
        own = [rows[j] for j in range(len(rows)) if who[j] == who[i]]
        if len(own) >= (3 if covariance == "ledoit-wolf" else 2):
            others = (sum(own) - row) / (len(own) - 1)
            # The mean of the others varies by 1 / (N - 1) of an image's variance, the image itself by all of it.
            residuals[i] = (row - others) / np.sqrt(1 + 1 / (len(own) - 1))
    found = np.zeros(len(rows))
    for i, residual in residuals.items():
        near = [j for j in residuals if who[j] == who[i] or covariance != "ledoit-wolf"]
        stack = np.stack([residuals[j] for j in near])
        if covariance == "spherical":
            matrix = np.eye(stack.shape[1]) * np.mean(stack**2)
            found[i] = np.sqrt(residual @ np.linalg.solve(matrix, residual))
            continue
        matrix = LedoitWolf(assume_centered=True).fit(stack).covariance_
        found[i] = np.sqrt(residual @ np.linalg.solve(matrix, residual))
        if covariance == "ledoit-wolf":
            found[i] /= np.sqrt(np.mean([row @ np.linalg.solve(matrix, row) for row in stack]))
    return found


def literal_reasons(distances, who, covariance, quantiles, p):
    least = 3 if covariance == "ledoit-wolf" else 2
    judged = [i for i in range(len(who)) if sum(other == who[i] for other in who) >= least]
    reasons = [""] * len(who)
    for i in judged:
        among = sorted(distances[j] for j in judged if quantiles == "pooled" or who[j] == who[i])
        low, high = (np.interp(q * (len(among) - 1), range(len(among)), among) for q in (p, 1 - p))  # as numpy.quantile
        reasons[i] = "far" if distances[i] > high + 1e-9 else "near" if distances[i] < low - 1e-9 else ""
    return tuple(reasons)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("quantiles", ["pooled", "identity"])
@pytest.mark.parametrize("dim", [3, 40])
@EACH
def test_a_literal_restatement_agrees(covariance, dim, quantiles, normalize, rng):
    features, who = people(rng, [1, 2, 3, 4, 9, 15, 2, 1], dim)
    found = clean(features, who, covariance=covariance, quantiles=quantiles, quantile=0.1, normalize=normalize)
    expected = literal_distances(features, who, covariance, normalize)
    np.testing.assert_allclose(found.distances, expected, rtol=1e-8)
    assert found.reasons == literal_reasons(expected, who, covariance, quantiles, 0.1)
    assert {"far", "near", ""} == set(found.reasons)
    assert found.kept.tolist() == [not reason for reason in found.reasons]


def test_distances_by_hand():
    """Residuals are (-1, 0), (1, 0) times sqrt 2, and (0, -2), (0, 2), (0, 0) times sqrt 1.5."""
    features = np.array([[4.0, 3], [6, 3], [0, 5], [0, 9], [0, 7]])
    found = clean(features, ["a", "a", "b", "b", "b"], normalize=False, quantile=0.1)
    # Variances: 2 (1 + 1) / 5 and 1.5 (4 + 4) / 5, of which the mean is 1.6.
    expected = np.sqrt(np.array([2, 2, 6, 6, 0]) / 1.6)
    np.testing.assert_allclose(found.distances, expected)
    # The lower quantile, at 0.4 of five, is 0.4 of the second; the upper one is the last.
    assert found.reasons == ("", "", "", "", "near")
    assert str(found) == (
        "dropped 1 of 5 images: 0 far from their person's mean, 1 near it; "
        "0 not judged, of people with fewer than 2 images"
    )


@pytest.mark.parametrize("factor", [1.0, 40.0])
def test_the_unit_of_distances(factor, rng):
    """As documented, in whatever unit features are."""
    features, who = people(rng, [6, 2, 9, 1], dim=12)
    judged = who < 3  # of the fourth there is one image
    options = {"normalize": False, "quantile": 0}
    found = clean(factor * features, who, **options).distances
    assert np.sqrt(np.square(found[judged]).mean()) == pytest.approx(np.sqrt(12))
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    own = clean(factor * features, who, covariance="ledoit-wolf", **options).distances
    assert np.sqrt(np.square(own[who == 2]).mean()) == pytest.approx(1)
    pooled = clean(factor * features, who, covariance="pooled", **options).distances
    assert np.sqrt(12) / 2 < np.sqrt(np.square(pooled[judged]).mean()) < np.sqrt(12)


def test_a_pooled_covariance_by_hand():
    """In one dimension nothing is shrunk: residuals are -1, 1 times sqrt 2, and two zeros, of variance 1."""
    features = np.array([[4.0], [6.0], [1.0], [1.0]])
    found = clean(features, [7, 7, 8, 8], covariance="pooled", normalize=False)
    np.testing.assert_allclose(found.distances, [np.sqrt(2), np.sqrt(2), 0, 0])


@EACH
def test_wrong_people_are_far(covariance, rng):
    features, who = people(rng, [12] * 30, 64, spread=0.1)
    labels = who.copy()
    wrong = rng.choice(len(who), 7, replace=False)
    labels[wrong] = (labels[wrong] + 1 + rng.integers(28, size=7)) % 30
    found = clean(features, labels, covariance=covariance, quantile=7 / 360)
    assert set(np.flatnonzero([reason == "far" for reason in found.reasons])) == set(wrong.tolist())
    assert not {i for i, reason in enumerate(found.reasons) if reason == "near"} & set(wrong.tolist())


def test_sizes_of_identities_are_comparable(rng):
    """The squared distance of an image of few is, on average, that of an image of many."""
    counts = [2] * 300 + [30] * 20
    who = np.repeat(np.arange(len(counts)), counts)
    found = clean(rng.standard_normal((len(who), 8)), who, normalize=False)
    few, many = (np.mean(found.distances[mask] ** 2) for mask in (who < 300, who >= 300))
    assert few == pytest.approx(many, rel=0.1)  # without the factor it is half


@pytest.mark.parametrize("quantiles", ["pooled", "identity"])
@EACH
def test_few_images_in_many_dimensions(covariance, quantiles, rng):
    """Warnings are errors here: not a single division by zero."""
    who = ["one", "two", "two", "three", "three", "three", "copies", "copies", "copies", "copies"]
    features = rng.standard_normal((10, 512)).astype(np.float16)
    features[6:] = features[6]
    found = clean(features, who, covariance=covariance, quantiles=quantiles, quantile=0.2)
    assert np.isfinite(found.distances).all()
    assert found.distances[0] == 0
    assert found.distances[1] == pytest.approx(found.distances[2])
    assert found.distances[6:].tolist() == [0] * 4
    assert (found.distances[3:6] > 0).all()
    assert found.reasons[0] == found.reasons[6] == ""
    assert found.reasons[1] == found.reasons[2]
    assert found.num_unjudged == (3 if covariance == "ledoit-wolf" else 1)


@EACH
@pytest.mark.parametrize("scale", [1, 1e-160, 1e160])
def test_a_pair_alone_has_a_singular_covariance(covariance, scale, rng):
    found = clean(scale * rng.standard_normal((2, 512)), [3, 3], covariance=covariance, normalize=False)
    # Each is one standard deviation from the mean in a single direction of 512, or sqrt(512) in units of all.
    wanted = {"spherical": np.sqrt(512), "pooled": 1, "ledoit-wolf": 0}[covariance]
    np.testing.assert_allclose(found.distances, wanted, rtol=1e-6)
    assert found.kept.all()


@EACH
def test_nobody_to_judge(covariance, rng):
    found = clean(rng.standard_normal((4, 5)), ["a", "b", "c", "d"], covariance=covariance)
    assert found.kept.all()
    assert (found.num_unjudged, found.distances.tolist()) == (4, [0] * 4)
    copies = np.repeat(rng.standard_normal((2, 50)), 7, axis=0)  # whose means are not always equal to them
    equal = clean(copies, np.arange(14) // 7, covariance=covariance, normalize=False)
    assert equal.kept.all()
    assert (equal.num_unjudged, equal.distances.tolist()) == (0, [0] * 14)


@pytest.mark.parametrize("quantiles", ["pooled", "identity"])
@EACH
def test_order_and_names_do_not_matter(covariance, quantiles, rng):
    features, who = people(rng, [1, 2, 3, 5, 8, 20], 30)
    options = {"covariance": covariance, "quantiles": quantiles, "quantile": 0.05}
    expected = clean(features, who, **options)
    assert 0 < (~expected.kept).sum() < len(who)
    order = rng.permutation(len(who))
    moved = clean(features[order], who[order], **options)
    np.testing.assert_allclose(moved.distances, expected.distances[order], rtol=1e-9)
    assert moved.kept.tolist() == expected.kept[order].tolist()
    renamed = clean(features, rng.permutation(6)[who], **options)
    np.testing.assert_allclose(renamed.distances, expected.distances, rtol=1e-9)
    assert renamed.kept.tolist() == expected.kept.tolist()
    named = clean(torch.from_numpy(features), [f"person {i}" for i in who], **options)
    assert named.reasons == expected.reasons


def test_texts_are_identities_as_they_stand(rng):
    features = rng.standard_normal((4, 3))
    assert clean(features, ["7", "007", "7", "007"]).num_unjudged == 0
    assert clean(features, ["7", "007", "07", "0007"]).num_unjudged == 4
    assert clean(features, torch.tensor([7, 7, 8, 9])).num_unjudged == 2


def test_the_lower_quantile_and_none(rng):
    features, who = people(rng, [10] * 10)
    both, upper = (clean(features, who, quantile=0.05, lower=lower) for lower in (True, False))
    assert (both.reasons.count("far"), both.reasons.count("near")) == (5, 5)
    assert (upper.reasons.count("far"), upper.reasons.count("near")) == (5, 0)
    assert clean(features, who, quantile=0).kept.all()
    each = clean(features, who, quantiles="identity")  # the default quantile
    assert (each.reasons.count("far"), each.reasons.count("near")) == (10, 10)


BAD = {
    "quantile": ({"quantile": 0.5}, ValueError, r"quantile must be in \[0, 0.49\], got 0.5"),
    "covariance": (
        {"covariance": "plain"},
        ValueError,
        "covariance must be one of 'spherical', 'pooled', 'ledoit-wolf'",
    ),
    "quantiles": ({"quantiles": "camera"}, ValueError, "quantiles must be one of 'pooled', 'identity', got 'camera'"),
    "lower": ({"lower": 1}, TypeError, "lower must be True or False, got 1"),
    "normalize": ({"normalize": "yes"}, TypeError, "normalize must be True or False"),
    "identities": (
        {"identities": ["a"]},
        ValueError,
        r"identities must have shape \(3,\), one label per row, got \(1,\)",
    ),
    "no identities": ({"identities": None}, TypeError, "identities must hold integers, got None"),
    "features": ({"features": np.ones((3, 2, 2, 2))}, ValueError, r"features must have shape \(N, D\)"),
    "nan": ({"features": np.full((3, 2), np.nan)}, ValueError, "features must be finite"),
    "empty": ({"features": np.ones((0, 2)), "identities": []}, ValueError, "features must hold at least one row"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    given = {"features": np.ones((3, 2)), "identities": [1, 1, 2], **change}
    with pytest.raises(error, match=message):
        clean(given.pop("features"), given.pop("identities"), **given)


@pytest.mark.parametrize("covariance", SKLEARN_COVARIANCES)
def test_without_scikit_learn(covariance, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=rf"covariance '{covariance}' needs scikit-learn: pip install"):
        clean(np.ones((3, 2)), [1, 1, 1], covariance=covariance)
    assert clean(np.ones((3, 2)), [1, 1, 1]).kept.all()


def test_real_people_under_wrong_names(real_features):
    data, draws = real_features("val100"), np.random.default_rng(0)
    features, who = data["feat_osnet_msmt17"], data["pids"].astype(np.int64)
    wrong = draws.choice(len(who), 47, replace=False)
    labels = who.copy()
    labels[wrong] = who[(wrong + len(who) // 2) % len(who)]
    wrong = np.flatnonzero(labels != who)
    assert len(wrong) > 40
    found = clean(features, labels, quantile=len(wrong) / len(who))
    far = np.flatnonzero([reason == "far" for reason in found.reasons])
    near = np.flatnonzero([reason == "near" for reason in found.reasons])
    assert len(set(far) & set(wrong)) > 0.8 * len(wrong)
    assert not set(near) & set(wrong)


MODEL = """
import torch
from pose2id.extractor import Extractor, Preprocess

class Colours(torch.nn.Module):
    def forward(self, batch):
        return batch.mean(3)[:, :, ::4].flatten(1)

def model():
    return Extractor(Colours(), transform=Preprocess((16, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
"""
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "näher": (40, 50, 220)}
WRONG = "red_4.png"


@pytest.fixture
def cameras(rng, tmp_path, monkeypatch):
    """A table of three people in shirts of one colour each, a green one among the reds, and somebody seen once."""
    (tmp_path / "colours_of_crops.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = ["path,identity,camera,keypoints,comment"]
    for name, colour in COLOURS.items():
        for i in range(6):
            shown = COLOURS["green"] if f"{name}_{i}.png" == WRONG else colour
            noise = rng.normal(0, 4, (32, 16, 3)) + rng.normal(0, 6, 3)
            pixels = np.clip(shown + noise, 0, 255).astype(np.uint8)
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{name}_{i}.png")
            lines.append(f"images/{name}_{i}.png,{name},c{i % 2},,left out")
    Image.new("RGB", (16, 32), (90, 90, 90)).save(tmp_path / "images" / "once.png")
    lines.append("images/once.png,once,,,")
    (tmp_path / "people.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


COMMAND = ["clean", "people.csv", "--model", "colours_of_crops:model", "--workers", "0", "--device", "cpu", "--out"]


def files(folder):
    return {path.name for path in folder.iterdir() if path.suffix in (".csv", ".png") or path.name.startswith(".")}


def test_the_command_writes_what_is_kept_and_what_is_not(cameras, capsys, caplog):
    (cameras / "new").mkdir()
    assert main([*COMMAND, "new/kept.csv", "--quantile", "0.05", "--sheet", "sheet.png"]) == 0
    told = capsys.readouterr()
    assert told.out == (
        "wrote new/kept.csv: dropped 2 of 19 images: 1 far from their person's mean, 1 near it; "
        "1 not judged, of people with fewer than 2 images (spherical distances, p = 0.05 of all people together)\n"
    )
    assert told.err == ""
    assert "19 images are few: the farthest and the nearest are left out, good or bad" in caplog.text
    caplog.clear()
    assert main([*COMMAND, "half.csv", "--quantile", "0.06"]) == 0
    assert not caplog.text
    for path in (cameras / "half.csv", cameras / "half.dropped.csv"):
        path.unlink()
    assert files(cameras) == {"people.csv", "sheet.png"}
    assert files(cameras / "new") == {"kept.csv", "kept.dropped.csv"}
    with open(cameras / "new" / "kept.dropped.csv", encoding="utf-8", newline="") as file:
        far, near = csv.DictReader(file)
    wrong = {"path": f"../images/{WRONG}", "identity": "red", "camera": "c0", "reason": "far"}
    assert {name: far[name] for name in wrong} == wrong
    assert near["reason"] == "near"
    assert float(far["distance"]) > float(near["distance"]) > 0
    before, after = read_table(cameras / "people.csv"), read_table(cameras / "new" / "kept.csv")
    dropped = {far["path"], near["path"]}
    # Written from the new table's folder, so that all can move together.
    written = {image.path: f"../{image.path.relative_to(cameras).as_posix()}" for image in before}
    assert after == [
        replace(image, path=cameras / "new" / written[image.path])
        for image in before
        if written[image.path] not in dropped
    ]
    assert len(after) == 17


def test_it_says_where_good_images_are_dropped_for_being_the_farthest(cameras, capsys, caplog):
    assert main([*COMMAND, "kept.csv", "--quantile", "0.05", "--keep-near"]) == 0
    assert "19 images are few: the farthest is left out, good or bad (--quantile 0" in caplog.text
    caplog.clear()
    each = ["--quantiles", "identity", "--overwrite"]
    assert main([*COMMAND, "kept.csv", *each]) == 0
    assert "dropped 6 of 19 images: 3 far from their person's mean, 3 near it" in (out := capsys.readouterr().out)
    assert out.endswith(" (spherical distances, p = 0.005 of each person)\n")
    assert "3 of 4 people have few images: of each the farthest and the nearest are left out" in caplog.text
    caplog.clear()
    for quantile in ("0", "0.17"):  # of 6 images
        assert main([*COMMAND, "kept.csv", *each, "--quantile", quantile]) == 0
        assert not caplog.text
    lines = (cameras / "people.csv").read_text(encoding="utf-8").splitlines()
    (cameras / "people.csv").write_text("\n".join([*lines[:3], *lines[-1:]]), encoding="utf-8")
    assert main([*COMMAND, "kept.csv", *each]) == 0  # a pair
    assert capsys.readouterr().out.count("dropped 0 of 3") == 1
    assert not caplog.text


def test_the_sheet_shows_a_dropped_crop_beside_a_kept_one(cameras):
    assert main([*COMMAND, "kept.csv", "--quantile", "0.05", "--keep-near", "--sheet", "sheet.png"]) == 0
    with Image.open(cameras / "sheet.png") as sheet:
        assert sheet.size == (136, 156)
        crop, beside = (np.asarray(sheet.convert("RGB").crop(box)) for box in ((4, 0, 68, 128), (68, 0, 132, 128)))
    assert np.abs(crop.mean((0, 1)) - COLOURS["green"]).max() < 25
    assert np.abs(beside.mean((0, 1)) - COLOURS["red"]).max() < 25


def test_a_sheet_of_many_and_of_people_of_whom_none_is_kept(cameras):
    crop = cameras / "images" / "once.png"
    images = [PersonImage(crop, f"person {i}") for i in range(SHEET_PAIRS + 50)]
    n = len(images)
    found = Cleansing(np.zeros(n, bool), np.arange(n, dtype=float), ("far",) * n, 0, 2)
    assert farthest_dropped(found) == list(reversed(range(n)))
    sheet = contact_sheet(images, found)
    assert sheet.size == (8 * 136, SHEET_PAIRS // 8 * 156)
    assert sheet.getpixel((10, 10)) == (90, 90, 90)
    assert sheet.getpixel((100, 10)) == (200, 200, 200)
    nothing = Cleansing(np.ones(n, bool), np.arange(n, dtype=float), ("",) * n, 0, 2)
    assert contact_sheet(images, nothing).getextrema() == ((255, 255),) * 3


def test_the_sheet_shows_the_most_typical_crop_that_is_kept(tmp_path):
    images = []
    for shade in (10, 80, 150, 220):
        Image.new("RGB", (16, 32), (shade,) * 3).save(tmp_path / f"{shade}.png")
        images.append(PersonImage(tmp_path / f"{shade}.png", "a"))
    distances = np.array([9.0, 4.0, 2.0, 1.0])  # the nearest is dropped, too
    found = Cleansing(np.array([False, True, True, False]), distances, ("far", "", "", "near"), 0, 2)
    sheet = contact_sheet(images, found)
    shown = [sheet.getpixel((x, 64))[0] for x in (20, 100, 156, 236)]
    assert shown == [10, 150, 220, 150]


def test_nothing_is_replaced_unasked(cameras, capsys):
    for name in ("kept.csv", "kept.dropped.csv", "sheet.png"):
        (cameras / name).write_text("mine", encoding="utf-8")
        before = files(cameras)
        assert main([*COMMAND, "kept.csv", "--sheet", "sheet.png"]) == 2
        assert (
            f"{name} exists. Choose another name, or overwrite it (overwrite=True, --overwrite)."
            in capsys.readouterr().err
        )
        assert files(cameras) == before
        assert main([*COMMAND, "kept.csv", "--sheet", "sheet.png", "--overwrite"]) == 0
        assert b"mine" not in (cameras / name).read_bytes()
        for path in ("kept.csv", "kept.dropped.csv", "sheet.png"):
            (cameras / path).unlink()
    # The table itself may be replaced by what is kept of it.
    assert main([*COMMAND, "people.csv", "--quantile", "0.05", "--overwrite"]) == 0
    assert len(read_table(cameras / "people.csv")) == 17


def naming(monkeypatch, number, act):
    """Have `act` happen in place of giving this one of the files its name."""
    link, seen = os.link, []

    def counted(source, path):
        seen.append(path)
        return act(path) if len(seen) == number else link(source, path)

    monkeypatch.setattr(os, "link", counted)
    return seen


@pytest.mark.parametrize("number", [1, 2, 3])
def test_all_files_or_none(number, cameras, capsys, monkeypatch):
    def taken(path):
        raise FileExistsError

    before, seen = files(cameras), naming(monkeypatch, number, taken)
    assert main([*COMMAND, "kept.csv", "--sheet", "sheet.png"]) == 2
    assert f"{seen[-1]} was created by another process in the meantime" in capsys.readouterr().err
    assert files(cameras) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_where_the_table_is_its_list_and_sheet_are_after_a_kill(number, cameras):
    images = read_table(cameras / "people.csv")
    n = len(images)
    found = Cleansing(np.arange(n) > 0, np.arange(n, dtype=float), ("near", *[""] * (n - 1)), 0, 2)
    child = os.fork()
    if not child:
        with pytest.MonkeyPatch.context() as patch:
            naming(patch, number, lambda path: os.kill(os.getpid(), signal.SIGKILL))
            CleansedTable("kept.csv", "sheet.png").write(images, found)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    made = {name for name in files(cameras) if not name.startswith(".")} - {"people.csv"}
    assert made == set(["kept.dropped.csv", "sheet.png"][: number - 1])


def test_a_crop_that_cannot_be_read_is_not_said_to_be_unwritable(cameras):
    images = read_table(cameras / "people.csv")
    n = len(images)
    images[0].path.write_text("no image", encoding="utf-8")
    found = Cleansing(np.arange(n) > 0, np.arange(n, dtype=float), ("near", *[""] * (n - 1)), 0, 2)
    before = files(cameras)
    with pytest.raises((OSError, ValueError), match=r"red_0\.png") as caught:
        CleansedTable("kept.csv", "sheet.png").write(images, found)
    assert "cannot be written" not in str(caught.value)
    assert files(cameras) == before


ERRORS = {
    "no model": (["clean", "people.csv", "--out", "kept.csv"], "--model must be given"),
    "quantile": ([*COMMAND, "kept.csv", "--quantile", "0.7"], "--quantile must be in [0, 0.49], got 0.7"),
    "ending": ([*COMMAND, "kept.txt"], "kept.txt must end in .csv"),
    "sheet": ([*COMMAND, "kept.csv", "--sheet", "sheet.jpg"], "sheet.jpg must end in .png"),
    "folder": ([*COMMAND, "nowhere/kept.csv"], "There is no folder nowhere"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_the_command_names_what_is_wrong_before_any_work(case, cameras, capsys, monkeypatch):
    monkeypatch.setattr("pose2id.extraction.extract", None)
    words, message = ERRORS[case]
    before = files(cameras)
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert files(cameras) == before


def test_a_missing_image_is_named(cameras, capsys):
    (cameras / "images" / "green_2.png").unlink()
    assert main([*COMMAND, "kept.csv"]) == 2
    assert "green_2.png" in capsys.readouterr().err
    assert files(cameras) == {"people.csv"}


def test_an_onnx_model_without_a_transform_is_refused_as_in_extract(cameras, capsys):
    pytest.importorskip("onnxruntime")
    (cameras / "model.onnx").write_bytes(onnx_files.stripes())
    words = ["clean", "people.csv", "--model", "onnx:model.onnx", "--workers", "0", "--out", "kept.csv"]
    assert main(words) == 2
    assert "--transform must be given" in capsys.readouterr().err
    assert main([*words, "--transform", "torchreid"]) == 0
    assert len(read_table(cameras / "kept.csv")) == 17


def test_people_one_after_another():
    """As `clean` with its defaults, without all features at once."""
    draws = np.random.default_rng(3)
    people = [draws.normal(draws.normal(size=5), 1.0, (n, 5)) * 1e3 for n in (2, 7, 3, 300)]
    names = np.repeat(np.arange(4), [len(features) for features in people])
    expected, found = clean(np.concatenate(people), names), clean_people(iter(people))
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-12)
    assert found.reasons == expected.reasons
    assert {"far", "near"} < set(found.reasons)
    assert (found.kept == expected.kept).all()
    assert str(found) == str(expected)


def test_people_of_equal_images_are_kept():
    assert clean_people([np.ones((3, 4)), torch.ones(60, 4)]).kept.all()
