"""How images of a gallery are linked to their neighbours, by each method: as in a gallery given at once.

What a method took from all images (`Strangers`, lists of cameras) stays until the next refit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pose2id.centralization.guard import Guard, Seen, Strangers, Table, gallery_sum, query_sum
from pose2id.centralization.links import NEAREST, OVERALL, Ends, Searched, contrast_links, cross_camera_weight
from pose2id.gallery.columns import Columns
from pose2id.gallery.engines import Asked, Images
from pose2id.gallery.lists import Lists
from pose2id.io.rows import blocks

Found = tuple[Tensor, Tensor, Tensor]  # row of a block, place of an image, weight
_BLOCK = 1 << 16  # images that are linked at a time


class Linked(Columns):
    """Images with sums over weighted links to their neighbours.

    Attributes:
        lists: the neighbours; links are to those of the first `width` in each view.
        weights: (n, V, W) float32 of the links.
        lengths: (n,) float32 norm of each sum, by which it is divided.
    """

    columns: tuple[str, ...] = ("weights", "lengths")
    sums_of_sums = False  # whether queries add what images have become, or what they were

    def __init__(self, images: Images, lists: Lists, width: int) -> None:
        self.images, self.lists = images, lists
        shape = (len(images.raw), len(lists.lengths), width)
        self.weights = torch.zeros(shape, dtype=torch.float32, device=images.raw.device)
        self.lengths = self.weights.new_ones(shape[0])
        self._sparse: Found | None = None

    def grow(self, capacity: int) -> None:
        """As `Columns.grow`."""
        for lists in self.every_list():
            lists.grow(capacity)
        super().grow(capacity)

    def every_list(self) -> list[Lists]:
        """All lists that are kept."""
        return [self.lists]

    def enter(self, new: Tensor, asked: Asked) -> None:
        """What must be known of new images before they are looked for: nothing, unless a method says."""

    def weigh(self, rows: Tensor) -> Tensor:
        """(B, V, W) weights of the links of some images."""
        raise NotImplementedError

    def links_of_queries(self, asked: Asked, cameras: Tensor) -> Found:
        """Links of a block of queries."""
        raise NotImplementedError

    def can_stay(self) -> bool:
        """Whether lists are still long enough for what was taken from all images."""
        return True

    def insert(self, new: Tensor, asked: Asked) -> None:
        """Link new images, and those that they touch."""
        self.enter(new, asked)
        self._link(torch.cat([new, *(lists.insert(new, asked) for lists in self.every_list())]))

    def remove(self, gone: Tensor) -> None:
        """Unlink images that have gone, which are no longer present."""
        changed = []
        for lists in self.every_list():
            for at, rows in enumerate(lists.without(gone)):
                for some in blocks(len(rows), self.images.block):
                    lists.search(rows[some], self.images.ask(self.images.compared[rows[some]]), at)
                changed.append(rows)
        self._link(torch.cat(changed))

    def link_all(self) -> None:
        """Link all images, after lists were filled."""
        for some in blocks(self.images.n, _BLOCK):
            self._weigh(torch.arange(some.start, some.stop, device=self.weights.device))

    def _link(self, changed: Tensor) -> None:
        """Weigh the links of images whose lists have changed, and of those that may be linked to them.

        A link asks both sides: whoever is linked to an image is on one of its lists.
        """
        reached = [changed, *(lists.near(changed) for lists in self.every_list()), self.onlookers(changed)]
        rows = torch.cat(reached).unique()
        self._weigh(rows[self.images.present[rows]])

    def onlookers(self, changed: Tensor) -> Tensor:
        """Further images that may be linked to some whose lists have changed."""
        return changed[:0]

    def _weigh(self, rows: Tensor) -> None:
        weights = self.weigh(rows).float()
        self.weights[rows] = weights
        self.lengths[rows] = torch.linalg.vector_norm(self._sums(rows), dim=1)
        self._sparse = None

    def features(self, rows: Tensor) -> Tensor:
        """(B, D) float32 unit features of images, centralized."""
        return self._sums(rows).div_(self.lengths[rows, None])

    def _sums(self, rows: Tensor) -> Tensor:
        total = self.images.compared[rows]
        weights = self.weights[rows].flatten(1)
        row, at = torch.nonzero(weights, as_tuple=True)
        places = self.lists.indices[rows, :, : self.weights.shape[2]].flatten(1)[row, at].long()
        return total.index_add_(0, row, self.images.compared[places].mul_(weights[row, at, None]))

    def scores(self, products: Tensor) -> Tensor:
        """(B, n) cosines of unit rows and all centralized features, from products with compared ones."""
        row, column, weight = self.sparse()
        sums = products.index_add(1, row, products[:, column].mul_(weight))
        return sums.div_(self.lengths[: self.images.n])

    def sparse(self) -> Found:
        """All links that weigh anything."""
        if self._sparse is None:
            n = self.images.n
            weights = self.weights[:n].flatten(1)
            row, at = torch.nonzero(weights.masked_fill(~self.images.alive[:, None], 0), as_tuple=True)
            places = self.lists.indices[:n, :, : self.weights.shape[2]].flatten(1)[row, at].long()
            self._sparse = row, places, weights[row, at]
        return self._sparse


class Plain(Linked):
    """No links: features as they are compared."""

    columns = ()

    def __init__(self, images: Images) -> None:
        self.images = images

    def every_list(self) -> list[Lists]:
        """As `Linked.every_list`."""
        return []

    def _link(self, changed: Tensor) -> None:
        """There is nothing to link."""

    def insert(self, new: Tensor, asked: Asked) -> None:
        """As `Linked.insert`."""

    def remove(self, gone: Tensor) -> None:
        """As `Linked.remove`."""

    def links_of_queries(self, asked: Asked, cameras: Tensor) -> Found:
        """As `Linked.links_of_queries`."""
        return none_of(cameras)

    def features(self, rows: Tensor) -> Tensor:
        """As `Linked.features`."""
        return self.images.compared[rows]

    def scores(self, products: Tensor) -> Tensor:
        """As `Linked.scores`."""
        return products


def none_of(cameras: Tensor) -> Found:
    """No links of a block of queries."""
    nowhere = cameras[:0]
    return nowhere, nowhere, nowhere.double()


class Mutual(Linked):
    """NFC, Algorithm 1: mutual neighbours among the k1 and k2 nearest. A query alone has nobody beside it."""

    def __init__(self, images: Images, k1: int, k2: int) -> None:
        view = torch.zeros(len(images.raw), dtype=torch.int64, device=images.raw.device)
        super().__init__(images, Lists(images, [max(k1, k2)], view), k1)
        self.k1, self.k2 = k1, k2

    @staticmethod
    def of(images: Images, near: Tensor, k1: int, k2: int) -> Mutual:
        """From each image's nearest others (n, k)."""
        made = Mutual(images, k1, k2)
        for some in blocks(images.n * (near.shape[1] > 0), _BLOCK):
            rows, width = torch.arange(some.start, some.stop, device=near.device), near.shape[1]
            x = images.compared[rows].repeat_interleave(width, 0)
            made.lists.indices[rows, 0, :width] = near[rows].int()
            made.lists.squares[rows, 0, :width] = images.squares(x, near[rows].flatten()).view(-1, width)
        made.link_all()
        return made

    def weigh(self, rows: Tensor) -> Tensor:
        """As `Linked.weigh`."""
        near = self.lists.indices[rows, 0, : self.k1].long()
        back = self.lists.indices[near.clamp(min=0), 0, : self.k2]
        return ((back == rows[:, None, None]).any(2) & (near >= 0))[:, None]

    def enter(self, new: Tensor, asked: Asked) -> None:
        """As `Linked.enter`."""
        self.lists.view[new] = 0

    def links_of_queries(self, asked: Asked, cameras: Tensor) -> Found:
        """As `Linked.links_of_queries`."""
        return none_of(cameras)


class Guarded(Linked):
    """Neighbours nearer than strangers can be (`pose2id.centralization.guard`), in each camera or among all images.

    Attributes:
        strangers: what was taken from all images.
        by_camera: whether lists are of cameras.
        scales: (n, V) float64 of strangers, measured when an image came, or at the last refit.
        people: (n,) float64 expected number of images of the same person.
    """

    columns = (*Linked.columns, "scales", "people")
    sums_of_sums = True

    def __init__(self, images: Images, strangers: Strangers, *, by_camera: bool) -> None:
        self.strangers, self.by_camera = strangers, by_camera
        ks, n, device = strangers.ks.tolist(), len(images.raw), images.raw.device
        super().__init__(images, Lists(images, [k + 1 for k in ks], torch.zeros(n).to(device, torch.int64)), max(ks))
        self.scales = torch.ones((n, len(ks)), dtype=torch.float64, device=device)
        self.people = torch.ones(n, dtype=torch.float64, device=device)
        self.lists.view[: images.n] = self._places(images.cameras[: images.n])

    @staticmethod
    def of(images: Images, guard: Guard, *, by_camera: bool) -> Guarded:
        """As a guard of all images has them."""
        made, table = Guarded(images, guard.strangers, by_camera=by_camera), guard.table
        for at in range(len(made.lists.lengths)):
            made.lists.fill(at, table.indices[at], table.squares[at])
        made.scales[: images.n] = table.scales[guard.trial].T
        made.link_all()
        return made

    def can_stay(self) -> bool:
        """As `Linked.can_stay`."""
        return bool((self.lists.sizes() >= self.strangers.deepest + 2).all())

    def enter(self, new: Tensor, asked: Asked) -> None:
        """Measure scales."""
        self.lists.view[new] = self._places(self.images.cameras[new])
        for at in range(len(self.lists.lengths)):
            self.scales[new, at] = self._seen(asked, at, new)[1]

    def weigh(self, rows: Tensor) -> Tensor:
        """As `Linked.weigh`."""
        weights = torch.zeros((len(rows), *self.weights.shape[1:]), dtype=torch.float64, device=rows.device)
        people = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        table, places = self._table(), self.lists.view[rows]
        for at in range(len(self.lists.lengths)):
            own = self.lists.indices[rows, at], self.lists.squares[rows, at], self.scales[rows, at]
            row, _, rank, u = table.two_sided(0, at, *own, places)
            weight = self.strangers.weights(u)
            people.index_add_(0, row, weight)
            weights[row, at, rank - 1] = gallery_sum(weight, rank)
        self.people[rows] = people
        return weights

    def onlookers(self, changed: Tensor) -> Tensor:
        """Images in no view, which are on nobody's list."""
        n = self.images.n
        hidden = torch.nonzero((self.lists.view[:n] < 0) & self.images.alive).flatten()
        if not len(hidden):
            return hidden
        marked = torch.zeros(n + 1, dtype=torch.bool, device=changed.device)
        marked[changed] = True
        return hidden[marked[self.lists.indices[hidden].long()].flatten(1).any(1)]

    def links_of_queries(self, asked: Asked, cameras: Tensor) -> Found:
        """As `Linked.links_of_queries`."""
        table, places, found = self._table(), self._places(cameras), []
        for at in range(len(self.lists.lengths)):
            seen, scale = self._seen(asked, at)
            row, near, rank, u = table.two_sided(0, at, seen.indices, seen.squares, scale, places)
            weight = query_sum(self.strangers.weights(u), rank, self.people[near])
            found.append((row[weight > 0], near[weight > 0], weight[weight > 0]))
        row, near, weight = (torch.cat(values) for values in zip(*found, strict=True))
        return row, near, weight

    def _places(self, cameras: Tensor) -> Tensor:
        return self._table().places(cameras) if self.by_camera else torch.zeros_like(cameras)

    def _seen(self, asked: Asked, at: int, own: Tensor | None = None) -> tuple[Seen, Tensor]:
        """What a block sees in a view, and its scale of strangers there."""
        deepest, k = int(self.strangers.deepest[at]), int(self.strangers.ks[at])
        indices, squares = asked.nearest(deepest + 1, self.lists.members(at), own)
        seen = Seen(indices, 1 - squares.double() / 2, [k])
        return seen, seen.scales(self.strangers.medians[at : at + 1])[0]

    def _table(self) -> Table:
        lists, known = self.lists, self.strangers
        return Table(
            known.cameras,
            known.ks[None],
            lists.indices.transpose(0, 1),
            lists.squares.transpose(0, 1),
            self.scales.T[None],
            known.medians[None],
        )


class Contrasting(Linked):
    """Contrast links in every camera (`pose2id.centralization.links`), those across cameras counting more.

    Attributes:
        names, numbers: (C,) int64 cameras, ascending, and the list that each has; `shared` is that of small ones.
        num_cameras: how many are known.
        by_list: neighbours in each list; `lists` has those over all.
    """

    def __init__(self, images: Images, names: Tensor, numbers: Tensor, shared: int, num_cameras: int) -> None:
        n, device = len(images.raw), images.raw.device
        super().__init__(images, Lists(images, [OVERALL + 1], torch.zeros(n).to(device, torch.int64)), OVERALL + 1)
        self.names, self.numbers, self.shared, self.num_cameras = names, numbers, shared, num_cameras
        view = torch.full((n,), shared, dtype=torch.int64, device=device)
        self.by_list = Lists(images, [NEAREST + 1] * (shared + 1), view)
        self.by_list.view[: images.n] = self._listed_images(images.cameras[: images.n])
        self._sizes = self._small_sizes()

    @staticmethod
    def of(images: Images, searched: Searched, num_cameras: int) -> Contrasting:
        """As a search of all images found them."""
        made = Contrasting(images, searched.names, searched.numbers, int(searched.shared), num_cameras)
        if searched.length > 1:
            made.lists.fill(0, searched.indices, 2 - 2 * searched.similarities)
            for at, members in enumerate(searched.members):
                known = searched.tables[at] if searched.tables else searched.compared.nearest(NEAREST + 1, members)
                made.by_list.fill(at, known[0], 2 - 2 * known[1])
        made.link_all()
        return made

    def every_list(self) -> list[Lists]:
        """As `Linked.every_list`."""
        return [self.lists, self.by_list]

    def can_stay(self) -> bool:
        """As `Linked.can_stay`."""
        return bool((self._small_sizes() == self._sizes).all())

    def _small_sizes(self) -> Tensor:
        """What links ask of sizes: whether lists have 3 and 4 images."""
        return self.by_list.sizes().clamp(max=4)

    def enter(self, new: Tensor, asked: Asked) -> None:
        """As `Linked.enter`."""
        self.lists.view[new] = 0
        self.by_list.view[new] = self._listed_images(self.images.cameras[new])

    def weigh(self, rows: Tensor) -> Tensor:
        """As `Linked.weigh`."""

        def ends(row: Tensor, ahead: Tensor, column: Tensor, behind: Tensor) -> tuple[Ends, Ends]:
            return self._ends(rows[row], ahead), self._ends(column, behind)

        indices, squares = self.lists.indices[rows, 0].long(), self.lists.squares[rows, 0]
        weights = torch.zeros((len(rows), 1, OVERALL + 1), dtype=torch.float64, device=rows.device)
        row, at, weight = self._contrast(indices, squares, self.by_list.view[rows], ends, same=True)
        cameras = self.images.cameras
        factor = cross_camera_weight(cameras[rows[row]], cameras[indices[row, at]], self.num_cameras)
        weights[row, 0, at] = weight * factor
        return weights

    def links_of_queries(self, asked: Asked, cameras: Tensor) -> Found:
        """As `Linked.links_of_queries`."""

        def ends(row: Tensor, ahead: Tensor, column: Tensor, behind: Tensor) -> tuple[Ends, Ends]:
            first, last = (torch.empty(len(row), dtype=torch.float64, device=row.device) for _ in range(2))
            for at in ahead.unique().tolist():
                pairs = ahead == at
                found = asked.nearest(NEAREST + 1, self.by_list.members(at))[1]
                first[pairs], last[pairs] = (values[row[pairs]] for values in _first_and_last(found))
            return (first, last), self._ends(column, behind)

        indices, squares = asked.nearest(OVERALL + 1, self.images.alive)
        row, at, weight = self._contrast(indices, squares, self._listed(cameras), ends, same=False)
        column = indices[row, at]
        factor = cross_camera_weight(cameras[row], self.images.cameras[column], self.num_cameras)
        return row, column, weight * factor

    def _contrast(self, indices: Tensor, squares: Tensor, lists: Tensor, ends: Any, *, same: bool) -> Found:
        shape, similarities = indices.shape, 1 - squares.double() / 2
        first, last = _first_and_last(self.lists.squares[indices.flatten(), 0])
        theirs, sizes = (first.view(shape), last.view(shape)), self.by_list.sizes()
        return contrast_links(indices, similarities, lists, self.by_list.view, sizes, theirs, ends, same=same)

    def _ends(self, rows: Tensor, lists: Tensor) -> Ends:
        return _first_and_last(self.by_list.squares[rows, lists])

    def _listed_images(self, cameras: Tensor) -> Tensor:
        """Lists of images; those of cameras that were not known share the last."""
        found = self._listed(cameras)
        return torch.where(found < 0, self.shared, found)

    def _listed(self, cameras: Tensor) -> Tensor:
        """As `Searched.listed`."""
        at = torch.searchsorted(self.names, cameras).clamp(max=len(self.names) - 1)
        absent = torch.where(cameras == -1, self.shared, -1)
        return torch.where(self.names[at] == cameras, self.numbers[at], absent)


def _first_and_last(squares: Tensor) -> Ends:
    """Similarities to the nearest and to the last that there is, of lists (n, L)."""
    last = squares.masked_fill(squares.isinf(), -torch.inf).amax(1)
    return 1 - squares[:, 0].double() / 2, 1 - last.double() / 2
