"""Where training starts: published or own weights, Stable Diffusion's UNet, or random weights of any size."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from pose2id._inputs import checked_size
from pose2id.ipg import weights
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.identity import IdentityTokens
from pose2id.ipg.objective import TRAINED
from pose2id.ipg.pose_encoder import PoseEncoder


def start(
    pretrained: str | os.PathLike[str] = "yuanc3/Pose2ID",
    *,
    unet: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    num_tokens: int = 20,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    **options: Any,
) -> IdentityGenerator:
    """A generator to train, in float32.

    Args:
        pretrained: IPG weights, as for `IdentityGenerator.from_pretrained`. Identity encoder and VAE are always theirs,
            and without `unet` everything else too: fine-tuning.
        unet: what both UNets begin as, in place of the weights' own, which are then neither needed nor downloaded: a
            directory or repository of Stable Diffusion ("stable-diffusion-v1-5/stable-diffusion-v1-5";
            "user/name@commit" pins it), or a configuration of `diffusers.UNet2DConditionModel`, for random weights.
            Tokens and pose encoder are then new.
        num_tokens: of new identity tokens.
        image_size: (height, width) in place of the weights'.
        seed: of new weights.
        device: as in `IdentityGenerator.from_pretrained`.
        **options: `revision`, `vae`, `cache_dir`, `local_files_only`, `token` of `IdentityGenerator.from_pretrained`.

    Raises:
        FileNotFoundError, ConnectionError, TypeError, ValueError: as `IdentityGenerator.from_pretrained`.
    """
    size = {} if image_size is None else {"image_size": checked_size(image_size, "image_size")}
    if unet is None:
        generator = IdentityGenerator.from_pretrained(pretrained, dtype=torch.float32, device=device, **options)
        generator.image_size = size.get("image_size", generator.image_size)
        return generator
    source = weights.open_weights(pretrained, without=TRAINED, **options)
    sources: dict[str, str] = {}
    if not isinstance(unet, Mapping):
        unet, sources = weights.open_unet(unet, **options)
    encoder, vae = (source.load(name, dtype=torch.float32, device="cpu") for name in ("identity_encoder", "vae"))
    generator = fresh(
        identity_encoder=encoder,
        vae=cast("AutoencoderKL", vae),
        unet=unet,
        num_tokens=num_tokens,
        scheduler=source.scheduler(),
        seed=seed,
        **{**source.settings, "sources": {**source.sources, **sources}, **size},
    )
    return generator if device is None else generator.to(device)


def fresh(
    *,
    identity_encoder: Any,
    vae: AutoencoderKL,
    unet: Mapping[str, Any] | UNet2DConditionModel,
    num_tokens: int = 20,
    pose_channels: Sequence[int] | None = None,
    scheduler: Any = None,
    seed: int = 0,
    **options: Any,
) -> IdentityGenerator:
    """A generator of two equal UNets, and of new identity tokens and a new pose encoder that fit.

    The pose encoder's last convolution is 0: poses begin to count as they are learnt.

    Args:
        identity_encoder: with `image_size` and `feature_dim`; frozen in training.
        vae: frozen in training.
        unet: a UNet, or the configuration of one with random weights.
        num_tokens: of the identity.
        pose_channels: of the pose encoder's levels, one for each of the VAE's; None: 16, 32, 64, ..., as published.
        scheduler: None: the published one, DDIM with v-prediction and zero terminal SNR.
        seed: of random weights.
        **options: `image_size`, `round_bank`, `sources` of `IdentityGenerator`.

    Raises:
        TypeError, ValueError: parts that do not fit.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(unet, Mapping):
            unet = UNet2DConditionModel.from_config(dict(unet))
        levels = range(len(vae.config.block_out_channels))
        pose_encoder = PoseEncoder(unet.config.block_out_channels[0], pose_channels or [16 * 2**i for i in levels])
        tokens = IdentityTokens(identity_encoder.feature_dim, num_tokens, unet.config.cross_attention_dim)
    for parameter in pose_encoder.conv_out.parameters():
        nn.init.zeros_(parameter)
    return IdentityGenerator(
        identity_encoder=identity_encoder,
        identity_tokens=tokens,
        reference_unet=copy.deepcopy(unet),
        denoising_unet=unet,
        pose_encoder=pose_encoder,
        vae=vae,
        scheduler=scheduler or weights.published_scheduler(),
        **options,
    )
