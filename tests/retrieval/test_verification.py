"""Verification and open set against literal counts over all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reference import unit

from pose2id import evaluate
from pose2id.retrieval import protocols
from pose2id.retrieval.verification import verification


def scene(seed, q=30, g=80, people=12):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((people + 5, 8))
    q_pids, g_pids = rng.integers(1, people + 5, q), rng.integers(-1, people, g)
    feats = [centres[pids % (people + 5)] + 0.7 * rng.standard_normal((len(pids), 8)) for pids in (q_pids, g_pids)]
    return feats, (q_pids, g_pids, rng.integers(1, 4, q), rng.integers(1, 4, g))


def pairs(distances, q_pids, g_pids, q_camids, g_camids):
    positive, negative, known, unknown = [], [], [], []
    for i in range(len(q_pids)):
        kept = [
            j
            for j in range(len(g_pids))
            if g_pids[j] != -1 and not (g_pids[j] == q_pids[i] and g_camids[j] == q_camids[i])
        ]
        positive += [distances[i, j] for j in kept if g_pids[j] == q_pids[i]]
        negative += [distances[i, j] for j in kept if g_pids[j] != q_pids[i]]
        nearest = min(kept, key=lambda j: (distances[i, j], j))
        has_match = any(g_pids[j] == q_pids[i] for j in kept)
        (known if has_match else unknown).append((distances[i, nearest], g_pids[nearest] == q_pids[i]))
    return np.array(positive), np.array(negative), known, unknown


def largest_threshold(others, rate):
    """Tried one by one: the largest of all distances at which at most that share is accepted."""
    fitting = [t for t in np.unique(others) if np.mean(others <= t) <= rate]
    return max(fitting) if fitting else min(others) - 1e-6


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", ["features", "tensors", "distances"])
def test_against_literal_counts(form, seed):
    (q, g), labels = scene(seed)
    distances = np.sqrt(((unit(q)[:, None] - unit(g)[None]) ** 2).sum(2))
    options = {"rates": (0.1, 0.01, 1e-4), "rate": 0.05, "open_rates": (0.5, 0.2, 0.01), "num_samples": 20}
    if form == "distances":
        distances = distances.round(1).astype(np.float32)  # many are equal
        found = verification(None, None, *labels, distmat=distances, **options)
    else:
        sides = map(torch.from_numpy, (q, g)) if form == "tensors" else (q, g)
        found = verification(*sides, *labels, **options)
    positive, negative, known, unknown = pairs(distances, *labels)
    counts = found.num_positive, found.num_negative, found.num_known, found.num_unknown
    assert counts == (len(positive), len(negative), len(known), len(unknown))
    for rate in (0.1, 0.01):
        expected = largest_threshold(negative, rate)
        assert found.tpr[rate] == pytest.approx(np.mean(positive <= expected + 1e-9))
    assert math.isnan(found.tpr[1e-4])
    assert found.threshold == pytest.approx(largest_threshold(negative, 0.05), abs=1e-5)
    both = np.unique([*positive, *negative])
    errors = [(abs(np.mean(positive > t) - np.mean(negative <= t)), t) for t in both]
    best = min(errors)[1]
    assert found.eer == pytest.approx((np.mean(positive > best) + np.mean(negative <= best)) / 2, abs=2e-3)
    for rate in (0.5, 0.2):
        limit = largest_threshold(np.array([distance for distance, _ in unknown]), rate)
        share = np.mean([right and distance <= limit + 1e-9 for distance, right in known])
        assert found.dir[rate] == pytest.approx(share)
    assert math.isnan(found.dir[0.01])


def test_the_interval_holds_the_threshold_and_narrows_with_people():
    widths = []
    for people in (10, 100):
        rng = np.random.default_rng(1)
        centres = rng.standard_normal((people, 16))
        pids = np.repeat(np.arange(people), 3)
        feats = [centres[pids] + 0.5 * rng.standard_normal((len(pids), 16)) for _ in range(2)]
        found = verification(*feats, pids, pids, rate=0.01)
        low, high = found.interval
        assert low <= found.threshold <= high
        widths.append(high - low)
        assert verification(*feats, pids, pids, rate=0.01) == found
        assert verification(*feats, pids, pids, rate=0.01, seed=1).interval != found.interval
    assert widths[1] < widths[0] / 2


def test_few_of_many_pairs_are_held(monkeypatch):
    """The nearest pairs alone are held, in blocks that are cut down again and again; figures stay."""
    (q, g), labels = scene(3, q=60, g=300)
    expected = verification(q, g, *labels, rates=(0.01, 0.002), rate=0.005)
    monkeypatch.setattr("pose2id.retrieval.verification._LEAST", 1)
    found = verification(q, g, *labels, rates=(0.01, 0.002), rate=0.005)
    assert found.to_dict() == expected.to_dict()


def test_thresholds_keep_their_promise_on_other_people():
    """Found on 300 people at a rate of 1 %, the threshold lets about 1 % of other people's pairs through."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((600, 24))

    def draw(first):
        pids = np.repeat(np.arange(first, first + 300), 2)
        return [centres[pids] + 0.6 * rng.standard_normal((600, 24)) for _ in range(2)], pids

    (feats, pids), (other_feats, other_pids) = draw(0), draw(300)
    found = verification(*feats, pids, pids, rate=0.01)
    x, y = map(unit, other_feats)
    distances = np.sqrt(((x[:, None] - y[None]) ** 2).sum(2))
    negative = distances[other_pids[:, None] != other_pids[None]]
    assert 0.008 < np.mean(negative <= found.threshold) < 0.0125


def test_leave_one_out_and_words(rng):
    x, pids = rng.standard_normal((40, 5)), np.repeat(np.arange(20), 2)
    found = verification(x, x, pids, pids, protocol=protocols.LEAVE_ONE_OUT)
    assert found.num_positive == 40
    assert found.num_negative == 40 * 38
    assert evaluate(x, x, pids, pids).rank1 == 1
    assert found.tpr[0.01] < 0.5
    assert str(found).splitlines()[0].startswith("EER ")
    assert "too few pairs for FPR 0.0001" in str(found)
    figures = found.to_dict()
    assert figures["tpr_at_fpr_0.01"] == found.tpr[0.01]
    assert figures["threshold_low"] <= figures["threshold"] + 1e-9 <= figures["threshold_high"] + 2e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": protocols.vehicleid()}, "protocol must have one trial, got 'vehicleid' with 10"),
        ({"rate": 2}, r"rate must be in \[0, 1\], got 2"),
        ({"num_samples": 3}, "num_samples must be at least 20"),
        ({"distmat": np.ones((4, 4))}, "qf and gf must be None with distmat"),
        ({"q_pids": [9, 9, 9, 9]}, "must give pairs of one person and of two, got 0 and 16"),
    ],
)
def test_bad_arguments(change, message, rng):
    given = {"qf": rng.standard_normal((4, 3)), "gf": rng.standard_normal((4, 3))}
    given |= {"q_pids": [1, 2, 1, 2], "g_pids": [1, 2, 1, 2]} | change
    with pytest.raises(ValueError, match=message):
        verification(**given)
