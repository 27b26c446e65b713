"""A refit: a gallery is centralized at once, with what is needed to go on from there, one image at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pose2id.centralization.cameras import Centres, mapped
from pose2id.centralization.enhancement import OPEN, known_of, reason
from pose2id.centralization.guard import Evidence, Guard
from pose2id.centralization.links import Searched, map_of
from pose2id.gallery.engines import Images
from pose2id.gallery.methods import Contrasting, Guarded, Mutual, Plain
from pose2id.gallery.state import Fitted, State
from pose2id.io.rows import Rows
from pose2id.neighbors.members import Compared
from pose2id.neighbors.search import search


class Settings(NamedTuple):
    """How a gallery is centralized: parameters of its Centralizer."""

    method: str
    k1: int
    k2: int
    backend: str
    max_memory: int | None


class Fit:
    """Features (N, D) float32 and their cameras (N,) int64, -1 for unknown, on the way to a `State`.

    The way is that of `Enhancement` with the statistics of the gallery alone.
    """

    def __init__(self, raw: Tensor, cameras: Tensor, settings: Settings) -> None:
        self._raw, self._cameras, self._settings = raw, cameras, settings
        self._num_cameras, self._usable = known_of(cameras)

    def run(self) -> State:
        """By the method of the settings."""
        method, rows = self._settings.method, Rows(self._raw, "features", normalize=True)
        if method == "nfc":
            return self._mutual(rows)
        if method in ("auto", "guarded") and not self._usable:
            return self._guarded(rows, None, Guard(self._compared(rows)))
        if not self._num_cameras:
            raise ValueError(f"camids must name cameras for method={method!r}; none is known.")
        centres = Centres.of([(rows, self._cameras)])
        rows = centres.applied(rows, self._cameras)
        if method == "centring":
            said = reason(method, self._num_cameras)
            return State(Plain(self._images(rows)), Fitted(centres, None, None, said, rows.n))
        if method == "cameras":
            return self._across(rows, centres, None)
        guard = Guard(self._compared(rows), self._cameras)
        if method == "auto" and guard.evidence.gate >= OPEN:
            return self._across(rows, centres, guard.evidence)
        return self._guarded(rows, centres, guard)

    def _compared(self, rows: Rows) -> Compared:
        return Compared(rows, None, self._settings.backend, self._settings.max_memory)

    def _images(self, rows: Rows) -> Images:
        present = torch.ones(rows.n, dtype=torch.bool, device=rows.device)
        return Images(self._raw, rows.read(slice(None)), self._cameras, present)

    def _mutual(self, rows: Rows) -> State:
        k1, k2 = self._settings.k1, self._settings.k2
        near = search(rows, max(k1, k2), self._settings.backend, self._settings.max_memory)
        linked = Mutual.of(self._images(rows), near, k1, k2)
        return State(linked, Fitted(None, None, None, f"nfc, k1 {k1}, k2 {k2}", rows.n))

    def _guarded(self, rows: Rows, centres: Centres | None, guard: Guard) -> State:
        """A and B."""
        found, centred = guard.evidence, centres is not None
        said = reason("guarded", self._num_cameras, found, centred=centred)
        images = self._images(rows)
        linked = Guarded.of(images, guard, by_camera=centred) if found.gate > 0 else Plain(images)
        return State(linked, Fitted(centres, None, found, said, rows.n))

    def _across(self, rows: Rows, centres: Centres, found: Evidence | None) -> State:
        """C1."""
        matrix = map_of(self._compared(rows), self._cameras)
        rows = mapped(rows, matrix)
        searched = Searched(self._compared(rows), self._cameras)
        linked = Contrasting.of(self._images(rows), searched, self._num_cameras)
        return State(linked, Fitted(centres, matrix, found, reason("cameras", self._num_cameras, found), rows.n))
