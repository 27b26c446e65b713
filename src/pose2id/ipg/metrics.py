"""What a training run measures: a line of JSON a step, and the same for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pose2id._outputs import whole_file

FILE, BOARD = "metrics.jsonl", "tensorboard"
RECENT = 100  # steps whose mean is the loss of a run


class Metrics:
    """The record of a run, from the step on that it starts at; what a killed run recorded after it is dropped.

    Args:
        directory: of the run.
        step: steps that have been done.
        write: False on all processes but the main one: nothing is written.

    Attributes:
        validations: step to what was measured then, of this start and of those before.
    """

    def __init__(self, directory: Path, step: int, *, write: bool) -> None:
        path = directory / FILE
        # A run that begins anew records what it starts from again.
        kept = [values for values in _recorded(path) if step and values["step"] <= step]
        self._losses = [values["loss"] for values in kept if "loss" in values]
        self.validations = {values["step"]: values for values in kept if "loss" not in values}
        self._file: Any = None
        if not write:
            return
        with whole_file(path) as unfinished:
            unfinished.write_text("".join(f"{json.dumps(values)}\n" for values in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra

        self._board: Any = SummaryWriter(str(directory / BOARD), purge_step=step + 1 if step else 0)

    def add(self, step: int, **values: float) -> None:
        """Record values of a step."""
        if "loss" in values:
            self._losses.append(values["loss"])
        else:
            self.validations[step] = values
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def add_picture(self, step: int, picture: Image.Image) -> None:
        """Record a picture, RGB."""
        if self._file is not None:
            self._board.add_image("samples", np.asarray(picture), step, dataformats="HWC")

    def recent_loss(self) -> float:
        """Mean over the last 100 steps."""
        recent = self._losses[-RECENT:]
        return sum(recent) / len(recent) if recent else float("nan")

    def close(self) -> None:
        """Nothing more will come."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def _recorded(path: Path) -> list[dict[str, Any]]:
    """What a file's whole lines hold; a killed run may have left part of one."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    try:
        values: list[dict[str, Any]] = [dict(json.loads(line)) for line in lines]
        if all("step" in of_line for of_line in values):
            return values
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{path} is damaged: each line must be JSON with a step. Remove it; only the record is lost.")
