"""Distances between rows, in full float32 precision whatever the caller set for speed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pose2id.io.threads import use_threads

_LOCK = threading.RLock()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run without gradients and with true float32 products, one thread at a time.

    Callers may sit under autocast, or have allowed TF32 or bfloat16 products for their model, which would reorder
    neighbours, and half-precision products that are added up in half precision. Their settings are restored on the
    way out; they are the process's, hence the lock.
    """
    use_threads(device)
    with _LOCK, torch.no_grad(), torch.autocast(device.type, enabled=False), _float32_sums():
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
            settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
            changed = [(setting, setting.fp32_precision) for setting in settings if setting.fp32_precision != "ieee"]
            try:
                for setting, _ in changed:
                    setting.fp32_precision = "ieee"
                yield
            finally:
                for setting, precision in changed:
                    setting.fp32_precision = precision
        else:
            precision = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision("highest")
                yield
            finally:
                torch.set_float32_matmul_precision(precision)


@contextmanager
def _float32_sums() -> Iterator[None]:
    settings: Any = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")  # the second from torch 2.7 on
    before = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    try:
        for name in before:
            setattr(settings, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def squared_euclidean(x: Tensor, y: Tensor, x_squares: Tensor, y_squares: Tensor) -> Tensor:
    """(B, G) squared Euclidean distances of rows x (B, D) and y (G, D) from their (B,) and (G,) squared norms.

    |x|^2 + |y|^2 - 2 x.y as one matrix product, not clamped: rounding leaves equal rows near 0, on either side of it.
    """
    return torch.addmm(y_squares[None, :], x, y.T, alpha=-2).add_(x_squares[:, None])


def nearest_columns(distances: Tensor, count: int) -> Tensor:
    """(B, count) columns of the smallest entries of each row, ascending, equal ones by the lower column."""
    use_threads(distances.device, distances.numel())
    values, columns = distances.topk(count, dim=1, largest=False)
    columns, order = columns.sort(dim=1)
    columns = columns.gather(1, values.gather(1, order).argsort(dim=1, stable=True))
    # topk chooses freely among what equals its last value.
    within = distances <= values[:, -1:]
    for row in torch.nonzero(within.sum(1) > count).flatten().tolist():
        near = torch.nonzero(within[row]).flatten()
        columns[row] = near[distances[row, near].argsort(stable=True)[:count]]
    return columns
