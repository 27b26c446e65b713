from __future__ import annotations

import os

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import parts as literal
from test_part_distances import BAD_VISIBILITY, VISIBILITY, visibility

from pose2id import (
    Centralizer,
    GenerationDiagnostics,
    evidence,
    fuse,
    generation_diagnostics,
    nearest_neighbors,
    nfc,
    nfc_diagnostics,
)
from pose2id.centralization import nfc as centralization
from pose2id.neighbors.search import exact_neighbors

GOLDEN_PARAMETERS = [(1, 1), (2, 2), (2, 4), (4, 2), (5, 5)]


class TestGolden:
    @pytest.mark.parametrize(("k1", "k2"), GOLDEN_PARAMETERS)
    def test_algorithm_1(self, golden, k1, k2, backend):
        data = golden("nfc_id2")
        found = nfc(data["feats"], k1, k2, normalize=False, backend=backend)
        np.testing.assert_allclose(found, data[f"nfc_paper_{k1}_{k2}"], atol=2e-6)

    @pytest.mark.parametrize(("k1", "k2"), GOLDEN_PARAMETERS)
    def test_the_published_code_looks_no_further_than_k1(self, golden, k1, k2, backend):
        data = golden("nfc_id2")
        found = nfc(data["feats"], k1, min(k1, k2), backend=backend)
        np.testing.assert_allclose(found, data[f"nfc_demo_{k1}_{k2}"], atol=2e-7)
        if k2 > k1:
            assert np.abs(nfc(data["feats"], k1, k2, backend=backend) - data[f"nfc_demo_{k1}_{k2}"]).max() > 0.1


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (2, 2), (3, 7), (7, 3), (200, 200)])
def test_equals_the_literal_algorithm(k1, k2, normalize, backend, rng):
    x = rng.standard_normal((90, 24)).astype(np.float32)
    x[40:60] = x[:20]
    found = nfc(x, k1, k2, normalize=normalize, backend=backend)
    np.testing.assert_allclose(found, reference.nfc(x, k1, k2, normalize), atol=2e-6 if normalize else 5e-5)


def test_backends_and_blocks_give_the_same_bits(rng):
    x = rng.standard_normal((4000, 32)).astype(np.float32)
    x[1000:1500] = x[:500]
    expected = nfc(x, 3, 2, backend="torch")
    for backend, max_memory in (("faiss", 8 << 20), ("torch", 8 << 20), ("torch", 3 << 20)):
        np.testing.assert_array_equal(nfc(x, 3, 2, backend=backend, max_memory=max_memory), expected)


class TestEdgeCases:
    def test_no_rows(self):
        assert nfc(np.empty((0, 4), np.float32)).shape == (0, 4)
        assert nfc(torch.empty((0, 4))).shape == (0, 4)

    def test_one_row_is_only_normalised(self):
        np.testing.assert_allclose(nfc(np.array([[3.0, 4.0]])), [[0.6, 0.8]])
        np.testing.assert_array_equal(nfc(np.array([[3.0, 4.0]]), normalize=False), [[3.0, 4.0]])

    def test_two_rows_are_each_others_neighbours(self):
        np.testing.assert_allclose(nfc(np.array([[2.0, 0.0], [0.0, 1.0]])), np.full((2, 2), 0.5**0.5))

    def test_k_beyond_n_means_all_others(self, rng):
        x = rng.standard_normal((5, 3))
        np.testing.assert_allclose(nfc(x, 99, 99, normalize=False), np.tile(x.sum(0), (5, 1)))

    def test_exact_copies_are_neighbours_and_ties_go_to_the_lower_index(self, backend):
        x = np.repeat(np.array([[1.0, 0.0], [0.0, 1.0]]), 4, axis=0)
        # Everyone proposes copy 0 (copy 0 proposes 1), so only 0 and 1 are mutual.
        found = nfc(x, 1, 1, normalize=False, backend=backend)
        np.testing.assert_array_equal(found[:, 0], [2, 2, 1, 1, 0, 0, 0, 0])
        np.testing.assert_array_equal(found[:, 1], [0, 0, 0, 0, 2, 2, 1, 1])

    def test_zero_rows_are_compared_as_the_zero_vector(self, backend):
        x = np.array([[0.0, 0.0], [1.0, 0.0], [0.99, 0.1], [0.0, 0.0]])
        found = nfc(x, 1, 1, backend=backend)
        np.testing.assert_array_equal(found[[0, 3]], 0)
        np.testing.assert_allclose(found, reference.nfc(x, 1, 1), atol=1e-12)

    def test_a_lone_zero_row_takes_its_mutual_neighbours(self):
        found = nfc(np.array([[0.0, 0.0], [-1.0, 0.0]]), 1, 1)
        np.testing.assert_allclose(found, [[-1, 0], [-1, 0]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_largest_and_smallest_numbers(dtype, rng):
    x = rng.uniform(0.5, 1, (6, 4)).astype(dtype)
    expected = nfc(x)
    for size in (3e38, 1e-38) if dtype == np.float32 else (1e299, 1e-299):
        np.testing.assert_allclose(nfc(x * dtype(size)), expected, atol=1e-6)


def test_k_of_all_others_is_not_quadratic_in_k(rng):
    x = rng.standard_normal((300, 4))
    np.testing.assert_allclose(nfc(x, 299, 299, normalize=False), np.tile(x.sum(0), (300, 1)), atol=1e-9)


class TestContainers:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_numpy_in_numpy_out(self, dtype, rng):
        x = rng.standard_normal((50, 8)).astype(dtype)
        before = x.copy()
        found = nfc(x)
        assert type(found) is np.ndarray
        assert found.dtype == dtype
        np.testing.assert_array_equal(x, before)
        np.testing.assert_allclose(found, reference.nfc(x, 2, 2), atol=4 * float(np.finfo(dtype).eps))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_torch_in_torch_out(self, dtype, rng):
        x = torch.from_numpy(rng.standard_normal((50, 8))).to(dtype).requires_grad_()
        found = nfc(x)
        assert found.dtype == dtype
        assert not found.requires_grad
        expected = reference.nfc(x.detach().double().numpy(), 2, 2)
        np.testing.assert_allclose(found.double().numpy(), expected, atol=4 * torch.finfo(dtype).eps)

    def test_memory_layouts(self, rng, tmp_path):
        x = rng.standard_normal((60, 8)).astype(np.float32)
        expected = nfc(x)
        np.save(tmp_path / "x.npy", x)
        read_only = x.copy()
        read_only.flags.writeable = False
        wide = np.zeros((60, 16), np.float32)
        wide[:, ::2] = x
        for other in (
            np.load(tmp_path / "x.npy", mmap_mode="r"),
            read_only,
            np.asfortranarray(x),
            wide[:, ::2],
            x[::-1][::-1],
            x.astype(">f4"),
        ):
            np.testing.assert_array_equal(nfc(other), expected)
        assert nfc(x.astype(">f4")).dtype == ">f4"
        np.testing.assert_array_equal(nfc(x.astype(">f8")), nfc(x.astype(np.float64)))
        np.testing.assert_array_equal(nfc(torch.from_numpy(wide)[:, ::2]).numpy(), expected)
        np.testing.assert_array_equal(nfc(x[::-1])[::-1], expected)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_cuda_in_cuda_out(self, dtype, rng):
        x = torch.from_numpy(rng.standard_normal((500, 64))).to("cuda", dtype)
        found = nfc(x)
        assert found.is_cuda
        np.testing.assert_allclose(found.cpu().float(), nfc(x.cpu()).float(), atol=4 * torch.finfo(dtype).eps)


class TestParts:
    @pytest.mark.parametrize("seen", VISIBILITY)
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize(("k1", "k2"), [(1, 1), (2, 4), (4, 2), (99, 99)])
    def test_equals_the_literal_algorithm(self, k1, k2, normalize, seen, rng):
        x = rng.standard_normal((40, 3, 8)).astype(np.float32)
        x[20:30] = x[:10]
        x[5, 1] = 0
        given, weights = visibility(seen, (40, 3), rng)
        before = x.copy()
        found = nfc(x, k1, k2, visibility=given, normalize=normalize)
        np.testing.assert_array_equal(x, before)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, literal.nfc(x, weights, k1, k2, normalize), atol=1e-6 if normalize else 3e-5)
        as_tensor = nfc(
            torch.from_numpy(x),
            k1,
            k2,
            visibility=None if given is None else torch.from_numpy(given),
            normalize=normalize,
            backend="torch",
            max_memory=1 << 20,
        )
        np.testing.assert_array_equal(as_tensor.numpy(), found)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_shape_and_dtype_stay(self, dtype, rng):
        x = torch.from_numpy(rng.standard_normal((30, 4, 6))).to(dtype)
        v = rng.random((30, 4)) < 0.6
        found = nfc(x, visibility=v)
        assert (found.shape, found.dtype) == (x.shape, dtype)
        expected = literal.nfc(x.double().numpy(), v, 2, 2)
        np.testing.assert_allclose(found.double(), expected, atol=4 * torch.finfo(dtype).eps)

    def test_a_hidden_part_is_not_added_but_takes_part(self):
        x = np.array([[[1.0, 0], [1, 0]], [[1, 0], [0, 1]], [[-1, 0], [0, -1]]])
        v = np.array([[True, True], [True, False], [True, True]])
        np.testing.assert_allclose(
            nfc(x, 1, 1, visibility=v, normalize=False), [x[0] + [[1, 0], [0, 0]], x[1] + x[0], x[2]]
        )
        weights = np.array([[1, 1], [1, 0.25], [1, 1]])
        found = nfc(x, 1, 1, visibility=weights, normalize=False)
        np.testing.assert_allclose(found, [x[0] + [[1, 0], [0, 0.25]], x[1] + x[0], x[2]])

    def test_images_that_show_nothing_in_common_are_no_neighbours(self, rng):
        x = rng.standard_normal((6, 2, 3))
        v = np.array([[1, 0], [0, 0], [1, 0], [0, 1], [0, 0], [0, 1]], bool)
        found = nfc(x, 5, 5, visibility=v, normalize=False)
        alone = [1, 4]
        np.testing.assert_array_equal(found[alone], x[alone])
        for i, j in ((0, 2), (3, 5)):
            np.testing.assert_allclose(found[i], x[i] + v[j, :, None] * x[j])
            np.testing.assert_allclose(found[j], x[j] + v[i, :, None] * x[i])

    @given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
    def test_lists_that_end_early_name_nobody(self, seed, k1, k2):
        rng = np.random.default_rng(seed)
        lists = [rng.permutation([j for j in range(8) if j != i])[: rng.integers(0, 8)].tolist() for i in range(8)]
        neighbors = torch.tensor([row + [-1] * (7 - len(row)) for row in lists])
        found = centralization.mutual_neighbors(neighbors, k1, k2)
        for i, row in enumerate(lists):
            expected = [j for j in row[:k1] if i in lists[j][:k2]]
            assert neighbors[i, :k1][found[i]].tolist() == expected

    def test_flattened_is_what_the_published_code_computes(self, rng, backend):
        x = rng.standard_normal((60, 3, 4)).astype(np.float32)
        z = literal.unit(x)
        sums = reference.nfc(z.reshape(60, 12), 3, 3, normalize=False).reshape(x.shape)
        found = nfc(x, 3, 3, part_distance="flattened", backend=backend)
        np.testing.assert_allclose(found, literal.unit(sums), atol=1e-6)
        assert np.abs(found - nfc(x, 3, 3)).max() > 0.1

    def test_one_part_is_a_whole_feature(self, rng, backend):
        x = rng.standard_normal((50, 6)).astype(np.float32)
        expected = nfc(x, 3, 2, backend=backend)
        np.testing.assert_array_equal(nfc(x[:, None], 3, 2, backend=backend)[:, 0], expected)
        np.testing.assert_array_equal(nfc(x[:, None], 3, 2, visibility=np.ones((50, 1)))[:, 0], expected)
        np.testing.assert_array_equal(nfc(x, 3, 2, part_distance="flattened", backend=backend), expected)

    def test_no_rows_and_one_row(self):
        v = np.ones((1, 2), bool)
        assert nfc(np.empty((0, 2, 4)), visibility=v[:0]).shape == (0, 2, 4)
        np.testing.assert_allclose(nfc(np.array([[[3.0, 4], [0, 0]]]), visibility=v), [[[0.6, 0.8], [0, 0]]])

    def test_memory_layouts(self, rng, tmp_path):
        x = rng.standard_normal((40, 3, 8)).astype(np.float32)
        v = rng.random((40, 3)) < 0.7
        expected = nfc(x, visibility=v)
        np.save(tmp_path / "x.npy", x)
        for other in (np.load(tmp_path / "x.npy", mmap_mode="r"), np.asfortranarray(x), x[::-1][::-1], x.astype(">f4")):
            np.testing.assert_array_equal(nfc(other, visibility=v), expected)
        transposed = torch.from_numpy(x).transpose(0, 1).contiguous().transpose(0, 1)
        np.testing.assert_array_equal(nfc(transposed, visibility=np.asfortranarray(v)).numpy(), expected)

    @pytest.mark.parametrize(("given", "error", "message"), BAD_VISIBILITY)
    def test_bad_visibility(self, given, error, message):
        with pytest.raises(error, match=f"visibility {message}"):
            nfc(np.ones((3, 2, 4)), visibility=given)

    @pytest.mark.parametrize(
        ("shape", "arguments", "error", "message"),
        [
            ((3, 2), {"visibility": np.ones((3, 1))}, ValueError, "visibility must be None for whole features"),
            ((3, 2), {"visibility": np.ones((3, 2))}, ValueError, "visibility must be None for whole features"),
            ((3, 2, 2), {"part_distance": "mean"}, ValueError, "part_distance must be one of 'visible', 'flattened'"),
            (
                (3, 2, 2),
                {"part_distance": "flattened", "visibility": np.ones((3, 2))},
                ValueError,
                "visibility must be None with part_distance='flattened'",
            ),
            ((3, 2, 2), {"backend": "faiss"}, ValueError, "backend must be 'auto' or 'torch'"),
            ((3, 2, 2), {"backend": "annoy"}, ValueError, "backend must be one of"),
            ((3, 2, 2), {"max_memory": 5}, ValueError, "max_memory must be at least"),
        ],
    )
    def test_bad_combinations(self, shape, arguments, error, message):
        with pytest.raises(error, match=message):
            nfc(np.ones(shape), **arguments)

    @pytest.mark.gpu
    @pytest.mark.parametrize("seen", VISIBILITY)
    def test_cuda_equals_cpu(self, seen, rng):
        x = torch.from_numpy(rng.standard_normal((300, 4, 32))).float()
        given, _ = visibility(seen, (300, 4), rng)
        found = nfc(x.cuda(), visibility=given)
        assert found.is_cuda
        np.testing.assert_allclose(found.cpu(), nfc(x, visibility=given), atol=1e-6)


class TestOwnSearch:
    @staticmethod
    def searched(queries, rows, k):
        """Distances of all pairs, sorted: numpy in, numpy out."""
        distances = np.linalg.norm(queries[:, None].astype(float) - rows[None], axis=2)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return order, np.take_along_axis(distances, order, 1)

    @pytest.mark.parametrize("normalize", [True, False])
    def test_equals_the_search_of_the_library(self, rng, normalize):
        x = rng.standard_normal((60, 7)).astype(np.float32)
        expected = nfc(x, 3, 2, normalize=normalize)
        np.testing.assert_array_equal(nfc(x, 3, 2, normalize=normalize, neighbors=self.searched), expected)
        np.testing.assert_array_equal(nfc(x, 3, 2, normalize=normalize, neighbors=exact_neighbors), expected)

    @pytest.mark.filterwarnings("ignore:method='nfc' may harm here")
    def test_a_centralizer_asks_it(self, rng):
        q, g = rng.standard_normal((9, 7)), rng.standard_normal((30, 7))
        asked = []

        def search(queries, rows, k):
            asked.append(len(rows))
            return self.searched(queries, rows, k)

        found = Centralizer(method="nfc", neighbors=search).enhance(q, g)
        assert asked == [9, 30]
        for enhanced, x in zip(found, (q, g), strict=True):
            np.testing.assert_array_equal(enhanced, nfc(x))
        joint = Centralizer(method="nfc", neighbors=search).enhance(q, g, joint=True)  # numpy again, as `search` needs
        for enhanced, x in zip(joint, Centralizer(method="nfc").enhance(q, g, joint=True), strict=True):
            np.testing.assert_array_equal(enhanced, x)

    def test_diagnostics_describe_what_it_finds(self, rng):
        x = rng.standard_normal((40, 7))
        assert nfc_diagnostics(x, 3, 2, neighbors=self.searched) == nfc_diagnostics(x, 3, 2)

    def test_tensors_and_parts_in_one_vector(self, rng):
        x = torch.from_numpy(rng.standard_normal((40, 3, 4))).float()

        def search(queries, rows, k):
            assert queries is rows
            distances, indices = torch.cdist(queries.double(), rows.double()).topk(k, largest=False)
            return indices, distances

        found = nfc(x, 3, 3, part_distance="flattened", neighbors=search)
        assert torch.equal(found, nfc(x, 3, 3, part_distance="flattened"))

    def test_lists_may_be_shorter(self, rng):
        x = rng.standard_normal((30, 5))

        def nobody(queries, rows, k):
            return np.full((len(queries), k), -1), np.full((len(queries), k), np.inf)

        np.testing.assert_allclose(nfc(x, neighbors=nobody), x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-12)

    def test_bad_searches(self, rng):
        x = rng.standard_normal((9, 5))
        for backend in ("torch", "faiss"):
            for call in (nfc, nfc_diagnostics, lambda _, **options: Centralizer(**options)):
                with pytest.raises(ValueError, match=r"backend must be 'auto' with neighbors=.*, got"):
                    call(x, neighbors=self.searched, backend=backend)
        with pytest.raises(TypeError, match=r"neighbors must be a function .* got 'faiss'.*backend="):
            Centralizer(neighbors="faiss")
        with pytest.raises(ValueError, match=r"neighbors must be None for visible parts"):
            nfc(x.reshape(9, 5, 1), neighbors=self.searched)
        with pytest.raises(TypeError, match="neighbors must return integer indices first"):
            nfc(x, neighbors=lambda *given: self.searched(*given)[::-1])
        with pytest.raises(ValueError, match=r"neighbors must return indices of shape \(9, 3\)"):
            nfc(x, neighbors=lambda q, r, k: self.searched(q, r, k + 1))


class TestOut:
    @pytest.mark.parametrize("kind", ["float32", "float16", ">f8"])
    @pytest.mark.parametrize("shape", [(700, 24), (700, 3, 8), (0, 4), (1, 2, 2)])
    def test_the_file_holds_what_would_be_returned(self, kind, shape, rng, tmp_path):
        np.save(tmp_path / "in.npy", rng.standard_normal(shape).astype(kind))
        x = np.load(tmp_path / "in.npy", mmap_mode="r")
        found = nfc(x, out=str(tmp_path / "out.npy"), max_memory=1 << 20)  # several blocks
        assert isinstance(found, np.memmap)
        assert not found.flags.writeable
        assert found.dtype == np.dtype(kind)
        np.testing.assert_array_equal(found, nfc(x))
        np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), nfc(x))
        assert sorted(os.listdir(tmp_path)) == ["in.npy", "out.npy"]

    @pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError])
    def test_an_interruption_leaves_nothing(self, failure, rng, tmp_path, monkeypatch):
        block_of_sums, calls = centralization.centralized, []

        def failing(*arguments):
            calls.append(sorted(path.stat().st_size for path in tmp_path.iterdir()))
            if len(calls) == 3:
                raise failure
            return block_of_sums(*arguments)

        monkeypatch.setattr(centralization, "centralized", failing)
        with pytest.raises(OSError if isinstance(failure, OSError) else failure):
            nfc(rng.standard_normal((700, 24)), out=tmp_path / "out.npy", max_memory=1 << 20)  # three blocks
        assert len(calls[-1]) == 1  # it was under way
        assert os.listdir(tmp_path) == []

    def test_no_file_is_replaced_unasked_not_even_the_one_that_is_read(self, rng, tmp_path, monkeypatch):
        np.save(tmp_path / "x.npy", rng.standard_normal((9, 4)))
        before = (tmp_path / "x.npy").read_bytes()
        monkeypatch.chdir(tmp_path)
        os.symlink("x.npy", "link.npy")
        os.symlink("nowhere.npy", "dangling.npy")
        for out in ("x.npy", tmp_path / "link.npy", "dangling.npy"):
            with pytest.raises(FileExistsError, match=r"npy exists\. Choose another name"):
                nfc(np.load("x.npy", mmap_mode="r"), out=out)
        assert (tmp_path / "x.npy").read_bytes() == before
        expected = nfc(np.load("x.npy"))
        nfc(np.load("x.npy", mmap_mode="r"), out="link.npy", overwrite=True)
        assert os.path.islink("link.npy")
        np.testing.assert_array_equal(np.load("x.npy"), expected)

    @pytest.mark.parametrize(
        ("features", "out", "error", "message"),
        [
            (np.ones((3, 2)), "x.npz", ValueError, "must end in .npy"),
            (np.ones((3, 2)), "x", ValueError, "must end in .npy"),
            (np.ones((3, 2)), "nowhere/x.npy", FileNotFoundError, "There is no folder nowhere"),
            (np.ones((3, 2)), 3, TypeError, "not int"),
            (torch.ones((3, 2)), "x.npy", TypeError, "out must be None for tensors"),
            ([[1.0]], "x.npy", TypeError, "features must be a numpy array"),
        ],
    )
    def test_bad_out(self, features, out, error, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(error, match=message):
            nfc(features, out=out)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_stays(links, tmp_path, monkeypatch, rng):
    out = tmp_path / "out.npy"
    write = centralization.write_npy

    def late(path, *arguments, **options):
        path.write_bytes(b"mine")
        write(path, *arguments, **options)

    monkeypatch.setattr(centralization, "write_npy", late)
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    with pytest.raises(FileExistsError, match=r"out\.npy was created by another process"):
        nfc(rng.standard_normal((5, 3)), out=out)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch, rng):
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    x = rng.standard_normal((5, 3))
    np.testing.assert_array_equal(nfc(x, out=tmp_path / "out.npy"), nfc(x))
    assert len(list(tmp_path.iterdir())) == 1


@st.composite
def untied(draw):
    """Continuous features: a tie has probability zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.standard_normal((draw(st.integers(2, 60)), draw(st.integers(2, 20)))), rng


@given(untied(), st.integers(1, 6), st.integers(1, 6))
def test_rows_in_another_order_give_rows_in_that_order(drawn, k1, k2):
    x, rng = drawn
    order = rng.permutation(len(x))
    np.testing.assert_array_equal(nfc(x[order], k1, k2), nfc(x, k1, k2)[order])


@given(untied(), st.integers(1, 6), st.floats(1e-6, 1e6))
def test_scale_does_not_matter(drawn, k, scale):
    x, rng = drawn
    own = scale * rng.uniform(0.5, 2, (len(x), 1))
    np.testing.assert_allclose(nfc(x * own, k, k), nfc(x, k, k), atol=1e-9)


@given(untied(), st.integers(1, 8))
def test_neighbour_sets_grow_with_k(drawn, k):
    x, _ = drawn
    smaller, larger = nearest_neighbors(x, k), nearest_neighbors(x, k + 1)
    np.testing.assert_array_equal(larger[:, : smaller.shape[1]], smaller)
    # So the number of mutual neighbours does not shrink either.
    assert nfc_diagnostics(x, k + 1, k).mean_mutual >= nfc_diagnostics(x, k, k).mean_mutual
    assert nfc_diagnostics(x, k, k + 1).mean_mutual >= nfc_diagnostics(x, k, k).mean_mutual


class TestFuse:
    @pytest.mark.parametrize("eta", [0, 0.25, 2])
    @pytest.mark.parametrize("count", [1, 8])
    def test_equals_equation_9(self, eta, count, rng):
        f, g = rng.standard_normal((20, 6)) * 7, rng.standard_normal((20, count, 6)) * 3
        expected = reference.fuse(f, g, eta)
        np.testing.assert_allclose(fuse(f, g, eta), expected, atol=1e-12)
        found = fuse(torch.from_numpy(f).float(), torch.from_numpy(g).float(), eta)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)

    def test_generated_features_are_averaged_not_summed(self, rng):
        f, g = rng.standard_normal((4, 3)), rng.standard_normal((4, 1, 3))
        np.testing.assert_allclose(fuse(f, np.repeat(g, 8, axis=1)), fuse(f, g))

    @pytest.mark.parametrize("size", [1e-200, 1e200])
    def test_extreme_values(self, size, rng):
        f, g = rng.standard_normal((5, 4)), rng.standard_normal((5, 2, 4))
        np.testing.assert_allclose(fuse(f * size, g * size), fuse(f, g), atol=1e-14)

    def test_half_precision_does_not_overflow_on_the_way(self):
        f = np.full((1, 4), 60000, np.float16)
        np.testing.assert_allclose(fuse(f, f[:, None]), 0.5)

    @pytest.mark.parametrize(
        ("generated", "error", "message"),
        [
            (np.zeros((3, 2)), ValueError, r"generated must have shape \(3, M, 2\)"),
            (np.zeros((3, 2, 5)), ValueError, r"got \(3, 2, 5\)"),
            (np.zeros((3, 0, 2)), ValueError, r"M >= 1 .*\(3, 0, 2\)"),
            (np.full((3, 2, 2), np.nan), ValueError, r"generated\[:, 0\] must be finite"),
            (None, TypeError, "generated must be a numpy array"),
        ],
    )
    def test_bad_generated(self, generated, error, message):
        with pytest.raises(error, match=message):
            fuse(np.ones((3, 2)), generated)

    @pytest.mark.parametrize("eta", [-1, float("nan"), "2"])
    def test_bad_eta(self, eta):
        with pytest.raises((TypeError, ValueError), match="eta must be"):
            fuse(np.ones((3, 2)), np.ones((3, 1, 2)), eta)


class TestFuseParts:
    @pytest.mark.parametrize("kind", ["bool", "weights", "none"])
    def test_equals_equation_9_part_by_part(self, kind, rng):
        f, g = rng.standard_normal((20, 3, 6)) * 7, rng.standard_normal((20, 4, 3, 6))
        visible = {"bool": rng.random((20, 4, 3)) < 0.4, "weights": rng.random((20, 4, 3)), "none": np.ones((20, 4, 3))}
        weights = visible[kind]
        weights[0] = 0 if kind != "none" else 1  # no generated image shows any part of the first
        weights[1, :, 2] = 0 if kind != "none" else 1
        expected = reference.fuse_parts(f, g, 2, weights)
        given = None if kind == "none" else weights
        np.testing.assert_allclose(fuse(f, g, 2, visibility=given), expected, atol=1e-12)
        as_tensors = torch.from_numpy(f).float(), torch.from_numpy(g).float()
        found = fuse(*as_tensors, 2, visibility=None if given is None else torch.from_numpy(given))
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)

    def test_visibility_of_one_everywhere_changes_no_bit(self, rng):
        f, g = rng.standard_normal((5, 2, 3)), rng.standard_normal((5, 4, 2, 3))
        np.testing.assert_array_equal(fuse(f, g, visibility=np.ones((5, 4, 2), bool)), fuse(f, g))
        np.testing.assert_array_equal(fuse(f, g)[:, 1], fuse(f[:, 1], g[:, :, 1]))

    @pytest.mark.parametrize(
        ("f", "g", "visibility", "error", "message"),
        [
            ((3, 2, 4), (3, 1, 4), None, ValueError, r"generated must have shape \(3, M, 2, 4\)"),
            ((3, 0, 4), (3, 1, 0, 4), None, ValueError, r"features must have at least one column.*\(3, 0, 4\)"),
            ((3, 2, 4), (3, 1, 2, 4), np.ones((3, 2)), ValueError, r"visibility must have shape \(3, 1, 2\)"),
            ((3, 2), (3, 1, 2), np.ones((3, 1, 1)), ValueError, "visibility must be None for whole features"),
            ((3, 2, 4), (3, 1, 2, 4), np.full((3, 1, 2), -1.0), ValueError, r"visibility must be in \[0, 1\]"),
            ((3, 2, 4), (3, 1, 2, 4), np.full((3, 1, 2), np.nan), ValueError, r"visibility must be in \[0, 1\]"),
            ((3, 2, 4), (3, 1, 2, 4), [1], TypeError, "visibility must be a numeric"),
            ((3, 2, 4), (3, 1, 2, 4), np.full((3, 1, 2), "a"), TypeError, "visibility must be a numeric"),
        ],
    )
    def test_bad_parts(self, f, g, visibility, error, message):
        with pytest.raises(error, match=message):
            fuse(np.ones(f), np.ones(g), visibility=visibility)

    def test_a_row_that_is_not_finite_is_named_with_its_part(self):
        f, g = np.ones((3, 2, 4)), np.ones((3, 5, 2, 4))
        g[2, 4, 1, 0] = np.nan
        with pytest.raises(ValueError, match=r"generated\[:, 4\] must be finite.*row 2 part 1"):
            fuse(f, g)
        f[1, 1] = np.inf
        with pytest.raises(ValueError, match=r"features must be finite.*row 1 part 1"):
            fuse(f, g)


class TestGenerationDiagnostics:
    @pytest.mark.parametrize("count", [1, 3])
    def test_equals_the_mean_over_all_pairs(self, count, rng):
        f = rng.standard_normal((7, 5)) + 1
        g = (f[:, None] + 0.8 * rng.standard_normal((7, count, 5))) * rng.uniform(1, 9, (7, count, 1))
        own, other, among = reference.generation_cosines(f, g)
        for arrays in ((f, g), (torch.from_numpy(f), torch.from_numpy(g))):
            found = generation_diagnostics(*arrays)
            assert found.own_cosine == pytest.approx(own)
            assert found.other_cosine == pytest.approx(other)
            assert found.consistency == (None if count == 1 else pytest.approx(among))
            assert found.retention == pytest.approx((own - other) / (1 - other))
            assert 0.1 < found.retention < 0.9
        assert ("among themselves" in str(found)) == (count > 1)
        assert f"retention {found.retention:.1%}" in str(found)

    def test_blocks_change_nothing(self, rng, monkeypatch):
        f, g = rng.standard_normal((50, 4)), rng.standard_normal((50, 2, 4))
        expected = generation_diagnostics(f, g)
        whole = centralization.Rows.blocks
        monkeypatch.setattr(centralization.Rows, "blocks", lambda rows, *_: whole(rows, 32 * rows.dim * 7))
        found = generation_diagnostics(f, g)
        assert found.own_cosine == pytest.approx(expected.own_cosine)
        assert found.other_cosine == pytest.approx(expected.other_cosine)
        assert found.consistency == pytest.approx(expected.consistency)

    def test_parts_count_alike(self, rng):
        f, g = rng.standard_normal((6, 2, 5)), rng.standard_normal((6, 3, 2, 5))
        found = generation_diagnostics(f, g)
        each = [generation_diagnostics(f[:, p], g[:, :, p]) for p in range(2)]
        assert found.own_cosine == pytest.approx(np.mean([part.own_cosine for part in each]))
        assert found.other_cosine == pytest.approx(np.mean([part.other_cosine for part in each]))
        assert found.consistency == pytest.approx(np.mean([part.consistency for part in each]))

    def test_the_ends_of_the_scale(self, rng):
        f = rng.standard_normal((40, 8))
        faithful = generation_diagnostics(f, np.stack([f, 2 * f], axis=1))
        assert faithful.retention == pytest.approx(1)
        anybody = generation_diagnostics(f, np.broadcast_to(rng.standard_normal((1, 2, 8)), (40, 2, 8)))
        assert anybody.retention == pytest.approx(0, abs=1e-12)
        swapped = generation_diagnostics(f[:3], f[[1, 2, 0], None])
        assert swapped.retention < 0
        alike = generation_diagnostics(np.ones((3, 2)), np.ones((3, 1, 2)))
        assert np.isnan(alike.retention)
        assert "cannot be told" in alike.reading

    @pytest.mark.parametrize(
        ("below", "bound", "above"),
        [
            ("leave them out (eta 0)", 0.0, "say little about the person"),
            ("say little about the person", 0.031, "No eta was measured on real people in between"),
            ("No eta was measured on real people in between", np.nextafter(0.336, 0), "the paper has eta 1/4 to 2"),
        ],
    )
    def test_the_reading_at_both_sides_of_its_bounds(self, below, bound, above):
        # Nothing to others: retention is the cosine to one's own.
        at, over = (GenerationDiagnostics(r, 0.0, None) for r in (bound, np.nextafter(bound, 1)))
        assert below in at.reading
        assert above not in at.reading
        assert above in over.reading
        assert below not in over.reading
        for found in (at, over):
            assert str(found).splitlines() == [found.summary, found.reading]

    @pytest.mark.parametrize("retention", [-1.0, -0.1, 0.0, 0.01, 0.031, 0.032, 0.2, 0.33])
    def test_below_the_published_pictures_it_recommends_no_more_than_nothing(self, retention):
        reading = GenerationDiagnostics(retention, 0.0, None).reading
        assert "eta 0)" in reading or "start at 0" in reading
        assert "the paper has" not in reading

    def test_it_says_how_many_images_there_are_and_whether_these_are_few(self, rng):
        f, g = rng.standard_normal((15, 8)), rng.standard_normal((15, 2, 8))
        few, enough = generation_diagnostics(f[:14], g[:14]), generation_diagnostics(f, g)
        assert (few.num_images, enough.num_images) == (14, 15)
        assert few.summary.startswith("generated images of 14 originals: cosine to their own")
        assert "14 images are few to go by" in few.reading
        unknown = GenerationDiagnostics(0.5, 0.0, None)
        assert unknown.summary.startswith("generated images: cosine")
        for found in (enough, unknown):
            assert "few to go by" not in str(found)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at least 2 images"):
            generation_diagnostics(np.ones((1, 2)), np.ones((1, 3, 2)))
        with pytest.raises(ValueError, match=r"M >= 1 .*\(2, 0, 2\)"):
            generation_diagnostics(np.ones((2, 2)), np.ones((2, 0, 2)))


class TestDiagnostics:
    def test_counts_by_hand(self, rng):
        x = rng.standard_normal((40, 6))
        camids = rng.integers(0, 3, 40)
        found = nfc_diagnostics(x, 3, 2, camids=camids, max_memory=1 << 20)
        z = reference.unit(x)
        proposals, looks = reference.nearest(z, 3), reference.nearest(z, 2)
        pairs = [(i, j) for i in range(40) for j in proposals[i] if i in looks[j]]
        others = [(i, j) for i in range(40) for j in range(40) if i != j]
        assert found.mutual_share == pytest.approx(len({i for i, _ in pairs}) / 40)
        assert found.mean_mutual == pytest.approx(len(pairs) / 40)
        assert found.mean_similarity == pytest.approx(np.mean([z[i] @ z[j] for i, j in pairs]))
        assert found.background_similarity == pytest.approx(np.mean([z[i] @ z[j] for i, j in others]))
        assert found.same_camera_share == pytest.approx(np.mean([camids[i] == camids[j] for i, j in pairs]))
        assert found.expected_same_camera_share == pytest.approx(np.mean([camids[i] == camids[j] for i, j in others]))
        assert "same camera" in str(found)
        assert found.evidence == evidence(x)
        assert str(found).endswith(f". {evidence(x)}")

    def test_without_cameras_or_pairs(self):
        x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        found = nfc_diagnostics(x, 1, 1)
        assert found.same_camera_share is None
        assert "camera" not in str(found)
        assert "Too few images to tell" in str(found)
        assert found.mutual_share == pytest.approx(2 / 3)

    def test_cameras_of_every_kind(self):
        found = [nfc_diagnostics(np.eye(3), camids=camids) for camids in ([0, 1, 0], ["a", "b", "a"], [0.0, 1, 0])]
        assert len(set(map(str, found))) == 1

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at least 2 rows"):
            nfc_diagnostics(np.ones((1, 2)))
        with pytest.raises(ValueError, match=r"camids must have shape \(3,\)"):
            nfc_diagnostics(np.ones((3, 2)), camids=[1, 2])


BAD_FEATURES = [
    (None, TypeError, "numpy array or a torch tensor"),
    ("features.npy", TypeError, "numpy array or a torch tensor"),
    ([[1.0, 2.0]], TypeError, "numpy.asarray"),
    (np.array([["a", "b"]]), TypeError, "dtype float16"),
    (np.ones((3, 2), int), TypeError, "dtype float16"),
    (torch.ones((3, 2), dtype=torch.complex64), TypeError, "dtype float16"),
    (np.ma.masked_array(np.ones((3, 2))), TypeError, "MaskedArray"),
    (np.ones(3), ValueError, r"shape \(N, D\)"),
    (np.ones((3, 2, 2, 2)), ValueError, r"shape \(N, D\)"),
    (np.ones((3, 0)), ValueError, "at least one column"),
    (torch.eye(3).to_sparse(), TypeError, "must be dense"),
    (np.full((2, 2), 1e305), ValueError, "must be finite"),
    (np.array([[1.0, 2.0], [np.nan, 0.0], [0.0, 1.0]]), ValueError, r"1 of 3 rows.*row 1\)"),
    (torch.tensor([[1.0, float("inf")], [1.0, 1.0]]), ValueError, r"1 of 2 rows.*row 0\)"),
]


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-300, 5e299])
@pytest.mark.parametrize(
    "function", [nfc, lambda x: fuse(x, x[:, None]), lambda x: Centralizer(method="nfc").enhance(x, x)[0]]
)
def test_features_of_any_size_are_normalised(function, size):
    features = np.array([[1.0, 1, 0], [0, 1, 1], [0, 0, 0]])
    np.testing.assert_allclose(function(features * size), function(features), rtol=1e-15)


@pytest.mark.parametrize(("features", "error", "message"), BAD_FEATURES)
@pytest.mark.parametrize("function", [nfc, nfc_diagnostics, lambda x: nearest_neighbors(x, 1), lambda x: fuse(x, None)])
def test_bad_features(function, features, error, message):
    with pytest.raises(error, match=f"features.*{message}"):
        function(features)


@pytest.mark.parametrize("name", ["k1", "k2"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (None, TypeError)])
def test_bad_k(name, value, error):
    with pytest.raises(error, match=f"{name} must be"):
        nfc(np.ones((3, 2)), **{name: value})
