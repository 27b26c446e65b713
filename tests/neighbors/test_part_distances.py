from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import parts as literal

from pose2id import evaluate_rank, part_distances, re_ranking

VISIBILITY = ["none", "bool", "uint8", "float"]


def visibility(kind, shape, rng):
    """What to pass, and the weights it stands for: a third is hidden, the first row, and all of the second but one."""
    weights = rng.random(shape) * (rng.random(shape) < 0.65)
    weights[:1] = 0
    weights[1:2, 1:] = 0
    if kind == "none":
        return None, np.ones(shape)
    given = {"bool": weights > 0, "uint8": (weights > 0).astype(np.uint8), "float": weights.astype(np.float32)}[kind]
    return given, given.astype(np.float64)


@pytest.mark.parametrize("kind", VISIBILITY)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_equals_the_literal_distances(kind, normalize, count, rng):
    x, y = (rng.standard_normal((n, count, 6)).astype(np.float32) for n in (9, 14))
    y[3, 0] = 0
    v, weights_x = visibility(kind, x.shape[:2], rng)
    u, weights_y = visibility(kind, y.shape[:2], rng)
    z = literal.unit if normalize else np.float64
    expected = literal.distances(z(x), z(y), weights_x, weights_y)
    before = x.copy(), y.copy()
    found = part_distances(x, y, v, u, normalize=normalize)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=2e-7)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])

    tensors = [None if array is None else torch.from_numpy(array) for array in (x, y, v, u)]
    as_tensor = part_distances(*tensors, normalize=normalize)
    assert isinstance(as_tensor, torch.Tensor)
    np.testing.assert_array_equal(as_tensor.numpy(), found)
    in_float64 = part_distances(x.astype(np.float64), y, v, u, normalize=normalize)
    assert in_float64.dtype == np.float64
    np.testing.assert_allclose(in_float64, expected, rtol=1e-7, atol=1e-7)


def test_booleans_and_weights_mix_and_one_side_may_be_visible_throughout(rng):
    x, y = rng.standard_normal((7, 4, 5)), rng.standard_normal((8, 4, 5))
    v, u = rng.random((7, 4)) < 0.5, rng.random((8, 4))
    expected = literal.distances(literal.unit(x), literal.unit(y), v, u)
    np.testing.assert_allclose(part_distances(x, y, v, u), expected, atol=1e-7)
    np.testing.assert_array_equal(part_distances(x, y, v.astype(int), u), part_distances(x, y, v, u))
    np.testing.assert_array_equal(part_distances(x, y, v), part_distances(x, y, v, np.ones((8, 4), bool)))
    np.testing.assert_array_equal(part_distances(x, y, None, u), part_distances(x, y, np.ones((7, 4)), u))


def test_pairs_that_share_no_part_are_further_than_any_part_of_others():
    x = np.array([[[1.0, 0.0], [0.0, 3.0]]])
    y = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [4.0, 0.0]], [[9.0, 9.0], [9.0, 9.0]]])
    u = np.array([[True, True], [True, True], [False, False]])
    # Parts at 0 and 2, at 1 and 5: means 1 and 3, and the furthest part at 5.
    np.testing.assert_allclose(part_distances(x, y, None, u, normalize=False), [[1, 3, 6]])
    np.testing.assert_array_equal(part_distances(x, y[2:], None, u[2:]), [[1]])


def test_whole_features_are_one_part(rng):
    x, y = rng.standard_normal((5, 6)), rng.standard_normal((7, 6))
    np.testing.assert_array_equal(part_distances(x, y), part_distances(x[:, None], y[:, None]))
    np.testing.assert_allclose(
        part_distances(x, y, normalize=False), np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1)), atol=1e-7
    )


def uneven_products(monkeypatch, error):
    """Makes torch's products round every column in its own way."""
    product = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda a, x, y, **k: product(a, x, y, **k) + error * torch.arange(y.shape[1]))


def test_gallery_images_that_nothing_tells_apart_are_equally_far(rng, monkeypatch):
    y = rng.standard_normal((12, 3, 5))[[0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 4, 5]]
    u = np.ones((12, 3), bool)
    u[[0, 4, 8], 2] = False
    y[[0, 4, 8], 2] = rng.standard_normal((3, 5))  # hidden: says nothing
    uneven_products(monkeypatch, 1e-6)
    found = part_distances(rng.standard_normal((4, 3, 5)), y, None, u)
    np.testing.assert_array_equal(found[:, 0:4], found[:, 4:8])
    np.testing.assert_array_equal(found[:, 0], found[:, 8])
    assert (found[:, 0] != found[:, 9]).all()  # the same features, but all of them seen


def test_blocks_change_nothing_but_rounding(rng):
    x, y = rng.standard_normal((300, 6, 30)), rng.standard_normal((1500, 6, 30))
    v, u = rng.random((300, 6)), rng.random((1500, 6)) < 0.6
    whole = part_distances(x, y, v, u)
    np.testing.assert_allclose(part_distances(x, y, v, u, max_memory=1 << 20), whole, rtol=0, atol=1e-12)
    z, t = literal.unit(x[:3]), literal.unit(y[:40])
    np.testing.assert_allclose(whole[:3, :40], literal.distances(z, t, v[:3], u[:40]), atol=1e-7)


@pytest.mark.parametrize("size", [1e-150, 1e-30, 1e20, 1e150])
def test_features_of_any_size(size, rng):
    x, y = rng.standard_normal((5, 3, 4)), rng.standard_normal((6, 3, 4))
    expected = part_distances(x, y, normalize=False)
    np.testing.assert_allclose(part_distances(x * size, y * size, normalize=False) / size, expected, rtol=1e-7)
    np.testing.assert_allclose(part_distances(x * size, y * size), part_distances(x, y), rtol=1e-7)


def test_distances_beyond_float32_are_an_error():
    x = np.full((1, 1, 4), 3e38, np.float32)
    with pytest.raises(ValueError, match="qf and gf must be small enough for distances in"):
        part_distances(x, -x, normalize=False)
    assert part_distances(x.astype(np.float64), -x, normalize=False) == pytest.approx(1.2e39)


def test_they_go_into_re_ranking_and_evaluation(rng):
    x, y = rng.standard_normal((8, 3, 5)), rng.standard_normal((20, 3, 5))
    v, u = rng.random((8, 3)) < 0.5, rng.random((20, 3)) < 0.5
    u[0] = False
    reranked = re_ranking(part_distances(x, y, v, u), part_distances(x, x, v, v), part_distances(y, y, u, u), 5, 3)
    assert np.isfinite(reranked).all()
    assert evaluate_rank(reranked, rng.integers(1, 3, 8), rng.integers(1, 3, 20)).num_valid_queries == 8


@pytest.mark.gpu
@pytest.mark.parametrize("kind", VISIBILITY)
def test_cuda_equals_cpu(kind, rng):
    x, y = (torch.from_numpy(rng.standard_normal((n, 4, 32))).float() for n in (100, 300))
    v, u = (visibility(kind, tuple(array.shape[:2]), rng)[0] for array in (x, y))
    found = part_distances(x.cuda(), y.cuda(), v, u)
    assert found.is_cuda
    np.testing.assert_allclose(found.cpu(), part_distances(x, y, v, u), atol=1e-6)


ONES = np.ones((3, 2, 4))
BAD_VISIBILITY = [
    ([[1, 1]] * 3, TypeError, "must be a numeric numpy array or torch tensor, got list"),
    (np.full((3, 2), "a"), TypeError, "must be a numeric numpy array or torch tensor, got <U1"),
    (
        torch.ones((3, 2), dtype=torch.complex64),
        TypeError,
        "must be a numeric numpy array or torch tensor, got torch.complex64",
    ),
    (np.ones((3, 3)), ValueError, r"must have shape \(3, 2\), one value per part, got \(3, 3\)"),
    (np.ones(3), ValueError, r"must have shape \(3, 2\)"),
    (np.ones((3, 2, 1)), ValueError, r"must have shape \(3, 2\)"),
    (np.full((3, 2), -0.1), ValueError, r"must be in \[0, 1\].*got values in \[-0.1, -0.1\]"),
    (np.full((3, 2), np.nan), ValueError, r"must be in \[0, 1\]"),
    (np.full((3, 2), np.inf), ValueError, r"must be in \[0, 1\]"),
    (np.full((3, 2), 1e7), ValueError, r"must be in \[0, 1\]"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD_VISIBILITY)
@pytest.mark.parametrize("name", ["q_visibility", "g_visibility"])
def test_bad_visibility(name, given, error, message):
    with pytest.raises(error, match=f"{name} {message}"):
        part_distances(ONES, ONES, **{name: given})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"qf": None}, TypeError, "qf must be a numpy array"),
        (
            {"gf": np.ones((3, 2, 4, 1))},
            ValueError,
            r"gf must have shape \(N, D\).*or \(N, P, D\) for features in parts",
        ),
        ({"gf": np.ones((3, 0, 4))}, ValueError, "gf must have at least one column"),
        ({"gf": np.ones((3, 3, 4))}, ValueError, "qf and gf must have the same parts, got 2 parts and 3 parts"),
        ({"gf": np.ones((3, 8))}, ValueError, "qf and gf must have the same parts, got 2 parts and whole features"),
        ({"gf": np.ones((3, 2, 5))}, ValueError, "same number of columns"),
        ({"qf": np.ones((0, 2, 4))}, ValueError, "qf must hold at least one row"),
        ({"max_memory": 10}, ValueError, "max_memory must be at least"),
        ({"qf": np.ones((3, 4)), "gf": np.ones((3, 4)), "q_visibility": np.ones((3, 1))}, ValueError, "whole features"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        part_distances(**{"qf": ONES, "gf": ONES, **arguments})


def test_a_part_that_is_not_finite_is_named():
    bad = ONES.copy()
    bad[1, 0, 2] = np.nan
    bad[2] = np.inf
    with pytest.raises(ValueError, match=r"gf must be finite; 2 of 3 rows.*\(row 1 part 0, 2 part 0, 2 part 1\)"):
        part_distances(ONES, bad)
