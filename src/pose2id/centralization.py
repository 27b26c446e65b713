"""Feature centralization: eq. 9 with features of generated images, Algorithm 1 (NFC) with mutual nearest neighbours.

Source: "From Poses to Identity: Training-Free Person Re-Identification via Feature Centralization" (CVPR 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pose2id._inputs import (
    FeatureArray,
    Rows,
    checked_count,
    checked_labels,
    checked_memory,
    checked_number,
    row_norms,
)
from pose2id.neighbors import mutual, search

_STACK_NDIM = 3


def nfc(
    features: FeatureArray,
    k1: int = 2,
    k2: int = 2,
    *,
    normalize: bool = True,
    backend: str = "auto",
    max_memory: int | None = None,
) -> FeatureArray:
    """Neighbor Feature Centralization: add to every feature its mutual nearest neighbours (Algorithm 1, eq. 26-28).

        N_i = the k1 nearest others of z_i;   M_i = {j in N_i : i among the k2 nearest others of j}
        z_i <- z_i + sum of z_j over j in M_i

    All sums use the features as they came in. Nothing is learnt, no label is used. Centralize query and gallery
    apart; see `Centralizer.enhance`.

    Args:
        features: (N, D) float16, bfloat16, float32 or float64 features of one set; numpy array (memory-mapped too) or
            torch tensor on any device. Not modified.
        k1: how many neighbours a feature proposes, at least 1; 2 to 4 is a good range.
        k2: how many neighbours the other side looks at, at least 1. k2 > k1 matters here, as in Algorithm 1; the
            published code never looks past column k1, so it behaves as k2 = k1.
        normalize: L2-normalise before and after, as the published evaluation does. False leaves out both.
        backend: "auto", "faiss" or "torch": who searches the neighbours (`pose2id.neighbors`); the result is the same.
        max_memory: bytes for working blocks, see `pose2id.neighbors.nearest_neighbors`.

    Returns:
        (N, D) in the container, dtype and device of `features`, computed in at least float32. With normalize=False, a
        sum beyond the range of the dtype (65,504 for float16) becomes infinite.

        Defined edge cases: N = 0 gives an empty array; N = 1 has no neighbour and is only normalised; k >= N means all
        others; exact copies are neighbours of each other, ties go to the lower index; a zero row is compared as the
        zero vector (at distance 1 from every normalised row) and stays zero unless it has a non-zero mutual neighbour.

    Raises:
        TypeError: `features` is no floating array or tensor, or k1 or k2 no integer.
        ValueError: rank other than 2, no columns, k1 or k2 below 1, or a row that is not finite (named by its index).
        RuntimeError: a forced backend cannot be used; the message names the repair.
    """
    k1, k2 = checked_count(k1, "k1"), checked_count(k2, "k2")
    rows = Rows(features, "features", normalize=normalize)
    neighbors = search(rows, max(k1, k2), backend, max_memory)
    is_mutual = mutual(neighbors, k1, k2)
    result = rows.empty()
    for block in rows.blocks(checked_memory(max_memory)):
        total = rows.read(block)
        # Neighbour by neighbour: a fixed order of sums on every device, and no (rows, k1, D) temporary.
        for rank in range(is_mutual.shape[1]):
            hit = torch.nonzero(is_mutual[block, rank]).flatten()
            total[hit] += rows.read(neighbors[block, rank][hit])
        rows.write(result, block, _unit(total) if normalize else total)
    return result  # type: ignore[return-value]


def fuse(features: FeatureArray, generated: FeatureArray, eta: float = 2.0) -> FeatureArray:
    """Centralize features with those of generated images of the same person in M poses (eq. 9).

        f~ = normalize(f + eta / M * sum of f_m over m = 1..M)

    The M features are averaged, as in the equation and the published evaluation; the published quick start sums them.

    Args:
        features: (N, D) features of the original images: the model's raw outputs, before any normalisation.
        generated: (N, M, D) raw features of the generated images, M at least 1.
        eta: weight of the generated mean, at least 0. Published values: Market1501 2, Occluded-ReID 1, SYSU-MM01 1/4.

    Returns:
        (N, D) L2-normalised features in the container, dtype and device of `features`.

    Raises:
        TypeError, ValueError: bad input, named; so is the row that is not finite.
    """
    rows = Rows(features, "features")
    eta = checked_number(eta, "eta", 0, 1e6)
    if not isinstance(generated, (np.ndarray, Tensor)):
        raise TypeError(f"generated must be a numpy array or a torch tensor, got {type(generated).__name__}.")
    wanted = f"({rows.n}, M, {rows.dim}), M >= 1 generated images of each of the features' images"
    if generated.ndim != _STACK_NDIM or (generated.shape[0], generated.shape[2]) != (rows.n, rows.dim):
        raise ValueError(f"generated must have shape {wanted}, got {tuple(generated.shape)}.")
    count = int(generated.shape[1])
    if count == 0:
        raise ValueError(f"generated must have shape {wanted}, got M = 0.")
    poses = [Rows(generated[:, pose], f"generated[:, {pose}]") for pose in range(count)]
    result = rows.empty()
    for block in rows.blocks():
        total = rows.read(block, torch.float64)
        for pose in poses:
            total = total + eta / count * pose.read(block, torch.float64).to(total.device)
        rows.write(result, block, _unit(total))
    return result  # type: ignore[return-value]


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


def _unit(rows: Tensor) -> Tensor:
    norms = row_norms(rows)
    return rows / torch.where(norms > 0, norms, 1.0)[:, None]
