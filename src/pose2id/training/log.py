"""What a training run measures: a line of JSON per step, an image per validation, and the same for TensorBoard."""

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
    """The log of a run from a step on; what a killed run logged after that step is dropped.

    Args:
        directory: of the run.
        step: steps that have been done.
        accelerator: of the process that writes, made with `log_with="tensorboard"`; None: nothing is written.

    Attributes:
        validations: step to what was measured then, in this start and those before.
    """

    def __init__(self, directory: Path, step: int, accelerator: Any = None) -> None:
        path = directory / FILE
        # A run that begins anew logs its first validation again.
        kept = [values for values in _logged(path) if step and values["step"] <= step]
        self._losses = [values["loss"] for values in kept if "loss" in values]
        self.validations = {values["step"]: values for values in kept if "loss" not in values}
        self._samples = directory / SAMPLES
        self._accelerator = accelerator
        if accelerator is None:
            return
        with whole_file(path) as unfinished:
            unfinished.write_text("".join(f"{json.dumps(values)}\n" for values in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        # accelerate's tracker flushes at every step, so the board has all earlier ones, and perhaps some of this one.
        accelerator.init_trackers(BOARD, init_kwargs={"tensorboard": {"purge_step": step}})
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
        """Log values of a step: the loss, or those of a validation."""
        if "loss" in values:
            self._losses.append(values["loss"])
        else:
            self.validations[step] = values
        if self._accelerator is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._show(step, values)

    def add_validation(self, step: int, sheet: Image.Image, **values: float) -> None:
        """Log a validation: the images that were generated, on one RGB sheet, and how good they are."""
        self._samples.mkdir(exist_ok=True)
        with whole_file(self._picture(step)) as unfinished:
            sheet.save(unfinished, "png")
        self.add(step, **values)
        self._show_picture(step, sheet)

    def recent_loss(self) -> float:
        """Mean over the last 100 steps; NaN: there were none."""
        recent = self._losses[-RECENT:]
        return sum(recent) / len(recent) if recent else float("nan")

    def close(self) -> None:
        """End the log."""
        if self._accelerator is not None:
            self._file.close()
            # Not `end_training`, which would leave the process without its group, and so without a second run.
            self._accelerator.get_tracker(BOARD).finish()

    def _picture(self, step: int) -> Path:
        return self._samples / f"step-{step:08d}.png"

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        self._accelerator.log({name: value for name, value in values.items() if name != "step"}, step=step)

    def _show_picture(self, step: int, picture: Image.Image) -> None:
        batch = {"samples": np.asarray(picture)[None]}
        self._accelerator.get_tracker(BOARD).log_images(batch, step=step, dataformats="NHWC")


def _logged(path: Path) -> list[dict[str, Any]]:
    """What a file's whole lines hold; a killed run may have left part of one."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    try:
        values: list[dict[str, Any]] = [dict(json.loads(line)) for line in lines]
        if all("step" in of_line for of_line in values):
            return values
    except (RecursionError, TypeError, ValueError):
        pass
    raise ValueError(f"{path} is damaged: each line must be JSON with a step. Remove it; only the log is lost.")
