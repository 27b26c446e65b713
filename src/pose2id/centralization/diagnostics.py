"""What NFC and generated images would do to features, seen without labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pose2id.centralization.fusion import stacked_rows
from pose2id.centralization.guard import Evidence, Guard
from pose2id.centralization.nfc import mutual_neighbors, nearest_others
from pose2id.io.checks import checked_count, checked_labels, checked_memory
from pose2id.io.rows import Rows, unit
from pose2id.neighbors.members import Compared
from pose2id.neighbors.search import NeighborSearch, checked_search

# What a retention was measured to mean, with OSNet x0.25 trained on MSMT17 (docs/results.md).
# "IPG trained from nothing on real crops" (3.1 %), and the tiny weights on 30 real people (2.9 %), alone were measured
# together with mAP of real people. Eta 0.25 added 0.8 and 2.0 points, 1 took 1.3 and added 0.9, 2 took 9.1 and 9.7.
_RETENTION_THAT_HARMED = 0.031
# "What the published pictures are worth": 15 people, compared within their data sets, and the lower end of the 95 %
# interval over people. 15 people carry no finer step.
_PUBLISHED_RETENTION, _PUBLISHED_AT_LEAST = 0.393, 0.336
# The same pictures, and a model that never saw ReID training: a reminder that the bounds depend on the model.
_PUBLISHED_FOR_A_WEAK_MODEL = 0.14
# The bounds above rest on 15 people. The intervals over 5 people were 18, 14 and 28 points wide, over 100 real ones 6.
_FEW = 15
_INTERVALS = "95% intervals over 15 people were 11 points wide, over 5 up to 28"


@dataclass(frozen=True)
class GenerationDiagnostics:
    """How much of a person a model sees in generated images, without labels. Cosine similarities in [-1, 1].

    Attributes:
        own_cosine: mean between an original's feature and those of its own generated images.
        other_cosine: mean between an original's feature and those of other originals' generated images.
        consistency: mean between the generated images of one original (None for one generated image).
        num_images: originals that the means are over; None: not known.
    """

    own_cosine: float
    other_cosine: float
    consistency: float | None
    num_images: int | None = None

    @property
    def retention(self) -> float:
        """(own - other) / (1 - other): 1 if generated images look like their original, 0 if like anybody's.

        nan if other_cosine is 1, as with features that are all the same.
        """
        room = 1 - self.other_cosine
        return (self.own_cosine - self.other_cosine) / room if room > 1e-9 else float("nan")

    @property
    def reading(self) -> str:
        """What this retention meant where it was measured, in a sentence or two, and a warning of few images.

        No eta is named that nobody measured. The bounds are OSNet's, on few people; a weaker model retains less of the
        same pictures, and of real ones. Labels of some images say more. Few are less than 15, the people whom the
        bounds rest on.
        """
        if self.num_images is None or self.num_images >= _FEW:
            return self._meaning
        return f"{self._meaning} {self.num_images} images are few to go by: {_INTERVALS}."

    @property
    def _meaning(self) -> str:
        retention, harmed = self.retention, f"{_RETENTION_THAT_HARMED:.1%}"
        published = f"{_PUBLISHED_RETENTION:.0%}, at least {_PUBLISHED_AT_LEAST:.0%}; OSNet, 15 people"
        if math.isnan(retention):
            return "All generated images look like everybody to this model: retention cannot be told."
        if retention <= 0:
            return "An image's own pictures are no nearer to it than other people's: leave them out (eta 0)."
        if retention <= _RETENTION_THAT_HARMED:
            return (
                f"The pictures say little about the person: at {harmed} and 2.9% (CUHK03, OSNet) eta 2 took 9 points "
                "of mAP and more, 1 gave no clear gain, 0.25 added 0.8 and 2.0. Leave them out (eta 0), or try "
                "0.25 with labels."
            )
        if retention < _PUBLISHED_AT_LEAST:
            return (
                f"Less than in pictures of the published weights ({published}; MobileNetV2 saw "
                f"{_PUBLISHED_FOR_A_WEAK_MODEL:.0%}), more than in some that harmed at eta 2 ({harmed}). No eta was "
                "measured on real people in between: start at 0, try small ones with labels."
            )
        return (
            f"As in pictures of the published weights ({published}), for which the paper has eta 1/4 to 2. "
            "Check with labels."
        )

    @property
    def summary(self) -> str:
        """The figures in one line."""
        among = "" if self.consistency is None else f", among themselves {self.consistency:.3f}"
        of = "" if self.num_images is None else f" of {self.num_images} originals"
        return (
            f"generated images{of}: cosine to their own {self.own_cosine:.3f}, to others {self.other_cosine:.3f}"
            f"{among}, retention {self.retention:.1%}"
        )

    def __str__(self) -> str:
        """The summary, and the reading in another line."""
        return f"{self.summary}\n{self.reading}"


def generation_diagnostics(features: Any, generated: Any) -> GenerationDiagnostics:
    """Measure, without labels, how much of a person a model sees in generated images: to choose eta.

    Args:
        features: (N, D) features of the original images, or (N, P, D) of their parts, N at least 2; as in `fuse`. A few
            hundred images of different people are enough; people who appear more than once raise `other_cosine`.
        generated: (N, M, D) or (N, M, P, D) features of the generated images; as in `fuse`.

    Returns:
        The similarities of `GenerationDiagnostics`; of parts: their means over the parts, whether visible or not.
    """
    rows, poses = stacked_rows(features, generated)
    n, parts, count = rows.n, rows.parts, len(poses)
    if n < 2:
        raise ValueError(f"features must hold at least 2 images, to compare with other images' pictures, got {n}.")
    own = among = 0.0
    sum_original = torch.zeros((parts, rows.dim // parts), dtype=torch.float64, device=rows.device)
    sum_generated = sum_original.clone()
    for block in rows.blocks():
        original = unit(rows.by_part(rows.read(block, torch.float64)))
        total, squares = torch.zeros_like(original), 0.0
        for pose in poses:
            direction = unit(pose.by_part(pose.read(block, torch.float64))).to(original.device)
            total += direction
            squares += float(direction.square().sum())
        own += float((original * total).sum())
        among += float(total.square().sum()) - squares
        sum_original += original.sum(0)
        sum_generated += total.sum(0)
    # All pairs at once: the sum of products is the product of sums.
    cross = float((sum_original * sum_generated).sum())
    pairs = parts * n * count
    return GenerationDiagnostics(
        own_cosine=own / pairs,
        other_cosine=(cross - own) / (pairs * (n - 1)),
        consistency=among / (pairs * (count - 1)) if count > 1 else None,
        num_images=n,
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
        evidence: whether people repeat, without cameras. Where its gate is 0, NFC may harm: it averages strangers.
    """

    k1: int
    k2: int
    mutual_share: float
    mean_mutual: float
    mean_similarity: float
    background_similarity: float
    same_camera_share: float | None
    expected_same_camera_share: float | None
    evidence: Evidence

    def __str__(self) -> str:
        """One line, in percent."""
        text = (
            f"k1={self.k1} k2={self.k2}: {self.mutual_share:.1%} of rows have a mutual neighbour "
            f"({self.mean_mutual:.2f} each), cosine {self.mean_similarity:.3f} "
            f"(all pairs {self.background_similarity:.3f})"
        )
        if self.same_camera_share is not None:
            text += f", same camera {self.same_camera_share:.1%} (at random {self.expected_same_camera_share:.1%})"
        return f"{text}. {self.evidence}"


def nfc_diagnostics(
    features: Any,
    k1: int = 2,
    k2: int = 2,
    *,
    camids: Any = None,
    backend: str = "auto",
    neighbors: NeighborSearch | None = None,
    max_memory: int | None = None,
) -> NFCDiagnostics:
    """Measure, without labels, what `nfc(features, k1, k2)` would do: to choose k1 and k2.

    Args:
        features: (N, D) features of one set, N at least 2; as in `nfc`.
        k1: as in `nfc`.
        k2: as in `nfc`.
        camids: (N,) camera labels, optional: integers, whole floats or strings.
        backend: as in `nfc`.
        neighbors: as in `nfc`; the evidence is found with a search of its own.
        max_memory: as in `pose2id.evidence`, which holds lists of 51 neighbours.

    Returns:
        The shares and similarities of `NFCDiagnostics`, and the evidence that people repeat (`pose2id.evidence`).
    """
    rows = Rows(features, "features", normalize=True)
    if rows.n < 2:
        raise ValueError(f"features must hold at least 2 rows to have neighbours, got {rows.n}.")
    k1, k2 = checked_count(k1, "k1"), checked_count(k2, "k2")
    cameras = None if camids is None else torch.from_numpy(checked_labels(camids, "camids", rows.n)).to(rows.device)
    nearest = nearest_others(rows, None, max(k1, k2), backend, checked_search(neighbors, backend), max_memory)
    same_camera = 0
    similarity = 0.0
    total = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
    squares = 0.0
    is_mutual = mutual_neighbors(nearest, k1, k2)
    pairs, with_neighbor = int(is_mutual.sum()), int(is_mutual.any(1).sum())
    for block in rows.blocks(checked_memory(max_memory)):
        direction = rows.read(block, torch.float64)
        total += direction.sum(0)
        squares += float(direction.square().sum())
        for rank in range(is_mutual.shape[1]):
            hit = torch.nonzero(is_mutual[block, rank]).flatten()
            other = nearest[block, rank][hit]
            similarity += float((direction[hit] * rows.read(other, torch.float64)).sum())
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
        evidence=Guard(Compared(rows, None, backend, max_memory)).evidence,
    )
