"""Checkpoints of a training run: one directory each, which appears whole or not at all.

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
_WHOLE_FILES = r"run\.json|metrics\.jsonl|step-\d+\.png|README\.md"
_HALF_WRITTEN = re.escape(_UNFINISHED) + rf"[0-9a-f]{{8}}|\.({_WHOLE_FILES})\.[0-9a-f]{{16}}"
WEIGHTS, _PREVIOUS = "weights", ".previous-weights"


def found(directory: Path) -> list[Path]:
    """Checkpoints of a run, the newest last."""
    steps = [path for path in directory.iterdir() if re.fullmatch(rf"{_PREFIX}\d+", path.name)]
    return sorted(steps, key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many steps had been done."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def write(
    directory: Path, step: int, state: Mapping[str, Any], save_weights: Callable[[Path], None], *, keep: int
) -> None:
    """Write the checkpoint of a step, then remove all but the `keep` newest.

    `state` is for `read`; `save_weights` gets a new directory. If it fails, older checkpoints are as
    they were, and nothing of this one is left.
    """
    unfinished = _unfinished(directory)
    try:
        unfinished.mkdir()
        save_weights(unfinished / WEIGHTS)
        _save(state, unfinished / _STATE)
        to_disk(unfinished)
        unfinished.replace(directory / f"{_PREFIX}{step:08d}")
        _to_disk(directory)
    except OSError as error:
        older = "Older ones are as they were" if found(directory) else "It is the first"
        what = f"the checkpoint of step {step} cannot be written to {directory}: {error}"
        raise OSError(f"{what}. {older}; make room and start the run again.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    prune(directory, keep)


def prune(directory: Path, keep: int) -> None:
    """Remove all checkpoints but the newest."""
    for old in found(directory)[:-keep]:
        # Renamed first: what is half removed must not pass for a checkpoint.
        shutil.rmtree(old.rename(_unfinished(directory)), ignore_errors=True)


def read(checkpoint: Path, *, mapped: bool = False) -> dict[str, Any]:
    """The state that was written, on the CPU; `mapped`: its tensors are read from the file when they are used."""
    path = checkpoint / _STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        what = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({type(error).__name__})"
        raise ValueError(f"{path} is {what}. Remove {checkpoint} to go on from the checkpoint before it.") from error
    return state


def publish(directory: Path) -> None:
    """Copy the newest checkpoint's weights to `weights`, in place of older ones, which stay if that fails."""
    newest, target, unfinished = found(directory)[-1], directory / WEIGHTS, _unfinished(directory)
    try:
        shutil.copytree(newest / WEIGHTS, unfinished)
        to_disk(unfinished)
        if target.exists():
            target.rename(directory / _PREVIOUS)
        unfinished.replace(target)
        _to_disk(directory)
    except OSError as error:
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        what = f"training is complete, but its weights cannot be copied to {target}: {reason}"
        raise OSError(f"{what}. They are in {newest / WEIGHTS}; make room and start the run again.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        _settle_previous(directory)


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed run left half-written: directories, and files of `whole_file`. Nothing else is touched."""
    _settle_previous(directory)
    for path in (*directory.glob("*"), *directory.glob("*/*"), *directory.glob("*/*/*")):
        if re.fullmatch(_HALF_WRITTEN, path.name):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def to_disk(directory: Path) -> None:
    """Wait until a directory has reached the disk: a rename may get there before its content does."""
    for path in (*directory.rglob("*"), directory):
        _to_disk(path)


def _save(state: Mapping[str, Any], path: Path) -> None:
    """`torch.save`; the RuntimeError that it makes of a full disk is an OSError again, one of a device stays."""
    try:
        with path.open("xb") as file:
            torch.save(dict(state), file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _settle_previous(directory: Path) -> None:
    """Put older weights, which new ones were about to replace, back in their place if these did not come."""
    previous, target = directory / _PREVIOUS, directory / WEIGHTS
    if previous.exists() and not target.exists():
        previous.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def _unfinished(directory: Path) -> Path:
    """A new hidden name, which `remove_unfinished` knows."""
    return directory / f"{_UNFINISHED}{secrets.token_hex(4)}"


def _to_disk(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # Windows opens no directories, and syncs what may be written
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
