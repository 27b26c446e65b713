from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_part_distances import uneven_products

from pose2id import evaluate_rank, k_reciprocal, re_ranking
from pose2id.io.rows import Rows
from pose2id.neighbors.search import search


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


def make(kind, n, d, rng):
    """Feature sets that break careless re-ranking."""
    x = rng.standard_normal((n, d)).astype(np.float32)
    if kind == "clustered":
        x = x[rng.integers(0, n // 8 + 1, n)] + 0.3 * x
    elif kind == "copies":
        x[rng.permutation(n)[: n // 2]] = x[0]
        x[::5] = x.mean(0)
    elif kind == "near ties":
        x = np.repeat(x[: n // 4 + 1], 4, axis=0)[rng.permutation(n)]
        x = (x * (1 + 1e-7 * rng.standard_normal(x.shape))).astype(np.float32)
    elif kind == "far from the origin":
        x += 1e4
    elif kind == "one far row":
        x[n // 2] *= 1e4
    elif kind == "sizes":
        x *= np.float32(2.0) ** rng.integers(-30, 30, (n, 1))
    elif kind == "zeros":
        x[rng.random(n) < 0.3] = 0
    elif kind == "grid":
        x = rng.integers(-1, 2, (n, d)).astype(np.float32)
    return x


KINDS = ["random", "clustered", "copies", "near ties", "far from the origin", "one far row", "sizes", "zeros", "grid"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(20, 6, 0.3), (1, 1, 0.5), (5, 1, 0.0), (7, 3, 1.0), (6, 9, 0.2), (200, 80, 0.3)]
)
def test_equals_the_literal_encoding(kind, k1, k2, weight, rng):
    x = make(kind, 60, 10, rng)
    q, g = x[:12], x[12:]
    expected = reference.re_ranking(*all_squared(q, g), k1, k2, weight)
    np.testing.assert_allclose(k_reciprocal(q, g, k1, k2, weight, normalize=False), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grid"])
def test_equals_the_literal_encoding_of_normalised_rows(kind, backend, rng):
    x = make(kind, 60, 10, rng)
    q, g = x[:12], x[12:]
    expected = reference.re_ranking(*all_squared(reference.unit(q), reference.unit(g)), 8, 3, 0.3)
    np.testing.assert_allclose(k_reciprocal(q, g, 8, 3, backend=backend), expected, atol=1e-5)


@pytest.mark.parametrize("d", [1, 2, 17, 300, 4096])
def test_any_number_of_columns(d, backend, rng):
    x = make("clustered", 50, d, rng)
    q, g = x[:10], x[10:]
    expected = reference.re_ranking(*all_squared(q, g), 6, 3, 0.3)
    np.testing.assert_allclose(k_reciprocal(q, g, 6, 3, normalize=False, backend=backend), expected, atol=1e-5)


def test_the_same_images_on_both_sides(rng):
    g = make("clustered", 40, 6, rng)
    q = g[::3]
    expected = reference.re_ranking(*all_squared(q, g), 6, 3, 0.3)
    np.testing.assert_allclose(k_reciprocal(q, g, 6, 3, normalize=False), expected, atol=1e-5)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_float64_values_of_any_size(size, rng):
    q, g = (rng.standard_normal((n, 4)) + 3 for n in (5, 20))
    expected = reference.re_ranking(*all_squared(q, g), 6, 3, 0.3)
    np.testing.assert_allclose(k_reciprocal(q * size, g * size, 6, 3, normalize=False), expected, atol=1e-5)


def test_float64_differences_that_float32_does_not_see(rng):
    q, g = (1 + 1e-10 * rng.standard_normal((n, 6)) for n in (5, 30))
    expected = reference.re_ranking(*all_squared(q, g), 6, 3, 0.3)
    np.testing.assert_allclose(k_reciprocal(q, g, 6, 3, normalize=False), expected, atol=1e-5)


@given(
    seed=st.integers(0, 2**32 - 1),
    num_queries=st.integers(1, 8),
    num_gallery=st.integers(1, 20),
    d=st.integers(1, 4),
    k1=st.integers(1, 30),
    k2=st.integers(1, 30),
    levels=st.integers(0, 3),
    backend=st.sampled_from(["faiss", "torch"]),
    topk=st.integers(1, 25),
)
def test_any_small_set_with_ties(seed, num_queries, num_gallery, d, k1, k2, levels, backend, topk):
    rng = np.random.default_rng(seed)
    q, g = (rng.integers(-levels, levels + 1, (n, d)).astype(np.float32) for n in (num_queries, num_gallery))
    dense = k_reciprocal(q, g, k1, k2, normalize=False, backend=backend)
    largest = np.maximum(squared(q, q).max(1), squared(q, g).max(1))
    if largest.min() > 0:  # the literal code divides by it
        expected = reference.re_ranking(*all_squared(q, g), k1, k2, 0.3)
        np.testing.assert_allclose(dense, expected, atol=1e-5)
    order = np.argsort(dense, axis=1, kind="stable")[:, :topk]
    distances, indices = k_reciprocal(q, g, k1, k2, normalize=False, backend=backend, topk=topk)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(distances, np.take_along_axis(dense, order, 1))


def dense_float64(q, g, k1, k2, weight):
    """The float64 restatement with n x n matrices, for more images than the literal one can take."""
    x = np.concatenate([q, g]).astype(np.float64)
    original = np.array([((x - row) ** 2).sum(1) for row in x])
    original /= original.max(1, keepdims=True)
    order = np.argsort(original, axis=1, kind="stable")

    def mutual(length):
        listed = np.zeros(original.shape, dtype=bool)
        np.put_along_axis(listed, order[:, :length], True, axis=1)
        return (listed & listed.T).astype(np.float64)

    core, half = mutual(k1 + 1), mutual(int(np.around(k1 / 2)) + 1)
    joined = core * (core @ half.T > 2 / 3 * half.sum(1))
    weights = np.where(core + joined @ half > 0, np.exp(-original), 0)
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-300)
    weights = sum(weights[order[:, rank]] for rank in range(k2)) / k2
    shared = np.array([np.minimum(row, weights[len(q) :]).sum(1) for row in weights[: len(q)]])
    return (1 - weight) * (1 - shared / (2 - shared)) + weight * original[: len(q), len(q) :]


def with_copies(rng):
    """Queries and gallery, clustered, with 2, 5, 13 and 200 copies of a row and with pairs 1e-7 apart."""
    x = make("clustered", 1200, 32, rng)
    for copies in (2, 5, 13, 200):
        for _ in range(2):
            rows = rng.choice(len(x), copies, replace=False)
            x[rows] = x[rows[0]]
    close = rng.choice(len(x), (60, 2), replace=False)
    x[close[:, 1]] = x[close[:, 0]] * (1 + 1e-7 * rng.standard_normal((60, 32))).astype(np.float32)
    return x[:300], x[300:]


def test_the_dense_restatement_is_the_literal_one(rng):
    x = make("copies", 60, 8, rng)
    q, g = x[:15], x[15:]
    expected = reference.re_ranking(*all_squared(q, g), 9, 4, 0.3)
    np.testing.assert_allclose(dense_float64(q, g, 9, 4, 0.3), expected, atol=1e-12)


def test_copies_and_near_ties_in_any_blocks(backend, rng):
    q, g = with_copies(rng)
    expected = dense_float64(q, g, 20, 6, 0.3)
    threads = torch.get_num_threads()
    try:
        for max_memory, number in ((None, 1), (3 << 20, 1), (3 << 20, 2)):
            torch.set_num_threads(number)
            found = k_reciprocal(q, g, normalize=False, backend=backend, max_memory=max_memory)
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"{max_memory} {number}")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("length", [1, 4, 14, 250])
def test_lists_begin_with_the_image_itself_and_its_copies_by_index(length, backend, rng):
    x = np.concatenate(with_copies(rng))
    everything = np.arange(len(x))
    expected = [np.lexsort((everything, ((x.astype(np.float64) - row) ** 2).sum(1)))[:length] for row in x]
    found = search(Rows(x, "x"), length, backend, own=True)
    np.testing.assert_array_equal(found, expected)


def test_topk_is_a_stable_sort_of_all_distances(rng):
    q, g = with_copies(rng)
    for topk, max_memory in ((1, None), (50, 3 << 20), (len(g) + 5, None)):
        dense = k_reciprocal(q, g, lambda_value=0.9, max_memory=max_memory)
        order = np.argsort(dense, axis=1, kind="stable")[:, :topk]
        distances, indices = k_reciprocal(q, g, lambda_value=0.9, topk=topk, max_memory=max_memory)
        assert distances.dtype == np.float32
        assert indices.dtype == np.int64
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_array_equal(distances, np.take_along_axis(dense, order, 1))


def test_equal_gallery_rows_are_equally_far(rng, monkeypatch):
    q, g = make("random", 5, 24, rng), make("random", 40, 24, rng)
    g[20:] = g[rng.integers(0, 20, 20)]
    uneven_products(monkeypatch, 1e-6)
    found = k_reciprocal(q, g, lambda_value=1.0)
    firsts = [np.flatnonzero((g[:20] == row).all(1))[0] for row in g[20:]]
    np.testing.assert_array_equal(found[:, 20:], found[:, firsts])


def test_blocks_stay_within_max_memory(rng, monkeypatch):
    q, g = make("random", 200, 4, rng), make("random", 2000, 4, rng)
    sizes = []
    product = torch.addmm

    def counting(*arguments, **options):
        block = product(*arguments, **options)
        sizes.append(4 * block.nbytes)
        return block

    monkeypatch.setattr(torch, "addmm", counting)
    k_reciprocal(q, g, topk=3, max_memory=5 << 20)
    assert 4 << 20 < max(sizes) <= 5 << 20


@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(20, 6, 0.3), (1, 1, 0.5), (5, 1, 0.0), (7, 3, 1.0), (6, 9, 0.2), (200, 80, 0.3)]
)
def test_given_distances_equal_the_literal_encoding(k1, k2, weight, rng):
    centres = rng.standard_normal((8, 10))
    q, g = (centres[rng.integers(0, 8, n)] + 0.7 * rng.standard_normal((n, 10)) for n in (12, 70))
    expected = reference.re_ranking(*all_squared(q, g), k1, k2, weight)
    euclidean = [np.sqrt(matrix) for matrix in all_squared(q, g)]
    np.testing.assert_allclose(re_ranking(*euclidean, k1, k2, weight), expected, atol=1e-5)


def test_given_distances_of_several_blocks(rng):
    x = make("clustered", 2950, 8, rng)
    q, g = x[:1550], x[1550:]
    expected = k_reciprocal(q, g, 6, 3, normalize=False)
    q_g, q_q, g_g = (torch.cdist(*map(torch.from_numpy, pair)).numpy() for pair in ((q, g), (q, q), (g, g)))
    found = re_ranking(q_g, q_q, g_g, 6, 3)
    assert (np.abs(found - expected) > 1e-4).mean() < 1e-3  # float32 distances may order others


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
    for result in k_reciprocal(torch.from_numpy(q), torch.from_numpy(g), 4, 2, topk=3):
        assert isinstance(result, torch.Tensor)
    for result in k_reciprocal(q, g, 4, 2, topk=3):
        assert type(result) is np.ndarray
    np.testing.assert_array_equal(q, before)
    distances = [torch.from_numpy(np.sqrt(matrix)) for matrix in all_squared(q, g)]
    copies = [matrix.clone() for matrix in distances]
    assert isinstance(re_ranking(*distances, 4, 2), torch.Tensor)
    for matrix, copy in zip(distances, copies, strict=True):
        assert torch.equal(matrix, copy)


@pytest.mark.gpu
def test_cuda_equals_cpu(rng):
    q, g = (torch.from_numpy(rng.standard_normal((n, 32))).float() for n in (20, 100))
    expected = k_reciprocal(q, g)
    found = k_reciprocal(q.cuda(), g.cuda())
    assert found.is_cuda
    np.testing.assert_allclose(found.cpu(), expected, atol=1e-5)
    distances, indices = k_reciprocal(q.cuda(), g.cuda(), topk=7)
    assert distances.is_cuda
    assert torch.equal(distances, found.gather(1, indices))
    assert torch.equal(indices, found.sort(dim=1, stable=True).indices[:, :7])


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
        ({"lambda_value": 10**400}, ValueError, r"lambda_value must be in \[0, 1\]"),
        ({"lambda_value": "x"}, TypeError, "lambda_value must be a number"),
        ({"topk": 0}, ValueError, "topk must be at least 1"),
        ({"topk": 2.0}, TypeError, "topk must be an integer"),
        ({"topk": True}, TypeError, "topk must be an integer"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"max_memory": 100}, ValueError, "max_memory must be at least"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        k_reciprocal(**{"qf": ONES, "gf": ONES, **arguments})


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize(
    "scaled",
    [
        lambda matrix: matrix / matrix.max() * 1.5e308,
        lambda matrix: matrix.astype(np.longdouble),
        lambda matrix: np.round(matrix / matrix.max() * 2**63).astype(np.uint64),
        np.matrix,
    ],
    ids=["large", "longdouble", "uint64", "matrix"],
)
def test_distances_of_any_size_and_kind(scaled, rng):
    x = rng.standard_normal((14, 3))
    distances = np.sqrt(squared(x, x))
    distances /= distances.max()
    whole = scaled(distances)
    found = re_ranking(whole[:5, 5:], whole[:5, :5], whole[5:, 5:], 4, 2)
    np.testing.assert_allclose(
        found, re_ranking(distances[:5, 5:], distances[:5, :5], distances[5:, 5:], 4, 2), atol=1e-6
    )
    labels = rng.integers(1, 3, 5), rng.integers(1, 3, 9)
    assert evaluate_rank(whole[:5, 5:], *labels).mAP == evaluate_rank(distances[:5, 5:], *labels).mAP


@pytest.mark.parametrize(
    ("matrices", "error", "message"),
    [
        ((None, ONES, ONES), TypeError, "q_g_dist must be a numpy array"),
        ((np.ones((2, 3)), np.ones((3, 3)), np.ones((3, 3))), ValueError, r"q_q_dist must have shape \(2, 2\)"),
        ((np.ones((2, 3)), np.ones((2, 2)), np.ones((2, 2))), ValueError, r"g_g_dist must have shape \(3, 3\)"),
        ((np.ones((2, 3)), np.ones((2, 2)), np.full((3, 3), np.nan)), ValueError, "g_g_dist must be finite; row 0"),
        ((np.ones(3), ONES, ONES), ValueError, "q_g_dist must have two dimensions"),
        ((-ONES, np.ones((2, 2)), np.ones((3, 3))), ValueError, "q_g_dist must hold distances.*similarities"),
        ((np.ones((0, 3)), np.ones((0, 0)), np.ones((3, 3))), ValueError, "at least one entry"),
    ],
)
def test_bad_distances(matrices, error, message):
    with pytest.raises(error, match=message):
        re_ranking(*matrices)
