"""Training where it is meant to run: on a GPU."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from miniature import UNET, assert_equal, losses, miniature
from miniature import people as drawn_people

from pose2id import IdentityGenerator
from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.training import run as training
from pose2id.training import start as starting
from pose2id.training.table import read_table

pytest.importorskip("accelerate")
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    people = SyntheticPedestrians(6, num_cameras=2, images_per_camera=2)
    return read_table(write_people(people, tmp_path_factory.mktemp("people") / "drawn", progress=False))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamw8bit"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # bitsandbytes' own
def test_the_loss_falls_and_a_run_goes_on(precision, optimizer, images, tmp_path):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings = {
        "batch_size": 8,
        "learning_rate": 1e-3,
        "optimizer": optimizer,
        "workers": 2 if precision == "no" else 0,
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

    def trained():
        result = training.train(starting.start("tiny", unet=unet, num_tokens=2), images, tmp_path / "run", **settings)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return result, [values["loss"] for values in map(json.loads, lines) if "loss" in values]

    result, losses = trained()
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert IdentityGenerator.from_pretrained(result.weights).device.type == "cuda"
    assert torch.isfinite(IdentityGenerator.from_pretrained(result.weights).denoising_unet.conv_in.weight).all()
    shutil.rmtree(tmp_path / "run" / "step-00000060")
    shutil.rmtree(result.weights)
    again, since = trained()
    assert again.step == len(since) == 60
    assert since[:30] == losses[:30]
    np.testing.assert_allclose(since[30:], losses[30:], rtol=0.02)  # an optimizer that began anew would be further off


@pytest.fixture
def the_gpu_by_default():
    """Everything without a device is made on the GPU."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def test_new_networks_are_the_same_under_another_default_device(request, tmp_path):
    miniature().save_pretrained(tmp_path / "weights")
    given = {"identity_encoder": miniature().identity_encoder, "vae": miniature().vae, "image_size": (16, 8)}
    expected = starting.fresh(**given, unet=UNET), starting.start(tmp_path / "weights", unet=UNET, device="cpu")
    request.getfixturevalue("the_gpu_by_default")
    found = starting.fresh(**given, unet=UNET), starting.start(tmp_path / "weights", unet=UNET, device="cpu")
    for generator, other in zip(expected, found, strict=True):
        for name, part in generator.parts.items():
            assert_equal(part.state_dict(), other.parts[name].state_dict())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_training_under_another_default_device(device, request, tmp_path):
    images = drawn_people(tmp_path / "people")
    settings = {"steps": 2, "batch_size": 2, "ema": 0.9, "cache": True, "reference_variants": 1, "workers": 1}
    settings |= {"validation_images": 2, "validation_steps": 1, "device": device, "progress": False}
    training.train(miniature(), images, tmp_path / "expected", **settings)
    generator = miniature()
    request.getfixturevalue("the_gpu_by_default")
    training.train(generator, images, tmp_path / "run", **settings)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "expected"), rtol=1e-5)
