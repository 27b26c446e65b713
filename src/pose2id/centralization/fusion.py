"""Eq. 9: features of images centralized with those of generated images of the same people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pose2id.io.checks import checked_number, checked_visibility, dense
from pose2id.io.rows import FeatureArray, Rows, unit

_PARTS_NDIM = 3


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
    """
    eta = checked_number(eta, "eta", 0, 1e6)
    originals, poses = stacked_rows(features, generated)
    weights = _weights(visibility, originals, generated)
    result: Any = originals.empty()
    for block in originals.blocks():
        f = originals.by_part(originals.read(block, torch.float64))
        f_m = (pose.by_part(pose.read(block, torch.float64)).to(f.device) for pose in poses)
        originals.write(result, block, centralized(f, f_m, weights[block].to(f.device).movedim(1, 0), eta))
    return result


def centralized(f: Tensor, f_m: Iterable[Tensor], w_m: Iterable[Tensor], eta: float) -> Tensor:
    """Eq. 9: normalize(f + eta * sum of w_m f_m), of features (B, P, D) and weights (B, P, 1); w_m = 1 / M."""
    mean = sum(w * generated for w, generated in zip(w_m, f_m, strict=True))
    return unit(f + eta * mean)


def stacked_rows(features: Any, generated: Any) -> tuple[Rows, list[Rows]]:
    """The original images' rows, and those of each of the M generated images, checked to be of the same images."""
    originals = Rows(features, "features", parts=True)
    dense(generated, "generated")
    if not isinstance(generated, (np.ndarray, Tensor)):
        raise TypeError(f"generated must be a numpy array or a torch tensor, got {type(generated).__name__}.")
    n, *feature_shape = features.shape
    shape = tuple(generated.shape)
    if len(shape) != len(feature_shape) + 2 or (shape[0], *shape[2:]) != (n, *feature_shape) or shape[1] == 0:
        wanted = ", ".join(map(str, (n, "M", *feature_shape)))
        raise ValueError(f"generated must have shape ({wanted}), M >= 1 for each of the features, got {shape}.")
    return originals, [Rows(generated[:, m], f"generated[:, {m}]", parts=True) for m in range(shape[1])]


def _weights(visibility: Any, originals: Rows, generated: Any) -> Tensor:
    """(N, M, P, 1) float64 weights of the generated images' parts, which sum to 1, or to 0 where none shows a part."""
    n, m = generated.shape[:2]
    if visibility is None:
        return torch.full((1, 1, 1, 1), 1 / m, dtype=torch.float64, device="cpu").expand(n, m, originals.parts, 1)
    v = checked_visibility(visibility, "visibility", tuple(generated.shape[:-1]) if originals.in_parts else None)
    total = v.sum(1, keepdim=True)
    return (v / torch.where(total > 0, total, 1.0))[..., None]
