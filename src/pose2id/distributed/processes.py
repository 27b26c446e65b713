"""Processes that accelerate (`accelerate launch`) or torchrun started, one a GPU: which one this is, and its device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from pose2id.io.checks import require_modules


class Processes:
    """This process among several.

    Attributes:
        index: of this process, from 0.
        count: of all processes.
        device: this process's own.
    """

    def __init__(self, state: Any) -> None:
        self.index, self.count, self.device = int(state.process_index), int(state.num_processes), state.device

    def total(self, *numbers: int) -> list[int]:
        """The sums of all processes' numbers, which wait for each other here."""
        from accelerate.utils import reduce  # noqa: PLC0415

        together: torch.Tensor = reduce(torch.tensor(numbers, dtype=torch.int64, device=self.device), "sum")
        return [int(number) for number in together.tolist()]


def are_several() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def several(device: str | None = None) -> Iterator[Processes]:
    """Join the others, and leave them at the end.

    Args:
        device: "cpu"; None or "cuda": a GPU for each process where there are any.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: a device of one process alone, or that is not there.
    """
    if device not in (None, "cpu", "cuda"):
        rule = "must be 'cpu' or 'cuda', or be left out, where a launcher started several processes"
        raise ValueError(f"device {rule}, got {device!r}. Each takes its own GPU.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' or None where torch finds no CUDA device, got 'cuda'.")
    require_modules('Several processes need the extra "distributed"', '"pose2id[distributed]"', "accelerate")
    from accelerate import PartialState  # noqa: PLC0415

    # The first one to end waits for the last one, which may have had more to do.
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=2))
    try:
        yield Processes(state)
    finally:
        state.destroy_process_group()
