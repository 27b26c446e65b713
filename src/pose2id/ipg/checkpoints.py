"""Checkpoints of a training run: one directory a checkpoint, there as a whole or not at all.

`step-00001000/weights` is what `IdentityGenerator.from_pretrained` loads, `step-00001000/training.pt` what a run needs
to go on: tensors and plain values, read without running code.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_PREFIX = "step-"
_UNFINISHED = ".unfinished-"
_STATE = "training.pt"
_HALF_WRITTEN = re.escape(_UNFINISHED) + r"[0-9a-f]{8}|\.(run\.json|metrics\.jsonl|step-\d+\.png)\.[0-9a-f]{16}"
WEIGHTS = "weights"


def found(directory: Path) -> list[Path]:
    """Checkpoints of a run, the newest last."""
    steps = [path for path in directory.iterdir() if re.fullmatch(rf"{_PREFIX}\d+", path.name)]
    return sorted(steps, key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many steps had been done."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def write(
    directory: Path, step: int, state: Mapping[str, Any], save_weights: Callable[[Path], None], *, keep: int
) -> Path:
    """Write a checkpoint, then remove all but the `keep` newest.

    Args:
        directory: of the run.
        step: how many steps have been done.
        state: tensors and plain values, for `read`.
        save_weights: writes the weights into a directory that isn't there.
        keep: at least 1.

    Returns:
        The checkpoint.

    Raises:
        OSError: it could not be written; older checkpoints are as they were, and nothing of this one is left.
    """
    target = directory / f"{_PREFIX}{step:08d}"
    unfinished = directory / f"{_UNFINISHED}{secrets.token_hex(4)}"
    try:
        unfinished.mkdir()
        save_weights(unfinished / WEIGHTS)
        torch.save(dict(state), unfinished / _STATE)
        for path in (*unfinished.rglob("*"), unfinished):
            _to_disk(path)
        unfinished.replace(target)
        _to_disk(directory)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError) as error:  # torch raises the latter when a disk is full
        raise OSError(
            f"the checkpoint of step {step} cannot be written to {directory}: {error}. Older checkpoints are as they "
            "were; make room and start the run again, it goes on from the newest."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in found(directory)[:-keep]:
        # Renamed first: what is half removed must not pass for a checkpoint.
        doomed = old.rename(directory / f"{_UNFINISHED}{secrets.token_hex(4)}")
        shutil.rmtree(doomed, ignore_errors=True)
    return target


def read(checkpoint: Path) -> dict[str, Any]:
    """The state that was written, on the CPU.

    Raises:
        ValueError: a damaged or missing file; with what to do.
    """
    path = checkpoint / _STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        what = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({type(error).__name__})"
        raise ValueError(f"{path} is {what}. Remove {checkpoint} to go on from the checkpoint before it.") from error
    return state


def publish(directory: Path) -> None:
    """Copy the newest checkpoint's weights to `weights` in the run's directory, unless that is there."""
    target = directory / WEIGHTS
    if target.exists():
        return
    unfinished = directory / f"{_UNFINISHED}{secrets.token_hex(4)}"
    try:
        shutil.copytree(found(directory)[-1] / WEIGHTS, unfinished)
        unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def make_last(checkpoint: Path, steps: int) -> None:
    """See that a run of so many steps can go on from its newest checkpoint; weights of a shorter run are removed.

    The checkpoint has the same weights.

    Raises:
        ValueError: the run has done more steps.
    """
    done, published = step_of(checkpoint), checkpoint.parent / WEIGHTS
    if steps < done:
        raise ValueError(
            f"steps must be at least the {done} that the run in {checkpoint.parent} has done, got {steps}. Weights of "
            "earlier steps are in its older checkpoints, as far as they were kept."
        )
    if steps > done and published.exists():
        doomed = published.rename(checkpoint.parent / f"{_UNFINISHED}{secrets.token_hex(4)}")
        shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed run left half-written: directories, and files of `whole_file`. Nothing else is touched."""
    for path in (*directory.glob("*"), *directory.glob("*/*")):
        if re.fullmatch(_HALF_WRITTEN, path.name):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Wait until a file or directory has reached the disk: a rename may get there before its content does."""
    with contextlib.suppress(PermissionError):  # Windows opens no directories, and syncs what may be written
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
