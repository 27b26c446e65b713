"""The rows: each is what direct calls of the public functions give, by every protocol; and their forms."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch

from pose2id import Centralizer, evaluate, evaluate_rank, fuse, id2_score, k_reciprocal, nfc
from pose2id.io.feature_files import FeatureFile
from pose2id.report import Row, by_number, compare, records, study, tables
from pose2id.report.published import figures, settings
from pose2id.retrieval import protocols

PEOPLE, M, DIM = 12, 4, 16


@pytest.fixture(scope="module")
def material():
    """Features of people by 3 cameras, and of M generated images of each, raw."""
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((PEOPLE, DIM))
    q_pids, g_pids = np.repeat(np.arange(1, PEOPLE + 1), 2), np.repeat(np.arange(1, PEOPLE + 1), 4)
    q_camids, g_camids = np.tile([1, 2], PEOPLE), np.tile([1, 2, 3, 3], PEOPLE)

    def features(pids, *shape):
        of_people = centres[pids - 1].reshape(len(pids), *[1] * len(shape), DIM)
        return (of_people + 0.8 * rng.standard_normal((len(pids), *shape, DIM))).astype(np.float32)

    content = FeatureFile(features(q_pids), features(g_pids), q_pids, g_pids, q_camids, g_camids)
    return content, (features(q_pids, M), features(g_pids, M))


def parts(material):
    content, generated = material
    labels = content.q_pids, content.g_pids, content.q_camids, content.g_camids
    return (content.query_feats, content.gallery_feats), labels, generated


def same(result, expected):
    assert result.mAP == pytest.approx(expected.mAP, abs=1e-12)
    assert result.mINP == pytest.approx(expected.mINP, abs=1e-12)
    np.testing.assert_allclose(result.cmc, expected.cmc)


def test_rows_are_direct_calls(material):
    (q, g), labels, generated = parts(material)
    centralizer = Centralizer(k1=3, k2=2, eta=1.5)
    rows = {row.name: row for row in compare(material[0], generated=generated, centralizer=centralizer)}
    fused = [fuse(x, of_x, 1.5) for x, of_x in zip((q, g), generated, strict=True)]
    cameras = {"query_camids": labels[2], "gallery_camids": labels[3]}
    auto = Centralizer()
    features = {
        "baseline": (q, g),
        "NFC": [nfc(x, 3, 2) for x in (q, g)],
        "auto": auto.enhance(q, g),
        "auto, cameras": auto.enhance(q, g, **cameras),
        "IPG": fused,
        "IPG + NFC": [nfc(x, 3, 2) for x in fused],
        "IPG + auto": auto.enhance(*fused),
    }
    distances = {
        "re-ranking": k_reciprocal(q, g),
        "NFC + re-ranking": k_reciprocal(*features["NFC"]),
        "IPG + re-ranking": k_reciprocal(*fused),
        "IPG + NFC + re-ranking": k_reciprocal(*features["IPG + NFC"]),
        "rerank": auto.rerank(q, g),
        "rerank, cameras": auto.rerank(q, g, **cameras),
    }
    assert list(rows) == [*features, *distances]
    pids = np.concatenate(labels[:2])
    for name, pair in features.items():
        same(rows[name].result, evaluate(*pair, *labels))
        assert rows[name].id2 == pytest.approx(id2_score(np.concatenate(pair), pids))
    for name, distmat in distances.items():
        same(rows[name].result, evaluate_rank(distmat, *labels))
        assert rows[name].id2 is None


@pytest.mark.parametrize("form", ["file", "path", "arrays", "tensors", "lists of labels"])
def test_forms_of_features(form, material, tmp_path):
    content, _ = material
    (q, g), labels, _ = parts(material)
    expected = records(compare(content, rerank=False))
    if form == "path":
        arrays = dict(zip(("q_pids", "g_pids", "q_camids", "g_camids"), labels, strict=True))
        np.savez(tmp_path / "f.npz", query_feats=q, gallery_feats=g, **arrays)
        given = (tmp_path / "f.npz",)
    elif form == "file":
        given = (content,)
    elif form == "tensors":
        given = (tuple(map(torch.from_numpy, (q, g))), tuple(map(torch.from_numpy, labels)))
    else:
        given = ((q, g), [x.tolist() for x in labels] if form == "lists of labels" else labels)
    found = compare(*given, rerank=False)
    assert records(found) == expected
    assert [row.name for row in compare((q, g), labels[:2], rerank=False)] == ["baseline", "NFC", "auto"]


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        ((np.ones((2, 3)), np.ones((2, 3))), None, ValueError, "labels must be .* got None"),
        ((np.ones((2, 3)), np.ones((2, 3))), ([1, 2],), ValueError, "labels must be .* got 1 of them"),
        ((np.ones((2, 3)),), ([1], [1]), TypeError, r"features must be \(qf, gf\), .* got tuple"),
        (np.ones((2, 3)), ([1, 2], [1, 2]), TypeError, "features must be .* got ndarray"),
        (FeatureFile(np.ones((2, 3)), np.ones((2, 3)), [1, 2], [1, 2]), ([1], [1]), ValueError, "labels must be None"),
    ],
)
def test_bad_features_and_labels(features, labels, error, message):
    with pytest.raises(error, match=message):
        compare(features, labels)


def test_what_a_comparison_gives(material):
    content, _ = material
    found = compare(content, rerank=False)
    assert [row.name for row in found] == ["baseline", "NFC", "auto", "auto, cameras"]
    assert isinstance(found[0], Row)
    assert len(found[1:]) == 3
    assert str(found) == tables.table(found.rows)
    frame = found.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert frame.loc["NFC", "mAP"] == found[1].result.mAP == found.to_dict()["NFC"]["mAP"]
    assert frame.loc["NFC", "rank1"] == found[1].result.rank1
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [float(line["mAP"]) for line in lines] == [row.result.mAP for row in found]
    assert json.loads(json.dumps(records(found)))[0]["name"] == "baseline"


def test_markdown_latex_and_html():
    (row,) = compare((np.eye(2), np.eye(2)), ([1, 2], [1, 2]), nfc=False, rerank=False)[:1]
    odd = Row("a|b_c & 5% <b>", row.result, 0.25, {"mAP": 0.5})
    head, rule, line, other = tables.as_markdown([odd, row]).splitlines()
    assert head == "|  | mAP | Rank-1 | Rank-5 | Rank-10 | mINP | ID² | mAP, published |"
    assert rule == "| --- | --: | --: | --: | --: | --: | --: | --: |"
    assert line == r"| a\|b_c & 5% <b> | 100.00 | 100.00 | 100.00 | 100.00 | 100.00 | 0.2500 | 50.00 |"
    assert other.endswith("| - |")
    latex = tables.as_latex([odd, row]).splitlines()
    assert latex[0] == r"\begin{tabular}{lrrrrrrr}"
    assert latex[2] == r" & mAP & Rank-1 & Rank-5 & Rank-10 & mINP & ID$^2$ & mAP, published \\"
    assert latex[4].startswith(r"a|b\_c \& 5\% <b> & 100.00")
    comparison = compare((np.eye(2), np.eye(2)), ([1, 2], [1, 2]), rerank=False)
    html = type(comparison)((odd, *comparison.rows), *list(vars(comparison).values())[1:])._repr_html_()
    assert "a|b_c &amp; 5% &lt;b&gt;" in html
    assert html.count("<tr>") == 5


def rows_of(material, table, **options):
    content, generated = material
    centralizer = Centralizer(k1=3, k2=2, eta=1.5)
    return {
        row.name: row for row in study(table, content, centralizer=centralizer, **{"generated": generated, **options})
    }


@pytest.mark.parametrize("table", ["1", "2", "8", "9", "10"])
def test_tables_of_the_two_halves(table, material):
    (q, g), labels, generated = parts(material)
    fused = [fuse(x, of_x, 1.5) for x, of_x in zip((q, g), generated, strict=True)]
    expected = {
        "baseline": (q, g),
        "NFC": [nfc(x, 3, 2) for x in (q, g)],
        "IPG": fused,
        "IPG + NFC": [nfc(x, 3, 2) for x in fused],
    }
    rows = rows_of(material, table)
    assert list(rows) == list(expected)
    for name, pair in expected.items():
        same(rows[name].result, evaluate(*pair, *labels))
    assert list(rows_of(material, table, generated=None)) == ["baseline", "NFC"]


def test_tables_of_sides(material):
    (q, g), labels, generated = parts(material)
    new, fused = [nfc(x, 3, 2) for x in (q, g)], [fuse(x, y, 1.5) for x, y in zip((q, g), generated, strict=True)]
    for table, name, (new_q, new_g) in (("3", "NFC", new), ("4", "IPG", fused)):
        rows = rows_of(material, table)
        expected = {"nothing": (q, g), "the gallery": (q, new_g), "the queries": (new_q, g), "both": (new_q, new_g)}
        assert list(rows) == [f"{name} of {side}" for side in expected]
        for side, pair in expected.items():
            same(rows[f"{name} of {side}"].result, evaluate(*pair, *labels))


def test_the_table_of_an_untrained_model_and_that_of_re_ranking(material):
    (q, g), labels, generated = parts(material)
    fused = [fuse(x, of_x, 1.5) for x, of_x in zip((q, g), generated, strict=True)]
    both = [nfc(x, 3, 2) for x in fused]
    rows = rows_of(material, "5")
    assert list(rows) == ["baseline", "IPG", "IPG + NFC"]
    same(rows["IPG + NFC"].result, evaluate(*both, *labels))
    rows = rows_of(material, "7")
    assert list(rows) == ["baseline", "re-ranking", "IPG + NFC", "IPG + NFC + re-ranking"]
    same(rows["re-ranking"].result, evaluate_rank(k_reciprocal(q, g), *labels))
    same(rows["IPG + NFC + re-ranking"].result, evaluate_rank(k_reciprocal(*both), *labels))
    rows = rows_of(material, "7", generated=None)
    same(rows["NFC + re-ranking"].result, evaluate_rank(k_reciprocal(nfc(q, 3, 2), nfc(g, 3, 2)), *labels))


def test_the_table_of_numbers(material):
    """M = 0 is the baseline, M = 4 are all; M = 1 with enough subsets is the mean over each picture alone."""
    (q, g), labels, generated = parts(material)
    rows = rows_of(material, "6", subsets=4)
    assert list(rows) == [
        f"IPG of {side}, M = {m}" for side in ("the gallery", "the queries", "both") for m in range(5)
    ]
    whole = [fuse(x, of_x, 1.5) for x, of_x in zip((q, g), generated, strict=True)]
    same(rows["IPG of both, M = 0"].result, evaluate(q, g, *labels))
    same(rows["IPG of both, M = 4"].result, evaluate(*whole, *labels))
    same(rows["IPG of the gallery, M = 4"].result, evaluate(q, whole[1], *labels))
    same(rows["IPG of the queries, M = 4"].result, evaluate(whole[0], g, *labels))
    singles = [
        evaluate(*(fuse(x, of_x[:, [m]], 1.5) for x, of_x in zip((q, g), generated, strict=True)), *labels).mAP
        for m in range(4)
    ]
    assert rows["IPG of both, M = 1"].result.mAP == pytest.approx(np.mean(singles))
    one = rows_of(material, "6", subsets=1)["IPG of both, M = 1"].result.mAP
    assert min(abs(one - single) for single in singles) < 1e-12
    drawn = {rows_of(material, "6", subsets=1, seed=seed)["IPG of both, M = 1"].result.mAP for seed in range(8)}
    assert len(drawn) > 1


def test_curves_of_eta_and_k_and_the_replacement(material):
    (q, g), labels, generated = parts(material)
    rows = rows_of(material, "eta")
    assert list(rows) == [f"eta = {eta}" for eta in ("0", "0.25", "0.5", "1", "1.5", "2", "3", "4")]
    same(rows["eta = 0"].result, evaluate(q, g, *labels))
    same(
        rows["eta = 3"].result,
        evaluate(*(fuse(x, of_x, 3.0) for x, of_x in zip((q, g), generated, strict=True)), *labels),
    )
    rows = rows_of(material, "k")
    assert len(rows) == 37
    same(rows["k1 = 4, k2 = 6"].result, evaluate(nfc(q, 4, 6), nfc(g, 4, 6), *labels))
    rows = rows_of(material, "same-pose")
    of_q, of_g = (x[:, 0] for x in generated)
    expected = {"nothing": (q, g), "the gallery": (q, of_g), "the queries": (of_q, g), "both": (of_q, of_g)}
    for name, pair in expected.items():
        same(rows[f"generated in place of {name}"].result, evaluate(*pair, *labels))


def test_tables_that_need_what_is_not_there(material):
    for table in ("4", "5", "6", "eta", "same-pose"):
        with pytest.raises(ValueError, match=f"generated must be given for table '{table}'"):
            rows_of(material, table, generated=None)
    with pytest.raises(ValueError, match="table must be one of"):
        rows_of(material, "11")


def test_published_figures_stand_beside_ours(material):
    rows = rows_of(material, "2", published=figures("Market1501", "transreid"))
    assert rows["IPG + NFC"].published == pytest.approx({"mAP": 0.9039, "Rank-1": 0.9474})
    numbers = rows_of(material, "6", published=figures("Market1501", "transreid"))
    assert numbers["IPG of both, M = 3"].published == {"mAP": pytest.approx(0.8616)}
    assert numbers["IPG of the gallery, M = 3"].published == {}
    found = compare(material[0], rerank=False)
    assert "published" not in str(found)
    with pytest.raises(ValueError, match=r"published must be a model that the paper has on VIPeR, got 'osnet'"):
        figures("VIPeR", "osnet")


def test_settings_of_the_paper():
    assert vars(settings("SYSU-MM01, indoor")) == {"eta": 0.25, "k1": 2, "k2": 2}
    assert vars(settings("Occluded-REID")) == {"eta": 1.0, "k1": 1, "k2": 1}
    assert settings("my cameras") == settings("Market1501")


def test_leave_one_out_neither_re_ranks_nor_meets_itself(material):
    """Each image is centralized as one of the gallery; ID² counts it once."""
    (_, g), labels, _ = parts(material)
    content = FeatureFile(g, g, labels[1], labels[1])
    found = compare(content, protocol=protocols.LEAVE_ONE_OUT)
    assert [row.name for row in found] == ["baseline", "NFC", "auto"]
    expected = {"baseline": g, "NFC": nfc(g), "auto": Centralizer().enhance(g, g)[1]}
    for row in found:
        x = expected[row.name]
        same(row.result, protocols.LEAVE_ONE_OUT.evaluate(x, x, labels[1], labels[1]))
        assert row.id2 == pytest.approx(id2_score(x, labels[1]))
    assert found[0].result.rank1 < 1


def test_by_number_of_a_comparison(material):
    content, generated = material
    curves = by_number(content, generated, centralizer=Centralizer(eta=1.5))
    rows = rows_of(material, "6")
    assert curves["IPG"][0] == rows["IPG of both, M = 0"].result.mAP
    assert curves["IPG"][4] == rows["IPG of both, M = 4"].result.mAP
