from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import expansion as literal
from reference import unit

import pose2id
from pose2id import aqe, database_augmentation, query_expansion
from pose2id.neighbors.distance import nearest_columns

# qe_k, alpha, qe_times
SETTINGS = [(5, 3.0, 1), (5, 0.0, 1), (1, 3.0, 2), (2, 0.5, 3), (8, 3.0, 2), (500, 2.0, 1)]


def people(rng, *sizes, identities=8, d=12):
    """Clustered sets of one model: rows of different lengths."""
    centres = rng.standard_normal((identities, d))
    sets = [centres[rng.integers(0, identities, n)] + 0.5 * rng.standard_normal((n, d)) for n in sizes]
    return [x * rng.uniform(0.5, 4, (len(x), 1)) for x in sets]


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=atol, rtol=0)


class TestEqualsTheLiteralLoops:
    @pytest.mark.parametrize(("qe_k", "alpha", "qe_times"), SETTINGS)
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_query_expansion(self, qe_k, alpha, qe_times, dtype, rng):
        q, g = (x.astype(dtype) for x in people(rng, 30, 90))
        found = query_expansion(q, g, qe_k=qe_k, alpha=alpha, qe_times=qe_times)
        close(found, literal.query_expansion(q, g, qe_k, alpha, qe_times), 1e-12 if dtype is np.float64 else 1e-6)

    @pytest.mark.parametrize(("qe_k", "alpha", "qe_times"), SETTINGS)
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_database_augmentation(self, qe_k, alpha, qe_times, dtype, rng):
        (g,) = (x.astype(dtype) for x in people(rng, 90))
        found = database_augmentation(g, qe_k=qe_k, alpha=alpha, qe_times=qe_times)
        close(found, literal.database_augmentation(g, qe_k, alpha, qe_times), 1e-12 if dtype is np.float64 else 1e-6)

    @pytest.mark.parametrize(("qe_k", "alpha", "qe_times"), SETTINGS)
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_aqe(self, qe_k, alpha, qe_times, dtype, rng):
        q, g = (x.astype(dtype) for x in people(rng, 30, 90))
        found = aqe(q, g, qe_times, qe_k, alpha)
        for mine, expected in zip(found, literal.aqe(q, g, qe_times, qe_k, alpha), strict=True):
            close(mine, expected, 1e-11 if dtype is np.float64 else 1e-4)

    @given(
        seed=st.integers(0, 2**32 - 1),
        n=st.integers(1, 25),
        d=st.integers(1, 6),
        qe_k=st.integers(1, 30),
        alpha=st.sampled_from([0, 0.5, 1, 3]),
        qe_times=st.integers(1, 2),
    )
    def test_any_small_sets_with_copies_and_zero_rows(self, seed, n, d, qe_k, alpha, qe_times):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((n, d))[rng.integers(0, n, n)]
        x[rng.random(n) < 0.2] = 0
        q = np.concatenate([x[: n // 2], rng.standard_normal((3, d))])
        for mine, expected in zip(aqe(q, x, 1, qe_k, alpha), literal.aqe(q, x, 1, qe_k, alpha), strict=True):
            close(mine, expected, 1e-9)
        options = {"qe_k": qe_k, "alpha": alpha, "qe_times": qe_times}
        close(query_expansion(q, x, **options), literal.query_expansion(q, x, **options), 1e-9)
        close(database_augmentation(x, **options), literal.database_augmentation(x, **options), 1e-9)


def test_a_case_by_hand():
    q = np.array([[2.0, 0.0]])
    g = np.array([[3.0, 3.0], [0.0, 5.0], [-1.0, 0.0]])
    close(query_expansion(q, g, qe_k=2, alpha=2.0), unit([[1 + 0.5 * 0.5**0.5, 0.5 * 0.5**0.5]]))
    close(aqe(q, g, 1, 2, 2.0)[0], [[(2 + 0.5 * 3) / 2, 0.5 * 3 / 2]])
    close(aqe(q, g, 1, 2, 0)[0], [[(2 + 3) / 2, 3 / 2]])
    # The nearest of (-1, 0) is (0, 5), at a right angle.
    close(database_augmentation(g, qe_k=2, alpha=0)[2], [-1, 0])


def test_only_the_queries_own_neighbours_count(rng):
    q, g = people(rng, 20, 60)
    whole = query_expansion(q, g)
    for i in range(20):
        close(query_expansion(q[i : i + 1], g), whole[i : i + 1])
    union = aqe(q, g)[0]
    assert any(np.abs(aqe(q[i : i + 1], g)[0] - union[i]).max() > 0.01 for i in range(20))


def test_one_feature_in_the_mean_is_the_feature(rng):
    q, g = (x.astype(np.float32) for x in people(rng, 5, 9))
    np.testing.assert_array_equal(aqe(q, g, qe_k=1)[1], g)
    close(query_expansion(q, g, qe_k=1), unit(q), 1e-7)
    close(database_augmentation(g, qe_k=1), unit(g), 1e-7)
    close(database_augmentation(g[:1]), unit(g[:1]), 1e-7)
    assert database_augmentation(g[:0]).shape == (0, 12)


@pytest.mark.parametrize("alpha", [0, 0.5, 2, 3])
def test_features_that_point_away_weigh_nothing(alpha):
    q, g = np.array([[1.0, 0.0]]), np.array([[-1.0, 0.5], [-1.0, 0.0]])
    close(query_expansion(q, g, alpha=alpha), q)
    close(aqe(q, g, alpha=alpha)[0], q / 3)


@pytest.mark.parametrize("alpha", [0, 3.0])
def test_zero_rows_stay_zero(alpha):
    g = np.array([[0.0, 0.0], [1.0, 0.0], [0.9, 0.1], [0.0, 0.0]])
    for found in (query_expansion(g, g, alpha=alpha), database_augmentation(g, alpha=alpha), *aqe(g, g, alpha=alpha)):
        close(found[[0, 3]], np.zeros((2, 2)))
        assert (np.abs(found[[1, 2]]).max(1) > 0.2).all()


def test_a_large_alpha_leaves_only_copies(rng):
    (g,) = people(rng, 40)
    g[7] = 3 * g[3]
    found = database_augmentation(g.astype(np.float32), alpha=1e6)
    close(found, unit(g), 1e-6)


class TestNearestColumns:
    @given(
        seed=st.integers(0, 2**32 - 1),
        columns=st.integers(1, 60),
        levels=st.integers(1, 20),
        share=st.floats(0, 1),
    )
    def test_ties_go_to_the_lower_column(self, seed, columns, levels, share):
        distances = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (9, columns))).float()
        count = 1 + int(share * (columns - 1))
        expected = distances.argsort(dim=1, stable=True)[:, :count]
        assert torch.equal(nearest_columns(distances, count), expected)

    def test_distances_stay(self, rng):
        distances = torch.from_numpy(rng.standard_normal((4, 30)))
        before = distances.clone()
        nearest_columns(distances, 3)
        assert torch.equal(distances, before)


def test_blocks_change_nothing(rng):
    """Rows so wide that 64 queries, or 31 rows, make a block."""
    q, g = people(rng, 66, 40, d=16_400)
    g[::7] = g[0]
    close(query_expansion(q, g), literal.query_expansion(q, g, 5, 3.0, 1))
    augmented, both = literal.database_augmentation(g, 5, 3.0, 1), literal.aqe(q, g, 1, 5, 3.0)
    for options in ({}, {"backend": "torch", "max_memory": 1 << 21}):
        close(database_augmentation(g, **options), augmented)
        for found, expected in zip(aqe(q, g, **options), both, strict=True):
            close(found, expected, 1e-11)


def test_no_matrix_of_all_pairs(monkeypatch, rng):
    """300 queries reach the gallery 64 at a time, and only their own distances are held."""
    q, g = people(rng, 300, 33_000, d=4)
    shapes = []
    product = torch.addmm

    def recording(*arguments, **options):
        distances = product(*arguments, **options)
        shapes.append(tuple(distances.shape))
        return distances

    monkeypatch.setattr(torch, "addmm", recording)
    query_expansion(q, g)
    assert shapes == [(64, 33_000)] * 4 + [(44, 33_000)]


CALLS = {
    "query_expansion": lambda q, g: (query_expansion(q, g),),
    "database_augmentation": lambda _, g: (database_augmentation(g, qe_times=2),),
    "aqe": aqe,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
class TestContainers:
    @pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
    def test_numpy(self, call, kind, rng):
        q, g = (x.astype(kind) for x in people(rng, 10, 30))
        copies = q.copy(), g.copy()
        q.flags.writeable = g.flags.writeable = False
        expected = call(*(x.astype(np.float64) for x in copies))
        for found, wanted in zip(call(q, g), expected, strict=True):
            assert type(found) is np.ndarray
            assert found.dtype == np.dtype(kind)
            close(found, wanted, 4e-3 if kind is np.float16 else 1e-5)
        np.testing.assert_array_equal(q, copies[0])
        np.testing.assert_array_equal(g, copies[1])

    @pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_torch(self, call, kind, rng):
        q, g = (torch.from_numpy(x).to(kind).requires_grad_() for x in people(rng, 10, 30))
        copies = q.detach().clone(), g.detach().clone()
        expected = call(*(x.double().numpy() for x in copies))
        for found, wanted in zip(call(q, g), expected, strict=True):
            assert isinstance(found, torch.Tensor)
            assert found.dtype == kind
            assert not found.requires_grad
            close(found.double(), wanted, {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(kind, 1e-5))
        assert torch.equal(q, copies[0])
        assert torch.equal(g, copies[1])

    def test_layouts_and_files(self, call, tmp_path, rng):
        q, g = (x.astype(np.float32) for x in people(rng, 10, 30))
        expected = call(q, g)
        np.save(tmp_path / "g.npy", g)
        mapped = np.load(tmp_path / "g.npy", mmap_mode="r")
        for q2, g2 in ((np.asfortranarray(q), mapped), (np.repeat(q, 2, 0)[::2], np.asfortranarray(g))):
            for found, wanted in zip(call(q2, g2), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)

    @pytest.mark.gpu
    def test_cuda_equals_cpu(self, call, rng):
        q, g = (torch.from_numpy(x).float() for x in people(rng, 50, 300, d=64))
        for found, expected in zip(call(q.cuda(), g.cuda()), call(q, g), strict=True):
            assert found.is_cuda
            close(found.cpu(), expected, 1e-4)


def test_each_set_keeps_its_container(rng):
    q, g = people(rng, 4, 9)
    new_q, new_g = aqe(torch.from_numpy(q).half(), g)
    assert new_q.dtype == torch.float16
    assert new_g.dtype == np.float64


ONES = np.ones((4, 3))
BAD = [
    ({"query_feats": None}, TypeError, "query_feats must be a numpy array"),
    ({"query_feats": np.ones(3)}, ValueError, r"query_feats must have shape \(N, D\)"),
    ({"query_feats": np.ones((0, 3))}, ValueError, "query_feats must hold at least one row"),
    ({"query_feats": np.array([[1, np.inf, 3]])}, ValueError, "query_feats must be finite.*row 0"),
    ({"gallery_feats": [[1.0]]}, TypeError, "gallery_feats must be a numpy array"),
    ({"gallery_feats": np.ones((4, 3), int)}, TypeError, "gallery_feats must be dense"),
    ({"gallery_feats": np.ones((4, 2))}, ValueError, "same number of columns"),
    ({"gallery_feats": np.ones((0, 3))}, ValueError, "gallery_feats must hold at least one row"),
    ({"qe_k": 0}, ValueError, "qe_k must be at least 1"),
    ({"qe_k": 2.0}, TypeError, "qe_k must be an integer"),
    ({"qe_times": 0}, ValueError, "qe_times must be at least 1"),
    ({"qe_times": True}, TypeError, "qe_times must be an integer"),
    ({"alpha": -1}, ValueError, r"alpha must be in \[0,"),
    ({"alpha": float("nan")}, ValueError, r"alpha must be in \[0,"),
    ({"alpha": "3"}, TypeError, "alpha must be a number"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
@pytest.mark.parametrize("function", [query_expansion, aqe])
def test_bad_input(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**{"query_feats": ONES, "gallery_feats": ONES, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *(case for case in BAD if not {"query_feats", "gallery_feats"} & set(case[0])),
        ({"gallery_feats": "features"}, TypeError, "gallery_feats must be a numpy array"),
        ({"gallery_feats": np.array([[1, np.nan]])}, ValueError, "gallery_feats must be finite.*row 0"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"max_memory": 5}, ValueError, "max_memory must be at least"),
    ],
)
def test_bad_input_of_database_augmentation(arguments, error, message):
    with pytest.raises(error, match=message):
        database_augmentation(**{"gallery_feats": ONES, **arguments})


def test_figures_on_real_features(real_features):
    """The table of docs/index.md."""
    data = real_features("val100")
    is_query = data["is_query"].astype(bool)
    features = data["feat_osnet_msmt17"].astype(np.float32)
    q, g = features[is_query], features[~is_query]
    labels = [data[key][mask] for key in ("pids", "camids") for mask in (is_query, ~is_query)]
    augmented = database_augmentation(g)
    new_q, new_g = pose2id.Centralizer(method="nfc").enhance(q, g)
    pairs = [
        (query_expansion(q, g, alpha=0), g),
        (query_expansion(q, g), g),
        (q, augmented),
        (query_expansion(q, augmented), augmented),
        aqe(q, g),
        (query_expansion(new_q, new_g), new_g),
    ]
    found = [(100 * result.mAP, 100 * result.rank(1)) for result in (pose2id.evaluate(*p, *labels) for p in pairs)]
    expected = [(27.54, 25.13), (27.33, 24.62), (29.79, 24.12), (32.50, 27.14), (30.51, 23.12), (30.20, 25.63)]
    np.testing.assert_allclose(found, expected, atol=0.0151)
