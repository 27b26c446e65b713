from __future__ import annotations

import numpy as np
import pytest
import torch

from pose2id import (
    Centralizer,
    aqe,
    database_augmentation,
    evaluate,
    evaluate_rank,
    fuse,
    generation_diagnostics,
    id2_score,
    identity_density,
    k_reciprocal,
    nearest_neighbors,
    nfc,
    nfc_diagnostics,
    part_distances,
    query_expansion,
    re_ranking,
)
from pose2id.io.checks import first_few
from pose2id.io.feature_files import FeatureFile, save_features
from pose2id.report import compare

X, PIDS = np.eye(6, 4) + 1, [1, 2, 1, 2, 1, 2]
PICTURES = list(torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
CENTRALIZER = Centralizer(lambda images: images.flatten(1), lambda images: ([image, 1 - image] for image in images))


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        ([], {}, ""),
        ("abc", {}, "a, b, c"),
        (range(10), {}, "0, 1, 2, ... and 7 more"),
        (range(10), {"most": 9, "separator": "; "}, "0; 1; 2; 3; 4; 5; 6; 7; 8; ... and 1 more"),
        (["a", "b"], {"total": 9}, "a, b, ... and 7 more"),
    ],
)
def test_the_first_few_then_how_many_more(names, options, expected):
    assert first_few(iter(names), **options) == expected


def quantized(x):
    return torch.quantize_per_tensor(torch.tensor(x, dtype=torch.float32), 1.0, 0, torch.qint8)


def jagged(x):
    return torch.nested.nested_tensor([torch.tensor(x)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (np.ma.masked_array, "must not be masked"),
        (lambda x: torch.tensor(x).to_sparse(), "must be dense.* torch.sparse_coo"),
        (lambda x: torch.tensor(x, device="meta"), "must be dense.*'meta'"),
        (quantized, "must be dense.* torch.qint8"),
        (lambda x: torch.nested.nested_tensor([torch.tensor(x)]), "must be dense.* nested"),
        (jagged, "must be dense.* nested"),
    ],
    ids=["masked", "sparse", "meta", "quantized", "nested", "jagged"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantiz")
@pytest.mark.parametrize(
    ("name", "value", "function"),
    [
        ("features", X, nfc),
        ("generated", X[:, None], lambda x: fuse(X, x)),
        ("distmat", X, lambda x: evaluate_rank(x, PIDS, PIDS[:4])),
        ("g_g_dist", X, lambda x: re_ranking(X, X, x)),
        ("g_pids", PIDS, lambda x: evaluate(X, X, PIDS, x)),
        ("q_camids", PIDS, lambda x: evaluate(X, X, PIDS, PIDS, x, PIDS)),
        ("pids", PIDS, lambda x: id2_score(X, x)),
        ("camids", PIDS, lambda x: nfc_diagnostics(X, camids=x)),
        ("visibility", X[:, None, 0], lambda x: nfc(X[:, None], visibility=x)),
        ("visibility", X[:, None, None, 0], lambda x: fuse(X[:, None], X[:, None, None], visibility=x)),
        ("g_visibility", X[:, None, 0], lambda x: part_distances(X[:, None], X[:, None], g_visibility=x)),
    ],
)
def test_what_does_not_hold_each_value_is_refused(name, value, function, made, message):
    with pytest.raises(TypeError, match=f"^{name}.* {message}"):
        function(made(value))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("normalize", lambda flag: nfc(X, normalize=flag)),
        ("normalize", lambda flag: nearest_neighbors(X, 2, normalize=flag)),
        ("normalize", lambda flag: part_distances(X[:, None], X[:, None], normalize=flag)),
        ("normalize", lambda flag: k_reciprocal(X, X, normalize=flag)),
        ("joint", lambda flag: Centralizer(method="nfc").enhance(X, X, joint=flag)),
        ("count_distractors", lambda flag: id2_score(X, [0, 1, 0, 1, 1, 1], count_distractors=flag)),
        ("count_distractors", lambda flag: identity_density(X, PIDS, count_distractors=flag).score),
        ("rerank", lambda flag: compare(FeatureFile(X, X, PIDS, PIDS), rerank=flag)[0].id2),
        ("normalize", lambda flag: CENTRALIZER.extract(PICTURES, normalize=flag)),
        ("progress", lambda flag: CENTRALIZER(PICTURES, progress=flag)),
        ("progress", lambda flag: CENTRALIZER.extract(PICTURES, progress=flag)),
        ("progress", lambda flag: CENTRALIZER.extract_generated(PICTURES, progress=flag)),
        ("progress", lambda flag: CENTRALIZER.diagnose(PICTURES, progress=flag).retention),
        ("return_visibility", lambda flag: CENTRALIZER(PICTURES, return_visibility=flag)[0]),
        ("return_visibility", lambda flag: CENTRALIZER.extract(PICTURES, return_visibility=flag)[0]),
        ("return_visibility", lambda flag: CENTRALIZER.extract_generated(PICTURES, return_visibility=flag)[0]),
    ],
)
def test_flags_are_true_or_false(name, function):
    for value in (1, 0, None, "no", 1.0, np.ones(2)):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
            function(value)
    for value in (True, False):
        np.testing.assert_array_equal(function(np.bool_(value)), function(value))


def test_overwriting_is_true_or_false(tmp_path):
    (tmp_path / "f.npz").touch()
    with pytest.raises(TypeError, match="overwrite must be True or False, got 'no'"):
        save_features(FeatureFile(X, X), tmp_path / "f.npz", overwrite="no")


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_of_numpy_is_a_matrix():
    np.testing.assert_array_equal(nfc(np.matrix(X)), nfc(X))
    np.testing.assert_array_equal(
        nfc(X[:, None], visibility=np.matrix(X[:, :1] / 2)), nfc(X[:, None], visibility=X[:, :1] / 2)
    )
    assert evaluate(np.matrix(X), X, PIDS, PIDS).mAP == evaluate(X, X, PIDS, PIDS).mAP


@pytest.mark.parametrize("made", [np.asarray, torch.from_numpy])
def test_the_default_device_changes_nothing(made):
    def results():
        x, shown = made(X), made(X[:, :1] / 2)
        distances, labels = made(1 / X[:, :4]), (PIDS, PIDS[:4])
        yield evaluate(x, x, PIDS, PIDS, metric="euclidean").average_precision
        yield evaluate(x[:, None], x[:, None], PIDS, PIDS, q_visibility=shown).average_precision
        yield evaluate_rank(distances, *labels).average_precision
        yield re_ranking(distances[:4], distances[:4], distances[:4], 2, 1)
        yield from (k_reciprocal(x, x, 2, 1), *k_reciprocal(x, x, 2, 2, topk=2), nfc(x, 2, 3))
        yield from (nfc(x[:, None], visibility=shown), fuse(x, x[:, None]), fuse(x[:, None], x[:, None, None]))
        yield from (id2_score(x, PIDS), identity_density(x, PIDS).per_sample)
        yield from Centralizer(method="nfc").enhance(x, x, joint=True)
        yield from (*aqe(x, x), query_expansion(x, x), database_augmentation(x))
        yield str(nfc_diagnostics(x, camids=PIDS)) + str(generation_diagnostics(x, x[:, None]))

    expected = list(results())
    with torch.device("meta"):
        found = list(results())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
