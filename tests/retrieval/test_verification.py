from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import protocols as literal
from reference import unit

from pose2id.retrieval.protocols import LEAVE_ONE_OUT, MARKET1501, OCCLUDED_REID, sysu_mm01, vehicleid
from pose2id.retrieval.verification import open_set, open_set_rank, verification, verification_rank


def case(seed, q, g, levels):
    """Distances with ties, and labels with junk, distractors and few cameras."""
    rng = np.random.default_rng(seed)
    distmat = rng.integers(0, levels, (q, g)).astype(float)
    pids = [rng.integers(-1, 5, q).tolist(), rng.integers(-1, 5, g).tolist()]
    camids = [rng.integers(0, 3, q).tolist(), rng.integers(0, 3, g).tolist()]

    def is_dropped(i, j):
        return pids[0][i] == pids[1][j] and camids[0][i] == camids[1][j]

    return distmat, pids, camids, is_dropped


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1), q=st.integers(1, 8), g=st.integers(2, 20), levels=st.sampled_from([2, 12, 10**6])
)
def test_equals_the_literal_rates_with_ties_and_junk(seed, q, g, levels):
    distmat, pids, camids, is_dropped = case(seed, q, g, levels)
    genuine, impostor = literal.pairs(distmat, *pids, is_dropped)
    if not genuine or not impostor:
        with pytest.raises(ValueError, match="pair of either kind"):
            verification_rank(distmat, *pids, *camids)
        return
    found = verification_rank(distmat, *pids, *camids, rates=(0.1, 0.05, 0.01), replicates=2)
    assert (found.num_genuine, found.num_impostor) == (len(genuine), len(impostor))
    assert found.eer == pytest.approx(literal.equal_error_rate(genuine, impostor), abs=1e-12)
    for point in found.points:
        if len(impostor) * point.wanted < 1 - 1e-9:
            assert np.isnan([point.threshold, point.fpr, point.tpr, *point.threshold_interval]).all()
            continue
        expected = literal.operating_point(genuine, impostor, point.wanted)
        assert (point.threshold, point.fpr, point.tpr) == pytest.approx(expected, abs=1e-12)
        assert found.tpr(point.wanted) == point.tpr


def test_of_many_impostors_the_nearest_are_kept(rng):
    distmat = rng.random((60, 300))
    pids = rng.integers(0, 12, 60), rng.integers(0, 12, 300)
    genuine, impostor = literal.pairs(distmat, *pids, lambda q, g: False)
    found = verification_rank(distmat, *pids, rates=(0.01, 0.001), replicates=2)
    for point in found.points:
        expected = literal.operating_point(genuine, impostor, point.wanted)
        assert (point.threshold, point.fpr, point.tpr) == pytest.approx(expected, abs=1e-12)


def test_intervals_are_those_of_identities_drawn_again(rng):
    distmat = rng.random((20, 60))
    pids = rng.integers(0, 9, 20), rng.integers(0, 9, 60)
    (point,) = verification_rank(distmat, *pids, rates=(0.05,), replicates=25, seed=7).points
    names = np.unique(np.concatenate(pids))
    _, impostor = literal.pairs(distmat, *pids, lambda q, g: False)
    weights = np.random.default_rng(7).multinomial(len(names), np.full(len(names), 1 / len(names)), size=25)
    drawn = [
        literal.weighted_point(impostor, dict(zip(names, weight, strict=True)), 0.05, point.threshold)
        for weight in weights
    ]
    for index, interval in enumerate((point.threshold_interval, point.fpr_interval)):
        values = sorted(pair[index] for pair in drawn)
        assert interval == pytest.approx((values[0], values[-1]), abs=1e-12)


def test_the_interval_covers_the_population_where_a_binomial_one_does_not():
    """Some persons look alike to everybody, so pairs are dependent."""
    covered = binomial = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pids = np.repeat(np.arange(60), 3)
        alike = rng.normal(0, 0.5, 60)[pids]
        distmat = 5 + alike[:, None] + alike + rng.normal(0, 0.5, (180, 180))
        (point,) = verification_rank(
            distmat, pids, pids, rates=(0.02,), protocol=LEAVE_ONE_OUT, replicates=60, seed=seed
        ).points
        truth = 5 + np.sqrt(3 * 0.25) * -2.0537489  # the quantile at 2 % of the sum of three normal distributions
        low, high = point.threshold_interval
        covered += low <= truth <= high
        # Of independent pairs the rate at the threshold would be known to 10 %, and so the threshold to 0.04.
        binomial += abs(point.threshold - truth) < 1.96 * 0.02 * np.sqrt(0.98 / 0.02 / (180 * 177)) / 0.0559
    assert covered >= 33
    assert binomial <= 25


def test_from_features_equals_from_distances(rng):
    qf, gf = rng.standard_normal((30, 7)), rng.standard_normal((80, 7))
    labels = rng.integers(0, 6, 30), rng.integers(-1, 6, 80), rng.integers(0, 3, 30), rng.integers(0, 3, 80)
    distmat = 1 - unit(qf) @ unit(gf).T
    for protocol in (MARKET1501, OCCLUDED_REID):
        found = verification(qf, gf, *labels, protocol=protocol, rates=(0.1, 0.01))
        expected = verification_rank(distmat, *labels, protocol=protocol, rates=(0.1, 0.01))
        assert found.eer == pytest.approx(expected.eer, abs=1e-9)
        for mine, wanted in zip(found.points, expected.points, strict=True):
            assert mine.threshold == pytest.approx(wanted.threshold, abs=1e-9)
            assert (mine.fpr, mine.tpr) == pytest.approx((wanted.fpr, wanted.tpr))
    single = verification(torch.from_numpy(qf).float(), torch.from_numpy(gf).float(), *labels, rates=(0.1,))
    assert single.points[0].threshold == pytest.approx(
        verification_rank(distmat, *labels, rates=(0.1,)).points[0].threshold, abs=1e-6
    )


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1), q=st.integers(2, 30), g=st.integers(1, 12), levels=st.sampled_from([2, 12, 10**6])
)
def test_open_set_equals_the_literal_search(seed, q, g, levels):
    distmat, pids, camids, is_dropped = case(seed, q, g, levels)
    pids[0] = [pid if i % 2 else 100 + i for i, pid in enumerate(pids[0])]  # strangers
    alarms, right, mated = literal.searches(distmat, *pids, is_dropped)
    if not mated or not alarms:
        with pytest.raises(ValueError, match="got none"):
            open_set_rank(distmat, *pids, *camids)
        return
    found = open_set_rank(distmat, *pids, *camids, rates=(0.1,))
    assert (found.num_mated, found.num_strangers) == (mated, len(alarms))
    (point,) = found.points
    if len(alarms) < 10:
        assert np.isnan([point.threshold, point.fpir, point.fnir]).all()
    else:
        assert (point.threshold, point.fpir, point.fnir) == pytest.approx(literal.open_set(alarms, right, mated, 0.1))


@pytest.mark.parametrize("levels", [3, 40, 10**6])
def test_open_set_with_enough_strangers(levels):
    distmat, pids, camids, is_dropped = case(levels, 60, 30, levels)
    pids[0] = [pid if i % 2 else 100 + i for i, pid in enumerate(pids[0])]
    found = open_set_rank(distmat, *pids, *camids, rates=(0.1, 0.05, 0.01))
    for point in found.points[:2]:
        searched = literal.searches(distmat, *pids, is_dropped)
        expected = literal.open_set(*searched, point.wanted)
        assert (point.threshold, point.fpir, point.fnir) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found.points[2].fnir)
    assert "too few" in str(found)


def test_open_set_from_features(rng):
    qf, gf = rng.standard_normal((60, 4)), rng.standard_normal((20, 4))
    pids = np.r_[rng.integers(0, 4, 30), np.arange(100, 130)], rng.integers(0, 4, 20)
    found = open_set(qf, gf, *pids)
    expected = open_set_rank(1 - unit(qf) @ unit(gf).T, *pids)
    assert found.points[0].fnir == expected.points[0].fnir
    assert found.points[0].threshold == pytest.approx(expected.points[0].threshold)


def test_leave_one_out_pairs_no_image_with_itself():
    distmat = np.array([[0.0, 1, 5, 5], [1, 0, 5, 5], [5, 5, 0, 9], [5, 5, 9, 0]])
    found = verification_rank(distmat, *[[1, 1, 2, 2]] * 2, protocol=LEAVE_ONE_OUT, rates=(0.1,), replicates=2)
    assert (found.num_genuine, found.num_impostor) == (4, 8)
    assert found.eer == 0.5
    assert "unknown" not in str(verification_rank(distmat + 1, [1, 1, 2, 2], [1, 1, 2, 2], rates=()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, p: verification_rank(d, p, p, rates=(0.5,)), r"rates must be in \[.*0.1\]"),
        (lambda d, p: verification_rank(d, p, [7, 8, 9]), "got no genuine one"),
        (lambda d, p: verification_rank(d, [1, 1, 1], [1, 1, 1]), "got no impostor one"),
        (lambda d, p: verification_rank(d * np.nan, p, p), "NaN; row 0"),
        (lambda d, p: verification_rank(d, p, p, protocol=vehicleid()), "one of its trials"),
        (lambda d, p: open_set_rank(d, p, p, protocol=sysu_mm01()), "one of its trials"),
        (lambda d, p: open_set_rank(d, p, p), "none of a stranger"),
        (lambda d, p: open_set_rank(d, p, [7, 8, 9]), "none with a match"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.arange(9.0).reshape(3, 3), [1, 2, 3])
