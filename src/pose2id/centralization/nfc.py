"""NFC, Neighbor Feature Centralization: every feature with its mutual nearest neighbours (Algorithm 1, eq. 26-28).

Source: "From Poses to Identity: Training-Free Person Re-Identification via Feature Centralization" (CVPR 2025).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pose2id.io.checks import BLOCK_BYTES, checked_choice, checked_count, checked_flag, checked_memory
from pose2id.io.rows import FeatureArray, Rows, unit
from pose2id.io.whole_files import new_file, write_npy
from pose2id.neighbors import visible_parts
from pose2id.neighbors.search import BACKENDS, NeighborSearch, checked_search, mutual, neighbors_of_rows, search

PART_DISTANCES = ("visible", "flattened")


def nfc(
    features: FeatureArray,
    k1: int = 2,
    k2: int = 2,
    *,
    visibility: Any = None,
    part_distance: str = "visible",
    normalize: bool = True,
    backend: str = "auto",
    neighbors: NeighborSearch | None = None,
    max_memory: int | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> FeatureArray:
    """Neighbor Feature Centralization: add to every feature its mutual nearest neighbours (Algorithm 1, eq. 26-28).

        N_i = the k1 nearest others of z_i;   M_i = {j in N_i : i among the k2 nearest others of j}
        z_i <- z_i + sum of z_j over j in M_i

    All sums use the features as they came in. Nothing is learnt, no label is used. Centralize query and gallery
    apart; see `Centralizer.enhance`.

    Features in parts have neighbours by `part_distances`, and a neighbour's part is weighted by its visibility, the
    own part by 1:

        z_ip <- z_ip + sum of v_jp z_jp over j in M_i

    Args:
        features: (N, D) float16, bfloat16, float32 or float64 features of one set, or (N, P, D) of P parts each; numpy
            array (memory-mapped too) or torch tensor on any device. Not modified.
        k1: how many neighbours a feature proposes, at least 1; 2 to 4 is a good range.
        k2: how many neighbours the other side looks at, at least 1. k2 > k1 matters here, as in Algorithm 1; the
            published code never looks past column k1, so it behaves as k2 = k1.
        visibility: (N, P) of the parts, as in `part_distances`: booleans, or weights in [0, 1], of which 1 lets a
            neighbour's part count like the own. None: every part is fully visible.
        part_distance: "visible": distances of parts are those of `part_distances`. "flattened": what the published code
            computes of (N, P, D), the Euclidean distance of all parts in one vector, and sums over all neighbours;
            it knows no visibility. Ignored for whole features.
        normalize: L2-normalise before and after, each part by itself, as the published evaluation does. False leaves
            out both.
        backend: "auto", "faiss" or "torch": who searches neighbours; the result is the same. faiss cannot search by the
            distance over visible parts.
        neighbors: a search of your own in place of `backend`, exact or not: a callable `(queries, rows, k) -> (indices,
            distances)` (`pose2id.neighbors.search.NeighborSearch`). It gets all rows in one array, as queries too.
        max_memory: bytes for the search of neighbours, see `pose2id.nearest_neighbors`.
        out: name of a .npy file to write the result to, block by block, instead of holding it in memory; for numpy
            features. It appears whole or not at all, and in the place of another file only with `overwrite`. With
            memory-mapped features and max_memory, neither has to fit into memory.
        overwrite: replace `out` if it exists.

    Returns:
        Features in the shape, container, dtype and on the device of `features`, computed in at least float32; with
        `out` the file's content, memory-mapped and read-only. With normalize=False, a sum beyond the range of the dtype
        (65,504 for float16) becomes infinite.

        Defined edge cases: N = 0 gives an empty array; N = 1 has no neighbour and is only normalised; k >= N means all
        others; exact copies are neighbours of each other, ties go to the lower index; a zero row is compared as the
        zero vector (at distance 1 from every normalised row) and stays zero unless it has a non-zero mutual neighbour;
        features that share no visible part are no neighbours.

    Raises:
        TypeError: `features` is no floating array or tensor, k1 or k2 no integer, or `out` is given with tensors.
        ValueError: another rank, no columns, k1 or k2 below 1, a row that is not finite (named by its index), bad
            visibility, or visibility or backend="faiss" where they have no meaning.
        FileExistsError, FileNotFoundError, OSError: `out` exists and may not, has no folder, or cannot be written.
        RuntimeError: a forced backend cannot be used; the message names the repair.
    """
    k1, k2 = checked_count(k1, "k1"), checked_count(k2, "k2")
    checked_memory(max_memory)
    if out is not None and isinstance(features, Tensor):
        raise TypeError("out must be None for tensors, which are in memory anyway. For a file pass a numpy array.")
    checked_flag(overwrite, "overwrite")
    # A link even to nothing: the file would take the link's place.
    if out is not None and not overwrite and os.path.islink(out):
        raise FileExistsError(f"{out} exists. Choose another name.")
    target = None if out is None else new_file(out, overwrite=overwrite, suffixes=(".npy",))
    z = Rows(features, "features", normalize=normalize, parts=True)
    v = checked_weights(z, visibility, "visibility", part_distance)
    return with_neighbors(z, v, k1, k2, normalize, backend, neighbors, max_memory, target, replace=overwrite)


def with_neighbors(
    z: Rows,
    v: Tensor | None,
    k1: int,
    k2: int,
    normalize: bool = True,
    backend: str = "auto",
    neighbors: NeighborSearch | None = None,
    max_memory: int | None = None,
    target: Path | None = None,
    *,
    replace: bool = False,
) -> Any:
    """`nfc` of checked rows, with the visibility that `checked_weights` gives."""
    if v is not None and checked_choice(backend, "backend", BACKENDS) == "faiss":
        raise ValueError("backend must be 'auto' or 'torch' for visible parts. faiss takes part_distance='flattened'.")
    if checked_search(neighbors, backend) is not None and v is not None:
        raise ValueError("neighbors must be None for visible parts: it compares rows. Pass part_distance='flattened'.")
    nearest = nearest_others(z, v, max(k1, k2), backend, neighbors, max_memory)
    return summed(z, v, nearest, mutual_neighbors(nearest, k1, k2), normalize, max_memory, target, replace=replace)


def summed(
    z: Rows,
    v: Tensor | None,
    nearest: Tensor,
    is_mutual: Tensor,
    normalize: bool = True,
    max_memory: int | None = None,
    target: Path | None = None,
    *,
    replace: bool = False,
) -> Any:
    """Every row of `nfc` with its mutual neighbours; `replace`: whether the file may have been there."""

    def centralized_blocks() -> Iterator[tuple[slice, Tensor]]:
        for block in z.blocks(min(checked_memory(max_memory), BLOCK_BYTES) // 4):  # sums, neighbours, what is written
            sums = centralized(z, block, nearest, is_mutual, v)
            yield block, unit(z.by_part(sums)) if normalize else sums

    if target is not None:
        return _written(target, z, centralized_blocks(), replace=replace)
    result = z.empty()
    for block, rows in centralized_blocks():
        z.write(result, block, rows)
    return result


def nearest_others(
    z: Rows, v: Tensor | None, k: int, backend: str, neighbors: NeighborSearch | None, max_memory: int | None
) -> Tensor:
    """(n, k) nearest others of each row; lists may end in -1."""
    if neighbors is not None:
        return neighbors_of_rows(z, k, neighbors)
    return search(z, k, backend, max_memory) if v is None else visible_parts.search(z, v, k, max_memory)


def mutual_neighbors(nearest: Tensor, k1: int, k2: int) -> Tensor:
    """Eq. 26-27: which j in N_i, the k1 nearest of i, have i among their own k2 nearest. (n, k1) booleans.

    Lists of `nearest` (n, k) may end in -1, a missing neighbour.
    """
    missing = nearest < 0
    own = torch.arange(len(nearest), device=nearest.device)[:, None]
    return mutual(torch.where(missing, own, nearest), k1, k2) & ~missing[:, :k1]


def centralized(z: Rows, block: slice, nearest: Tensor, is_mutual: Tensor, v: Tensor | None) -> Tensor:
    """Eq. 28: z_i + sum of z_j over j in M_i, for the rows i of a block; z_j as far as it is visible (n, P)."""
    total = z.read(block)
    # Neighbour by neighbour: a fixed order of sums on every device, and no (rows, k1, D) temporary.
    for rank in range(is_mutual.shape[1]):
        i = torch.nonzero(is_mutual[block, rank]).flatten()
        j = nearest[block, rank][i]
        z_j = z.read(j)
        if v is not None:
            z.by_part(z_j).mul_(v[j, :, None].to(z_j.dtype))
        total[i] += z_j
    return total


def checked_weights(rows: Rows, visibility: Any, name: str, part_distance: str) -> Tensor | None:
    """Visibility (n, P) to find and to add neighbours with; None where rows are compared, and added, as one vector."""
    checked_choice(part_distance, "part_distance", PART_DISTANCES)
    flattened = part_distance == "flattened"
    if flattened and visibility is not None:
        raise ValueError(f"{name} must be None with part_distance='flattened'. Take part_distance='visible'.")
    if flattened or (rows.parts == 1 and visibility is None):
        return None
    return rows.visibility(visibility, name)


def _written(path: Path, rows: Rows, blocks: Iterator[tuple[slice, Tensor]], *, replace: bool) -> Any:
    """A file of the blocks, in the shape and dtype of the features, memory-mapped."""

    def arrays() -> Iterator[NDArray[Any]]:
        for _, total in blocks:
            array: Any = rows.empty(len(total))
            rows.write(array, slice(None), total)
            yield array

    like: Any = rows.empty(0)
    write_npy(path, (rows.n, *like.shape[1:]), like.dtype, arrays(), replace=replace)
    return np.load(path, mmap_mode="r")
