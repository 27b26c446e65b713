from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import propagation as literal
from reference import unit

import pose2id
from pose2id import graph_propagation

SETTINGS = [
    {},
    {"rounds": 1},
    {"k": 2, "k_across": 9, "rounds": 2},
    {"k": 500, "k_across": 500, "beta": 1},
    {"alpha": 0, "k_across": 2},
    {"alpha": 1, "k": 2},
    {"alpha": 0.3, "beta": 0.05, "k": 15, "k_across": 3},
]


def people(rng, q=20, g=60, cameras=3, d=12):
    """Clustered rows of different lengths, and their cameras."""
    centres = rng.standard_normal((8, d))
    x = centres[rng.integers(0, 8, q + g)] + 0.5 * rng.standard_normal((q + g, d))
    x *= rng.uniform(0.5, 4, (q + g, 1))
    camids = rng.integers(0, cameras, q + g)
    return x[:q], x[q:], camids[:q], camids[q:]


def close(found, expected, atol=1e-12):
    for mine, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float64), wanted, atol=atol, rtol=0)


class TestEqualsTheDenseMatrices:
    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_with_cameras(self, settings, dtype, rng):
        q, g, qc, gc = people(rng)
        q, g = q.astype(dtype), g.astype(dtype)
        found = graph_propagation(q, g, qc, gc, **settings)
        close(found, literal.graph_propagation(q, g, qc, gc, **settings), 1e-11 if dtype is np.float64 else 1e-5)

    @pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[-1]], ids=str)
    def test_without(self, settings, rng):
        q, g, *_ = people(rng)
        close(graph_propagation(q, g, **settings), literal.graph_propagation(q, g, **settings), 1e-11)

    @given(
        seed=st.integers(0, 2**32 - 1),
        n=st.integers(1, 25),
        d=st.integers(1, 6),
        cameras=st.integers(1, 12),
        k=st.integers(2, 30),
        k_across=st.integers(2, 30),
    )
    def test_copies_zero_rows_and_tiny_cameras(self, seed, n, d, cameras, k, k_across):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((n, d))[rng.integers(0, n, n)]
        x[rng.random(n) < 0.2] = 0
        q = np.concatenate([x[: n // 2], rng.standard_normal((3, d))])
        qc, gc = rng.integers(0, cameras, len(q)), rng.integers(0, cameras, n)
        options = {"k": k, "k_across": k_across, "rounds": 1}
        found = graph_propagation(q, x, qc, gc, **options)
        close(found, literal.graph_propagation(q, x, qc, gc, **options), 1e-9)
        assert not found[1][~x.any(1)].any()


def test_a_case_by_hand():
    """Two rows at a right angle, and one between them."""
    q, g = np.array([[2.0, 0.0]]), np.array([[0.0, 3.0], [1.0, 1.0]])
    near, both = np.exp((0.5**0.5 - 1) / 0.2), 0.5**0.5
    # Each lists the row between them, which lists the first of two equally near.
    rows, columns = [1 + near, 1 + near, 1 + near], [1 + near, 1, 1 + 2 * near]
    first = np.array([1, 0]) / rows[0] + near * np.array([both, both]) / (rows[0] * columns[2]) ** 0.5
    second = np.array([0, 1]) / rows[1] ** 0.5 + near * np.array([both, both]) / (rows[1] * columns[2]) ** 0.5
    found = graph_propagation(q, g, k=2, rounds=1)
    close([*found[0], found[1][0]], unit([first, second]))


def test_one_camera_has_nobody_across(rng):
    q, g, qc, gc = people(rng, cameras=1)
    x, mean = (np.concatenate(x) for x in ((unit(q), unit(g)), graph_propagation(q, g, k=2, rounds=1, alpha=0)))
    half = np.concatenate(graph_propagation(q, g, qc, gc, k=2, rounds=1))
    assert (np.abs(half - mean).max(1) > 1e-3).any()
    close(graph_propagation(q, g, qc, gc, alpha=1), (unit(q), unit(g)))
    assert (half @ half.T).diagonal() == pytest.approx(1)
    assert ((half * x).sum(1) >= (mean * x).sum(1) - 1e-12).all()


def test_order_of_rows_and_names_of_cameras_do_not_matter(rng):
    q, g, qc, gc = people(rng)
    expected = graph_propagation(q, g, qc, gc)
    order, back = rng.permutation(len(g)), rng.permutation(len(q))
    names = np.array(["north", "7", "c 2"])
    found = graph_propagation(q[back], g[order], names[qc[back]], names[gc[order]])
    close(found, (expected[0][back], expected[1][order]))
    close(graph_propagation(q, g, (10.0 * qc).tolist(), torch.from_numpy(10 * gc)), expected, 0)


def test_blocks_change_nothing(rng):
    """Rows so wide, and memory so small, that 13 rows make a block."""
    q, g, qc, gc = people(rng, 12, 40, d=1200)
    found = graph_propagation(q, g, qc, gc, rounds=2, backend="torch", max_memory=1 << 20)
    close(found, literal.graph_propagation(q, g, qc, gc, rounds=2))


class TestContainers:
    @pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
    def test_numpy(self, kind, rng):
        q, g, qc, gc = people(rng)
        q, g = q.astype(kind), g.astype(kind)
        copies = q.copy(), g.copy()
        q.flags.writeable = g.flags.writeable = False
        found = graph_propagation(q, g, qc, gc)
        assert [x.dtype for x in found] == [np.dtype(kind)] * 2
        expected = graph_propagation(*(x.astype(np.float64) for x in copies), qc, gc)
        close(found, expected, 1e-3 if kind is np.float16 else 1e-5)
        close((q, g), copies, 0)

    @pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_torch(self, kind, rng):
        q, g, qc, gc = people(rng)
        q, g = (torch.from_numpy(x).to(kind).requires_grad_() for x in (q, g))
        copies = q.detach().clone(), g.detach().clone()
        found = graph_propagation(q, g, qc, gc)
        assert [(x.dtype, x.requires_grad) for x in found] == [(kind, False)] * 2
        expected = graph_propagation(*(x.double().numpy() for x in copies), qc, gc)
        close([x.double() for x in found], expected, {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(kind, 1e-5))
        assert torch.equal(q, copies[0])
        assert torch.equal(g, copies[1])

    def test_each_set_keeps_its_own_and_files_are_read(self, tmp_path, rng):
        q, g, qc, gc = people(rng)
        q, g = torch.from_numpy(q).half(), g.astype(np.float32)
        np.save(tmp_path / "g.npy", g)
        expected = graph_propagation(q, g, qc, gc)
        for same in (np.load(tmp_path / "g.npy", mmap_mode="r"), np.asfortranarray(g), np.repeat(g, 2, 0)[::2]):
            found = graph_propagation(q, same, qc, gc)
            assert torch.equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])
            assert type(found[1]) is np.ndarray

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_cuda_equals_cpu(self, dtype, rng):
        q, g, qc, gc = people(rng, 50, 300, cameras=5, d=64)
        q, g = (torch.from_numpy(x).to(dtype) for x in (q, g))
        for cameras in ((), (qc, gc), (torch.from_numpy(qc).cuda(), torch.from_numpy(gc).cuda())):
            found = graph_propagation(q.cuda(), g.cuda(), *cameras)
            assert all(x.is_cuda and x.dtype == dtype for x in found)
            on_cpu = graph_propagation(q, g, *(torch.as_tensor(c).cpu() for c in cameras))
            close([x.cpu() for x in found], [x.double() for x in on_cpu], 1e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query_feats": None}, TypeError, "query_feats must be a numpy array"),
        ({"query_feats": np.ones((0, 3))}, ValueError, "query_feats must hold at least one row"),
        ({"gallery_feats": np.array([[1, np.inf, 3]])}, ValueError, "gallery_feats must be finite.*row 0"),
        ({"gallery_feats": np.ones((4, 2))}, ValueError, "same number of columns"),
        ({"query_camids": [1, 2, 3, 4]}, ValueError, "query_camids and gallery_camids must be given together"),
        ({"gallery_camids": [1, 2, 3, 4]}, ValueError, "query_camids and gallery_camids must be given together"),
        ({"query_camids": [1, 2], "gallery_camids": [1] * 4}, ValueError, r"query_camids must have shape \(4,\)"),
        ({"query_camids": ["a"] * 4, "gallery_camids": [1] * 4}, TypeError, "query_camids must hold integers"),
        ({"k": 1}, ValueError, "k must be at least 2"),
        ({"k_across": 2.0}, TypeError, "k_across must be an integer"),
        ({"rounds": 0}, ValueError, "rounds must be at least 1"),
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\]"),
        ({"beta": 0}, ValueError, r"beta must be in \[1e-06,"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"max_memory": 5}, ValueError, "max_memory must be at least"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        graph_propagation(**{"query_feats": np.ones((4, 3)), "gallery_feats": np.ones((4, 3)), **arguments})


def test_figures_on_real_features(real_features):
    """mAP and Rank-1 of features whose cameras were centred, as the published code with the same parameters gives."""
    data = real_features("val100")
    is_query, camids = data["is_query"].astype(bool), data["camids"]
    x = unit(data["feat_osnet_msmt17"]).astype(np.float32)
    for camera in np.unique(camids):
        x[camids == camera] -= x[camids == camera].mean(0)
    sides = [x[is_query], x[~is_query]]
    labels = [data[key][mask] for key in ("pids", "camids") for mask in (is_query, ~is_query)]
    result = pose2id.evaluate(*graph_propagation(*sides, *labels[2:]), *labels)
    np.testing.assert_allclose((100 * result.mAP, 100 * result.rank(1)), (58.7, 57.3), atol=0.06)
