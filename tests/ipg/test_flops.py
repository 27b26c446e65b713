"""How much generation computes: nothing twice that the stock UNets let it avoid."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import tiny
import torch
from miniature import STRESS
from torch.utils.flop_counter import FlopCounterMode

from pose2id.ipg import IdentityGenerator, weights

POSES, STEPS = 8, 20


def published_generator():
    """The published architecture, in shapes only."""
    configs = {name: part.config for name, part in weights.PARTS.items()}
    configs["vae"] = tiny.PUBLISHED_VAE
    with torch.device("meta"):
        parts = {name: part.build(configs[name]) for name, part in weights.PARTS.items()}
    return IdentityGenerator(**parts, scheduler=diffusers.DDIMScheduler(**tiny.SCHEDULER))


def computed(generator, references, *, poses=POSES, steps=STEPS):
    """FLOPs of each step of generation: {step: FLOPs}."""

    def images(count, size):
        return torch.zeros(count, 3, *size, device=generator.device)

    def count(call, *args, **options):
        with FlopCounterMode(display=False) as counter:
            result = call(*args, **options)
        return counter.get_total_flops(), result

    per_pose_set, features = count(generator.encode_poses, images(poses, generator.image_size))
    per_batch, generated = count(
        generator.sample,
        images(references, generator.identity_encoder.image_size),
        images(references, generator.image_size),
        features,
        torch.zeros(references, poses, *generator.latent_shape, device=generator.device),
        num_inference_steps=steps,
    )
    assert generated.shape == (references, poses, 3, *generator.image_size)
    return {"per pose set": per_pose_set, "per batch": per_batch}


@pytest.mark.parametrize("references", [1, pytest.param(2, marks=STRESS)])
def test_flops_of_a_generated_image(references):
    generator = published_generator()
    flops, second = (computed(generator, references, steps=steps) for steps in (1, 2))
    # A step is as another, and counting all of them takes long.
    flops["per batch"] += (STEPS - 1) * (second["per batch"] - flops["per batch"])
    tera = sum(flops.values()) / (references * POSES) / 1e12
    # Published: 20.24. The bound also holds back what a cached tensor would hide: everything is counted here.
    assert 16.5 < tera <= 17.0
    # Figures of the published modules, counted apart (GFLOP): encoder 40.77, tokens 0.12, pose encoder 4.34.
    assert flops["per pose set"] / 1e9 == pytest.approx(POSES * 4.34, rel=1e-3)
    # VAE encoder 549.74, reference row 368.97, bank 12.79, tokens' keys and values 0.77 for each reference; the
    # unconditional tokens once; pairs of rows 767.01 per step, VAE decoder 1248.67.
    per_reference = 40.77 + 0.12 + 549.74 + 368.97 + 12.79 + 0.77
    unconditional = 40.77 + 0.12 + 0.77
    expected = references * (per_reference + POSES * (STEPS * 767.01 + 1248.67)) + unconditional
    assert flops["per batch"] / 1e9 == pytest.approx(expected, rel=1e-3)


def test_every_step_computes_the_same():
    generator = tiny.generator()
    one, two, all_steps = (computed(generator, 1, poses=3, steps=steps)["per batch"] for steps in (1, 2, STEPS))
    assert all_steps - one == (STEPS - 1) * (two - one) > 0


def test_generation_computes_nothing_else():
    generator = tiny.generator()
    counted = computed(generator, 1, poses=3, steps=2)
    generator = tiny.generator()
    pictures = list(np.random.default_rng(0).integers(0, 256, (5, 100, 50, 3), dtype=np.uint8))
    with FlopCounterMode(display=False) as counter:
        generator.generate(pictures[:2], pictures[2:], num_inference_steps=2, batch_size=3)
    assert counter.get_total_flops() == counted["per pose set"] + 2 * counted["per batch"]


def test_without_guidance_there_are_no_unconditional_rows():
    generator = tiny.generator()
    rows = []
    generator.denoising_unet.register_forward_hook(lambda unet, args, output: rows.append(len(output[0])))
    pictures = list(np.random.default_rng(0).integers(0, 256, (4, 100, 50, 3), dtype=np.uint8))
    generator.generate(pictures[:1], pictures[1:], num_inference_steps=1, guidance_scale=1)
    generator.generate(pictures[:1], pictures[1:], num_inference_steps=1, guidance_scale=2)
    assert rows == [3, 6]
