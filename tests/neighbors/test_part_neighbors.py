from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import parts as literal
from test_neighbors import KINDS as ALL_KINDS
from test_neighbors import make
from test_part_distances import VISIBILITY, visibility

from pose2id import nearest_neighbors
from pose2id.io.rows import Rows
from pose2id.neighbors import visible_parts as part_neighbors
from pose2id.neighbors.certificate import certified
from pose2id.neighbors.visible_parts import PartProducts, PartSpace, Shown

KINDS = [kind for kind in ALL_KINDS if kind != "near ties"]  # it scales whole rows of one part


def of(x, given, *, normalize=False):
    rows = Rows(x, "x", normalize=normalize, parts=True)
    return rows, rows.visibility(given, "visibility")


def check(found, rows, weights, k):
    """No row may differ from the restatement, but in the order of distances that differ in float64's last digits."""
    x, v = rows.by_part(rows.read(slice(None), torch.float64)).numpy(), weights.numpy()
    assert found.shape == (rows.n, min(k, rows.n - 1))
    wrong = []
    for i, expected in enumerate(literal.nearest(x, v, k)):
        row = found[i].tolist()
        assert row[len(expected) :] == [-1] * (len(row) - len(expected)), i
        row = row[: len(expected)]
        if row != expected:
            assert len({*row, i}) == len(row) + 1, i
            distances = [[literal.distance(x[i], x[j], v[i], v[j]) for j in lists] for lists in (row, expected)]
            if not np.allclose(*distances, rtol=1e-15, atol=0):
                wrong.append(i)
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", VISIBILITY)
def test_equals_the_literal_search(kind, seen, rng):
    for n, count, d, k in [(2, 2, 3, 1), (30, 3, 1, 4), (61, 9, 7, 2), (45, 5, 40, 7)]:
        x = make(kind, n * count, d, rng).reshape(n, count, d)
        if kind in ("copies", "one value"):
            x = x[rng.integers(0, n // 4 + 1, n)]
        rows, weights = of(x, visibility(seen, (n, count), rng)[0])
        check(part_neighbors.search(rows, weights, k), rows, weights, k)


@pytest.mark.parametrize("kind", ["random", "clustered", "one value", "zeros", "sizes"])
@pytest.mark.parametrize("seen", VISIBILITY)
def test_equals_the_literal_search_on_normalised_parts(kind, seen, rng):
    x = make(kind, 60 * 4, 32, rng).reshape(60, 4, 32)
    rows, weights = of(x, visibility(seen, (60, 4), rng)[0], normalize=True)
    check(part_neighbors.search(rows, weights, 5, 1 << 20), rows, weights, 5)


def hard_set(rng, n=1500, count=3, d=16):
    """Clusters, copies (2, 5, 13 and 200 of one row, seen alike or not), pairs 1e-7 apart, rows that show nothing."""
    centres = rng.standard_normal((n // 10, count, d))
    x = centres[rng.integers(0, n // 10, n)] + 0.5 * rng.standard_normal((n, count, d))
    v = rng.choice([0, 0.25, 1], (n, count))  # of which roots are exact: ties of copies seen differently stay ties
    for copies in (2, 5, 13, 200):
        rows = rng.choice(n, copies, replace=False)
        x[rows] = x[rows[0]]
        v[rows[: copies // 2 + 1]] = v[rows[0]]
    close = rng.choice(n, (100, 2), replace=False)
    x[close[:, 1]] = x[close[:, 0]] * (1 + 1e-7 * rng.standard_normal((100, count, d)))
    v[rng.choice(n, 20, replace=False)] = 0
    return x, v


def float64_search(x, v, k):
    """The restatement, a row at a time but vectorised over the others."""
    lists = np.full((len(x), k), -1)
    everything = np.arange(len(x))
    for i in range(len(x)):
        total, weights = np.zeros(len(x)), np.zeros(len(x))
        for p in range(x.shape[1]):
            weight = np.sqrt(v[i, p] * v[:, p])
            total += weight * np.sqrt(((x[i, p] - x[:, p]) ** 2).sum(1))
            weights += weight
        distance = np.divide(total, weights, out=np.full(len(x), np.inf), where=weights > 0)
        order = np.lexsort((everything, distance))
        order = order[(order != i) & np.isfinite(distance[order])][:k]
        lists[i, : len(order)] = order
    return lists


def test_copies_near_ties_and_hidden_rows_agree_row_for_row_with_float64(rng):
    x, v = hard_set(rng)
    rows, weights = of(x, v, normalize=True)
    expected = float64_search(rows.by_part(rows.read(slice(None))).numpy(), v, 4)
    assert (expected == -1).any()
    for max_memory in (None, 3 << 20, 2 << 20, 1 << 30):
        found = part_neighbors.search(rows, weights, 4, max_memory).numpy()
        assert (found != expected).any(1).sum() == 0, max_memory


def test_the_result_does_not_depend_on_the_number_of_threads(rng):
    rows, weights = of(*hard_set(rng, 400, 2), normalize=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(part_neighbors.search(rows, weights, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


class Watched(PartSpace):
    """Notes how many pairs are scored."""

    def __init__(self, *arguments):
        self.scored = []
        super().__init__(*arguments)

    def exact(self, first, second):
        self.scored.append(len(first))
        return super().exact(first, second)

    near = exact


class InFloat64(PartProducts):
    """Notes how many rows are left to float64."""

    def __init__(self, space):
        self.rows = 0
        super().__init__(space, torch.float64)

    def scores(self, rows):
        self.rows += len(rows)
        return super().scores(rows)


def watched(rows, weights, k):
    """Neighbours, how many pairs were scored, and how many rows left to float64."""
    kept, twin = part_neighbors.distinct(Shown(rows, weights), k + 1, 1 << 20)
    space = Watched(rows, weights, kept, 32 << 20)
    in_float64 = InFloat64(space)
    found = certified(space, k, [PartProducts], in_float64)
    found = torch.where(found < 0, -1, kept[found])
    return found if twin is None else found[twin], sum(space.scored), in_float64.rows


def test_every_way_to_settle_a_row_is_walked(rng):
    """Lists that float32 bounds prove complete, and such that need bounds in float64: the test above must have both."""
    x, v = hard_set(rng)
    assert 50 < watched(*of(x, v, normalize=True), 4)[2] < 600


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seen", VISIBILITY)
def test_the_bounds_hold(kind, dtype, seen, rng):
    n, count, d = 50, 4, 100
    x = make(kind, n * count, d, rng).reshape(n, count, d)
    x[:, 3] = 1e-22 * (1 + 1e-4 * x[:, 3])  # a part whose squares vanish beside the others in float32
    given, weights = visibility(seen, (n, count), rng)
    space = PartSpace(*of(x, given), torch.arange(n), 1 << 20)
    products = PartProducts(space, dtype, keep_copy=True)
    bounds = products.scores(slice(0, n))(slice(0, n)).T
    bounds = products.least(bounds, space.asking).numpy()
    for i in range(n):
        for j in range(n):
            exact = literal.distance(*x[[i, j]].astype(np.float64), *weights[[i, j]]) / space.scale
            assert bounds[i, j] <= exact
            assert np.isinf(bounds[i, j]) == np.isinf(exact)
    if kind == "random":
        off = ~np.isinf(bounds)
        exact = space.exact(*(torch.from_numpy(at) for at in np.nonzero(off))).numpy()
        assert (exact - bounds[off] < {torch.float32: 1e-3, torch.float64: 1e-11}[dtype]).all()


def test_visibility_of_any_size_is_weighed(rng):
    x = rng.standard_normal((40, 3, 8))
    rows, weights = of(x, rng.choice([1e-200, 1e-101, 1e-99, 1e-30, 1e-3, 1], (40, 3)))
    assert weights.unique().tolist() == [0, 1e-99, 1e-30, 1e-3, 1]
    check(part_neighbors.search(rows, weights, 3), rows, weights, 3)


def test_what_is_hidden_says_nothing(rng):
    x = rng.standard_normal((50, 3, 6))
    v = rng.random((50, 3)) < 0.6
    other = np.where(v[..., None], x, 1e200 * rng.standard_normal(x.shape))
    expected = part_neighbors.search(*of(x, v), 4)
    assert torch.equal(part_neighbors.search(*of(other, v), 4), expected)


@pytest.mark.parametrize("kind", ["near copies", "one far row"])
def test_float64_products_leave_few_pairs_to_score(kind, rng):
    """What float32 cannot tell apart is multiplied in float64; only what that leaves open is scored pair by pair."""
    x = rng.standard_normal((300, 2, 16))
    if kind == "near copies":
        x[:200] = x[0] + 1e-5 * x[:200]
    else:
        x[7] *= 1e6
    rows, weights = of(x, None)
    found, scored, left = watched(rows, weights, 2)
    assert left >= 200
    assert scored <= 300 * 6 + 300 * 6
    check(found, rows, weights, 2)


def test_thousands_of_equal_rows_are_searched_once(rng):
    x = np.repeat(rng.standard_normal((3, 2, 4)), 1000, axis=0)
    v = np.ones((3000, 2), bool)
    v[1000:2000, 1] = False
    x[1000:2000, 1] = rng.standard_normal((1000, 4))  # hidden: copies all the same
    rows, weights = of(x, v)
    assert len(part_neighbors.distinct(Shown(rows, weights), 3, 1 << 20)[0]) == 9
    found, scored, _ = watched(rows, weights, 2)
    assert scored < 9 * 9 * 4
    np.testing.assert_array_equal(part_neighbors.search(rows, weights, 2), found)
    np.testing.assert_array_equal(found, float64_search(x, v, 2))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["random", "clustered", "copies"])
def test_one_part_all_visible_has_the_neighbours_of_whole_features(kind, normalize, rng):
    x = make(kind, 200, 12, rng)
    found = part_neighbors.search(*of(x[:, None], None, normalize=normalize), 4)
    np.testing.assert_array_equal(found, nearest_neighbors(x, 4, normalize=normalize))


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 25),
    count=st.integers(1, 9),
    d=st.integers(1, 4),
    k=st.integers(1, 28),
    levels=st.integers(1, 3),
    seen=st.sampled_from([[0, 1], [0, 0, 1], [0, 0.25, 0.5, 1], [0.01, 0.1, 0.7]]),
)
def test_any_small_set_with_ties(seed, n, count, d, k, levels, seen):
    rng = np.random.default_rng(seed)
    x = rng.integers(-levels, levels + 1, (n, count, d)).astype(np.float32)
    v = rng.choice(seen, (n, count))
    found = part_neighbors.search(*of(x, v), k)
    assert found.shape == (n, min(k, n - 1))
    for i, expected in enumerate(literal.nearest(x.astype(np.float64), v, k)):
        assert found[i].tolist() == expected + [-1] * (found.shape[1] - len(expected))


def test_rows_that_do_not_fit_into_memory_are_read_a_block_at_a_time(rng, monkeypatch, tmp_path):
    x, v = hard_set(rng, 1200, 4, 100)
    expected = part_neighbors.search(*of(x, v), 2)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    memory, read = 2 << 20, []
    rows, weights = of(mapped, v)
    monkeypatch.setattr(Rows, "read", counting(read))
    assert torch.equal(part_neighbors.search(rows, weights, 2, memory), expected)
    assert max(read) * 400 * 8 < memory / 2 < x.nbytes / 3


def counting(sizes):
    read = Rows.read

    def counted(rows, *arguments):
        found = read(rows, *arguments)
        sizes.append(len(found))
        return found

    return counted


def test_memory_for_the_lists_is_the_least(rng):
    rows, weights = of(rng.standard_normal((5000, 2, 3)), None)
    with pytest.raises(
        ValueError, match=r"max_memory must be at least \d+ bytes for lists of 3 neighbours of 5000 rows"
    ):
        part_neighbors.search(rows, weights, 3, 1 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", VISIBILITY)
def test_cuda_equals_cpu(kind, seen, rng):
    x = torch.from_numpy(make(kind, 2000, 32, rng)).view(500, 4, 32)
    given, _ = visibility(seen, (500, 4), rng)
    found = part_neighbors.search(*of(x.cuda(), given), 3)
    assert found.is_cuda
    assert torch.equal(found.cpu(), part_neighbors.search(*of(x, given), 3))
