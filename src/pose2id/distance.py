"""Distances between rows, in full float32 precision whatever the caller set for speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pose2id._inputs import Rows


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run without gradients and with true float32 products.

    Callers may sit under autocast, or have allowed TF32 or bfloat16 products for their model, which would reorder
    neighbours. Their settings are restored on the way out.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
            settings: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
            before = [setting.fp32_precision for setting in settings]
            try:
                for setting in settings:
                    setting.fp32_precision = "ieee"
                yield
            finally:
                for setting, precision in zip(settings, before, strict=True):
                    setting.fp32_precision = precision
        else:
            precision = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision("highest")
                yield
            finally:
                torch.set_float32_matmul_precision(precision)


def squared_euclidean(x: Tensor, y: Tensor, x_squares: Tensor, y_squares: Tensor) -> Tensor:
    """(B, G) squared Euclidean distances of rows x (B, D) and y (G, D) from their (B,) and (G,) squared norms.

    |x|^2 + |y|^2 - 2 x.y as one matrix product, not clamped: rounding leaves equal rows near 0, on either side of it.
    """
    return torch.addmm(y_squares[None, :], x, y.T, alpha=-2).add_(x_squares[:, None])


def squared_distances(x: Tensor, rows: Rows) -> Tensor:
    """(B, n) squared Euclidean distances of x (B, D) to all rows, which are read block by block, in the dtype of x."""
    squares = x.square().sum(1)
    result = x.new_empty((len(x), rows.n))
    for part in rows.blocks():
        other = rows.read(part, x.dtype)
        result[:, part] = squared_euclidean(x, other, squares, other.square().sum(1))
    return result
