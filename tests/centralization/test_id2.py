from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from pose2id import id2_score, identity_density


def test_golden(golden):
    data = golden("nfc_id2")
    x, pids = data["feats"], data["pid"]
    density = identity_density(x, pids)
    np.testing.assert_allclose(density.per_sample, data["id2_upstream_per_sample"], atol=1e-6)
    np.testing.assert_allclose(density.per_identity, data["id2_sq_per_id"], atol=1e-6)
    printed = identity_density(x, pids, convention="printed")
    np.testing.assert_allclose(printed.per_identity, data["id2_paper_per_id"], atol=1e-6)
    # The published code counts pid 0; figures of nfc_id2.json.
    assert id2_score(x, pids) == pytest.approx(0.2702811360, abs=1e-6)
    assert printed.score == pytest.approx(0.5059189200, abs=1e-6)
    keep = data["unbalanced_keep"]
    assert id2_score(x[keep], pids[keep]) == pytest.approx(0.2450425773, abs=1e-6)
    assert id2_score(x[keep], pids[keep], convention="printed") == pytest.approx(0.4744901657, abs=1e-6)


@pytest.mark.parametrize("convention", ["published", "printed"])
def test_equals_the_literal_metric(convention, rng):
    x, pids = rng.standard_normal((300, 12)) * 5, rng.integers(-1, 40, 300)
    expected = reference.id2(x, pids, convention)
    assert id2_score(x, pids, convention=convention) == pytest.approx(expected, abs=1e-12)
    assert id2_score(torch.from_numpy(x).half(), torch.from_numpy(pids), convention=convention) == pytest.approx(
        expected, abs=1e-3
    )


def test_junk_distractors_and_singletons(rng):
    x, pids = rng.standard_normal((9, 4)), np.array([-1, 0, 0, 3, 3, 3, 7, -1, 8])
    density = identity_density(x, pids)
    assert density.pids.tolist() == [0, 3, 7, 8]
    assert density.counts.tolist() == [2, 3, 1, 1]
    assert density.num_singletons == 2
    np.testing.assert_array_equal(np.isnan(density.per_sample), pids == -1)
    np.testing.assert_array_equal(density.per_sample[[6, 8]], 0)
    without = identity_density(x, pids, count_distractors=False)
    assert without.pids.tolist() == [3, 7, 8]
    assert without.score == pytest.approx(reference.id2(x[pids > 0], pids[pids > 0], "published"))
    assert "num_singletons=2" in repr(density)


def test_identities_that_are_strings(rng):
    x, pids = rng.standard_normal((6, 4)), ["b", "-1", "0000", "a", "b", "00-1"]
    density = identity_density(x, pids, count_distractors=False)
    assert density.pids.tolist() == ["a", "b"]
    assert density.counts.tolist() == [1, 2]
    assert density.score == identity_density(x, [2, -1, 0, 1, 2, -1], count_distractors=False).score
    assert id2_score(x, pids) == id2_score(x, [2.0, -1, 0, 1, 2, -1])


@pytest.mark.parametrize(
    ("x", "pids", "arguments", "error", "message"),
    [
        (np.ones((3, 2)), [1, 2], {}, ValueError, r"pids must have shape \(3,\)"),
        (np.ones((3, 2)), None, {}, TypeError, "pids must hold integers, got None"),
        (np.ones((3, 2)), "abc", {}, TypeError, "pids"),
        (np.ones((3, 2)), [0.5, 1, 2], {}, TypeError, "pids must hold integers"),
        (np.ones((3, 2)), [2.0**60, 1, 2], {}, TypeError, r"pids must hold integers.*2\*\*53"),
        (np.ones((3, 2)), ["a", None, "b"], {}, TypeError, "pids must hold integers, got dtype object"),
        (np.ones((2, 2)), [-1, -1], {}, ValueError, "at least one feature"),
        (np.ones((0, 2)), [], {}, ValueError, "at least one feature"),
        (np.ones(2), [1, 1], {}, ValueError, r"features must have shape \(N, D\)"),
        (np.array([[1, np.nan]]), [1], {}, ValueError, "row 0"),
        (np.ones((2, 2)), [1, 1], {"convention": "paper"}, ValueError, "'published', 'printed'"),
    ],
)
def test_bad_input(x, pids, arguments, error, message):
    with pytest.raises(error, match=message):
        id2_score(x, pids, **arguments)
