"""Searches beside what they stand for: re-ranking over all, unknown people, tracks, images, large galleries."""

from __future__ import annotations

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from test_gallery import METHODS, Drawn, built

from pose2id import Centralizer, Extractor, Gallery, Threshold, evaluate, evaluate_rank, k_reciprocal
from pose2id.gallery import engines
from pose2id.gallery import state as state_module
from pose2id.gallery.tracklets import Tracks, pooled
from pose2id.io.rows import Rows
from pose2id.neighbors.engines import UnusableError


@pytest.mark.parametrize("name", METHODS)
def test_k_reciprocal_is_that_of_each_query_alone(name, monkeypatch):
    drawn, (_, known) = Drawn(3), METHODS[name]
    x, camids, _ = drawn.images(130)
    q, q_cams, _ = drawn.images(6)
    gallery = built(name, x, camids)
    found = gallery.search(q, 130, rerank="k-reciprocal", query_camids=q_cams if known else None)
    for row, of_query in enumerate(zip(found.ids, found.distances, strict=True)):
        expected = k_reciprocal(q[row : row + 1], x, 10, 3)[0]
        np.testing.assert_allclose(of_query[1], expected[of_query[0]], atol=2e-5)
        np.testing.assert_allclose(of_query[1], np.sort(expected), atol=2e-5)


def test_camera_aware_re_ranking_is_that_of_centralized_features():
    drawn = Drawn(4)
    x, camids, _ = drawn.images(150)
    q, q_cams, _ = drawn.images(6)
    gallery = built("cameras", x, camids)
    found = gallery.search(q, 9, rerank="camera", query_camids=q_cams)
    asked, y = Centralizer(method="cameras").enhance(
        q, x, query_camids=q_cams, gallery_camids=camids, camera_statistics="gallery"
    )
    for row, (ids, distances) in enumerate(zip(found.ids, found.distances, strict=True)):
        expected = k_reciprocal(
            asked[row : row + 1], y, q_camids=q_cams[row : row + 1], g_camids=camids, normalize=False
        )[0]
        np.testing.assert_allclose(distances, np.sort(expected)[:9], atol=2e-5)
        np.testing.assert_allclose(distances, expected[ids], atol=2e-5)


def test_re_ranking_nearby_is_mostly_that_over_all(monkeypatch):
    """Lists of 12 images among the 60 nearest of 400: the first is mostly the same."""
    drawn = Drawn(5, people=80)
    x, camids, _ = drawn.images(400)
    q, q_cams, _ = drawn.images(40)
    gallery = built("cameras", x, camids)
    whole = gallery.search(q, 3, rerank="camera", query_camids=q_cams)
    monkeypatch.setattr(state_module, "NEARBY", 60)
    near = gallery.search(q, 3, rerank="camera", query_camids=q_cams)
    assert (near.ids[:, 0] == whole.ids[:, 0]).mean() > 0.7
    assert (near.distances != whole.distances).any()  # it did look at fewer


def test_the_own_camera_can_be_left_out():
    drawn = Drawn(6)
    x, camids, _ = drawn.images(100)
    q, q_cams, _ = drawn.images(10)
    gallery = built("cameras", x, camids)
    everything = gallery.search(q, 100, query_camids=q_cams)
    for options in ({}, {"rerank": "camera"}):
        found = gallery.search(q, 100, query_camids=q_cams, exclude_camera=True, **options)
        for ids, camera in zip(found.ids, q_cams, strict=True):
            listed = ids[ids >= 0]
            assert set(listed) == set(np.flatnonzero(camids != camera))
            assert (ids[len(listed) :] == -1).all()
    found = gallery.search(q, 100, query_camids=q_cams, exclude_camera=True)
    for row, camera in enumerate(q_cams):
        kept = [image for image in everything.ids[row] if camids[image] != camera]
        np.testing.assert_array_equal(found.ids[row][: len(kept)], kept)
    # A query of a camera that the gallery lacks leaves nothing out; one of an unknown camera would be an accident.
    assert (gallery.search(q[:1], 100, query_camids=[77], exclude_camera=True).ids >= 0).all()
    for camids in (None, [0, -1]):
        for ask in (gallery.search, gallery.scores):
            with pytest.raises(ValueError, match="query_camids must name a camera for each query with exclude_camera"):
                ask(q[:2], query_camids=camids, exclude_camera=True)


def test_one_camera_label_and_track_for_all_rows():
    x, _, _ = Drawn(7).images(12)
    one, other = Gallery(), Gallery()
    one.add(x[:4], camids=3, labels="Anna")
    one.add(x[4:8], camids="door", labels=7, group_by="t", quality=[1, 2, 3, 4])
    other.add(x[:4], camids=[3] * 4, labels=["Anna"] * 4)
    other.add(x[4:8], camids=["door"] * 4, labels=[7] * 4, group_by=["t"] * 4, quality=[1, 2, 3, 4])
    np.testing.assert_array_equal(one.features(raw=True), other.features(raw=True))
    assert one.camids().tolist() == other.camids().tolist() == [3, 3, 3, 3, "door"]
    assert one.labels().tolist() == other.labels().tolist() == ["Anna"] * 4 + [7]
    found, expected = (g.search(x[8:], 3, query_camids=c, exclude_camera=True) for g, c in ((one, 3), (other, [3] * 4)))
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert (found.ids[:, 0] == 4).all()


def test_what_is_known_of_images_by_id():
    x, _, _ = Drawn(8).images(6)
    gallery = Gallery()
    assert gallery.labels().tolist() == gallery.camids().tolist() == []
    gallery.add(x[:4], [*"abcd"], [0, None, "hall", 2], ["Anna", None, "Ben", 4])
    gallery.remove("b")
    assert gallery.labels().tolist() == ["Anna", "Ben", 4]
    assert gallery.labels(["d", "a"]).tolist() == [4, "Anna"]
    assert gallery.camids(["d", "c", "a"]).tolist() == [2, "hall", 0]
    for known in (gallery.labels, gallery.camids):
        with pytest.raises(KeyError, match="has no b"):
            known(["b"])


def test_cameras_labels_and_tracks_can_be_updated():
    drawn = Drawn(9)
    x, camids, who = drawn.images(120)
    more, _, _ = drawn.images(4)
    gallery, whole = (Gallery(Centralizer(method="cameras"), refit_share=None) for _ in range(2))
    gallery.add(x, camids=camids, labels=who)
    gallery.update([3, 70], labels=["Ada", None])
    gallery.update([5, 6], camids=[1 - camids[5], 9])
    gallery.update([8, 2], more, camids=4, labels="Eve", group_by=["s", "r", "r", "s"])
    assert gallery.labels([3, 70, 8, 2, 5]).tolist() == ["Ada", None, "Eve", "Eve", who[5]]
    assert gallery.camids([5, 6, 8, 2, 3]).tolist() == [1 - camids[5], 9, 4, 4, camids[3]]
    pooled = Gallery()
    pooled.add(more, group_by=["s", "r", "r", "s"])
    now, seen_by = x.copy(), camids.copy()
    now[[8, 2]] = pooled.features(raw=True)
    seen_by[[5, 6, 8, 2]] = [1 - camids[5], 9, 4, 4]
    np.testing.assert_array_equal(gallery.features(raw=True), now)
    gallery.refit()
    whole.add(now, camids=seen_by)
    np.testing.assert_allclose(gallery.features(), whole.features(), atol=1e-6)
    before = gallery.features()
    for options, error, said in (
        ({"ids": [1, 500], "labels": "x"}, KeyError, "has no 500"),
        ({"ids": [1], "labels": ["x", "y"]}, ValueError, "labels must hold one per row, 1, got 2"),
        ({"ids": [1], "group_by": ["t"]}, ValueError, "features must be given with group_by or quality"),
        ({"ids": [1], "features": more, "group_by": [1, 2, 1, 1]}, ValueError, "one track per id, 1, got 2"),
    ):
        with pytest.raises(error, match=said):
            gallery.update(**options)
    np.testing.assert_array_equal(gallery.features(), before)
    assert gallery.labels([1]).tolist() == [who[1]]


def test_scores_are_what_thresholds_are_compared_with():
    drawn = Drawn(10)
    x, camids, _ = drawn.images(150)
    q, q_cams, _ = drawn.images(20)
    gallery = built("guarded", x, camids)
    for centralized in (True, False):
        scores = gallery.scores(q, query_camids=q_cams, centralized=centralized)
        assert scores.shape == (20,)
        for row in (0, 7, 19):
            for score, known in ((scores[row], True), (np.nextafter(scores[row], 2), False)):
                options = {"query_camids": q_cams[row : row + 1], "threshold": Threshold(score, centralized)}
                assert (gallery.search(q[row : row + 1], 1, **options).labels[0, 0] != "unknown") == known
    nearest = gallery.search(q, 11, query_camids=q_cams).distances.astype(np.float64)
    scores = gallery.scores(q, query_camids=q_cams)
    np.testing.assert_allclose(scores, 1 - np.sqrt(nearest[:, 0] / nearest[:, 10]), atol=1e-6)
    of_track = gallery.scores(q[:2], query_camids=q_cams[[0, 0]], group_by="t")
    assert of_track.shape == (1,)
    assert isinstance(gallery.scores(torch.from_numpy(q)), torch.Tensor)
    assert Gallery().scores(q).tolist() == [0] * 20
    assert gallery.scores([]).shape == (0,)
    by_track = gallery.calibrate(q, q, genuine_group_by=q_cams, impostor_group_by="t", fpr=0.5)
    assert by_track.fpr == 0  # of one track
    assert by_track.tpr in set(np.arange(5) / len({*q_cams}))


@pytest.mark.parametrize("exact_up_to", [None, 100])
@pytest.mark.parametrize("how", ["k-reciprocal", "camera"])
def test_re_ranking_finds_other_cameras_beyond_the_images_nearby(how, exact_up_to):
    """The own camera's 400 images are all nearer than the others."""
    x, _, _ = Drawn(16).images(800)
    camids = np.repeat([0, 1], 400)
    x[:, 0] += np.where(camids == 0, 10, -10)
    gallery = Gallery(exact_up_to=exact_up_to, refit_share=None)
    for start in (0, 400):  # the statistics know of no second camera: nothing is centred
        gallery.add(x[start : start + 400], camids=camids[start : start + 400])
    options = {"query_camids": [0, 0], "rerank": how}
    assert (camids[gallery.search(x[:2], 5, **options).ids] == 0).all()
    found = gallery.search(x[:2], 5, exclude_camera=True, **options)
    assert (camids[found.ids] == 1).all()
    assert (found.ids >= 0).all()


def test_unknown_people_by_labelled_queries():
    drawn = Drawn(7, people=40, noise=0.3)
    x, camids, who = drawn.images(300)
    inside = who < 20
    gallery = Gallery()
    gallery.add(x[inside], camids=camids[inside], labels=who[inside])
    q, q_cams, asked = drawn.images(200)
    genuine, impostor = asked < 20, (asked >= 20) & (asked < 30)
    threshold = gallery.calibrate(
        q[genuine], q[impostor], genuine_camids=q_cams[genuine], impostor_camids=q_cams[impostor], fpr=0.1
    )
    allowed = int(0.1 * impostor.sum())
    found = gallery.search(q[impostor], 2, query_camids=q_cams[impostor], threshold=threshold)
    assert (found.ids[:, 0] >= 0).sum() == allowed == round(threshold.fpr * impostor.sum())
    refused = found.ids[:, 0] < 0
    assert (found.ids[refused] == -1).all()
    assert (found.labels[refused] == "unknown").all()
    assert np.isfinite(found.distances).all()
    known = gallery.search(q[genuine], 1, query_camids=q_cams[genuine], threshold=threshold)
    assert (known.ids[:, 0] >= 0).mean() == pytest.approx(threshold.tpr)
    assert threshold.tpr > 0.8
    strangers = asked >= 30
    fresh = gallery.search(q[strangers], 1, query_camids=q_cams[strangers], threshold=threshold)
    assert (fresh.ids >= 0).mean() < 0.3
    # A score is 1 - d1 / d11 of the distances that a search returns.
    eleven = gallery.search(q[:5], 11, query_camids=q_cams[:5]).distances
    score = 1 - np.sqrt(eleven[:, 0] / eleven[:, 10])
    for row in range(5):
        for step, is_known in ((-1e-5, True), (1e-5, False)):
            limit = float(np.clip(score[row] + step, 0, 1))
            one = gallery.search(q[row : row + 1], 1, query_camids=q_cams[row : row + 1], threshold=limit)
            assert (one.ids[0, 0] >= 0) == is_known


@pytest.mark.parametrize("dim", [8, 64])
def test_the_rate_of_strangers_without_labels(dim):
    """Strangers through and through: independent directions. The closed form is a prediction, not a bound."""
    rng = np.random.default_rng(8)
    gallery = Gallery()
    gallery.add(rng.normal(size=(1500, dim)).astype(np.float32))
    q = rng.normal(size=(2000, dim)).astype(np.float32)
    for rate in (0.2, 0.05):
        threshold = gallery.calibrate(fpr=rate)
        assert not threshold.centralized
        taken = (gallery.search(q, 1, threshold=threshold).ids >= 0).mean()
        assert 0.2 * rate < taken < 1.5 * rate


def test_frames_of_a_track_are_one_image():
    drawn = Drawn(9)
    x, _, _ = drawn.images(12)
    tracks = ["b", "a", "b", "b", "a", "c", "b", "c", "c", "c", "a", "b"]
    quality = np.array([1, 2, 0, 1, 1, 3, 1, 1, 1, 1, 1, 0.5])
    x[6] = x[3]  # a copy shares the weight of its original
    y = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = []
    for name in ("b", "a", "c"):
        rows = [row for row, track in enumerate(tracks) if track == name]
        total = 0
        for row in rows:
            copies = (
                sum(float(np.clip((y[row] @ y[other] - 0.95) / 0.05, 0, 1)) for other in rows if quality[other] > 0)
                or 1
            )
            total = total + quality[row] / max(copies, 1) * y[row]
        expected.append(total / np.linalg.norm(total))
    found = pooled(Rows(x, "features", normalize=True), Tracks(tracks, 12), quality)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    gallery = Gallery()
    ids = gallery.add(x, ["B", "A", "C"], group_by=tracks, quality=quality, camids=[2] * 12, labels=tracks)
    assert ids.tolist() == ["B", "A", "C"]
    np.testing.assert_allclose(gallery.features(raw=True), expected, atol=1e-6)
    result = gallery.search(x, 1, group_by=tracks, quality=quality, query_camids=[2] * 12)
    assert result.labels.tolist() == [["b"], ["a"], ["c"]]
    with pytest.raises(ValueError, match="camids must be one for all frames of a track, got others at row 4"):
        gallery.add(x, [*"DEF"], group_by=tracks, camids=[2, 2, 2, 2, 3, 2, 2, 2, 2, 2, 3, 2])
    with pytest.raises(ValueError, match="quality must be above 0 for a frame of each track; track 'a'"):
        gallery.add(x, group_by=tracks, quality=quality * (np.array(tracks) != "a"))
    with pytest.raises(ValueError, match="quality must be None without group_by"):
        gallery.add(x, quality=quality)
    assert len(gallery) == 3


def test_images_in_either_order_of_colours():
    rng = np.random.default_rng(10)
    crops = [rng.integers(0, 256, (20, 10, 3), dtype=np.uint8) for _ in range(70)]

    def model(batch):
        return batch.mean((2, 3))

    gallery = Gallery(Centralizer(Extractor(model, transform="torchreid")))
    ids = gallery.add_images([crop[..., ::-1] for crop in crops], colors="bgr", labels=range(70))
    assert ids.tolist() == list(range(70))
    found = gallery.search_images(crops[:5], 1, colors="rgb")
    np.testing.assert_array_equal(found.labels[:, 0], range(5))
    assert (found.distances < 1e-6).all()
    for nothing in ([], np.empty((0, 20, 10, 3), dtype=np.uint8)):
        assert gallery.add_images(nothing).shape == (0,)
        assert gallery.search_images(nothing, 4).ids.shape == (0, 4)
    with pytest.raises(ValueError, match="extractor must be given"):
        Gallery().add_images(crops[:1])
    with pytest.raises(ValueError, match="colors must be one of"):
        gallery.search_images(crops[:1], colors="gbr")


@pytest.mark.parametrize("alone", [100, 1000], ids=["cameras apart", "all together"])
@pytest.mark.parametrize("name", METHODS)
def test_a_large_gallery_is_searched_by_inverted_lists(name, alone, capfd, monkeypatch):
    monkeypatch.setattr(engines, "_ALONE", alone)
    drawn, (_, known) = Drawn(11, people=100), METHODS[name]
    x, camids, _ = drawn.images(1200)
    q, q_cams, _ = drawn.images(30)
    exact = built(name, x[:1100], camids[:1100], exact_up_to=None, refit_share=None)
    large = built(name, x[:1100], camids[:1100], exact_up_to=1000, refit_share=None)
    assert exact.recall == 1
    assert 0.95 <= large.recall <= 1
    for gallery in (exact, large):
        for row in range(1100, 1200):
            gallery.add(x[row : row + 1], camids=camids[row : row + 1] if known else None)
        gallery.remove(range(40))
        gallery.update([50, 51], x[:2])
    asked = {"query_camids": q_cams} if known else {}
    one, other = (gallery.search(q, 10, **asked) for gallery in (exact, large))
    assert (one.ids[:, 0] == other.ids[:, 0]).mean() >= 0.9
    shared = np.mean([len({*a} & {*b}) / 10 for a, b in zip(one.ids, other.ids, strict=True)])
    assert shared > 0.9
    assert not np.isin(other.ids, range(40)).any()
    if known:
        left_out = large.search(q, 10, exclude_camera=True, **asked).ids
        assert (camids[left_out] != q_cams[:, None]).all()
    how = {"rerank": "camera"} if known else {"rerank": "k-reciprocal"}
    one, other = (gallery.search(q, 5, **how, **asked) for gallery in (exact, large))
    assert (one.ids[:, 0] == other.ids[:, 0]).mean() >= 0.7
    assert "WARNING" not in capfd.readouterr().err  # of faiss, that there is little to train with


def unusable(gpu):
    raise UnusableError("it is broken")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("Inverted.recall", 0.9, "lists find 90 % of neighbours"),
        ("usable_faiss", unusable, "faiss cannot be used (it is"),
    ],
)
def test_where_inverted_lists_will_not_do_all_images_are_compared(name, value, said, monkeypatch, caplog):
    if name == "Inverted.recall":
        fixed = property(lambda self: value, lambda self, found: None)
        monkeypatch.setattr(engines.Inverted, "recall", fixed, raising=False)
        monkeypatch.setattr(engines, "_PROBES", 1 << 20)  # no further tries
    else:
        monkeypatch.setattr(engines, name, value)
    x, camids, _ = Drawn(15).images(400)
    gallery = built("cameras", x, camids, exact_up_to=100)
    assert gallery.recall == 1
    assert said in caplog.text
    np.testing.assert_array_equal(gallery.features(), built("cameras", x, camids).features())


def test_nothing_is_valid_everywhere():
    gallery = Gallery()
    for empty in ([], (), np.empty((0, 4), np.float32), np.empty(0, np.float32), torch.empty(0, 4)):
        assert gallery.add(empty).tolist() == []
        result = gallery.search(empty, 3)
        assert result.distances.shape == result.ids.shape == result.labels.shape == (0, 3)
    assert len(gallery) == 0
    assert gallery.features().shape == (0, 0)
    gallery.remove([])
    gallery.update([], [])
    gallery.refit()
    none = gallery.search(np.ones((2, 4), np.float32), 3)
    assert np.isinf(none.distances).all()
    assert (none.ids == -1).all()
    assert (none.labels == None).all()  # noqa: E711 - of an array
    assert (gallery.search(np.ones((2, 4), np.float32), 1, threshold=0.1).labels == "unknown").all()
    gallery.add(np.eye(4, dtype=np.float32)[:1])
    found = gallery.search(np.ones((1, 4), np.float32), 3)
    assert found.ids.tolist() == [[0, -1, -1]]
    gallery.remove([0])
    assert len(gallery) == 0
    assert gallery.add(np.eye(4, dtype=np.float32)).tolist() == [1, 2, 3, 4]  # an id is not given twice


def test_what_is_refused_and_leaves_the_gallery_as_it_was():
    x, camids, _ = Drawn(12).images(80)
    gallery = Gallery(dim=16)
    gallery.add(x, ids=[f"i{row}" for row in range(80)], camids=camids)
    before = gallery.features()
    bad = x[:2].copy()
    bad[1, 3] = np.nan
    refused = (
        (lambda: gallery.add(bad, ids=["a", "b"]), ValueError, "features must be finite; 1 of 2 rows are not"),
        (lambda: gallery.add(x[:1, :9], ids=["a"]), ValueError, "features must have the gallery's 16 columns, got 9"),
        (
            lambda: gallery.add(0 * x[:2], ids=["a", "b"]),
            ValueError,
            "features must not hold zero rows, .* .row 0, 1",
        ),
        (lambda: gallery.add(x[:1]), ValueError, "ids must be given"),
        (lambda: gallery.add(x[:1], ids=[5]), TypeError, "ids must all be integers, or all strings"),
        (lambda: gallery.add(x[:1], ids=["i3"]), ValueError, "ids must be new, each once, got i3"),
        (lambda: gallery.add(x[:2], ids=["a", "a"]), ValueError, "ids must be new, each once, got a"),
        (lambda: gallery.add(x[:2], ids=["a"]), ValueError, "ids must hold one id per image, 2, got 1"),
        (lambda: gallery.add(x[:1], ids=["a"], camids=[-3]), ValueError, "camids must be at least 0, or -1"),
        (lambda: gallery.add(x[:1], ids=["a"], labels=[{}]), TypeError, "labels must hold names or numbers, got dict"),
        (lambda: gallery.add(x[:1], ids=["a"], labels=[1, 2]), ValueError, "labels must hold one per row, 1, got 2"),
        (
            lambda: gallery.add(x[:4], ids=[*"abcd"], labels=1.5),
            TypeError,
            "labels must be a sequence with one per row",
        ),
        (lambda: gallery.add(x[:2], ids=["a", "b"], group_by=[1, 1]), ValueError, "ids must hold one id per track, 1"),
        (lambda: gallery.search(x[:1], group_by=0.5), TypeError, "group_by must hold one track id per row"),
        (
            lambda: gallery.search(x[:3], group_by=[2, -1, None]),
            ValueError,
            "got None, NaN or -1 at rows 1, 2. Leave boxes",
        ),
        (
            lambda: Gallery(metadata={"mean": x[0]}),
            TypeError,
            "metadata must hold what JSON can, got ndarray for 'mean'",
        ),
        (lambda: Gallery(metadata={1: 2}), TypeError, "metadata must have strings as keys, got 1"),
        (lambda: gallery.calibrate(fpr=1), ValueError, "fpr must be above 0 and below 1, got 1"),
        (lambda: gallery.remove(["i1", "nobody"]), KeyError, "has no nobody"),
        (lambda: gallery.remove(["i1", "i1"]), ValueError, "ids must name each image once"),
        (lambda: gallery.update(["i1"], x[:2]), ValueError, "features must hold one row per id, 1, got 2"),
        (lambda: gallery.search(x[:1], 0), ValueError, "k must be at least 1"),
        (lambda: gallery.search(x[:1], rerank="gnn"), ValueError, "rerank must be one of"),
        (lambda: gallery.search(x[:1], rerank="camera"), ValueError, "query_camids must name a camera"),
        (lambda: gallery.search(x[:1], threshold=1.5), ValueError, r"threshold must be in \[0, 1\]"),
        (lambda: gallery.search(x[:1], group_by=["t", "u"]), ValueError, "group_by must hold one track id per row"),
        (lambda: gallery.calibrate(x[:4]), ValueError, "impostor must be given with genuine"),
        (lambda: gallery.calibrate(impostor=[]), ValueError, "impostor must hold at least one query"),
        (lambda: gallery.calibrate(fpr=0), ValueError, "fpr must be above 0 and below 1, got 0"),
    )
    for call, error, message in refused:
        with pytest.raises(error, match=message):
            call()
    assert len(gallery) == 80
    np.testing.assert_array_equal(gallery.features(), before)
    for call, error, message in (
        (lambda: Gallery(object()), TypeError, "centralizer must be a pose2id.Centralizer"),
        (lambda: Gallery(refit_share=-1), ValueError, "refit_share must be in"),
        (lambda: Gallery(Centralizer(method="cameras")).add(x), ValueError, "camids must name cameras"),
        (lambda: Gallery().calibrate(), ValueError, "the gallery must hold 48 images"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (None, TypeError, "ids must be a sequence of integers or strings, got None"),
        (np.array(1), TypeError, "ids must be a sequence"),
        (torch.tensor(1), TypeError, "ids must be a sequence"),
        (b"\x01", TypeError, "ids must be a sequence"),
        (np.array([[1, 2]]), ValueError, r"ids must have one dimension, got shape \(1, 2\)"),
        (np.array([[1], [2]]), ValueError, "ids must have one dimension"),
    ],
)
def test_ids_are_integers_or_strings_in_a_row(ids, error, message):
    gallery = Gallery()
    gallery.add(Drawn(17).images(5)[0])
    with pytest.raises(error, match=message):
        gallery.remove(ids)
    assert len(gallery) == 5


def test_a_method_that_needs_cameras_keeps_one():
    x, camids, _ = Drawn(17).images(100)
    camids[:70] = -1
    for share in (None, 0.05):
        gallery = Gallery(Centralizer(method="cameras"), refit_share=share)
        gallery.add(x, camids=camids)
        with pytest.raises(ValueError, match="ids must leave an image of a known camera for method='cameras'"):
            gallery.remove(range(70, 100))
        with pytest.raises(ValueError, match="ids must leave an image of a known camera"):
            gallery.update(range(70, 100), camids=-1, labels="new")
        assert len(gallery) == 100
        assert gallery.labels([99]).tolist() == [None]
        gallery.remove(range(70, 99))
        assert gallery.add(x[:2]).tolist() == [100, 101]
        gallery.remove(gallery.ids)
        assert len(gallery) == 0


def test_an_update_is_one_change():
    x, _, _ = Drawn(17).images(1000)
    gallery = Gallery(refit_share=0.05)
    gallery.add(x)
    state = gallery._content.state
    for row in range(50):
        gallery.update([row], x[row : row + 1] + 0.1)
    assert gallery._content.state is state
    gallery.update([50], x[50:51] + 0.1)
    assert gallery._content.state is not state


def test_an_emptied_gallery_keeps_its_container():
    gallery = Gallery()
    gallery.add(torch.ones(2, 3))
    gallery.remove([0, 1])
    assert torch.equal(gallery.features(), torch.empty(0, 3))


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_re_ranking_does_not_ask_how_long_features_are(scale):
    x, camids, _ = Drawn(19).images(200)
    q, q_cams, _ = Drawn(20).images(6)
    distances = []
    for factor in (1, scale):
        gallery = Gallery(Centralizer(method="guarded"))
        gallery.add(x * np.float32(factor), camids=camids)
        distances.append(gallery.search(q, 200, query_camids=q_cams, rerank="k-reciprocal").distances)
    np.testing.assert_allclose(*distances, atol=1e-5)


def test_what_float32_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="features must not hold zero rows"):
        Gallery().add(np.full((2, 4), 1e-300))


@pytest.mark.parametrize(
    ("group_by", "error", "message"),
    [
        ([np.nan] * 2, ValueError, "group_by must name a track for every row, got None, NaN or -1 at rows 0, 1"),
        (np.full(2, np.nan), ValueError, "group_by must name a track"),
        ([[1], [1]], TypeError, "group_by must hold integers or strings, got list"),
        (np.ones((2, 1)), TypeError, "group_by must hold integers or strings, got ndarray"),
        ([7, 7], ValueError, "features of a track must not cancel each other out; those of 7 do"),
    ],
)
def test_tracks_that_are_none(group_by, error, message):
    x, _, _ = Drawn(17).images(1)
    gallery = Gallery()
    with pytest.raises(error, match=message):
        gallery.add(np.concatenate([x, -x]), group_by=group_by)
    assert len(gallery) == 0


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_gallery_is_not_copied_in_part(again):
    with pytest.raises(TypeError, match="Save it, and load it"):
        again(Gallery())


def test_no_image_needs_no_id():
    x, _, _ = Drawn(17).images(1)
    gallery = Gallery()
    gallery.add(x, ids=["a"])
    assert gallery.add([]).shape == (0,)


def test_the_next_integers_fit_into_64_bits():
    x, _, _ = Drawn(17).images(2)
    gallery = Gallery()
    gallery.add(x[:1], ids=[2**63 - 2])
    with pytest.raises(ValueError, match="ids must be given: the next integers, from 9223372036854775807 on"):
        gallery.add(x)
    assert gallery.add(x[:1]).tolist() == [2**63 - 1]
    with pytest.raises(ValueError, match="ids must be given"):
        gallery.add(x[:1])
    assert gallery.ids.tolist() == [2**63 - 2, 2**63 - 1]


def test_cameras_are_the_same_in_every_call():
    x, camids, _ = Drawn(13).images(160)
    words = np.array(["north", "south", "7"])[camids]
    numbered, named = Gallery(), Gallery()
    numbered.add(x, camids=camids)
    for start in range(0, 160, 40):
        named.add(x[start : start + 40], camids=words[start : start + 40])
    named.refit()
    np.testing.assert_allclose(named.features(), numbered.features(), atol=1e-6)
    one = numbered.search(x[:4], 5, query_camids=camids[:4], exclude_camera=True)
    other = named.search(x[:4], 5, query_camids=words[:4].tolist(), exclude_camera=True)
    np.testing.assert_array_equal(one.ids, other.ids)
    one = numbered.search(x[:4], 5, query_camids=[9] * 4, rerank="camera")
    other = named.search(x[:4], 5, query_camids=["new"] * 4, rerank="camera")
    np.testing.assert_array_equal(one.ids, other.ids)


def test_what_it_says(caplog):
    x, camids, _ = Drawn(14).images(120)
    gallery = Gallery()
    assert repr(gallery) == "Gallery(0 images, dim=None, empty)"
    assert gallery.evidence is None
    with caplog.at_level(logging.INFO, logger="pose2id.gallery.gallery"):
        gallery.add(x, camids=camids)
    assert caplog.messages == [f"gallery of 120: {gallery.reason}"]
    assert repr(gallery).startswith("Gallery(120 images, dim=16, cameras: 3 cameras, gate ")
    assert gallery.evidence.gate > 0.5
    assert 7 in gallery
    assert 700 not in gallery
    assert Threshold(0.5) == Threshold(0.5, True, None, None)


SETS = (
    ("val100", "osnet_msmt17"),
    ("val100", "osnet_lda256"),
    ("3dpes", "retail0288"),
    ("viper", "osnet_msmt17"),
    ("pku_reid", "osnet_msmt17"),
)


@pytest.mark.parametrize("known", [False, True], ids=["no cameras", "cameras"])
@pytest.mark.parametrize(("name", "model"), SETS)
def test_real_images_one_by_one_are_worth_what_they_are_at_once(name, model, known, real_features):
    data = real_features(name)
    is_query, features = data["is_query"].astype(bool), data[f"feat_{model}"].astype(np.float32)
    q, g = features[is_query], features[~is_query]
    labels = [data[key][mask] for key in ("pids", "camids") for mask in (is_query, ~is_query)]
    cameras = {"query_camids": labels[2], "gallery_camids": labels[3]} if known else {}
    expected = evaluate(*Centralizer().enhance(q, g, camera_statistics="gallery", **cameras), *labels)
    gallery, order = Gallery(), np.random.default_rng(1).permutation(len(g))
    for start in [0, *range(300, len(g))]:  # the first 300 at once, to save time
        rows = order[start : 300 if start == 0 else start + 1]
        gallery.add(g[rows], ids=rows, camids=labels[3][rows] if known else None)
    found = gallery.search(q, len(g), query_camids=labels[2] if known else None)
    distances = np.empty(found.distances.shape, np.float32)
    np.put_along_axis(distances, found.ids, found.distances, 1)
    result = evaluate_rank(distances, *labels)
    assert abs(100 * (result.mAP - expected.mAP)) < 0.5  # between two refits; after one they are equal
    assert abs(result.rank(1) - expected.rank(1)) * len(q) < 2.5  # at most two queries


@pytest.mark.parametrize("what", ["add", "remove", "update"])
@pytest.mark.parametrize("where", ["insert", "remove"])
def test_a_change_that_is_cut_short_is_undone(what, where, monkeypatch):
    x, camids, _ = Drawn(18).images(120)
    gallery = Gallery(Centralizer(method="cameras"), refit_share=None)
    gallery.add(x[:110], camids=camids[:110], labels=list(range(110)))
    gallery.remove([4])
    whole = Gallery(Centralizer(method="cameras"), refit_share=None)
    whole.add(np.delete(x[:110], 4, 0), camids=np.delete(camids[:110], 4))
    before = gallery.search(x[:5], 3, query_camids=camids[:5])

    def change():
        if what == "add":
            gallery.add(x[110:], camids=camids[110:], labels="new")
        elif what == "remove":
            gallery.remove([7, 3])
        else:
            gallery.update([7, 3], x[110:112], [5, 5], "new")

    linked, half = type(gallery._content.state.linked), getattr(type(gallery._content.state.linked), where)

    def cut(self, *args):
        half(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(linked, where, cut)
        if (what, where) in (("add", "remove"), ("remove", "insert")):
            change()  # which does not come there
            return
        with pytest.raises(KeyboardInterrupt):
            change()
    assert len(gallery) == 109
    assert gallery.ids.tolist() == [*range(4), *range(5, 110)] == gallery.labels().tolist()
    np.testing.assert_array_equal(gallery.features(raw=True), np.delete(x[:110], 4, 0))
    np.testing.assert_allclose(gallery.features(), whole.features(), atol=1e-6)
    after = gallery.search(x[:5], 3, query_camids=camids[:5])
    np.testing.assert_array_equal(before.ids[:, 0], after.ids[:, 0])
    change()
    assert len(gallery) == {"add": 119, "remove": 107, "update": 109}[what]


def test_a_refused_addition_leaves_no_names_of_cameras(tmp_path):
    gallery = Gallery()
    gallery.add(np.eye(3, 4, dtype=np.float32), camids=["hall", "hall", "door"])
    with pytest.raises(ValueError, match="ids must be new"):
        gallery.add(np.ones((1, 4), np.float32), ids=[0], camids=["cellar"])
    gallery.save(tmp_path / "g.safetensors")
    assert b"door" in (tmp_path / "g.safetensors").read_bytes()
    assert b"cellar" not in (tmp_path / "g.safetensors").read_bytes()


def test_thresholds_of_too_little_or_of_copies(caplog):
    x, _, _ = Drawn(19).images(60)
    for images in (0, 1):
        gallery = Gallery()
        gallery.add(x[:images])
        with pytest.raises(ValueError, match="at least two images to calibrate"):
            gallery.calibrate(impostor=x[5:])
    gallery = Gallery()
    gallery.add(x)
    gallery.calibrate()
    assert not caplog.text
    gallery = Gallery()
    gallery.add(np.repeat(x[:20], 15, 0))
    assert gallery.calibrate().score > 0.99
    assert "hardly any query will pass" in caplog.text
