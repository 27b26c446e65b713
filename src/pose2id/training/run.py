"""Training IPG: from a table of images with poses to weights that `IdentityGenerator.from_pretrained` loads.

A run is a directory. Started again with the same settings, it goes on from its newest checkpoint and ends with the
weights of a run that was never interrupted. Needs the extra: pip install "pose2id[train]".
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pose2id.centralization.diagnostics import GenerationDiagnostics
from pose2id.io.checks import checked_flag
from pose2id.ipg.generator import IdentityGenerator
from pose2id.training import cache, checkpoints
from pose2id.training.accelerator import new_accelerator, require_accelerate, said_by_main
from pose2id.training.cleansed_people import Cleansed, cleanse, key_of
from pose2id.training.log import Metrics
from pose2id.training.objective import TRAINED, Objective, TrainedParts, checkpoint_gradients
from pose2id.training.optimizer import new_optimizer, rate, require_optimizer
from pose2id.training.pairs import Pairs, PairSettings, require_pairs, select
from pose2id.training.run_directory import RunDirectory, require_directory
from pose2id.training.settings import TrainingSettings
from pose2id.training.table import PersonImage, check_people
from pose2id.training.validation import people_shown, require_people, validate

logger = logging.getLogger(__name__)

_MOST_SKIPPED = 100  # steps in a row that a scaler may leave out
_TELL_EVERY = 60  # seconds, where no bar is shown


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        weights: directory for `IdentityGenerator.from_pretrained`.
        step: how many steps were done, in all starts of the run.
        loss: mean over the last 100 steps.
        diagnostics: of the last validation of this start, by the identity encoder; None: there was none.
    """

    weights: Path
    step: int
    loss: float
    diagnostics: GenerationDiagnostics | None


def train(
    generator: IdentityGenerator,
    images: Sequence[PersonImage],
    directory: str | os.PathLike[str],
    *,
    validation: Sequence[Any] | None = None,
    origin: str = "",
    device: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> TrainingResult:
    """Train a generator's UNets, identity tokens and pose encoder (eq. 6); VAE and identity encoder stay frozen.

    With several processes (`accelerate launch`), each calls this. The run writes into its directory: `run.json`
    (settings), `metrics.jsonl` (loss of every step, validations), `tensorboard`, `samples` (contact sheets),
    checkpoints `step-*` with weights and all that is needed to go on, at the end `weights`; `latents` with `cache`.

    Args:
        generator: where to start: `start.start`, `start.fresh`, or any `IdentityGenerator`. Its networks are trained in
            place, in float32 on the device of training. Its `round_bank` has no part in training.
        images: of people with two images or more. An image with a valid pose (`poses.check_pose`; with `poses="all"`
            a drawable one, `pairs.is_drawable`) is a target, any other of the same person its reference. Unreadable
            images, what data cleansing drops (unless `clean=False`), and people without a pair are left out and logged.
        directory: new or empty, or that of a run to go on with. Images must be the same then, and so must settings,
            except those that the weights do not depend on (`settings.FREE`) and, with a constant rate, `steps` if they
            are given. A run of a version without data cleansing goes on without it, and with the poses it had.
        validation: people to generate in validations: `PersonImage`s, of which each person's first one is taken, or
            images of different people as `IdentityGenerator.generate` takes them. None: people of `images`.
        origin: what the generator is started from, in words, for the weights' model card.
        device: "cpu" to train there even if there is a GPU, "cuda" to train on a GPU or not at all; None: what
            accelerate finds.
        progress: show bars on a terminal.
        **settings: of `settings.TrainingSettings`, by name.

    Returns:
        Where the weights are, and how well they do.

    Raises:
        FileExistsError: the directory holds something else, or weights of a run whose checkpoints are gone, or another
            process trains in it.
        FloatingPointError: the loss is not finite any more; the last checkpoint is kept.
        ImportError: the extra is not installed.
        OSError: a checkpoint cannot be written; older ones are kept.
    """
    place = RunDirectory(Path(directory).expanduser())
    given = TrainingSettings(**{**place.older_defaults(), **settings})
    checked_flag(progress, "progress")
    if not isinstance(generator, IdentityGenerator):
        raise TypeError(f"generator must be an IdentityGenerator, got {type(generator).__name__}.")
    generator.described()  # what cannot be saved is told now, not when the first checkpoint is due
    require_ready(given, images, directory, device, validation)
    accelerator = new_accelerator(given, place.path, device)
    longer = given.schedule == "constant" and "steps" in settings  # with a cosine, all rates would differ
    try:
        return _Run(accelerator, generator, images, place, given, validation, origin, longer, progress).train()
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            logger.warning("interrupted; started again, the run goes on from %s", place.newest())
        raise
    finally:
        place.release()
        for name in TRAINED:  # ready to generate
            generator.parts[name].eval().requires_grad_(False)
        checkpoint_gradients(generator, False)


def require_ready(
    settings: TrainingSettings,
    images: Sequence[PersonImage],
    directory: str | os.PathLike[str],
    device: str | None,
    validation: Sequence[Any] | None = None,
) -> None:
    """What `train` checks before it has a generator: errors that come before a long download."""
    require_optimizer(settings)
    require_accelerate(device)
    check_people(images)
    require_pairs(images)
    require_people(images if validation is None else validation, settings.validation_images)
    require_directory(directory)


class _Run:
    """One start of a run: everything is set up, then `train` steps; `longer`: whether `steps` may be new."""

    def __init__(
        self,
        accelerator: Any,
        generator: IdentityGenerator,
        images: Sequence[PersonImage],
        directory: RunDirectory,
        settings: TrainingSettings,
        validation: Sequence[Any] | None,
        origin: str,
        longer: bool,
        progress: bool,
    ) -> None:
        self.accelerator, self.directory, self.settings = accelerator, directory, settings
        self.main: bool = accelerator.is_main_process
        self.progress = progress and self.main
        parts = accelerator.num_processes * settings.gradient_accumulation
        if settings.batch_size % parts:
            given = f"{settings.batch_size} with {accelerator.num_processes} x {settings.gradient_accumulation}"
            raise ValueError(f"batch_size must be a multiple of processes x gradient_accumulation, got {given}.")
        self.share = settings.batch_size // parts
        self.generator = generator.to(accelerator.device, torch.float32)
        if self.main:
            directory.claim(settings, generator, origin=origin, longer=longer)
        selection = select(images, poses=settings.poses, cleanse=self._cleansed if settings.clean else None)
        if self.main:
            level = logging.WARNING if selection.unreadable or selection.alone else logging.INFO
            logger.log(level, "%s", selection)
            directory.begin(selection)
        accelerator.wait_for_everyone()
        self.pairs = Pairs(selection, PairSettings.of(settings, generator))
        if settings.cache:
            if self.main:
                cache.build(directory.path, self.pairs, generator, workers=settings.workers, progress=self.progress)
            accelerator.wait_for_everyone()
            self.pairs.latents = cache.Latents(directory.path, self.pairs)
        self.people = people_shown(selection.images if validation is None else validation, settings.validation_images)
        self.objective = Objective(generator.scheduler, settings.snr_gamma)
        networks = TrainedParts(generator.networks).train()
        checkpoint_gradients(networks, settings.gradient_checkpointing)
        # diffusers' default decay: the average forgets its first steps.
        self.average = None if settings.ema is None else diffusers.EMAModel(networks.parameters(), decay=settings.ema)
        optimizer = new_optimizer(settings, [p for p in networks.parameters() if p.requires_grad])
        self.networks, self.optimizer = accelerator.prepare(networks, optimizer)
        self.step = self.skipped = 0
        self.diagnostics: GenerationDiagnostics | None = None
        self._resume()
        self.metrics = Metrics(directory.path, self.step, accelerator if self.main else None)
        if self.main:
            directory.write()

    def _cleansed(self, images: list[PersonImage], digests: list[str]) -> Cleansed:
        """The main process decides: features of several devices may differ in the last digits."""
        found = None
        if self.main:
            known = self.directory.recorded_cleansing(key_of(images, digests, self.generator))
            workers = self.settings.workers
            found = cleanse(images, digests, self.generator, known, workers=workers, progress=self.progress)
        return cast("Cleansed", said_by_main(found))

    def train(self) -> TrainingResult:
        """All steps that are left."""
        given = self.settings
        batches = iter(self._loader())
        bar = tqdm(total=given.steps, initial=self.step, unit="step", disable=None if self.progress else True)
        with bar, closing(self.metrics):
            self._validate()  # what training starts from, or what a killed run did not get to
            told = time.monotonic()
            while self.step < given.steps:
                loss = self._optimize(batches)
                self.step += 1
                self.metrics.add(self.step, loss=loss)
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}")
                if self.step == given.steps or self.step % given.checkpoint_every == 0:
                    self._checkpoint()  # first: a validation may take long, or fail
                    told = time.monotonic()
                self._validate()
                if self.main and bar.disable and time.monotonic() - told > _TELL_EVERY:
                    told = time.monotonic()
                    self._tell()
        if self.main:
            self.directory.publish(self.step, keep=given.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        final = self.directory.path / checkpoints.WEIGHTS
        return TrainingResult(final, self.step, self.metrics.recent_loss(), self.diagnostics)

    def _optimize(self, batches: Iterator[dict[str, Tensor]]) -> float:
        """One step; the mean loss of its samples."""
        given, accelerator = self.settings, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = given.learning_rate * rate(self.step, given)
        losses = []
        for _ in range(given.gradient_accumulation):
            with accelerator.accumulate(self.networks):
                loss = self._loss(next(batches))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.networks.parameters(), given.max_grad_norm or math.inf)
                    self._check_gradient(float(norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        if self.average is not None:
            self.average.step(self.networks.parameters())
        mean = float(accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
        self._check_finite(mean, "loss")
        return mean

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The objective of a batch (eq. 6)."""
        unconditional = batch.pop("unconditional")  # stays on the CPU, where it decides shapes
        sample = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        if "target" in sample:
            sample["target_latents"] = self.generator.encode_images(sample["target"])
            sample["reference_latents"] = self.generator.encode_images(sample["reference"])
            sample["features"] = cache.identity_features(self.generator.networks, sample["identity"])
        latents, noise, timesteps = sample["target_latents"], sample["noise"], sample["timestep"]
        prediction = self.networks(
            self.objective.noisy(latents, noise, timesteps),
            timesteps,
            sample["pose"],
            sample["reference_latents"],
            sample["features"],
            unconditional,
        )
        return self.objective.loss(prediction, self.objective.target(latents, noise, timesteps), timesteps)

    def _check_gradient(self, norm: float) -> None:
        """A scaler, fp16's, leaves out steps without finite gradients: now and then that is how it works."""
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.accelerator.scaler is None or self.skipped == _MOST_SKIPPED:
            several = f" in each of {self.skipped} steps up to the end" if self.skipped > 1 else ""
            self._check_finite(norm, f"norm of the gradient{several}")

    def _check_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            remedy = "Checkpoints are kept; try a lower learning_rate, or bf16 in place of fp16"
            raise FloatingPointError(f"the {what} of step {self.step + 1} is {value}. {remedy}.")

    def _loader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches of this process from the next step on."""
        given, processes, rank = self.settings, self.accelerator.num_processes, self.accelerator.process_index
        parts = range(self.step * given.gradient_accumulation, given.steps * given.gradient_accumulation)
        # Ranges, not lists: a long run has millions of numbers.
        firsts = ((part * processes + rank) * self.share for part in parts)
        order: Any = [range(first, first + self.share) for first in firsts]
        return DataLoader(self.pairs, batch_sampler=order, num_workers=given.workers)

    def _validate(self) -> None:
        """Validate if it is due and this step has not been validated; the checkpoint's model card tells."""
        every = self.settings.validate_every
        due = self.step == self.settings.steps or (every and self.step % every == 0)
        if due and self.main and self.people:
            new = self.step not in self.metrics.validations
            if new:
                logger.info("validating step %d: images of %d people", self.step, len(self.people))
                with self._averaged() as generator:
                    sheet, found = validate(generator, self.people, self.settings)
                self.diagnostics = found
                values = {name: getattr(found, name) for name in ("retention", "own_cosine", "other_cosine")}
                self.metrics.add_validation(self.step, sheet, **values)
            self.directory.update_card(self.step, self.metrics, new=new)
        if due:
            self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        known = checkpoints.found(self.directory.path)
        if not known:
            return
        # On a CPU the optimizer would keep the file mapped for as long as it runs.
        state = checkpoints.read(known[-1], mapped=self.accelerator.device.type != "cpu")
        self.step = checkpoints.step_of(known[-1])
        for name, holder in self._stateful().items():
            holder.load_state_dict(state[name])
        if self.average is not None:
            self.average.to(self.accelerator.device)
        if self.main:
            logger.info("going on from step %d", self.step)

    def _checkpoint(self) -> None:
        def save_weights(path: Path) -> None:
            with self._averaged() as generator:
                generator.save_pretrained(path, notes=self.directory.notes(self.step, self.metrics))

        if self.main:
            self._tell()
            state = {name: holder.state_dict() for name, holder in self._stateful().items()}
            keep = self.settings.keep_checkpoints
            checkpoints.write(self.directory.path, self.step, state, save_weights, keep=keep)
        self.accelerator.wait_for_everyone()

    def _stateful(self) -> dict[str, Any]:
        """What a checkpoint holds the state of, by name."""
        # Not accelerate's save_state: its load_state unpickles registered objects, such as the EMA, and so runs code
        # that a file may hold (measured, 1.15), and sets the caller's random states of Python, numpy and torch.
        holders = {
            "networks": self.accelerator.unwrap_model(self.networks),
            "optimizer": self.optimizer,
            "average": self.average,
            "scaler": self.accelerator.scaler,
        }
        return {name: holder for name, holder in holders.items() if holder is not None}

    def _tell(self) -> None:
        logger.info("step %d of %d, loss %.4f", self.step, self.settings.steps, self.metrics.recent_loss())

    @contextmanager
    def _averaged(self) -> Iterator[IdentityGenerator]:
        """The generator with the weights that are written: the average, if there is one."""
        average, networks = self.average, self.accelerator.unwrap_model(self.networks)
        if average is not None:
            average.store(networks.parameters())
        try:
            if average is not None:
                average.copy_to(networks.parameters())
            yield self.generator.replaced(**self.directory.origin)
        finally:
            if average is not None:
                average.restore(networks.parameters())
            networks.train()
