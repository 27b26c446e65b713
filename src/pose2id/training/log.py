"""What a training run measures: a line of JSON a step, a picture of each validation, and the same for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pose2id.io.whole_files import whole_file

FILE, BOARD, SAMPLES = "metrics.jsonl", "tensorboard", "samples"
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
        self._samples = directory / SAMPLES
        self._file: Any = None
        if not write:
            return
        with whole_file(path) as unfinished:
            unfinished.write_text("".join(f"{json.dumps(values)}\n" for values in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra

        # The board has everything of earlier steps (`flush`), and nobody knows what it has of this one.
        self._board: Any = SummaryWriter(str(directory / BOARD), purge_step=step)
        for values in kept:
            if values["step"] == step:
                self._show(step, values)
        for picture in self._samples.glob("step-*.png"):
            number = picture.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                picture.unlink()
        if step in self.validations and self._picture(step).exists():
            with Image.open(self._picture(step)) as content:
                self._show_picture(step, content)

    def add(self, step: int, **values: float) -> None:
        """Record values of a step: the loss, or those of a validation."""
        if "loss" in values:
            self._losses.append(values["loss"])
        else:
            self.validations[step] = values
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._show(step, values)

    def add_validation(self, step: int, sheet: Image.Image, **values: float) -> None:
        """Record a validation: what was generated, RGB, and how good it is."""
        self._samples.mkdir(exist_ok=True)
        with whole_file(self._picture(step)) as unfinished:
            sheet.save(unfinished, "png")
        self.add(step, **values)
        self._show_picture(step, sheet)
        self.flush()

    def flush(self) -> None:
        """Have TensorBoard's events written; it keeps them for minutes."""
        if self._file is not None:
            self._board.flush()

    def recent_loss(self) -> float:
        """Mean over the last 100 steps."""
        recent = self._losses[-RECENT:]
        return sum(recent) / len(recent) if recent else float("nan")

    def close(self) -> None:
        """Nothing more will come."""
        if self._file is not None:
            self._file.close()
            self._board.close()

    def _picture(self, step: int) -> Path:
        return self._samples / f"step-{step:08d}.png"

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name != "step":
                self._board.add_scalar(name, value, step)

    def _show_picture(self, step: int, picture: Image.Image) -> None:
        self._board.add_image("samples", np.asarray(picture), step, dataformats="HWC")


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
