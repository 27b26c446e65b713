"""Contrast links, and a linear map that shrinks what differs between linked images. No label is used.

A link's weight says how far a similarity stands out, between the nearest (1) and the last (0) of both images' lists:

    contrast(s; list) = clip((s - last) / (first - last), 0, 1)
    w = min(contrast(s; x's 7 nearest in y's camera), contrast(s; y's 7 nearest in x's camera))^2
    w = min(w, contrast(s; x's 21 nearest), contrast(s; y's 21 nearest))

A method of this library, not of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pose2id.io.checks import camera_numbers, checked_memory
from pose2id.io.rows import ChosenRows, FeatureArray, Rows, as_container, checked_pair
from pose2id.neighbors.members import FEW_LISTS, Compared, Links, in_blocks, merged

NEAREST, OVERALL = 6, 20  # K within a camera, and L over all: the list's last has contrast 0
_LEAST_LIST = 3  # shorter lists tell nothing
_FEW = 10  # cameras with fewer images share one list
_LEAST_CONTRAST = 1e-6
_COPIES = 1e-12  # linked images that differ by less are copies, up to rounding


class WeightedLinks(NamedTuple):
    """Links between images, ascending by row and column, in the container of the features.

    Attributes:
        row: (L,) int64 indices of the features.
        column: (L,) int64 indices of the gallery (or of the features).
        weight: (L,) float64 in (0, 1].
    """

    row: NDArray[np.int64] | Tensor
    column: NDArray[np.int64] | Tensor
    weight: NDArray[np.float64] | Tensor


def link_weights(
    features: Any,
    camids: Any = None,
    gallery_feats: Any = None,
    gallery_camids: Any = None,
    *,
    backend: str = "auto",
    max_memory: int | None = None,
) -> WeightedLinks:
    """Links of images to their nearest images in every camera, weighted by contrast.

    Args:
        features: (N, D) float16, bfloat16, float32 or float64, numpy array or torch tensor; L2-normalised first.
        camids: (N,) cameras: integers, whole floats or strings, -1 or None for unknown; cameras with fewer than 10
            images, of those that are linked to, share one list. None: all images are in one list.
        gallery_feats: (G, D) images to link to, on the same device. None: the features themselves, no image to itself.
        gallery_camids: (G,) their cameras.
        backend: as in `pose2id.nearest_neighbors`.
        max_memory: as in `pose2id.nearest_neighbors`, for each search; lists come on top, about 1 kB an image.

    Returns:
        The links that weigh anything, at most 20 a row.
    """
    checked_memory(max_memory)
    rows = Rows(features, "features", normalize=True)
    if gallery_feats is None:
        if gallery_camids is not None:
            raise ValueError("gallery_camids must be None without gallery_feats.")
        cameras = camera_numbers({"camids": (camids, rows.n)})[0].to(rows.device)
        links = links_among(Searched(Compared(rows, None, backend, max_memory), cameras))
    else:
        gallery = Rows(gallery_feats, "gallery_feats", normalize=True)
        checked_pair(rows, gallery, "features", "gallery_feats")
        sides = {"camids": (camids, rows.n), "gallery_camids": (gallery_camids, gallery.n)}
        cameras, of_gallery = (side.to(rows.device) for side in camera_numbers(sides))
        compared = Compared(gallery, None, backend, max_memory)
        links = links_to(rows, cameras, Searched(compared, of_gallery))
    order = torch.argsort(links.column, stable=True)
    order = order[torch.argsort(links.row[order], stable=True)]
    found = (as_container(values[order], features) for values in (links.row, links.column, links.weight))
    return WeightedLinks(*found)


def link_map(
    features: FeatureArray, camids: Any = None, *, backend: str = "auto", max_memory: int | None = None
) -> FeatureArray:
    """A linear map that shrinks what differs between linked images: in closed form, without labels.

        S = sum w_ij (x_i - x_j)(x_i - x_j)' / n = E diag(e) E',   n = sum w_ij
        M = E diag((e + (a + D / n) mean e)^(-1/2)) E'

    over the links (`link_weights`) between different cameras, with a = 1; without cameras over all links, with a = 3.

    Args:
        features: (N, D) as in `link_weights`; centre the cameras first (`centre_cameras`).
        camids: (N,) cameras. Links of unknown ones don't count.
        backend: as in `link_weights`.
        max_memory: as in `link_weights`; (D, D) float64 matrices come on top.

    Returns:
        (D, D) symmetric, for features @ M, normalised again; the unit matrix where the links weigh less than 1 in all.
        In the container and on the device of `features`, float64 for float64 features, else float32.
    """
    checked_memory(max_memory)
    rows = Rows(features, "features", normalize=True)
    cameras = camera_numbers({"camids": (camids, rows.n)})[0].to(rows.device)
    found = map_of(Compared(rows, None, backend, max_memory), None if camids is None else cameras)
    if not str(features.dtype).endswith("float64"):
        found = found.float()
    return as_container(found, features)  # type: ignore[return-value]


def map_of(compared: Compared, cameras: Tensor | None) -> Tensor:
    """`link_map` of normalised rows."""
    rows, dim = compared.rows, compared.rows.dim
    nowhere = torch.full((rows.n,), -1, dtype=torch.int64, device=rows.device)
    links = links_among(Searched(compared, nowhere if cameras is None else cameras))
    if cameras is not None:
        links = links.chosen(_across(cameras[links.row], cameras[links.column]))
    total = float(links.weight.sum())
    unchanged = torch.eye(dim, dtype=torch.float64, device=rows.device)
    if total < 1:
        return unchanged
    # sum w_ij (x_i - x_j)(x_i - x_j)' = X' (degrees - W - W') X, a block of rows at a time.
    both = [torch.cat(pair) for pair in ((links.row, links.column), (links.column, links.row), 2 * (links.weight,))]
    links = Links(*both)
    degrees = torch.zeros(rows.n, dtype=torch.float64, device=rows.device).index_add_(0, links.row, links.weight)
    scatter = torch.zeros((dim, dim), dtype=torch.float64, device=rows.device)
    for block in in_blocks(rows):
        x = rows.read(block, torch.float64)
        scatter += x.T @ (degrees[block, None] * x - links.sums(rows, block, dtype=torch.float64))
    e, vectors = torch.linalg.eigh((scatter + scatter.T) / (2 * total))
    mean = float(e.mean())
    if dim * mean < _COPIES:
        return unchanged
    shrunk = (1 if cameras is not None else 3) + dim / total
    return (vectors / (e.clamp(min=0) + shrunk * mean).sqrt()) @ vectors.T


def cross_camera_weight(cameras: Tensor, others: Tensor, num_cameras: int) -> Tensor:
    """What links count in a sum: 1 within a camera, 1 + 1 / (C - 1) across cameras."""
    return 1 + _across(cameras, others) / (max(num_cameras, 2) - 1)


def _across(cameras: Tensor, others: Tensor) -> Tensor:
    """Which pairs are of different cameras, both known."""
    return (cameras != others) & (cameras != -1) & (others != -1)


class Searched:
    """Images that are linked to: their cameras' lists, and how far their own lists reach.

    Args:
        compared: the rows, L2-normalised.
        cameras: (n,) int64 camera of each, -1 for unknown.
    """

    def __init__(self, compared: Compared, cameras: Tensor) -> None:
        self.compared = compared
        self.names, counts = torch.unique(cameras, return_counts=True)
        large = (counts >= _FEW) & (self.names != -1)
        # Small and unknown cameras share the last list, which may be empty.
        self.shared = large.sum()
        self.numbers = torch.where(large, large.cumsum(0) - 1, self.shared)
        self.lists = self.listed(cameras)
        # Without zero rows, which are at one distance from all others.
        listed = self.lists[compared.directed]
        self.sizes = torch.bincount(listed, minlength=int(large.sum()) + 1)
        self.members = compared.directed[torch.argsort(listed, stable=True)].split(self.sizes.tolist())
        self.length = min(OVERALL, len(listed) - 2) + 1
        if self.length > 1:
            (self.indices, self.similarities), self.tables = self.nearest(None)

    def nearest(self, rows: Rows | None) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
        """The nearest of all searched rows, to these or to those of another set; of few lists, also those of each."""
        if len(self.members) > FEW_LISTS:
            every = self.compared.directed
            if rows is None:
                return self.compared.nearest(self.length, every), []
            return self.compared.nearest_to(rows, self.length, every), []
        length = max(self.length, NEAREST + 1)
        if rows is None:
            tables = [self.compared.nearest(length, members) for members in self.members]
        else:
            tables = [self.compared.nearest_to(rows, length, members) for members in self.members]
        return merged(tables, self.length), tables

    def listed(self, cameras: Tensor) -> Tensor:
        """(B,) number of the list for rows in `cameras`, -1 for a camera without images here."""
        at = torch.searchsorted(self.names, cameras).clamp(max=len(self.names) - 1)
        absent = torch.where(cameras == -1, self.shared, -1)
        return torch.where(self.names[at] == cameras, self.numbers[at], absent)


def links_among(searched: Searched) -> Links:
    """Links of the searched rows among themselves."""
    return _links(searched, None, searched.lists)


def links_to(rows: Rows, cameras: Tensor, searched: Searched) -> Links:
    """Links of rows to those of another set; each row by itself."""
    return _links(searched, rows, searched.listed(cameras))


def _links(searched: Searched, rows: Rows | None, lists: Tensor) -> Links:
    """Links of `rows`, or of the searched rows among themselves; `lists` are the numbers of the cameras' lists."""
    nowhere = torch.zeros(0, dtype=torch.int64, device=lists.device)
    if searched.length < 2:
        return Links(nowhere, nowhere, nowhere.double())
    own, tables = (searched.indices, searched.similarities), searched.tables
    if rows is not None:
        own, tables = searched.nearest(rows)

    def ends(row: Tensor, ahead: Tensor, column: Tensor, behind: Tensor) -> tuple[Ends, Ends]:
        if rows is not None:
            return _ends(searched, rows, tables, row, ahead), _ends(searched, None, searched.tables, column, behind)
        both = _ends(searched, None, tables, torch.cat([row, column]), torch.cat([ahead, behind]))
        of_rows, of_neighbors = zip(*(values.split(len(row)) for values in both), strict=True)
        return of_rows, of_neighbors

    theirs = searched.similarities[:, 0][own[0]], searched.similarities[:, -1][own[0]]
    found = contrast_links(*own, lists, searched.lists, searched.sizes, theirs, ends, same=rows is None)
    return Links(found[0], own[0][found[0], found[1]], found[2])


Ends = tuple[Tensor, Tensor]  # first and last similarity of lists


def contrast_links(
    indices: Tensor,
    similarities: Tensor,
    lists: Tensor,
    searched_lists: Tensor,
    sizes: Tensor,
    theirs: Ends,
    ends: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Ends, Ends]],
    *,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Links of B rows to their nearest among those that are searched: row, place in its list, and weight.

    Args:
        indices: (B, L) int64 of the nearest over all cameras; any where one is missing.
        similarities: (B, L) float64, minus infinity where one is missing.
        lists: (B,) number of the list of each row's camera, -1 for none.
        searched_lists: (n,) the same of the rows that are searched.
        sizes: (V,) how many rows each list holds.
        theirs: (B, L) each, of the lists over all cameras of those at `indices`.
        ends: of lists in one camera: of rows and lists, and of the searched rows and lists behind them.
        same: whether the rows are among those that are searched.
    """
    last = similarities.masked_fill(similarities.isinf(), torch.inf).amin(1, keepdim=True)
    weight = torch.minimum(
        _contrast(similarities, similarities[:, :1], last),
        _contrast(similarities, *theirs),
    )
    ahead = searched_lists[indices]
    length = sizes[ahead] - (lists[:, None] == ahead).int() * same  # without the row itself
    row, at = torch.nonzero((weight > 0) & (length >= _LEAST_LIST), as_tuple=True)
    if not len(row):
        return row, at, torch.zeros(0, dtype=torch.float64, device=lists.device)
    column, s, ahead = indices[row, at], similarities[row, at], ahead[row, at]
    # The neighbour's list in the row's camera, in its own where that has too few images.
    behind = lists[row]
    behind = torch.where((behind >= 0) & (sizes[behind] >= _LEAST_LIST), behind, ahead)
    of_rows, of_neighbors = ends(row, ahead, column, behind)
    near = torch.minimum(_contrast(s, *of_rows), _contrast(s, *of_neighbors)).square()
    weight = torch.minimum(weight[row, at], near)
    linked = weight > 0
    return row[linked], at[linked], weight[linked]


def _ends(
    searched: Searched, rows: Rows | None, tables: list[tuple[Tensor, Tensor]], row: Tensor, lists: Tensor
) -> tuple[Tensor, Tensor]:
    """(L,) first and last similarity to the nearest of a list, for pairs of a row and a list; each pair is sought once.

    Rows are those of another set, or those that are searched; `tables` are their neighbours in each list, if known.
    """
    n = (searched.compared.rows if rows is None else rows).n
    pairs, place = torch.unique(lists * n + row, return_inverse=True)
    first, last = (torch.empty(len(pairs), dtype=torch.float64, device=row.device) for _ in range(2))
    starts = torch.arange(len(searched.members) + 1, device=row.device) * n
    bounds = torch.searchsorted(pairs, starts).tolist()
    for at, (members, low, high) in enumerate(zip(searched.members, bounds[:-1], bounds[1:], strict=True)):
        if low < high:
            asking = pairs[low:high] % n
            if tables:
                found = tables[at][1][asking, : NEAREST + 1]
            elif rows is None:
                found = searched.compared.nearest(NEAREST + 1, members, asking)[1]
            else:
                found = searched.compared.nearest_to(ChosenRows(rows, asking), NEAREST + 1, members)[1]
            count = found.isfinite().sum(1, keepdim=True)
            first[low:high], last[low:high] = found[:, 0], found.gather(1, count - 1)[:, 0]
    return first[place], last[place]


def _contrast(s: Tensor, first: Tensor, last: Tensor) -> Tensor:
    return ((s - last) / (first - last).clamp(min=_LEAST_CONTRAST)).clamp(0, 1)
