"""What must not change the result of `Centralizer.enhance` and `rerank`, and what must not break them."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import real_sides
from test_enhance import people, unit
from test_no_harm import SETS

from pose2id import CameraModel, Centralizer, evaluate, evidence, link_map, link_weights
from pose2id.io.rows import Rows

ALONE = ["auto", "guarded"]  # methods that need no cameras
METHODS = [*ALONE, "cameras", "centring"]
SIDES = [(method, False) for method in ALONE] + [(method, True) for method in METHODS]
EVERY = pytest.mark.parametrize(("method", "cameras"), SIDES)
UNKNOWN = -1


def enhanced(method, q, g, qc=None, gc=None, **options):
    return Centralizer(method=method).enhance(q, g, query_camids=qc, gallery_camids=gc, **options)


def close(found, expected, atol=1e-9):
    for mine, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, wanted, atol=atol, rtol=0)


def check_sound(found):
    for x in found:
        np.testing.assert_allclose(np.linalg.norm(np.asarray(x), axis=-1), 1, atol=1e-6)


@pytest.fixture
def drawn(rng):
    """People whom the gate opens for; some images and queries are of unknown, tiny and new cameras."""
    q, g, qc, gc = people(rng, noise=0.5)
    assert evidence(g).gate == 1
    gc[:3], gc[3:7], gc[7] = UNKNOWN, 8, 9
    qc[:4] = UNKNOWN, 8, 9, 10
    return q, g, qc, gc


@EVERY
def test_order_of_rows(method, cameras, drawn, rng):
    q, g, qc, gc = drawn
    of_query, of_gallery = rng.permutation(len(q)), rng.permutation(len(g))
    sides = [(qc, gc), (qc[of_query], gc[of_gallery])] if cameras else [(), ()]
    expected = enhanced(method, q, g, *sides[0])
    found = enhanced(method, q[of_query], g[of_gallery], *sides[1])
    close(found, (expected[0][of_query], expected[1][of_gallery]))


@pytest.mark.parametrize("cameras", [False, True])
def test_order_of_rows_in_re_ranking(cameras, drawn, rng):
    q, g, qc, gc = drawn
    of_query, of_gallery = rng.permutation(len(q)), rng.permutation(len(g))
    options = {"query_camids": qc, "gallery_camids": gc} if cameras else {}
    expected = Centralizer().rerank(q, g, **options)
    options = {"query_camids": qc[of_query], "gallery_camids": gc[of_gallery]} if cameras else {}
    found = Centralizer().rerank(q[of_query], g[of_gallery], **options)
    np.testing.assert_allclose(found, expected[of_query][:, of_gallery], atol=1e-5)


# Names of the cameras -1 (unknown), 0 to 3, 8, 9 and 10, at their place: the last is -1's.
NAMES = {
    "other numbers": np.array([7, 5, 2, 0, 4, 4, 4, 4, 3, 12, 1, UNKNOWN]),
    "large numbers": np.array([*10**17 * np.arange(11), UNKNOWN]),
    "strings": np.array([*"zyxwvutsrqp", "-1"]),
    "objects": np.array([*("north 1", "C7", "a", "0", *"xxxx", "007", "é", "b"), None], dtype=object),
    "floats": np.array([*np.arange(11.0)[::-1], np.nan]),
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_names_of_cameras(method, names, drawn):
    q, g, qc, gc = drawn
    renamed = NAMES[names][qc], NAMES[names][gc]
    close(enhanced(method, q, g, *renamed), enhanced(method, q, g, qc, gc))
    close(enhanced(method, q, g, *map(list, renamed)), enhanced(method, q, g, qc, gc))


@pytest.mark.parametrize("names", NAMES)
def test_names_of_cameras_in_the_blocks(names, drawn):
    q, g, qc, gc = drawn
    renamed = NAMES[names][qc], NAMES[names][gc]
    assert evidence(g, renamed[1]) == evidence(g, gc)
    for found, expected in zip(link_weights(q, renamed[0], g, renamed[1]), link_weights(q, qc, g, gc), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(link_map(g, renamed[1]), link_map(g, gc), atol=1e-9)
    found, expected = (
        Centralizer().rerank(q, g, query_camids=of_query, gallery_camids=of_gallery)
        for of_query, of_gallery in (renamed, (qc, gc))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


class NAType:
    """As pandas.NA: neither None nor a number, equal to nothing, and neither true nor false."""

    def __eq__(self, other):
        return self

    __ne__ = __eq__
    __hash__ = None

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


def missing_values():
    try:
        return [NAType(), __import__("pandas").NA]
    except ImportError:
        return [NAType()]


@pytest.mark.parametrize("missing", [None, np.nan, *missing_values()], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("names", [np.array([0, 1, 2, 3]), np.array(["a", "b", "c", "d"])], ids=["numbers", "strings"])
def test_what_is_missing_is_unknown(missing, names, rng):
    q, g, qc, gc = people(rng)
    of_query, of_gallery = ([missing, *names[side[1:]].tolist()] for side in (qc, gc))
    qc[0] = gc[0] = UNKNOWN
    for found in ((of_query, of_gallery), (np.array(of_query, object), np.array(of_gallery, object))):
        close(enhanced("cameras", q, g, *found), enhanced("cameras", q, g, qc, gc))
    close(enhanced("auto", q, g, [missing] * len(q), [missing] * len(g)), enhanced("auto", q, g))
    model = CameraModel.fit(g, of_gallery)
    assert len(model.cameras) == 4


@EVERY
@pytest.mark.parametrize("statistics", ["gallery", "model"])
def test_a_query_alone(method, cameras, statistics, drawn):
    """No query enters the gallery or another query."""
    q, g, qc, gc = drawn
    options = {"camera_statistics": "gallery"}
    if statistics == "model":
        options = {"camera_model": CameraModel.fit(g, gc)} if cameras else {}
    together = enhanced(method, q, g, *((qc, gc) if cameras else ()), **options)
    for i in (*range(5), 20):  # of an unknown, a tiny, and a new camera
        one = slice(i, i + 1)
        alone = enhanced(method, q[one], g, *((qc[one], gc) if cameras else ()), **options)
        np.testing.assert_allclose(alone[0][0], together[0][i], atol=1e-12)
        np.testing.assert_array_equal(alone[1], together[1])


@pytest.mark.parametrize("part_distance", ["visible", "flattened"])
def test_a_query_alone_in_parts(part_distance, rng):
    q, g, *_ = people(rng, noise=0.3)
    q, g = (x.reshape(-1, 3, 8) for x in (q, g))
    shown = [rng.random((len(x), 3)) < 0.8 for x in (q, g)] if part_distance == "visible" else [None, None]
    model = Centralizer(part_distance=part_distance)
    together = model.enhance(q, g, query_visibility=shown[0], gallery_visibility=shown[1])
    before = Rows(q, "q", normalize=True, parts=True).read(slice(None)).numpy().reshape(q.shape)
    assert np.abs(together[0] - before).max() > 0.01
    for i in range(6):
        one = slice(i, i + 1)
        of_query = None if shown[0] is None else shown[0][one]
        alone = model.enhance(q[one], g, query_visibility=of_query, gallery_visibility=shown[1])
        np.testing.assert_allclose(alone[0][0], together[0][i], atol=1e-6)
        np.testing.assert_array_equal(alone[1], together[1])


@pytest.mark.parametrize("method", METHODS)
def test_queries_move_the_means_of_both_sets_a_little(method):
    q, g, qc, gc = people(np.random.default_rng(0), identities=60, dim=256)
    together = enhanced(method, q, g, qc, gc)
    for i in range(0, len(q), 12):
        alone = enhanced(method, q[i : i + 1], g, qc[i : i + 1], gc)
        assert 0 < np.abs(alone[0][0] - together[0][i]).max() < 0.02
        assert np.abs(alone[1] - together[1]).max() < 0.05  # here 60 queries come or go, beside 240 gallery images


@EVERY
@pytest.mark.parametrize("shots", [1, 5])
def test_each_gallery_image_twice(method, cameras, shots, rng):
    q, g, qc, gc = people(rng, identities=200 // shots, shots=shots, cameras=3)
    g, gc = (np.concatenate([x, x]) for x in (g, gc))
    found = enhanced(method, q, g, *((qc, gc) if cameras else ()))
    check_sound(found)
    first, second = np.split(found[1], 2)
    np.testing.assert_allclose(first, second, atol=1e-9)


def test_each_gallery_image_twice_in_re_ranking(rng):
    q, g, qc, gc = people(rng)
    g, gc = (np.concatenate([x, x]) for x in (g, gc))
    for options in ({}, {"query_camids": qc, "gallery_camids": gc}):
        assert np.isfinite(Centralizer().rerank(q, g, **options)).all()


@pytest.mark.parametrize("method", METHODS)
def test_odd_cameras(method, rng):
    q, g, qc, gc = people(rng)
    for of_query, of_gallery in odd_cameras(qc, gc):
        check_sound(enhanced(method, q, g, of_query, of_gallery))
    close(enhanced("centring", q, g, 0 * qc, 0 * gc), map(unit, (q, g)))


def test_odd_cameras_in_re_ranking(rng):
    q, g, qc, gc = people(rng)
    for of_query, of_gallery in odd_cameras(qc, gc):
        assert np.isfinite(Centralizer().rerank(q, g, query_camids=of_query, gallery_camids=of_gallery)).all()


def odd_cameras(qc, gc):
    """Cameras of queries and gallery."""
    rare, some = gc.copy(), gc.copy()
    rare[0], some[::3] = 77, UNKNOWN
    return [
        (0 * qc, 0 * gc),  # one camera
        (0 * qc + 1, 0 * gc),  # one each, the query's is new
        (qc, rare),  # a camera with one image
        (0 * qc + 77, rare),
        (0 * qc + 99, gc),  # a new camera
        (None, gc),
        (0 * qc - 1, some),
        (qc, np.arange(len(gc))),  # a camera each
        (qc, np.arange(len(gc)) // 2),
    ]


def confused(rng, camids, share):
    """Cameras of which a share is drawn at random."""
    return np.where(rng.random(len(camids)) < share, rng.permutation(camids), camids)


@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_wrong_cameras(method, share, rng):
    q, g, qc, gc = people(rng)
    wrong = confused(rng, qc, share), confused(rng, gc, share)
    check_sound(enhanced(method, q, g, *wrong))


def test_wrong_cameras_in_re_ranking(rng):
    q, g, qc, gc = people(rng)
    for share in (0.2, 1.0):
        of_query, of_gallery = confused(rng, qc, share), confused(rng, gc, share)
        assert np.isfinite(Centralizer().rerank(q, g, query_camids=of_query, gallery_camids=of_gallery)).all()


@pytest.mark.parametrize(("name", "model"), [SETS[0], SETS[2], SETS[8]])
def test_wrong_cameras_on_real_features(name, model, rng):
    """docs/does-it-help.md has the figures; here, that they stay above those of no centralization."""
    q, g, *labels = real_sides(name, model)
    before = evaluate(q, g, *labels)
    for share in (0.2, 1.0):
        after = evaluate(*enhanced("auto", q, g, *(confused(rng, side, share) for side in labels[2:])), *labels)
        assert after.mAP > before.mAP
        assert after.rank(1) > before.rank(1)


@pytest.mark.parametrize("images", [1, 2, 3, 15])
@pytest.mark.parametrize("queries", [1, 2])
def test_few_images_and_queries(images, queries, rng):
    q, g = rng.normal(size=(queries, 8)), rng.normal(size=(images, 8))
    sides = np.arange(queries) % 2, np.arange(images) % 2
    for method, cameras in SIDES:
        found = enhanced(method, q, g, *(sides if cameras else ()))
        assert [x.shape for x in found] == [q.shape, g.shape]
        check_sound(found)
    assert evidence(g).k == evidence(g, sides[1]).k == 0
    for options in ({}, {"force": True}, {"query_camids": sides[0], "gallery_camids": sides[1]}):
        assert np.isfinite(Centralizer().rerank(q, g, **options)).all()
        assert Centralizer().rerank(q, g, **options, topk=2)[1].shape == (queries, min(2, images))


def test_no_queries_and_no_gallery(rng):
    some, none = rng.normal(size=(20, 8)), np.zeros((0, 8))
    model = Centralizer()
    for call in (model.enhance, model.rerank):
        with pytest.raises(ValueError, match="query_feats must hold at least one row"):
            call(none, some)
        with pytest.raises(ValueError, match="gallery_feats must hold at least one row"):
            call(some, none)
    with pytest.raises(ValueError, match="feats must hold at least one row"):
        CameraModel.fit(none, [])
    assert evidence(none).k == 0
