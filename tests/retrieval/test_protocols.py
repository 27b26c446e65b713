"""Protocols against literal restatements: what is drawn, dropped, ranked and averaged."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from reference import protocols as literal
from reference import unit
from scipy.io import savemat

from pose2id import evaluate, evaluate_rank, nfc
from pose2id.retrieval import protocols
from pose2id.retrieval.evaluation import mean_of

SEEDS = range(6)


def same(found, expected):
    mAP, cmc, mINP, count = expected  # noqa: N806 - the field's names
    assert found.mAP == pytest.approx(mAP)
    np.testing.assert_allclose(found.cmc[: len(cmc)], cmc)
    assert found.mINP == pytest.approx(mINP)
    assert found.num_valid_queries == count


def squared(q, g):
    return ((unit(q)[:, None].astype(float) - unit(g)[None].astype(float)) ** 2).sum(2)


def scene(seed, q=14, g=40, people=8, cameras=(1, 2, 3)):
    """Few values, so that distances tie; junk, distractors, people without a match."""
    rng = np.random.default_rng(seed)
    qf, gf = (rng.integers(-2, 3, (n, 4)) + 0.25 for n in (q, g))
    q_pids, g_pids = rng.integers(1, people, q), rng.integers(-1, people, g)
    return (qf, gf), (q_pids, g_pids, rng.choice(cameras, q), rng.choice(cameras, g))


def exact(qf, gf):
    """Distances that both sides get as they are, to compare lists with ties."""
    return np.rint(squared(qf, gf) * 1024) / 1024


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["market1501", "cuhk03"])
def test_market1501_and_cuhk03(name, seed):
    (qf, gf), labels = scene(seed)
    protocol = protocols.by_name(name)
    distances = exact(qf, gf)
    found = protocol.evaluate(qf, gf, *labels, way=lambda *_: distances)
    same(found, literal.market(distances, *labels))
    assert found == evaluate_rank(distances, *labels)
    assert protocol.evaluate(qf, gf, *labels) == evaluate(qf, gf, *labels)
    assert protocol.evaluate(qf, gf, *labels[:2]) == evaluate(qf, gf, *labels[:2])
    assert (found.trials, protocol.num_trials) == ((), 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_occluded_reid_has_no_rule_of_cameras(seed):
    (qf, gf), labels = scene(seed)
    distances = exact(qf, gf)
    found = protocols.OCCLUDED_REID.evaluate(qf, gf, *labels, way=lambda *_: distances)
    same(found, literal.without_cameras(distances, *labels[:2]))
    assert found != protocols.MARKET1501.evaluate(qf, gf, *labels, way=lambda *_: distances)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["distances", "features"])
def test_leave_one_out_drops_the_image_itself(kind, seed):
    (_, x), labels = scene(seed)
    pids = labels[1]
    x = np.concatenate([x, x[:5]])  # exact copies of images stay
    pids = np.concatenate([pids, pids[:5]])
    distances = exact(x, x)
    if kind == "distances":
        found = protocols.LEAVE_ONE_OUT.evaluate(x, x, pids, pids, way=lambda *_: distances)
    else:
        x = np.random.default_rng(seed).standard_normal(x.shape)
        x[-5:] = x[:5]
        found = protocols.LEAVE_ONE_OUT.evaluate(x, x, pids, pids)
        distances = squared(x, x).round(12)
    same(found, literal.leave_one_out(distances, pids))
    assert found.num_valid_queries < len(pids)
    assert evaluate(x, x, pids, pids).rank1 >= found.rank1


def test_without_the_image_itself_rank_1_is_not_for_nothing(rng):
    x, pids = rng.standard_normal((60, 8)), np.repeat(np.arange(30), 2)
    assert evaluate(x, x, pids, pids).rank1 == 1
    assert protocols.LEAVE_ONE_OUT.evaluate(x, x, pids, pids).rank1 < 0.3


@pytest.fixture
def sysu(rng):
    """Images of 7 people by 6 cameras, of whom some cameras have none; names, features, labels."""
    names, pids, camids = [], [], []
    for person in (6, 10, 17, 21, 33, 40, 41):
        for camera in range(1, 7):
            for number in range(1, rng.integers(1, 15) if rng.random() < 0.85 else 1):
                names.append(f"SYSU/cam{camera}/{person:04d}/{number:04d}.jpg")
                pids.append(person)
                camids.append(camera)
    order = rng.permutation(len(names))
    names, pids, camids = (np.array(x)[order] for x in (names, pids, camids))
    visible = np.isin(camids, (1, 2, 4, 5))
    centres = rng.standard_normal((50, 6))
    feats = centres[pids] + 0.8 * rng.standard_normal((len(pids), 6))
    sides = [feats[~visible], feats[visible]]
    labels = [x[side] for x in (pids, camids) for side in (~visible, visible)]
    return sides, labels, list(names[visible])


@pytest.fixture
def permutation(tmp_path):
    """rand_perm_cam.mat: a cell for each camera, in it one for each person, in it (10 trials, n) image numbers."""
    rng = np.random.default_rng(7)
    listed, outer = {}, np.empty((6, 1), dtype=object)
    for camera in range(1, 7):
        inner = np.empty((1, 45), dtype=object)
        for person in range(1, 46):
            numbers = np.array([rng.permutation(14) + 1 for _ in range(10)])
            listed.setdefault(camera, {})[person] = numbers.tolist()
            inner[0, person - 1] = numbers.astype(np.uint8)
        outer[camera - 1, 0] = inner
    savemat(tmp_path / "rand_perm_cam.mat", {"rand_perm_cam": outer})
    return tmp_path / "rand_perm_cam.mat", listed


@pytest.mark.parametrize(("mode", "cameras"), [("all", (1, 2, 4, 5)), ("indoor", (1, 2))])
@pytest.mark.parametrize("shots", [1, 10])
def test_sysu_mm01_with_the_seeded_sampler(shots, mode, cameras, sysu):
    (qf, gf), labels, names = sysu
    protocol = protocols.sysu_mm01(mode, shots)
    state = random.getstate()
    trials = protocol.trials(*labels, g_names=names)
    assert random.getstate() == state
    assert len(trials) == 10
    results = []
    for number, trial in enumerate(trials):
        drawn = literal.seeded_gallery(names, cameras, number, shots)
        assert sorted(names[i] for i in trial.gallery) == sorted(drawn)
        np.testing.assert_array_equal(trial.query, np.arange(len(qf)))
        q, g = trial.query, trial.gallery
        distances = squared(qf[q], gf[g])
        found = protocol.measure((qf[q], gf[g]), labels[0][q], labels[1][g], labels[2][q], labels[3][g])
        same(found, literal.sysu(distances, labels[0][q], labels[1][g], labels[2][q], labels[3][g]))
        results.append(found)
    whole = protocol.evaluate(qf, gf, *labels, g_names=names)
    assert whole.trials == tuple(results)
    assert whole.mAP == pytest.approx(np.mean([result.mAP for result in results]))
    np.testing.assert_allclose(whole.cmc, np.mean([result.cmc for result in results], axis=0))
    assert shots > 1 or len({result.mAP for result in results}) > 1


@pytest.mark.parametrize(("mode", "cameras"), [("all", (1, 2, 4, 5)), ("indoor", (1, 2))])
@pytest.mark.parametrize("shots", [1, 10])
@pytest.mark.parametrize("form", ["file", "array"])
def test_sysu_mm01_with_the_official_sampler(form, shots, mode, cameras, sysu, permutation):
    (qf, gf), labels, names = sysu
    path, listed = permutation
    # Every listed image is there.
    known = {tuple(name.split("/")[-3:]) for name in names}
    for camera, people in listed.items():
        for person in people:
            numbers = [n for n in range(1, 15) if (f"cam{camera}", f"{person:04d}", f"{n:04d}.jpg") in known]
            people[person] = [[n for n in trial if n in numbers] for trial in people[person]]
    outer = np.empty((6, 1), dtype=object)
    for camera, people in listed.items():
        inner = np.empty((1, 45), dtype=object)
        for person, trials in people.items():
            inner[0, person - 1] = np.array(trials, dtype=np.uint8).reshape(10, -1)
        outer[camera - 1, 0] = inner
    given = outer
    if form == "file":
        savemat(path, {"rand_perm_cam": outer})
        given = path
    protocol = protocols.sysu_mm01(mode, shots, sampler="official", permutation=given)
    for number, trial in enumerate(protocol.trials(*labels, g_names=names)):
        drawn = literal.official_gallery(names, cameras, listed, number, shots)
        assert [names[i] for i in trial.gallery] == drawn
    found = protocol.evaluate(qf, gf, *labels, g_names=names)
    assert len(found.trials) == 10
    assert shots > 1 or found != protocols.sysu_mm01(mode, shots).evaluate(qf, gf, *labels, g_names=names)


def test_camera_3_skips_camera_2_whoever_it_shows():
    """One query by camera 3: the nearest images, of camera 2, are not in its list; for camera 6 they are."""
    qf = np.eye(3)[[0, 0]]
    gf = np.array([[1, 0, 0], [0.9, 0.1, 0], [0.8, 0.6, 0], [0.5, 0.5, 0]])
    labels = ([7, 7], [7, 8, 8, 7], [3, 6], [2, 2, 1, 4])
    protocol = protocols.sysu_mm01(num_trials=1)
    found = protocol.measure((qf, gf), *map(np.array, labels))
    np.testing.assert_allclose(found.average_precision, [1 / 2, (1 + 2 / 4) / 2])
    assert found.rank1 == 0.5
    np.testing.assert_allclose(found.cmc[:2], [0.5, 1.0])


def test_cmc_goes_by_people_and_precision_by_images():
    qf, gf = np.array([[1.0, 0]]), np.array([[1, 0.01], [1, 0.02], [1, 0.03], [1, 0.5]])
    labels = [np.array(x) for x in ([1], [2, 2, 2, 1], [3], [1, 4, 5, 1])]
    found = protocols.sysu_mm01(num_trials=1).measure((qf, gf), *labels)
    np.testing.assert_allclose(found.cmc[:3], [0, 1, 1])  # one person before, with three images
    assert found.mAP == pytest.approx(1 / 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_regdb_measures_the_trials_it_is_given(seed):
    (qf, gf), labels = scene(seed)
    labels = (labels[0], np.abs(labels[1]), *labels[2:])
    rng = np.random.default_rng(seed)
    trials = [(rng.permutation(14)[:10], rng.permutation(40)[:30]) for _ in range(3)]
    distances = exact(qf, gf)
    protocol = protocols.regdb(trials)
    seen = iter(trials)

    def way(q, g, q_camids, g_camids):
        at = next(seen)
        np.testing.assert_array_equal(q, qf[at[0]])
        np.testing.assert_array_equal(g, gf[at[1]])
        np.testing.assert_array_equal(q_camids, labels[2][at[0]])
        return distances[np.ix_(*at)]

    found = protocol.evaluate(qf, gf, *labels, way=way)
    for result, (q, g) in zip(found.trials, trials, strict=True):
        same(result, literal.without_cameras(distances[np.ix_(q, g)], labels[0][q], labels[1][g]))


def test_vehicleid_draws_one_image_of_each_identity(rng):
    pids = np.concatenate([np.repeat([3, 5, 9, 11], [4, 2, 6, 1]), [3, 9]])
    x = rng.standard_normal((len(pids), 5)) + pids[:, None]
    protocol = protocols.vehicleid(seed=4)
    trials = protocol.trials(pids, pids)
    assert len(trials) == protocol.num_trials == 10
    for trial in trials:
        assert sorted(pids[trial.gallery]) == [3, 5, 9, 11]
        assert sorted([*trial.query, *trial.gallery]) == list(range(len(pids)))
    assert len({tuple(trial.gallery) for trial in trials}) > 3
    again = protocols.vehicleid(seed=4).trials(pids, pids)
    for trial, other in zip(trials, again, strict=True):
        np.testing.assert_array_equal(trial.gallery, other.gallery)
    others = protocols.vehicleid(seed=5).trials(pids, pids)
    assert any(list(a.gallery) != list(b.gallery) for a, b in zip(trials, others, strict=True))
    found = protocol.evaluate(x, x, pids, pids)
    for result, trial in zip(found.trials, trials, strict=True):
        q, g = trial.query, trial.gallery
        same(result, literal.without_cameras(squared(x[q], x[g]), pids[q], pids[g]))
        assert result.num_valid_queries == len(q)


def test_a_method_sees_the_trial_alone(sysu):
    """NFC inside the trials is not NFC before them; nothing of the caller's is changed."""
    (qf, gf), labels, names = sysu
    before = [x.copy() for x in (qf, gf, *labels)]
    protocol = protocols.sysu_mm01()
    inside = protocol.evaluate(qf, gf, *labels, g_names=names, way=lambda q, g, *_: (nfc(q), nfc(g)))
    outside = protocol.evaluate(nfc(qf), nfc(gf), *labels, g_names=names)
    assert inside != outside
    for now, then in zip((qf, gf, *labels), before, strict=True):
        np.testing.assert_array_equal(now, then)
    first = protocol.trials(*labels, g_names=names)[0]
    pair = [nfc(x) for x in first.of((qf, gf))]
    pids, camids = first.of(labels[:2]), first.of(labels[2:])
    assert inside.trials[0] == protocol.measure(pair, *pids, *camids)


@pytest.mark.gpu
@pytest.mark.parametrize("labels_on", ["cpu", "cuda"])
def test_sysu_mm01_on_a_gpu(labels_on, sysu):
    (qf, gf), labels, names = sysu
    expected = protocols.sysu_mm01().evaluate(qf, gf, *labels, g_names=names)
    feats = [torch.from_numpy(x).cuda() for x in (qf, gf)]
    found = protocols.sysu_mm01().evaluate(
        *feats, *(torch.from_numpy(x).to(labels_on) for x in labels), g_names=names, way=lambda q, g, *_: (q, g)
    )
    assert found.to_dict() == pytest.approx(expected.to_dict())


def test_tensors_parts_strings_and_lists(rng):
    q, g = (torch.from_numpy(rng.standard_normal((n, 3, 4)).astype(np.float32)) for n in (6, 9))
    pids = [[f"p{i % 3}" for i in range(n)] for n in (6, 9)]
    found = protocols.OCCLUDED_REID.evaluate(q, g, *pids)
    assert found == evaluate(q, g, *pids)
    x = rng.standard_normal((12, 4))
    words = [f"p{i % 4}" for i in range(12)]
    number = [i % 4 for i in range(12)]
    for draws in (protocols.vehicleid(num_trials=2), protocols.LEAVE_ONE_OUT):
        assert draws.evaluate(x, x, words, words) == draws.evaluate(x, x, np.array(number), np.array(number))


def test_the_mean_over_trials(sysu):
    (qf, gf), labels, names = sysu
    found = protocols.sysu_mm01(num_trials=3).evaluate(qf, gf, *labels, g_names=names)
    figures = found.to_dict()
    assert figures["mAP_std"] == pytest.approx(np.std([trial.mAP for trial in found.trials]))
    assert figures["rank1"] == found.rank1 == found.cmc[0]
    assert len(found.average_precision) == 3 * len(qf)
    assert "mean of 3 trials" in str(found)
    frame = found.to_frame()
    assert frame.loc[0, "mAP"] == found.mAP
    assert set(frame.columns) == set(figures)
    one = found.trials[0]
    assert set(one.to_dict()) == {"mAP", "rank1", "rank5", "rank10", "mINP", "num_valid_queries"}
    assert mean_of([one]) is one
    assert "<td>" in found._repr_html_()
    assert found == mean_of(found.trials)
    assert hash(found) == hash(mean_of(found.trials))
    assert found != mean_of(found.trials[:2])
    assert found != 3


@pytest.mark.parametrize("tensors", [False, True])
def test_pooled_tracklets(tensors, rng):
    x = rng.standard_normal((10, 3)).astype(np.float32)
    groups = [4, 4, 2, 9, 2, 4, 9, 9, 9, 1]
    means, first = protocols.pool(torch.from_numpy(x) if tensors else x, groups)
    np.testing.assert_array_equal(first, [0, 2, 3, 9])
    for row, rows in zip(means, ([0, 1, 5], [2, 4], [3, 6, 7, 8], [9]), strict=True):
        np.testing.assert_allclose(row, x[rows].mean(0), rtol=1e-6)


def bad_sysu(**change):
    labels = {"q_pids": [1, 2], "g_pids": [1, 2], "q_camids": [3, 6], "g_camids": [1, 4]} | change
    return protocols.sysu_mm01().trials(*labels.values())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: protocols.by_name("duke"), ValueError, "protocol must be one of 'market1501'"),
        (lambda: protocols.by_name("cuhk03", seed=1), ValueError, "seed must be left out: protocol 'cuhk03'"),
        (lambda: protocols.sysu_mm01("outdoor"), ValueError, "mode must be one of 'all', 'indoor'"),
        (lambda: protocols.sysu_mm01(shots=0), ValueError, "shots must be at least 1"),
        (lambda: protocols.sysu_mm01(sampler="official"), ValueError, "permutation must be given for sampler='off"),
        (lambda: protocols.sysu_mm01(permutation="a.mat"), ValueError, "permutation must be given for sampler='off"),
        (
            lambda: protocols.sysu_mm01(sampler="official", permutation="none.mat"),
            FileNotFoundError,
            r"rand_perm_cam\.mat; there is no none\.mat",
        ),
        (
            lambda: protocols.sysu_mm01(sampler="official", permutation=np.ones(6)),
            ValueError,
            "permutation must hold rand_perm_cam, a cell for each of 6 cameras",
        ),
        (lambda: bad_sysu(q_camids=None, g_camids=None), ValueError, "q_camids and g_camids must be given for SYSU"),
        (lambda: bad_sysu(g_camids=[1, 7]), ValueError, "must be 1 to 6 for SYSU-MM01, got 7"),
        (lambda: bad_sysu(q_camids=[1, 1]), ValueError, "q_camids must hold 3 or 6"),
        (
            lambda: protocols.sysu_mm01().measure((np.eye(2), np.eye(2)), [1, 2], [1, 2]),
            ValueError,
            "q_camids and g_camids must be given for SYSU",
        ),
        (lambda: protocols.regdb([]), ValueError, "trials must hold at least one trial"),
        (
            lambda: protocols.regdb([([0], [5])]).trials([1], [1]),
            ValueError,
            "trials must hold rows of the gallery, 0 to 0",
        ),
        (lambda: protocols.vehicleid().trials([1, 2], [2, 1]), ValueError, "must be of the same images for VehicleID"),
        (lambda: protocols.vehicleid(seed=-1), ValueError, "seed must be at least 0"),
        (lambda: protocols.LEAVE_ONE_OUT.trials([1, 2], [1]), ValueError, "must be of the same images .* got 2 and 1"),
        (lambda: protocols.pool(np.ones((3, 2)), [1, 2]), ValueError, r"groups must have shape \(3,\)"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_official_sampler_needs_the_files_names(sysu, permutation):
    _, labels, names = sysu
    protocol = protocols.sysu_mm01(sampler="official", permutation=permutation[0])
    with pytest.raises(ValueError, match=r"g_names must be the gallery's \d+ paths"):
        protocol.trials(*labels)
    with pytest.raises(ValueError, match=r"g_names must end like cam1/0006/0001\.jpg, got a\.jpg"):
        protocol.trials(*labels, g_names=["a.jpg", *names[1:]])
    with pytest.raises(ValueError, match=r"g_names must have images .* of person \d+ in camera \d"):
        protocol.trials(*labels, g_names=[name.replace("/00", "/01") for name in names])
    one = [np.array(x) for x in ([1], [1], [3], [1])]
    cells = np.empty((6, 1), dtype=object)
    for camera in range(6):
        cells[camera, 0] = np.empty((1, 1), dtype=object)
        cells[camera, 0][0, 0] = np.ones((10, 1), np.uint8)
    protocol = protocols.sysu_mm01(sampler="official", permutation=cells, num_trials=11)
    with pytest.raises(ValueError, match="num_trials must be at most 10, those of the permutation, got 11"):
        protocol.trials(*one, g_names=["cam1/0001/0001.jpg"])
    protocol = protocols.sysu_mm01(sampler="official", permutation=cells)
    with pytest.raises(ValueError, match="permutation must list every person, got 1 in camera 1, not 2"):
        protocol.trials([2], [2], [3], [1], g_names=["cam1/0002/0001.jpg"])
