"""Nearest rows among members of a set, against a sort of all distances."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import parts as literal
from reference import unit

from pose2id.io.rows import Rows
from pose2id.neighbors.members import Compared, merged


def brute_force(asking, x, k, members, own=None):
    """Lists and cosines of unit rows; `own`: the index in x of each asking row, which is not on its own list."""
    indices, cosines = np.full((len(asking), k), -1), np.full((len(asking), k), -np.inf)
    for i, row in enumerate(asking):
        others = np.array([j for j in members if own is None or j != own[i]], dtype=int)
        squared = ((x[others] - row) ** 2).sum(1)
        order = np.argsort(squared, kind="stable")[:k]
        indices[i, : len(order)] = others[order]
        cosines[i, : len(order)] = x[others[order]] @ row
    return indices, cosines


def compared(x, dtype=torch.float64, **options):
    return Compared(Rows(torch.from_numpy(x).to(dtype), "x", normalize=True), **options)


def check(found, expected, atol=1e-12):
    indices, similarities = found
    assert indices.dtype == torch.int64
    assert similarities.dtype == torch.float64
    np.testing.assert_array_equal(indices.cpu().numpy(), expected[0])
    np.testing.assert_allclose(similarities.cpu().numpy(), expected[1], atol=atol, rtol=0)


def chosen(rng, n, share):
    """Ascending indices of some rows."""
    return np.flatnonzero(rng.random(n) < share)


# Unit rows, and a zero row, whose distances are exact in binary: what ties, ties.
EXACT = np.concatenate([np.eye(4), -np.eye(4), np.zeros((1, 4)), np.array(list(product([-0.5, 0.5], repeat=4)))])


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 30),
    kinds=st.integers(1, len(EXACT)),
    k=st.integers(1, 35),
    shares=st.tuples(*[st.sampled_from([0.0, 0.3, 0.7, 1.0])] * 2),
)
def test_any_small_set_with_zero_rows_and_copies(seed, n, kinds, k, shares):
    rng = np.random.default_rng(seed)
    pool = rng.permutation(EXACT)[:kinds]
    z, y = (pool[rng.integers(kinds, size=count)] for count in (n, 3))
    x, q = (rows * rng.choice([1.0, 2.0], (len(rows), 1)) for rows in (z, y))
    members, asking = (chosen(rng, n, share) for share in shares)
    searched, everybody = compared(x), np.arange(n)
    check(searched.nearest(k), brute_force(z, z, k, everybody, everybody))
    among, of = torch.from_numpy(members), torch.from_numpy(asking)
    check(searched.nearest(k, among), brute_force(z, z, k, members, everybody))
    check(searched.nearest(k, among, of), brute_force(z[asking], z, k, members, asking))
    check(searched.nearest(k, None, of), brute_force(z[asking], z, k, everybody, asking))
    queries = Rows(q, "q", normalize=True)
    check(searched.nearest_to(queries, k), brute_force(y, z, k, everybody))
    check(searched.nearest_to(queries, k, among), brute_force(y, z, k, members))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_memory", [None, 1 << 20])
def test_blocks_and_precisions(dtype, max_memory, rng):
    x = torch.from_numpy(rng.normal(size=(400, 24))).to(dtype)
    rows = Rows(x, "x", normalize=True)
    z = unit(x.double().numpy())
    members, asking = chosen(rng, 400, 0.4), chosen(rng, 400, 0.5)
    searched = Compared(rows, None, "torch", max_memory)
    found = searched.nearest(9, torch.from_numpy(members), torch.from_numpy(asking))
    check(found, brute_force(z[asking], z, 9, members, asking), 1e-6)
    found = searched.nearest_to(Rows(x[:50], "q", normalize=True), 9, torch.from_numpy(members))
    check(found, brute_force(z[:50], z, 9, members), 1e-6)


def test_what_is_kept_is_what_is_found(rng):
    x, members = rng.normal(size=(60, 8)), torch.arange(0, 60, 2)
    fresh = [compared(x).nearest(k, members) for k in (5, 8, 20)]
    searched = compared(x)
    check(searched.nearest(20, members, keep=8), [values.numpy() for values in fresh[2]])
    for k, expected in zip((5, 8, 20), fresh, strict=True):  # the last is longer than what was kept
        check(searched.nearest(k, members), [values.numpy() for values in expected])
    others = members + 1
    check(searched.nearest(5, others), [values.numpy() for values in compared(x).nearest(5, others)])
    some = torch.arange(4)
    check(searched.nearest(5, members, some), [values[:4].numpy() for values in fresh[0]])


@pytest.mark.parametrize(("n", "dim", "k"), [(50, 33, 49), (301, 512, 51)])  # one block, and blocks of 20 rows
def test_a_pair_has_one_similarity_from_both_sides(n, dim, k, rng):
    """Exactly: links are counted by who is as near as whom."""
    x = rng.normal(size=(n, dim))
    parts = Rows(x[:, : dim // 3 * 3].reshape(n, 3, -1), "x", normalize=True, parts=True)
    visible = torch.from_numpy(rng.random((n, 3)))
    for searched in (compared(x, torch.float32), compared(x), Compared(parts), Compared(parts, visible)):
        dense = torch.full((n, n), torch.nan, dtype=torch.float64).scatter_(1, *searched.nearest(k))
        listed = dense.isfinite() & dense.T.isfinite()
        assert listed.sum() > n
        assert torch.equal(dense[listed], dense.T[listed])


@pytest.mark.parametrize("k", [4, 40])
def test_by_visible_parts(k, rng):
    x, q = rng.normal(size=(30, 3, 5)), rng.normal(size=(6, 3, 5))
    u, v = (rng.random((n, 3)) * (rng.random((n, 3)) < 0.6) for n in (30, 6))
    u[4], v[2] = 0, 0  # these share nothing with anybody
    z, y = literal.unit(x), literal.unit(q)

    def expected(asking, shown, own):
        indices, cosines = np.full((len(asking), k), -1), np.full((len(asking), k), -np.inf)
        for i in range(len(asking)):
            distances = [(literal.distance(asking[i], z[j], shown[i], u[j]), j) for j in range(30) if j != own[i]]
            for at, (d, j) in enumerate(sorted(distances)[:k]):
                indices[i, at], cosines[i, at] = j, 1 - min(d, 2) ** 2 / 2
        return indices, cosines

    searched = Compared(Rows(x, "x", normalize=True, parts=True), torch.from_numpy(u))
    check(searched.nearest(k), expected(z, u, range(30)), 1e-6)
    found = searched.nearest_to(Rows(q, "q", normalize=True, parts=True), k, None, torch.from_numpy(v))
    check(found, expected(y, v, [-1] * 6), 1e-6)


def test_parts_in_one_vector(rng):
    x = rng.normal(size=(20, 3, 4))
    z = literal.unit(x)
    z[3, 1] = x[3, 1] = 0  # a zero part is at a right angle to all
    indices, similarities = Compared(Rows(x, "x", normalize=True, parts=True)).nearest(6)
    flat = z.reshape(20, 12)
    wanted = brute_force(flat, flat, 6, np.arange(20), np.arange(20))
    check((indices, similarities), (wanted[0], wanted[1] / 3))


def test_lists_of_groups_are_merged_into_those_of_all(rng):
    x = np.repeat(rng.normal(size=(12, 6)), 3, axis=0)
    groups = [torch.arange(at, 36, 3) for at in range(3)]
    searched = compared(x)
    found = merged([searched.nearest(9, members) for members in groups], 9)
    check(found, [values.numpy() for values in searched.nearest(9)])


@pytest.mark.gpu
@pytest.mark.parametrize("levels", [0, 2])
def test_cuda_equals_cpu(levels, rng):
    x = torch.from_numpy(rng.normal(size=(300, 10)) * (levels or 1))
    x = x.round() if levels else x
    members, asking = (torch.from_numpy(chosen(rng, 300, 0.5)) for _ in range(2))
    here = Compared(Rows(x, "x", normalize=True)).nearest(7, members, asking)
    found = Compared(Rows(x.cuda(), "x", normalize=True)).nearest(7, members.cuda(), asking.cuda())
    assert found[0].is_cuda
    check(found, [values.numpy() for values in here])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_members_by_products(dtype, rng, monkeypatch):
    monkeypatch.setattr("pose2id.neighbors.members.BLOCK_BYTES", 1 << 16)  # several blocks
    x, q = rng.normal(size=(2, 150, 24))
    members = chosen(rng, 150, 0.3)
    searched, queries = compared(x, dtype), Rows(torch.from_numpy(q).to(dtype), "q", normalize=True)
    k, among, atol = (
        len(members) // 4,
        torch.from_numpy(members),
        1e-6 if dtype == torch.float32 else 1e-12,
    )
    check(searched.nearest_of_few(k, among), searched.nearest(k, among), atol)
    check(searched.nearest_of_few(k, among, queries), searched.nearest_to(queries, k, among), atol)
