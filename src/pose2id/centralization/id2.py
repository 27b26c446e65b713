"""ID², the identity density: how tightly the features of an identity sit around its centre (eq. 20-21)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pose2id.io.checks import checked_choice, checked_flag, checked_labels
from pose2id.io.rows import Rows
from pose2id.io.threads import use_threads

_CONVENTIONS = ("published", "printed")


@dataclass(frozen=True, eq=False)
class IdentityDensity:
    """Distances of features to their identity's centre, in the chosen convention.

    Attributes:
        score: the ID² score: lower is denser.
        pids: (I,) identities that were measured, ascending: int64, or strings where strings were given.
        counts: (I,) int64 features of each identity.
        per_identity: (I,) float64 mean distance of an identity's features to its centre.
        per_sample: (N,) float64 distance of every feature to its centre; nan where it was left out.
        num_singletons: identities with one feature. Their density is 0 and lowers the score.
    """

    score: float
    pids: NDArray[Any] = field(repr=False)
    counts: NDArray[np.int64] = field(repr=False)
    per_identity: NDArray[np.float64] = field(repr=False)
    per_sample: NDArray[np.float64] = field(repr=False)
    num_singletons: int


def id2_score(features: Any, pids: Any, *, convention: str = "published", count_distractors: bool = True) -> float:
    """The ID² score of labelled features: lower means denser identities.

    With c_i the mean of the L2-normalised features of identity i, not normalised again (eq. 21):

        "published": mean over features of |f - c|², squared distances, as the published code has it; by the size of
            its figures the paper's tables come from it.
        "printed": the printed formula (eq. 20): mean over identities of the mean Euclidean distance |f - c|.

    The paper measures query and gallery features together: concatenate them first.

    Args:
        features: (N, D) floating numpy array or torch tensor; L2-normalised here.
        pids: (N,) identities, of the kinds that `pose2id.evaluate` takes; -1 marks junk, which is left out.
        convention: "published" or "printed".
        count_distractors: count pid 0 as one more identity, as the published code does; False leaves it out.

    Returns:
        The score, in [0, 1] if published and [0, 2) if printed. Identities with one feature have density 0:
        `identity_density` says how many there are.
    """
    return identity_density(features, pids, convention=convention, count_distractors=count_distractors).score


def identity_density(
    features: Any, pids: Any, *, convention: str = "published", count_distractors: bool = True
) -> IdentityDensity:
    """`id2_score` with its parts: per identity and per sample. Arguments and errors are those of `id2_score`."""
    checked_choice(convention, "convention", _CONVENTIONS)
    counted = checked_flag(count_distractors, "count_distractors")
    rows = Rows(features, "features", normalize=True)
    labels = checked_labels(pids, "pids", rows.n)
    measured = (labels != -1) & (counted | (labels != 0))
    if not measured.any():
        raise ValueError(f"pids must leave at least one feature to measure, got {rows.n} rows, all of them left out.")
    identities, first, inverse, counts = np.unique(
        labels[measured], return_index=True, return_inverse=True, return_counts=True
    )
    if not isinstance(pids, Tensor) and np.asarray(pids).dtype.kind not in "iuf":
        identities = np.asarray(pids)[measured][first].astype(str)
    groups = np.full(rows.n, len(identities))  # rows that are left out make one more group
    groups[measured] = inverse

    group = torch.from_numpy(groups).to(rows.device)
    squared = squared_distances(rows, group, centres(rows, group)).cpu().numpy()
    distances = squared if convention == "published" else np.sqrt(squared)
    per_identity = np.bincount(inverse, weights=distances[measured]) / counts
    return IdentityDensity(
        score=float((distances[measured] if convention == "published" else per_identity).mean()),
        pids=identities,
        counts=counts.astype(np.int64),
        per_identity=per_identity,
        per_sample=np.where(measured, distances, np.nan),
        num_singletons=int((counts == 1).sum()),
    )


def centres(f: Rows, group: Tensor) -> Tensor:
    """Eq. 21: c_i, the mean of the features of group i, not normalised again. (I, D); group (N,) int64 from 0."""
    use_threads(f.device)  # few rows too
    total = torch.zeros((int(group.max()) + 1, f.dim), dtype=f.dtype, device=f.device)
    for block in f.blocks():
        total.index_add_(0, group[block], f.read(block))
    return total / torch.bincount(group).clamp(min=1).to(total)[:, None]


def squared_distances(f: Rows, group: Tensor, c: Tensor) -> Tensor:
    """|f - c_i|² of every feature to its group's centre, of whose root eq. 20 is the mean. (N,) float64."""
    result = torch.empty(f.n, dtype=torch.float64, device=f.device)
    for block in f.blocks():
        result[block] = (f.read(block) - c[group[block]]).square().sum(1).double()
    return result
