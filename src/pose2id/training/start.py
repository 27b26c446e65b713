"""Where training starts: published or own weights, Stable Diffusion's UNet, or random weights of any size."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from pose2id.io.checks import checked_count, checked_flag, checked_size
from pose2id.ipg import weights
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.identity import IdentityTokens
from pose2id.ipg.pose_encoder import PoseEncoder
from pose2id.training.objective import TRAINED

logger = logging.getLogger(__name__)


def start(
    repo_or_dir: str | os.PathLike[str] = "yuanc3/Pose2ID",
    *,
    unet: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    num_tokens: int | None = None,
    ifr: bool | None = None,
    image_size: tuple[int, int] | None = None,
    license: str | None = None,  # noqa: A002 - the Hub's name
    seed: int = 0,
    device: torch.device | str | None = None,
    **options: Any,
) -> IdentityGenerator:
    """A generator to train, in float32.

    Args:
        repo_or_dir: IPG weights, as for `IdentityGenerator.from_pretrained`. Identity encoder and VAE are always
            theirs, and without `unet` everything else too: fine-tuning.
        unet: what both UNets begin as, in place of the weights' own, which are then neither needed nor downloaded: a
            directory or repository of Stable Diffusion ("stable-diffusion-v1-5/stable-diffusion-v1-5";
            "user/name@commit" pins it); or, for random weights, a configuration of `diffusers.UNet2DConditionModel` or
            its .json file. Identity tokens and pose encoder are then new.
        num_tokens: of new identity tokens; None: 20, as published. Only with `unet`.
        ifr: False: the identity encoder's feature itself as tokens (`IdentityTokens`), an ablation; IFR that the
            weights have is dropped, and the UNets have to learn to read such tokens. None: as the weights have it, and
            new tokens with IFR.
        image_size: (height, width) in place of the weights', in multiples of the VAE's downscaling.
        license: of the trained UNets, as the Hub names it, for model cards. None: that of the UNets which training
            starts from, "other" with random ones.
        seed: of new weights.
        device: as in `IdentityGenerator.from_pretrained`.
        **options: `revision`, `vae`, `cache_dir`, `local_files_only`, `token` of `IdentityGenerator.from_pretrained`.

    Raises:
        FileNotFoundError, ConnectionError, TypeError, ValueError: as `IdentityGenerator.from_pretrained`.
    """
    changes: dict[str, Any] = {} if image_size is None else {"image_size": checked_size(image_size, "image_size")}
    if license is not None:
        changes["license"] = weights.checked_license(license)
    ifr = None if ifr is None else checked_flag(ifr, "ifr")
    if unet is None:
        if num_tokens is not None:
            raise ValueError(f"num_tokens must not be given without unet, got {num_tokens}: tokens are the weights'.")
        generator = IdentityGenerator.from_pretrained(repo_or_dir, dtype=torch.float32, device=device, **options)
        tokens = generator.identity_tokens
        if ifr is True and not tokens.ifr:
            raise ValueError(f"ifr must not be True for {repo_or_dir}, weights without IFR. Pass unet for new tokens.")
        if ifr is False and tokens.ifr:
            changes["identity_tokens"] = IdentityTokens(tokens.feature_dim, dim=tokens.dim, ifr=False)
            logger.info("IFR of %s is dropped: the feature of its identity encoder becomes the tokens", repo_or_dir)
        return generator.replaced(**changes) if changes else generator
    if isinstance(unet, (str, os.PathLike)) and os.fspath(unet).endswith(".json"):
        unet = weights.json_object(Path(unet), "unet")
    source = weights.open_weights(repo_or_dir, without=TRAINED, **options)
    sources: dict[str, str] = {}
    if not isinstance(unet, Mapping):
        unet, sources = weights.open_unet(unet, **options)
    encoder, vae = (source.load(name, dtype=torch.float32, device="cpu") for name in ("identity_encoder", "vae"))
    generator = fresh(
        identity_encoder=encoder,
        vae=cast("AutoencoderKL", vae),
        unet=unet,
        num_tokens=num_tokens,
        ifr=ifr is not False,
        scheduler=source.scheduler(),
        seed=seed,
        **{**source.settings, "sources": {**source.sources, **sources}, **changes},
    )
    return generator.to(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)


def fresh(
    *,
    identity_encoder: Any,
    vae: AutoencoderKL,
    unet: Mapping[str, Any] | UNet2DConditionModel,
    num_tokens: int | None = None,
    ifr: bool = True,
    pose_channels: Sequence[int] | None = None,
    scheduler: Any = None,
    seed: int = 0,
    **options: Any,
) -> IdentityGenerator:
    """A generator of two equal UNets, and of new identity tokens and a new pose encoder that fit.

    The pose encoder's last convolution is 0: poses have no effect until it is learned.

    Args:
        identity_encoder: with `image_size` and `feature_dim`; frozen in training.
        vae: frozen in training; the other networks come to its device.
        unet: a UNet, or the configuration of one with random weights; its `in_channels` and `out_channels` are by
            default the VAE's.
        num_tokens: of the identity; None: 20, as published.
        ifr: False: the encoder's feature itself as tokens, as many as it makes, an ablation (`IdentityTokens`).
        pose_channels: of the pose encoder's levels, as many as the VAE's; None: 16, 32, 64, ..., as published.
        scheduler: None: the published one, DDIM with v-prediction and zero terminal SNR.
        seed: of random weights.
        **options: `image_size`, `round_bank`, `sources`, `license` of `IdentityGenerator`; with random weights the
            licence is "other" unless it is given.
    """
    # Drawn on the CPU, whatever the default device is: its generator is the one that is seeded.
    with torch.random.fork_rng(devices=[]), torch.device("meta" if vae.device.type == "meta" else "cpu"):
        torch.default_generator.manual_seed(checked_count(seed, "seed", least=0))
        if isinstance(unet, Mapping):
            channels = vae.config.latent_channels
            unet = _new_unet({"in_channels": channels, "out_channels": channels, **unet})
            options = {"license": weights.OTHER, **options}
        levels = range(len(vae.config.block_out_channels))
        pose_encoder = PoseEncoder(unet.config.block_out_channels[0], pose_channels or [16 * 2**i for i in levels])
        tokens = IdentityTokens(identity_encoder.feature_dim, num_tokens, unet.config.cross_attention_dim, ifr=ifr)
        scheduler = scheduler or weights.published_scheduler()
    for parameter in pose_encoder.conv_out.parameters():
        nn.init.zeros_(parameter)
    for network in (unet, pose_encoder, tokens):
        nn.Module.to(network, vae.device)
    return IdentityGenerator(
        identity_encoder=identity_encoder,
        identity_tokens=tokens,
        reference_unet=copy.deepcopy(unet),
        denoising_unet=unet,
        pose_encoder=pose_encoder,
        vae=vae,
        scheduler=scheduler,
        **options,
    )


def _new_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet of random weights. diffusers would ignore unknown names, and build another one."""
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    unknown = [str(name) for name in config if name not in known and not str(name).startswith("_")]
    if unknown:
        raise ValueError(f"unet must be a configuration of UNet2DConditionModel, which knows no {', '.join(unknown)}.")
    try:
        return UNet2DConditionModel.from_config(dict(config))
    except weights.CONFIG_ERRORS as error:
        raise ValueError(f"unet must be a configuration of UNet2DConditionModel: {error}") from error
