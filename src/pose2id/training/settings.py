"""Settings of a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pose2id.io.checks import checked_choice, checked_count, checked_flag, checked_number

OPTIMIZERS = ("adam", "adamw", "adamw8bit")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("no", "fp16", "bf16")
POSES = ("all", "valid")

# May differ when a run goes on: the weights do not depend on them.
FREE = (
    "checkpoint_every",
    "keep_checkpoints",
    "validate_every",
    "validation_images",
    "validation_steps",
    "validation_guidance",
    "workers",
)


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that a run depends on besides images and starting weights.

    Steps, batch size, learning rate and weight decay are the paper's; the unconditional ratio is that of the published
    configuration.

    Attributes:
        steps: optimizer steps of the whole run. With a constant schedule a run may go on to more, or end with fewer.
        batch_size: samples of an optimizer step, those of all processes and accumulated parts together.
        gradient_accumulation: how many parts a process splits its share of a batch into, to save memory.
        learning_rate: of the optimizer, at its highest.
        warmup_steps: steps in which the learning rate rises linearly from 0.
        schedule: of the learning rate afterwards: "constant", or "cosine" towards 0.
        optimizer: "adam" (the paper's; weight decay is part of the gradient), "adamw" (decoupled weight decay), or
            "adamw8bit", with 8-bit states (needs bitsandbytes).
        weight_decay: of the optimizer.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        unconditional_ratio: probability of a sample that sees neither reference nor identity.
        snr_gamma: Min-SNR weighting (`objective.Objective`), published value 5; None: all noise levels alike.
        noise_offset: standard deviation of a shift of each channel's noise, published value 0.05.
        clean: leave out images whose feature, by the frozen identity encoder, is farther from their person's mean than
            99.5 % are, or nearer than 99.5 % (`cleansing.clean`, as in the paper); not with fewer than 50 images.
        poses: of targets: only those that are "valid" (`poses.check_pose`; the others are references), as in the paper,
            or "all" that show neck, a hip and 8 keypoints.
        flip: probability of a mirrored reference.
        erase: probability of a reference with a randomly erased rectangle.
        occlude: probability of a reference with a random part of the body covered, as keypoints show it (`occlusion`).
            References without keypoints stay as they are.
        reference_variants: how many augmentations an image has as a reference; None: a new one each time.
        cache: keep VAE latents and identity features on disk, in the run's directory; needs `reference_variants`.
        ema: decay of an exponential moving average, 1e-6 to 0.99999; the written weights are the average. None: none.
        mixed_precision: "no", "fp16" or "bf16"; weights stay in float32.
        gradient_checkpointing: compute activations again on the way back, to save memory.
        seed: of samples; not of the starting weights.
        checkpoint_every: steps between checkpoints; the last step has one too.
        keep_checkpoints: how many of the newest stay.
        validate_every: steps between validations, the first one before training; 0: only at the end.
        validation_images: people that a validation generates, 0 or at least 2.
        validation_steps: of its sampler.
        validation_guidance: of its sampler (classifier-free guidance).
        workers: processes that load images, for each training process.
    """

    steps: int = 80_000
    batch_size: int = 4
    gradient_accumulation: int = 1
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    schedule: str = "constant"
    optimizer: str = "adam"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    unconditional_ratio: float = 0.1
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    clean: bool = True
    poses: str = "valid"
    flip: float = 0.5
    erase: float = 0.5
    occlude: float = 0.0
    reference_variants: int | None = None
    cache: bool = False
    ema: float | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    seed: int = 42
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    validate_every: int = 1000
    validation_images: int = 4
    validation_steps: int = 20
    validation_guidance: float = 3.5
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "checkpoint_every", "keep_checkpoints"):
            self._become(name, checked_count)
        self._become("reference_variants", checked_count)
        for name in ("warmup_steps", "seed", "validate_every", "validation_images", "workers"):
            self._become(name, checked_count, least=0)
        self._become("validation_steps", checked_count, most=1000)
        for name in ("weight_decay", "unconditional_ratio", "noise_offset", "flip", "erase", "occlude"):
            self._become(name, checked_number, low=0, high=1)
        self._become("validation_guidance", checked_number, low=0, high=1000)
        self._become("learning_rate", checked_number, low=1e-12, high=1)
        self._become("max_grad_norm", checked_number, low=0, high=1e6)
        self._become("snr_gamma", checked_number, low=1e-3, high=1e6)
        self._become("ema", checked_number, low=1e-6, high=0.99999)
        for name, choices in (
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("mixed_precision", PRECISIONS),
            ("poses", POSES),
        ):
            self._become(name, checked_choice, choices=choices)
        for name in ("clean", "cache", "gradient_checkpointing"):
            checked_flag(getattr(self, name), name)
        if self.cache and self.reference_variants is None:
            raise ValueError("reference_variants must be a number with cache=True, such as 4, got None (endless ones).")
        if self.validation_images == 1:
            raise ValueError("validation_images must be 0 or at least 2, to compare people with others, got 1.")

    def _become(self, name: str, checked: Callable[..., Any], **limits: Any) -> None:
        """Check a value, unless it may be None and is, and keep it as Python's own number: JSON has none of NumPy's."""
        if getattr(self, name) is not None or getattr(type(self), name) is not None:
            object.__setattr__(self, name, checked(getattr(self, name), name, **limits))
