"""Who finds a gallery's nearest images: products with all rows, or faiss's inverted lists for large galleries."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from pose2id.gallery.columns import Columns
from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import sum_last
from pose2id.neighbors.distance import full_precision

_MARGIN = 1e-5  # what rounding may do to a squared distance of unit rows that comes from a product
EXTRA = 8  # candidates beyond those wanted: a product may order near ties wrongly


class Images(Columns):
    """The images of a gallery, by place: those that are gone leave a gap.

    Attributes:
        n: how many places are in use.
        raw: (N, D) float32 features as they came.
        compared: (N, D) float32 unit rows, in which neighbours are sought.
        cameras: (N,) int64, -1 for unknown.
        present: (N,) bool.
    """

    columns = ("raw", "compared", "cameras", "present")

    def __init__(self, raw: Tensor, compared: Tensor, cameras: Tensor, present: Tensor) -> None:
        self.n = len(raw)
        self.raw, self.compared, self.cameras, self.present = raw, compared, cameras, present

    @property
    def block(self) -> int:
        """How many rows should ask at a time."""
        return max(1, BLOCK_BYTES // (16 * max(self.n, self.raw.shape[1])))

    def ask(self, x: Tensor) -> Products:
        """A block of unit rows (B, D) that looks for neighbours."""
        return Products(self, x)

    @property
    def alive(self) -> Tensor:
        """(n,) bool, which places hold an image."""
        return self.present[: self.n]

    def squares(self, x: Tensor, rows: Tensor) -> Tensor:
        """(B,) squared distances of unit rows (B, D) to images, from differences: the same from both sides."""
        return sum_last(self.compared[rows].sub_(x).square_())


class Asked(Protocol):
    """A block of B unit rows that asks for nearest images."""

    def nearest(self, k: int, members: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, k) int64 places of the nearest members (n,), without `own` (B,), and float32 squared distances.

        Equal distances by the lower place; what is missing is -1, at infinity.
        """

    def nearer(self, which: Tensor, than: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of `which` rows of the block and images that are nearer than (n,) float32 squared distances.

        (P,) positions in the block, places ascending, and float32 squared distances.
        """


class Products:
    """Exact: products with all rows, then differences where they decide."""

    def __init__(self, images: Images, x: Tensor) -> None:
        self._images, self._x = images, x
        with full_precision(x.device):
            self.similarities = x @ images.compared[: images.n].T

    def nearest(self, k: int, members: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Asked.nearest`."""
        s = self.similarities.masked_fill(~members, -torch.inf)
        if own is not None:
            s[torch.arange(len(own), device=own.device), own] = -torch.inf
        found, candidates = s.topk(min(k + EXTRA, s.shape[1]), dim=1)
        width = candidates.shape[1]
        squares = self._images.squares(self._x.repeat_interleave(width, 0), candidates.flatten()).view(-1, width)
        squares.masked_fill_(found.isinf(), torch.inf)
        return in_order(candidates.masked_fill(found.isinf(), -1), squares, k)

    def nearer(self, which: Tensor, than: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Asked.nearer`."""
        close = 2 - 2 * self.similarities[which] < than + _MARGIN
        rows, at = torch.nonzero(close.T, as_tuple=True)
        squares = self._images.squares(self._x[which[at]], rows)
        nearer = squares < than[rows]
        return which[at[nearer]], rows[nearer], squares[nearer]


def in_order(indices: Tensor, squares: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of (B, L) by distance, then by index; filled up with -1 at infinity."""
    order = torch.argsort(indices, dim=1, stable=True)
    order = order.gather(1, torch.argsort(squares.gather(1, order), dim=1, stable=True))[:, :k]
    return filled(indices.gather(1, order), squares.gather(1, order), k)


def filled(indices: Tensor, squares: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Lists (B, L) of at most k, filled up with -1 at infinity."""
    missing = k - indices.shape[1]
    if missing <= 0:
        return indices, squares
    return pad(indices, (0, missing), value=-1), pad(squares, (0, missing), value=torch.inf)
