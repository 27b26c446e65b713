"""Is the nearest image near enough, or is a query nobody that the gallery knows?

    score = 1 - d_1 / d_11,   d_r the Euclidean distance to the r-th nearest image

The gallery's further images are the query's cohort: the ratio of distances is that of Mendes Júnior et al. ("Nearest
neighbors distance ratio open-set classifier", Machine Learning 2017; Lowe, IJCV 2004), whose second distance is that to
another class. Without labels the eleventh image stands for it, beyond most people's images.

Among strangers x = -log(1 - cos) has exponential spacings (as in `pose2id.centralization.guard`), and x_1 - x_11 is the
largest of ten exponentials (Rényi, 1953). So a score is exceeded by a share p of strangers at

    1 - exp(-scale / 2 * -log(1 - (1 - p)^(1/10)))

where `scale` is that of the spacings. It holds for features before neighbours are added: these draw strangers nearer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pose2id.centralization.guard import nearness

COHORT = 11  # rank of the image whose distance stands for strangers'
_DEEPEST, _DIVISOR = 50, 4  # ranks that measure the scale: at most 50, and a quarter of the gallery
LEAST = (COHORT + 1) * _DIVISOR  # images that a scale can be measured in


@dataclass(frozen=True)
class Threshold:
    """The least score of a query that is somebody the gallery knows; for `Gallery.search(threshold=)`.

    Attributes:
        score: in [0, 1], see `pose2id.gallery.unknown`.
        centralized: whether it is a score of centralized features, or of features before neighbours are added.
        fpr: share of strangers that reach it: measured on `impostor`, or what was asked for.
        tpr: share of `genuine` that reach it; None where none were given.
    """

    score: float
    centralized: bool = True
    fpr: float | None = None
    tpr: float | None = None


def scores(squares: Tensor) -> Tensor:
    """(B,) float64 scores of squared distances (B, L) to the nearest images, ascending; 0 where there are not two."""
    squares, known = squares.double(), squares.isfinite().sum(1)
    last = squares.gather(1, (known.clamp(min=1, max=COHORT) - 1)[:, None])[:, 0]
    # Copies: all at no distance, or the nearest alone.
    ratio = torch.where(last > 0, squares[:, 0] / last.clamp(min=torch.finfo(squares.dtype).tiny), 1.0).sqrt()
    return torch.where(known > 1, 1 - ratio, 0.0)


def from_impostors(impostor: Tensor, genuine: Tensor | None, fpr: float) -> Threshold:
    """The least threshold that at most a share `fpr` of impostors' scores reaches."""
    ordered = impostor.sort(descending=True).values
    allowed = int(fpr * len(ordered) * (1 + 1e-12))  # 0.29 * 100 is a little less than 29
    # Above the first that must be refused; all may pass at most.
    score = 0.0 if allowed >= len(ordered) else math.nextafter(float(ordered[allowed]), math.inf)
    tpr = None if genuine is None or not len(genuine) else float((genuine >= score).double().mean())
    return Threshold(score, True, float((impostor >= score).double().mean()), tpr)


def from_spacings(squares: Tensor, n: int, fpr: float) -> Threshold:
    """The threshold that strangers should reach at a rate, from how images of the gallery are spaced.

    Args:
        squares: (B, L) squared distances of some images to their nearest others, to rank 51.
        n: how many images there are.
        fpr: the rate, in (0, 1).
    """
    deepest = min(_DEEPEST, n // _DIVISOR, squares.shape[1] - 1)
    x = nearness(squares)
    ranks = torch.arange(COHORT + 1, deepest + 1, device=x.device)
    scale = float((ranks * (x[:, COHORT:deepest] - x[:, COHORT + 1 : deepest + 1])).mean(1).median())
    largest = -math.log(-math.expm1(math.log1p(-fpr) / (COHORT - 1)))
    return Threshold(-math.expm1(-scale * largest / 2), False, fpr)
