"""Feature centralization: eq. 9 with features of generated images, Algorithm 1 (NFC) with mutual nearest neighbours.

Source: "From Poses to Identity: Training-Free Person Re-Identification via Feature Centralization" (CVPR 2025).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pose2id.io.rows import (
    BLOCK_BYTES,
    FeatureArray,
    Rows,
    checked_choice,
    checked_count,
    checked_labels,
    checked_memory,
    checked_number,
    checked_visibility,
    row_norms,
)
from pose2id.io.whole_files import write_npy
from pose2id.neighbors import visible_parts as part_neighbors
from pose2id.neighbors.search import BACKENDS, mutual, search

_FEATURE_NDIM = 2
_PARTS_NDIM = 3
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
    max_memory: int | None = None,
    out: str | os.PathLike[str] | None = None,
) -> FeatureArray:
    """Neighbor Feature Centralization: add to every feature its mutual nearest neighbours (Algorithm 1, eq. 26-28).

        N_i = the k1 nearest others of z_i;   M_i = {j in N_i : i among the k2 nearest others of j}
        z_i <- z_i + sum of z_j over j in M_i

    All sums use the features as they came in. Nothing is learnt, no label is used. Centralize query and gallery
    apart; see `Centralizer.enhance`.

    Features in parts have neighbours by `part_distances`, and a neighbour's part counts as far as it is visible, the
    own part with weight 1:

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
            it knows no visibility. Whole features don't ask.
        normalize: L2-normalise before and after, each part by itself, as the published evaluation does. False leaves
            out both.
        backend: "auto", "faiss" or "torch": who searches neighbours; the result is the same. faiss cannot search by the
            distance over visible parts.
        max_memory: bytes for the search of neighbours, see `pose2id.nearest_neighbors`.
        out: name of a .npy file to write the result to, block by block, instead of holding it in memory; for numpy
            features. It appears whole or not at all, and never in the place of another file. With memory-mapped
            features and max_memory, neither has to fit into memory.

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
        FileExistsError, FileNotFoundError, OSError: `out` exists, has no folder, or cannot be written.
        RuntimeError: a forced backend cannot be used; the message names the repair.
    """
    k1, k2 = checked_count(k1, "k1"), checked_count(k2, "k2")
    target = None if out is None else _checked_out(out, features)
    rows = Rows(features, "features", normalize=normalize, parts=True)
    weights = checked_weights(rows, visibility, "visibility", part_distance)
    k = max(k1, k2)
    if weights is None:
        neighbors = search(rows, k, backend, max_memory)
    elif checked_choice(backend, "backend", BACKENDS) == "faiss":
        raise ValueError(
            "backend must be 'auto' or 'torch' for the distance over visible parts, which faiss lacks. "
            "part_distance='flattened' works with faiss."
        )
    else:
        neighbors = part_neighbors.search(rows, weights, k, max_memory)
    sums = _sums(rows, weights, neighbors, _mutual(neighbors, k1, k2), max_memory)
    blocks = ((block, _unit_parts(rows, total) if normalize else total) for block, total in sums)
    if target is not None:
        return _written(target, rows, blocks)  # type: ignore[no-any-return]
    result = rows.empty()
    for block, total in blocks:
        rows.write(result, block, total)
    return result  # type: ignore[return-value]


def checked_weights(rows: Rows, visibility: Any, name: str, part_distance: str) -> Tensor | None:
    """Visibility (n, P) to find and to add neighbours with; None where rows are compared, and added, as one vector."""
    checked_choice(part_distance, "part_distance", PART_DISTANCES)
    flattened = part_distance == "flattened"
    if flattened and visibility is not None:
        raise ValueError(
            f"{name} must be None with part_distance='flattened', which compares and adds all parts. Take "
            "part_distance='visible'."
        )
    if flattened or (rows.parts == 1 and visibility is None):
        return None
    return rows.visibility(visibility, name)


def _mutual(neighbors: Tensor, k1: int, k2: int) -> Tensor:
    """`mutual` for lists that may end in -1, which is nobody's neighbour."""
    missing = neighbors < 0
    own = torch.arange(len(neighbors), device=neighbors.device)[:, None]
    return mutual(torch.where(missing, own, neighbors), k1, k2) & ~missing[:, :k1]


def _sums(
    rows: Rows, weights: Tensor | None, neighbors: Tensor, is_mutual: Tensor, max_memory: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows and their sums with their mutual neighbours."""
    for block in rows.blocks(min(checked_memory(max_memory), BLOCK_BYTES) // 4):  # sums, neighbours and what is written
        total = rows.read(block)
        # Neighbour by neighbour: a fixed order of sums on every device, and no (rows, k1, D) temporary.
        for rank in range(is_mutual.shape[1]):
            hit = torch.nonzero(is_mutual[block, rank]).flatten()
            other = neighbors[block, rank][hit]
            added = rows.read(other)
            if weights is not None:
                rows.by_part(added).mul_(weights[other, :, None].to(added.dtype))
            total[hit] += added
        yield block, total


def _checked_out(out: Any, features: Any) -> Path:
    if not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"out must be the name of a file, got {type(out).__name__}.")
    if isinstance(features, Tensor):
        raise TypeError("out must be None for tensors, which are in memory anyway. For a file pass a numpy array.")
    path = Path(out)
    if path.suffix.lower() != ".npy":
        raise ValueError(f"out must end in .npy, got {os.fspath(out)!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out must be in a folder that exists, got {path}.")
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"out must not exist, got {path}. Choose another name.")
    return path


def _written(path: Path, rows: Rows, blocks: Iterator[tuple[slice, Tensor]]) -> Any:
    """A file of the blocks, in the shape and dtype of the features, memory-mapped."""

    def arrays() -> Iterator[NDArray[Any]]:
        for _, total in blocks:
            array: Any = rows.empty(len(total))
            rows.write(array, slice(None), total)
            yield array

    like: Any = rows.empty(0)
    write_npy(path, (rows.n, *like.shape[1:]), like.dtype, arrays())
    return np.load(path, mmap_mode="r")


def fuse(
    features: FeatureArray, generated: FeatureArray, eta: float = 2.0, *, visibility: FeatureArray | None = None
) -> FeatureArray:
    """Centralize features with those of generated images of the same person in M poses (eq. 9).

        f~ = normalize(f + eta / M * sum of f_m over m = 1..M)

    The M features are averaged, as in the equation and the published evaluation; the published quick start sums them.
    Features in parts are fused part by part. With visibility v_m the mean over generated images becomes, for each part,
    sum(v_m * f_m) / sum(v_m); a part that none of them shows stays the original's. The original counts with weight 1.

    Args:
        features: (N, D) features of the original images, or (N, P, D) of their parts: the model's raw outputs, before
            any normalisation.
        generated: (N, M, D) or (N, M, P, D) raw features of the generated images, M at least 1.
        eta: weight of the generated mean, at least 0. Published values: Market1501 2, Occluded-ReID 1, SYSU-MM01 1/4.
        visibility: (N, M, P) of the generated parts: booleans, or weights of any numeric dtype in [0, 1].

    Returns:
        Features, each, or each part, L2-normalised, in the shape, container, dtype and device of `features`.

    Raises:
        TypeError, ValueError: bad input, named; so is the row that is not finite.
    """
    eta = checked_number(eta, "eta", 0, 1e6)
    parts = _stacks(features, generated)
    weights = None
    if visibility is not None:
        in_parts = generated.ndim == _PARTS_NDIM + 1
        weights = checked_visibility(visibility, "visibility", tuple(generated.shape[:-1]) if in_parts else None)
    result: Any = (
        features.new_empty(features.shape) if isinstance(features, Tensor) else np.empty(features.shape, features.dtype)
    )
    for part, (rows, poses) in enumerate(parts):
        target = result if len(result.shape) == _FEATURE_NDIM else result[:, part]
        for block in rows.blocks():
            total = rows.read(block, torch.float64)
            shares: list[Any] = [eta / len(poses)] * len(poses)
            if weights is not None:
                shares = _shares(eta, weights[block, :, part].to(total.device))
            for share, pose in zip(shares, poses, strict=True):
                total = total + share * pose.read(block, torch.float64).to(total.device)
            rows.write(target, block, _unit(total))
    return result  # type: ignore[no-any-return]


def _stacks(features: Any, generated: Any) -> list[tuple[Rows, list[Rows]]]:
    """Part by part (whole features: one part), the original's rows and those of each of the M generated images."""
    in_parts = isinstance(features, (np.ndarray, Tensor)) and features.ndim == _PARTS_NDIM
    if in_parts:
        if features.shape[1] == 0:
            raise ValueError(f"features must have at least one part, got shape {tuple(features.shape)}.")
        columns = [(features[:, p], f"features[:, {p}]") for p in range(features.shape[1])]
    else:
        columns = [(features, "features")]
    originals = [Rows(array, name) for array, name in columns]
    if not isinstance(generated, (np.ndarray, Tensor)):
        raise TypeError(f"generated must be a numpy array or a torch tensor, got {type(generated).__name__}.")
    n, *feature_shape = (int(size) for size in features.shape)
    wanted = (
        f"({', '.join(map(str, [n, 'M', *feature_shape]))}), M >= 1 generated images of each of the features' images"
    )
    shape = tuple(generated.shape)
    if len(shape) != len(feature_shape) + 2 or [shape[0], *shape[2:]] != [n, *feature_shape]:
        raise ValueError(f"generated must have shape {wanted}, got {shape}.")
    if shape[1] == 0:
        raise ValueError(f"generated must have shape {wanted}, got M = 0.")
    poses = range(shape[1])
    if not in_parts:
        return [(originals[0], [Rows(generated[:, m], f"generated[:, {m}]") for m in poses])]
    return [
        (rows, [Rows(generated[:, m, p], f"generated[:, {m}, {p}]") for m in poses]) for p, rows in enumerate(originals)
    ]


def _shares(eta: float, weights: Tensor) -> list[Tensor]:
    """M columns (B, 1): what each generated image adds to a row, by weights (B, M); 0 where all weights are 0."""
    total = weights.sum(1, keepdim=True)
    return list((eta * weights / torch.where(total > 0, total, 1.0)).T[..., None])


@dataclass(frozen=True)
class GenerationDiagnostics:
    """How much of a person a model sees in generated images, measured without labels. Cosine similarities in [-1, 1].

    Attributes:
        own_cosine: mean between an original's feature and those of its own generated images.
        other_cosine: mean between an original's feature and those of other originals' generated images.
        consistency: mean between the generated images of one original (None for one generated image).
    """

    own_cosine: float
    other_cosine: float
    consistency: float | None

    @property
    def retention(self) -> float:
        """(own - other) / (1 - other): 1 if generated images look like their original, 0 if like anybody's.

        nan if other_cosine is 1, as with features that are all the same.
        """
        room = 1 - self.other_cosine
        return (self.own_cosine - self.other_cosine) / room if room > 1e-9 else float("nan")

    @property
    def suggested_eta(self) -> float:
        """2 * retention, retention kept within [0, 1]: a rule of thumb, not calibrated on labels.

        It lies between 0 (the pictures tell this model nothing about whom they show) and the published 2 of Market1501.
        Published values: Market1501 2, Occluded-ReID 1, SYSU-MM01 1/4.
        """
        retention = self.retention
        return retention if math.isnan(retention) else 2 * min(max(retention, 0.0), 1.0)

    def __str__(self) -> str:
        """One line."""
        among = "" if self.consistency is None else f", among themselves {self.consistency:.3f}"
        return (
            f"generated images: cosine to their own {self.own_cosine:.3f}, to others {self.other_cosine:.3f}{among}, "
            f"retention {self.retention:.1%}: try eta={self.suggested_eta:.2g} (a rule of thumb, not calibrated)"
        )


def generation_diagnostics(features: Any, generated: Any) -> GenerationDiagnostics:
    """Measure, without labels, how much of a person a model sees in generated images: to choose eta.

    Args:
        features: (N, D) features of the original images, or (N, P, D) of their parts, N at least 2; as in `fuse`. A few
            hundred images of different people are enough; people who appear more than once raise `other_cosine`.
        generated: (N, M, D) or (N, M, P, D) features of the generated images; as in `fuse`.

    Returns:
        The similarities of `GenerationDiagnostics`; of parts: their means over the parts, whether visible or not.

    Raises:
        TypeError, ValueError: bad input, named, as in `fuse`.
    """
    stacks = _stacks(features, generated)
    n, parts, count = stacks[0][0].n, len(stacks), len(stacks[0][1])
    if n < 2:
        raise ValueError(f"features must hold at least 2 images, to compare with other images' pictures, got {n}.")
    own = cross = among = 0.0
    for rows, poses in stacks:
        sum_original = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
        sum_generated = sum_original.clone()
        for block in rows.blocks():
            original = _unit(rows.read(block, torch.float64))
            total, squares = torch.zeros_like(original), 0.0
            for pose in poses:
                unit = _unit(pose.read(block, torch.float64)).to(original.device)
                total += unit
                squares += float(unit.square().sum())
            own += float((original * total).sum())
            among += float(total.square().sum()) - squares
            sum_original += original.sum(0)
            sum_generated += total.sum(0)
        # All pairs at once: the sum of products is the product of sums.
        cross += float(sum_original @ sum_generated)
    pairs = parts * n * count
    return GenerationDiagnostics(
        own_cosine=own / pairs,
        other_cosine=(cross - own) / (pairs * (n - 1)),
        consistency=among / (pairs * (count - 1)) if count > 1 else None,
    )


@dataclass(frozen=True)
class NFCDiagnostics:
    """What `nfc` would do to a feature set, seen without labels. Shares are fractions in [0, 1].

    Attributes:
        k1, k2: the parameters.
        mutual_share: share of rows with at least one mutual neighbour; the others stay as they are.
        mean_mutual: mean number of mutual neighbours of a row.
        mean_similarity: mean cosine similarity over the mutual pairs (nan without a pair).
        background_similarity: mean cosine similarity of all pairs of different rows, for comparison.
        same_camera_share: share of mutual pairs from one camera (nan without a pair, None without cameras). Near 1, NFC
            pulls features towards a camera rather than across cameras, and Rank-1 across cameras may fall.
        expected_same_camera_share: that share if neighbours were drawn at random (None without cameras).
    """

    k1: int
    k2: int
    mutual_share: float
    mean_mutual: float
    mean_similarity: float
    background_similarity: float
    same_camera_share: float | None
    expected_same_camera_share: float | None

    def __str__(self) -> str:
        """One line, in percent."""
        text = (
            f"k1={self.k1} k2={self.k2}: {self.mutual_share:.1%} of rows have a mutual neighbour "
            f"({self.mean_mutual:.2f} each), cosine {self.mean_similarity:.3f} "
            f"(all pairs {self.background_similarity:.3f})"
        )
        if self.same_camera_share is None:
            return text
        return f"{text}, same camera {self.same_camera_share:.1%} (at random {self.expected_same_camera_share:.1%})"


def nfc_diagnostics(
    features: Any,
    k1: int = 2,
    k2: int = 2,
    *,
    camids: Any = None,
    backend: str = "auto",
    max_memory: int | None = None,
) -> NFCDiagnostics:
    """Measure, without labels, what `nfc(features, k1, k2)` would do: to choose k1 and k2.

    Args:
        features: (N, D) features of one set, N at least 2; as in `nfc`.
        k1: as in `nfc`.
        k2: as in `nfc`.
        camids: (N,) integer camera labels, optional.
        backend: as in `nfc`.
        max_memory: as in `nfc`.

    Returns:
        The shares and similarities of `NFCDiagnostics`.

    Raises:
        TypeError, ValueError: bad input, named, as in `nfc`.
    """
    rows = Rows(features, "features", normalize=True)
    if rows.n < 2:
        raise ValueError(f"features must hold at least 2 rows to have neighbours, got {rows.n}.")
    k1, k2 = checked_count(k1, "k1"), checked_count(k2, "k2")
    cameras = None if camids is None else torch.from_numpy(checked_labels(camids, "camids", rows.n)).to(rows.device)
    neighbors = search(rows, max(k1, k2), backend, max_memory)
    same_camera = 0
    similarity = 0.0
    total = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
    squares = 0.0
    is_mutual = mutual(neighbors, k1, k2)
    pairs, with_neighbor = int(is_mutual.sum()), int(is_mutual.any(1).sum())
    for block in rows.blocks(checked_memory(max_memory)):
        unit = rows.read(block, torch.float64)
        total += unit.sum(0)
        squares += float(unit.square().sum())
        for rank in range(is_mutual.shape[1]):
            hit = torch.nonzero(is_mutual[block, rank]).flatten()
            other = neighbors[block, rank][hit]
            similarity += float((unit[hit] * rows.read(other, torch.float64)).sum())
            if cameras is not None:
                same_camera += int((cameras[block][hit] == cameras[other]).sum())
    expected = None
    if cameras is not None:
        counts = torch.unique(cameras, return_counts=True)[1].double()
        expected = float((counts * (counts - 1)).sum() / (rows.n * (rows.n - 1)))
    return NFCDiagnostics(
        k1=k1,
        k2=k2,
        mutual_share=with_neighbor / rows.n,
        mean_mutual=pairs / rows.n,
        mean_similarity=similarity / pairs if pairs else float("nan"),
        background_similarity=(float(total.square().sum()) - squares) / (rows.n * (rows.n - 1)),
        same_camera_share=None if cameras is None else (same_camera / pairs if pairs else float("nan")),
        expected_same_camera_share=expected,
    )


def _unit_parts(rows: Rows, totals: Tensor) -> Tensor:
    return _unit(rows.by_part(totals).flatten(0, 1)).view_as(totals)


def _unit(rows: Tensor) -> Tensor:
    norms = row_norms(rows)
    return rows / torch.where(norms > 0, norms, 1.0)[:, None]
