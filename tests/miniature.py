"""IPG smaller still than in `tiny`, to be trained: a generator that steps in milliseconds, and people to train on."""

from __future__ import annotations

import copy
import json
from functools import cache

import diffusers
import pytest
import recipe
import tiny
import torch
from safetensors.torch import load_file

from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.ipg import IdentityGenerator, IdentityTokens, PoseEncoder, TransReID
from pose2id.training.objective import TrainedParts
from pose2id.training.table import read_table

# One of several cases of a kind, the others of which always run.
STRESS = pytest.mark.skipif("not config.getoption('--stress')", reason="only with --stress")

UNET = {
    "sample_size": 8,
    "block_out_channels": [16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"],
}

VAE = {
    **tiny.VAE,
    "norm_num_groups": 4,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def miniature(unet=UNET, *, salt="", image_size=(16, 8)):
    """A generator that steps in milliseconds, for pictures of 16x8 pixels; its weights are the recipe's."""
    networks = copy.deepcopy(_networks(json.dumps(unet), salt))
    return IdentityGenerator(**networks, scheduler=diffusers.DDIMScheduler(**tiny.SCHEDULER), image_size=image_size)


@cache
def _networks(unet, salt):
    unet = json.loads(unet)
    encoder = TransReID((16, 8), patch_size=4, stride=4, dim=8, depth=2, heads=2)
    return {
        "identity_encoder": recipe.filled(encoder, salt),
        "identity_tokens": recipe.filled(IdentityTokens(encoder.feature_dim, 2, unet["cross_attention_dim"])),
        "reference_unet": recipe.filled(diffusers.UNet2DConditionModel(**unet), "reference_unet/"),
        "denoising_unet": recipe.filled(diffusers.UNet2DConditionModel(**unet)),
        "pose_encoder": recipe.filled(PoseEncoder(unet["block_out_channels"][0], (16, 32))),
        "vae": recipe.filled(diffusers.AutoencoderKL(**VAE), salt),
    }


def people(folder, count=3):
    """The table of drawn people, three images of each, 32x16 pixels."""
    drawn = SyntheticPedestrians(count, num_cameras=1, images_per_camera=3, seed=5, size=(32, 16))
    return read_table(write_people(drawn, folder, progress=False))


def state(directory, step):
    return torch.load(directory / f"step-{step:08d}" / "training.pt", weights_only=True)


def average(directory, step):
    """The tensors of a checkpoint's EMA, by name."""
    names = [name for name, _ in TrainedParts(miniature().networks).named_parameters()]
    return dict(zip(names, state(directory, step)["average"]["shadow_params"], strict=True))


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory):
    return [line["loss"] for line in lines(directory) if "loss" in line]


def weights(directory):
    """The tensors of all written parts."""
    files = directory.glob("*.safetensors")
    return {f"{file.stem}.{key}": tensor for file in files for key, tensor in load_file(file).items()}


def assert_equal(tensors, others, **tolerance):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, **(tolerance or {"atol": 0, "rtol": 0}), msg=name)
