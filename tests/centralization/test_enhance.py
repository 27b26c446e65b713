"""`Centralizer.enhance` and `rerank` by default: against literal references, and where nobody repeats."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys

import numpy as np
import pytest
import torch
from conftest import SHARED, real_sides

import pose2id
from pose2id import CameraModel, Centralizer, centre_cameras, evaluate, evaluate_rank, evidence, link_map, link_weights
from pose2id.io.rows import Rows

TABLE = {  # mAP / Rank-1 in percent, of the reference files: without cameras, with cameras, re-ranked with cameras
    ("cuhk03_p1_det_val100", "osnet_msmt17"): [(31.6, 26.6), (56.9, 54.3), (62.3, 58.8)],
    ("cuhk03_p1_det_val100", "osnet_lda256"): [(59.4, 53.8), (74.7, 75.4), (78.9, 76.9)],
    ("cuhk03_p1_det_val100", "osnet_market1501"): [(13.6, 11.1), (38.8, 39.2), (43.3, 41.7)],
    ("3dpes", "osnet_msmt17"): [(40.4, 40.5), (40.4, 40.5), (47.4, 46.5)],
    ("3dpes", "retail0288"): [(65.2, 64.6), (65.2, 64.6), (73.8, 72.5)],
    ("viper", "osnet_msmt17"): [(34.8, 27.2), (35.3, 27.2), (35.9, 28.3)],
    ("pku_reid", "osnet_msmt17"): [(13.2, 12.2), (58.9, 66.9), (64.9, 74.3)],
}


def people(rng, identities=40, shots=5, cameras=4, dim=24, noise=0.6, bias=0.6):
    """Drawn features of people seen by biased cameras: query, gallery, and their cameras; a fifth are queries."""
    centres, biases = rng.normal(size=(identities, dim)), bias * rng.normal(size=(cameras, dim))
    camids = rng.integers(cameras, size=identities * shots)
    x = centres.repeat(shots, 0) + biases[camids] + noise * rng.normal(size=(identities * shots, dim))
    order = rng.permutation(len(x))
    query, gallery = order[: len(x) // 5], order[len(x) // 5 :]
    return x[query], x[gallery], camids[query], camids[gallery]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def references():
    """The literal reference files, with products rounded to 12 digits: s_ij and s_ji are one number, ties are ties."""
    folder = SHARED / "design"
    if not (folder / "guard_reference.py").is_file():
        pytest.skip("needs ../shared/design")
    modules = {}
    for name in ("methods_reference", "guard_reference"):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        text = text.replace("S=X@G[B].T", "S=np.round(X@G[B].T,12)")
        spec = importlib.util.spec_from_loader(name, loader=None)
        module = importlib.util.module_from_spec(spec)
        exec(compile(text, name, "exec"), module.__dict__)
        modules[name] = sys.modules[name] = module
    yield modules["methods_reference"], modules["guard_reference"]
    for name in modules:
        del sys.modules[name]


CASES = [
    {"identities": n, "shots": shots, "cameras": cameras}
    for n, shots, cameras in [(40, 5, 4), (30, 6, 2), (60, 3, 6), (25, 8, 1), (50, 2, 3), (12, 5, 3), (45, 4, 30)]
]


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_literal_references(case, copies, rng, references):
    methods, guard = references
    q, g, qc, gc = people(rng, **case)
    if copies:
        g[5:9], q[1] = g[4], g[0]
    cameras = {"query_camids": qc, "gallery_camids": gc}
    of_gallery = {"camera_statistics": "gallery", **cameras}
    for found, expected in [
        (Centralizer().enhance(q, g), guard.guarded(q, g)),
        (Centralizer(method="guarded").enhance(q, g, **cameras), guard.guarded(q, g, qc, gc)),
        # One camera alone is none.
        (Centralizer().enhance(q, g, **cameras), guard.auto(q, g, *((qc, gc) if case["cameras"] > 1 else ()))),
        (Centralizer(method="centring").enhance(q, g, **cameras), methods.centred(q, g, qc, gc)),
        (Centralizer(method="cameras").enhance(q, g, **cameras), methods.features(q, g, qc, gc)),
        (Centralizer(method="cameras").enhance(q, g, **of_gallery), methods.features(q, g, qc, gc, False)),
    ]:
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)
    for camids in (None, gc):
        found, expected = evidence(g, camids), guard.evidence(g, camids)
        if expected is None:
            assert (found.k, found.gate) == (0, 0)
        else:
            assert (found.links, found.k) == (expected["n"], expected["k"])
            wanted = expected["expected"], expected["lcb"], expected["G"]
            np.testing.assert_allclose((found.expected, found.lower, found.gate), wanted, rtol=1e-9)
    if case["cameras"] > 1:
        np.testing.assert_allclose(Centralizer().rerank(q, g, **cameras), methods.distances(q, g, qc, gc), atol=1e-5)


@pytest.mark.parametrize(("name", "model"), TABLE)
def test_the_table_on_real_features(name, model):
    q, g, *labels = real_sides(name, model)
    cameras = {"query_camids": labels[2], "gallery_camids": labels[3]}
    found = [
        evaluate(*Centralizer().enhance(q, g), *labels),
        evaluate(*Centralizer().enhance(q, g, **cameras), *labels),
        evaluate_rank(Centralizer().rerank(q, g, **cameras), *labels),
    ]
    figures = [(100 * result.mAP, 100 * result.rank(1)) for result in found]
    np.testing.assert_allclose(figures, TABLE[name, model], atol=0.1)
    before = evaluate(q, g, *labels)
    slack = max(0.017, 1 / before.num_valid_queries) + 1e-9
    alone = evaluate_rank(Centralizer().rerank(q, g), *labels)
    for result in (*found, alone):  # no harm
        assert result.mAP > before.mAP - 0.01
        assert result.rank(1) > before.rank(1) - slack


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("dim", "images"), [(16, 60), (64, 400)])
def test_people_who_appear_once_stay_as_they_are(seed, dim, images):
    """Of strangers there is no evidence; the output is the input, normalised, bit for bit."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(images, dim)) + rng.normal(size=dim)
    q = np.concatenate([g[:10] + 0.5 * rng.normal(size=(10, dim)), rng.normal(size=(5, dim))])
    assert evidence(g).gate == 0
    found = Centralizer().enhance(q, g)
    for x, before in zip(found, (q, g), strict=True):
        np.testing.assert_array_equal(x, Rows(before, "x", normalize=True).read(slice(None)).numpy())
        np.testing.assert_allclose(x, unit(before), rtol=1e-15)
    plain = Centralizer().rerank(q, g)
    np.testing.assert_allclose(plain, 2 - 2 * unit(q) @ unit(g).T, atol=1e-6)
    assert np.abs(Centralizer().rerank(q, g, force=True) - plain).max() > 0.1


@pytest.mark.parametrize("camids", [False, True])
def test_a_query_alone_is_what_it_is_in_a_batch(camids, rng):
    q, g, qc, gc = people(rng)
    model = CameraModel.fit(g, gc) if camids else None
    for method in ("auto", "guarded", *(("cameras", "centring") if camids else ())):
        options = {"camera_statistics": "gallery"} if camids else {}
        sides = {"query_camids": qc, "gallery_camids": gc} if camids else {}
        together = Centralizer(method=method).enhance(q, g, **sides, **options)
        for i in (0, 7):
            one = {"query_camids": qc[i : i + 1], "gallery_camids": gc} if camids else {}
            alone = Centralizer(method=method).enhance(q[i : i + 1], g, **one, **options)
            np.testing.assert_allclose(alone[0][0], together[0][i], atol=1e-12)
            np.testing.assert_allclose(alone[1], together[1], atol=1e-12)
        if camids:  # a model of the gallery is the gallery's statistics
            stored = Centralizer(method=method).enhance(q, g, **sides, camera_model=model)
            for x, y in zip(stored, together, strict=True):
                np.testing.assert_allclose(x, y, atol=1e-9)


def test_order_and_names_of_cameras_mean_nothing(rng):
    q, g, qc, gc = people(rng)
    expected = Centralizer().enhance(q, g, query_camids=qc, gallery_camids=gc)
    names = np.array(["north", "south", "east", "west"])
    order = rng.permutation(len(g))
    found = Centralizer().enhance(q, g[order], query_camids=names[qc], gallery_camids=list(names[gc[order]]))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-9)
    np.testing.assert_allclose(found[1], expected[1][order], atol=1e-9)


def test_unknown_cameras(rng):
    q, g, qc, gc = people(rng)
    without = Centralizer().enhance(q, g)
    for unknown in (None, [-1] * len(g), [None] * len(g), np.full(len(g), np.nan)):
        found = Centralizer().enhance(q, g, query_camids=qc, gallery_camids=unknown)
        for x, y in zip(found, without, strict=True):
            np.testing.assert_array_equal(x, y)
    for of_query in (None, np.full(len(q), 99), [*qc[:-1], -1], [None, *qc[1:]]):  # one side alone; new cameras; some
        found = Centralizer(method="cameras").enhance(q, g, query_camids=of_query, gallery_camids=gc)
        np.testing.assert_allclose([np.linalg.norm(x, axis=1).mean() for x in found], 1)
        Centralizer().rerank(q, g, query_camids=of_query, gallery_camids=gc)
    names = np.array(["a", "b", "c", "d"])
    expected = Centralizer().enhance(q, g, gallery_camids=gc)
    for of_query in ([None] * len(q), np.full(len(q), np.nan), torch.full((len(q),), torch.nan), [-1] * len(q)):
        found = Centralizer().enhance(q, g, query_camids=of_query, gallery_camids=names[gc])
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)
    wrong = rng.integers(4, size=len(g))
    assert all(np.isfinite(x).all() for x in Centralizer().enhance(q, g, query_camids=qc, gallery_camids=wrong))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_containers(dtype, rng):
    q, g, qc, gc = people(rng)
    x, y = (torch.from_numpy(z).to(dtype) for z in (q, g))
    expected = Centralizer().enhance(x.double().numpy(), y.double().numpy(), query_camids=qc, gallery_camids=gc)
    before = x.clone(), y.clone()
    found = Centralizer().enhance(x, y, query_camids=torch.from_numpy(qc), gallery_camids=gc)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.double().numpy(), b, atol=4 * torch.finfo(dtype).eps + 1e-6)


def test_parts_by_what_both_show(rng):
    q, g, *_ = people(rng, dim=30)
    flat = Centralizer(part_distance="flattened").enhance(q.reshape(-1, 3, 10), g.reshape(-1, 3, 10))
    assert [x.shape for x in flat] == [(40, 3, 10), (160, 3, 10)]
    shown = rng.random((len(g), 3)) < 0.8
    found = Centralizer().enhance(q.reshape(-1, 3, 10), g.reshape(-1, 3, 10), gallery_visibility=shown)
    np.testing.assert_allclose(np.linalg.norm(found[1], axis=2), 1)
    one = Centralizer().enhance(q[:, None], g[:, None])  # one part is the whole
    for x, y in zip(one, Centralizer().enhance(q, g), strict=True):
        np.testing.assert_allclose(x[:, 0], y, atol=1e-6)


def test_which_method_ran_is_said(rng, caplog):
    q, g, qc, gc = people(rng)
    with caplog.at_level(logging.INFO, "pose2id.centralizer"):
        Centralizer().enhance(q, g)
        Centralizer().enhance(q, g, query_camids=qc, gallery_camids=gc)
        Centralizer().rerank(q, g)
    guarded, cameras, reranked = caplog.messages
    assert guarded.startswith(
        "enhance: guarded, without cameras (none is known), gate 1.00. Links too close for strangers: "
    )
    assert cameras.startswith("enhance: cameras: 4 cameras, gate 1.00. Links too close")
    assert reranked.startswith("rerank: k-reciprocal, k1 10, k2 3, no cameras. Links")


def test_published_nfc_warns_where_nobody_repeats(rng):
    g = rng.normal(size=(200, 16))
    with pytest.warns(UserWarning, match=r"method='nfc' may harm here. Links too close for strangers: "):
        found = Centralizer(k1=2).enhance(g[:50], g)
    np.testing.assert_array_equal(found[1], pose2id.nfc(g))


@pytest.mark.parametrize("cameras", [1, 3, 12])
def test_zero_rows_are_nobodys_neighbours(cameras, rng):
    q, g, _, gc = people(rng, identities=60, shots=4, cameras=cameras)
    zeros, added = np.zeros((12, g.shape[1])), np.arange(12) % cameras
    more, of_more = np.concatenate([g, zeros]), np.concatenate([gc, added])
    for found, expected in zip(link_weights(more, of_more), link_weights(g, gc), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    assert evidence(more, of_more).links == evidence(g, gc).links
    strangers = np.concatenate([rng.normal(size=(200, g.shape[1])), zeros])
    assert evidence(strangers).gate == 0
    np.testing.assert_array_equal(Centralizer().enhance(q, strangers)[1][200:], 0)


def test_rerank_goes_without_cameras_where_few_are_known(rng):
    q, g, _, gc = people(rng)
    few = np.where(np.arange(len(gc)) < 4, gc, -1)
    found = Centralizer().rerank(q, g, gallery_camids=few)
    np.testing.assert_array_equal(found, Centralizer().rerank(q, g))


def test_a_camera_model_needs_cameras(rng):
    q, g, qc, gc = people(rng)
    with pytest.raises(ValueError, match="gallery_camids must name cameras with camera_model"):
        Centralizer().enhance(q, g, query_camids=qc, camera_model=CameraModel.fit(g, gc))


class TestCameraModel:
    def test_is_kept(self, rng, tmp_path):
        q, g, qc, gc = people(rng)
        names = np.array(["a", "b", "c", "d"])
        model = CameraModel.fit(torch.from_numpy(g), names[gc])
        assert model.cameras == ("a", "b", "c", "d")
        model.save(tmp_path / "cameras.safetensors")
        again = CameraModel.load(tmp_path / "cameras.safetensors")
        options = {"query_camids": names[qc], "gallery_camids": names[gc]}
        for x, y in zip(
            Centralizer().enhance(q, g, **options, camera_model=again),
            Centralizer().enhance(q, g, **options, camera_statistics="gallery"),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, atol=1e-9)
        with pytest.raises(FileExistsError):
            model.save(tmp_path / "cameras.safetensors")

    @pytest.mark.parametrize("method", ["auto", "guarded", "cameras", "centring"])
    def test_of_a_live_query(self, method, rng, tmp_path):
        """Alone, by a model of the gallery, it gets what it gets among all queries by the gallery's statistics."""
        q, g, qc, gc = people(rng)
        qc[:2] = -1, 9  # unknown, and new
        CameraModel.fit(g, gc).save(tmp_path / "cameras.safetensors")
        model = CameraModel.load(tmp_path / "cameras.safetensors")
        sides = {"query_camids": qc, "gallery_camids": gc}
        expected = Centralizer(method=method).enhance(q, g, **sides, camera_statistics="gallery")
        for i in range(5):
            one = {"query_camids": qc[i : i + 1], "gallery_camids": gc, "camera_model": model}
            found = Centralizer(method=method).enhance(q[i : i + 1], g, **one)
            np.testing.assert_allclose(found[0][0], expected[0][i], atol=1e-9)
            np.testing.assert_allclose(found[1], expected[1], atol=1e-9)

    def test_bad_files(self, rng, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no camera model"):
            CameraModel.load(tmp_path / "none.safetensors")
        (tmp_path / "bad.safetensors").write_bytes(b"no model")
        with pytest.raises(ValueError, match="must be a camera model"):
            CameraModel.load(tmp_path / "bad.safetensors")
        q, g, qc, gc = people(rng)
        model = CameraModel.fit(g, gc)
        with pytest.raises(ValueError, match="camera_model must be of features with 12 columns, got one of 24"):
            Centralizer().enhance(q[:, :12], g[:, :12], query_camids=qc, gallery_camids=gc, camera_model=model)


def test_blocks_apart(rng, references):
    methods, _ = references
    q, g, qc, gc = people(rng)
    for x, y in zip(centre_cameras(q, g, qc, gc), methods.centred(q, g, qc, gc), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)
    x = unit(g)
    for links, expected in [
        (link_weights(g, gc), methods.links(x, gc, x, gc, True)),
        (link_weights(q, qc, g, gc), methods.links(unit(q), qc, x, gc, False)),
        (link_weights(g), methods.links(x, 0 * gc, x, 0 * gc, True)),
    ]:
        dense = np.zeros(expected.shape)
        dense[links.row, links.column] = links.weight
        np.testing.assert_allclose(dense, expected, atol=1e-9)
    for found, camids, constant in ((link_map(g, gc), gc, 1.0), (link_map(g), None, 3.0)):
        np.testing.assert_allclose(found, methods.link_map(x, camids, constant), atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "options", "error", "message"),
    [
        ({"method": "best"}, {}, ValueError, "method must be one of 'auto', 'nfc', 'guarded'"),
        ({"method": "guarded", "k1": 2}, {}, ValueError, "k1 and k2 must be None with method='guarded'"),
        ({"neighbors": min}, {}, ValueError, "neighbors must be None with method='auto'"),
        ({}, {"joint": True}, ValueError, "joint must be False with method='auto'"),
        ({"method": "cameras"}, {}, ValueError, "gallery_camids must name cameras for method='cameras'"),
        ({}, {"query_camids": [1], "gallery_camids": [1]}, ValueError, r"query_camids must have shape \(40,\)"),
        ({}, {"camera_statistics": "all"}, ValueError, "camera_statistics must be one of 'both', 'gallery'"),
        ({}, {"camera_model": 3}, TypeError, "camera_model must be a pose2id.CameraModel, got int"),
    ],
)
def test_errors(settings, options, error, message, rng):
    q, g, *_ = people(rng)
    with pytest.raises(error, match=message):
        Centralizer(**settings).enhance(q, g, **options)


def test_parts_have_no_cameras(rng):
    x = rng.normal(size=(20, 2, 4))
    with pytest.raises(ValueError, match="must be None for features in parts"):
        Centralizer().enhance(x, x, query_camids=[1] * 20, gallery_camids=[2] * 20)
    with pytest.raises(ValueError, match="camids must be None for features in parts"):
        evidence(x, [1] * 20)


def test_copies_have_no_links():
    x = np.ones((40, 8))
    camids = np.arange(40) % 2
    np.testing.assert_array_equal(link_map(x, camids), np.eye(8))
    assert len(link_weights(x, camids).row) == 0
    found = Centralizer(method="cameras").enhance(x[:5], x, query_camids=camids[:5], gallery_camids=camids)
    assert all(np.isfinite(y).all() for y in found)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["auto", "guarded", "cameras", "centring"])
def test_on_a_gpu(method, rng):
    q, g, qc, gc = people(rng)
    options = {"query_camids": qc, "gallery_camids": gc}
    expected = Centralizer(method=method).enhance(q, g, **options)
    x, y = (torch.from_numpy(z).cuda() for z in (q, g))
    for a, b in zip(Centralizer(method=method).enhance(x, y, **options), expected, strict=True):
        assert a.is_cuda
        np.testing.assert_allclose(a.cpu().numpy(), b, atol=1e-6)
    found = Centralizer(method=method).rerank(x, y, **options, topk=5)
    wanted = Centralizer(method=method).rerank(q, g, **options, topk=5)
    np.testing.assert_allclose(found[0].cpu().numpy(), wanted[0], atol=1e-5)
    assert str(evidence(y)) == str(evidence(g))


@pytest.mark.parametrize(
    "call",
    [
        lambda q, g, **memory: evidence(g, **memory),
        lambda q, g, **memory: pose2id.nfc_diagnostics(g, **memory),
        lambda q, g, **memory: Centralizer(**memory).enhance(q, g),
        lambda q, g, **memory: Centralizer(**memory).rerank(q, g),
    ],
    ids=["evidence", "nfc_diagnostics", "enhance", "rerank"],
)
def test_too_little_memory_for_the_evidence(call, rng):
    """The error says how much is enough, and for what."""
    q, g = rng.normal(size=(5, 16)), rng.normal(size=(500, 16))
    with pytest.raises(ValueError, match="for lists of 52 neighbours of 500 rows, got 1048576") as error:
        call(q, g, max_memory=1 << 20)
    enough = int(re.match(r"max_memory must be at least (\d+) bytes", str(error.value))[1])
    call(q, g, max_memory=enough)
