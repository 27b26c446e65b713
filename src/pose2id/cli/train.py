"""`pose2id train`: a table of images in, weights out. Settings come from flags, one YAML file, or both."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

EPILOG = """TABLE is CSV: path, identity, camera, keypoints (`pose2id table`, `pose2id draw-people`).
--config FILE.yaml holds any of these options by name, with underscores (batch_size: 8); a flag wins over it.
Run again after an interruption: training goes on from the newest checkpoint in DIR, to the same weights.
Several GPUs: accelerate launch -m pose2id train TABLE --out DIR ...
"""

# What is trained on, left out and done meanwhile.
TOLD = tuple(f"pose2id.training.{name}" for name in ("start", "run", "run_directory", "cleansed_people", "cache"))

# Name, type and help of `training.settings.TrainingSettings`, which explains them in full; importing it takes seconds.
SETTINGS: tuple[tuple[str, Any, str], ...] = (
    ("steps", int, "optimizer steps of the whole run (80000)"),
    ("batch_size", int, "samples of a step, of all processes together (4)"),
    ("gradient_accumulation", int, "parts that a process computes its share in (1)"),
    ("learning_rate", float, "(1e-5)"),
    ("warmup_steps", int, "steps in which it rises (0)"),
    ("schedule", str, "constant or cosine (constant)"),
    ("optimizer", str, "adam, adamw or adamw8bit (adam)"),
    ("weight_decay", float, "(0.01)"),
    ("max_grad_norm", float, "0: no limit (1)"),
    ("unconditional_ratio", float, "samples without reference and identity (0.1)"),
    ("snr_gamma", float, "Min-SNR weighting, published 5 (off)"),
    ("noise_offset", float, "published 0.05 (0)"),
    ("clean", bool, "leave out images far from their person's mean, or near it, by the identity encoder (on)"),
    ("poses", str, "of targets: only valid ones, or all (valid)"),
    ("flip", float, "probability of a mirrored reference (0.5)"),
    ("erase", float, "probability of an erased rectangle of the reference (0.5)"),
    ("occlude", float, "probability of a covered part of the body on the reference, by its keypoints (0)"),
    ("reference_variants", int, "augmentations of a reference (endless)"),
    ("cache", bool, "keep VAE latents and identity features on disk (off)"),
    ("ema", float, "decay of averaged weights, such as 0.9999 (off)"),
    ("mixed_precision", str, "no, fp16 or bf16 (no)"),
    ("gradient_checkpointing", bool, "saves memory, costs time (off)"),
    ("seed", int, "of samples (42)"),
    ("checkpoint_every", int, "steps (1000)"),
    ("keep_checkpoints", int, "the newest (2)"),
    ("validate_every", int, "steps, 0: only at the end (1000)"),
    ("validation_images", int, "people that a validation generates (4)"),
    ("validation_steps", int, "of its sampler (20)"),
    ("validation_guidance", float, "of its sampler (3.5)"),
    ("workers", int, "processes that load images (0)"),
)
STARTING: tuple[tuple[str, Any, str], ...] = (
    ("weights", str, "IPG weights to start from: directory, repository or tiny (yuanc3/Pose2ID)"),
    ("unet", str, "start both UNets from Stable Diffusion's (repository, directory) or random weights (FILE.json)"),
    ("num_tokens", int, "of the identity, with --unet (20)"),
    ("ifr", bool, "--no-ifr: the encoder's feature itself as identity tokens, an ablation (as in the weights; on)"),
    ("image_size", str, "HEIGHTxWIDTH that is trained at (the weights' own)"),
    ("license", str, "of the trained UNets, as the Hub names it (that of the weights; other, from random ones)"),
    ("vae", str, "directory or repository of the VAE, for weights without one (stabilityai/sd-vae-ft-mse)"),
    ("revision", str, "of the weights (main)"),
    ("cache_dir", str, "where downloads are kept (the Hub client's)"),
    ("local_files_only", bool, "download nothing (off)"),
    ("device", str, "cpu, even if there is a GPU, or cuda, and nowhere else (a GPU if there is one)"),
    ("validation", str, "TABLE of images to validate with (people that are trained on)"),
)
OPTIONS = (*STARTING, *SETTINGS)


def add_options(parser: argparse.ArgumentParser) -> None:
    """All flags; those that are not given are left out, so that the YAML file can decide."""
    parser.add_argument("table", metavar="TABLE", help="images to train on")
    parser.add_argument("--out", metavar="DIR", required=True, help="directory of the run: new, or one to go on with")
    parser.add_argument("--config", metavar="FILE.yaml", help="any of the following options")
    for name, kind, text in OPTIONS:
        how: dict[str, Any] = {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, name.upper())}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **how)


def run(args: argparse.Namespace) -> None:
    """Train, and say where the weights are."""
    options = {**_from_file(args.config), **vars(args)}
    given = {name: options[name] for name, _, _ in STARTING if name in options}
    settings = {name: options[name] for name, _, _ in SETTINGS if name in options}
    from pose2id.training import log  # noqa: PLC0415 - takes seconds, as the others
    from pose2id.training import run as training  # noqa: PLC0415
    from pose2id.training import start as starting  # noqa: PLC0415
    from pose2id.training.settings import TrainingSettings  # noqa: PLC0415
    from pose2id.training.table import read_table  # noqa: PLC0415

    checked = TrainingSettings(**settings)
    images = read_table(args.table)
    dropped = Path(args.table).with_suffix(".dropped.csv")
    if checked.clean and dropped.is_file() and _is_main():
        logger.warning(
            "%s is what pose2id clean kept (%s is there): training leaves out more images, by its identity encoder. "
            "--no-clean trains on all of the table.",
            args.table,
            dropped.name,
        )
    validation, device = given.pop("validation", None), given.pop("device", None)
    shown = None if validation is None else read_table(validation)
    training.require_ready(checked, images, args.out, device, shown)  # before gigabytes are downloaded
    if isinstance(given.get("image_size"), str):  # a flag
        given["image_size"] = size(given["image_size"], "--image-size")
    weights = given.pop("weights", "yuanc3/Pose2ID")
    generator = starting.start(weights, device="cpu", **given)
    origin = _origin(weights, given.get("unet"))
    result = training.train(generator, images, args.out, validation=shown, origin=origin, device=device, **settings)
    if not _is_main():
        return
    print(f"{result.step} steps, loss {result.loss:.4f} (mean of the last {min(log.RECENT, result.step)})")
    if result.diagnostics is not None:
        print(result.diagnostics.summary)  # the reading is for ReID models, not for the encoder that guides
    print(f"weights: {result.weights}")


def _is_main() -> bool:
    """Whether this is the one of several processes that says things."""
    return os.environ.get("RANK", "0") == "0"


def _origin(weights: str, unet: Any) -> str:
    """What training starts from, in words; of files and directories the name alone: local paths are not recorded."""

    def named(place: str) -> str:
        return Path(place).name if Path(place).exists() else place

    if unet is None:
        return named(weights)
    drawn = not isinstance(unet, str) or unet.endswith(".json")  # a configuration
    unets = "random UNets" if drawn else f"the UNet of {named(unet)}"
    return f"{unets}, with identity encoder and VAE of {named(weights)}"


def size(text: str, name: str) -> tuple[int, int]:
    """(height, width) of `HEIGHTxWIDTH`."""
    height, by, width = text.partition("x")
    if not by or not height.isdecimal() or not width.isdecimal():
        raise ValueError(f"{name} must be HEIGHTxWIDTH in pixels, such as 256x128, got {text!r}.")
    return int(height), int(width)


def _from_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    from pose2id.io.checks import require_modules  # noqa: PLC0415

    require_modules('--config needs the extra "train"', '"pose2id[train]"', "yaml")
    import yaml  # noqa: PLC0415

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} must be YAML in UTF-8 ({error}).") from error
    kinds = {name: kind for name, kind, _ in OPTIONS}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map names to values (batch_size: 8), got {type(content).__name__}.")
    unknown = [str(name) for name in content if name not in kinds]
    if unknown:
        near = [match for name in unknown for match in difflib.get_close_matches(name.replace("-", "_"), kinds, n=1)]
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"{path} must only hold {', '.join(kinds)}, got {', '.join(unknown)}.{hint}")
    return {name: _value(name, value, kinds[name], path) for name, value in content.items() if value is not None}


def _value(name: str, value: Any, kind: Any, path: str) -> Any:
    """A value of a YAML file in its option's type."""
    if name == "mixed_precision" and value is False:
        return "no"  # which YAML takes for false
    if name == "image_size":
        if isinstance(value, str):
            return size(value, f"image_size in {path}")
        if isinstance(value, list) and len(value) == 2 and all(type(number) is int and number > 0 for number in value):
            return tuple(value)
    elif kind is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)  # YAML takes 1e-5, which has no point, for text
    elif type(value) is kind or (name == "unet" and isinstance(value, dict)):
        return value
    wanted = {
        "image_size": "HEIGHTxWIDTH or [HEIGHT, WIDTH]",
        "unet": "text or a diffusers configuration",
    }.get(name, {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[kind])
    raise ValueError(f"{name} in {path} must be {wanted}, got {value!r}.")
