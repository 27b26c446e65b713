"""`k_reciprocal` with camera ids: CA-Jaccard."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from conftest import SHARED, _there
from hypothesis import given
from hypothesis import strategies as st
from reference.camera_jaccard import ca_jaccard

from pose2id import evaluate_rank, k_reciprocal

PUBLISHED = {"k1_within": 5, "k1_across": 20, "k2_within": 3, "k2_across": 3, "lambda_value": 0.3}
DEFAULTS = {"k1_within": 5, "k1_across": 12, "k2_within": 2, "k2_across": 2, "lambda_value": 0.5}


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def restated(x, cameras, queries, options, *, fill=False):
    options = DEFAULTS | options
    return ca_jaccard(x, cameras, queries, *(options[name] for name in DEFAULTS), fill=fill)


def reranked(x, cameras, queries, options, **others):
    sides = {"q_camids": cameras[:queries], "g_camids": cameras[queries:]}
    return k_reciprocal(x[:queries], x[queries:], **sides, **options, **others)


def people(rng, n=150, d=12, cameras=3):
    """Clustered features and cameras that move them."""
    camera = rng.integers(0, cameras, n)
    x = rng.standard_normal((n // 6 + 1, d))[rng.integers(0, n // 6 + 1, n)] + 0.5 * rng.standard_normal((n, d))
    return (x + rng.standard_normal((cameras, d))[camera]).astype(np.float32), camera


@pytest.mark.parametrize("options", [PUBLISHED, {}, {"k1_within": 1, "k1_across": 1, "k2_within": 1, "k2_across": 0}])
@pytest.mark.parametrize("cameras", [2, 4])
def test_equals_the_published_code(cameras, options, rng):
    x, camera = people(rng, cameras=cameras)
    assert np.bincount(camera).min() > 20  # so that no list is filled up
    expected = restated(unit(x), camera, 30, options, fill=True)
    np.testing.assert_allclose(reranked(x, camera, 30, options), expected, atol=1e-5)


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 30),
    d=st.integers(1, 4),
    cameras=st.integers(1, 8),
    levels=st.integers(1, 3),
    lengths=st.tuples(st.integers(1, 8), st.integers(1, 25), st.integers(1, 4), st.integers(0, 4)),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    topk=st.integers(1, 25),
)
def test_any_small_set_with_ties(seed, n, d, cameras, levels, lengths, weight, topk):
    """Copies, near ties, cameras with one image, one camera only."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-levels, levels + 1, (n, d)).astype(np.float32)
    camera, queries = rng.integers(0, cameras, n), int(rng.integers(1, n))
    options = dict(zip(DEFAULTS, (*lengths, weight), strict=True))
    dense = reranked(x, camera, queries, options, normalize=False)
    if all((x != row).any() for row in x):  # the literal code divides by the largest distance
        expected = restated(x, camera, queries, options)
        np.testing.assert_allclose(dense, expected, atol=1e-5)
    distances, indices = reranked(x, camera, queries, options, normalize=False, topk=topk)
    order = np.argsort(dense, axis=1, kind="stable")[:, :topk]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(distances, np.take_along_axis(dense, order, 1))


@pytest.fixture(scope="module")
def methods():
    """The reference of the methods, which is not part of the project."""
    path = _there(SHARED / "design" / "methods_reference.py")
    spec = importlib.util.spec_from_file_location("methods_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cameras", [1, 2, 9, 60])
def test_equals_the_reference_of_the_methods(cameras, methods, rng):
    x, camera = people(rng, 120, cameras=cameras)
    expected = methods.ca_jaccard(methods.unit(x), camera, 25)
    np.testing.assert_allclose(reranked(x, camera, 25, {}), expected, atol=1e-5)


# mAP and Rank-1 in percent with the published parameters, by an independent implementation.
EXPECTED = {"osnet_msmt17": (50.3, 49.2), "osnet_lda256": (70.7, 68.8), "osnet_market1501": (23.7, 24.1)}


@pytest.mark.parametrize("model", EXPECTED)
def test_real_features(model, real_features):
    data = real_features("val100")
    is_query = data["is_query"].astype(bool)
    q, g = data[f"feat_{model}"][is_query], data[f"feat_{model}"][~is_query]
    labels = [data[key][mask] for key in ("pids", "camids") for mask in (is_query, ~is_query)]
    result = evaluate_rank(k_reciprocal(q, g, q_camids=labels[2], g_camids=labels[3], **PUBLISHED), *labels)
    np.testing.assert_allclose((100 * result.mAP, 100 * result.rank(1)), EXPECTED[model], atol=0.1)


def test_names_of_cameras_do_not_matter(rng):
    x, camera = people(rng, cameras=5)
    expected = reranked(x, camera, 30, {})
    names = np.array(["entrance", "c07", "-1", "0", "c7"])[camera]
    for renamed in (camera - 1, 10**17 * camera, camera.astype(np.float16), names, names.astype(object), list(names)):
        np.testing.assert_array_equal(reranked(x, renamed, 30, {}), expected)
    np.testing.assert_array_equal(reranked(x, torch.from_numpy(camera).byte(), 30, {}), expected)


def test_order_of_the_gallery(rng):
    x, camera = people(rng)
    order = np.concatenate([np.arange(30), 30 + rng.permutation(len(x) - 30)])
    found = reranked(x[order], camera[order], 30, {})
    np.testing.assert_allclose(found, reranked(x, camera, 30, {})[:, order[30:] - 30], atol=1e-6)


def test_cameras_matter_and_lengths_do_too(rng):
    x, camera = people(rng)
    found = [reranked(x, camera, 30, options) for options in [{name: 4} for name in list(DEFAULTS)[:4]] + [{}]]
    found += [reranked(x, camera * 0, 30, {}), k_reciprocal(x[:30], x[30:])]
    for place, one in enumerate(found):
        assert all(np.abs(one - other).max() > 0.01 for other in found[:place])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_containers_and_blocks(dtype, rng):
    x, camera = people(rng)
    x = torch.from_numpy(x).to(dtype)
    before = x.clone()
    expected = reranked(x.double().numpy(), camera, 30, {})
    found = reranked(x, camera, 30, {})
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    distances, indices = reranked(x, camera, 30, {}, topk=9, max_memory=1 << 20, backend="torch")
    np.testing.assert_array_equal(indices, np.argsort(found.numpy(), axis=1, kind="stable")[:, :9])
    np.testing.assert_allclose(distances, found.gather(1, indices), atol=1e-6)
    assert torch.equal(x, before)
    if dtype != torch.bfloat16:
        again = reranked(x.numpy(), camera, 30, {})
        assert type(again) is np.ndarray
        np.testing.assert_array_equal(again, found)


@pytest.mark.gpu
@pytest.mark.parametrize("cameras", [1, 3, 80])
def test_cuda_equals_cpu(cameras, rng):
    x, camera = people(rng, cameras=cameras)
    x = torch.from_numpy(x)
    found = reranked(x.cuda(), torch.from_numpy(camera).cuda(), 30, {})
    assert found.is_cuda
    np.testing.assert_allclose(found.cpu(), reranked(x, camera, 30, {}), atol=1e-5)
    distances, indices = reranked(x.cuda(), camera, 30, {}, topk=7)
    assert torch.equal(distances, found.gather(1, indices))
    assert torch.equal(indices, found.sort(dim=1, stable=True).indices[:, :7])


CAMERAS = {"q_camids": [1, 2], "g_camids": [1, 2]}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q_camids": [1, 2]}, ValueError, "q_camids and g_camids must be given together"),
        (CAMERAS | {"g_camids": [1]}, ValueError, r"g_camids must have shape \(2,\)"),
        (CAMERAS | {"g_camids": ["a", "b"]}, TypeError, "g_camids must hold integers, as q_camids does"),
        (CAMERAS | {"q_camids": [1.5, 2]}, TypeError, "q_camids must hold integers"),
        (CAMERAS | {"k1": 20}, ValueError, "k1 and k2 must be None with cameras.*k1_within"),
        (CAMERAS | {"k2": 6}, ValueError, "k1 and k2 must be None with cameras.*k2_across"),
        ({"k1_across": 20}, ValueError, "q_camids and g_camids must be given with k1_within, .*set k1 and k2"),
        (CAMERAS | {"k1_within": 0}, ValueError, "k1_within must be at least 1"),
        (CAMERAS | {"k1_across": 2.0}, TypeError, "k1_across must be an integer"),
        (CAMERAS | {"k2_within": 0}, ValueError, "k2_within must be at least 1"),
        (CAMERAS | {"k2_across": -1}, ValueError, "k2_across must be at least 0"),
        (CAMERAS | {"backend": "faiss"}, ValueError, "backend must be one of 'auto', 'torch'"),
        (CAMERAS | {"max_memory": 100}, ValueError, "max_memory must be at least"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        k_reciprocal(**{"qf": np.ones((2, 3)), "gf": np.ones((2, 3)), **arguments})
