"""Which method centralizes query and gallery features, and on what evidence; and how each of them goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pose2id.centralization.cameras import CameraModel, centres_of, known_cameras, mapped, sum_weights, written
from pose2id.centralization.guard import MIN_IMAGES, Evidence, Guard
from pose2id.centralization.links import Searched, links_among, links_to, map_of
from pose2id.io.rows import Rows, unit
from pose2id.neighbors.members import Compared, Links, in_blocks

METHODS = ("auto", "nfc", "guarded", "cameras", "centring")
OPEN = 0.5  # the gate from which on camera-aware sums are made unasked


class Enhancement:
    """Query and gallery, L2-normalised, with what is known of their cameras and of their parts' visibility."""

    def __init__(
        self,
        query: Rows,
        gallery: Rows,
        camids: tuple[Any, Any],
        camera_model: CameraModel | None,
        statistics: str,
        visibility: tuple[Tensor | None, Tensor | None],
        backend: str,
        max_memory: int | None,
    ) -> None:
        if query.in_parts and not (camids[0] is None and camids[1] is None and camera_model is None):
            remedy = "Leave the cameras out, or flatten the parts where all are visible"
            raise ValueError(f"query_camids and gallery_camids must be None for features in parts. {remedy}.")
        self._query, self._gallery, self._visibility = query, gallery, visibility
        self._backend, self._max_memory = backend, max_memory
        self._of_query, self._of_gallery, self._of_model = known_cameras(query, gallery, *camids, camera_model)
        self._model, self._statistics = camera_model, statistics
        if camera_model is not None and not (self._of_gallery != -1).any():
            raise ValueError("gallery_camids must name cameras with camera_model; none is known.")
        self._num_cameras, self._usable = known_of(self._of_gallery, self._of_query, self._of_model)

    def run(self, method: str) -> tuple[tuple[Any, Any], str]:
        """Query and gallery by one of `METHODS` but NFC, and why so, in a sentence."""
        if method in ("cameras", "centring"):
            if not self._num_cameras:
                raise ValueError(f"gallery_camids must name cameras for method={method!r}; none is known.")
            query, gallery = self._centred()
            if method == "centring":
                return self._written(query, gallery), reason(method, self._num_cameras)
            return self._summed(query, self._compared(gallery)), reason(method, self._num_cameras)
        if not self._usable:
            guard = Guard(self._compared(self._gallery), None)
            guarded = self._guarded(guard, self._query, self._gallery, None)
            return guarded, reason("guarded", self._num_cameras, guard.evidence, centred=False)
        query, gallery = self._centred()
        compared = self._compared(gallery)
        guard = Guard(compared, self._of_gallery, keep=method == "auto")
        evidence = guard.evidence
        if method == "auto" and evidence.gate >= OPEN:
            del guard  # and its lists
            return self._summed(query, compared), reason("cameras", self._num_cameras, evidence)
        guarded = self._guarded(guard, query, gallery, self._of_query)
        return guarded, reason("guarded", self._num_cameras, evidence)

    @property
    def has_cameras(self) -> bool:
        """Whether any camera of the gallery is known."""
        return self._num_cameras > 0

    def evidence(self) -> Evidence:
        """What the gallery says without cameras."""
        return Guard(self._compared(self._gallery)).evidence

    def _compared(self, gallery: Rows) -> Compared:
        return Compared(gallery, self._visibility[1], self._backend, self._max_memory)

    def _centred(self) -> tuple[Rows, Rows]:
        cameras = self._of_query, self._of_gallery
        centres = centres_of(self._query, self._gallery, *cameras, self._of_model, self._statistics, self._model)
        query, gallery = (centres.applied(*side) for side in zip((self._query, self._gallery), cameras, strict=True))
        return query, gallery

    def _guarded(self, guard: Guard, query: Rows, gallery: Rows, cameras: Tensor | None) -> tuple[Any, Any]:
        """A and B: as far as the gate is open, neighbours that are nearer than strangers."""
        if guard.evidence.gate > 0:
            of_query, of_gallery = self._visibility
            summed = added(gallery, guard.gallery_links(), gallery, of_gallery)
            query = added(query, guard.query_links(query, cameras, of_query), summed, of_gallery)
            gallery = summed
        return self._written(query, gallery)

    def _summed(self, query: Rows, gallery: Compared) -> tuple[Any, Any]:
        """C1: the map across cameras, then linked neighbours; queries are linked to the gallery alone."""
        cameras, matrix = self._of_gallery, None if self._model is None else self._model.link_map.to(query.device)
        if matrix is None:
            matrix = map_of(gallery, cameras)
        query, rows = mapped(query, matrix), mapped(gallery.rows, matrix)
        searched = Searched(self._compared(rows), cameras)
        links = sum_weights(links_to(query, self._of_query, searched), self._of_query, cameras, self._num_cameras)
        query = added(query, links, rows)
        links = sum_weights(links_among(searched), cameras, cameras, self._num_cameras)
        return self._written(query, added(rows, links, rows))

    def _written(self, query: Rows, gallery: Rows) -> tuple[Any, Any]:
        """Rows in the containers that they came in."""
        return written(query, self._query), written(gallery, self._gallery)


def known_of(gallery: Tensor, *others: Tensor) -> tuple[int, bool]:
    """How many cameras of a gallery are known, and whether they are of use: numbers of cameras, -1 for unknown."""
    names, counts = torch.unique(gallery[gallery != -1], return_counts=True)
    every = torch.cat([gallery, *others])
    several = len(torch.unique(every[every != -1])) > 1
    # Cameras that each see few people tell little: half of the gallery must be in others.
    return len(names), several and len(names) > 0 and 2 * int(counts[counts >= MIN_IMAGES].sum()) >= len(gallery)


def reason(method: str, num_cameras: int, evidence: Evidence | None = None, *, centred: bool = True) -> str:
    """What was done, and on what evidence, in a sentence."""
    cameras = f"{num_cameras} camera{'s' if num_cameras > 1 else ''}"
    if evidence is None:
        return f"{method}: {cameras}, without guard"
    strength = f"gate {evidence.gate:.2f}" if evidence.gate else "gate shut, no neighbours added"
    if not centred:
        few = "1 camera alone" if num_cameras == 1 else f"{cameras} of too few images"
        return f"{method}, without cameras ({few if num_cameras else 'none is known'}), {strength}. {evidence.numbers}"
    said = f"cameras: {cameras}" if method == "cameras" else f"{method}, {cameras} centred"
    return f"{said}, {strength}. {evidence.numbers}"


def added(rows: Rows, links: Links, source: Rows, visibility: Tensor | None = None) -> Rows:
    """unit(row + sum over its links of weight times the row of `source`), part by part, as a copy."""
    result = torch.empty((rows.n, rows.dim), dtype=rows.dtype, device=rows.device)
    for block in in_blocks(rows):
        result[block] = added_block(rows, links, source, block, visibility)
    return Rows(result.view(rows.n, rows.parts, -1) if rows.in_parts else result, "features", parts=True)


def added_block(rows: Rows, links: Links, source: Rows, block: slice, visibility: Tensor | None = None) -> Tensor:
    """`added` of a block: (B, D)."""
    total = rows.read(block) + links.sums(source, block, visibility).to(rows.dtype)
    return unit(rows.by_part(total)).flatten(1)
