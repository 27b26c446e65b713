"""Who finds a gallery's nearest images: products with all rows, or faiss's inverted lists for large galleries."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pose2id.gallery.columns import Columns
from pose2id.io.checks import BLOCK_BYTES
from pose2id.io.rows import blocks, sum_last
from pose2id.neighbors.distance import full_precision
from pose2id.neighbors.engines import UnusableError, usable_faiss

logger = logging.getLogger(__name__)
_MARGIN = 1e-5  # what rounding may do to a squared distance of unit rows that comes from a product
_TEN, _SAMPLE, RECALL = 10, 200, 0.95  # nearest of a sample, of which so many must be found
_ALONE = 1000  # images of a camera that has inverted lists of its own
_LISTS, _TRAINED, _ROUNDS = 4, 64, 10  # lists a root of n, rows a list to train with, and how often
_PROBES = 8  # lists that are looked at, at least
_SEEN = 10  # images that are looked at for each that is wanted, at least
_ADDED = 1 << 16  # rows that are encoded at a time
_NEARER = 256  # candidates that may have a new image on their lists
EXTRA = 8  # candidates beyond those wanted: a product may order near ties wrongly


class Images(Columns):
    """The images of a gallery, by place: those that are gone leave a gap.

    Attributes:
        n: how many places are in use.
        raw: (N, D) float32 features as they came.
        compared: (N, D) float32 unit rows, in which neighbours are sought.
        cameras: (N,) int64, -1 for unknown.
        present: (N,) bool.
        count: how many images there are.
        views: in how many sets neighbours are sought at a time.
        index: finds candidates in a large gallery; None: all images are compared.
    """

    columns = ("raw", "compared", "cameras", "present")

    def __init__(self, raw: Tensor, compared: Tensor, cameras: Tensor, present: Tensor) -> None:
        self.n, self.views, self.count = len(raw), 1, int(present.sum())
        self.raw, self.compared, self.cameras, self.present = raw, compared, cameras, present
        self.index: Inverted | None = None

    def come(self, places: Tensor) -> None:
        """Images whose rows are known are there."""
        self.present[places] = True
        self.count += len(places)
        if self.index is not None:
            self.index.add(self.compared.index_select(0, places), places, self.cameras[places])

    def go(self, places: Tensor) -> None:
        """Images leave a gap."""
        self.present[places] = False
        self.count -= len(places)
        if self.index is not None:
            self.index.remove(places, self.cameras[places])

    @property
    def block(self) -> int:
        """How many rows should ask at a time."""
        return max(1, BLOCK_BYTES // (16 * max(self.views * self.n, self.raw.shape[1])))

    def ask(self, x: Tensor) -> Asked:
        """A block of unit rows (B, D) that looks for neighbours."""
        return Products(self, x) if self.index is None else Probed(self, x, self.index)

    @property
    def alive(self) -> Tensor:
        """(n,) bool, which places hold an image."""
        return self.present[: self.n]

    def products(self, x: Tensor) -> Tensor:
        """(B, n) cosines of unit rows (B, D) with all."""
        return products(x, self.compared[: self.n])

    def in_parts(self, mask: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
        """A mask (n,), to be had, and how many images of it are in each of the inverted lists."""
        assert self.index is not None
        return lambda: mask, self.index.sizes(self.cameras[: self.n][mask & self.alive])

    def squares(self, x: Tensor, rows: Tensor) -> Tensor:
        """(B,) squared distances of unit rows (B, D) to images, from differences: the same from both sides."""
        return sum_last(self.compared.index_select(0, rows).sub_(x).square_())


class Members(NamedTuple):
    """V sets of images, in which neighbours are sought.

    Attributes:
        view: (N,) int64, in which set an image is; None: all are in the one set.
        numbers: (V,) int64, the sets.
        parts: how many of each set are in each of the inverted lists, by number; None: to be counted.
    """

    view: Tensor | None
    numbers: Tensor
    parts: Tensor | None = None

    def masks(self, images: Images) -> Tensor:
        """(V, n) which images there are in each."""
        return images.alive[None] if self.view is None else self.of_view(images.n) & images.alive

    def of_view(self, n: int) -> Tensor:
        """(V, n) the same of gaps, too."""
        assert self.view is not None
        return self.view[:n] == self.numbers[:, None]

    def in_parts(self, images: Images, number: int) -> tuple[Callable[[], Tensor], Tensor]:
        """A mask of one set, to be made, and how many of it are in each of the inverted lists."""
        assert self.view is not None
        view = self.view[: images.n]
        return images.in_parts(view == number) if self.parts is None else (lambda: view == number, self.parts[number])


class Asked(Protocol):
    """A block of B unit rows that asks for nearest images."""

    def nearest(self, k: int, members: Members, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(V, B, k) int64 places of the nearest of V sets of images, and float32 squared distances.

        Without `own` (B,). Equal distances by the lower place; what is missing is -1, at infinity.
        """

    def nearer(self, which: Tensor, than: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of `which` rows of the block and images that are nearer than float32 squared distances of these.

        (P,) positions in the block, places ascending, and float32 squared distances.
        """


class Products:
    """Exact: products with all rows, then differences where they decide."""

    def __init__(self, images: Images, x: Tensor) -> None:
        self._images, self._x = images, x
        self.similarities = images.products(x)

    def nearest(self, k: int, members: Members, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Asked.nearest`."""
        s = self.similarities
        if own is not None:
            s = s.clone()
            s[torch.arange(len(own), device=own.device), own] = -torch.inf
        s = s.masked_fill(~members.masks(self._images)[:, None], -torch.inf)
        found, candidates = s.topk(min(k + EXTRA, s.shape[2]), dim=2)
        return _scored(self._images, self._x, candidates.masked_fill_(found.isinf(), -1), k)

    def nearer(self, which: Tensor, than: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As `Asked.nearer`."""
        bounds = than(torch.arange(self._images.n, device=which.device))
        close = 2 - 2 * self.similarities[which] < bounds + _MARGIN
        rows, at = torch.nonzero(close.T, as_tuple=True)
        squares = self._images.squares(self._x[which[at]], rows)
        nearer = squares <= bounds[rows]
        return which[at[nearer]], rows[nearer], squares[nearer]


class Probed:
    """Approximate: candidates of inverted lists, then differences."""

    def __init__(self, images: Images, x: Tensor, index: Inverted) -> None:
        self._images, self._x, self._index = images, x, index

    def nearest(self, k: int, members: Members, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Asked.nearest`."""
        wanted = k + EXTRA + (own is not None)
        if members.view is None:
            candidates = self._index.search(self._x, wanted)[None]
        else:
            sets = (members.in_parts(self._images, number) for number in members.numbers.tolist())
            candidates = torch.stack([self._index.search(self._x, wanted, *of_set) for of_set in sets])
        if own is not None:
            candidates.masked_fill_(candidates == own[:, None], -1)
        return _scored(self._images, self._x, candidates, k)

    def nearer(self, which: Tensor, than: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As `Asked.nearer`; of an image's candidates alone: who has it on a list is mostly near to it."""
        candidates = self._index.search(self._x[which], _NEARER)
        at, column = torch.nonzero(candidates >= 0, as_tuple=True)
        rows = candidates[at, column]
        squares = self._images.squares(self._x[which[at]], rows)
        nearer = torch.nonzero(squares <= than(rows)).flatten()
        nearer = nearer[torch.argsort(rows[nearer], stable=True)]
        return which[at[nearer]], rows[nearer], squares[nearer]


class Inverted:
    """faiss's inverted lists over 8-bit codes of unit rows, for candidates by cosine.

    Every large camera has lists of its own, where neighbours in one camera are sought without a look at the others.

    Attributes:
        recall: share of a sample's ten nearest that are found, where it is least.
    """

    def __init__(self, rows: Tensor, cameras: Tensor | None) -> None:
        usable_faiss(gpu=False)
        names, counts = torch.unique(rows.new_empty(0) if cameras is None else cameras, return_counts=True)
        self._names = names[(counts >= _ALONE) & (names >= 0)].long()
        part = self.part(torch.full((len(rows),), -1, device="cpu") if cameras is None else cameras)
        self._parts = [_Part(rows, torch.nonzero(part == at).flatten()) for at in range(len(self._names) + 1)]
        self.recall = min(part.recall for part in self._parts)

    def part(self, cameras: Tensor) -> Tensor:
        """(B,) which lists hold images of these cameras: their own, or those that all others share."""
        own = (cameras[:, None] == self._names).long()
        return torch.where(own.any(1), own.argmax(1), len(self._names)) if len(self._names) else own.sum(1)

    def sizes(self, cameras: Tensor) -> Tensor:
        """(P,) how many of some images are in each of the lists."""
        return torch.bincount(self.part(cameras), minlength=len(self._parts))

    def add(self, rows: Tensor, places: Tensor, cameras: Tensor) -> None:
        """Take in rows."""
        part = self.part(cameras)
        for at in part.unique().tolist():
            self._parts[at].add(rows[part == at], places[part == at])

    def remove(self, places: Tensor, cameras: Tensor) -> None:
        """Take out the images at some places."""
        part = self.part(cameras)
        for at in part.unique().tolist():
            self._parts[at].remove(places[part == at])

    def search(self, x: Tensor, k: int, mask: Callable[[], Tensor] | None = None, sizes: Any = None) -> Tensor:
        """(B, k) places of candidates, -1 for none, among all.

        Or among those in a mask (n,), which is made where it is needed, with how many of them are in each of the lists.
        """
        wanted = [part.size for part in self._parts] if sizes is None else sizes.tolist()
        found = [
            part.search(x, k, k * count / max(sum(wanted), 1), None if count == part.size else mask, count)
            for part, count in zip(self._parts, wanted, strict=True)
            if count
        ]
        if not found:
            return torch.full((len(x), k), -1, dtype=torch.int64, device="cpu")
        similarities, places = (torch.cat(values, 1) for values in zip(*found, strict=True))
        return places if len(found) == 1 else places.gather(1, similarities.topk(k, dim=1).indices)


class _Part:
    """Inverted lists of the images at some places of all rows."""

    def __init__(self, rows: Tensor, places: Tensor) -> None:
        self._faiss = faiss = usable_faiss(gpu=False)
        dim = rows.shape[1]
        lists = int(_LISTS * math.sqrt(max(len(places), _LISTS**2)))
        quantizer, kind = faiss.IndexFlatIP(dim), faiss.ScalarQuantizer.QT_8bit
        self._index = faiss.IndexIVFScalarQuantizer(quantizer, dim, lists, kind, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.niter = _ROUNDS
        self._index.cp.min_points_per_centroid = 1
        self._index.cp.max_points_per_centroid = _TRAINED
        own = places[shuffled(len(places))[: _TRAINED * lists]]
        self._index.train(rows[own if len(own) >= lists else shuffled(len(rows))[: _TRAINED * lists]].numpy())
        chosen = shuffled(len(rows))[:_SAMPLE]
        sample = rows[chosen]
        exact = torch.empty((len(sample), 0), dtype=torch.int64, device="cpu")
        nearest = sample.new_empty((len(sample), 0))
        for some in blocks(len(places), _ADDED):
            at = places[some]
            self.add(rows[at], at)
            cosines = products(sample, rows[at]).masked_fill_(chosen[:, None] == at, -torch.inf)
            cosines, exact = torch.cat([nearest, cosines], 1), torch.cat([exact, at.expand(len(sample), -1)], 1)
            nearest, best = cosines.topk(min(_TEN, cosines.shape[1]), dim=1)
            exact = exact.gather(1, best)
        # Lists that grew have room for up to as many rows again; those of a copy have none.
        self._index = faiss.clone_index(self._index)
        self.recall, self._index.nprobe = float(not exact.numel()), _PROBES
        while self.recall < RECALL and self._index.nprobe < lists:
            self._index.nprobe *= 2
            found = self.search(sample, _TEN + EXTRA, _TEN, None, self.size)[1]
            self.recall = float((exact[..., None] == found[:, None]).any(2).double().mean())

    @property
    def size(self) -> int:
        """How many images there are."""
        return int(self._index.ntotal)

    def add(self, rows: Tensor, places: Tensor) -> None:
        """Take in rows."""
        self._index.add_with_ids(rows.numpy(), places.numpy())

    def remove(self, places: Tensor) -> None:
        """Take out the images at some places."""
        array = places.numpy()
        self._index.remove_ids(self._faiss.IDSelectorBatch(len(array), self._faiss.swig_ptr(array)))

    def search(
        self, x: Tensor, k: int, expected: float, mask: Callable[[], Tensor] | None, count: int
    ) -> tuple[Tensor, Tensor]:
        """(B, k) similarities, about, and places of candidates: of `count` in a mask, `expected` are wanted."""
        # Enough lists for those expected, and for those in the mask as many as for all.
        probes = max(self._index.nprobe, _SEEN * expected * self._index.nlist / self.size)
        probes = math.ceil(probes * self.size / count)
        options = {"nprobe": min(probes, self._index.nlist)}
        if mask is not None:
            bits = np.packbits(mask().numpy(), bitorder="little")
            options["sel"] = self._faiss.IDSelectorBitmap(len(bits), self._faiss.swig_ptr(bits))
        # All at once: faiss 1.8 keeps what is handed over here, and not what is set later.
        parameters = self._faiss.SearchParametersIVF(**options)
        similarities, places = self._index.search(x.numpy(), k, params=parameters)
        return torch.from_numpy(similarities), torch.from_numpy(places)


def inverted(rows: Tensor, cameras: Tensor | None) -> Inverted | None:
    """Inverted lists over rows; None, with a warning, where faiss cannot be used, or they find too little.

    Args:
        rows: (N, D) float32 unit rows.
        cameras: (N,) int64, where neighbours are sought in cameras; else None.
    """
    try:
        # On macOS and Windows faiss and torch bring an OpenMP runtime each, and the process may abort.
        found = Inverted(rows, cameras) if sys.platform == "linux" else None
    except UnusableError as error:
        logger.warning("all images are compared: faiss cannot be used (%s)", error)
        return None
    if found is not None and found.recall < RECALL:  # a neighbour that is missed makes a stranger one
        logger.warning("all images are compared: inverted lists find %.0f %% of neighbours", 100 * found.recall)
        return None
    return found


def _scored(images: Images, x: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of candidates (V, B, C), -1 for none, by differences."""
    found = images.compared.index_select(0, candidates.clamp(min=0).flatten()).view(*candidates.shape, -1)
    squares = sum_last(found.sub_(x[:, None]).square_()).masked_fill_(candidates < 0, torch.inf)
    indices, squares = in_order(candidates.flatten(0, 1), squares.flatten(0, 1), k)
    return indices.view(*candidates.shape[:2], k), squares.view(*candidates.shape[:2], k)


def shuffled(n: int) -> Tensor:
    """0 to n - 1 in an order that is the same each time."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")


def products(x: Tensor, rows: Tensor) -> Tensor:
    """(B, n) products of float32 rows (B, D) and (n, D)."""
    if len(x) == 1 and x.device.type == "cpu":
        # One row at a time this is several times as fast as products of torch's, and of rows that are not in the cache
        # faster than numpy's.
        return torch.from_numpy(np.einsum("nd,d->n", rows.numpy(), x[0].numpy()))[None]
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
