"""Where people appear once `Centralizer.enhance` keeps the features, bit for bit; elsewhere it loses next to nothing.

More whole sets are measured in test_enhance.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import real_sides

from pose2id import Centralizer, evaluate, evaluate_rank, evidence
from pose2id.io.rows import Rows

SETS = [
    ("cuhk03_p1_det_val100", "osnet_msmt17"),
    ("cuhk03_p1_det_val100", "osnet_market1501"),
    ("cuhk03_p1_det_val100", "osnet_lda256"),
    ("cuhk03_p1_det_val100", "mobilenetv2_imagenet"),
    ("cuhk03_p1_det_843", "osnet_msmt17"),
    ("3dpes", "osnet_msmt17"),
    ("3dpes", "retail0288"),
    ("viper", "osnet_msmt17"),
    ("pku_reid", "osnet_msmt17"),
]


def check_unchanged(q, g):
    found = Centralizer().enhance(q, g)
    for x, before in zip(found, (q, g), strict=True):
        expected = Rows(before, "x", normalize=True).read(slice(None))
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, expected.numpy().astype(x.dtype))
        else:
            assert torch.equal(x, expected.to(x.dtype))


@pytest.mark.parametrize(("name", "model"), SETS)
def test_real_people_who_appear_once(name, model, stress):
    q, g, _, pids, *_ = real_sides(name, model)
    for seed in range(20 if stress else 3):
        order = np.random.default_rng(seed).permutation(len(g))
        once = np.sort(order[np.unique(pids[order], return_index=True)[1]])
        assert evidence(g[once]).gate == 0
        check_unchanged(q, g[once])


def bent(rng, n, dim):
    """As networks give them: few directions hold most, all values are positive, and a common mean."""
    x = rng.normal(size=(n, dim // 4)) * rng.uniform(0.2, 2, dim // 4) @ rng.normal(size=(dim // 4, dim))
    return np.maximum(x + 0.5 * rng.normal(size=(n, dim)) + 1, 0)


def heavy_tailed(rng, n, dim):
    return rng.standard_t(4, size=(n, dim)) + rng.normal(size=dim)


def seen_by_cameras(rng, n, dim):
    return rng.normal(size=(n, dim)) + 2 * rng.normal(size=(4, dim))[rng.integers(4, size=n)]


def of_few_directions(rng, n, dim):
    return rng.normal(size=(n, 12)) @ rng.normal(size=(12, dim)) + 0.1 * rng.normal(size=(n, dim))


@pytest.mark.parametrize("kind", [bent, heavy_tailed, seen_by_cameras, of_few_directions])
@pytest.mark.parametrize(("n", "dim"), [(3, 16), (20, 32), (150, 64), (700, 128)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, torch.float16])
def test_drawn_people_who_appear_once(kind, n, dim, dtype, stress):
    for seed in range(30 if stress else 1):
        rng = np.random.default_rng(seed)
        g = kind(rng, n, dim)
        q = g[rng.integers(n, size=9)] + 0.3 * rng.normal(size=(9, dim))
        if isinstance(dtype, torch.dtype):
            q, g = (torch.from_numpy(x).to(dtype) for x in (q, g))
        else:
            q, g = q.astype(dtype), g.astype(dtype)
        assert evidence(g).gate == 0
        check_unchanged(q, g)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("cuhk03_p1_det_val100", "mobilenetv2_imagenet"),
        pytest.param(
            "cuhk03_p1_det_843",
            "osnet_msmt17",
            marks=pytest.mark.skipif("not config.getoption('--stress')", reason="only with --stress"),
        ),
    ],
)
def test_whole_sets(name, model):
    q, g, *labels = real_sides(name, model)
    cameras = {"query_camids": labels[2], "gallery_camids": labels[3]}
    before = evaluate(q, g, *labels)
    slack = max(0.017, 1 / before.num_valid_queries) + 1e-9
    for options in ({}, cameras):
        after = evaluate(*Centralizer().enhance(q, g, **options), *labels)
        reranked = evaluate_rank(Centralizer().rerank(q, g, **options), *labels)
        for result in (after, reranked):
            assert result.mAP > before.mAP - 0.01
            assert result.rank(1) > before.rank(1) - slack
