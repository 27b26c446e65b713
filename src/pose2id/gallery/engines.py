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
        views: in how many sets neighbours are sought at a time.
    """

    columns = ("raw", "compared", "cameras", "present")

    def __init__(self, raw: Tensor, compared: Tensor, cameras: Tensor, present: Tensor) -> None:
        self.n, self.views = len(raw), 1
        self.raw, self.compared, self.cameras, self.present = raw, compared, cameras, present

    @property
    def block(self) -> int:
        """How many rows should ask at a time."""
        return max(1, BLOCK_BYTES // (16 * max(self.views * self.n, self.raw.shape[1])))

    def ask(self, x: Tensor) -> Products:
        """A block of unit rows (B, D) that looks for neighbours."""
        return Products(self, x)

    @property
    def alive(self) -> Tensor:
        """(n,) bool, which places hold an image."""
        return self.present[: self.n]

    def products(self, x: Tensor) -> Tensor:
        """(B, n) cosines of unit rows (B, D) with all."""
        return products(x, self.compared[: self.n])

    def squares(self, x: Tensor, rows: Tensor) -> Tensor:
        """(B,) squared distances of unit rows (B, D) to images, from differences: the same from both sides."""
        return sum_last(self.compared.index_select(0, rows).sub_(x).square_())


class Asked(Protocol):
    """A block of B unit rows that asks for nearest images."""

    def nearest(self, k: int, members: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(V, B, k) int64 places of the nearest of V sets of members (V, n), and float32 squared distances.

        Without `own` (B,). Equal distances by the lower place; what is missing is -1, at infinity.
        """

    def nearer(self, which: Tensor, than: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of `which` rows of the block and images that are nearer than (n,) float32 squared distances.

        (P,) positions in the block, places ascending, and float32 squared distances.
        """


class Products:
    """Exact: products with all rows, then differences where they decide."""

    def __init__(self, images: Images, x: Tensor) -> None:
        self._images, self._x = images, x
        self.similarities = images.products(x)

    def nearest(self, k: int, members: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Asked.nearest`."""
        s = self.similarities
        if own is not None:
            s = s.clone()
            s[torch.arange(len(own), device=own.device), own] = -torch.inf
        s = s.masked_fill(~members[:, None], -torch.inf)
        found, candidates = s.topk(min(k + EXTRA, s.shape[2]), dim=2)
        x = self._x[None, :, None].expand(*candidates.shape, -1).flatten(0, 2)
        squares = self._images.squares(x, candidates.flatten()).view(found.shape)
        missing = found.isinf()
        indices, squares = candidates.masked_fill_(missing, -1), squares.masked_fill_(missing, torch.inf)
        indices, squares = in_order(indices.flatten(0, 1), squares.flatten(0, 1), k)
        return indices.view(len(members), -1, k), squares.view(len(members), -1, k)

    def nearer(self, which: Tensor, than: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Asked.nearer`."""
        close = 2 - 2 * self.similarities[which] < than + _MARGIN
        rows, at = torch.nonzero(close.T, as_tuple=True)
        squares = self._images.squares(self._x[which[at]], rows)
        nearer = squares < than[rows]
        return which[at[nearer]], rows[nearer], squares[nearer]


def products(x: Tensor, rows: Tensor) -> Tensor:
    """(B, n) products of float32 rows (B, D) and (n, D)."""
    if len(x) == 1 and x.device.type == "cpu":
        # numpy multiplies one row several times as fast as torch does.
        return torch.from_numpy(rows.numpy() @ x[0].numpy())[None]
    with full_precision(x.device):
        return x @ rows.T


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
