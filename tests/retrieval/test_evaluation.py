from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import parts as literal
from test_part_distances import BAD_VISIBILITY, VISIBILITY, uneven_products, visibility

from pose2id import evaluate, evaluate_rank, part_distances
from pose2id.io.rows import Rows
from pose2id.neighbors.search import tying_distances


def same(result, expected):
    mean_ap, cmc, minp, valid = expected
    assert result.mAP == pytest.approx(mean_ap, abs=1e-12)
    assert result.mINP == pytest.approx(minp, abs=1e-12)
    assert result.num_valid_queries == valid
    np.testing.assert_allclose(result.cmc, cmc, atol=1e-12)


def test_golden(golden):
    data = golden("rerank_eval")
    labels = data["q_pid"], data["g_pid"], data["q_cam"], data["g_cam"]
    for result, suffix in (
        (evaluate(data["q"], data["g"], *labels), ""),
        (evaluate_rank(data["sq_euclid"], *labels), ""),
        (evaluate_rank(data["rerank_20_6_03"], *labels), "_rerank"),
    ):
        assert result.mAP == pytest.approx(float(data[f"mAP{suffix}"]), abs=1e-9)
        np.testing.assert_allclose(result.cmc, data[f"cmc{suffix}"], atol=1e-7)
        assert result.num_valid_queries == data["valid_query"].sum() == 36


@given(
    seed=st.integers(0, 2**32 - 1),
    q=st.integers(1, 8),
    g=st.integers(1, 25),
    levels=st.integers(1, 30),
    cameras=st.booleans(),
)
def test_equals_the_literal_protocol_with_ties_junk_and_distractors(seed, q, g, levels, cameras):
    rng = np.random.default_rng(seed)
    distmat = rng.integers(0, levels, (q, g)).astype(np.float32)
    labels = [rng.integers(-1, 4, q), rng.integers(-1, 4, g)]
    if cameras:
        labels += [rng.integers(0, 3, q), rng.integers(0, 3, g)]
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mean of nothing
        expected = reference.evaluate_rank(distmat, *labels, max_rank=10)
    if expected[3] == 0:
        with pytest.raises(ValueError, match="has a match"):
            evaluate_rank(distmat, *labels)
    else:
        same(evaluate_rank(distmat, *labels, max_rank=10), expected)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float16])
def test_from_features_equals_from_distances(metric, kind, rng):
    qf, gf = rng.standard_normal((150, 8)) * 3, rng.standard_normal((200, 8)) * 3
    if kind is torch.float16:
        qf, gf = torch.from_numpy(qf).half(), torch.from_numpy(gf).half()
        x, y = qf.double().numpy(), gf.double().numpy()
    else:
        qf, gf = qf.astype(kind), gf.astype(kind)
        x, y = qf.astype(np.float64), gf.astype(np.float64)
    if metric == "cosine":
        x, y = reference.unit(x), reference.unit(y)
    labels = rng.integers(1, 9, 150), rng.integers(0, 9, 200), rng.integers(0, 4, 150), rng.integers(0, 4, 200)
    distmat = ((x[:, None] - y[None]) ** 2).sum(-1)
    result = evaluate(qf, gf, *labels, metric=metric, max_memory=1 << 20)  # two blocks
    expected = reference.evaluate_rank(distmat, *labels)
    assert result.mAP == pytest.approx(expected[0], abs=1e-4)
    np.testing.assert_allclose(result.cmc, expected[1], atol=1 / 150)
    same(evaluate_rank(distmat, *labels), expected)
    other = evaluate(qf, gf, *labels, metric={"cosine": "euclidean", "euclidean": "cosine"}[metric])
    assert abs(other.mAP - result.mAP) > 1e-3


def test_equal_features_tie_by_gallery_index(rng):
    """NFC makes equal rows; their distances must be equal too, in whatever tile of a product they lie."""
    gf = rng.standard_normal((700, 97)).astype(np.float32)
    gf[rng.permutation(700)[:400]] = gf[rng.permutation(700)[:400]]
    qf = rng.standard_normal((30, 97)).astype(np.float32)
    labels = rng.integers(1, 9, 30), rng.integers(1, 9, 700)
    x, y = reference.unit(qf), reference.unit(gf)
    expected = reference.evaluate_rank(((x[:, None] - y[None]) ** 2).sum(-1), *labels)
    whole = evaluate(qf, gf, *labels)
    assert whole.mAP == pytest.approx(expected[0], abs=1e-6)
    one_by_one = [evaluate(qf[i : i + 1], gf, labels[0][i : i + 1], labels[1]).mAP for i in range(30)]
    np.testing.assert_allclose(one_by_one, whole.average_precision, atol=1e-6)


def test_equal_rows_are_equally_far_whatever_the_product_rounds(monkeypatch, rng):
    rows = Rows(rng.standard_normal((12, 5))[[0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 4, 5]], "rows")
    uneven_products(monkeypatch, 1e-6)
    found = tying_distances(rows)(rows.read(slice(0, 3)))
    assert torch.equal(found[:, 0:4], found[:, 4:8])
    assert torch.equal(found[:, 0], found[:, 9])


def test_float64_features_are_compared_in_float64(rng):
    q, g, base = rng.standard_normal((20, 6)), rng.standard_normal((50, 6)), rng.standard_normal(6)
    labels = rng.integers(1, 5, 20), rng.integers(1, 5, 50)
    expected = evaluate(q, g, *labels, metric="euclidean").mAP
    qf, gf = base + 1e-5 * q, base + 1e-5 * g  # apart by less than float32 products can tell
    assert evaluate(qf, gf, *labels, metric="euclidean").mAP == pytest.approx(expected, abs=1e-6)
    half = evaluate(qf.astype(np.float32), gf.astype(np.float32), *labels, metric="euclidean").mAP
    assert abs(half - expected) > 0.01


@pytest.mark.parametrize("size", [1e-30, 1e20])
def test_euclidean_distances_of_any_size(size, rng):
    qf, gf = (rng.standard_normal((n, 5)).astype(np.float32) for n in (20, 60))
    labels = rng.integers(1, 5, 20), rng.integers(1, 5, 60)
    expected = evaluate(qf, gf, *labels, metric="euclidean").mAP
    scale = np.float32(size)
    assert evaluate(qf * scale, gf * scale, *labels, metric="euclidean").mAP == pytest.approx(expected, abs=1e-6)


def test_labels_at_the_end_of_their_range(rng):
    highest = np.iinfo(np.int64).max
    assert evaluate_rank(np.array([[0.0, 1.0]]), [highest], [1, highest]).mAP == 1 / 2
    assert evaluate_rank(np.array([[0.0, 1.0]]), np.array([127], np.int8), np.array([-1, 127], np.int8)).mAP == 1
    with pytest.raises(ValueError, match="q_pids must fit into 64-bit"):
        evaluate_rank(np.array([[0.0, 1.0]]), np.array([2**64 - 1], np.uint64), [1, 2])


def test_same_identity_and_camera_is_dropped_and_junk_is_nobody():
    distmat = np.array([[0.0, 1.0, 2.0, 3.0]])
    q, g = [5], [5, -1, 7, 5]
    assert evaluate_rank(distmat, q, g, [1], [1, 2, 2, 2]).mAP == 1 / 2  # 7 before 5; the junk does not count
    assert evaluate_rank(distmat, q, g).mAP == pytest.approx((1 + 2 / 3) / 2)


def test_pid_0_is_a_distractor_only_in_so_far_as_no_query_has_it():
    assert evaluate_rank(np.array([[0.0, 1.0]]), [5], [0, 5]).mAP == 1 / 2
    assert evaluate_rank(np.array([[0.0, 1.0]]), [0], [0, 5]).mAP == 1


def test_infinite_distances_rank_last_by_index():
    distmat = np.array([[np.inf, 1.0, np.inf, np.inf]])
    assert evaluate_rank(distmat, [5], [6, 6, 5, 6]).mAP == 1 / 3


def test_queries_without_a_match_count_nowhere(rng):
    distmat, g_pids = rng.random((3, 6)), [1, 1, 2, 2, 3, 3]
    alone = evaluate_rank(distmat[:1], [1], g_pids)
    both = evaluate_rank(distmat, [1, 9, -1], g_pids)
    assert both.num_valid_queries == 1
    assert both.mAP == alone.mAP


def test_results_are_equal_by_value(rng):
    distances, labels = rng.random((4, 6)), ([1, 2, 3, 9], [1, 2, 3, 1, 2, 3])  # 9 has no match
    first, again = evaluate_rank(distances, *labels), evaluate_rank(distances.copy(), *labels)
    assert np.isnan(first.average_precision[3])
    assert first == again
    assert len({first, again}) == 1
    assert first != evaluate_rank(distances, *labels, max_rank=2)
    assert first != evaluate_rank(distances[::-1], *labels)
    assert first != first.mAP


def test_result_is_frozen_and_prints_percent():
    result = evaluate_rank(np.array([[0.0, 1.0, 2.0]]), [5], [6, 5, 7], max_rank=7)
    assert str(result) == "mAP 50.00%  Rank-1 0.00%  Rank-5 100.00%  mINP 50.00%  (1 valid queries)"
    assert result.rank(2) == 1
    assert len(result.cmc) == 7
    with pytest.raises(ValueError, match="r must be at most 7"):
        result.rank(8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.mAP = 1


def test_callers_distances_stay(rng):
    distmat = rng.random((4, 6))
    before = distmat.copy()
    evaluate_rank(distmat, [1, 2, 3, 1], [1, 2, 3, 1, 2, -1], [0] * 4, [0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(distmat, before)


def test_a_product_that_rounds_every_column_in_its_own_way_changes_nothing(monkeypatch, rng):
    gf = rng.standard_normal((40, 5))[rng.integers(0, 10, 40)]
    labels = rng.integers(1, 4, 9), rng.integers(1, 4, 40)
    qf = rng.standard_normal((9, 5))
    expected = evaluate(qf, gf, *labels)
    uneven_products(monkeypatch, 1e-12)
    np.testing.assert_array_equal(evaluate(qf, gf, *labels).average_precision, expected.average_precision)


class TestParts:
    @pytest.mark.parametrize("seen", VISIBILITY)
    @pytest.mark.parametrize("metric", ["cosine", "euclidean"])
    def test_equals_the_literal_distances_and_protocol(self, metric, seen, rng):
        qf, gf = (3 * rng.standard_normal((n, 3, 6)).astype(np.float32) for n in (70, 40))
        (v, weights_q), (u, weights_g) = (visibility(seen, x.shape[:2], rng) for x in (qf, gf))
        z = literal.unit if metric == "cosine" else np.float64
        distmat = literal.distances(z(qf), z(gf), weights_q, weights_g)
        labels = rng.integers(1, 6, 70), rng.integers(0, 6, 40), rng.integers(0, 3, 70), rng.integers(0, 3, 40)
        expected = reference.evaluate_rank(distmat, *labels)
        before = qf.copy(), gf.copy()
        given = {"q_visibility": v, "g_visibility": u, "metric": metric}
        same(evaluate(qf, gf, *labels, **given), expected)
        np.testing.assert_array_equal(qf, before[0])
        np.testing.assert_array_equal(gf, before[1])
        same(evaluate_rank(part_distances(qf, gf, v, u, normalize=metric == "cosine"), *labels), expected)
        tensors = [None if array is None else torch.from_numpy(array) for array in (v, u)]
        given.update(q_visibility=tensors[0], g_visibility=tensors[1], max_memory=1 << 20)
        same(evaluate(torch.from_numpy(qf), torch.from_numpy(gf), *labels, **given), expected)

    def test_pairs_that_share_no_part_rank_last_by_index(self):
        qf = np.array([[[1.0, 0], [0, 1]]])
        gf = np.array([[[0.0, 1], [0, 1]], [[1, 0], [0, 1]], [[-1, 0], [0, -1]], [[1, 0], [0, 1]]])
        u = np.array([[True, False], [False, True], [True, False], [False, True]])
        result = evaluate(qf, gf, [7], [7, 1, 1, 7], q_visibility=np.array([[True, False]]), g_visibility=u)
        # 0 and 2 share the first part and come first; of the others, 1 comes before 3.
        assert result.mAP == (1 / 1 + 2 / 4) / 2

    def test_equal_features_seen_alike_tie_by_gallery_index(self, monkeypatch, rng):
        gf = rng.standard_normal((60, 2, 5))[rng.integers(0, 10, 60)]
        u = np.repeat([[True, True], [True, False]], 30, axis=0)
        qf, labels = rng.standard_normal((9, 2, 5)), (rng.integers(1, 4, 9), rng.integers(1, 4, 60))
        z, y = literal.unit(qf), literal.unit(gf)
        expected = reference.evaluate_rank(literal.distances(z, y, np.ones((9, 2)), u), *labels)
        uneven_products(monkeypatch, 1e-12)
        same(evaluate(qf, gf, *labels, g_visibility=u), expected)

    @pytest.mark.parametrize("shape", [(60,), (3, 20)])
    def test_memory_mapped_features_are_read_a_block_at_a_time(self, shape, rng, tmp_path, monkeypatch):
        qf, gf = (rng.standard_normal((n, *shape)).astype(np.float32) for n in (700, 3000))
        gf[1400:] = gf[:1600]
        labels = rng.integers(1, 40, 700), rng.integers(0, 40, 3000)
        expected = evaluate(qf, gf, *labels)
        for name, array in (("q", qf), ("g", gf)):
            np.save(tmp_path / f"{name}.npy", array)
        mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "qg"]
        np.testing.assert_array_equal(evaluate(*mapped, *labels).average_precision, expected.average_precision)
        read, numbers_read = Rows.read, []

        def counted(rows, *arguments):
            block = read(rows, *arguments)
            numbers_read.append(block.numel())
            return block

        monkeypatch.setattr(Rows, "read", counted)
        found = evaluate(*mapped, *labels, max_memory=1 << 20)
        np.testing.assert_allclose(found.average_precision, expected.average_precision, atol=1e-6)
        assert max(numbers_read) * 8 <= 1 << 18

    @pytest.mark.parametrize(("given", "error", "message"), BAD_VISIBILITY)
    @pytest.mark.parametrize("name", ["q_visibility", "g_visibility"])
    def test_bad_visibility(self, name, given, error, message):
        x = np.ones((3, 2, 4))
        with pytest.raises(error, match=f"{name} {message}"):
            evaluate(x, x, [1, 2, 3], [1, 2, 3], **{name: given})

    @pytest.mark.gpu
    @pytest.mark.parametrize("seen", VISIBILITY)
    def test_cuda_equals_cpu(self, seen, rng):
        qf, gf = (torch.from_numpy(rng.standard_normal((n, 4, 16))).float() for n in (50, 300))
        labels = rng.integers(0, 9, 50), rng.integers(0, 9, 300)
        (v, _), (u, _) = (visibility(seen, tuple(x.shape[:2]), rng) for x in (qf, gf))
        found = evaluate(qf.cuda(), gf.cuda(), *labels, q_visibility=v, g_visibility=u)
        assert found.mAP == pytest.approx(evaluate(qf, gf, *labels, q_visibility=v, g_visibility=u).mAP, abs=1e-6)


def test_nothing_visible_is_a_mistake(rng):
    x, shown = rng.standard_normal((4, 2, 3)), np.ones((4, 2))
    with pytest.raises(ValueError, match="q_visibility must show at least one part"):
        evaluate(x, x, range(4), range(4), q_visibility=0 * shown, g_visibility=shown)


def test_lists_of_the_nearest_are_no_matrix():
    with pytest.raises(TypeError, match="without topk"):
        evaluate_rank((np.ones((2, 3)), np.ones((2, 3), int)), [0, 1], [0, 1, 2])


@pytest.mark.gpu
def test_cuda_equals_cpu(rng):
    qf, gf = (torch.from_numpy(rng.standard_normal((n, 32))).float() for n in (50, 300))
    labels = rng.integers(0, 9, 50), rng.integers(0, 9, 300)
    assert evaluate(qf.cuda(), gf.cuda(), *labels).mAP == pytest.approx(evaluate(qf, gf, *labels).mAP, abs=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        lambda pids: [f"{pid:04d}" if pid < 1 else f"person {pid}" for pid in pids],
        lambda pids: np.array([str(pid) for pid in pids], dtype=object),
        lambda pids: [f" {pid:05d} " for pid in pids],
        lambda pids: pids.astype(np.float32),
        lambda pids: torch.from_numpy(pids).bfloat16(),
    ],
    ids=["words", "objects", "padded", "float32", "bfloat16"],
)
def test_labels_of_every_kind(kind, rng):
    qf, gf = rng.standard_normal((6, 4)), rng.standard_normal((30, 4))
    labels = rng.integers(1, 4, 6), rng.integers(-1, 6, 30), rng.integers(0, 2, 6), rng.integers(0, 3, 30)
    expected = evaluate(qf, gf, *labels)
    np.testing.assert_array_equal(evaluate(qf, gf, *map(kind, labels)).average_precision, expected.average_precision)
    distances = part_distances(qf[:, None], gf[:, None])
    np.testing.assert_array_equal(
        evaluate_rank(distances, *map(kind, labels)).average_precision,
        evaluate_rank(distances, *labels).average_precision,
    )


@pytest.mark.parametrize("container", [np.int64, np.uint64, torch.from_numpy])
def test_integers_that_are_no_floats_keep_their_order(container):
    distances = container(np.array([[2**62, 2**62 - 1, 2**62]]))
    assert evaluate_rank(distances, [1], [1, 2, 1]).average_precision == pytest.approx([(1 / 2 + 2 / 3) / 2])


def test_similarities_in_place_of_distances_are_noticed(rng):
    q_pids, g_pids = np.arange(1, 41), np.repeat(np.arange(1, 41), 3)
    similarities = np.where(q_pids[:, None] == g_pids, 0.8, 0.1) + rng.random((40, 120)) / 10
    with pytest.warns(UserWarning, match=r"distmat looks like similarities: .* mAP is 100.0% .* Pass 1 - similarity"):
        evaluate_rank(similarities, q_pids, g_pids)
    evaluate_rank(1 - similarities, q_pids, g_pids)  # warnings are errors here
    evaluate_rank(similarities * 3, q_pids, g_pids)
    evaluate_rank(rng.random((40, 120)), q_pids, g_pids)


ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"qf": None}, TypeError, "qf must be a numpy array"),
        ({"gf": "x"}, TypeError, "gf must be a numpy array"),
        ({"qf": np.ones(3)}, ValueError, r"qf must have shape \(N, D\)"),
        ({"gf": np.ones((2, 4))}, ValueError, "same number of columns, got 3 and 4"),
        ({"gf": np.ones((2, 1, 3))}, ValueError, "qf and gf must have the same parts, got whole features and 1 parts"),
        ({"q_visibility": np.ones((2, 1))}, ValueError, "q_visibility must be None for whole features"),
        ({"max_memory": 100}, ValueError, "max_memory must be at least"),
        ({"qf": np.ones((0, 3)), "q_pids": []}, ValueError, "qf must hold at least one row"),
        ({"gf": np.ones((0, 3)), "g_pids": []}, ValueError, "gf must hold at least one row"),
        ({"gf": np.array([[1, 2, 3], [1, np.nan, 3]])}, ValueError, "gf must be finite.*row 1"),
        ({"q_pids": [1]}, ValueError, r"q_pids must have shape \(2,\)"),
        ({"g_pids": ["a", "b"]}, TypeError, "g_pids must hold integers"),
        ({"q_camids": [1, 2]}, ValueError, "q_camids and g_camids must be given together"),
        ({"q_camids": [1, 2], "g_camids": [1]}, ValueError, r"g_camids must have shape \(2,\)"),
        ({"q_camids": [1, 1], "g_camids": [1, 1]}, ValueError, "none of the 2 queries has a match"),
        ({"g_pids": [8, 9]}, ValueError, "none of the 2 queries has a match"),
        ({"metric": "dot"}, ValueError, "metric must be one of 'cosine', 'euclidean'"),
        ({"max_rank": 0}, ValueError, "max_rank must be at least 1"),
        ({"max_rank": 2 * 10**9}, ValueError, "max_rank must be at most 10000000"),
        ({"max_rank": 10**5000}, ValueError, "max_rank must be at most .* over 300 digits"),
        ({"metric": np.ones(3)}, ValueError, r"metric must be one of .* got an array of shape \(3,\)"),
        ({"q_pids": [[1], [2, 3]]}, ValueError, r"q_pids must have shape \(2,\).* ragged"),
        ({"g_pids": [1, 10**400]}, ValueError, "g_pids must fit into 64-bit"),
    ],
)
def test_bad_input(arguments, error, message):
    good = {"qf": ONES, "gf": ONES, "q_pids": [1, 2], "g_pids": [1, 2]}
    with pytest.raises(error, match=message):
        evaluate(**{**good, **arguments})


@pytest.mark.parametrize(
    ("distmat", "error", "message"),
    [
        (None, TypeError, "distmat must be a numpy array"),
        ("x", TypeError, "distmat must be a numpy array"),
        (np.array([["a", "b"]]), TypeError, "distmat"),
        (np.ones(2), ValueError, "distmat must have two dimensions"),
        (np.ones((0, 2)), ValueError, "at least one entry"),
        (np.ones((2, 3)), ValueError, r"g_pids must have shape \(3,\)"),
        (np.array([[0.0, 1.0], [np.nan, 1.0]]), ValueError, "row 1"),
    ],
)
def test_bad_distances(distmat, error, message):
    with pytest.raises(error, match=message):
        evaluate_rank(distmat, [1, 2] if np.shape(distmat) != (0, 2) else [], [1, 2])
