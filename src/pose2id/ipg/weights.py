"""Weights are data: found in a directory or on the Hub, checked by key and shape, read one network at a time.

Two layouts. The published one: five .pth files of tensors, and a VAE from elsewhere. Ours, written by `save`: one
safetensors file per network and pose2id.json, which holds every configuration. No code in a file is ever run.
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pose2id.io.checks import checked_size, first_few
from pose2id.io.whole_files import new_directory, whole_directory
from pose2id.ipg.hub import MissingFilesError, Place
from pose2id.ipg.identity import IdentityTokens, TransReID
from pose2id.ipg.pose_encoder import PoseEncoder
from pose2id.ipg.reference import install_writer

logger = logging.getLogger(__name__)

VAE_REPO = "stabilityai/sd-vae-ft-mse"
TINY = "tiny"
PUBLISHED_REPO = "yuanc3/Pose2ID"
CONFIG_FILE, CARD = "pose2id.json", "README.md"
OPENRAIL = "creativeml-openrail-m"
OTHER = "other"
_FORMAT = 1


@dataclass(frozen=True)
class Part:
    """One network of IPG: class, configuration to module, and in the published layout file and configuration.

    The VAE's configuration stands beside its file. `unused` are keys of a file that inference does not need.
    """

    kind: type[nn.Module]
    build: Callable[[Mapping[str, Any]], nn.Module]
    published_file: str
    config: Mapping[str, Any] | None
    unused: str = r"(?!)"


def _reference_unet(config: Mapping[str, Any]) -> nn.Module:
    unet: nn.Module = diffusers.UNet2DConditionModel.from_config(config)
    install_writer(unet)
    return unet


# Stable Diffusion v1.5's UNet; all else is diffusers' default.
SD15_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_PUBLISHED_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
_PUBLISHED_SETTINGS = {"image_size": [512, 256], "round_bank": True}

PARTS: Mapping[str, Part] = {
    "identity_encoder": Part(
        TransReID,
        lambda config: TransReID(**config),
        "transformer_20.pth",
        {"image_size": [256, 128]},
        # The last block and the norm of the plain ViT, and the heads of the training.
        unused=r"base\.(blocks\.11|norm|fc)\.|bottleneck(_\d+)?\.|classifier(_\d+)?\.",
    ),
    "identity_tokens": Part(IdentityTokens, lambda config: IdentityTokens(**config), "IFR.pth", {}),
    "reference_unet": Part(
        diffusers.UNet2DConditionModel, _reference_unet, "reference_unet.pth", SD15_UNET, unused=r"conv_(norm_)?out\."
    ),
    "denoising_unet": Part(
        diffusers.UNet2DConditionModel, diffusers.UNet2DConditionModel.from_config, "denoising_unet.pth", SD15_UNET
    ),
    "pose_encoder": Part(PoseEncoder, lambda config: PoseEncoder(**config), "pose_guider.pth", {}),
    "vae": Part(
        diffusers.AutoencoderKL, diffusers.AutoencoderKL.from_config, "diffusion_pytorch_model.safetensors", None
    ),
}
# What constructors raise for unknown or senseless arguments.
CONFIG_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_MOST_TENSORS = 10_000  # of a network: Stable Diffusion's UNet has 686
_MOST_TIMESTEPS = 100_000
MOST_PIXELS = 8192  # of a side of what is generated
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LFS_POINTER = b"version https://git-lfs"
# Attention of VAEs that were saved before diffusers 0.15.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Weights:
    """Weights that were found and whose keys are right, read when asked for.

    Attributes:
        files: network to file.
        configs: network to configuration.
        scheduler_config: a diffusers scheduler's, with its class under `_class_name`.
        settings: further arguments of `IdentityGenerator`, as `sources` and `license`.
    """

    files: Mapping[str, Path]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler_config: Mapping[str, Any] = field(default_factory=lambda: dict(_PUBLISHED_SCHEDULER))
    settings: Mapping[str, Any] = field(default_factory=lambda: dict(_PUBLISHED_SETTINGS))
    sources: Mapping[str, str] = field(default_factory=dict)
    license: str = OPENRAIL

    def check(self) -> None:
        """Raise one ValueError for all networks whose file has missing, unexpected or mis-shaped keys."""
        self.scheduler()
        problems = []
        for name, path in self.files.items():
            problem = _mismatch(self.build(name), _read(name, path), PARTS[name].unused)
            problems += [f"  {name} ({path.name}): {problem}"] if problem else []
        if problems:
            raise ValueError("These weights do not fit their networks:\n" + "\n".join(problems))

    def state(
        self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """The tensors that inference needs of a network, in new memory; dtype None: as stored."""
        return self._filled(self.build(name), name, dtype, device)

    def load(self, name: str, *, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """A network, straight in its dtype and on its device."""
        logger.info("loading %s from %s", name, self.files[name])
        module = self.build(name)
        module.load_state_dict(self._filled(module, name, dtype, device), assign=True)
        return module.requires_grad_(False)

    def scheduler(self) -> Any:
        """A scheduler of this configuration."""
        name = self.scheduler_config.get("_class_name")
        kind = getattr(diffusers, str(name), None)
        if not inspect.isclass(kind) or not issubclass(kind, diffusers.SchedulerMixin):
            raise ValueError(f"_class_name of the scheduler in {CONFIG_FILE} must be one of diffusers, got {name!r}.")
        timesteps = self.scheduler_config.get("num_train_timesteps", 1000)
        if isinstance(timesteps, (int, float)) and timesteps > _MOST_TIMESTEPS:
            given = f"num_train_timesteps {float(min(timesteps, 10**300)):g}, more than {_MOST_TIMESTEPS:,}"
            raise ValueError(f"the configuration of the scheduler builds no {name}: {given}")
        try:
            with torch.device("cpu"):  # whatever the default is: its tables are looked up there in every step
                return cast("Any", kind).from_config(dict(self.scheduler_config))
        except CONFIG_ERRORS as error:
            raise ValueError(f"the configuration of the scheduler builds no {name}: {error}") from error

    def build(self, name: str) -> nn.Module:
        """A network in shapes only, on the meta device."""
        try:
            with torch.device("meta"), _bounded():
                return PARTS[name].build(self.configs[name])
        except CONFIG_ERRORS as error:
            raise ValueError(f"the configuration of {name} builds no {PARTS[name].kind.__name__}: {error}") from error

    def _filled(
        self, module: nn.Module, name: str, dtype: torch.dtype | None, device: torch.device | str
    ) -> dict[str, Tensor]:
        stored = _read(name, self.files[name])
        return {
            key: torch.empty_like(stored[key], dtype=dtype, device=device).copy_(stored[key])
            for key in module.state_dict()
        }


@contextmanager
def _bounded() -> Iterator[None]:
    """Within, a network of too many tensors is an error while it is built, not after hours."""
    numbers, thread = itertools.count(1), threading.get_ident()

    def count(module: nn.Module, name: str, _: Any) -> None:
        if threading.get_ident() == thread and next(numbers) > _MOST_TENSORS:
            raise ValueError(f"more than {_MOST_TENSORS:,} tensors, at {name} of a {type(module).__name__}")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def open_weights(
    repo_or_dir: str | os.PathLike[str],
    *,
    revision: str = "main",
    vae: str | os.PathLike[str] = VAE_REPO,
    without: Collection[str] = (),
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Weights:
    """Find weights in either layout and check their keys; arguments and errors: `IdentityGenerator.from_pretrained`.

    The files of the networks named in `without` are neither needed nor read.
    """
    options: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    if repo_or_dir == TINY:
        repo_or_dir = Path(__file__).parent.parent / "demo" / TINY
    known = f"the published {PUBLISHED_REPO!r}, or the package's own {TINY!r}, for drawn people"
    place = Place(repo_or_dir, "repo_or_dir", known=known, revision=revision, **options)
    place.settle([CONFIG_FILE, *(part.published_file for part in PARTS.values())])
    try:
        (config_file,) = place.files([CONFIG_FILE])
    except MissingFilesError:
        weights = _published_layout(place, without)
    else:
        weights = _own_layout(place, config_file, without)
    if "vae" not in weights.files or vae != VAE_REPO:
        weights = _with_vae(weights, _pinned_place(vae, "vae", options))
    weights.check()
    return weights


def open_unet(
    repo_or_dir: str | os.PathLike[str], **options: Any
) -> tuple[diffusers.UNet2DConditionModel, dict[str, str]]:
    """Stable Diffusion's UNet in float32, from the folder `unet` of a directory or repository, and the latter's commit.

    "user/name@commit" pins it. Options and errors are those of `IdentityGenerator.from_pretrained`.
    """
    place = _pinned_place(repo_or_dir, "unet", {k: v for k, v in options.items() if k not in ("revision", "vae")})
    config_file, file = place.files(["unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
    source = Weights({"denoising_unet": file}, {"denoising_unet": _public(json_object(config_file))})
    source.check()
    unet = cast("diffusers.UNet2DConditionModel", source.load("denoising_unet", dtype=torch.float32, device="cpu"))
    return unet, place.source()


def published_scheduler() -> Any:
    """The published sampler: DDIM, v-prediction, zero terminal SNR."""
    return Weights({}, {}).scheduler()


def save(
    directory: str | os.PathLike[str],
    weights: Weights,
    states: Iterable[tuple[str, Mapping[str, Tensor]]],
    *,
    notes: str = "",
) -> None:
    """Write weights in our layout, whole or not at all, into a directory that is new or empty.

    `weights` describe them; `states` are (network, tensors), taken one after the other. `notes` end the model card.
    """
    terms = checked_license(weights.license)
    content = {
        "format": _FORMAT,
        "parts": {name: dict(config) for name, config in weights.configs.items()},
        "scheduler": dict(weights.scheduler_config),
        "settings": dict(weights.settings),
        "sources": dict(weights.sources),
        "license": terms,
    }
    description = json.dumps(content, indent=2) + "\n"
    # The configuration last: without it, nothing takes the directory for weights.
    with whole_directory(directory, last=CONFIG_FILE) as unfinished:
        (unfinished / CONFIG_FILE).write_text(description, encoding="utf-8")
        (unfinished / CARD).write_text(model_card(weights.sources, terms, notes), encoding="utf-8")
        for name, state in states:
            file = unfinished / f"{name}.safetensors"
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
            try:
                # Without tensors: safetensors 0.4.3 then writes metadata that it cannot read.
                save_file(tensors, file, metadata={"format": "pt"} if tensors else None)
            except SafetensorError as error:  # a full disk is one of these
                raise OSError(f"{file.name} could not be written: {error}") from error
            # safetensors makes files that only their owner may read.
            shutil.copymode(unfinished / CONFIG_FILE, file)


def convert(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Rewrite weights of either layout in ours, one network at a time.

    Args:
        source: a directory or repository; see `IdentityGenerator.from_pretrained`.
        directory: new or empty.
        dtype: of the written weights; None: as stored.
        **options: `revision`, `vae`, `cache_dir`, `local_files_only`, `token` of `IdentityGenerator.from_pretrained`.
    """
    new_directory(directory)  # before gigabytes are downloaded
    if dtype is not None:
        checked_dtype(dtype)
    weights = open_weights(source, **options)
    configs = {name: config_of(name, weights.build(name)) for name in PARTS}
    described = replace(weights, configs=configs, scheduler_config=scheduler_config(weights.scheduler()))
    save(directory, described, ((name, weights.state(name, dtype)) for name in PARTS))


def push(
    write: Callable[[Path], None], repo_id: str, *, private: bool | None, token: str | bool | None, commit_message: str
) -> str:
    """Upload the directory that `write` writes, and return the commit's address."""
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    visibility: Any = {} if private is None else {"private": private}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "weights"
        write(directory)  # first: nothing is made on the Hub when it fails
        api.create_repo(repo_id, exist_ok=True, **visibility)
        commit = api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=commit_message)
    return str(commit.commit_url)


def json_object(path: Path, argument: str = "") -> dict[str, Any]:
    """The object that a JSON file holds; errors name the file, and the argument that it was given as."""
    name = f"{argument} {path}".strip()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} must be a JSON file, and there is none.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(content).__name__}.")
    return content


def checked_dtype(dtype: Any) -> torch.dtype:
    """One of the dtypes that networks compute in."""
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype!r}.")
    return cast("torch.dtype", dtype)


def checked_license(name: Any) -> str:
    """A licence's name on the Hub, such as "mit"; it stands in the YAML of model cards."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise ValueError(f"license must be a name of the Hub such as 'mit', or {OTHER!r}, got {name!r}.")
    return name


def config_of(name: str, part: nn.Module) -> dict[str, Any]:
    """The whole configuration of a network of the published architecture."""
    kind = PARTS[name].kind
    if type(part) is not kind:
        raise TypeError(f"{name} must be a {kind.__name__} to be saved, got {type(part).__name__}: save it yourself.")
    config: Any = part.config
    return _public(config)


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration, with its class, which must be one of diffusers."""
    kind = type(scheduler)
    if getattr(diffusers, kind.__name__, None) is not kind:
        given = f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"scheduler must be one of diffusers to be saved, got {given}: assign it after loading.")
    return {"_class_name": kind.__name__, **_public(scheduler.config)}


def _own_layout(place: Place, config_file: Path, without: Collection[str]) -> Weights:
    content = json_object(config_file)
    if content.get("format") != _FORMAT:
        raise ValueError(f"{config_file} must have format {_FORMAT}, got {content.get('format')!r}.")
    # Objects, not names: diffusers takes a string for a repository to fetch.
    sections = {name: _object(content, name, config_file) for name in ("parts", "scheduler", "settings", "sources")}
    names = [name for name in PARTS if name not in without]
    configs = {name: _object(sections["parts"], name, config_file) for name in names}
    settings = sections["settings"]
    if settings.keys() != _PUBLISHED_SETTINGS.keys() or not isinstance(settings["round_bank"], bool):
        rule = f"image_size and round_bank (true or false), got {json.dumps(settings)}"
        raise ValueError(f"settings in {config_file} must be {rule}.")
    with _named(config_file):
        checked_size(settings["image_size"], "image_size", MOST_PIXELS)
        terms = checked_license(content.get("license", OPENRAIL))
    files = place.files([f"{name}.safetensors" for name in names])
    sources = {str(repository): str(commit) for repository, commit in sections["sources"].items()}
    return Weights(
        dict(zip(names, files, strict=True)),
        configs,
        sections["scheduler"],
        settings,
        {**sources, **place.source()},
        terms,
    )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say in an error which file holds the bad value."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _object(content: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    if not isinstance(content.get(name), dict):
        raise ValueError(f"{path} must hold an object {name!r}, got {json.dumps(content.get(name))}.")
    return dict(content[name])


def _published_layout(place: Place, without: Collection[str]) -> Weights:
    published = {name: part for name, part in PARTS.items() if part.config is not None and name not in without}
    try:
        files = place.files([part.published_file for part in published.values()])
    except MissingFilesError as error:
        others = f"{CONFIG_FILE} with a safetensors file per network"
        raise MissingFilesError(f"{error} Weights are these published files, or {others}.") from error
    configs = {name: part.config for name, part in published.items() if part.config is not None}
    return Weights(dict(zip(published, files, strict=True)), configs, sources=place.source())


def _pinned_place(repo_or_dir: str | os.PathLike[str], argument: str, options: Mapping[str, Any]) -> Place:
    name, at, commit = str(repo_or_dir).rpartition("@")
    if at and not Path(repo_or_dir).expanduser().is_dir():
        return Place(name, argument, revision=commit, **options)
    return Place(repo_or_dir, argument, **options)


def _with_vae(weights: Weights, place: Place) -> Weights:
    config_file, file = place.files(["config.json", PARTS["vae"].published_file])
    others = {repository: commit for repository, commit in weights.sources.items() if repository != VAE_REPO}
    return replace(
        weights,
        files={**weights.files, "vae": file},
        configs={**weights.configs, "vae": _public(json_object(config_file))},
        sources={**others, **place.source()},
    )


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without diffusers' private entries, such as the path that a model came from."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _read(name: str, path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped into memory: only what is used is read."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` beside it.")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_pth(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}). Fetch it again.") from error
    tensors = {str(key).removeprefix("module."): tensor for key, tensor in content.items()}
    if len(tensors) < len(content):
        raise ValueError(f"{path} must hold each key once, got some with and without the prefix 'module.'.")
    return {_present_name(key): t for key, t in tensors.items()} if name == "vae" else tensors


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        # Only files in zip format, which torch writes since 1.6, can be mapped; older ones are read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    # A damaged pickle can fail in any way. Never torch's own message, which explains how to run the code.
    except Exception as error:
        what = f"damaged or holds more than tensors, and was not loaded ({type(error).__name__})"
        raise ValueError(f"{path} is {what}: it could run code. Ask for safetensors.") from None
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{path} must map names to tensors. Save the state dict itself.")
    return dict(content)


def _present_name(key: str) -> str:
    return re.sub(
        r"(?<=mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda old: _OLD_ATTENTION[old[0]], key
    )


def _mismatch(module: nn.Module, tensors: Mapping[str, Tensor], unused: str) -> str:
    """What keeps tensors from being loaded, in words, or nothing."""
    wanted = module.state_dict()
    kinds = {
        "missing": [key for key in wanted if key not in tensors],
        "unexpected": [key for key in tensors if key not in wanted and not re.match(unused, key)],
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)} for {tuple(wanted[key].shape)}"
            for key in wanted
            if key in tensors and tensors[key].shape != wanted[key].shape
        ],
        "not floating": [key for key in wanted if key in tensors and not tensors[key].is_floating_point()],
    }
    return "; ".join(f"{len(keys)} {kind}: {first_few(keys, most=10)}" for kind, keys in kinds.items() if keys)


def model_card(sources: Mapping[str, str], name: str, notes: str = "") -> str:
    """Markdown with the Hub's metadata: what the weights are, their licence and sources, and notes at the end."""
    origin = "".join(f"* {repository} at commit {commit}\n" for repository, commit in sources.items())
    card = _MODEL_CARD.format(license=name, terms=_TERMS.get(name, _OTHER_TERMS.format(license=name)))
    return card + (f"\n## Made from\n\n{origin}" if origin else "") + (f"\n{notes}" if notes else "")


_MODEL_CARD = """\
---
library_name: pose2id
license: {license}
tags:
- person-re-identification
- image-generation
---

# Weights of identity-guided pedestrian generation (IPG)

For `pose2id.IdentityGenerator.from_pretrained`. One safetensors file per network; `pose2id.json` holds their
configurations. The method is Pose2ID, "From Poses to Identity: Training-Free Person Re-Identification via Feature
Centralization" (CVPR 2025, arXiv 2503.00938).

## Licence and use

{terms}

The weights make pictures of people from pictures of people. Matching persons across cameras is biometric processing,
which the law of many places restricts: use them only where you have a lawful basis.
"""

_TERMS = {
    OPENRAIL: """\
The published UNets are derived from Stable Diffusion v1.5, whose licence, CreativeML OpenRAIL-M, covers them and
whatever was trained from them: its use-based restrictions must be passed on with every copy. The other networks
(identity encoder, identity tokens, pose encoder, VAE) are under the terms of their authors.""",
    OTHER: """\
The UNets are under the terms of whoever trained them, and so is each of the other networks (identity encoder,
identity tokens, pose encoder, VAE).""",
}
_OTHER_TERMS = """\
The UNets, or those that they were trained from, are under the licence that is named above, {license}. The other
networks (identity encoder, identity tokens, pose encoder, VAE) are under the terms of their authors."""
