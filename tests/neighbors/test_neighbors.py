from __future__ import annotations

import logging
import sys
import threading
import time
import types
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from pose2id import nearest_neighbors
from pose2id.io.rows import Rows, sum_last
from pose2id.neighbors import half as _half
from pose2id.neighbors import search as neighbors
from pose2id.neighbors import space as _space
from pose2id.neighbors.distance import full_precision
from pose2id.neighbors.space import Space


def make(kind, n, d, rng):
    """Feature sets that break careless searches."""
    x = rng.standard_normal((n, d)).astype(np.float32)
    if kind == "clustered":
        x = x[rng.integers(0, n // 10 + 1, n)] + 0.1 * x
    elif kind == "copies":
        x = x[rng.integers(0, n // 13 + 1, n)]
    elif kind == "one value":
        x[:] = x[0]
    elif kind == "nearly one value":
        x = x[:1] + (1e-6 * x).astype(np.float32)
    elif kind == "far from the origin":
        x += 1e4
    elif kind == "grid":
        x = rng.integers(-2, 3, (n, d)).astype(np.float32)
    elif kind == "zeros":
        x[rng.random(n) < 0.4] = 0
    elif kind == "sizes":
        x *= np.float32(2.0) ** rng.integers(-40, 40, (n, 1))
    elif kind == "near ties":
        x = np.repeat(x[: n // 4 + 1], 4, axis=0)[:n]
        x = (x * (1 + 1e-7 * rng.standard_normal((n, 1)))).astype(np.float32)
    return x


KINDS = [
    "random",
    "clustered",
    "copies",
    "one value",
    "nearly one value",
    "far from the origin",
    "grid",
    "zeros",
    "sizes",
    "near ties",
]


HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WAYS = ["faiss", "float32", *HALVES]


@contextmanager
def searching(way, budget=None):
    """Candidates found in one way, whatever this processor would choose: gives the backend to ask for.

    The budget: bytes of a block, and whether copies of the rows are kept.
    """
    with (
        mock.patch.object(neighbors, "half_dtype", return_value=HALVES.get(way)),
        mock.patch.object(_half, "_OPEN", 1.0),  # even where it decides nothing
        mock.patch.object(
            neighbors, "_budget", **({"return_value": budget} if budget else {"wraps": neighbors._budget})
        ),
    ):
        yield "faiss" if way == "faiss" else "torch"


@pytest.fixture(params=WAYS)
def backend(request):
    with searching(request.param) as name:
        yield name


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_literal_search(kind, rng):
    for n, d, k in [(2, 3, 1), (30, 1, 4), (150, 7, 2), (150, 64, 11), (97, 768, 3)]:
        x = make(kind, n, d, rng)
        expected = reference.nearest(x, k)
        for way in WAYS:
            for budget in (None, (1 << 15, True), (1 << 17, False)):
                if way == "faiss" and budget == (1 << 17, False):
                    continue  # faiss needs a copy of all rows
                with searching(way, budget) as backend:
                    found = nearest_neighbors(x, k, backend=backend)
                np.testing.assert_array_equal(found, expected, err_msg=f"{way} {budget} n={n} d={d} k={k}")


@pytest.mark.parametrize(("n", "d", "k"), [(300, 4096, 64), (700, 33, 64), (1500, 1, 20)])
def test_long_lists_and_rows(n, d, k, backend, rng):
    for kind in ("random", "copies", "near ties"):
        x = make(kind, n, d, rng)
        found = nearest_neighbors(x, k, backend=backend)
        sample = rng.choice(n, 20, replace=False)
        np.testing.assert_array_equal(found[sample], float64_search(x, k, sample, unit=False), err_msg=kind)


def test_20000_rows(backend, rng):
    x = np.tile(big_with_copies(rng), (5, 1))
    x[4000:] += (0.3 * rng.standard_normal((16_000, 64))).astype(np.float32)
    x[15_000:] = x[rng.integers(0, 15_000, 5000)]
    found = nearest_neighbors(x, 5, normalize=True, backend=backend)
    sample = rng.choice(20_000, 200, replace=False)
    np.testing.assert_array_equal(found[sample], float64_search(x, 5, sample))


@pytest.mark.parametrize("kind", ["random", "clustered", "copies", "one value", "zeros", "sizes"])
def test_equals_the_literal_search_on_normalised_rows(kind, backend, rng):
    x = make(kind, 150, 64, rng)
    np.testing.assert_array_equal(
        nearest_neighbors(x, 5, normalize=True, backend=backend), reference.nearest(x, 5, normalize=True)
    )


def big_with_copies(rng):
    """4,000 rows: video-like copies (2, 5, 13 and 200 of one row), and pairs 1e-7 apart."""
    x = rng.standard_normal((4000, 64)).astype(np.float32)
    centres = rng.standard_normal((300, 64)).astype(np.float32)
    x = (centres[rng.integers(0, 300, 4000)] + 0.5 * x).astype(np.float32)
    for copies in (2, 5, 13, 200):
        for _ in range(3):
            rows = rng.choice(4000, copies, replace=False)
            x[rows] = x[rows[0]]
    close = rng.choice(4000, (100, 2), replace=False)
    x[close[:, 1]] = x[close[:, 0]] * (1 + 1e-7 * rng.standard_normal((100, 64))).astype(np.float32)
    return x


def float64_search(x, k, rows=None, unit=True):
    """The float64 restatement, a row at a time but vectorised over the others."""
    x = reference.unit(x) if unit else x.astype(np.float64)
    everything = np.arange(len(x))
    lists = []
    for i in everything if rows is None else rows:
        order = np.lexsort((everything, ((x - x[i]) ** 2).sum(1)))
        lists.append(order[order != i][:k])
    return np.array(lists)


def test_4000_rows_with_copies_agree_row_for_row_with_float64(backend, rng):
    x = big_with_copies(rng)
    expected = float64_search(x, 4)
    for max_memory in (None, 8 << 20):
        found = nearest_neighbors(x, 4, normalize=True, backend=backend, max_memory=max_memory)
        assert (found != expected).any(1).sum() == 0, max_memory


def test_the_result_does_not_depend_on_the_number_of_threads(backend, rng):
    x = big_with_copies(rng)[:1500]
    set_threads, before = torch.set_num_threads, torch.get_num_threads()
    if backend == "faiss":
        faiss = pytest.importorskip("faiss")
        set_threads, before = faiss.omp_set_num_threads, faiss.omp_get_max_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            set_threads(threads)
            results.append(nearest_neighbors(x, 4, normalize=True, backend=backend))
    finally:
        set_threads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_every_way_to_settle_a_row_is_walked(rng, monkeypatch):
    """Certain at once, told apart in float64, searched again in float32 and in float64: each must have rows."""
    walked = {"ranked": [], "told apart": 0, "float64": 0}
    rank, add, in_float64 = Space.rank, _space.ExactBest.add, Space.rank_in_float64

    def counting_rank(space, found, rows, k):
        walked["ranked"].append(len(rows))
        return rank(space, found, rows, k)

    def counting_add(best, row, *arguments):
        walked["told apart"] += len(torch.unique(row))
        return add(best, row, *arguments)

    def counting_float64(space, rows, k):
        walked["float64"] += len(rows)
        return in_float64(space, rows, k)

    monkeypatch.setattr(Space, "rank", counting_rank)
    monkeypatch.setattr(_space.ExactBest, "add", counting_add)
    monkeypatch.setattr(Space, "rank_in_float64", counting_float64)
    monkeypatch.setattr(neighbors, "half_dtype", lambda _: torch.bfloat16)
    nearest_neighbors(big_with_copies(rng), 4, normalize=True, backend="torch")
    assert 3000 < walked["ranked"][1] < 4000, walked  # after the sample
    assert 5 < walked["ranked"][2] < 1000, walked
    assert walked["float64"] > 3, walked
    assert walked["told apart"] > walked["float64"] + 10, walked


@pytest.mark.parametrize("kind", KINDS)
def test_the_bounds_hold(kind, rng, backend):
    """No bound that proves rows right is ever broken by a true distance."""
    x = make(kind, 120, 300, rng)
    space = Space(Rows(x, "x"), torch.arange(120), 1 << 20)
    true = torch.from_numpy(((x[:, None].astype(np.float64) - x[None]) ** 2).sum(-1)).sqrt() / space._scale
    found, _ = neighbors._candidates(space, 30, 9, backend)
    mine = true.gather(1, found.positions)
    rest = true.scatter(1, found.positions, torch.inf).fill_diagonal_(torch.inf)
    assert (rest.amin(1) >= found.floor).all()
    kth = true.clone().fill_diagonal_(torch.inf).kthvalue(9, dim=1).values
    assert (found.possible | (mine > kth[:, None])).all()
    assert (found.possible.sum(1) >= 9).all()
    first = torch.arange(120).repeat_interleave(30)
    scored = space._scored(first, found.positions.flatten()).view(120, 30)
    wrong = 2.0**-24 * (1.1 * (space.norms[:, None] + space.norms.max()) + 4 * mine)
    assert ((scored - mine).abs() <= wrong).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES.values())
@pytest.mark.parametrize("d", [1, 40, 300])
def test_products_in_half_precision_bound_all_distances(kind, dtype, d, rng):
    x = make(kind, 100, d, rng)
    space = Space(Rows(x, "x"), torch.arange(100), 1 << 20)
    halves = _half._Halves(space, dtype)
    squared = -2 * (halves.left(slice(0, 100)) @ halves.right(slice(0, 100)).T).float()
    true = torch.from_numpy(((x[:, None].astype(np.float64) - x[None]) ** 2).sum(-1)).sqrt() / space._scale
    for column in range(100):
        least, most = halves._bounds(squared[:, column], slice(None))
        assert (least <= true[:, column]).all()
        assert (true[:, column] <= most).all()
    # ... and say something: they lie a percent of the largest norm around it.
    assert (most - least).max() < 0.02 + 4 * float(halves._lost.max().sqrt())


SIX = np.array([[0.49, 0], [20.51, 6.25], [-20.49, 0]])  # around m: the third is nearer to the first, all but as near


def six_rows(unit, m):
    """Rows that rounding to multiples of `unit` moves so that another one becomes the nearest."""
    half = (SIX + np.array([m, 0])) * unit
    return np.concatenate([half, -half])


@pytest.mark.parametrize(("dtype", "unit", "m"), [("bfloat16", 2.0**-8, 200), ("float16", 2.0**-11, 1600)])
def test_a_row_may_be_moved_as_far_as_its_limit_says(dtype, unit, m):
    x = six_rows(unit, m)
    with searching(dtype) as backend:
        np.testing.assert_array_equal(nearest_neighbors(x, 1, backend=backend), reference.nearest(x, 1))


def test_rounding_to_float32_is_not_taken_for_an_order():
    x = six_rows(2.0**-24, int(0.8 * 2**24))
    with searching("float32") as backend:
        np.testing.assert_array_equal(nearest_neighbors(x, 2, backend=backend), reference.nearest(x, 2))


def test_a_list_is_certain_only_beyond_what_rounding_can_hide(rng):
    x = rng.standard_normal((9, 30))
    space = Space(Rows(x, "x"), torch.arange(9), 1 << 20)
    rows, positions = torch.tensor([0, 0, 0]), torch.arange(1, 9).expand(3, -1)
    far = space.exact(rows[:1].expand(8), positions[0]).sort().values[2]
    wrong = 2.0**-24 * float(1.1 * (space.norms[0] + space.norms.max()) + 4 * far)
    floor = far + wrong * torch.tensor([0.9, -1.0, 1.2], dtype=torch.float64)
    found = _space.Candidates(positions, torch.ones(3, 8, dtype=torch.bool), floor)
    nearest, certain = space.rank(found, rows, 3)
    assert certain.tolist() == [False, False, True]
    assert nearest[2].tolist() == reference.nearest(x, 3)[0]


def test_halves_know_what_they_lose(rng):
    x = rng.standard_normal((40, 24))
    space = Space(Rows(x, "x"), torch.arange(40), 1 << 20)
    for dtype in HALVES.values():
        halves = _half._Halves(space, dtype)
        rows = halves.left(slice(0, 40)).double()
        h = rows[:, -6:-3].sum(1)
        residual = (rows[:, :-6].square().sum(1) / 2 - h).abs().max()
        moved = torch.linalg.vector_norm(space.copy - rows[:, :-6], dim=1) + 2.0**-24 * space.norms
        assert (halves._moved >= moved + moved.max()).all()
        assert (halves._lost >= 2.0**-23 * 24 * (space.norms + space.norms.max()) ** 2 + 4 * residual).all()


def test_the_callers_default_device_does_not_matter(backend, rng):
    x = rng.standard_normal((30, 4)).astype(np.float32)
    expected = reference.nearest(x, 2)
    torch.set_default_device("meta")
    try:
        found = nearest_neighbors(x, 2, backend=backend)
    finally:
        torch.set_default_device(None)  # a default of "cpu" would stay a default, and break compiling in later tests
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(5, 7), (40, 64), (33, 700), (16, 4099)])
def test_the_largest_of_a_row(shape, rng):
    scores = torch.from_numpy(rng.integers(0, 50, shape)).bfloat16()
    for matrix in (scores, scores.T.contiguous().T):
        for count in (1, 6, min(60, shape[1])):
            values, columns = _space._largest(matrix, count)
            assert torch.equal(values, scores.float().topk(count, dim=1).values)
            assert torch.equal(scores.gather(1, columns).float(), values)
            assert all(len(set(row)) == count for row in columns.tolist())


def test_half_precision_that_decides_little_is_not_used(monkeypatch, rng):
    """Rows at all but the same distance from each other; the others of the set are in clusters."""
    searched = []
    float32 = neighbors.search_float32
    monkeypatch.setattr(
        neighbors, "search_float32", lambda space, rows, *a: searched.append(len(rows)) or float32(space, rows, *a)
    )
    monkeypatch.setattr(neighbors, "half_dtype", lambda _: torch.bfloat16)
    alike = rng.standard_normal((400, 4000)).astype(np.float32)
    clusters = np.repeat(alike[:100], 4, axis=0) + 0.2 * rng.standard_normal((400, 4000)).astype(np.float32)
    for x, rows in ((alike, [400]), (clusters, [0])):
        found = nearest_neighbors(x, 3, backend="torch")
        assert searched == rows
        searched.clear()
        np.testing.assert_array_equal(found, reference.nearest(x, 3))


def test_half_precision_that_is_off_is_not_believed(monkeypatch, rng, caplog):
    x = rng.standard_normal((200, 16)).astype(np.float32)
    product = torch.mm
    monkeypatch.setattr(neighbors, "half_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(torch, "mm", lambda a, b: product(a, b) * 1.1)
    neighbors._logged.clear()
    np.testing.assert_array_equal(nearest_neighbors(x, 2, backend="torch"), reference.nearest(x, 2))
    assert "less precise here" in caplog.text


@pytest.mark.parametrize(("bfloat16", "expected"), [(0.5, torch.bfloat16), (0.9, None)])
def test_half_precision_must_be_faster(bfloat16, expected, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(_half.time, "perf_counter", lambda: clock[0])

    def product(a, b):
        clock[0] += bfloat16 if a.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(torch, "mm", product)
    assert _half.half_dtype.__wrapped__(torch.device("cpu")) == expected
    assert _half.half_dtype.__wrapped__(torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("kind", ["near copies", "one far row", "nearly one value"])
def test_float64_products_leave_few_pairs_to_gather(kind, monkeypatch, rng):
    """What float32 cannot tell apart is multiplied in float64; only what that leaves open is scored pair by pair."""
    x = rng.standard_normal((400, 64)).astype(np.float32)
    if kind == "near copies":
        x[:300] = x[0] + 5e-5 * x[:300]
    elif kind == "one far row":
        x[7] *= 1e4
    else:
        x = (x[:1] + 1e-5 * x).astype(np.float32)
        x[7] *= -1
    scored = []
    exact = Space._exact
    monkeypatch.setattr(Space, "_exact", lambda space, a, b: scored.append(len(a)) or exact(space, a, b))
    monkeypatch.setattr(neighbors, "half_dtype", lambda _: None)
    found = nearest_neighbors(x, 2, backend="torch", normalize=kind == "near copies")
    np.testing.assert_array_equal(found, reference.nearest(x, 2, normalize=kind == "near copies"))
    assert sum(scored) <= 400 * 6 + 400 * 3


def test_a_long_row_has_one_sum_whatever_the_threads(rng):
    base = rng.standard_normal(40_000)
    x = np.stack([np.zeros(40_000), *(np.roll(base, shift) for shift in (0, 1, 2, 3))])
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for max_memory in (None, 1 << 20):
                found.add(tuple(nearest_neighbors(x, 2, backend="torch", max_memory=max_memory)[0].tolist()))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_thousands_of_equal_rows_are_searched_once(rng):
    x = np.repeat(rng.standard_normal((3, 8)).astype(np.float32), 2000, axis=0)
    kept, twin = neighbors.distinct(Rows(x, "x"), 3, 1 << 20)
    assert kept.tolist() == [0, 1, 2, 2000, 2001, 2002, 4000, 4001, 4002]
    assert twin.tolist() == [0, 1, *[2] * 1998, 3, 4, *[5] * 1998, 6, 7, *[8] * 1998]


def test_equal_keys_of_different_rows_do_not_join_them(monkeypatch, rng):
    # With equal weights, rows with the same values in another order have the same key.
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.zeros(4, dtype=torch.int64))
    x = rng.standard_normal((5, 4)).astype(np.float32)
    x = np.repeat(np.concatenate([x, x[:, ::-1]]), 6, axis=0)[rng.permutation(60)]
    np.testing.assert_array_equal(nearest_neighbors(x, 3, backend="torch"), reference.nearest(x, 3))


def test_minus_zero_is_zero():
    x = np.zeros((50, 3), np.float32)
    x[::2] *= -1.0
    kept, _ = neighbors.distinct(Rows(x, "x"), 3, 1 << 20)
    assert kept.tolist() == [0, 1, 2]


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    k=st.integers(1, 45),
    levels=st.integers(1, 4),
    way=st.sampled_from(WAYS),
    block_bytes=st.sampled_from([512, 1 << 20]),
    copies=st.booleans(),
)
def test_any_small_set_with_ties(seed, n, d, k, levels, way, block_bytes, copies):
    x = np.random.default_rng(seed).integers(-levels, levels + 1, (n, d)).astype(np.float32)
    with searching(way, (block_bytes, copies or way == "faiss")) as backend:
        found = nearest_neighbors(x, k, backend=backend)
    assert found.shape == (n, min(k, n - 1))
    np.testing.assert_array_equal(found, np.array(reference.nearest(x, k)).reshape(found.shape))


def test_float64_values_of_any_size(backend, rng):
    x = np.concatenate([rng.standard_normal((60, 5)), 3 + 1e-9 * rng.standard_normal((30, 5))])
    expected = reference.nearest(x, 3)
    for scale in (1e-200, 1e200, 1e-30, 1e30):
        np.testing.assert_array_equal(nearest_neighbors(x * scale, 3, backend=backend), expected)
        np.testing.assert_array_equal(
            nearest_neighbors(x * scale, 3, normalize=True, backend=backend), reference.nearest(x, 3, normalize=True)
        )


def test_speed_settings_of_the_caller_change_nothing_and_stay(backend, rng):
    x = big_with_copies(rng)[:800]
    expected = nearest_neighbors(x, 3, backend=backend)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = nearest_neighbors(x, 3, backend=backend)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(found, expected)


def product_precisions():
    """What float32 products use now: one value for CUDA and one for the CPU (torch >= 2.9), or one for both."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    return [{"highest": "ieee"}.get(torch.get_float32_matmul_precision(), "less")]


@pytest.fixture
def reduced():
    """A caller who allows less precise products."""
    torch.set_float32_matmul_precision("medium")
    yield product_precisions()
    torch.set_float32_matmul_precision("highest")


def test_products_run_in_full_precision_without_gradients(reduced):
    assert "ieee" not in reduced
    with full_precision(torch.device("cpu")):
        assert set(product_precisions()) == {"ieee"}
        assert not torch.is_grad_enabled()
    assert product_precisions() == reduced
    assert torch.get_float32_matmul_precision() == "medium"


def test_half_precision_is_added_up_in_float32():
    settings = torch.backends.cuda.matmul
    names = ["allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"]
    before = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    assert before["allow_fp16_reduced_precision_reduction"]
    with full_precision(torch.device("cpu")):
        assert not any(getattr(settings, name) for name in before)
    assert {name: getattr(settings, name) for name in before} == before


def test_threads_do_not_undo_each_others_precision(reduced):
    seen = set()

    def work():
        for _ in range(50):
            with full_precision(torch.device("cpu")):
                time.sleep(1e-4)
                seen.update(product_precisions())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"ieee"}
    assert product_precisions() == reduced


def test_a_backend_whose_distances_are_off_is_not_believed(monkeypatch, rng, caplog):
    def coarse(x, y, k):
        distances = ((x[:, None] - y[None]) ** 2).sum(-1) * 1.001
        order = np.argsort(distances, axis=1)[:, :k]
        return np.take_along_axis(distances, order, 1), order

    monkeypatch.setattr(sys, "platform", "linux")
    neighbors._logged.clear()
    monkeypatch.setitem(sys.modules, "faiss", types.SimpleNamespace(knn=coarse))
    x = rng.standard_normal((50, 4)).astype(np.float32)
    np.testing.assert_array_equal(nearest_neighbors(x, 2), reference.nearest(x, 2))
    assert "further off than float32" in caplog.text
    with pytest.raises(RuntimeError, match="further off than float32"):
        nearest_neighbors(x, 2, backend="faiss")


BROKEN_FAISS = {
    "missing": None,
    "clobbered": types.ModuleType("faiss"),
    "failing": types.SimpleNamespace(knn=lambda *_: (_ for _ in ()).throw(RuntimeError("bad binary"))),
}


class TestFaissThatCannotBeUsed:
    @pytest.fixture(autouse=True)
    def _linux_and_fresh_log(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "linux")
        neighbors._logged.clear()

    @pytest.mark.parametrize("how", BROKEN_FAISS)
    def test_torch_takes_over_and_says_so_once(self, how, monkeypatch, caplog, rng):
        x = rng.standard_normal((20, 4)).astype(np.float32)
        monkeypatch.setitem(sys.modules, "faiss", BROKEN_FAISS[how])
        with caplog.at_level(logging.WARNING):
            first, second = nearest_neighbors(x, 2), nearest_neighbors(x, 2)
        np.testing.assert_array_equal(first, reference.nearest(x, 2))
        np.testing.assert_array_equal(second, first)
        assert len(caplog.records) == 1
        assert "pip install --force-reinstall" in caplog.text

    @pytest.mark.parametrize("how", BROKEN_FAISS)
    def test_forced_it_is_an_error_that_names_the_repair(self, how, monkeypatch, rng):
        monkeypatch.setitem(sys.modules, "faiss", BROKEN_FAISS[how])
        with pytest.raises(RuntimeError, match=r"faiss.*pip install --force-reinstall"):
            nearest_neighbors(rng.standard_normal((20, 4)), 2, backend="faiss")

    def test_off_linux_faiss_is_only_used_when_forced(self, monkeypatch, rng, caplog):
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setitem(sys.modules, "faiss", None)
        x = rng.standard_normal((20, 4))
        nearest_neighbors(x, 2)
        assert not caplog.records
        with pytest.raises(RuntimeError):
            nearest_neighbors(x, 2, backend="faiss")

    def test_gpu_needs_more_than_a_cpu_build(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "faiss", types.SimpleNamespace(knn=None))
        assert neighbors._faiss(gpu=False)[0] is not None
        module, problem = neighbors._faiss(gpu=True)
        assert module is None
        assert "StandardGpuResources" in problem
        whole = types.SimpleNamespace(knn_gpu=None, StandardGpuResources=None, get_num_gpus=lambda: 0)
        monkeypatch.setitem(sys.modules, "faiss", whole)
        assert neighbors._faiss(gpu=True) == (None, "it sees no GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_equals_cpu(kind, backend, rng):
    x = make(kind, 500, 64, rng)
    found = nearest_neighbors(torch.from_numpy(x).cuda(), 3, backend=backend)
    assert found.is_cuda
    np.testing.assert_array_equal(found.cpu().numpy(), nearest_neighbors(x, 3, backend="torch"))


@pytest.mark.parametrize("width", [1, 31, 32, 33, 768, 20_001])
def test_sums_have_one_order_whatever_the_shape(width, rng):
    x = rng.standard_normal((40, width))
    halves = list(x[0])
    while len(halves) > 1:
        half = len(halves) // 2
        low = [a + b for a, b in zip(halves[:half], halves[len(halves) - half :], strict=True)]
        halves = low + halves[half : len(halves) - half]
    for rows in (x, x[:1], x[:2]):
        assert float(sum_last(torch.from_numpy(rows.copy()))[0]) == halves[0]


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n", [4, 30])
def test_copies_of_long_rows_tie_on_cuda(n, normalize, rng):
    # A GPU cuts sums of few long rows into pieces, those of many into others: equal rows must tie all the same.
    x = rng.standard_normal((n, 20_000))
    x[n // 2 :] = x[rng.integers(0, 2, n - n // 2)]
    expected = nearest_neighbors(x, n, normalize=normalize, backend="torch")
    for max_memory in (None, 4 << 20):
        found = nearest_neighbors(torch.from_numpy(x).cuda(), n, normalize=normalize, max_memory=max_memory)
        np.testing.assert_array_equal(found.cpu(), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": 1.5}, TypeError, "k must be an integer"),
        ({"k": True}, TypeError, "k must be an integer"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"max_memory": 100}, ValueError, "max_memory must be at least"),
        ({"max_memory": "1GB"}, TypeError, "max_memory must be an integer"),
    ],
)
def test_bad_parameters(arguments, error, message):
    with pytest.raises(error, match=message):
        nearest_neighbors(np.zeros((3, 2)), **{"k": 1, **arguments})
