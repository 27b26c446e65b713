"""How images of a gallery are linked to their neighbours, by each method: as in a gallery given at once.

What a method took from all images (`Strangers`, lists of cameras) stays until the next refit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pose2id.centralization.guard import Guard, Seen, Strangers, Table, gallery_sum, query_sum
from pose2id.centralization.links import NEAREST, OVERALL, Ends, Searched, contrast_links, cross_camera_weight
from pose2id.gallery.columns import Columns
from pose2id.gallery.engines import Asked, Images
from pose2id.gallery.lists import Lists
from pose2id.io.rows import blocks

_SMALL = 4  # a list of so many images is long enough for all
Found = tuple[Tensor, Tensor, Tensor]  # row of a block, place of an image, weight
_BLOCK, _OF_SUMS = 1 << 14, 1 << 10  # images that are linked, and summed, at a time


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
        self._sparse: Any = None

    def grow(self, capacity: int) -> None:
        """As `Columns.grow`."""
        for lists in self.every_list():
            lists.grow(capacity)
        super().grow(capacity)

    def every_list(self) -> list[Lists]:
        """All lists that are kept."""
        return [self.lists]

    def enter(self, new: Tensor, asked: Asked) -> None:
        """Find views and lists of new images."""
        raise NotImplementedError

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
        """Link new images, which are there, and those that they touch."""
        self.enter(new, asked)
        changed, left = zip(*(lists.insert(new, asked) for lists in self.every_list()), strict=True)
        self._link(list(changed), torch.cat(left))

    def remove(self, gone: Tensor) -> None:
        """Unlink images that have gone, which are no longer present."""
        for lists in self.every_list():
            lists.counted(gone, -1)
        changed = [lists.without(gone) for lists in self.every_list()]
        for lists, of_lists in zip(self.every_list(), changed, strict=True):
            for at, rows in enumerate(of_lists):
                for some in blocks(len(rows), self.images.block):
                    asked = self.images.ask(self.images.compared.index_select(0, rows[some]))
                    lists.search(rows[some], asked, at)
        self._link(changed, gone[:0])

    def link_all(self) -> None:
        """Link all images, after lists were filled."""
        for rows in self.in_blocks():
            self._weigh(rows, rows)

    def in_blocks(self) -> Iterator[Tensor]:
        """All places, some at a time."""
        for some in blocks(self.images.n, _BLOCK):
            yield torch.arange(some.start, some.stop, device=self.weights.device)

    def _link(self, changed: list[list[Tensor]], left: Tensor) -> None:
        """Weigh the links of images whose lists have changed, and of those that may be linked to them.

        Args:
            changed: images by lists and view.
            left: those that left a list.
        """
        rows = torch.cat([images for of_lists in changed for images in of_lists]).unique()
        near = torch.cat([self.near(changed), self.hidden(), left]).unique()
        near = near[self._look_at(rows, near)]
        near = torch.cat([rows, near]).unique()
        self._weigh(*(some[self.images.present[some]] for some in (near, rows)))

    def near(self, changed: list[list[Tensor]]) -> Tensor:
        """Who may be linked to images whose lists have changed: a link asks both sides, so they are on a list."""
        return torch.cat([self.lists.near(rows, at) for at, rows in enumerate(changed[0])])

    def hidden(self) -> Tensor:
        """Images in no view, which are on nobody's list."""
        if int(self.lists.sizes.sum()) == self.images.count:
            return self.lists.view[:0]
        return torch.nonzero((self.lists.view[: self.images.n] < 0) & self.images.alive).flatten()

    def _look_at(self, changed: Tensor, rows: Tensor) -> Tensor:
        """Which rows have one of those that have changed on a list that links are made from."""
        marked = torch.zeros(self.images.n + 1, dtype=torch.bool, device=changed.device)  # the last for what is missing
        marked[changed] = True
        return marked[self.lists.indices.index_select(0, rows).flatten(1).long()].any(1)

    def _weigh(self, rows: Tensor, renewed: Tensor) -> None:
        weights = self.weigh(rows).float()
        # A changed row may have other neighbours at the same ranks.
        reweighed = (weights != self.weights.index_select(0, rows)).flatten(1).any(1)
        self.weights[rows] = weights
        rows = torch.cat([rows[reweighed], renewed]).unique()
        for some in blocks(len(rows), _OF_SUMS):
            self.lengths[rows[some]] = torch.linalg.vector_norm(self._sums(rows[some]), dim=1)
        self._sparse = None

    def linked(self, rows: Tensor) -> Tensor:
        """Images that some are linked to."""
        weights = self.weights.index_select(0, rows)
        found = self.lists.indices.index_select(0, rows)[:, :, : weights.shape[2]]
        return found[weights != 0].unique().long()

    def features(self, rows: Tensor) -> Tensor:
        """(B, D) float32 unit features of images, centralized."""
        return self._sums(rows).div_(self.lengths[rows, None])

    def _sums(self, rows: Tensor) -> Tensor:
        total = self.images.compared.index_select(0, rows)
        weights = self.weights.index_select(0, rows).flatten(1)
        row, at = torch.nonzero(weights, as_tuple=True)
        places = self.lists.indices.index_select(0, rows)[:, :, : self.weights.shape[2]].flatten(1)[row, at]
        return total.index_add_(0, row, self.images.compared.index_select(0, places).mul_(weights[row, at, None]))

    def scores(self, products: Tensor) -> Tensor:
        """(B, n) cosines of unit rows and all centralized features, from products with compared ones."""
        of_images, links = products.T.contiguous(), self._links()  # each image's products side by side
        if isinstance(links, tuple):
            row, column, weight = links
            sums = of_images.index_add(0, row, of_images.index_select(0, column).mul_(weight[:, None]))
        else:
            sums = of_images + torch.from_numpy(links @ of_images.numpy())
        return sums.div_(self.lengths[: self.images.n, None]).T.contiguous()

    def _links(self) -> Any:
        """All links that weigh anything: rows, columns and weights; on the CPU as a sparse matrix, for its speed."""
        if self._sparse is None:
            from scipy import sparse  # noqa: PLC0415 - slow to import

            n = self.images.n
            weights = self.weights[:n].flatten(1)
            row, at = torch.nonzero(weights.masked_fill(~self.images.alive[:, None], 0), as_tuple=True)
            column, weight = self.lists.indices[:n, :, : self.weights.shape[2]].flatten(1)[row, at], weights[row, at]
            if weight.device.type == "cpu":
                start = torch.searchsorted(row, torch.arange(n + 1, device="cpu")).int()  # rows are ascending
                self._sparse = sparse.csr_array((weight.numpy(), column.numpy(), start.numpy()), shape=(n, n))
            else:
                self._sparse = row, column.long(), weight
        return self._sparse


class Plain(Linked):
    """No links: features as they are compared."""

    columns = ()

    def __init__(self, images: Images) -> None:
        self.images = images

    def every_list(self) -> list[Lists]:
        """As `Linked.every_list`."""
        return []

    def insert(self, new: Tensor, asked: Asked) -> None:
        """As `Linked.insert`."""

    def remove(self, gone: Tensor) -> None:
        """As `Linked.remove`."""

    def links_of_queries(self, asked: Asked, cameras: Tensor) -> Found:
        """As `Linked.links_of_queries`."""
        return none_of(cameras)

    def linked(self, rows: Tensor) -> Tensor:
        """As `Linked.linked`."""
        return rows[:0]

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
        super().__init__(images, Lists(images, [max(k1, k2)]), k1)
        self.lists.count()
        self.k1, self.k2 = k1, k2

    @staticmethod
    def of(images: Images, indices: Tensor, k1: int, k2: int) -> Mutual:
        """From each image's nearest others."""
        made = Mutual(images, k1, k2)
        made.lists.fill(0, indices)
        made.link_all()
        return made

    def weigh(self, rows: Tensor) -> Tensor:
        """As `Linked.weigh`."""
        near = self.lists.indices[rows, 0, : self.k1].long()
        back = self.lists.indices[near.clamp(min=0), 0, : self.k2]
        return ((back == rows[:, None, None]).any(2) & (near >= 0))[:, None]

    def enter(self, new: Tensor, asked: Asked) -> None:
        """As `Linked.enter`."""
        self.lists.place(new, 0)
        self.lists.search_all(new, asked)

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
        view = torch.zeros(n, dtype=torch.int64, device=device) if by_camera else None
        super().__init__(images, Lists(images, [k + 1 for k in ks], view), max(ks))
        self.scales = torch.ones((n, len(ks)), dtype=torch.float64, device=device)
        self.people = torch.ones(n, dtype=torch.float64, device=device)
        self.lists.view[: images.n] = self._places(images.cameras[: images.n])
        self.lists.count()

    @staticmethod
    def of(images: Images, guard: Guard, *, by_camera: bool) -> Guarded:
        """As a guard of all images has them."""
        made, table = Guarded(images, guard.strangers, by_camera=by_camera), guard.table
        for at in range(len(made.lists.lengths)):
            made.lists.fill(at, table.indices[at].masked_fill(table.squares[at].isinf(), -1))
        made.scales[: images.n] = table.scales[guard.trial].T
        # Of these very distances: how many links are as strong as one is a step at each link's strength.
        strengths = [u for rows in made.in_blocks() for *_, u in made.found(rows)]
        made.strangers = replace(guard.strangers, links=torch.cat(strengths).sort().values)
        made.link_all()
        return made

    def can_stay(self) -> bool:
        """As `Linked.can_stay`."""
        return bool((self.lists.sizes >= self.strangers.deepest + 2).all())

    def enter(self, new: Tensor, asked: Asked) -> None:
        """As `Linked.enter`; scales are measured, too."""
        self.lists.place(new, self._places(self.images.cameras[new]))
        found = self.lists.search_all(new, asked, int(self.strangers.deepest.max()) + 1)
        for at, (_, scale) in enumerate(self._seen(*found)):
            self.scales[new, at] = scale

    def weigh(self, rows: Tensor) -> Tensor:
        """As `Linked.weigh`."""
        weights = torch.zeros((len(rows), *self.weights.shape[1:]), dtype=torch.float64, device=rows.device)
        people = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        for at, (row, _, rank, u) in enumerate(self.found(rows)):
            weight = self.strangers.weights(u)
            people.index_add_(0, row, weight)
            weights[row, at, rank - 1] = gallery_sum(weight, rank)
        self.people[rows] = people
        return weights

    def found(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """What `Table.two_sided` finds of some images, view by view."""
        table, places = self._table(), self.lists.view[rows]
        for at in range(len(self.lists.lengths)):
            own = self.lists.indices[rows, at], self.lists.squares[rows, at], self.scales[rows, at]
            yield table.two_sided(0, at, *own, places)

    def links_of_queries(self, asked: Asked, cameras: Tensor) -> Found:
        """As `Linked.links_of_queries`."""
        table, places, found = self._table(), self._places(cameras), []
        everyone = asked.nearest(int(self.strangers.deepest.max()) + 1, self.lists.members())
        for at, (seen, scale) in enumerate(self._seen(*everyone)):
            row, near, rank, u = table.two_sided(0, at, seen.indices, seen.squares, scale, places)
            weight = query_sum(self.strangers.weights(u), rank, self.people[near])
            found.append((row[weight > 0], near[weight > 0], weight[weight > 0]))
        row, near, weight = (torch.cat(values) for values in zip(*found, strict=True))
        return row, near, weight

    def _places(self, cameras: Tensor) -> Tensor:
        return self._table().places(cameras) if self.by_camera else torch.zeros_like(cameras)

    def _seen(self, indices: Tensor, squares: Tensor) -> Iterator[tuple[Seen, Tensor]]:
        """What rows see in each view, of (V, B, k) nearest, and their scale of strangers there."""
        similarities, known = 1 - squares.double() / 2, self.strangers
        for at, (deepest, k) in enumerate(zip(known.deepest.tolist(), known.ks.tolist(), strict=True)):
            seen = Seen(indices[at, :, : deepest + 1], similarities[at, :, : deepest + 1], [k])
            yield seen, seen.scales(known.medians[at : at + 1])[0]

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
        super().__init__(images, Lists(images, [OVERALL + 1]), OVERALL + 1)
        self.lists.count()
        self.names, self.numbers, self.shared, self.num_cameras = names, numbers, shared, num_cameras
        view = torch.full((n,), shared, dtype=torch.int64, device=device)
        self.by_list = Lists(images, [NEAREST + 1] * (shared + 1), view)
        self.by_list.view[: images.n] = self._listed_images(images.cameras[: images.n])
        self.by_list.count()
        self._sizes = self._small_sizes()

    @staticmethod
    def of(images: Images, searched: Searched, num_cameras: int) -> Contrasting:
        """As a search of all images found them."""
        made = Contrasting(images, searched.names, searched.numbers, int(searched.shared), num_cameras)
        if searched.length > 1:
            made.lists.fill(0, searched.indices)
            for at, members in enumerate(searched.members):
                known = searched.tables[at] if searched.tables else searched.compared.nearest(NEAREST + 1, members)
                made.by_list.fill(at, known[0].masked_fill(known[1].isinf(), -1))
        made.link_all()
        return made

    def every_list(self) -> list[Lists]:
        """As `Linked.every_list`."""
        return [self.lists, self.by_list]

    def can_stay(self) -> bool:
        """As `Linked.can_stay`."""
        return bool((self._small_sizes() == self._sizes).all())

    def near(self, changed: list[list[Tensor]]) -> Tensor:
        """As `Linked.near`: images on lists over all cameras; of changed lists in one camera, images there."""
        (everywhere,), by_list = changed
        found = [self.lists.near(everywhere, 0)]
        for at, rows in enumerate(by_list):
            near = self.lists.near(rows, 0)
            # An image of a list too small to be looked at looks at its neighbour's own.
            found.append(near[(self.by_list.view[near] == at) | (self._sizes[self.by_list.view[near]] < _SMALL)])
        return torch.cat(found)

    def _small_sizes(self) -> Tensor:
        """What links ask of sizes: whether lists have 3 images, and 3 others of an image on them."""
        return self.by_list.sizes.clamp(max=_SMALL)

    def enter(self, new: Tensor, asked: Asked) -> None:
        """As `Linked.enter`."""
        self.lists.place(new, 0)
        self.by_list.place(new, self._listed_images(self.images.cameras[new]))
        for lists in self.every_list():
            lists.search_all(new, asked)

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
            views, place = ahead.unique(return_inverse=True)
            found = asked.nearest(NEAREST + 1, self.by_list.members(views))[1]
            return _first_and_last(found[place, row]), self._ends(column, behind)

        (indices,), (squares,) = asked.nearest(OVERALL + 1, self.lists.members())
        row, at, weight = self._contrast(indices, squares, self._listed(cameras), ends, same=False)
        column = indices[row, at]
        factor = cross_camera_weight(cameras[row], self.images.cameras[column], self.num_cameras)
        return row, column, weight * factor

    def _contrast(self, indices: Tensor, squares: Tensor, lists: Tensor, ends: Any, *, same: bool) -> Found:
        indices, shape, similarities = indices.clamp(min=0), indices.shape, 1 - squares.double() / 2
        length = min(OVERALL + 1, self.images.count - 1)
        squares = self.lists.squares[:, 0].index_select(0, indices.flatten())[:, [0, max(length, 1) - 1]]
        first, last = (1 - squares.double() / 2).view(*shape, 2).unbind(2)
        theirs, sizes = (first, last), self.by_list.sizes
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
