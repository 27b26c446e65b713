"""Guarded centralization: features with their neighbours, as far as neighbours are nearer than strangers can be.

NFC averages strangers where people appear once. A threshold cannot tell "one image a person" from "hard data", but the
extremes of strangers can: for strangers x = -log(1 - cos) has exponential spacings, so a link that is nearer than the
nearest of many strangers stands out. Links are counted against what strangers would give (`evidence`); without more
than these, features stay as they are. A method of this library, not of the paper; no label is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
_FEW_IMAGES = 1024  # of many cameras with at most so many, all images are compared: a search is slower
Found = tuple[Tensor, Tensor, Tensor, Tensor]  # row, column, rank and u of links


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
        max_memory: as in `pose2id.nearest_neighbors`, for each search; lists of 51 neighbours come on top, about 2 kB a
            row, and what is kept of them, about 0.6 kB a row and camera.

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


def gallery_sum(weight: Tensor, rank: Tensor) -> Tensor:
    """What links of the gallery's rows count in their sums."""
    return _GALLERY * weight / rank.double().sqrt()


def query_sum(weight: Tensor, rank: Tensor, people: Tensor) -> Tensor:
    """What links of queries count: a person counts once, however many of its images (`people`) there are."""
    return _QUERY * weight / (people * rank.double().sqrt())


class Seen:
    """What rows see in one camera: their nearest images, and how strangers are spaced further down.

    Squared distances are float32, precise enough for x, and one number from both sides of a pair.

    Args:
        indices, similarities: (B, m + 1) of the nearest.
        lengths: (L,) K of each trial, already cut to what the camera has.
    """

    def __init__(self, indices: Tensor, similarities: Tensor, lengths: Sequence[int]) -> None:
        m, deepest = indices.shape[1] - 1, 2 * max(lengths)
        self.lengths, self._m = lengths, m
        self.indices = indices[:, :deepest].int()
        self.squares = (2 - 2 * similarities[:, :deepest]).float()
        x = nearness(2 - 2 * similarities)
        ranks = torch.arange(1, m + 1, device=x.device)
        spacings = ranks * (x[:, :m] - x[:, 1:])
        self._own = torch.stack([spacings[:, k:].mean(1) for k in lengths])

    def medians(self, rows: Tensor) -> Tensor:
        """(L,) median scales of some rows."""
        ordered = self._own[:, rows].sort(dim=1).values
        return (ordered[:, (len(rows) - 1) // 2] + ordered[:, len(rows) // 2]) / 2

    def scales(self, medians: Tensor) -> Tensor:
        """(L, B) scales of strangers, shrunk to a median."""
        counts = self._m - torch.tensor(self.lengths, device=medians.device)[:, None]
        return (counts * self._own + _SHRINK * medians[:, None]) / (counts + _SHRINK)


def nearness(squares: Tensor) -> Tensor:
    """Float64 x = -log(1 - cos) of squared distances."""
    return -torch.log((squares.double() / 2).clamp(min=_LEAST_GAP))


class Guard:
    """Evidence of a gallery, the links that it supports, and centralization with them.

    Args:
        gallery: rows to compare, L2-normalised.
        cameras: (n,) int64 camera of each row; None: all images are compared with all.
        keep: whether the gallery's lists of neighbours are asked for again, for links.
    """

    def __init__(self, gallery: Compared, cameras: Tensor | None = None, *, keep: bool = False) -> None:
        self._gallery, self._rows, self._keep = gallery, gallery.rows, keep
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
        if not self._members:
            self.evidence = Evidence(0, 0.0, 0.0, 0.0, 0)
            return
        self._lengths = _LENGTHS if len(names) == 1 else _LENGTHS[:2]
        self.table = self._searched()
        places = self.table.places(self._cameras)
        tried = [
            _Trial(length, at, self.table, places)
            for at, length in enumerate(self._lengths)
            if not at or self.table.ks[at].ne(self.table.ks[at - 1]).any()  # else it is the same again
        ]
        most = max(trial.count for trial in tried)
        self._found = found = next(trial for trial in tried if trial.count >= _ENOUGH * most)
        self.evidence, self.trial = found.evidence, found.at
        self.strangers = Strangers(
            cameras=torch.tensor(list(self._members), device=device),
            ks=self.table.ks[self.trial],
            deepest=torch.tensor(list(map(self._deepest, self._members.values())), device=device),
            medians=self.table.medians[self.trial],
            links=found.u,
            rows=found.rows,
            agreement=found.agreement,
            gate=found.evidence.gate,
        )

    def _searched(self) -> Table:
        """The gallery's own lists in each camera."""
        cameras = torch.tensor(list(self._members), device=self._rows.device)
        table = Table.empty(cameras, self._rows.n, list(map(self._cut, self._members.values())))
        for own, members in enumerate(self._members.values()):
            keep = _KEPT if self._keep and len(cameras) < FEW_LISTS else 0  # beside the list of small cameras
            lists = Seen(*self._nearest(None, members, keep=keep), self._cut(members))
            table.fill(own, lists, lists.medians(self._gallery.directed))
        return table

    def _cut(self, members: Tensor) -> list[int]:
        """K of each trial in a camera: half of the ranks that are looked at, at most."""
        return [min(k, self._deepest(members) // 2) for k in self._lengths]

    def _deepest(self, members: Tensor) -> int:
        return min(_DEEPEST, len(members) // _DIVISOR)

    def _nearest(
        self, queries: Rows | None, members: Tensor, visibility: Tensor | None = None, keep: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The nearest members of all rows, or of queries."""
        count = self._deepest(members) + 1
        if len(self._members) >= FEW_LISTS and len(members) <= _FEW_IMAGES:
            return self._gallery.nearest_of_few(count, members, queries)
        among = None if len(members) == self._rows.n else members
        if queries is None:
            return self._gallery.nearest(count, among, keep=keep)
        return self._gallery.nearest_to(queries, count, among, visibility)

    def gallery_links(self) -> Links:
        """Links of the gallery's rows to each other, with the weights of their sums."""
        row, column, rank, weight = self._weighed(self._found.links())
        # The expected number of images of the same person in the gallery.
        self._people = torch.ones(self._rows.n, dtype=torch.float64, device=self._rows.device)
        self._people.index_add_(0, row, weight)
        return Links(row, column, gallery_sum(weight, rank))

    def query_links(self, queries: Rows, cameras: Tensor | None, visibility: Tensor | None = None) -> Links:
        """Links of queries to the gallery's rows, after `gallery_links`; each query by itself."""
        if cameras is None:
            cameras = torch.zeros(queries.n, dtype=torch.int64, device=queries.device)
        row, column, rank, weight = self._weighed(self._found_by(queries, cameras, visibility))
        return Links(row, column, query_sum(weight, rank, self._people[column]))

    def _found_by(self, queries: Rows, cameras: Tensor, visibility: Tensor | None) -> Iterator[Found]:
        table, at = self.table, self.trial
        places = table.places(cameras)
        for own, members in enumerate(self._members.values()):
            lists = Seen(*self._nearest(queries, members, visibility), self._cut(members))
            scale = lists.scales(table.medians[:, own])[at]
            yield table.two_sided(at, own, lists.indices, lists.squares, scale, places)

    def _weighed(self, found: Iterable[Found]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, column, rank and weight of links, camera by camera, that weigh anything."""
        results = []
        for row, column, rank, u in found:
            weight = self.strangers.weights(u)
            results.append([values[weight > 0] for values in (row, column, rank, weight)])
        row, column, rank, weight = (torch.cat(values) for values in zip(*results, strict=True))
        return row, column, rank, weight


@dataclass(frozen=True, eq=False)
class Table:
    """What the gallery's rows see in each of C cameras, for L trials.

    Attributes:
        cameras: (C,) int64 numbers, ascending.
        ks: (L, C) K of each trial and camera.
        indices, squares: (C, n, 2K) int32 and float32, to rank 2K of the longest; K + 1 will do for `two_sided`.
        scales, medians: (L, C, n) and (L, C) float64.
    """

    cameras: Tensor
    ks: Tensor
    indices: Tensor
    squares: Tensor
    scales: Tensor
    medians: Tensor

    @staticmethod
    def empty(cameras: Tensor, n: int, ks: list[list[int]]) -> Table:
        """A table to `fill`."""
        device, of_trials = cameras.device, torch.tensor(ks, device=cameras.device).T
        shape = (len(cameras), n, 2 * int(of_trials.max()))
        return Table(
            cameras,
            of_trials,
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.full(shape, torch.inf, dtype=torch.float32, device=device),
            torch.empty((*of_trials.shape, n), dtype=torch.float64, device=device),
            torch.empty(of_trials.shape, dtype=torch.float64, device=device),
        )

    def fill(self, own: int, lists: Seen, medians: Tensor) -> None:
        """Take in the lists in one camera, by place."""
        width = lists.indices.shape[1]
        self.indices[own, :, :width], self.squares[own, :, :width] = lists.indices, lists.squares
        self.medians[:, own], self.scales[:, own] = medians, lists.scales(medians)

    def places(self, cameras: Tensor) -> Tensor:
        """Which lists (by place) neighbours look at, for rows in `cameras`; -1 where the camera has none."""
        at = torch.searchsorted(self.cameras, cameras).clamp(max=len(self.cameras) - 1)
        return torch.where(self.cameras[at] == cameras, at, -1)

    def two_sided(self, at: int, own: int, indices: Tensor, squares: Tensor, scale: Tensor, places: Tensor) -> Found:
        """Links of rows to neighbours in one camera that are nearer than the level of both sides.

        A neighbour looks at the lists at the row's place, or at those of its own camera where that has none.

        Args:
            at: the trial.
            own: the camera's place.
            indices: (B, 2K) the nearest that the rows see there.
            squares: (B, 2K) their squared distances.
            scale: (B,) of strangers.
            places: (B,) of the rows.

        Returns:
            Row, column, rank from 1, and u = -log p, p the larger of both sides.
        """
        k = int(self.ks[at, own])
        x, near = nearness(squares[:, : k + 1]), indices[:, :k].long()
        back = torch.where(places < 0, own, places)[:, None]
        of_back = self.ks[at, back]
        level = nearness(self.squares[back, near, of_back])
        ahead = (x[:, :k] - x[:, k:]) / scale[:, None]
        behind = (x[:, :k] - level) / self.scales[at, back, near]
        row, rank = torch.nonzero((ahead > 0) & (behind > 0), as_tuple=True)
        u = torch.minimum(ahead - math.log(k), behind - of_back.double().log())[row, rank]
        return row, near[row, rank], rank + 1, u

    def agreeing(self, at: int, own: int, places: Tensor) -> tuple[int, int]:
        """How many neighbours from rank K + 1 to 2K - 1 have the row as near as that; and how many there are."""
        k = int(self.ks[at, own])
        squares, deep = self.squares[own, :, k : 2 * k - 1], self.indices[own, :, k : 2 * k - 1].long()
        back = torch.where(places < 0, own, places)[:, None]
        last = self.squares[back, deep, 2 * self.ks[at, back] - 1]
        return int((squares <= last).sum()), deep.numel()


@dataclass(frozen=True, eq=False)
class Strangers:
    """What a gallery knows of strangers: how links are weighed, of queries and of images that come later.

    Attributes:
        cameras: (C,) int64 numbers of the cameras with lists, ascending.
        ks, deepest: (C,) int64, K in each and how many ranks measure the scale.
        medians: (C,) float64 median scales.
        links: (L,) float64 u of the links, ascending.
        rows: how many rows looked for them, in all cameras.
        agreement: how often strangers agree.
        gate: in [0, 1].
    """

    cameras: Tensor
    ks: Tensor
    deepest: Tensor
    medians: Tensor
    links: Tensor
    rows: int
    agreement: float
    gate: float

    def weights(self, u: Tensor) -> Tensor:
        """The gate times 1 - (strangers expected with p or smaller) / (links seen with p or smaller), at least 0."""
        seen = (len(self.links) - torch.searchsorted(self.links, u)) / self.rows
        expected = _STRANGERS * self.agreement * torch.exp(-u)
        return self.gate * (1 - expected / seen.clamp(min=1e-9)).clamp(0, 1)


class _Trial:
    """Links of a gallery for one length of lists, and what they say."""

    def __init__(self, longest: int, at: int, table: Table, places: Tensor) -> None:
        self.at, self._table, self._places = at, table, places
        self.u = torch.cat([u for *_, u in self.links()]).sort().values
        agreeing, deep = map(
            sum, zip(*(table.agreeing(at, own, places) for own in range(len(table.indices))), strict=True)
        )
        # How often strangers agree. Never 0: a few links tell no more than that it is rare.
        self.agreement = max(agreeing, 1) / max(deep, 1)
        self.rows = table.indices.shape[0] * table.indices.shape[1]
        self.count = int((self.u > -math.log(_P)).sum())
        expected = self.rows * _P * self.agreement
        # Links come in pairs, so that their variance is twice their number.
        lower = (self.count - _SIGMAS * math.sqrt(2 * self.count)) / expected
        self.evidence = Evidence(self.count, expected, lower, min(max(lower - 1, 0.0), 1.0), longest)

    def links(self) -> Iterator[Found]:
        """What `Table.two_sided` finds, camera by camera."""
        table = self._table
        for own, (indices, squares, scale) in enumerate(
            zip(table.indices, table.squares, table.scales[self.at], strict=True)
        ):
            yield table.two_sided(self.at, own, indices, squares, scale, self._places)
