"""IPG in miniature: the architecture of the golden pipeline, with the recipe's weights."""

from __future__ import annotations

import copy
from functools import cache

import diffusers
import recipe
import torch

from pose2id.ipg import IdentityGenerator, IdentityTokens, PoseEncoder, TransReID

UNET = {
    "sample_size": 16,
    "block_out_channels": [32, 64, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
VAE = {
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "block_out_channels": [16, 16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}
# Not tiny: the VAE that the published weights go with.
PUBLISHED_VAE = {**VAE, "layers_per_block": 2, "norm_num_groups": 32, "block_out_channels": [128, 256, 512, 512]}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def parts():
    """Fresh parts of an `IdentityGenerator` for pictures of 128x64 pixels."""
    like = torch.empty(0)
    return copy.deepcopy(_parts(like.dtype, like.device))


@cache  # drawing the weights takes longer than copying them
def _parts(_dtype, _device):
    encoder = TransReID((64, 32), patch_size=16, stride=12, dim=32, depth=3, heads=4)
    return {
        "identity_encoder": recipe.filled(encoder),
        "identity_tokens": recipe.filled(IdentityTokens(encoder.feature_dim, 20, 32)),
        "reference_unet": recipe.filled(diffusers.UNet2DConditionModel(**UNET), "reference_unet/"),
        "denoising_unet": recipe.filled(diffusers.UNet2DConditionModel(**UNET)),
        "pose_encoder": recipe.filled(PoseEncoder(32)),
        "vae": recipe.filled(diffusers.AutoencoderKL(**VAE)),
        "scheduler": diffusers.DDIMScheduler(**SCHEDULER),
        "image_size": (128, 64),
    }


def generator(dtype=torch.float32, **replaced):
    """A generator of these parts, some of them replaced."""
    return IdentityGenerator(**{**parts(), **replaced}).to(dtype=dtype)
