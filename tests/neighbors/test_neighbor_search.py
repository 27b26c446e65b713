"""The door for other searches: our own through it, faiss's, and what is wrong with a caller's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_neighbors import KINDS, WAYS, make

from pose2id import nearest_neighbors
from pose2id.io.rows import Rows
from pose2id.neighbors.search import Memory, exact_neighbors, neighbors_of_rows


def literal(queries, rows, k):
    """Query by query, row by row, in float64."""
    indices, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.inf)
    for i, query in enumerate(queries.astype(np.float64)):
        all_of_it = sorted((float(((query - row) ** 2).sum()), j) for j, row in enumerate(rows.astype(np.float64)))
        for rank, (squared, j) in enumerate(all_of_it[:k]):
            indices[i, rank], distances[i, rank] = j, squared**0.5
    return indices, distances


def faiss_search(queries, rows, k):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(rows.shape[1])
    index.add(rows)
    squared, indices = index.search(queries, k)
    return indices, np.sqrt(squared)


class TestExactNeighbors:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("way", WAYS)
    def test_equals_the_literal_search(self, kind, way, rng):
        rows = make(kind, 90, 12, rng)
        other = make(kind, 25, 12, rng)
        other[:5] = rows[40:45]
        for queries in (rows, rows[::4].copy(), other):
            for k, memory in ((1, None), (7, Memory(1 << 15, copies=True)), (7, Memory(1 << 15, copies=False))):
                indices, distances = exact_neighbors(queries, rows, k, backend=WAYS[way], max_memory=memory)
                expected = literal(queries, rows, k)
                np.testing.assert_array_equal(indices, expected[0])
                np.testing.assert_allclose(distances, expected[1], rtol=2e-7)
                assert distances.dtype == np.float32

    @pytest.mark.parametrize("same", [True, False])
    def test_fewer_rows_than_asked_for(self, same, rng):
        rows = rng.standard_normal((3, 4))
        queries = rows if same else rows[1:].copy()
        indices, distances = exact_neighbors(queries, rows, 5)
        expected = literal(queries, rows, 5)
        np.testing.assert_array_equal(indices, expected[0])
        np.testing.assert_allclose(distances, expected[1], rtol=1e-15)

    def test_many_copies_of_rows_and_queries(self, rng):
        rows = np.repeat(rng.standard_normal((3, 8)).astype(np.float32), 1000, axis=0)[rng.permutation(3000)]
        expected = literal(rows[:6], rows, 4)[0]
        np.testing.assert_array_equal(exact_neighbors(rows, rows, 4)[0][:6], expected)
        np.testing.assert_array_equal(exact_neighbors(rows[:6], rows, 4)[0], expected)

    @pytest.mark.parametrize("size", [1e-200, 1e200])
    def test_values_of_any_size(self, size, rng):
        rows, queries = rng.standard_normal((40, 3)), rng.standard_normal((9, 3))
        indices, distances = exact_neighbors(queries * size, rows * size, 3)
        expected = literal(queries, rows, 3)
        np.testing.assert_array_equal(indices, expected[0])
        np.testing.assert_allclose(distances / size, expected[1], rtol=1e-14)

    def test_containers(self, rng):
        rows, queries = (torch.from_numpy(rng.standard_normal((n, 4))).half() for n in (20, 6))
        before = rows.clone(), queries.clone()
        for found in (exact_neighbors(queries, rows, 2), exact_neighbors(rows, rows, 2)):
            assert [x.dtype for x in found] == [torch.int64, torch.float32]
        assert [type(x) for x in exact_neighbors(queries.numpy(), rows.numpy(), 2)] == [np.ndarray] * 2
        assert torch.equal(rows, before[0])
        assert torch.equal(queries, before[1])

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"k": 0}, ValueError, "k must be at least 1"),
            ({"queries": np.ones((2, 5))}, ValueError, "queries and rows must have the same number of columns"),
            ({"queries": np.ones((0, 3))}, ValueError, "queries must hold at least one row"),
            ({"rows": np.ones((0, 3))}, ValueError, "rows must hold at least one row"),
            ({"rows": [[1.0]]}, TypeError, "rows must be a numpy array"),
            ({"queries": np.full((2, 3), np.nan)}, ValueError, "queries must be finite"),
            ({"backend": "gpu"}, ValueError, "backend must be one of"),
            ({"max_memory": 5}, ValueError, "max_memory must be at least"),
        ],
    )
    def test_bad_input(self, arguments, error, message):
        with pytest.raises(error, match=message):
            exact_neighbors(**{"queries": np.ones((2, 3)), "rows": np.ones((4, 3)), "k": 1, **arguments})

    @pytest.mark.gpu
    def test_cuda_equals_cpu(self, rng):
        rows, queries = (torch.from_numpy(rng.standard_normal((n, 32))).float() for n in (300, 40))
        for asking in (rows, queries):
            expected = exact_neighbors(asking, rows, 5)
            on_gpu = rows.cuda()
            found = exact_neighbors(on_gpu if asking is rows else asking.cuda(), on_gpu, 5)
            assert all(x.is_cuda for x in found)
            assert torch.equal(found[0].cpu(), expected[0])
            torch.testing.assert_close(found[1].cpu(), expected[1])


class TestNeighborsOfRows:
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize(
        ("search", "kind"),
        # Sums in another order tell some of the others apart.
        [
            *((exact_neighbors, kind) for kind in KINDS),
            (literal, "random"),
            (literal, "clustered"),
            (literal, "copies"),
        ],
    )
    def test_exact_ones_are_those_of_nearest_neighbors(self, search, normalize, kind, rng):
        x = make(kind, 60, 5, rng)
        for k in (1, 3, 200):
            rows = Rows(x.astype(np.float64), "x", normalize=normalize)
            found = neighbors_of_rows(rows, k, search)
            np.testing.assert_array_equal(found, nearest_neighbors(x.astype(np.float64), k, normalize=normalize))

    @pytest.mark.parametrize("k", [2, 7])
    def test_faiss(self, k, rng):
        x = rng.standard_normal((300, 16)).astype(np.float32)
        found = neighbors_of_rows(Rows(x, "x", normalize=True), k, faiss_search)
        np.testing.assert_array_equal(found, nearest_neighbors(x, k, normalize=True))

    def test_copies_that_push_a_row_off_its_list(self):
        x = np.zeros((6, 2), np.float32)
        found = neighbors_of_rows(
            Rows(x, "x"), 2, lambda queries, rows, k: (np.tile([0, 1, 2], (6, 1)), np.zeros((6, 3)))
        )
        assert found.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]

    def test_missing_ones_stay_missing(self):
        lists = torch.tensor([[0, 2, -1], [-1, -1, -1], [2, -1, -1], [1, 0, 2]])
        found = neighbors_of_rows(Rows(torch.rand(4, 2), "x"), 2, lambda queries, rows, k: (lists, torch.zeros(4, 3)))
        assert found.tolist() == [[2, -1], [-1, -1], [-1, -1], [1, 0]]
        assert found.dtype == torch.int64

    @pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, torch.float16, torch.float64])
    def test_it_is_asked_once_with_all_rows_in_one_container(self, kind, rng):
        asked = []

        def search(queries, rows, k):
            asked.append((queries, rows, k))
            return exact_neighbors(queries, rows, k)

        x = rng.standard_normal((9, 4))
        x = x.astype(kind) if isinstance(kind, type) else torch.from_numpy(x).to(kind)
        neighbors_of_rows(Rows(x, "x", normalize=True), 20, search)
        (queries, rows, k), *others = asked
        assert not others
        assert k == 9
        assert type(queries) is type(rows) is type(x)
        np.testing.assert_allclose(np.linalg.norm(np.asarray(rows), axis=1), 1, rtol=1e-6)

    @pytest.mark.parametrize("n", [0, 1])
    def test_nobody_else(self, n):
        assert neighbors_of_rows(Rows(np.ones((n, 2)), "x"), 3, None).shape == (n, 0)

    @pytest.mark.parametrize(
        ("returned", "error", "message"),
        [
            (np.zeros((4, 3), int), TypeError, r"neighbors must return \(indices, distances\), got ndarray"),
            (
                (np.zeros((4, 2), int), np.zeros((4, 3))),
                ValueError,
                r"indices of shape \(4, 3\), a list per query, got \(4, 2\)",
            ),
            ((np.arange(12).reshape(4, 3) % 4, np.zeros((4, 2))), ValueError, r"distances of shape \(4, 3\)"),
            ((np.zeros((4, 3)), np.zeros((4, 3), int)), TypeError, "integer indices first, got torch.float64"),
            ((np.full((4, 3), 4), np.zeros((4, 3))), ValueError, r"indices in \[-1, 4\), got 4 to 4"),
            ((np.full((4, 3), -2), np.zeros((4, 3))), ValueError, r"indices in \[-1, 4\)"),
            ((np.zeros((4, 3), int), np.zeros((4, 3))), ValueError, "each row at most once"),
            ((np.zeros((4, 3), int), np.tile([3.0, 2.0, 1.0], (4, 1))), ValueError, "nearest first, got distances"),
        ],
    )
    def test_what_is_no_search(self, returned, error, message):
        with pytest.raises(error, match=message):
            neighbors_of_rows(Rows(np.ones((4, 2)), "x"), 2, lambda queries, rows, k: returned)
