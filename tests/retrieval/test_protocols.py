from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import protocols as literal

from pose2id import evaluate, evaluate_rank
from pose2id.retrieval import protocols
from pose2id.retrieval.protocols import (
    CUHK03,
    LEAVE_ONE_OUT,
    MARKET1501,
    OCCLUDED_REID,
    by_name,
    pool,
    regdb,
    sysu_mm01,
    vehicleid,
)

RULES = {
    "market1501": lambda q, g, p, c: p[0][q] == p[1][g] and c[0][q] == c[1][g],
    "cuhk03": lambda q, g, p, c: p[0][q] == p[1][g] and c[0][q] == c[1][g],
    "occluded-reid": lambda q, g, p, c: False,
}


def same(result, expected):
    mean_ap, cmc, minp, valid = expected
    assert result.mAP == pytest.approx(mean_ap, abs=1e-12)
    assert result.mINP == pytest.approx(minp, abs=1e-12)
    assert result.num_valid_queries == valid
    np.testing.assert_allclose(result.cmc, cmc, atol=1e-12)


def checked(protocol, distmat, pids, camids, is_dropped, **options):
    """Against the literal restatement, where any query has a match."""
    q, g = distmat.shape

    def call():
        return protocol.evaluate(np.ones((q, 2)), np.ones((g, 2)), *pids, *camids, way=lambda *_: distmat, max_rank=8)

    with np.errstate(all="ignore"):
        try:
            expected = literal.measured(distmat, *pids, is_dropped, 8, **options)
        except RuntimeWarning:  # the mean of nothing
            with pytest.raises(ValueError, match="has a match"):
                call()
            return
    same(call(), expected)


@pytest.mark.parametrize("name", RULES)
@given(seed=st.integers(0, 2**32 - 1), q=st.integers(1, 8), g=st.integers(1, 20), cameras=st.integers(1, 3))
def test_one_trial_equals_the_literal_protocol(name, seed, q, g, cameras):
    rng = np.random.default_rng(seed)
    distmat = rng.integers(20, 30, (q, g)).astype(float)
    pids = [rng.integers(-1, 4, q), rng.integers(-1, 4, g)]
    camids = [rng.integers(0, cameras, q), rng.integers(0, cameras, g)]
    checked(by_name(name), distmat, pids, camids, lambda i, j: RULES[name](i, j, pids, camids))


@pytest.mark.parametrize("drop_same_camera", [False, True])
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 12))
def test_leave_one_out_equals_the_literal_protocol(drop_same_camera, seed, n):
    rng = np.random.default_rng(seed)
    distmat, pids, camids = rng.integers(20, 25, (n, n)).astype(float), rng.integers(-1, 3, n), rng.integers(0, 3, n)

    def is_dropped(i, j):
        return i == j or (drop_same_camera and pids[i] == pids[j] and camids[i] == camids[j])

    protocol = by_name("leave-one-out", drop_same_camera=drop_same_camera)
    checked(protocol, distmat, [pids, pids], [camids, camids], is_dropped)


def test_leave_one_out_drops_a_row_and_not_its_copies():
    x = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert evaluate(x, x, [1, 2, 1, 2], [1, 2, 1, 2]).rank1 > 0
    result = LEAVE_ONE_OUT.evaluate(x, x, [1, 2, 1, 2], [1, 2, 1, 2])
    assert result.rank1 == 0  # the copy is another person, and is nearest
    assert LEAVE_ONE_OUT.evaluate(x, x, [1, 1, 2, 2], [1, 1, 2, 2]).rank1 == 1
    assert LEAVE_ONE_OUT.leave_one_out
    with pytest.raises(ValueError, match="same images"):
        LEAVE_ONE_OUT.evaluate(x, x[:3], [1, 2, 1, 2], [1, 2, 1])


def test_market1501_is_evaluate_to_the_last_bit(rng):
    qf, gf = rng.standard_normal((30, 8)), rng.standard_normal((90, 8))
    labels = rng.integers(0, 6, 30), rng.integers(-1, 6, 90), rng.integers(0, 3, 30), rng.integers(0, 3, 90)
    for metric in ("cosine", "euclidean"):
        assert MARKET1501.evaluate(qf, gf, *labels, metric=metric) == evaluate(qf, gf, *labels, metric=metric)
        assert CUHK03.evaluate(qf, gf, *labels, metric=metric) == evaluate(qf, gf, *labels, metric=metric)
        assert OCCLUDED_REID.evaluate(qf, gf, *labels, metric=metric) == evaluate(qf, gf, *labels[:2], metric=metric)
    distmat = rng.random((30, 90)) + 5
    assert MARKET1501.evaluate(qf, gf, *labels, way=lambda *_: distmat) == evaluate_rank(distmat, *labels)


def sysu(rng, persons=(1, 4, 6, 11), most=13):
    """Names, identities and cameras of a data set in miniature, in no order; some persons miss some cameras."""
    names = []
    for person in persons:
        for camera in range(1, 7):
            count = int(rng.integers(0, most)) if camera not in (1, 3) else 3
            names += [f"cam{camera}/{person:04d}/{number:04d}.jpg" for number in range(1, count + 1)]
    names = [names[i] for i in rng.permutation(len(names))]
    queries = [name for name in names if name[3] in "36"]
    gallery = [name for name in names if name[3] not in "36"]
    labels = [[int(name[5:9]) for name in side] for side in (queries, gallery)]
    return names, queries, gallery, [*labels, *[[int(name[3]) for name in side] for side in (queries, gallery)]]


def permutation_of(rng, names, persons=12, trials=10):
    """As scipy reads rand_perm_cam.mat: cells of cameras hold cells of persons, those a row for each trial."""
    cells = np.empty((6, 1), dtype=object)
    for camera in range(1, 7):
        cells[camera - 1, 0] = np.empty((persons, 1), dtype=object)
        for person in range(1, persons + 1):
            count = sum(name.startswith(f"cam{camera}/{person:04d}/") for name in names)
            drawn = [rng.permutation(count) + 1 for _ in range(trials)] if count else np.empty((0, 0))
            cells[camera - 1, 0][person - 1, 0] = np.array(drawn, dtype=np.uint8)
    return cells


@pytest.mark.parametrize("mode", ["all", "indoor"])
@pytest.mark.parametrize("shots", [1, 10])
@pytest.mark.parametrize("sampler", ["seeded", "official"])
def test_sysu_mm01_equals_the_literal_protocol(mode, shots, sampler, rng, tmp_path):
    names, queries, gallery, labels = sysu(rng)
    options = {}
    if sampler == "official":
        permutation = permutation_of(rng, names)
        from scipy.io import savemat  # noqa: PLC0415

        savemat(tmp_path / "rand_perm_cam.mat", {"rand_perm_cam": permutation})
        options = {"permutation": tmp_path / "rand_perm_cam.mat"}
    protocol = sysu_mm01(mode, shots, sampler, **options)
    distmat = rng.integers(20, 60, (len(queries), len(gallery))).astype(float)
    place = {name: index for index, name in enumerate(gallery)}
    paths = [f"/data/SYSU-MM01/{name}" for name in gallery]
    trials = protocol.trials(*labels, g_names=paths)
    assert len(trials) == 10
    expected = []
    state = random.getstate()
    for number, trial in enumerate(trials):
        if sampler == "official":
            drawn = literal.official_gallery(permutation, (1, 4, 6, 11), mode, shots, number)
        else:
            drawn = literal.seeded_gallery(gallery, mode, shots, number)
        rows = sorted(place[name] for name in drawn)
        assert trial.gallery.tolist() == rows
        assert trial.query.tolist() == list(range(len(queries)))
        camids = labels[2], [labels[3][row] for row in rows]
        pids = labels[0], [labels[1][row] for row in rows]
        expected.append(
            literal.measured(
                distmat[:, rows],
                *pids,
                lambda q, g, camids=camids: literal.same_place(camids[0][q], camids[1][g]),
                8,
                collapsed=True,
            )
        )
    random.setstate(state)
    # The features are the rows' own numbers, so that the way knows which images it was given.
    qf, gf = np.arange(1.0, len(queries) + 1)[:, None], np.arange(1.0, len(gallery) + 1)[:, None]

    def way(q, g, q_camids, g_camids):
        found = distmat[q[:, 0].astype(int) - 1][:, g[:, 0].astype(int) - 1]
        assert [labels[3][row] for row in g[:, 0].astype(int) - 1] == list(g_camids)
        q[:] = g[:] = 0  # of no consequence
        return found

    result = protocol.evaluate(qf, gf, *labels, g_names=paths, way=way, max_rank=8)
    for trial, wanted in zip(result.trials, expected, strict=True):
        same(trial, wanted)
    assert result.mAP == pytest.approx(np.mean([wanted[0] for wanted in expected]))
    np.testing.assert_allclose(result.cmc, np.mean([wanted[1] for wanted in expected], 0))
    assert result.mINP == pytest.approx(np.mean([wanted[2] for wanted in expected]))
    assert (qf > 0).all()
    assert (gf > 0).all()


def test_the_seeded_sampler_leaves_pythons_generator_alone(rng):
    *_, labels = sysu(rng)
    state = random.getstate()
    sysu_mm01().trials(*labels)
    assert random.getstate() == state


def test_camera_2_is_skipped_for_camera_3_alone_however_cameras_are_written():
    pids, distmat = ([1, 1], [2, 1, 1]), np.array([[5.0, 4, 3], [5, 4, 3]])
    for camids in (([3, 6], [2, 1, 2]), (["3", "6"], ["2", "1", "2"]), (torch.tensor([3, 6]), torch.tensor([2, 1, 2]))):
        protocol = sysu_mm01(num_trials=1)
        # Of person 1 and camera 2 as of camera 1 there is one image: everything is drawn.
        result = protocol.evaluate(np.ones((2, 1)), np.ones((3, 1)), *pids, *camids, way=lambda *_: 9 - distmat)
        assert result.average_precision.tolist() == [1, pytest.approx((1 / 2 + 2 / 3) / 2)]
        assert result.rank1 == 0.5


def test_collapsed_identities():
    # Two images of person 2 lie before the first of person 1: the second place among persons, the third among images.
    pids, camids = ([1], [2, 2, 1, 3]), ([6], [1, 4, 1, 1])
    way = {"way": lambda *_: np.array([[4.0, 5, 6, 7]]), "max_rank": 3}
    result = sysu_mm01(num_trials=1).evaluate(np.ones((1, 1)), np.ones((4, 1)), *pids, *camids, **way)
    assert result.cmc.tolist() == [0, 1, 1]
    assert result.mAP == 1 / 3


def test_regdb_takes_the_listed_rows_in_both_directions(rng):
    qf, gf = rng.standard_normal((12, 5)), rng.standard_normal((15, 5))
    pids, camids = (rng.integers(0, 3, 12), rng.integers(0, 3, 15)), (np.zeros(12, int), np.zeros(15, int))
    lists = [(rng.permutation(12)[:8], rng.permutation(15)[:9]) for _ in range(10)]
    there = regdb(lists).evaluate(qf, gf, *pids, *camids)
    back = regdb([pair[::-1] for pair in lists]).evaluate(gf, qf, *pids[::-1], *camids[::-1])
    for result, ways in ((there, [0, 1]), (back, [1, 0])):
        feats, labels = [(qf, gf)[i] for i in ways], [pids[i] for i in ways]
        for trial, pair in zip(result.trials, lists, strict=True):
            rows = [pair[i] for i in ways]
            assert trial == evaluate(feats[0][rows[0]], feats[1][rows[1]], labels[0][rows[0]], labels[1][rows[1]])
    assert there != back
    with pytest.raises(TypeError, match="row numbers"):
        regdb([(np.ones(12, bool), np.ones(15, bool))])
    with pytest.raises(ValueError, match="rows of the gallery"):
        regdb([([0], [15])]).evaluate(qf, gf, *pids)


def test_vehicleid_draws_one_image_of_each_identity(rng):
    x, pids = rng.standard_normal((40, 6)), rng.integers(0, 9, 40)
    pids[0] = 77  # alone: in the gallery, never a query
    protocol = vehicleid(seed=3)
    trials = protocol.trials(pids, pids)
    assert len({tuple(trial.gallery) for trial in trials}) == len(trials) == 10
    result = protocol.evaluate(x, x, pids, pids)
    for number, (trial, measured) in enumerate(zip(trials, result.trials, strict=True)):
        drawn, generator = [], np.random.default_rng([3, number])
        for pid in sorted(set(pids.tolist())):
            drawn.append(int(generator.choice([row for row in range(40) if pids[row] == pid])))
        assert trial.gallery.tolist() == sorted(drawn)
        assert trial.query.tolist() == [row for row in range(40) if row not in drawn]
        assert 0 not in trial.query
        assert measured == evaluate(x[trial.query], x[trial.gallery], pids[trial.query], pids[trial.gallery])
    assert vehicleid(seed=4).evaluate(x, x, pids, pids) != result
    assert vehicleid(seed=3).evaluate(x, x, pids, pids) == result


def test_what_a_way_writes_is_its_own(rng):
    qf, gf = torch.randn(4, 3), rng.standard_normal((6, 3))
    labels = [np.array([1, 2, 1, 2]), np.array([1, 2, 1, 2, 3, 3]), np.zeros(4, int), np.ones(6, int)]
    before = [np.asarray(x).copy() for x in (qf, gf, *labels)]

    def way(q, g, q_camids, g_camids):
        q[:], g[:], q_camids[:], g_camids[:] = 0, 0, 7, 7
        return np.ones((4, 6)) + np.arange(6)

    MARKET1501.evaluate(qf, gf, *labels, way=way)
    for mine, kept in zip((qf, gf, *labels), before, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), kept)


def test_results_of_trials(rng):
    x, pids = rng.standard_normal((40, 6)), rng.integers(0, 9, 40)
    result = vehicleid(num_trials=4).evaluate(x, x, pids, pids)
    figures = result.to_dict()
    for name, of_trial in (("mAP", lambda r: r.mAP), ("rank1", lambda r: r.rank1), ("mINP", lambda r: r.mINP)):
        values = [of_trial(trial) for trial in result.trials]
        assert figures[name] == pytest.approx(np.mean(values))
        assert figures[f"{name}_std"] == pytest.approx(np.std(values))
    assert "4 trials" in str(result)
    assert hash(result) == hash(vehicleid(num_trials=4).evaluate(x, x, pids, pids))
    np.testing.assert_array_equal(
        result.average_precision, np.concatenate([trial.average_precision for trial in result.trials])
    )
    assert result._repr_html_().count("<td>") == 6
    assert vehicleid(num_trials=1).evaluate(x, x, pids, pids).trials == ()


@pytest.mark.parametrize("kind", ["numpy", "torch", "parts"])
def test_tracklets_are_means_in_the_order_of_their_first_images(kind, rng):
    features, groups = rng.standard_normal((9, 6)).astype(np.float32), list("baabcbbca")
    expected = [np.mean([features[i] for i in range(9) if groups[i] == name], axis=0) for name in "bac"]
    given = {"numpy": features, "torch": torch.from_numpy(features), "parts": features.reshape(9, 3, 2)}[kind]
    pooled, first = pool(given, groups, pids=[4, 5, 5, 4, 4, 4, 4, 4, 5])
    assert type(pooled) is type(given)
    assert pooled.dtype == given.dtype
    assert first.tolist() == [0, 1, 4]
    np.testing.assert_allclose(np.asarray(pooled).reshape(3, 6), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"camids must be one for each group; they differ in that of row 4"):
        pool(given, groups, camids=[0, 0, 0, 0, 0, 0, 0, 1, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: by_name("duke"), "protocol must be one of"),
        (lambda: by_name("market1501", shots=1), "has no such option"),
        (lambda: sysu_mm01("outdoor"), "mode must be one of"),
        (lambda: sysu_mm01(sampler="official"), "permutation must be given"),
        (lambda: sysu_mm01(permutation=np.empty((6, 1), object)), "permutation must be given"),
        (lambda: sysu_mm01().trials([1], [1]), "must be given for SYSU-MM01"),
        (lambda: sysu_mm01().trials([1], [1], [3], [7]), "must be 1 to 6"),
        (lambda: vehicleid().trials([1, 1], [1, 2]), "same images"),
        (lambda: regdb([]), "at least one trial"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_name_has_its_protocol():
    options = {"regdb": {"trials": [([0], [0])]}}
    assert [by_name(name, **options.get(name, {})).name for name in protocols.NAMES] == list(protocols.NAMES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: protocols.by_name("leave-one-out", shots=1),
            "shots must be left out: protocol 'leave-one-out' has no",
        ),
        (lambda: protocols.by_name("regdb"), "trials must be given: protocol 'regdb' needs it"),
        (lambda: protocols.vehicleid().trials([1, 2], [1, 2]), "g_pids must have an identity with two images"),
        (
            lambda: protocols.sysu_mm01().trials([1], [1, 1], [3], [1, 1], g_names=["cam1/0001/0001.jpg"]),
            "g_names must be the gallery's 2 paths, got 1",
        ),
        (
            lambda: protocols.vehicleid().evaluate(np.eye(4), np.eye(4), [1, 1], [1, 1]),
            "qf must have one row for each of the 2 labels, got 4",
        ),
    ],
)
def test_more_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_junk_takes_no_draw_of_sysu_mm01():
    labels = [np.array(x) for x in ([1, 2], [1, 1, 1, 2, 2], [3, 6], [1, 1, 1, 1, 1])]
    junk = [labels[0], np.array([-1, -1, *labels[1]]), labels[2], np.array([1, 1, *labels[3]])]
    for trial, other in zip(protocols.sysu_mm01().trials(*labels), protocols.sysu_mm01().trials(*junk), strict=True):
        np.testing.assert_array_equal(trial.gallery + 2, other.gallery)


def test_two_sets_are_not_taken_for_one(rng):
    x, y, pids = rng.standard_normal((8, 3)), rng.standard_normal((8, 3)), np.repeat(np.arange(4), 2)
    for protocol in (protocols.LEAVE_ONE_OUT, protocols.vehicleid()):
        with pytest.raises(ValueError, match="qf and gf must be of the same images for protocol"):
            protocol.evaluate(x, y, pids, pids)
        assert protocol.evaluate(x, x.copy(), pids, pids) == protocol.evaluate(x, x, pids, pids)


def test_pandas_labels_go_by_position(rng):
    pd = pytest.importorskip("pandas", reason="needs pandas")
    x, pids = rng.standard_normal((12, 3)), np.repeat(np.arange(4), 3)
    shuffled = pd.Series(pids, index=rng.permutation(12))
    protocol = protocols.vehicleid(num_trials=2)
    assert protocol.evaluate(x, x, shuffled, shuffled) == protocol.evaluate(x, x, pids, pids)
