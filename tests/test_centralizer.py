from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from pose2id import Centralizer, centralization, fuse, neighbors, nfc


def test_sets_are_centralized_apart(rng, backend):
    q, g = rng.standard_normal((20, 6)), rng.standard_normal((50, 6))
    before = q.copy(), g.copy()
    new_q, new_g = Centralizer(k1=3, k2=2, backend=backend).enhance(q, g)
    np.testing.assert_allclose(new_q, reference.nfc(q, 3, 2), atol=1e-12)
    np.testing.assert_allclose(new_g, reference.nfc(g, 3, 2), atol=1e-12)
    np.testing.assert_array_equal(q, before[0])
    np.testing.assert_array_equal(g, before[1])
    np.testing.assert_allclose(np.linalg.norm(new_g, axis=1), 1)


def test_jointly_means_in_the_union(rng):
    q, g = rng.standard_normal((20, 6)), rng.standard_normal((50, 6))
    new_q, new_g = Centralizer().enhance(q, g, joint=True)
    both = reference.nfc(np.concatenate([q, g]), 2, 2)
    np.testing.assert_allclose(np.concatenate([new_q, new_g]), both, atol=1e-12)
    assert np.abs(new_q - Centralizer().enhance(q, g)[0]).max() > 0.1


@pytest.mark.parametrize("joint", [True, False])
def test_each_set_comes_back_in_its_container(joint, rng):
    q = torch.from_numpy(rng.standard_normal((20, 6))).half()
    g = rng.standard_normal((50, 6)).astype(np.float64)
    new_q, new_g = Centralizer().enhance(q, g, joint=joint)
    assert isinstance(new_q, torch.Tensor)
    assert new_q.dtype == torch.float16
    assert type(new_g) is np.ndarray
    assert new_g.dtype == np.float64


def test_settings_reach_the_search(monkeypatch, rng):
    seen = []
    search = neighbors.search
    monkeypatch.setattr(centralization, "search", lambda *arguments: seen.append(arguments[1:]) or search(*arguments))
    q, g = rng.standard_normal((9, 3)), rng.standard_normal((9, 3))
    for joint in (True, False):
        Centralizer(k1=3, backend="torch", max_memory=1 << 21).enhance(q, g, joint=joint)
    assert seen == [(3, "torch", 1 << 21)] * 3


def test_fuse_has_the_centralizers_eta(rng):
    f, g = rng.standard_normal((5, 4)), rng.standard_normal((5, 2, 4))
    centralizer = Centralizer(eta=0.25)
    np.testing.assert_array_equal(centralizer.fuse(f, g), fuse(f, g, 0.25))
    np.testing.assert_array_equal(centralizer.fuse(f, g, eta=2), fuse(f, g, 2))


def test_extract_needs_an_extractor():
    with pytest.raises(ValueError, match="extractor must be given"):
        Centralizer().extract([1])


ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("q", "g", "error", "message"),
    [
        (None, ONES, TypeError, "query_feats must be a numpy array"),
        (ONES, "x", TypeError, "gallery_feats must be a numpy array"),
        (np.ones(3), ONES, ValueError, r"query_feats must have shape \(N, D\)"),
        (ONES, np.ones((2, 4)), ValueError, "query_feats and gallery_feats must have the same number of columns"),
        (np.ones((0, 3)), ONES, ValueError, "query_feats must hold at least one row"),
        (ONES, np.ones((0, 3)), ValueError, "gallery_feats must hold at least one row"),
        (ONES, np.array([[1, np.nan, 3]]), ValueError, "gallery_feats must be finite.*row 0"),
    ],
)
def test_bad_features(q, g, error, message):
    with pytest.raises(error, match=message):
        Centralizer().enhance(q, g)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k1": 0}, ValueError, "k1 must be at least 1"),
        ({"k2": "2"}, TypeError, "k2 must be an integer"),
        ({"eta": -1}, ValueError, "eta must be in"),
        ({"extractor": 3}, TypeError, "extractor must be callable"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"backend": "annoy"}, ValueError, "backend must be one of"),
        ({"inputs": "paths"}, ValueError, "inputs must be one of"),
        ({"max_memory": 5}, ValueError, "max_memory must be at least"),
        ({"transform": "resnet"}, ValueError, "transform must be one of"),
        ({"transform": 3}, TypeError, "transform must be callable"),
        ({"transform": "pmt", "inputs": "images"}, ValueError, "transform must be None"),
        ({"device": "gpu"}, ValueError, "device must be a torch device"),
    ],
)
def test_bad_parameters_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        Centralizer(**arguments)


def test_repr_names_what_matters():
    assert repr(Centralizer(k1=3)) == "Centralizer(k1=3, k2=2, eta=2, backend='auto')"
    assert repr(Centralizer(nfc)).startswith("Centralizer(function, ")
