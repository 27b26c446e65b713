"""Setting up accelerate: one process or several, on CPUs or GPUs, each with all weights."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from pose2id.io.checks import require_modules
from pose2id.training.settings import TrainingSettings

_DISTRIBUTED = ("NO", "MULTI_CPU", "MULTI_GPU")  # accelerate's names


def require_accelerate(device: str | None) -> None:
    """Raise if the extra is not installed, or the device is not there."""
    require_modules('Training needs the extra "train"', '"pose2id[train]"', "accelerate", "tensorboard")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or None, got {device!r}. CUDA_VISIBLE_DEVICES chooses a GPU.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' or None where torch finds no CUDA device, got 'cuda'.")


def new_accelerator(settings: TrainingSettings, directory: str | os.PathLike[str], device: str | None) -> Any:
    """An `accelerate.Accelerator` that logs into the directory; a ValueError if it is set up for something else."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs  # noqa: PLC0415
    from accelerate.utils import GradientAccumulationPlugin  # noqa: PLC0415

    # Where a process's samples all happen to be unconditional, its reference UNet takes no part.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)
    # The others wait while the first process fills the cache, validates, or writes tens of gigabytes.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=2))
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=settings.mixed_precision,
            # Not by number, which an environment variable would overrule.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.gradient_accumulation),
            dynamo_backend="no",  # whatever the environment says: compiled networks have other names in checkpoints
            kwargs_handlers=[parallel, patient],
            log_with="tensorboard",
            project_dir=directory,
        )
    except ValueError as error:
        rule = "be ones that this machine has, and those of the first run in this process"
        raise ValueError(f"mixed_precision and device must {rule} ({error}). Start Python anew.") from error
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would ignore it
        raise ValueError("mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'.")
    if accelerator.distributed_type not in _DISTRIBUTED:
        wanted = f"one process or several with all weights each ({', '.join(_DISTRIBUTED)})"
        given = accelerator.distributed_type.value
        raise ValueError(f"accelerate must be set up for {wanted}, got {given}. Run `accelerate config` again.")
    if device == "cuda" and accelerator.device.type != "cuda":
        wanted = f"what accelerate is set up for, {accelerator.device.type!r}, or None"
        raise ValueError(f"device must be {wanted}, got 'cuda'. See `accelerate env` and ACCELERATE_USE_CPU.")
    return accelerator


def said_by_main(content: Any) -> Any:
    """What the main process gives, in every process; the others give None."""
    from accelerate.utils import broadcast_object_list  # noqa: PLC0415

    return broadcast_object_list([content])[0]
