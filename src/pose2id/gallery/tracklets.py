"""Frames of one track, pooled before neighbours are sought: a track is one image to the gallery."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pose2id.io.checks import as_numpy, first_few, is_missing
from pose2id.io.rows import Rows, unit

_CANCELLED = 1e-6  # a mean of unit frames as short as this has no direction
_ALIKE = 0.95  # cosine from which on two frames begin to count as one


class Tracks:
    """Which rows belong to which track, tracks in the order in which they first appear.

    Attributes:
        names: of the tracks.
        of_row: (N,) int64 number of each row's track.
        first: (T,) int64 first row of each.
    """

    def __init__(self, group_by: Any, n: int) -> None:
        group_by = for_all(group_by, n)
        if isinstance(group_by, bytes) or not hasattr(group_by, "__iter__"):
            raise TypeError(f"group_by must hold one track id per row, or be one integer or string, got {group_by!r}.")
        values = as_numpy(group_by).tolist() if isinstance(group_by, Tensor) else list(group_by)
        if len(values) != n:
            raise ValueError(f"group_by must hold one track id per row, {n}, got {len(values)}.")
        wrong = [value for value in values if not isinstance(value, Hashable)]
        if wrong:
            raise TypeError(
                f"group_by must hold integers or strings, got {first_few(type(x).__name__ for x in wrong)}."
            )
        nowhere = [row for row, value in enumerate(values) if is_missing(value) or value == -1]
        if nowhere:
            given = f"None, NaN or -1 at rows {first_few(nowhere)}"
            raise ValueError(f"group_by must name a track for every row, got {given}. Leave boxes without a track out.")
        numbers: dict[Any, int] = {}
        self.of_row = torch.tensor(
            [numbers.setdefault(value, len(numbers)) for value in values], dtype=torch.int64, device="cpu"
        )
        self.names = list(numbers)
        seen: dict[int, int] = {}
        for row, number in enumerate(self.of_row.tolist()):
            seen.setdefault(number, row)
        self.first = torch.tensor(list(seen.values()), dtype=torch.int64, device="cpu")

    def one_each(self, values: Sequence[Any] | None, name: str) -> list[Any] | None:
        """The value of each track, which all of its rows must share."""
        if values is None:
            return None
        chosen = [values[row] for row in self.first.tolist()]
        other = [row for row, track in enumerate(self.of_row.tolist()) if values[row] != chosen[track]]
        if other:
            rows = first_few([f"row {row}" for row in other])
            raise ValueError(f"{name} must be one for all frames of a track, got others at {rows}. Split the track.")
        return chosen


def for_all(value: Any, n: int) -> Any:
    """One integer or string is that of all rows."""
    return [value] * n if isinstance(value, (int, np.integer, str)) and not isinstance(value, bool) else value


def pooled(rows: Rows, tracks: Tracks, quality: Any = None) -> Tensor:
    """(T, D) float32 features of tracks: means of unit frames, weighted by quality, in which copies share a weight.

        w_i = quality_i / sum_j a_ij,   a_ij = clip((cos_ij - 0.95) / 0.05, 0, 1) over the frames j of the track

    Args:
        rows: N frames, L2-normalised.
        tracks: of the frames.
        quality: (N,) at least 0, such as a detector's confidence or a crop's sharpness; None: all alike.
    """
    weights = (
        torch.ones(rows.n, dtype=torch.float64, device="cpu") if quality is None else _checked_quality(quality, rows.n)
    )
    result = torch.empty((len(tracks.names), rows.dim), dtype=torch.float32, device=rows.device)
    order = torch.argsort(tracks.of_row, stable=True)
    for track, frames in enumerate(order.split(torch.bincount(tracks.of_row).tolist())):
        frame_weights = weights[frames].to(rows.device)
        x = rows.read(frames.to(rows.device), torch.float64)
        if not (frame_weights > 0).any():
            raise ValueError(
                f"quality must be above 0 for a frame of each track; track {tracks.names[track]!r} has none."
            )
        alike = ((x @ x.T - _ALIKE) / (1 - _ALIKE)).clamp_(0, 1).fill_diagonal_(1)
        # Frames of no quality do not share with others.
        shares = (alike * (frame_weights > 0)).sum(1).clamp(min=1)
        frame_weights /= shares
        total = frame_weights @ x
        if not float(torch.linalg.vector_norm(total)) > _CANCELLED * float(frame_weights.sum()):
            raise ValueError(
                f"features of a track must not cancel each other out; those of {tracks.names[track]!r} do. Split it."
            )
        result[track] = unit(total[None])[0]
    return result


def _checked_quality(quality: Any, n: int) -> Tensor:
    values = as_numpy(quality) if isinstance(quality, Tensor) else np.asarray(quality)
    if values.shape != (n,) or values.dtype.kind not in "iuf":
        raise ValueError(f"quality must hold one number per row, {n}, got shape {values.shape} of {values.dtype}.")
    weights = torch.from_numpy(values.astype(np.float64))
    if not (weights >= 0).all() or weights.isinf().any():
        raise ValueError(f"quality must be finite and at least 0, got values down to {weights.min():g}.")
    return weights
