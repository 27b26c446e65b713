"""`Centralizer.rerank`: which distances it takes, what it says of them, and that they are those."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from reference import links as literal
from reference import unit
from reference.camera_jaccard import ca_jaccard

from pose2id import Centralizer, evidence, k_reciprocal

FEW = "rerank: plain distances, no cameras. Too few images to tell"
SHUT = "rerank: plain distances, no cameras. Links too close for strangers: "
OPEN = "rerank: k-reciprocal, k1 10, k2 3, no cameras. Links too close for strangers: "


def people(rng, shots=5, n=100, dim=16, count=20):
    """Query, gallery and two cameras of drawn people."""
    centres, who = rng.normal(size=(n // shots, dim)), rng.permutation(np.arange(n) // shots)
    g = centres[who] + 0.4 * rng.normal(size=(n, dim))
    q = centres[who[:count]] + 0.4 * rng.normal(size=(count, dim))
    return q, g, rng.integers(2, size=count), rng.integers(2, size=n)


def squared(q, g):
    """Squared Euclidean distances of the normalised rows."""
    x, y = unit(q), unit(g)
    return ((x[:, None] - y) ** 2).sum(2)


def said(caplog, *args, **options):
    """Distances, and the line that is logged with them."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "pose2id.centralizer"):
        found = Centralizer().rerank(*args, **options)
    (line,) = caplog.messages
    return found, line


class TestBranches:
    def test_people_who_repeat(self, rng, caplog):
        q, g, *_ = people(rng)
        found, line = said(caplog, q, g)
        np.testing.assert_array_equal(found, k_reciprocal(q, g, 10, 3))
        assert line == f"{OPEN[: OPEN.index('Links')]}{evidence(g).numbers}"

    @pytest.mark.parametrize(("n", "start"), [(100, SHUT), (15, FEW), (1, FEW)])
    def test_people_who_appear_once(self, n, start, rng, caplog):
        q, g, *_ = people(rng, 1, n, count=min(n, 5))
        found, line = said(caplog, q, g)
        np.testing.assert_allclose(found, squared(q, g), atol=1e-6)
        assert line.startswith(start)

    @pytest.mark.parametrize("shots", [1, 5])
    def test_force(self, shots, rng, caplog):
        q, g, *_ = people(rng, shots)
        found, line = said(caplog, q, g, force=True)
        np.testing.assert_array_equal(found, k_reciprocal(q, g, 10, 3))
        assert line.startswith(OPEN)

    @pytest.mark.parametrize("shots", [1, 5])
    @pytest.mark.parametrize("force", [False, True])
    def test_cameras(self, shots, force, rng, caplog):
        q, g, qc, gc = people(rng, shots)
        found, line = said(caplog, q, g, query_camids=qc, gallery_camids=gc, force=force)
        joint = literal.joint_features(q, g, qc, gc)
        expected = ca_jaccard(joint, np.concatenate([qc, gc]), len(q), 5, 12, 2, 2, 0.5, fill=False)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert line == "rerank: camera-aware, 2 cameras"

    @pytest.mark.parametrize("shots", [1, 5])
    def test_one_known_camera_is_none(self, shots, rng, caplog):
        q, g, qc, gc = people(rng, shots)
        without, line = said(caplog, q, g)
        for of_query, of_gallery in (
            (qc * 0, gc * 0),
            (None, gc * 0),
            (qc * 0 + 3, None),
            (qc * 0 - 1, gc * 0 + 7),
            (["a"] * 20, ["a", None] * 50),
            ([None] * 20, [-1] * 100),
        ):
            found, same = said(caplog, q, g, query_camids=of_query, gallery_camids=of_gallery)
            np.testing.assert_array_equal(found, without)
            assert same == line

    def test_a_camera_of_the_queries_and_another_of_the_gallery(self, rng, caplog):
        q, g, qc, gc = people(rng)
        found, line = said(caplog, q, g, query_camids=0 * qc, gallery_camids=0 * gc + 1)
        assert line == "rerank: camera-aware, 2 cameras"
        assert np.isfinite(found).all()
        _, line = said(caplog, q, g, gallery_camids=gc)
        assert line == "rerank: camera-aware, 2 cameras"


CASES = {"plain": (1, False, {}), "k-reciprocal": (5, False, {}), "forced": (1, False, {"force": True})}
CASES["cameras"] = (5, True, {})


@pytest.mark.parametrize("case", CASES)
class TestEveryBranch:
    @pytest.fixture
    def drawn(self, case, rng):
        shots, cameras, options = CASES[case]
        q, g, qc, gc = people(rng, shots)
        g[7], g[50], g[60:63] = g[3], g[49], g[59]
        return q, g, options | ({"query_camids": qc, "gallery_camids": gc} if cameras else {})

    @pytest.mark.parametrize("topk", [1, 7, 100, 500])
    def test_the_nearest_are_those_of_all(self, topk, drawn):
        q, g, options = drawn
        dense = Centralizer().rerank(q, g, **options)
        distances, indices = Centralizer().rerank(q, g, **options, topk=topk)
        order = np.argsort(dense, axis=1, kind="stable")[:, :topk]
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_array_equal(distances, np.take_along_axis(dense, order, 1))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_containers(self, dtype, drawn):
        q, g, options = drawn
        x, y = (torch.from_numpy(rows).to(dtype) for rows in (q, g))
        before = x.clone(), y.clone()
        found = Centralizer().rerank(x, y, **options)
        assert found.dtype == torch.float32
        assert found.shape == (20, 100)
        expected = Centralizer().rerank(x.double().numpy(), y.double().numpy(), **options)
        assert type(expected) is np.ndarray
        # Of copies with cameras which is first on a list is chance.
        assert (np.abs(found.numpy() - expected) < 1e-5).mean() > (0.9 if "query_camids" in options else 1 - 1e-9)
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])
        distances, indices = Centralizer().rerank(x, y, **options, topk=3)
        assert (distances.dtype, indices.dtype) == (torch.float32, torch.int64)

    def test_whatever_centralizer(self, drawn):
        q, g, options = drawn
        expected = Centralizer().rerank(q, g, **options)
        for other in (Centralizer(method="nfc"), Centralizer(method="centring"), Centralizer(k1=3, eta=2)):
            np.testing.assert_array_equal(other.rerank(q, g, **options), expected)
        found = Centralizer(max_memory=8 << 20, backend="torch").rerank(q, g, **options)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"topk": 0}, ValueError, "topk must be at least 1"),
        ({"topk": 2.5}, TypeError, "topk must be an integer"),
        ({"force": "yes"}, TypeError, "force must be True or False"),
        ({"query_camids": [1, 2]}, ValueError, r"query_camids must have shape \(20,\)"),
        ({"gallery_camids": [1.5] * 100}, TypeError, "gallery_camids must hold integers"),
    ],
)
def test_bad_input(options, error, message, rng):
    q, g, *_ = people(rng)
    with pytest.raises(error, match=message):
        Centralizer().rerank(q, g, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_cuda_equals_cpu(case, rng):
    shots, cameras, options = CASES[case]
    q, g, qc, gc = people(rng, shots)
    options = options | ({"query_camids": qc, "gallery_camids": gc} if cameras else {})
    x, y = (torch.from_numpy(rows).cuda() for rows in (q, g))
    found = Centralizer().rerank(x, y, **options)
    assert found.is_cuda
    np.testing.assert_allclose(found.cpu().numpy(), Centralizer().rerank(q, g, **options), atol=1e-5)
    distances, indices = Centralizer().rerank(x, y, **options, topk=7)
    assert torch.equal(indices, found.sort(dim=1, stable=True).indices[:, :7])
    assert torch.equal(distances, found.gather(1, indices))
