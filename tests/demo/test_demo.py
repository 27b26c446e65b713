from __future__ import annotations

import re
import runpy
from dataclasses import replace

import numpy as np
import pytest
import reference
from conftest import ROOT
from PIL import Image

from pose2id import Centralizer, evaluate, evaluate_rank, evidence, k_reciprocal, nfc
from pose2id.cli import main
from pose2id.demo import demo
from pose2id.demo.people import SyntheticPedestrians
from pose2id.demo.stripes import colour_stripes
from pose2id.report import by_number, compare, number_table

NAMES = ["baseline", "NFC", "auto", "auto, cameras", "IPG", "IPG + NFC", "IPG + auto"]
RERANKED = ["re-ranking", "NFC + re-ranking", "IPG + re-ranking", "IPG + NFC + re-ranking"]
SAFE = ["rerank", "rerank, cameras"]
FAST = demo.Settings(num_inference_steps=1, guidance_scale=1.0)
ETA = 0.7


@pytest.fixture(scope="module")
def shown():
    """Two people, 16 images, 128 generated pictures."""
    return demo.generation_demo(num_identities=2, settings=FAST, progress=False)


@pytest.fixture(scope="module")
def centralizer():
    return Centralizer(eta=ETA)


def labels(features):
    return features.q_pids, features.g_pids, features.q_camids, features.g_camids


def fused(features, generated, number):
    """Eq. 9 as it is printed, with the first so many generated images."""
    return [
        reference.unit(np.array([f + ETA / number * sum(of_f[:number]) for f, of_f in zip(raw, others, strict=True)]))
        for raw, others in zip((features.query_feats, features.gallery_feats), generated.feats, strict=True)
    ]


def test_features_are_those_of_the_images_and_of_their_pictures(shown):
    assert len(shown.images[0]) == len(shown.images[1]) == 8
    np.testing.assert_array_equal(shown.features.query_feats, colour_stripes(shown.images[0]))
    assert shown.generated.gallery_feats.shape == (8, 8, 192)
    for feats, pictures in zip(shown.generated.query_feats, shown.generated.query_pictures, strict=True):
        assert {picture.size for picture in pictures} == {(64, 128)}
        np.testing.assert_array_equal(feats, colour_stripes([np.array(picture) for picture in pictures]))


def test_the_people_are_those_of_test_seed_1(shown):
    people = SyntheticPedestrians(2, num_cameras=4, images_per_camera=2, seed=1)
    q, g = people.query_gallery()
    for images, at in zip(shown.images, (q, g), strict=True):
        np.testing.assert_array_equal(np.stack(images), np.stack([people[int(i)].image for i in at]))
    np.testing.assert_array_equal(shown.features.g_pids, people.pids[g])
    np.testing.assert_array_equal(shown.features.q_camids, people.camids[q])


def test_rows_follow_equation_9(shown, centralizer):
    rows = {row.name: row for row in compare(shown.features, centralizer=centralizer, generated=shown.generated.feats)}
    assert list(rows) == NAMES + RERANKED + SAFE
    q, g = fused(shown.features, shown.generated, 8)
    expected = {"IPG": (q, g), "IPG + NFC": (nfc(q), nfc(g))}
    for name, pair in expected.items():
        assert rows[name].result.mAP == pytest.approx(evaluate(*pair, *labels(shown.features)).mAP, abs=1e-9)
        reranked = evaluate_rank(k_reciprocal(*pair), *labels(shown.features))
        assert rows[f"{name} + re-ranking"].result.mAP == pytest.approx(reranked.mAP, abs=1e-9)


def test_without_nfc_and_without_re_ranking(shown, centralizer):
    options = {"centralizer": centralizer, "generated": shown.generated.feats}
    rows = compare(shown.features, nfc=False, rerank=False, **options)
    assert [row.name for row in rows] == ["baseline", "auto", "auto, cameras", "IPG", "IPG + auto"]


@pytest.fixture(scope="module")
def repeated():
    """Features of 24 people by 2 cameras: few images, but enough to tell that people repeat."""
    people = SyntheticPedestrians(24, num_cameras=2, images_per_camera=4)
    features = colour_stripes([sample.image for sample in people[:]])
    return demo.Demo("drawn", demo.split(people, features))


def test_people_once_each_are_of_the_same_drawing(repeated):
    alone = demo.once(repeated).features
    assert sorted(alone.q_pids) == sorted(alone.g_pids) == list(range(1, 25))
    assert (alone.q_camids != alone.g_camids).all()
    for feats, pids, camids, name in (
        (alone.query_feats, alone.q_pids, alone.q_camids, "query_feats"),
        (alone.gallery_feats, alone.g_pids, alone.g_camids, "gallery_feats"),
    ):
        at = [np.flatnonzero((getattr(repeated.features, name) == row).all(1))[0] for row in feats]
        np.testing.assert_array_equal(getattr(repeated.features, f"{name[0]}_pids")[at], pids)
        np.testing.assert_array_equal(getattr(repeated.features, f"{name[0]}_camids")[at], camids)


def test_where_nobody_repeats_nfc_harms_and_auto_does_not(repeated):
    alone = demo.once(repeated)
    rows = {row.name: row for row in compare(alone.features)}
    assert rows["NFC"].result.mAP < rows["baseline"].result.mAP - 0.05
    assert rows["re-ranking"].result.mAP < rows["baseline"].result.mAP - 0.05
    assert rows["auto"].result.mAP == rows["rerank"].result.mAP == rows["baseline"].result.mAP
    q, _ = Centralizer().enhance(alone.features.query_feats, alone.features.gallery_feats)
    np.testing.assert_allclose(q, reference.unit(alone.features.query_feats), atol=1e-7)
    printed = demo.report(alone, Centralizer())
    assert "The same people, once each: 24 queries by one camera, 24 gallery images by another" in printed
    assert str(evidence(alone.features.gallery_feats)) in printed
    assert evidence(alone.features.gallery_feats).gate == 0


def test_where_people_repeat_auto_gains(repeated):
    rows = {row.name: row.result.mAP for row in compare(repeated.features)}
    assert rows["baseline"] < rows["auto"] < rows["auto, cameras"] < rows["rerank, cameras"]
    assert str(evidence(repeated.features.gallery_feats)) in demo.report(repeated, Centralizer())
    assert evidence(repeated.features.gallery_feats).gate > 0


def test_rows_of_every_method_and_of_other_parameters(repeated):
    features, options = repeated.features, {"rerank": False}
    feats, cameras = (features.query_feats, features.gallery_feats), (features.q_camids, features.g_camids)
    given = {"query_camids": cameras[0], "gallery_camids": cameras[1]}
    for method, camids in (("guarded", {}), ("guarded, cameras", given), ("centring", given), ("cameras", given)):
        centralizer = Centralizer(method=method.split(",")[0])
        rows = {row.name: row.result.mAP for row in compare(features, centralizer=centralizer, **options)}
        assert rows[method] == evaluate(*centralizer.enhance(*feats, **camids), *labels(features)).mAP
    rows = {row.name: row.result.mAP for row in compare(features, centralizer=Centralizer(k1=3), **options)}
    assert list(rows) == ["baseline", "NFC", "auto", "auto, cameras"]
    assert rows["NFC"] == evaluate(*(nfc(x, 3, 2) for x in feats), *labels(features)).mAP
    assert rows["auto"] == evaluate(*Centralizer().enhance(*feats), *labels(features)).mAP
    bare = replace(features, q_camids=None, g_camids=None)
    assert [row.name for row in compare(bare)][2:] == ["auto", "re-ranking", "NFC + re-ranking", "rerank"]
    with pytest.raises(ValueError, match="gallery_camids must name cameras"):
        compare(bare, centralizer=Centralizer(method="centring"))


def test_no_generated_image_is_the_baseline_and_all_are_ipg(shown, centralizer):
    rows = {row.name: row for row in compare(shown.features, centralizer=centralizer, generated=shown.generated.feats)}
    curves = by_number(shown.features, shown.generated.feats, centralizer=centralizer)
    assert [len(curve) for curve in curves.values()] == [9, 9]
    assert curves["IPG"][0] == rows["baseline"].result.mAP
    assert curves["IPG"][8] == rows["IPG"].result.mAP
    assert curves["IPG + NFC"][0] == rows["NFC"].result.mAP
    assert curves["IPG + NFC"][8] == rows["IPG + NFC"].result.mAP
    for number in (1, 5):
        pair = fused(shown.features, shown.generated, number)
        assert curves["IPG"][number] == pytest.approx(evaluate(*pair, *labels(shown.features)).mAP, abs=1e-9)


def test_queries_and_gallery_have_as_many_generated_images(shown):
    query, gallery = shown.generated.feats
    unequal = (query, gallery[:, :5])
    with pytest.raises(ValueError, match=r"got 8 and 5\. Pass the first 5"):
        compare(shown.features, generated=unequal)
    with pytest.raises(ValueError, match=r"got 8 and 5\. Pass the first 5"):
        by_number(shown.features, unequal)


def test_the_control_is_the_mean_of_everybody(shown):
    rows = {row.name: row for row in compare(shown.features, generated=shown.generated.feats, control=True)}
    mean = np.concatenate(shown.generated.feats).mean(axis=(0, 1))
    nobody = [feats + demo.TINY.eta * mean for feats in (shown.features.query_feats, shown.features.gallery_feats)]
    assert rows["control"].result.mAP == pytest.approx(evaluate(*nobody, *labels(shown.features)).mAP, abs=1e-6)
    assert rows["control"].result.mAP != rows["IPG"].result.mAP


def test_number_table():
    printed = number_table({"IPG": [0.5, 0.123456], "IPG + NFC": [1.0, 0.0]})
    assert [line.split() for line in printed.splitlines()] == [
        ["mAP", "0", "1"],
        ["IPG", "50.00", "12.35"],
        ["IPG", "+", "NFC", "100.00", "0.00"],
    ]
    assert len({len(line) for line in printed.splitlines()}) == 1


def test_demo_prints_all_of_it_and_draws(shown, repeated, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "generation_demo", lambda **options: asked.append(options) or shown)
    monkeypatch.setattr(demo, "synthetic_demo", lambda **_: repeated)
    picture = tmp_path / "demo.png"
    assert main(["demo", "--people", "2", "--picture", str(picture)]) == 0
    assert main(["demo", "--no-picture"]) == 0
    assert asked == [{"num_identities": 2}, {}]
    printed = capsys.readouterr().out
    assert "not real people" in printed
    assert "8 pictures generated from each image: tiny weights, 1 steps, guidance 1" in printed
    assert f"by number of generated images, eta {demo.TINY.eta:g}" in printed
    assert re.search(r"^generated images of \d+ originals: cosine to their own", printed, re.MULTILINE)
    found = re.findall(r"^(\S.*?) {2,}\d+\.\d\d ", printed, re.MULTILINE)
    whole = [*NAMES, "control", "control + NFC", "control + auto"]
    reranked = [*RERANKED, "control + re-ranking", "control + NFC + re-ranking", *SAFE]
    assert found[: len(whole + reranked) + 2] == [*whole, *reranked, "IPG", "IPG + NFC"]
    plain = [*NAMES[:4], *RERANKED[:2], *SAFE]
    assert found[len(whole + reranked) + 2 : len(found) // 2] == plain * 2  # people who repeat, and once each
    for features in (repeated.features, demo.once(repeated).features):
        assert f"{evidence(features.gallery_feats)}" in printed
    with Image.open(picture) as drawn:
        assert drawn.size == (1100, 1430)


def test_features_alone(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    assert main(["demo", "--no-generation", "--people", "6", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "24 queries, 48 gallery images" in printed
    assert "The same people, once each: 6 queries" in printed
    assert printed.count("\nrerank, cameras ") == 2
    assert "not real people" in printed
    assert "IPG" not in printed
    with Image.open(picture) as drawn:
        assert drawn.size == (1100, 1210)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--people", "0"], "--people must be at least 1"),
        (["features.npz", "--people", "3"], "--people must not be given with FEATS"),
    ],
)
def test_people_that_cannot_be_drawn(arguments, message, capsys):
    assert main(["demo", "--no-picture", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_benchmark_measures_both_embedders_with_each_eta(capsys, monkeypatch):
    words = "--seeds 0 --people 1 --steps 1 --guidances 1 --etas 0.5 2"
    monkeypatch.setattr("sys.argv", ["tiny.py", *words.split()])
    runpy.run_path(str(ROOT / "benchmarks" / "tiny.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(re.findall(r"^IPG \+ NFC \+ re-ranking ", printed, re.MULTILINE)) == 4
    assert printed.count("retention") == 2
    for name in ("colour_stripes", "tiny identity encoder"):
        for eta in ("0.5", "2"):
            assert f"Mean over seeds 0: {name}, 1 steps, guidance 1, eta {eta}" in printed
            assert f"\n| {name} | 1 | {eta} | 100.00 |" in printed
