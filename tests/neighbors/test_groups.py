from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pose2id.io.rows import JoinedRows, Rows
from pose2id.neighbors.groups import search_across, search_within
from pose2id.neighbors.search import search

SEARCHES = {True: search_within, False: search_across}


def brute_force(x, groups, k, within):
    found = np.full((len(x), k), -1)
    for i, row in enumerate(x.astype(np.float64)):
        counts = (groups == groups[i]) == within
        counts[i] = False
        others = np.flatnonzero(counts)
        distances = ((x[others].astype(np.float64) - row) ** 2).sum(1)
        nearest = others[np.argsort(distances, kind="stable")[:k]]
        found[i, : len(nearest)] = nearest
    return found


def check(x, groups, k, **options):
    for within, searched in SEARCHES.items():
        found = searched(Rows(x, "x"), torch.from_numpy(groups), k, **options)
        assert found.dtype == torch.int64
        np.testing.assert_array_equal(found.cpu().numpy(), brute_force(x, groups, k, within), err_msg=f"{within}")


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    d=st.integers(1, 4),
    k=st.integers(1, 45),
    number=st.integers(1, 12),
    levels=st.integers(0, 3),
)
def test_any_small_set_with_ties(seed, n, d, k, number, levels):
    rng = np.random.default_rng(seed)
    x = rng.integers(-levels, levels + 1, (n, d)).astype(np.float32)
    check(x, rng.integers(-number, number, n) * 10**17, k)


@pytest.mark.parametrize("groups", ["two", "pairs", "singles and one large", "one"])
@pytest.mark.parametrize("kind", ["clustered", "copies", "near ties"])
def test_groups_of_any_size(kind, groups, rng):
    n = 1300  # small groups are searched a thousand rows at a time
    x = rng.standard_normal((n // 9, 12)).astype(np.float32)[rng.integers(0, n // 9, n)]
    if kind == "clustered":
        x += rng.standard_normal((n, 12)).astype(np.float32)
    elif kind == "copies":
        x[rng.random(n) < 0.6] = x[0]
    else:
        x *= (1 + 1e-7 * rng.standard_normal(x.shape)).astype(np.float32)
    numbers = {
        "two": rng.integers(0, 2, n),
        "pairs": rng.permutation(n) // 2,
        "singles and one large": np.where(rng.random(n) < 0.2, np.arange(n), -1),
        "one": np.zeros(n, dtype=np.int64),
    }
    check(x, numbers[groups], 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_containers_blocks_and_threads(dtype, rng, tmp_path):
    groups = torch.from_numpy(rng.integers(0, 5, 1500))
    features = torch.from_numpy(rng.standard_normal((1500, 16))).to(dtype)
    expected = [searched(Rows(features, "x"), groups, 6) for searched in SEARCHES.values()]
    sets = [Rows(features, "x"), JoinedRows(Rows(features[:400], "x"), Rows(features[400:], "x"))]
    if dtype != torch.bfloat16:
        np.save(tmp_path / "x.npy", features.numpy())
        sets.append(Rows(np.load(tmp_path / "x.npy", mmap_mode="r"), "x"))
    for rows in sets:
        for memory in (None, 2 << 20):
            for searched, wanted in zip(SEARCHES.values(), expected, strict=True):
                assert torch.equal(searched(rows, groups, 6, "torch", memory), wanted)


def test_order_and_names_of_rows_and_groups(rng):
    x, groups = rng.standard_normal((300, 8)), rng.integers(0, 7, 300)
    order = rng.permutation(300)
    for searched in SEARCHES.values():
        found = searched(Rows(x, "x"), torch.from_numpy(groups), 5)
        renamed = searched(Rows(x[order], "x"), torch.from_numpy(-(3**groups))[order], 5)
        assert torch.equal(torch.from_numpy(order)[renamed], found[order])


@pytest.mark.parametrize("copies", [0, 4000])
def test_thousands_of_groups_cost_no_more_products_than_one_search(copies, rng, monkeypatch):
    x, groups = rng.standard_normal((6000, 8)).astype(np.float32), torch.from_numpy(rng.permutation(6000) // 2)
    sizes = []

    def counting(product):
        def counted(*arguments, **options):
            block = product(*arguments, **options)
            sizes.append(block.numel())
            return block

        return counted

    search(Rows(x[:100], "x"), 3, "torch")  # the first measures how fast processors are
    monkeypatch.setattr(torch, "addmm", counting(torch.addmm))
    monkeypatch.setattr(torch, "mm", counting(torch.mm))
    search(Rows(x, "x"), 3, "torch")
    number, pairs = len(sizes), sum(sizes)
    x[:copies] = x[0]
    sizes.clear()
    search_across(Rows(x, "x"), groups, 3)
    assert len(sizes) <= number
    assert sum(sizes) <= pairs
    sizes.clear()
    search_within(Rows(x, "x"), groups, 3)
    assert len(sizes) <= number
    assert sum(sizes) <= pairs / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"backend": "faiss"}, "backend must be one of 'auto', 'torch'"), ({"max_memory": 100}, "max_memory must be at")],
)
def test_bad_input(options, message):
    for searched in SEARCHES.values():
        with pytest.raises(ValueError, match=message):
            searched(Rows(np.eye(4), "x"), torch.arange(4), 1, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("levels", [0, 3])
def test_cuda_equals_cpu(levels, rng):
    x, groups = torch.from_numpy(rng.standard_normal((700, 12))), torch.from_numpy(rng.integers(0, 300, 700))
    x = torch.round(x * levels) if levels else x
    for number in (groups, groups % 3):
        for searched in SEARCHES.values():
            found = searched(Rows(x.cuda(), "x"), number, 9)
            assert found.is_cuda
            assert torch.equal(found.cpu(), searched(Rows(x, "x"), number, 9))
