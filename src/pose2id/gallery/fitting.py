"""A refit: a gallery is centralized at once, with what is needed to go on from there, one image at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pose2id.centralization.cameras import Centres
from pose2id.centralization.enhancement import OPEN, known_of, reason
from pose2id.centralization.guard import Evidence, Guard
from pose2id.centralization.links import Searched, map_of
from pose2id.gallery.engines import Images, Members, inverted
from pose2id.gallery.methods import Contrasting, Guarded, Mutual, Plain
from pose2id.gallery.state import Fitted, State, compared
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
        method = self._settings.method
        if method == "nfc":
            return self._mutual()
        if method in ("auto", "guarded") and not self._usable:
            images, searched = self._searched(None)
            return self._guarded(images, None, Guard(searched))
        if not self._num_cameras:
            raise ValueError(f"camids must name cameras for method={method!r}; none is known.")
        centres = Centres.of([(Rows(self._raw, "features", normalize=True), self._cameras)])
        images, searched = self._searched(centres)
        if method == "centring":
            return State(Plain(images), Fitted(centres, None, None, reason(method, self._num_cameras), images.n))
        if method == "cameras":
            return self._across(searched, centres, None)
        guard = Guard(searched, self._cameras)
        if method == "auto" and guard.evidence.gate >= OPEN:
            return self._across(searched, centres, guard.evidence)
        return self._guarded(images, centres, guard)

    def _searched(self, centres: Centres | None, link_map: Tensor | None = None) -> tuple[Images, Compared]:
        """The images, as they are compared, and how they are searched."""
        x = compared(self._raw, self._cameras, centres, link_map)
        present = torch.ones(len(x), dtype=torch.bool, device=x.device)
        images, rows = Images(self._raw, x, self._cameras, present), Rows(x, "features")
        most = self._settings.exact_up_to
        if most is not None and rows.n > most and rows.device.type == "cpu":
            images.index = inverted(x, None if centres is None else self._cameras)
        if images.index is not None:
            return images, _Probing(rows, images)
        return images, Compared(rows, None, self._settings.backend, self._settings.max_memory)

    def _mutual(self) -> State:
        k1, k2 = self._settings.k1, self._settings.k2
        images, searched = self._searched(None)
        linked = Mutual.of(images, searched.nearest(max(k1, k2))[0], k1, k2)
        return State(linked, Fitted(None, None, None, f"nfc, k1 {k1}, k2 {k2}", images.n))

    def _guarded(self, images: Images, centres: Centres | None, guard: Guard) -> State:
        """A and B."""
        found, centred = guard.evidence, centres is not None
        said = reason("guarded", self._num_cameras, found, centred=centred)
        linked = Guarded.of(images, guard, by_camera=centred) if found.gate > 0 else Plain(images)
        return State(linked, Fitted(centres, None, found, said, images.n))

    def _across(self, centred: Compared, centres: Centres, found: Evidence | None) -> State:
        """C1."""
        matrix = map_of(centred, self._cameras)
        images, searched = self._searched(centres, matrix)
        linked = Contrasting.of(images, Searched(searched, self._cameras), self._num_cameras)
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
            view = torch.zeros(self.rows.n, dtype=torch.int64, device="cpu")
            view[members] = 1
            among = Members(view, torch.ones(1, dtype=torch.int64, device="cpu"))
        indices = torch.empty((len(asking), k), dtype=torch.int64, device="cpu")
        similarities = torch.empty((len(asking), k), dtype=torch.float64, device="cpu")
        for some in blocks(len(asking), BLOCK_BYTES // (64 * self.rows.dim)):
            x = self._images.compared.index_select(0, asking[some])
            (indices[some],), (squares,) = self._images.ask(x).nearest(k, among, asking[some])
            similarities[some] = 1 - squares.double() / 2
        return indices, similarities
