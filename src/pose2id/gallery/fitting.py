"""A refit: a gallery is centralized at once, with what is needed to go on from there, one image at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pose2id.centralization.cameras import Centres, mapped
from pose2id.centralization.enhancement import OPEN, known_of, reason
from pose2id.centralization.guard import Evidence, Guard
from pose2id.centralization.links import Searched, map_of
from pose2id.gallery.engines import Images, Inverted, Members
from pose2id.gallery.methods import Contrasting, Guarded, Mutual, Plain
from pose2id.gallery.state import Fitted, State
from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import Rows, blocks
from pose2id.neighbors.members import Compared

EXACT_UP_TO = 50_000


class Settings(NamedTuple):
    """How a gallery is centralized: parameters of its Centralizer."""

    method: str
    k1: int
    k2: int
    backend: str
    max_memory: int | None
    exact_up_to: int | None


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
            images, compared = self._searched(rows)
            return self._guarded(images, None, Guard(compared))
        if not self._num_cameras:
            raise ValueError(f"camids must name cameras for method={method!r}; none is known.")
        centres = Centres.of([(rows, self._cameras)])
        images, compared = self._searched(centres.applied(rows, self._cameras))
        if method == "centring":
            return State(Plain(images), Fitted(centres, None, None, reason(method, self._num_cameras), rows.n))
        if method == "cameras":
            return self._across(compared, centres, None)
        guard = Guard(compared, self._cameras)
        if method == "auto" and guard.evidence.gate >= OPEN:
            return self._across(compared, centres, guard.evidence)
        return self._guarded(images, centres, guard)

    def _searched(self, rows: Rows) -> tuple[Images, Compared]:
        """The images, compared by rows, and how these are searched."""
        present = torch.ones(rows.n, dtype=torch.bool, device=rows.device)
        images = Images(self._raw, rows.read(slice(None)), self._cameras, present)
        most = self._settings.exact_up_to
        if most is None or rows.n <= most or rows.device.type != "cpu":
            return images, Compared(rows, None, self._settings.backend, self._settings.max_memory)
        images.index = Inverted(images.compared)
        return images, _Probing(rows, images)

    def _mutual(self, rows: Rows) -> State:
        k1, k2 = self._settings.k1, self._settings.k2
        images, compared = self._searched(rows)
        linked = Mutual.of(images, *compared.nearest(max(k1, k2)), k1, k2)
        return State(linked, Fitted(None, None, None, f"nfc, k1 {k1}, k2 {k2}", rows.n))

    def _guarded(self, images: Images, centres: Centres | None, guard: Guard) -> State:
        """A and B."""
        found, centred = guard.evidence, centres is not None
        said = reason("guarded", self._num_cameras, found, centred=centred)
        linked = Guarded.of(images, guard, by_camera=centred) if found.gate > 0 else Plain(images)
        return State(linked, Fitted(centres, None, found, said, images.n))

    def _across(self, compared: Compared, centres: Centres, found: Evidence | None) -> State:
        """C1."""
        matrix = map_of(compared, self._cameras)
        images, compared = self._searched(mapped(compared.rows, matrix))
        linked = Contrasting.of(images, Searched(compared, self._cameras), self._num_cameras)
        return State(linked, Fitted(centres, matrix, found, reason("cameras", self._num_cameras, found), images.n))


class _Probing(Compared):
    """As `Compared`, with the approximate search of a large gallery."""

    def __init__(self, rows: Rows, images: Images) -> None:
        super().__init__(rows)
        self._images = images

    def _lists(self, members: Tensor | None, queries: Rows | None, asking: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `Compared._lists`."""
        assert queries is None  # a gallery's own
        among = Members(None, asking[:1])
        if members is not None:
            view = torch.zeros(self.rows.n, dtype=torch.int64)
            view[members] = 1
            among = Members(view, torch.ones(1, dtype=torch.int64))
        indices = torch.empty((len(asking), k), dtype=torch.int64)
        similarities = torch.empty((len(asking), k), dtype=torch.float64)
        for some in blocks(len(asking), BLOCK_BYTES // (64 * self.rows.dim)):
            x = self._images.compared.index_select(0, asking[some])
            (indices[some],), (squares,) = self._images.ask(x).nearest(k, among, asking[some])
            similarities[some] = 1 - squares.double() / 2
        return indices, similarities
