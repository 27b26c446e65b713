"""Training where it is meant to run; not run yet where there was no GPU."""

from __future__ import annotations

import json

import pytest
import torch

from pose2id import IdentityGenerator
from pose2id.datasets import SyntheticPedestrians, read_table, write_people
from pose2id.ipg import starting, training

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    people = SyntheticPedestrians(6, num_cameras=2, images_per_camera=2)
    return read_table(write_people(people, tmp_path_factory.mktemp("people") / "drawn", progress=False))


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    state = pytest.importorskip("accelerate").state.AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield
    state._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_loss_falls_and_a_run_goes_on(precision, images, tmp_path):
    settings = {
        "batch_size": 8,
        "learning_rate": 1e-3,
        "optimizer": "adamw",
        "mixed_precision": precision,
        "gradient_checkpointing": precision == "bf16",
        "cache": True,
        "reference_variants": 1,
        "ema": 0.9,
        "steps": 60,
        "checkpoint_every": 30,
        "validation_steps": 2,
    }
    unet = {"sample_size": 16, "in_channels": 8, "out_channels": 8, "norm_num_groups": 8, "cross_attention_dim": 32}
    unet |= {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "attention_head_dim": 4}
    result = training.train(starting.start("tiny", unet=unet, num_tokens=2), images, tmp_path / "run", **settings)
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert IdentityGenerator.from_pretrained(result.weights).device.type == "cuda"
    assert torch.isfinite(IdentityGenerator.from_pretrained(result.weights).denoising_unet.conv_in.weight).all()
    again = training.train(starting.start("tiny", unet=unet, num_tokens=2), images, tmp_path / "run", **settings)
    assert again.step == 60
