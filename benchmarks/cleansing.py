"""Data cleansing: how many images under a wrong name do the distances find, on real features?

    OMP_NUM_THREADS=1 python benchmarks/cleansing.py DATA_DIR [--share 0.05] [--together 1] [--seeds 3]

DATA_DIR holds the sets of `SETS`, one array (N, D) of features of all images beside pids. A share of the images gets
the name of somebody else, drawn anew for each seed; with --together K, K images of a person the same name. Figures are
means over seeds, in %:

    AUC         how often an image under a wrong name is farther than one under its own
    found       wrong ones among as many farthest images as there are wrong ones: precision, and recall as well
    far, near   wrong ones among the images that the paper's p = 0.005 drops at either end
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.training import clean
from pose2id.training.cleansing import COVARIANCES, FAR, NEAR

CUHK03, LARGE = "cuhk03_p1_det_val100", "cuhk03_p1_det_843"
SETS = [  # name, file, features
    ("CUHK03, OSNet MSMT17", CUHK03, "feat_osnet_msmt17"),
    ("CUHK03, OSNet Market1501", CUHK03, "feat_osnet_market1501"),
    ("CUHK03, MobileNetV2 ImageNet", CUHK03, "feat_mobilenetv2_imagenet"),
    ("CUHK03, OSNet in-domain", CUHK03, "feat_osnet_lda256"),
    ("CUHK03, 843 people, OSNet MSMT17", LARGE, "feat_osnet_msmt17"),
    ("3DPeS, OSNet MSMT17", "3dpes", "feat_osnet_msmt17"),
    ("3DPeS, retail-0288", "3dpes", "feat_retail0288"),
    ("PKU-Reid, OSNet MSMT17", "pku_reid", "feat_osnet_msmt17"),
]
# Name and settings; the last two measure the same distances against another mean.
RULES: list[tuple[str, dict[str, Any], float]] = [
    *((name, {"covariance": name}, 0.0) for name in COVARIANCES),
    *((f"{name}, not normalised", {"covariance": name, "normalize": False}, 0.0) for name in COVARIANCES),
    ("spherical, mean of all", {"covariance": "spherical"}, -0.5),
    ("spherical, mean of the others", {"covariance": "spherical"}, 0.5),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DATA_DIR")
    parser.add_argument("--share", type=float, default=0.05, help="of images under a wrong name (%(default)s)")
    parser.add_argument(
        "--together", type=int, default=1, help="images of one person under one wrong name (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    args = parser.parse_args()
    print(f"{args.share:.0%} under a wrong name, {args.seeds} seeds; AUC, found, far, near in %\n")
    for name, file, column in SETS:
        path = args.folder / f"{file}.npz"
        if not path.is_file():
            print(f"{name}: no {path}\n")
            continue
        data = np.load(path)
        features, pids = data[column], data["pids"].astype(np.int64)
        counts = np.unique(pids, return_counts=True)[1]
        print(f"{name}: {len(pids)} images of {len(counts)} people, {counts.min()} to {counts.max()} each")
        for rule, options, power in RULES:
            trials = [figures(features, pids, options, power, args, seed) for seed in range(args.seeds)]
            print(f"  {rule:30}" + "".join(f"{value:7.1f}" for value in 100 * np.mean(trials, 0)), flush=True)
        print()


def figures(
    features: NDArray[Any],
    pids: NDArray[np.int64],
    options: dict[str, Any],
    power: float,
    args: argparse.Namespace,
    seed: int,
) -> list[float]:
    """AUC, found, far, near of one draw."""
    labels = under_wrong_names(pids, round(args.share * len(pids)), args.together, np.random.default_rng(seed))
    wrong = labels != pids
    found = clean(features, labels, **options)
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    n = counts[group]
    # The library's distances have a factor sqrt(N / (N - 1)): without it they are those to the mean of all N images,
    # with its square those to the mean of the N - 1 others.
    distances = found.distances * (n / np.maximum(n - 1, 1)) ** power
    reasons = np.array(found.reasons)
    ranks = np.argsort(np.argsort(distances, kind="stable"))
    right = int((~wrong).sum())
    auc = (ranks[wrong].sum() - wrong.sum() * (wrong.sum() - 1) / 2) / (wrong.sum() * right)
    farthest = ranks >= len(pids) - wrong.sum()
    return [float(auc), *(float(wrong[mask].mean()) for mask in (farthest, reasons == FAR, reasons == NEAR))]


def under_wrong_names(
    pids: NDArray[np.int64], count: int, together: int, draws: np.random.Generator
) -> NDArray[np.int64]:
    """The same labels, but for `count` images, some of one person together, that have somebody else's."""
    labels, names = pids.copy(), np.unique(pids)
    for person in draws.permutation(np.tile(names, len(pids))):
        left = count - int((labels != pids).sum())
        if left == 0:
            break
        own = np.flatnonzero((pids == person) & (labels == pids))
        chosen = draws.permutation(own)[: min(together, left)]
        labels[chosen] = draws.choice(names[names != person])
    return labels


if __name__ == "__main__":
    main()
