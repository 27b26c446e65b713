from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from pose2id import evaluate_rank, k_reciprocal, re_ranking, rerank


def squared(x, y):
    return ((x[:, None].astype(np.float64) - y[None]) ** 2).sum(-1)


def all_squared(q, g):
    return squared(q, g), squared(q, q), squared(g, g)


@pytest.mark.parametrize(("k1", "k2", "name"), [(20, 6, "rerank_20_6_03"), (50, 15, "rerank_50_15_03")])
def test_golden(golden, k1, k2, name):
    data = golden("rerank_eval")
    q, g = data["q"], data["g"]
    published = reference.re_ranking(*all_squared(q, g), k1, k2, 0.3, half=True)
    np.testing.assert_allclose(published, data[name], atol=2e-7)
    exact = reference.re_ranking(*all_squared(q, g), k1, k2, 0.3)
    np.testing.assert_allclose(k_reciprocal(q, g, k1, k2, 0.3, normalize=False), exact, atol=1e-6)
    # The rest is the published code's rounding to float16.
    assert np.abs(k_reciprocal(q, g, k1, k2, 0.3) - data[name]).max() < 6e-3
    labels = data["q_pid"], data["g_pid"], data["q_cam"], data["g_cam"]
    result = evaluate_rank(k_reciprocal(q, g), *labels)
    assert result.mAP == pytest.approx(float(data["mAP_rerank"]), abs=1e-4)


@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(20, 6, 0.3), (1, 1, 0.5), (5, 1, 0.0), (7, 3, 1.0), (6, 9, 0.2), (200, 80, 0.3)]
)
def test_equals_the_literal_encoding(k1, k2, weight, rng, monkeypatch):
    monkeypatch.setattr(rerank, "BLOCK_BYTES", 64)  # several blocks
    centres = rng.standard_normal((8, 10))
    q, g = (centres[rng.integers(0, 8, n)] + 0.7 * rng.standard_normal((n, 10)) for n in (12, 70))
    expected = reference.re_ranking(*all_squared(q, g), k1, k2, weight)
    np.testing.assert_allclose(k_reciprocal(q, g, k1, k2, weight, normalize=False), expected, atol=1e-5)
    euclidean = [np.sqrt(matrix) for matrix in all_squared(q, g)]
    np.testing.assert_allclose(re_ranking(*euclidean, k1, k2, weight), expected, atol=1e-5)
    x, y = reference.unit(q), reference.unit(g)
    normalized = reference.re_ranking(*all_squared(x, y), k1, k2, weight)
    np.testing.assert_allclose(k_reciprocal(q, g, k1, k2, weight), normalized, atol=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_distances_of_any_size(size, rng):
    q, g = (rng.standard_normal((n, 4)).astype(np.float32) for n in (5, 20))
    expected = k_reciprocal(q, g, 6, 3, normalize=False)
    scale = np.float32(size)
    np.testing.assert_allclose(k_reciprocal(q * scale, g * scale, 6, 3, normalize=False), expected, atol=1e-5)
    distances = [np.sqrt(matrix).astype(np.float32) * scale for matrix in all_squared(q, g)]
    np.testing.assert_allclose(re_ranking(*distances, 6, 3), expected, atol=1e-5)


def test_the_default_dtype_of_torch_does_not_matter(rng):
    q, g = rng.standard_normal((5, 4)), rng.standard_normal((9, 4))
    expected = k_reciprocal(q, g, 4, 2)
    torch.set_default_dtype(torch.float16)
    try:
        np.testing.assert_array_equal(k_reciprocal(q, g, 4, 2), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_distances_need_not_be_symmetric(rng):
    q_g, q_q, g_g = rng.random((5, 9)), rng.random((5, 5)), rng.random((9, 9))
    np.fill_diagonal(q_q, 0)
    np.fill_diagonal(g_g, 0)
    expected = reference.re_ranking(q_g**2, q_q**2, g_g**2, 4, 2, 0.3)
    np.testing.assert_allclose(re_ranking(q_g, q_q, g_g, 4, 2), expected, atol=1e-5)


def test_ties_go_to_the_lower_index(rng):
    distances = [np.sqrt(rng.integers(1, 4, shape).astype(float)) for shape in ((4, 30), (4, 4), (30, 30))]
    expected = reference.re_ranking(*(matrix.astype(np.float32) ** 2 for matrix in distances), 6, 3, 0.3)
    np.testing.assert_allclose(re_ranking(*distances, 6, 3), expected, atol=1e-5)


def test_images_all_alike():
    # All lists are [0, 1, 2]: the gallery (3, 4, 5) is nobody's reciprocal neighbour, Jaccard distance 1.
    np.testing.assert_allclose(k_reciprocal(np.ones((3, 4)), np.ones((3, 4)), 2, 1), 0.7, rtol=1e-6)


def test_containers_and_inputs_stay(rng):
    q, g = rng.standard_normal((5, 4)), rng.standard_normal((9, 4))
    before = q.copy()
    expected = k_reciprocal(q, g, 4, 2)
    assert type(expected) is np.ndarray
    assert expected.dtype == np.float32
    found = k_reciprocal(torch.from_numpy(q), torch.from_numpy(g), 4, 2)
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(q, before)
    distances = [torch.from_numpy(np.sqrt(matrix)) for matrix in all_squared(q, g)]
    copies = [matrix.clone() for matrix in distances]
    assert isinstance(re_ranking(*distances, 4, 2), torch.Tensor)
    for matrix, copy in zip(distances, copies, strict=True):
        assert torch.equal(matrix, copy)


@pytest.mark.gpu
def test_cuda_equals_cpu(rng):
    q, g = (torch.from_numpy(rng.standard_normal((n, 32))).float() for n in (20, 100))
    found = k_reciprocal(q.cuda(), g.cuda())
    assert found.is_cuda
    np.testing.assert_allclose(found.cpu(), k_reciprocal(q, g), atol=1e-4)


ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"qf": None}, TypeError, "qf must be a numpy array"),
        ({"gf": "x"}, TypeError, "gf must be a numpy array"),
        ({"qf": np.ones(3)}, ValueError, r"qf must have shape \(N, D\)"),
        ({"gf": np.ones((2, 4))}, ValueError, "same number of columns"),
        ({"gf": np.ones((0, 3))}, ValueError, "gf must hold at least one row"),
        ({"gf": np.array([[1, np.nan, 3]])}, ValueError, "gf must be finite.*row 0"),
        ({"k1": 0}, ValueError, "k1 must be at least 1"),
        ({"k2": 0.5}, TypeError, "k2 must be an integer"),
        ({"lambda_value": 1.5}, ValueError, r"lambda_value must be in \[0, 1\]"),
        ({"lambda_value": "x"}, TypeError, "lambda_value must be a number"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        k_reciprocal(**{"qf": ONES, "gf": ONES, **arguments})


@pytest.mark.parametrize(
    ("matrices", "error", "message"),
    [
        ((None, ONES, ONES), TypeError, "q_g_dist must be a numpy array"),
        ((np.ones((2, 3)), np.ones((3, 3)), np.ones((3, 3))), ValueError, r"q_q_dist must have shape \(2, 2\)"),
        ((np.ones((2, 3)), np.ones((2, 2)), np.ones((2, 2))), ValueError, r"g_g_dist must have shape \(3, 3\)"),
        ((np.ones((2, 3)), np.ones((2, 2)), np.full((3, 3), np.nan)), ValueError, "g_g_dist must be finite; row 0"),
        ((np.ones(3), ONES, ONES), ValueError, "q_g_dist must have two dimensions"),
        ((np.ones((0, 3)), np.ones((0, 0)), np.ones((3, 3))), ValueError, "at least one query"),
    ],
)
def test_bad_distances(matrices, error, message):
    with pytest.raises(error, match=message):
        re_ranking(*matrices)
