"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import nn

from pose2id.io.checks import require_modules
from pose2id.training.settings import TrainingSettings


def new_optimizer(settings: TrainingSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained; its learning rate is set before each step."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    kind: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(settings.optimizer)
    if kind is None:
        kind = import_module("bitsandbytes").optim.AdamW8bit
    elif parameters[0].is_cuda:
        options["fused"] = True  # otherwise a step's temporaries take twice the weights' memory
    return kind(parameters, **options)


def require_optimizer(settings: TrainingSettings) -> None:
    """Raise an ImportError that names the pip command if the optimizer's package is not installed."""
    if settings.optimizer == "adamw8bit":
        require_modules("optimizer='adamw8bit' needs bitsandbytes", "bitsandbytes", "bitsandbytes")


def rate(step: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, from 0 on, as a share of the highest."""
    # Not diffusers.get_scheduler: its warm-up begins with a rate of 0, a step that learns nothing, and its cosine only
    # after the warm-up, so every rate of such a run would differ.
    rising = (step + 1) / settings.warmup_steps if step < settings.warmup_steps else 1.0
    if settings.schedule == "constant":
        return rising
    return rising * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
