"""A gallery that lives against galleries that are given at once: by `enhance`, and with the same frozen statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import guard as literal_guard
from reference import links as literal_links
from reference import unit

from pose2id import Centralizer, Gallery
from pose2id.gallery.engines import Images
from pose2id.gallery.methods import Contrasting, Guarded, Mutual, Plain
from pose2id.gallery.state import State

DIM, CAMERAS = 16, 3
METHODS = {
    "auto, no cameras": ("auto", False),
    "guarded": ("guarded", True),
    "cameras": ("cameras", True),
    "centring": ("centring", True),
    "nfc": ("nfc", False),
}


class Drawn:
    """Images of people in cameras, as many as are asked for."""

    def __init__(self, seed, people=30, noise=0.5, rare=0.0):
        self.rng = np.random.default_rng(seed)
        self.people = self.rng.normal(size=(people, DIM))
        self.biases = 0.5 * self.rng.normal(size=(CAMERAS + 1, DIM))
        self.noise, self.rare = noise, rare

    def images(self, n):
        who, camids = self.rng.integers(0, len(self.people), n), self.rng.integers(0, CAMERAS, n)
        # Some of a camera that has too few images for lists, and some of unknown ones.
        if self.rare:
            rare = self.rng.integers(-1, 1, n) * (CAMERAS + 1) + CAMERAS
            camids = np.where(self.rng.random(n) < self.rare, rare, camids)
        x = self.people[who] + self.biases[camids] + self.noise * self.rng.normal(size=(n, DIM))
        return x.astype(np.float32), camids, who


def built(name, x, camids, **options):
    method, known = METHODS[name]
    gallery = Gallery(Centralizer(method=method), **options)
    gallery.add(x, camids=camids if known else None)
    return gallery


def at_once(state):
    """The same images and frozen statistics, all lists and links found from nothing."""
    alive = torch.nonzero(state.images.alive).flatten()
    raw, cameras, linked = state.images.raw[alive], state.images.cameras[alive], state.linked
    images = Images(raw, state.compared(raw, cameras), cameras, torch.ones(len(alive), dtype=torch.bool))
    if isinstance(linked, Plain):
        made = Plain(images)
    elif isinstance(linked, Mutual):
        made = Mutual(images, linked.k1, linked.k2)
    elif isinstance(linked, Guarded):
        made = Guarded(images, linked.strangers, by_camera=linked.by_camera)
        made.scales[:] = linked.scales[alive]
    else:
        made = Contrasting(images, linked.names, linked.numbers, linked.shared, linked.num_cameras)
    for lists in made.every_list():
        lists.search_all(torch.arange(images.n), images.ask(images.compared))
    if made.every_list():
        made.link_all()
    return State(made, state.fitted)


def centralized(state, raw, cameras):
    return np.concatenate([asking.x.numpy() for _, asking in state.asking(torch.from_numpy(raw), cameras)])


@pytest.mark.parametrize("kind", ["numpy", "torch", "float16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_refit_equals_enhance(name, kind):
    drawn, (method, known) = Drawn(1), METHODS[name]
    x, camids, _ = drawn.images(150)
    q, q_cams, _ = drawn.images(20)
    gallery = built(name, x[:120], camids[:120], refit_share=None)
    for row in range(120, 150):
        gallery.add(x[row : row + 1], camids=camids[row : row + 1] if known else None)
    gallery.remove([3, 77, 140])
    gallery.update([5], x[3:4])
    gallery.refit()
    kept = np.delete(np.arange(150), [3, 77, 140])
    y, y_cams = x.copy()[kept], camids[kept]
    y[np.flatnonzero(kept == 5)] = x[3]
    asked = q if kind == "numpy" else torch.from_numpy(q) if kind == "torch" else q.astype(np.float16)
    cameras = {"query_camids": q_cams, "gallery_camids": y_cams} if known else {}
    of_query, of_gallery = Centralizer(method=method).enhance(
        np.asarray(asked, dtype=np.float32), y, camera_statistics="gallery", **cameras
    )
    np.testing.assert_allclose(gallery.features(), of_gallery, atol=1e-6)
    found = gallery.search(asked, len(y), query_camids=q_cams if known else None)
    assert type(found.distances) is type(asked)
    if name != "nfc":  # centralizes queries with each other
        expected = ((of_query[:, None] - of_gallery) ** 2).sum(2)
        columns = np.searchsorted(kept, found.ids)
        np.testing.assert_allclose(found.distances, np.take_along_axis(expected, columns, 1), atol=1e-5)
        np.testing.assert_allclose(found.distances, np.sort(expected, 1), atol=1e-5)
        alone = [
            gallery.search(row[None], 7, query_camids=[c] if known else None) for row, c in zip(q, q_cams, strict=True)
        ]
        together = gallery.search(q, 7, query_camids=q_cams if known else None)
        np.testing.assert_array_equal(np.concatenate([one.ids for one in alone]), together.ids)
        np.testing.assert_allclose(np.concatenate([one.distances for one in alone]), together.distances, atol=1e-6)


def literal_state(state):
    """Centralized features of the gallery's images by the slow restatements, with the frozen statistics."""
    alive = torch.nonzero(state.images.alive).flatten()
    x, cams = state.images.compared[alive].double().numpy(), state.images.cameras[alive].tolist()
    if isinstance(state.linked, Contrasting):
        return literal_links.summed(x, cams, x, cams, True, state.linked.num_cameras)
    known, s = state.linked.strangers, literal_guard.cosines(x, x)
    cameras = cams if state.linked.by_camera else [0] * len(x)
    lists = {}
    for at, camera in enumerate(known.cameras.tolist()):
        members = [j for j, c in enumerate(cameras) if c == camera]
        seen = literal_guard.OneCamera(s, members, int(known.ks[at]), among=True)
        seen.scale = state.linked.scales[alive, at].tolist()
        lists[camera] = seen
    strengths, out, people = known.links.numpy(), x.copy(), np.ones(len(x))
    for i, j, rank, u in literal_guard.supported(lists, lists, cameras):
        seen = (strengths >= u - 1e-5).sum() / known.rows  # a step at each link's own strength
        weight = known.gate * min(max(1 - 1.2 * known.agreement * np.exp(-u) / max(seen, 1e-9), 0), 1)
        people[i] += weight
        out[i] += 0.8 * weight / np.sqrt(rank) * x[j]
    np.testing.assert_allclose(state.linked.people[alive], people, rtol=1e-5)  # float32
    return unit(out)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["auto, no cameras", "guarded", "cameras"])
def test_between_refits_features_are_those_of_slow_restatements(name, seed):
    drawn, (_, known) = Drawn(seed), METHODS[name]
    x, camids, _ = drawn.images(160)
    gallery = built(name, x[:120], camids[:120], refit_share=None)
    assert isinstance(gallery._content.state.linked, Contrasting if name == "cameras" else Guarded)
    for row in range(120, 140):
        gallery.add(x[row : row + 1], camids=camids[row : row + 1] if known else None)
    gallery.remove([1, 130])
    gallery.add(x[140:], camids=camids[140:] if known else None)
    gallery.update([2, 3], x[[1, 130]])
    np.testing.assert_allclose(gallery.features(), literal_state(gallery._content.state), atol=2e-6)


class Life(RuleBasedStateMachine):
    """Random steps, after each of which all is as in a gallery that is given at once."""

    name = "cameras"

    @initialize(seed=st.integers(0, 10_000), copies=st.booleans())
    def start(self, seed, copies):
        self.drawn, self.copies = Drawn(seed, rare=0.1), copies
        self.known = METHODS[self.name][1]
        x, camids, who = self.images(110)
        self.gallery = Gallery(Centralizer(method=METHODS[self.name][0]), refit_share=0.5)
        ids = self.gallery.add(x, camids=camids, labels=who)
        self.model = dict(zip(ids.tolist(), zip(x, who, strict=True), strict=True))

    def images(self, n):
        x, camids, who = self.drawn.images(n)
        if self.copies and hasattr(self, "model"):
            some = list(self.model.values())
            x[0] = some[self.drawn.rng.integers(len(some))][0]
        return x, camids if self.known else None, who

    def some_ids(self, n):
        return self.drawn.rng.choice(list(self.model), min(n, len(self.model) - 1), replace=False).tolist()

    @rule(n=st.integers(0, 7))
    def add(self, n):
        x, camids, who = self.images(max(n, 1))
        ids = self.gallery.add(x[:n], camids=None if camids is None else camids[:n], labels=who[:n])
        self.model |= dict(zip(ids.tolist(), zip(x, who, strict=False), strict=False))

    @rule(n=st.integers(1, 5))
    def remove(self, n):
        ids = self.some_ids(n)
        self.gallery.remove(ids)
        self.model = {name: value for name, value in self.model.items() if name not in ids}

    @rule(n=st.integers(1, 3))
    def update(self, n):
        ids = self.some_ids(n)
        x, camids, who = self.images(len(ids))
        if self.drawn.rng.random() < 0.5:
            self.gallery.update(ids, x)
            who = [self.model[name][1] for name in ids]
        else:
            self.gallery.update(ids, x, camids, who)
        self.model |= {name: known for name, *known in zip(ids, x, who, strict=True)}

    @precondition(lambda self: len(self.model) > 70)
    @rule()
    def refit(self):
        self.gallery.refit()

    @rule()
    def search(self):
        q, q_cams, _ = self.drawn.images(3)
        found = self.gallery.search(q, 5, query_camids=q_cams if self.known else None)
        whole = at_once(self.gallery._content.state)
        cameras = torch.from_numpy(q_cams) if self.known else torch.full((3,), -1)
        expected = [asking.nearest(5)[1] for _, asking in whole.asking(torch.from_numpy(q), cameras)]
        np.testing.assert_allclose(found.distances, torch.cat(expected), atol=2e-6)
        for of_query, labels in zip(found.ids.tolist(), found.labels.tolist(), strict=True):
            assert labels == [None if name < 0 else self.model[name][1] for name in of_query]

    @invariant()
    def as_at_once(self):
        if not hasattr(self, "model"):
            return
        gallery, state = self.gallery, self.gallery._content.state
        assert len(gallery) == len(self.model)
        assert set(gallery.ids.tolist()) == self.model.keys()
        raw = gallery.features(gallery.ids, raw=True)
        np.testing.assert_array_equal(raw, np.stack([self.model[name][0] for name in gallery.ids.tolist()]))
        whole = at_once(state)
        np.testing.assert_allclose(gallery.features(), whole.features(torch.arange(whole.images.n)), atol=1e-6)


def life(name):
    return type(name, (Life,), {"name": name})


@pytest.mark.parametrize("name", METHODS)
def test_random_steps(name, stress):
    from hypothesis.stateful import run_state_machine_as_test  # noqa: PLC0415

    examples, steps = (2, 1000) if stress else (3, 12)
    run_state_machine_as_test(
        life(name),
        settings=settings(
            deadline=None,
            suppress_health_check=list(HealthCheck),
            max_examples=examples,
            stateful_step_count=steps,
        ),
    )
