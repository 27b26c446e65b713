"""Training IPG: from a table of images with poses to weights that `IdentityGenerator.from_pretrained` loads.

A run is a directory. Started again with the same settings, it goes on from its newest checkpoint, and ends with the
weights of a run that was never interrupted. Needs the extra: pip install "pose2id[train]".
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import pose2id
from pose2id.centralization.diagnostics import GenerationDiagnostics, generation_diagnostics
from pose2id.io.whole_files import whole_file
from pose2id.ipg.batch import contact_sheet, fingerprint, stacked
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.pixels import load_poses, load_reference, pixels
from pose2id.ipg.weights import CARD, model_card, require_saveable
from pose2id.training import checkpoints
from pose2id.training.cache import Latents, build, identity_features
from pose2id.training.log import RECENT, Metrics
from pose2id.training.objective import TRAINED, Objective, TrainedParts
from pose2id.training.optimization import moving_average, new_optimizer, rate, require_optimizer
from pose2id.training.pairs import Pairs, PairSettings, Selection, require_pairs, select
from pose2id.training.run_directory import RunDirectory, require_directory
from pose2id.training.settings import FREE, TrainingSettings, checked_settings
from pose2id.training.table import PersonImage

logger = logging.getLogger(__name__)

LATENTS = "latents"
_MOST_SKIPPED = 100  # steps in a row that a scaler may leave out
_TELL_EVERY = 60  # seconds, where no bar is shown
_DISTRIBUTED = ("NO", "MULTI_CPU", "MULTI_GPU")  # as accelerate calls them


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        weights: directory for `IdentityGenerator.from_pretrained`.
        step: how many steps were done, in all starts of the run.
        loss: mean over the last 100 steps.
        diagnostics: of the last validation since this start, by the identity encoder; None: there was none.
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
    """Train a generator's UNets, identity tokens and pose encoder; VAE and identity encoder stay as they are (eq. 6).

    With several processes (`accelerate launch`), each calls this. What the run writes into its directory: `run.json`
    (settings), `metrics.jsonl` (loss of every step, validations), `tensorboard`, `samples` (contact sheets),
    checkpoints `step-*` with weights and what it takes to go on, at the end `weights`; `latents` with `cache`.

    Args:
        generator: where to start: `starting.start`, `starting.fresh`, or any `IdentityGenerator`. Its parts are trained
            in place, in float32 on the device of training. Its `round_bank` has no part in training.
        images: of people with two images or more. An image with a valid pose (`pairs.has_valid_pose`) is a target, any
            other of the same person its reference. Unreadable images and people without a pair are left out, with a
            report in the log.
        directory: new or empty, or that of a run to go on with. Images must be the same then, and so must settings, but
            for those that the weights do not depend on (`settings.FREE`) and, where a constant rate allows it and they
            are given, `steps`.
        validation: people to be generated in validations: `PersonImage`s, of which each person's first one is taken, or
            images of different people as `IdentityGenerator.generate` takes them. None: people that are trained on.
        origin: what the generator is started from, in words; the weights' model card says it.
        device: "cpu" to train there even if there is a GPU, "cuda" to train on a GPU or not at all; None: what
            accelerate finds.
        progress: show bars on a terminal.
        **settings: of `settings.TrainingSettings`, by name.

    Returns:
        Where the weights are, and how well they do.

    Raises:
        FileExistsError: a directory with something else in it, or with weights of a run whose checkpoints are gone, or
            that somebody trains in.
        FloatingPointError: the loss is not finite any more; the last checkpoint is kept.
        ImportError: the extra is not installed.
        OSError: a checkpoint that can't be written; older ones are kept.
        TypeError, ValueError: bad input, named, such as a generator that `save_pretrained` can't write; images or
            settings other than those that the run began with.
    """
    given = checked_settings(settings)
    if not isinstance(generator, IdentityGenerator):
        raise TypeError(f"generator must be an IdentityGenerator, got {type(generator).__name__}.")
    require_saveable(generator.parts, generator.scheduler)  # not when the first checkpoint is due
    require_ready(given, images, directory, device)
    accelerator = _accelerator(given, device)
    place = RunDirectory(Path(directory).expanduser())
    try:
        longer = "steps" in settings
        run = _Run(accelerator, generator, images, place, given, validation, progress, longer=longer, origin=origin)
        return run.whole()
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            logger.warning("interrupted; started again, the run goes on from %s", place.newest())
        raise
    finally:
        place.release()
        for name in TRAINED:  # as somebody who generates wants them
            generator.parts[name].eval().requires_grad_(False)
        _checkpoint_gradients(generator, False)


class _Run:
    """One start of a run: sets everything up, then steps."""

    def __init__(
        self,
        accelerator: Any,
        generator: IdentityGenerator,
        images: Sequence[PersonImage],
        directory: RunDirectory,
        settings: TrainingSettings,
        validation: Sequence[Any] | None,
        progress: bool,
        *,
        longer: bool,
        origin: str,
    ) -> None:
        self.longer, self.origin = longer, origin  # the former: whether steps may be others than before
        self.accelerator, self.directory, self.settings = accelerator, directory, settings
        self.main: bool = accelerator.is_main_process
        self.progress = progress and self.main
        parts = accelerator.num_processes * settings.gradient_accumulation
        if settings.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of processes x gradient_accumulation, got {settings.batch_size} with "
                f"{accelerator.num_processes} x {settings.gradient_accumulation}."
            )
        self.share = settings.batch_size // parts
        selection = select(images)
        self.generator = generator.to(accelerator.device, torch.float32)
        self.about = str(selection).splitlines()[0]
        if self.main:
            logger.log(logging.WARNING if selection.unreadable or selection.alone else logging.INFO, "%s", selection)
            self._claim(selection)
        accelerator.wait_for_everyone()
        self.pairs = self._pairs(selection)
        self.validation = self._validation_images(selection, validation)
        self.objective = Objective(generator.scheduler, settings.snr_gamma)
        trained = TrainedParts(generator).train()
        _checkpoint_gradients(trained, settings.gradient_checkpointing)
        self.average = None if settings.ema is None else moving_average(trained, settings.ema)
        optimizer = new_optimizer(settings, [p for p in trained.parameters() if p.requires_grad])
        self.parts, self.optimizer = accelerator.prepare(trained, optimizer)
        self.skipped = 0
        self.step = 0
        self.diagnostics: GenerationDiagnostics | None = None
        self._resume()
        if self.main:
            directory.write()

    def whole(self) -> TrainingResult:
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
                    logger.info("step %d of %d, loss %.4f", self.step, given.steps, self.metrics.recent_loss())
        if self.main:
            self.directory.publish(self.step, keep=given.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        final = self.directory.path / checkpoints.WEIGHTS
        return TrainingResult(final, self.step, self.metrics.recent_loss(), self.diagnostics)

    def _optimize(self, batches: Iterator[dict[str, Tensor]]) -> float:
        """One step; the mean loss of its samples."""
        given, accelerator = self.settings, self.accelerator
        learning_rate = given.learning_rate * rate(self.step, given)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        losses = []
        for _ in range(given.gradient_accumulation):
            with accelerator.accumulate(self.parts):
                loss = self._loss(next(batches))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parts.parameters(), given.max_grad_norm or math.inf)
                    self._check_gradient(float(norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        if self.average is not None:
            self.average.update_parameters(accelerator.unwrap_model(self.parts))
        mean = float(accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
        self._check_finite(mean, "loss")
        return mean

    def _check_gradient(self, norm: float) -> None:
        """With a scaler, fp16's, steps without finite gradients are left out; now and then that is how it works."""
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.accelerator.scaler is None or self.skipped == _MOST_SKIPPED:
            several = f" in each of {self.skipped} steps up to the end" if self.skipped > 1 else ""
            self._check_finite(norm, f"norm of the gradient{several}")

    def _check_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} of step {self.step + 1} is {value}. The newest checkpoint is kept; try a lower "
                "learning_rate, or mixed_precision='bf16' in place of 'fp16'."
            )

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        unconditional = batch.pop("unconditional")  # stays on the CPU, where it decides shapes
        sample = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        if "target" in sample:
            sample["target_latents"] = self.generator.encode_images(sample["target"])
            sample["reference_latents"] = self.generator.encode_images(sample["reference"])
            sample["features"] = identity_features(self.generator, sample["identity"])
        latents, noise, timesteps = sample["target_latents"], sample["noise"], sample["timestep"]
        prediction = self.parts(
            self.objective.noisy(latents, noise, timesteps),
            timesteps,
            sample["pose"],
            sample["reference_latents"],
            sample["features"],
            unconditional,
        )
        return self.objective.loss(prediction, self.objective.target(latents, noise, timesteps), timesteps)

    def _loader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches of this process from the next step on."""
        given, processes, rank = self.settings, self.accelerator.num_processes, self.accelerator.process_index
        parts = range(self.step * given.gradient_accumulation, given.steps * given.gradient_accumulation)
        # Ranges, not lists: a long run has millions of numbers.
        firsts = ((part * processes + rank) * self.share for part in parts)
        order: Any = [range(first, first + self.share) for first in firsts]
        return DataLoader(self.pairs, batch_sampler=order, num_workers=given.workers)

    def _pairs(self, selection: Selection) -> Pairs:
        given, generator = self.settings, self.generator
        pairs = Pairs(
            selection,
            PairSettings(
                seed=given.seed,
                image_size=generator.image_size,
                identity_size=tuple(generator.identity_encoder.image_size),
                latent_shape=generator.latent_shape,
                num_train_timesteps=generator.scheduler.config.num_train_timesteps,
                unconditional_ratio=given.unconditional_ratio,
                noise_offset=given.noise_offset,
                flip=given.flip,
                erase=given.erase,
                variants=given.reference_variants,
            ),
        )
        if given.cache:
            directory = self.directory.path / LATENTS
            if self.main:
                key = hashlib.sha256(
                    json.dumps(
                        [
                            self.directory.content["images"],
                            asdict(pairs.settings),
                            fingerprint(generator, ("vae", "identity_encoder"), bank=False),
                        ]
                    ).encode()
                ).hexdigest()
                build(directory, pairs, generator, key=key, workers=given.workers, progress=self.progress)
            self.accelerator.wait_for_everyone()
            pairs.latents = Latents(directory, pairs)
        return pairs

    def _claim(self, selection: Selection) -> None:
        """Make the directory this run's, or see that it is."""
        given, generator = self.settings, self.generator
        content = {
            "settings": {name: value for name, value in asdict(given).items() if name not in FREE},
            "images": _digest(selection),
            "generator": _architecture(generator),
            "start": fingerprint(generator, TRAINED, bank=False),
            "license": generator.license,
            "sources": generator.sources,
            "round_bank": generator.round_bank,
            "origin": self.origin,
        }
        # With another schedule, another number of steps would have had other rates.
        self.directory.claim(content, free=("steps",) if self.longer and given.schedule == "constant" else ())

    def _resume(self) -> None:
        known = checkpoints.found(self.directory.path)
        if known:
            # On a CPU the optimizer would keep the file mapped for as long as it runs.
            state = checkpoints.read(known[-1], mapped=self.accelerator.device.type != "cpu")
            self.step = checkpoints.step_of(known[-1])
            self.accelerator.unwrap_model(self.parts).load_state_dict(state["parts"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            if self.main:
                logger.info("going on from step %d", self.step)
        self.metrics = Metrics(self.directory.path, self.step, write=self.main)

    def _checkpoint(self) -> None:
        if self.main:
            logger.info("step %d of %d, loss %.4f", self.step, self.settings.steps, self.metrics.recent_loss())
            scaler = self.accelerator.scaler
            state = {
                "parts": self.accelerator.unwrap_model(self.parts).state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            with self._averaged() as generator:
                self.metrics.flush()
                checkpoints.write(
                    self.directory.path,
                    self.step,
                    state,
                    partial(generator.save_pretrained, notes=self._notes()),
                    keep=self.settings.keep_checkpoints,
                )
        self.accelerator.wait_for_everyone()

    def _notes(self) -> str:
        """Of the model card: how these weights were trained."""
        hidden = (*FREE, "steps") if self.settings.schedule == "constant" else FREE
        listed = {name: value for name, value in asdict(self.settings).items() if name not in hidden}
        settings = "".join(f"* {name}: {value}\n" for name, value in listed.items())
        height, width = self.generator.image_size
        origin = self.directory.content["origin"]
        began = f" Started from {origin}." if origin else ""
        validation = self.metrics.validations.get(self.step)
        seen = "" if validation is None else f" Identity retention {validation['retention']:.3f}."
        return (
            f"## Training\n\nTrained with pose2id {pose2id.__version__} for {self.step} steps, {height} x {width} "
            f"pixels, on {self.about}.{began} Mean loss of the last {min(RECENT, self.step)} steps "
            f"{self.metrics.recent_loss():.4f}.{seen}\n\n{settings}"
        )

    def _validate(self) -> None:
        """Validate if it is time to, and this step has not been validated; the checkpoint's model card tells."""
        every = self.settings.validate_every
        due = self.step == self.settings.steps or (every and self.step % every == 0)
        if due and self.main and self.validation:
            new = self.step not in self.metrics.validations
            if new:
                logger.info("validating step %d: pictures of %d people", self.step, len(self.validation))
                with self._averaged() as generator:
                    sheet, self.diagnostics = self._generated(generator)
                names = ("retention", "own_cosine", "other_cosine")
                self.metrics.add_validation(
                    self.step, sheet, **{name: getattr(self.diagnostics, name) for name in names}
                )
            known = checkpoints.found(self.directory.path)
            if known and checkpoints.step_of(known[-1]) == self.step:
                self._tell(known[-1], new)
        if due:
            self.accelerator.wait_for_everyone()

    def _tell(self, checkpoint: Path, new: bool) -> None:
        """Have a checkpoint's model card say what its validation found, unless it has been given out with that."""
        content = self.directory.content
        given_out = content["published"] == self.step and not new
        if given_out or not math.isfinite(self.metrics.recent_loss()):  # whose record somebody removed
            return
        content["published"] = None
        with whole_file(checkpoint / checkpoints.WEIGHTS / CARD) as unfinished:
            card = model_card(content["sources"], content["license"], self._notes())
            unfinished.write_text(card, encoding="utf-8")

    def _generated(self, generator: IdentityGenerator) -> tuple[Image.Image, GenerationDiagnostics]:
        """A contact sheet of the validation's people, and how well the identity encoder knows them again."""
        references = [load_reference(image, "validation image") for image in self.validation]
        drawings = [drawing for _, drawing in load_poses("standard")]
        pictures = generator.generate(
            references,
            num_inference_steps=self.settings.validation_steps,
            guidance_scale=self.settings.validation_guidance,
            size=None,
            progress=False,
        )
        sheets = [
            contact_sheet(*shown) for shown in zip(references, [drawings] * len(references), pictures, strict=True)
        ]
        size = tuple(generator.identity_encoder.image_size)

        def features(some: Sequence[Image.Image]) -> Tensor:
            seen = torch.stack([pixels(picture, size) for picture in some]).to(generator.device)
            return identity_features(generator, seen)

        generated = torch.stack([features(poses) for poses in pictures])
        return stacked(sheets), generation_diagnostics(features(references), generated)

    def _validation_images(self, selection: Selection, given: Sequence[Any] | None) -> list[Any]:
        count = self.settings.validation_images
        given = list(selection.images if given is None else given)
        if given and all(isinstance(image, PersonImage) for image in given):
            first = {image.identity: image.path for image in reversed(given)}
            given = list(first.values())[::-1]
        chosen = given[:count]
        for i, image in enumerate(chosen):  # now, not when the first validation is due
            load_reference(image, f"validation[{i}]")
        if count and len(chosen) < 2:
            raise ValueError(
                f"validation must show at least 2 people, to compare them with others, got {len(chosen)}. Pass more, "
                "or validation_images=0."
            )
        return chosen

    @contextmanager
    def _averaged(self) -> Iterator[IdentityGenerator]:
        """A generator of the weights that are written: the average, if there is one."""
        parts = self.accelerator.unwrap_model(self.parts) if self.average is None else self.average.module
        try:
            origin = {name: self.directory.content[name] for name in ("license", "sources", "round_bank")}
            yield self.generator.replaced(**{name: getattr(parts, name) for name in TRAINED}, **origin)
        finally:
            parts.train()


def require_ready(
    settings: TrainingSettings,
    images: Sequence[PersonImage],
    directory: str | os.PathLike[str],
    device: str | None = None,
) -> None:
    """Raise what `train` would, as far as it shows without weights and without a look at the images themselves."""
    require_optimizer(settings)
    try:
        import accelerate  # noqa: F401, PLC0415
        import tensorboard  # noqa: F401, PLC0415
    except ImportError as error:
        raise ImportError(f'Training needs the extra "train": pip install "pose2id[train]" ({error}).') from error
    if device not in (None, "cpu", "cuda"):
        raise ValueError(
            "device must be 'cpu', 'cuda' or None, which takes a GPU where there is one, got "
            f"{device!r}. CUDA_VISIBLE_DEVICES chooses among GPUs."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' or None where torch finds no CUDA device, got 'cuda'.")
    for i, image in enumerate(images):
        if not isinstance(image, PersonImage):
            raise TypeError(
                f"images[{i}] must be a PersonImage, as pose2id.training.read_table gives them, got "
                f"{type(image).__name__}."
            )
    require_pairs(images)
    require_directory(directory)


def _accelerator(settings: TrainingSettings, device: str | None) -> Any:
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
            dynamo_backend="no",  # whatever the environment says: compiled parts have other names in checkpoints
            kwargs_handlers=[parallel, patient],
        )
    except ValueError as error:
        raise ValueError(
            "mixed_precision and device must be those of the first run in this process, which accelerate keeps, and "
            f"ones that this machine has. Start Python anew ({error})."
        ) from error
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # where accelerate leaves it out
        raise ValueError("mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'.")
    if accelerator.distributed_type not in _DISTRIBUTED:
        raise ValueError(
            f"accelerate must be set up for one process or several with all weights each ({', '.join(_DISTRIBUTED)}), "
            f"got {accelerator.distributed_type.value}: checkpoints are not written from shards. Run `accelerate "
            "config` again, or pass another file to `accelerate launch --config_file`."
        )
    if device == "cuda" and accelerator.device.type != "cuda":
        raise ValueError(
            f"device must be what accelerate is set up for, {accelerator.device.type!r}, or None, got 'cuda'. See "
            "ACCELERATE_USE_CPU in the environment, and `accelerate env`."
        )
    return accelerator


def _checkpoint_gradients(parts: Any, wanted: bool) -> None:
    for unet in (parts.reference_unet, parts.denoising_unet):
        unet.enable_gradient_checkpointing() if wanted else unet.disable_gradient_checkpointing()


def _architecture(generator: IdentityGenerator) -> str:
    """What a generator computes with that training does not change."""
    shapes = [
        [f"{name}.{key}", *tensor.shape]
        for name in TRAINED
        for key, tensor in generator.parts[name].state_dict().items()
    ]
    frozen = fingerprint(generator, ("vae", "identity_encoder"), bank=False)
    return hashlib.sha256(json.dumps([frozen, shapes]).encode()).hexdigest()


def _digest(selection: Selection) -> str:
    """Which images a run is trained on; not where they lie, so that they may move."""
    rows = [
        [image.identity, image.path.name, digest, "" if image.pose is None else image.pose.key]
        for image, digest in zip(selection.images, selection.digests, strict=True)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
