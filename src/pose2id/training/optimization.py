"""How weights follow gradients: the optimizer, its learning rate, and the average of weights."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import nn

from pose2id.training.settings import TrainingSettings

_EMA_START = 10  # the average forgets its first steps: its decay grows as (1 + n) / (10 + n)


def new_optimizer(settings: TrainingSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Of the parameters that are trained."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    kind: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(settings.optimizer)
    if kind is None:
        kind = import_module("bitsandbytes").optim.AdamW8bit
    elif parameters[0].is_cuda:
        options["fused"] = True  # or a step takes twice the weights' memory for what it computes on the way
    optimizer: torch.optim.Optimizer = kind(parameters, **options)
    return optimizer


def require_optimizer(settings: TrainingSettings) -> None:
    """Raise an ImportError that names the pip command if the optimizer's package is not there."""
    if settings.optimizer == "adamw8bit":
        try:
            import_module("bitsandbytes")
        except ImportError as error:
            raise ImportError(
                f"optimizer={settings.optimizer!r} needs bitsandbytes: pip install bitsandbytes ({error})."
            ) from error


def moving_average(parts: nn.Module, decay: float) -> Any:
    """A copy of the parts, to be updated after each step (`torch.optim.swa_utils.AveragedModel`)."""

    def update(averaged: Any, current: Any, count: Any) -> None:
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (_EMA_START + n)))

    return torch.optim.swa_utils.AveragedModel(parts, multi_avg_fn=update)


def rate(step: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, as a share of the highest."""
    rising = (step + 1) / settings.warmup_steps if step < settings.warmup_steps else 1.0
    if settings.schedule == "constant":
        return rising
    return rising * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
