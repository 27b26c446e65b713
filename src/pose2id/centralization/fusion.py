"""Eq. 9: features of images centralized with those of generated images of the same people."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pose2id.io.checks import checked_number, checked_visibility
from pose2id.io.rows import FeatureArray, Rows, unit

_FEATURE_NDIM = 2
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

    Raises:
        TypeError, ValueError: bad input, named; so is the row that is not finite.
    """
    eta = checked_number(eta, "eta", 0, 1e6)
    parts = stacks(features, generated)
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
            rows.write(target, block, unit(total))
    return result  # type: ignore[no-any-return]


def stacks(features: Any, generated: Any) -> list[tuple[Rows, list[Rows]]]:
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
