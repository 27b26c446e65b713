"""Guarded centralization: features with their neighbours, as far as neighbours are nearer than strangers can be.

NFC averages strangers where people appear once. A threshold cannot tell "one image a person" from "hard data", but the
extremes of strangers can: for strangers x = -log(1 - cos) has exponential spacings, so a link that is nearer than the
nearest of many strangers stands out. Links are counted against what strangers would give (`evidence`); without more
than these, features stay as they are. A method of this library, not of the paper; no label is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pose2id.io.checks import camera_numbers, checked_memory
from pose2id.io.rows import Rows
from pose2id.neighbors.members import FEW_LISTS, Compared, Links

_LENGTHS = (6, 12, 24)  # K, neighbours that may be linked; with cameras the first two
_ENOUGH = 0.6  # the shortest lists that give this share of the most links
_DEEPEST, _DIVISOR = 50, 4  # ranks that measure the strangers' scale: at most 50, and a quarter of the gallery
_SHRINK = 10  # how many spacings the median scale of the gallery counts for
_LEAST_GAP = 1e-6  # 1 - cos of copies
_P = 0.05  # a link counts where fewer strangers than this are expected so near
_SIGMAS = 3.0  # of the lower bound
_STRANGERS = 1.2  # safety on the expected share of strangers
_GALLERY, _QUERY = 0.8, 1.6  # weights of neighbours
_KEPT = 21  # neighbours in a camera that links look at after the test
MIN_IMAGES = 16  # of a camera with lists of its own


@dataclass(frozen=True)
class Evidence:
    """Whether people appear more than once in a gallery, without labels.

    Attributes:
        links: pairs, counted from both sides, that are nearer than strangers should be (p < 0.05).
        expected: how many such links strangers would give.
        lower: lower bound (3 sigma) of the ratio of both; at most 1: no evidence.
        gate: in [0, 1], how far centralization is let through: `lower` - 1, clipped.
        k: neighbours of a row that were looked at; 0 where the gallery is too small to tell.
    """

    links: int
    expected: float
    lower: float
    gate: float
    k: int

    def __str__(self) -> str:
        """What it means, in a sentence."""
        if self.k == 0:
            return f"{self.numbers[:-1]}: features unchanged."
        return f"{self.numbers} Below 1: no evidence that people repeat, features unchanged; above 2: full strength."

    @property
    def numbers(self) -> str:
        """The same without what they mean for features."""
        if self.k == 0:
            return f"Too few images to tell whether people repeat (at least {MIN_IMAGES})."
        return (
            f"Links too close for strangers: {self.links}; expected among strangers: {self.expected:.1f}; lower bound "
            f"of the ratio: {self.lower:.2f}."
        )


def evidence(
    gallery_feats: Any, camids: Any = None, *, backend: str = "auto", max_memory: int | None = None
) -> Evidence:
    """Does a gallery hold people more than once? Answered without labels, against what strangers would give.

        x = -log(1 - cos) to the nearest others, by rank;  scale = mean of r (x_r - x_(r+1)) over deeper ranks r
        p = k exp(-(x - x_(k+1)) / scale), the strangers expected so near, the larger of both sides

    Links with p < 0.05 are compared with 0.05 N R, R the share in which deeper links are mutual. With cameras the test
    is made for each pair of cameras, evidence is pooled, and cameras of fewer than 16 images have no lists.

    Args:
        gallery_feats: (N, D) features of one set, or (N, P, D) of parts, which are compared as one vector; as in
            `pose2id.nfc`. Compared as they are: `Centralizer.enhance` centres cameras first (`centre_cameras`).
        camids: (N,) cameras: integers, whole floats or strings; images of unknown ones (-1 or None) count as those of
            one more camera. Whole features only.
        backend: as in `pose2id.nearest_neighbors`.
        max_memory: as in `pose2id.nearest_neighbors`, for each search; lists of 51 neighbours in each camera come on
            top, about 600 bytes a row and camera.

    Returns:
        The `Evidence`; `str()` says what it means.
    """
    rows = Rows(gallery_feats, "gallery_feats", normalize=True, parts=True)
    checked_memory(max_memory)
    cameras = None
    if camids is not None:
        if rows.in_parts:
            raise ValueError("camids must be None for features in parts, of which no cameras are known.")
        cameras = camera_numbers({"camids": (camids, rows.n)})[0].to(rows.device)
    return Guard(Compared(rows, None, backend, max_memory), cameras).evidence


class _Lists:
    """The nearest of rows within one camera, to rank 2k, and the strangers' scale, from the ranks k + 1 to m.

    `of_median`: the rows whose scales the median is of, or the median itself.
    """

    def __init__(self, indices: Tensor, similarities: Tensor, k: int, m: int, of_median: Tensor) -> None:
        x = -torch.log((1 - similarities).clamp(min=_LEAST_GAP))
        ranks = torch.arange(k + 1, m + 1, device=x.device)
        scale = (ranks * (x[:, k:m] - x[:, k + 1 : m + 1])).mean(1)
        ordered = (scale[of_median] if of_median.ndim else of_median[None]).sort().values
        self.median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        self.scale = ((m - k) * scale + _SHRINK * self.median) / (m - k + _SHRINK)
        self.k, self.x, self.level = k, x[:, :k].clone(), x[:, k].clone()
        self.indices = indices[:, :k].clone()
        self.deep, self.deep_similarities = indices[:, k : 2 * k - 1].clone(), similarities[:, k : 2 * k - 1].clone()
        self.last = similarities[:, 2 * k - 1].clone()


class Guard:
    """Evidence of a gallery, the links that it supports, and centralization with them.

    Args:
        gallery: rows to compare, L2-normalised.
        cameras: (n,) int64 camera of each row; None: all images are compared with all.
    """

    def __init__(self, gallery: Compared, cameras: Tensor | None = None) -> None:
        self._gallery, self._rows = gallery, gallery.rows
        n, device = self._rows.n, self._rows.device
        self._cameras = torch.zeros(n, dtype=torch.int64, device=device) if cameras is None else cameras
        # A zero row is nobody's neighbour: it is at one distance from all others.
        names, place = torch.unique(self._cameras, return_inverse=True)
        counts = torch.bincount(place[gallery.directed], minlength=len(names))
        # Members of each camera that has lists, by the camera's number.
        self._members = {
            int(name): gallery.directed[self._cameras[gallery.directed] == name]
            for name, count in zip(names, counts, strict=True)
            if int(count) >= MIN_IMAGES
        }
        tried = self._tried(_LENGTHS if len(names) == 1 else _LENGTHS[:2])
        if not tried:
            self.evidence = Evidence(0, 0.0, 0.0, 0.0, 0)
            return
        most = max(trial.count for trial in tried)
        self._found = next(trial for trial in tried if trial.count >= _ENOUGH * most)
        self.evidence = self._found.evidence

    def _tried(self, lengths: Sequence[int]) -> list[_Trial]:
        """Links and evidence for each length of lists."""
        if not self._members:
            return []
        lists: list[dict[int, _Lists]] = [{} for _ in lengths]
        keep = _KEPT if len(self._members) < FEW_LISTS else 0  # beside the list of small cameras
        for camera, members in self._members.items():
            m, among = self._reach(members)
            indices, similarities = self._gallery.nearest(m + 1, among, keep=keep)
            for of_length, k in zip(lists, lengths, strict=True):
                of_length[camera] = _Lists(indices, similarities, min(k, m // 2), m, self._gallery.directed)
        return [_Trial(k, of_length, self._cameras) for k, of_length in zip(lengths, lists, strict=True)]

    def _reach(self, members: Tensor) -> tuple[int, Tensor | None]:
        """How many ranks of a camera are looked at, and its members, None for everybody."""
        return min(_DEEPEST, len(members) // _DIVISOR), None if len(members) == self._rows.n else members

    def gallery_links(self) -> Links:
        """Links of the gallery's rows to each other, with the weights of their sums."""
        found = self._found
        weight = self.evidence.gate * found.confidence(found.u)
        # The expected number of images of the same person in the gallery.
        self._people = torch.ones(self._rows.n, dtype=torch.float64, device=self._rows.device)
        self._people.index_add_(0, found.row, weight)
        links = Links(found.row, found.column, _GALLERY * weight / found.rank.double().sqrt())
        return links.chosen(links.weight > 0)

    def query_links(self, queries: Rows, cameras: Tensor | None, visibility: Tensor | None = None) -> Links:
        """Links of queries to the gallery's rows, after `gallery_links`; each query by itself."""
        if cameras is None:
            cameras = torch.zeros(queries.n, dtype=torch.int64, device=queries.device)
        found, results = self._found, []
        places = found.places(cameras)
        for own, (camera, members) in enumerate(self._members.items()):
            m, among = self._reach(members)
            indices, similarities = self._gallery.nearest_to(queries, m + 1, among, visibility)
            of_gallery = found.lists[camera]
            lists = _Lists(indices, similarities, of_gallery.k, m, of_gallery.median)
            results.append(found.two_sided(lists, places, own))
        row, column, rank, u = (torch.cat(values) for values in zip(*results, strict=True))
        # A person counts once, however many images there are.
        weight = self.evidence.gate * found.confidence(u) / self._people[column]
        links = Links(row, column, _QUERY * weight / rank.double().sqrt())
        return links.chosen(links.weight > 0)


class _Trial:
    """Links of a gallery for one length of lists, and what they say."""

    def __init__(self, longest: int, lists: dict[int, _Lists], cameras: Tensor) -> None:
        self.longest, self.lists = longest, lists
        self._numbers = torch.tensor(list(lists), device=cameras.device)
        self._level, self._scale, self._last = (
            torch.stack([getattr(of_camera, name) for of_camera in lists.values()])
            for name in ("level", "scale", "last")
        )
        logs = [math.log(of_camera.k) for of_camera in lists.values()]
        self._logs = torch.tensor(logs, dtype=torch.float64, device=cameras.device)
        places, found, agreeing, deep = self.places(cameras), [], 0, 0
        for own, of_camera in enumerate(lists.values()):
            found.append(self.two_sided(of_camera, places, own))
            back = torch.where(places < 0, own, places)[:, None]
            agreeing += int((of_camera.deep_similarities >= self._last[back, of_camera.deep]).sum())
            deep += of_camera.deep.numel()
        self.row, self.column, self.rank, self.u = (torch.cat(values) for values in zip(*found, strict=True))
        # How often strangers agree. Never 0: a few links tell no more than that it is rare.
        self._agreement = max(agreeing, 1) / max(deep, 1)
        self._rows = len(cameras) * len(lists)
        self._sorted = self.u.sort().values
        self.count = int((self.u > -math.log(_P)).sum())
        expected = self._rows * _P * self._agreement
        # Links come in pairs, so that their variance is twice their number.
        lower = (self.count - _SIGMAS * math.sqrt(2 * self.count)) / expected
        self.evidence = Evidence(self.count, expected, lower, min(max(lower - 1, 0.0), 1.0), longest)

    def places(self, cameras: Tensor) -> Tensor:
        """Which lists (by place) neighbours look at, for rows in `cameras`; -1 where the camera has none."""
        at = torch.searchsorted(self._numbers, cameras).clamp(max=len(self._numbers) - 1)
        return torch.where(self._numbers[at] == cameras, at, -1)

    def two_sided(self, lists: _Lists, places: Tensor, own: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Links of rows to neighbours in one camera that are nearer than the level of both sides.

        A neighbour looks at the lists at the row's place, or at those of its own camera where that has none.

        Returns:
            Row, column, rank from 1, and u = -log p, p the larger of both sides.
        """
        back = torch.where(places < 0, own, places)[:, None]
        ahead = (lists.x - lists.level[:, None]) / lists.scale[:, None]
        behind = (lists.x - self._level[back, lists.indices]) / self._scale[back, lists.indices]
        row, at = torch.nonzero((ahead > 0) & (behind > 0), as_tuple=True)
        u = torch.minimum(ahead - math.log(lists.k), behind - self._logs[back])[row, at]
        return row, lists.indices[row, at], at + 1, u

    def confidence(self, u: Tensor) -> Tensor:
        """1 - (strangers expected with p or smaller) / (links seen with p or smaller), at least 0."""
        seen = (len(self._sorted) - torch.searchsorted(self._sorted, u)) / self._rows
        expected = _STRANGERS * self._agreement * torch.exp(-u)
        return (1 - expected / seen.clamp(min=1e-9)).clamp(0, 1)
