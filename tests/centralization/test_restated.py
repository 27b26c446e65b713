"""Guarded and camera-aware centralization against slow restatements, on small drawn sets of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from reference import guard as literal_guard
from reference import links as literal
from reference import parts as literal_parts
from reference import unit
from reference.camera_jaccard import ca_jaccard
from test_enhance import references  # noqa: F401 - a fixture

from pose2id import Centralizer, centre_cameras, evidence, link_map, link_weights

UNKNOWN = -1


def draw(seed, sizes, shots=5, *, dim=16, bias=0.6, noise=0.5, copies=0, queries=(), count=24):
    """Query, gallery and their cameras; `sizes` are the gallery's images of each camera, `queries` cameras of some."""
    rng = np.random.default_rng(seed)
    cameras = rng.permutation(np.repeat(list(sizes), list(sizes.values())))
    n = len(cameras)
    centres, biases = rng.normal(size=(n // shots + 1, dim)), bias * rng.normal(size=(40, dim))
    people = rng.permutation(np.arange(n) // shots)
    of_query = np.array([*queries, *rng.choice(list(sizes), count)])[:count]
    who = rng.choice(people, count)
    g = centres[people] + biases[cameras] + noise * rng.normal(size=(n, dim))
    q = centres[who] + biases[of_query] + noise * rng.normal(size=(count, dim))
    for _ in range(copies):
        g[rng.integers(n)] = g[rng.integers(n)]
        q[rng.integers(count)] = g[rng.integers(n)]
    return q, g, of_query, cameras


SETS = {
    "two large cameras": {"sizes": {0: 50, 1: 50}},
    "strangers": {"sizes": {0: 50, 1: 50}, "shots": 1},
    "two shots": {"sizes": {3: 30, 4: 30, 9: 30}, "shots": 2},
    "a gate half open": {"sizes": {0: 60, 1: 50}, "shots": 4, "noise": 0.67},
    "one camera": {"sizes": {5: 70}},
    "one camera, strangers": {"sizes": {5: 70}, "shots": 1},
    "cameras of every size": {
        "sizes": {0: 60, 1: 36, 2: 14, 3: 9, 4: 3, 7: 1, UNKNOWN: 4},
        "queries": (UNKNOWN, 8, 7, 4),
    },
    "unknown images": {"sizes": {0: 40, 1: 30, UNKNOWN: 20}, "queries": (8, UNKNOWN)},
    "unknown queries": {"sizes": {0: 40, 1: 30, 2: 20}, "queries": (UNKNOWN,) * 9 + (4,)},
    "just large enough": {"sizes": {0: 16, 1: 16, 2: 10, 3: 9}, "shots": 4},
    "just too small": {"sizes": {0: 16, 1: 15, 2: 15, 3: 9}, "shots": 4},
    "many tiny cameras": {"sizes": dict.fromkeys(range(20), 4), "queries": (30, 29)},
    "eight cameras": {"sizes": dict.fromkeys(range(8), 16), "bias": 0.3},
    "nine large cameras": {
        "sizes": {c: 18 + 6 * c for c in range(9)} | {9: 5, UNKNOWN: 3},
        "shots": 8,
        "noise": 0.4,
        "bias": 0.3,
        "copies": 6,
        "queries": (UNKNOWN, 9, 12, 4),
    },
    "nine cameras and tiny ones": {"sizes": dict.fromkeys(range(9), 12) | {9: 1, 10: 2, UNKNOWN: 3}, "shots": 3},
    "copies": {"sizes": {0: 50, 1: 40, 2: 12}, "copies": 25},
    "copies of strangers": {"sizes": {0: 50, 1: 40}, "shots": 1, "copies": 8},
    "lists of three": {"sizes": {0: 24}, "shots": 4, "noise": 0.1},
    "lists cut": {"sizes": {0: 40, 1: 20}, "shots": 4, "noise": 0.2},
    "fifteen images": {"sizes": {0: 9, 1: 6}, "shots": 3},
    "four images": {"sizes": {0: 3, 1: 1}, "shots": 2, "count": 3},
    "two images apart": {"sizes": {0: 40, 1: 20, 5: 2}, "shots": 3, "noise": 0.3, "queries": (5,) * 6},
    "three images apart": {
        "sizes": {0: 40, 1: 20, 5: 2, 6: 1},
        "shots": 3,
        "noise": 0.3,
        "queries": (5,) * 4 + (6,) * 4,
    },
}


@pytest.fixture(scope="module", params=SETS)
def drawn(request):
    return draw(list(SETS).index(request.param), **{"sizes": {}, **SETS[request.param]})


def close(found, expected, atol=1e-5):
    for mine, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, wanted, atol=atol, rtol=0)


class TestAgainstRestatements:
    def test_guarded_without_cameras(self, drawn):
        q, g = map(unit, drawn[:2])
        expected = literal_guard.Evidence(literal_guard.cosines(g, g))
        check_evidence(evidence(g), expected)
        expected = literal_guard.guarded(q, g, literal_guard.cosines(q, g), expected)
        for dtype in (np.float64, np.float32):
            close(Centralizer().enhance(*(x.astype(dtype) for x in drawn[:2])), expected)

    def test_with_cameras(self, drawn):
        q, g, qc, gc = drawn
        check_evidence(evidence(g, gc), literal_guard.Evidence(literal_guard.cosines(unit(g), unit(g)), gc))
        statistics = ["both", "gallery"][len(g) % 4 // 2]
        options = {"query_camids": qc, "gallery_camids": gc, "camera_statistics": statistics}
        expected = literal.enhanced(q, g, qc, gc, statistics)
        if literal.known(np.concatenate([qc, gc])) < 2:  # nothing to compare a camera with
            del expected["auto"], expected["guarded"]
            close(Centralizer().enhance(q, g, **options), Centralizer().enhance(q, g), 0)
        for method, wanted in expected.items():
            close(Centralizer(method=method).enhance(q, g, **options), wanted)
        for statistics in ("both", "gallery"):
            found = centre_cameras(q, g, qc, gc, statistics=statistics)
            close(found, literal.centred(q, g, qc, gc, statistics), 1e-12)

    def test_links_and_map(self, drawn):
        q, g, qc, gc = drawn
        x, y, nowhere = unit(q), unit(g), [UNKNOWN] * len(g)
        across, everywhere = literal.links(y, gc, y, gc, True), literal.links(y, nowhere, y, nowhere, True)
        for links, expected in [
            (link_weights(g, gc), across),
            (link_weights(q, qc, g, gc), literal.links(x, qc, y, gc, False)),
            (link_weights(g), everywhere),
        ]:
            dense = np.zeros(expected.shape)
            dense[links.row, links.column] = links.weight
            np.testing.assert_allclose(dense, expected, atol=1e-6)
        np.testing.assert_allclose(link_map(g, gc), literal.link_map(y, gc, across), atol=1e-6)
        np.testing.assert_allclose(link_map(g), literal.link_map(y, None, everywhere), atol=1e-6)

    def test_reranked(self, drawn):
        q, g, qc, gc = drawn
        cameras = np.concatenate([qc, gc])
        if literal.known(cameras) < 2:
            return  # no distance of cameras
        expected = ca_jaccard(literal.joint_features(q, g, qc, gc), cameras, len(q), 5, 12, 2, 2, 0.5, fill=False)
        found = Centralizer().rerank(q, g, query_camids=qc, gallery_camids=gc)
        off = np.abs(found - expected)
        # Sums of copies differ in their last digits, so which of them is first on a list is chance.
        copies = len(np.unique(np.concatenate([q, g]), axis=0)) < len(cameras)
        assert (off < 1e-5).mean() >= (0.9 if copies else 1)


def check_evidence(found, expected):
    assert (found.links, found.k) == (expected.n, expected.k)
    wanted = expected.expected, expected.lower, expected.gate
    np.testing.assert_allclose((found.expected, found.lower, found.gate), wanted, rtol=1e-9)


@pytest.mark.parametrize(
    "name", ["two shots", "a gate half open", "lists cut", "many tiny cameras", "just large enough"]
)
def test_the_restatements_are_the_references(name, references):  # noqa: F811
    methods, guard = references
    q, g, qc, gc = draw(list(SETS).index(name), **SETS[name])
    qc[qc > max(gc)] = 0
    expected = {"centring": methods.centred(q, g, qc, gc), "cameras": methods.features(q, g, qc, gc)}
    expected |= {"guarded": guard.guarded(q, g, qc, gc), "auto": guard.auto(q, g, qc, gc)}
    for method, found in literal.enhanced(q, g, qc, gc).items():
        close(found, expected[method], 1e-6)
    found = ca_jaccard(literal.joint_features(q, g, qc, gc), [*qc, *gc], len(q), 5, 12, 2, 2, 0.5, fill=False)
    np.testing.assert_allclose(found, methods.distances(q, g, qc, gc), atol=1e-6)


def draw_parts(seed, shown, *, shots=5, noise=0.4, n=70, count=12):
    """Parts of query and gallery (N, 3, 8), and what is visible of them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n // shots + 1, 3, 8))
    who = np.concatenate([rng.integers(0, n // shots, count), rng.permutation(n) // shots])
    x = centres[who] + noise * rng.normal(size=(n + count, 3, 8))
    weights = rng.random((n + count, 3))
    if shown == "some":
        visible = weights < 0.7
        visible[[0, count]] = False  # images that show nothing
    else:
        visible = np.where(weights < 0.1, 0, weights)
    return x[:count], x[count:], visible[:count], visible[count:]


@pytest.mark.parametrize("shown", ["some", "weights"])
@pytest.mark.parametrize(
    "case", [{}, {"noise": 0.6, "shots": 7}, {"shots": 1}, {"n": 24, "shots": 4, "noise": 0.1}], ids=str
)
def test_parts_by_what_both_show(shown, case, caplog):
    given = draw_parts(5, shown, **case)
    q, g = map(literal_parts.unit, given[:2])
    v, u = given[2:]
    found = literal_guard.Evidence(literal_guard.part_similarities(g, g, u, u))
    to = literal_guard.part_similarities(q, g, v, u)
    options = dict(zip(("query_visibility", "gallery_visibility"), (v, u), strict=True))
    with caplog.at_level("INFO", "pose2id.centralizer"):
        close(Centralizer().enhance(*given[:2], **options), literal_guard.guarded(q, g, to, found, shown=u))
    assert f"strangers: {found.n}; expected among strangers: {found.expected:.1f}; " in caplog.text


@pytest.mark.parametrize("shots", [1, 5])
def test_flattened_parts(shots):
    q, g, *_ = draw_parts(1, "some", shots=shots)
    x, y = (literal_parts.unit(rows) for rows in (q, g))
    to, among = (
        np.mean([literal_guard.cosines(rows[:, p], y[:, p]) for p in range(3)], 0).round(12) for rows in (x, y)
    )
    expected = literal_guard.Evidence(among)
    assert (expected.gate > 0) == (shots > 1)
    check_evidence(evidence(g), expected)
    close(Centralizer(part_distance="flattened").enhance(q, g), literal_guard.guarded(x, y, to, expected))
