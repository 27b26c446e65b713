"""Each image's nearest others, kept true while images come and go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pose2id.gallery.columns import Columns
from pose2id.gallery.engines import Asked, Images, in_order


class Lists(Columns):
    """The nearest others of each of n images in each of V views: groups of images, such as those of one camera.

    Nearest first, equal distances by the lower place; entries that a list lacks are -1, at an infinite distance.

    Attributes:
        lengths: of the lists in each view.
        view: (n,) int64, in which view an image is found; -1 for none.
        indices: (n, V, L) int32 places of images.
        squares: (n, V, L) float32 squared distances.
    """

    columns = ("view", "indices", "squares")

    def __init__(self, images: Images, lengths: Sequence[int], view: Tensor) -> None:
        self.images, self.lengths, self.view = images, list(lengths), view
        images.views = max(images.views, len(self.lengths))
        shape = (len(view), len(self.lengths), max(self.lengths))
        self.indices = torch.full(shape, -1, dtype=torch.int32, device=view.device)
        self.squares = torch.full(shape, torch.inf, dtype=torch.float32, device=view.device)

    def fill(self, at: int, indices: Tensor, squares: Tensor) -> None:
        """Take in the lists of all images in one view."""
        length = min(self.lengths[at], indices.shape[1])
        self.indices[: len(indices), at, :length] = indices[:, :length].int()
        self.squares[: len(indices), at, :length] = squares[:, :length].float()

    def members(self) -> Tensor:
        """(V, n) which images of the gallery are found in each view."""
        views = torch.arange(len(self.lengths), device=self.view.device)
        return (self.view[: self.images.n] == views[:, None]) & self.images.alive

    def sizes(self) -> Tensor:
        """(V,) how many images are found in each view."""
        found = self.view[: self.images.n][self.images.alive]
        return torch.bincount(found[found >= 0], minlength=len(self.lengths))

    def near(self, rows: Tensor, at: int) -> Tensor:
        """The images on the lists of some in a view."""
        found = self.indices[:, at].index_select(0, rows).flatten().unique().long()
        return found[found >= 0]

    def search(self, rows: Tensor, asked: Asked, at: int) -> None:
        """Find the lists of some images in a view; they ask in this order."""
        length = self.lengths[at]
        indices, squares = asked.nearest(length, self.members()[at, None], own=rows)
        self.indices[rows, at, :length], self.squares[rows, at, :length] = indices[0].int(), squares[0]

    def search_all(self, rows: Tensor, asked: Asked, deepest: int = 0) -> tuple[Tensor, Tensor]:
        """Find their lists in all views: (V, B, k) places and squared distances, k of the longest list or `deepest`."""
        indices, squares = asked.nearest(max(deepest, *self.lengths), self.members(), own=rows)
        for at, length in enumerate(self.lengths):
            self.indices[rows, at, :length], self.squares[rows, at, :length] = (
                indices[at, :, :length].int(),
                squares[at, :, :length],
            )
            self.indices[rows, at, length:], self.squares[rows, at, length:] = -1, torch.inf
        return indices, squares

    def insert(self, new: Tensor, asked: Asked) -> tuple[list[Tensor], Tensor]:
        """New images, whose own lists are known, on the lists of others: which in each view, and who left a list."""
        changed, left = [], [new[:0]]
        for at, length in enumerate(self.lengths):
            changed.append(new)
            coming = torch.nonzero(self.view[new] == at).flatten()
            if not len(coming):
                continue
            last = self.squares[: self.images.n, at, length - 1].masked_fill(~self.images.alive, -torch.inf)
            last[new] = -torch.inf  # they have found each other
            which, rows, squares = asked.nearer(coming, last)
            if len(rows):
                others, off = self._merge(at, length, rows, new[which], squares)
                changed[at] = torch.cat([new, others])
                left.append(off)
        return changed, torch.cat(left)

    def _merge(self, at: int, length: int, rows: Tensor, others: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Put pairs (rows ascending) on the lists of their rows: these, and who left a list."""
        changed, place, counts = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
        rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[place]
        shape = (len(changed), int(counts.max()))
        indices = torch.full(shape, -1, dtype=torch.int32, device=rows.device)
        distances = torch.full(shape, torch.inf, dtype=torch.float32, device=rows.device)
        indices[place, rank], distances[place, rank] = others.int(), squares
        indices = torch.cat([self.indices[changed, at, :length], indices], 1)
        distances = torch.cat([self.squares[changed, at, :length], distances], 1)
        indices, distances = in_order(indices, distances, indices.shape[1])
        self.indices[changed, at, :length], self.squares[changed, at, :length] = (
            indices[:, :length],
            distances[:, :length],
        )
        left = indices[:, length:].flatten()
        return changed, left[left >= 0].long()

    def without(self, gone: Tensor) -> list[Tensor]:
        """Which images of the gallery have some of those that have gone on their list, in each view."""
        n = self.images.n
        left = torch.zeros(n + 1, dtype=torch.bool, device=gone.device)  # the last for what is missing
        left[gone] = True
        listed = left[self.indices[:n].long()].any(2) & self.images.alive[:, None]
        return [torch.nonzero(column).flatten() for column in listed.T]
