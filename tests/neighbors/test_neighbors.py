from __future__ import annotations

import logging
import sys
import threading
import time
import types
from functools import partial

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from pose2id import nearest_neighbors
from pose2id.io.rows import Rows, sum_last
from pose2id.neighbors import certificate
from pose2id.neighbors.certificate import certified
from pose2id.neighbors.distance import full_precision
from pose2id.neighbors.engines import Faiss, Half, Products, UnusableError, half_dtype, largest, usable_faiss
from pose2id.neighbors.search import Memory, distinct, exact_neighbors
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
# Engines, whatever this processor would choose; half precision even where it decides nothing.
WAYS = {
    "faiss": [Faiss],
    "float32": [Products],
    **{name: [partial(Half, dtype=dtype, trial=False), Products] for name, dtype in HALVES.items()},
}


@pytest.fixture(params=WAYS)
def backend(request):
    return WAYS[request.param]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_literal_search(kind, rng):
    for n, d, k in [(2, 3, 1), (30, 1, 4), (150, 7, 2), (150, 64, 11), (97, 768, 3)]:
        x = make(kind, n, d, rng)
        expected = reference.nearest(x, k)
        for way, engines in WAYS.items():
            # A few rows at a time, and not so few that wide rows take minutes.
            for memory in (
                None,
                Memory(max(1 << 15, 400 * d), copies=True),
                Memory(max(1 << 17, 800 * d), copies=False),
            ):
                found = nearest_neighbors(x, k, backend=engines, max_memory=memory)
                np.testing.assert_array_equal(found, expected, err_msg=f"{way} {memory} n={n} d={d} k={k}")


@pytest.mark.parametrize(("n", "d", "k"), [(300, 4096, 64), (700, 33, 64), (1500, 1, 20)])
def test_long_lists_and_rows(n, d, k, backend, rng):
    for kind in ("random", "copies", "near ties"):
        x = make(kind, n, d, rng)
        found = nearest_neighbors(x, k, backend=backend)
        sample = rng.choice(n, 20, replace=False)
        np.testing.assert_array_equal(found[sample], float64_search(x, k, sample, unit=False), err_msg=kind)


def test_many_rows(backend, rng, stress):
    times = 5 if stress else 2  # 4,000 rows
    x = np.tile(big_with_copies(rng), (times, 1))
    x[4000:] += (0.3 * rng.standard_normal((len(x) - 4000, 64))).astype(np.float32)
    copies = len(x) // 4
    x[-copies:] = x[rng.integers(0, len(x) - copies, copies)]
    found = nearest_neighbors(x, 5, normalize=True, backend=backend)
    sample = rng.choice(len(x), 200, replace=False)
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
    if backend is WAYS["faiss"]:
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


class Watched(Space):
    """Notes the pairs that are scored exactly."""

    def __init__(self, *arguments, **options):
        self.scored = []
        super().__init__(*arguments, **options)

    def exact(self, first, second):
        self.scored.append(first)
        return super().exact(first, second)


def asked(engine, rows_of):
    """An engine that notes of which rows it is asked."""

    class Asked(engine):
        def nearest(self, rows, count):
            rows_of.append(rows)
            return super().nearest(rows, count)

    return Asked


class InFloat64(Products):
    """Notes the rows that are left to float64, and counts the products."""

    def __init__(self, space):
        self.rows, self.products = [], 0
        super().__init__(space, torch.float64)

    def scores(self, rows):
        self.rows += rows.tolist()
        score = super().scores(rows)

        def counted(part):
            block = score(part)
            self.products += block.numel()
            return block

        return counted


def watched(x, k, engines, block_bytes=32 << 20, **options):
    """Neighbours of a set without many copies, where pairs were scored, and rows left to float64."""
    space = Watched(Rows(x, "x", **options), torch.arange(len(x)), block_bytes)
    in_float64 = InFloat64(space)
    return certified(space, k, engines, in_float64).numpy(), space.scored, in_float64.rows


def test_every_way_to_settle_a_row_is_walked(rng):
    """Certain at once, told apart exactly, searched again in float32 and in float64: each must have rows."""
    halves, products = [], []
    x = big_with_copies(rng)
    x = x[distinct(Rows(x, "x", normalize=True), 5, 1 << 20)[0].numpy()]
    engines = [partial(asked(Half, halves), dtype=torch.bfloat16), asked(Products, products)]
    found, scored, left = watched(x, 4, engines, normalize=True)
    assert len(halves[0]) <= 128  # the sample
    assert len(halves[1]) == len(x)
    assert 5 < len(products[0]) < 1000
    assert len(left) > 3
    told_apart = {row for rows in scored for row in rows[:-1][rows.diff() == 0].tolist()}
    assert len(told_apart - set(left)) > 10
    np.testing.assert_array_equal(found, float64_search(x, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [*HALVES, "faiss", "float32"])
def test_the_bounds_hold(kind, way, rng):
    """No bound that proves rows right is ever broken by a true distance."""
    x = make(kind, 120, 300, rng)
    space = Space(Rows(x, "x"), torch.arange(120), 1 << 20)
    true = torch.from_numpy(((x[:, None].astype(np.float64) - x[None]) ** 2).sum(-1)).sqrt() / space.scale
    engine = WAYS[way][0](space)
    scores, positions = engine.nearest(space.asking, 30)
    mine = true.gather(1, positions)
    least, most = engine.least(scores, space.asking), engine.most(scores, space.asking)
    assert ((least <= mine) & (mine <= most)).all()
    rest = true.scatter(1, positions, torch.inf).fill_diagonal_(torch.inf)
    assert (rest.amin(1) >= least[:, -1]).all()
    kth = true.clone().fill_diagonal_(torch.inf).kthvalue(9, dim=1).values
    possible = least <= most[:, 8:9]
    assert (possible | (mine > kth[:, None])).all()
    assert (possible.sum(1) >= 9).all()
    first = torch.arange(120).repeat_interleave(30)
    near = space.near(first, positions.flatten()).view(120, 30)
    wrong = 2.0**-24 * (1.1 * (space.norms[:, None] + space.norms.max()) + 4 * mine)
    assert ((near - mine).abs() <= wrong).all()
    assert (wrong <= space.wrong(first, mine.flatten()).view(120, 30) * (1 + 1e-12)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES.values())
@pytest.mark.parametrize("d", [1, 40, 300])
def test_products_in_half_precision_bound_all_distances(kind, dtype, d, rng):
    x = make(kind, 100, d, rng)
    space = Space(Rows(x, "x"), torch.arange(100), 1 << 20)
    halves = Half(space, dtype)
    scores = halves.scores(slice(0, 100))(slice(0, 100)).T
    true = torch.from_numpy(((x[:, None].astype(np.float64) - x[None]) ** 2).sum(-1)).sqrt() / space.scale
    least, most = halves.least(scores, space.asking), halves.most(scores, space.asking)
    assert (least <= true).all()
    assert (true <= most).all()
    # ... and say something: they lie a percent of the largest norm around it.
    lost = 2.0**-23 * (d + 32) * 4 + 2.0**-20
    assert (most - least).max() < 0.02 + 4 * lost**0.5


SIX = np.array([[0.49, 0], [20.51, 6.25], [-20.49, 0]])  # around m: the third is nearer to the first, all but as near


def six_rows(unit, m):
    """Rows that rounding to multiples of `unit` moves so that another one becomes the nearest."""
    half = (SIX + np.array([m, 0])) * unit
    return np.concatenate([half, -half])


@pytest.mark.parametrize(("dtype", "unit", "m"), [("bfloat16", 2.0**-8, 200), ("float16", 2.0**-11, 1600)])
def test_a_row_may_be_moved_as_far_as_its_limit_says(dtype, unit, m):
    x = six_rows(unit, m)
    np.testing.assert_array_equal(nearest_neighbors(x, 1, backend=WAYS[dtype]), reference.nearest(x, 1))


def test_rounding_to_float32_is_not_taken_for_an_order():
    x = six_rows(2.0**-24, int(0.8 * 2**24))
    np.testing.assert_array_equal(nearest_neighbors(x, 2, backend=[Products]), reference.nearest(x, 2))


class Claims:
    """An engine that finds the nearest rows, but the farthest, and says how far at least those it leaves out are."""

    trial, sample = False, 128

    def __init__(self, space, floors):
        self.space, self.floors = space, floors

    def nearest(self, rows, count):
        space, others = self.space, torch.arange(self.space.n)
        exact = torch.stack([space.exact(row.expand(space.n), others) for row in rows])
        exact[torch.arange(len(rows)), rows] = torch.inf
        return -exact.sort().values[:, :count].float(), exact.argsort()[:, :count]

    def least(self, scores, rows):
        least = torch.zeros(scores.shape, dtype=torch.float64)
        if scores.shape[1] > 1:  # of whole lists
            least[:, -1] = self.floors[rows]
        return least

    def most(self, scores, rows):
        return torch.full(scores.shape, torch.inf, dtype=torch.float64)


def test_a_list_is_certain_only_beyond_what_rounding_can_hide(rng):
    x = rng.standard_normal((30, 40))
    space, rows = Space(Rows(x, "x"), torch.arange(30), 1 << 20), torch.arange(30)
    near = space.near(rows.repeat_interleave(30), rows.repeat(30)).view(30, 30).fill_diagonal_(torch.inf)
    far = near.sort(1).values[:, 2]
    wrong = 2.0**-24 * (1.1 * (space.norms + space.norms.max()) + 4 * far)
    floors = far + wrong * torch.tensor([0.9, -1.0, 1.2], dtype=torch.float64)[rows % 3]
    found, _, left = watched(x, 3, [partial(Claims, floors=floors)])
    assert left == [row for row in range(30) if row % 3 < 2]
    np.testing.assert_array_equal(found, reference.nearest(x, 3))


def test_an_engine_that_knows_nothing_has_nothing_but_work_done_for_it(rng):
    class Anything(Claims):
        def nearest(self, rows, count):
            return torch.zeros(len(rows), count), torch.arange(count).expand(len(rows), -1)

    x = make("clustered", 60, 5, rng)
    engine = partial(Anything, floors=torch.zeros(60, dtype=torch.float64))
    np.testing.assert_array_equal(nearest_neighbors(x, 3, backend=[engine]), reference.nearest(x, 3))


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_an_engine_that_lies_is_found_out(factor, rng, caplog):
    class Liar(Products):
        def nearest(self, rows, count):
            scores, positions = super().nearest(rows, count)
            return scores * factor, positions.flip(0)

    certificate.warned.clear()
    x = make("clustered", 200, 5, rng)
    for engines in ([Liar], [Liar, Half, Products]):
        np.testing.assert_array_equal(nearest_neighbors(x, 3, backend=engines), reference.nearest(x, 3))
    assert [record.message for record in caplog.records] == [
        "neighbours are searched without liar: its distances are further off than its arithmetic can be."
    ]


def test_halves_know_what_they_lose(rng):
    x = rng.standard_normal((40, 24))
    space = Space(Rows(x, "x"), torch.arange(40), 1 << 20)
    for dtype in HALVES.values():
        halves, rounded = Half(space, dtype), space.copy.to(dtype).double()
        rest = rounded.square().sum(1) / 2
        for _ in range(3):
            rest -= rest.to(dtype).double()
        residual = rest.abs().max()
        moved = torch.linalg.vector_norm(space.copy - rounded, dim=1) + 2.0**-24 * space.norms
        moved += moved.max()
        lost = 2.0**-23 * 24 * (space.norms + space.norms.max()) ** 2 + 4 * residual
        far, none = torch.full((40, 1), -100.0), torch.zeros(40, 1)
        assert (halves.most(far, space.asking) - halves.least(far, space.asking) >= 2 * moved[:, None]).all()
        assert (halves.most(none, space.asking) >= (lost.sqrt() + moved)[:, None]).all()


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
            values, columns = largest(matrix, count)
            assert torch.equal(values, scores.float().topk(count, dim=1).values)
            assert torch.equal(scores.gather(1, columns).float(), values)
            assert all(len(set(row)) == count for row in columns.tolist())


def test_half_precision_that_decides_little_is_not_used(rng):
    """Rows at all but the same distance from each other; the others of the set are in clusters."""
    alike = (np.eye(400) + 1e-4 * rng.standard_normal((400, 400))).astype(np.float32)
    clusters = np.repeat(alike[:100], 4, axis=0) + 0.01 * rng.standard_normal((400, 400)).astype(np.float32)
    for x, rows in ((alike, [400]), (clusters, [])):
        searched = []
        engines = [partial(Half, dtype=torch.bfloat16), asked(Products, searched)]
        found = nearest_neighbors(x, 3, backend=engines)
        assert [len(rows) for rows in searched] == rows
        np.testing.assert_array_equal(found, reference.nearest(x, 3))


@pytest.mark.parametrize("engines", [[Faiss], [Products], [partial(Half, dtype=torch.bfloat16), Products]])
@pytest.mark.parametrize(("n", "frames"), [(2400, 40), (2400, 200), (4800, 400)])
def test_frames_of_videos_are_told_apart_at_once(n, frames, engines, rng):
    """Groups that rounding cannot tell apart, of more rows than short lists hold: the others stay out of float64."""
    x = videos(n, 64, frames, 0.003, rng)
    space = Space(Rows(x, "x"), torch.arange(len(x)), 32 << 20)
    in_float64 = InFloat64(space)
    found = certified(space, 2, engines, in_float64).numpy()
    assert in_float64.products < 0.1 * n**2
    sample = rng.choice(n, 200, replace=False)
    np.testing.assert_array_equal(found[sample], float64_search(x, 2, sample, unit=False))


def videos(n, d, frames, noise, rng):
    """Unit rows of people, so many frames of each."""
    people = rng.standard_normal((n // frames, d))
    x = np.repeat(people, frames, axis=0) + noise * rng.standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("engine", "memory"), [(Faiss, None), (Products, Memory(1 << 19, copies=False))])
def test_frames_in_any_order_have_the_neighbours_of_float64(engine, memory, rng):
    """In few dimensions the nearest are far nearer than a group is wide, in many hardly; some people have one frame.

    Frames on a line have their nearest at the edge of what can be as near.
    """
    for d, noise, k in ((4, 3e-4, 1), (4, 3e-4, 7), (64, 0.002, 2), (4, 3e-5, 2)):
        x = np.concatenate([videos(1000, d, 100, noise, rng), videos(200, d, 1, noise, rng)])
        if noise == 3e-5:
            x[:1000] = x[:1] + noise * np.arange(1000, dtype=np.float32)[:, None]
        x[700:720] = x[680]
        x = x[rng.permutation(len(x))]
        expected = float64_search(x, k, unit=False)
        np.testing.assert_array_equal(nearest_neighbors(x, k, backend=[engine], max_memory=memory), expected)
        queries = x[::2].copy()
        queries[::4] += (noise * rng.standard_normal((len(queries[::4]), d))).astype(np.float32)
        indices, _ = exact_neighbors(queries, x, k, backend=[engine], max_memory=memory)
        squared = cdist(queries.astype(np.float64), x.astype(np.float64), "sqeuclidean")
        np.testing.assert_array_equal(indices, np.argsort(squared, axis=1, kind="stable")[:, :k])


def test_half_precision_that_is_off_is_not_believed(monkeypatch, rng, caplog):
    x = rng.standard_normal((200, 16)).astype(np.float32)
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: product(a, b) * 1.1)
    certificate.warned.clear()
    found = nearest_neighbors(x, 2, backend=[partial(Half, dtype=torch.bfloat16), Products])
    np.testing.assert_array_equal(found, reference.nearest(x, 2))
    assert "without half: its distances are further off than its arithmetic can be" in caplog.text


@pytest.mark.parametrize(("bfloat16", "expected"), [(0.5, torch.bfloat16), (0.9, None)])
def test_half_precision_must_be_faster(bfloat16, expected, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def product(a, b):
        clock[0] += bfloat16 if a.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(torch, "mm", product)
    assert half_dtype.__wrapped__(torch.device("cpu")) == expected
    assert half_dtype.__wrapped__(torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("kind", ["near copies", "one far row", "nearly one value"])
def test_float64_products_leave_few_pairs_to_gather(kind, rng):
    """What float32 cannot tell apart is multiplied in float64; only what that leaves open is scored pair by pair."""
    x = rng.standard_normal((400, 64)).astype(np.float32)
    if kind == "near copies":
        x[:300] = x[0] + 5e-5 * x[:300]
    elif kind == "one far row":
        x[7] *= 1e4
    else:
        x = (x[:1] + 1e-5 * x).astype(np.float32)
        x[7] *= -1
    found, scored, _ = watched(x, 2, [Products], normalize=kind == "near copies")
    np.testing.assert_array_equal(found, reference.nearest(x, 2, normalize=kind == "near copies"))
    assert sum(map(len, scored)) <= 400 * 6 + 400 * 3


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
    kept, twin = distinct(Rows(x, "x"), 3, 1 << 20)
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
    kept, _ = distinct(Rows(x, "x"), 3, 1 << 20)
    assert kept.tolist() == [0, 1, 2]


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    k=st.integers(1, 45),
    levels=st.integers(1, 4),
    way=st.sampled_from([*WAYS]),
    block_bytes=st.sampled_from([512, 1 << 20]),
    copies=st.booleans(),
)
def test_any_small_set_with_ties(seed, n, d, k, levels, way, block_bytes, copies):
    x = np.random.default_rng(seed).integers(-levels, levels + 1, (n, d)).astype(np.float32)
    found = nearest_neighbors(x, k, backend=WAYS[way], max_memory=Memory(block_bytes, copies))
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
    certificate.warned.clear()
    monkeypatch.setitem(sys.modules, "faiss", types.SimpleNamespace(knn=coarse))
    x = rng.standard_normal((50, 4)).astype(np.float32)
    np.testing.assert_array_equal(nearest_neighbors(x, 2), reference.nearest(x, 2))
    assert "faiss: its distances are further off than its arithmetic can be" in caplog.text
    with pytest.raises(RuntimeError, match="further off than its arithmetic"):
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
        certificate.warned.clear()

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
        assert usable_faiss(gpu=False) is sys.modules["faiss"]
        with pytest.raises(UnusableError, match="Take backend='torch'"):
            usable_faiss(gpu=True)
        whole = types.SimpleNamespace(knn_gpu=None, StandardGpuResources=None, get_num_gpus=lambda: 0)
        monkeypatch.setitem(sys.modules, "faiss", whole)
        with pytest.raises(UnusableError, match="finds no GPU"):
            usable_faiss(gpu=True)


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
