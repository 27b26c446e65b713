"""Each image's nearest others, kept true while images come and go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pose2id.gallery.columns import Columns
from pose2id.gallery.engines import Asked, Images, Members, in_order
from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import blocks


class Lists(Columns):
    """The nearest others of each of n images in each of V views: groups of images, such as those of one camera.

    Nearest first, equal distances by the lower place; entries that a list lacks are -1, at an infinite distance.

    Attributes:
        lengths: of the lists in each view.
        view: (n,) int64, in which view an image is found; -1 for none.
        indices: (n, V, L) int32 places of images.
        squares: (n, V, L) float32 squared distances.
        sizes: (V,) int64, how many images are found in each view.
    """

    columns = ("view", "indices", "squares")

    def __init__(self, images: Images, lengths: Sequence[int], view: Tensor | None = None) -> None:
        self.images, self.lengths, self._one = images, list(lengths), view is None
        device = images.raw.device
        self.view = torch.zeros(len(images.raw), dtype=torch.int64, device=device) if view is None else view
        images.views = max(images.views, len(self.lengths))
        shape = (len(self.view), len(self.lengths), max(self.lengths))
        self.indices = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.squares = torch.full(shape, torch.inf, dtype=torch.float32, device=device)

    def fill(self, at: int, indices: Tensor) -> None:
        """Take in who is on the lists of all images in a view, -1 for nobody; distances are those of later searches."""
        length = min(self.lengths[at], indices.shape[1])
        for some in blocks(len(indices), BLOCK_BYTES // (12 * length * self.images.compared.shape[1])):
            found = indices[some, :length]
            x = self.images.compared[some].repeat_interleave(length, 0)
            squares = self.images.squares(x, found.clamp(min=0).flatten()).view(found.shape)
            # Ordered by these distances: neighbours that differ in float64 alone would change places later.
            found, squares = in_order(found, squares.masked_fill_(found < 0, torch.inf), length)
            self.indices[some, at, :length], self.squares[some, at, :length] = found.int(), squares

    def count(self) -> None:
        """Find `sizes`, from nothing."""
        index = self.images.index
        self.sizes = torch.zeros(len(self.lengths), dtype=torch.int64, device=self.view.device)
        self._parts = None if index is None else torch.stack([index.sizes(self.view[:0])] * len(self.lengths))
        self.counted(torch.nonzero(self.images.alive).flatten(), 1)

    def counted(self, places: Tensor, step: int) -> None:
        """Images that come (1) or go (-1)."""
        found = self.view[places]
        self.sizes += step * torch.bincount(found[found >= 0], minlength=len(self.lengths))
        if self._parts is not None:
            assert self.images.index is not None
            for number in found[found >= 0].unique().tolist():
                cameras = self.images.cameras[places[found == number]]
                self._parts[number] += step * self.images.index.sizes(cameras)

    def place(self, new: Tensor, view: Tensor | int) -> None:
        """New images are in some view."""
        self.view[new] = view
        self.counted(new, 1)

    def members(self, numbers: Tensor | None = None) -> Members:
        """Views, or some of them, to seek neighbours in."""
        every = torch.arange(len(self.lengths), device=self.view.device)
        return Members(None if self._one else self.view, every if numbers is None else numbers, self._parts)

    def near(self, rows: Tensor, at: int) -> Tensor:
        """The images on the lists of some in a view."""
        found = self.indices[:, at].index_select(0, rows).flatten().unique().long()
        return found[found >= 0]

    def search(self, rows: Tensor, asked: Asked, at: int) -> None:
        """Find the lists of some images in a view; they ask in this order."""
        length = self.lengths[at]
        indices, squares = asked.nearest(length, self.members(torch.tensor([at], device=rows.device)), own=rows)
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
            which, rows, squares = asked.nearer(coming, self._lasts(at, length, new))
            if len(rows):
                others, off = self._merge(at, length, rows, new[which], squares)
                changed[at] = torch.cat([new, others])
                left.append(off)
        return changed, torch.cat(left)

    def _lasts(self, at: int, length: int, new: Tensor) -> Callable[[Tensor], Tensor]:
        """How far the lists of images reach, new ones, which have found each other, and gaps left out."""
        marked = torch.zeros(self.images.n, dtype=torch.bool, device=new.device)
        marked[new] = True

        def last(places: Tensor) -> Tensor:
            out = marked[places] | ~self.images.present[places]
            return self.squares[places, at, length - 1].masked_fill_(out, -torch.inf)

        return last

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
