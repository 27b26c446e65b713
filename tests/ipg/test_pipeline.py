"""The whole pipeline, in miniature, against the published code; and what each plausible mistake would do to it."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import recipe
import tiny
import torch
from torch import nn

from pose2id.ipg import reference

STEPS = 4


class GivenFeature(nn.Module):
    """An identity encoder that only tells the unconditional image, of zeros, from others."""

    image_size = (2, 2)

    def forward(self, images):
        return images.flatten(1)[:, :1]


class GivenTokens(nn.Module):
    dim, feature_dim = 32, 1

    def __init__(self, tokens):
        super().__init__()
        self.register_buffer("tokens", tokens)

    def forward(self, features):
        return self.tokens[(features[:, 0] != 0).long()]


class Run:
    """The golden's inputs through a generator; keeps what comes out of each part on the way."""

    def __init__(self, vectors, dtype=torch.float64, mutate=None, **replaced):
        def given(name):
            return torch.from_numpy(vectors[name]).to(dtype)

        tokens = GivenTokens(given("id_tokens"))
        generator = tiny.generator(dtype, identity_encoder=GivenFeature(), identity_tokens=tokens, **replaced)
        if mutate is not None:
            mutate(generator)
        self.noise = []
        generator.denoising_unet.register_forward_hook(lambda unet, args, output: self.noise.append(output[0]))
        networks = generator.networks
        step, decode, encode = generator.scheduler.step, networks.decode, networks.encode_images
        self.latents = []

        def recorded_step(*args, **options):
            result = step(*args, **options)
            self.latents.append(result[0])
            return result

        def recorded_decode(latents):
            self.denoised = latents
            return decode(latents)

        def recorded_encode(images):
            self.ref_latents = encode(images)
            return self.ref_latents

        generator.scheduler.step, networks.decode = recorded_step, recorded_decode
        networks.encode_images = recorded_encode
        self.pose_features = generator.encode_poses(given("pose_in"))
        self.images = generator.sample(
            torch.ones(1, 3, 2, 2, dtype=dtype),
            (given("vae_in") + 1) / 2,
            self.pose_features,
            given("init_latents")[None],
            num_inference_steps=STEPS,
        )[0]
        with torch.no_grad():
            self.bank = reference.write(generator.reference_unet, self.ref_latents, given("id_tokens")[1:])

    def off(self, vectors):
        """How far the last latents are from the golden's, at most."""
        return float(np.abs(self.latents[-1].numpy() - vectors[f"latents_{STEPS - 1}"]).max())


def assert_equal_to_published(run, vectors, *, latents, bank, noise, images, ref_latents, pose=1e-5):
    np.testing.assert_allclose(run.pose_features, vectors["pose_fea"], atol=pose, rtol=0)
    np.testing.assert_allclose(run.ref_latents, vectors["ref_latents"], atol=ref_latents, rtol=0)
    for name in vectors:
        if name.startswith("bank_cond/"):
            written = run.bank[f"{name.removeprefix('bank_cond/')}.attn1"][0]
            np.testing.assert_allclose(written, vectors[name], atol=bank, rtol=0)
    assert len(run.bank) == 10
    for i in range(STEPS):
        for predicted, name in zip(run.noise[i].chunk(2), (f"noise_uncond_{i}", f"noise_cond_{i}"), strict=True):
            np.testing.assert_allclose(predicted, vectors[name], atol=noise, rtol=0)
        np.testing.assert_allclose(run.latents[i], vectors[f"latents_{i}"], atol=latents, rtol=0)
    published = np.clip(vectors["decoded_raw"] / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(run.images, published, atol=images, rtol=0)


EXACT = {"latents": 1e-11, "bank": 1e-11, "noise": 1e-11, "images": 1e-11, "ref_latents": 1e-11, "pose": 1e-11}
SINGLE = {"latents": 5e-4, "bank": 1e-4, "noise": 2e-4, "images": 2e-4, "ref_latents": 1e-5}


def test_equal_to_the_published_code_in_double_precision(golden):
    vectors = golden("tiny_pipeline_salted_f64")
    assert_equal_to_published(Run(vectors), vectors, **EXACT)


@pytest.fixture
def single(published_vectors):
    """Loader of a golden in single precision; what it shares with the salted one is stored there alone."""

    def load(name):
        vectors, description = published_vectors(name)
        salted, _ = published_vectors("tiny_pipeline_salted")
        shared = {key: salted[key] for key in ("id_tokens", "init_latents", "vae_in", "pose_in", "pose_fea")}
        return {**shared, **vectors}, description.get("salt", {}).get("reference_unet", "")

    return load


@pytest.mark.parametrize(
    ("name", "round_bank"),
    [("tiny_pipeline", True), ("tiny_pipeline_salted", True), ("tiny_pipeline_salted_bankfp32", False)],
)
def test_equal_to_the_published_code_in_single_precision(single, name, round_bank):
    vectors, salt = single(name)
    reference_unet = recipe.filled(diffusers.UNet2DConditionModel(**tiny.UNET), salt)
    run = Run(vectors, torch.float32, reference_unet=reference_unet, round_bank=round_bank)
    assert_equal_to_published(run, vectors, **SINGLE)


def test_the_published_vae_has_weights_rounded_to_half_precision(single):
    vectors, _ = single("tiny_pipeline_salted_vaefp16")
    run = Run(vectors, torch.float32, mutate=lambda generator: generator.vae.half().float())
    assert_equal_to_published(run, vectors, **SINGLE)


def test_pictures_are_the_published_ones(published_vectors):
    vectors, _ = published_vectors("tiny_pipeline_salted")
    tokens = GivenTokens(torch.from_numpy(vectors["id_tokens"]))
    generator = tiny.generator(identity_encoder=GivenFeature(), identity_tokens=tokens)
    ((*pictures,),) = generator.generate(
        [vectors["ref_rgb_u8"]],
        list(vectors["pose_bgr_u8"]),
        num_inference_steps=STEPS,
        latents=torch.from_numpy(vectors["init_latents"])[None],
        size=None,
    )
    difference = np.abs(np.stack([np.array(p) for p in pictures]).astype(int) - vectors["image_u8_trunc"])
    # A value at a step of the truncation may fall on either side.
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def scheduler(**changed):
    return {"scheduler": diffusers.DDIMScheduler(**{**tiny.SCHEDULER, **changed})}


def swapped_unets():
    unets = [recipe.filled(diffusers.UNet2DConditionModel(**tiny.UNET), salt) for salt in ("", "reference_unet/")]
    return {"reference_unet": unets[0], "denoising_unet": unets[1]}


def pose_on_the_conditional_half_only(generator):
    def removed(conv, args, output):
        half = len(output) // 2
        pose = args[0][:half, conv.in_channels :]
        return torch.cat([output[:half] - pose, output[half:]])

    generator.denoising_unet.conv_in.register_forward_hook(removed)


def bank_taken_before_the_norm(generator):
    unet = generator.reference_unet
    for name in reference.self_attentions(unet):
        block = unet.get_submodule(name.removesuffix(".attn1"))
        before = []
        block.norm1.register_forward_pre_hook(lambda norm, args, before=before: before.append(args[0]))

        class Written:
            def __init__(self, inner, before):
                self.inner, self.before = inner, before

            def __call__(self, attn, hidden_states, *args, bank, **options):
                output = self.inner(attn, hidden_states, bank=bank)
                bank[self.inner.name] = self.before[-1]
                return output

        block.attn1.set_processor(Written(block.attn1.processor, before))


def reference_forward(change):
    def mutate(generator):
        forward = generator.reference_unet.forward

        def changed(latents, timestep, encoder_hidden_states, **options):
            given = {"latents": latents, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
            given.update(change(generator))
            return forward(given["latents"], given["timestep"], given["encoder_hidden_states"], **options)

        generator.reference_unet.forward = changed

    return mutate


def reference_latents_unscaled(generator):
    encode = generator.networks.encode_images
    generator.networks.encode_images = lambda images: encode(images) / generator.vae.config.scaling_factor


def unconditional_tokens_of_zeros(generator):
    generator.networks.unconditional_tokens = lambda: torch.zeros(1, 20, 32, dtype=generator.dtype)


def unconditional_rows_see_the_bank(generator):
    unet = generator.denoising_unet
    for name in reference.self_attentions(unet):
        attention = unet.get_submodule(name)

        class Reading:
            def __init__(self, inner):
                self.inner = inner

            def __call__(self, attn, hidden_states, *args, condition, **options):
                bank = {name: tuple(part.repeat(2, 1, 1, 1) for part in pair) for name, pair in condition.bank.items()}
                return self.inner(attn, hidden_states, condition=dataclasses.replace(condition, bank=bank))

        attention.set_processor(Reading(attention.processor))


# How far each mistake moves the last latents: figures found with the published code, not with ours.
MISTAKES = {
    "no zero terminal SNR": (0.22, scheduler(rescale_betas_zero_snr=False)),
    "pose on the conditional half only": (0.76, {"mutate": pose_on_the_conditional_half_only}),
    "leading timesteps": (1.6, scheduler(timestep_spacing="leading", steps_offset=1)),
    "bank taken before norm1": (1.9, {"mutate": bank_taken_before_the_norm}),
    "reference at t = 999": (1.9, {"mutate": reference_forward(lambda generator: {"timestep": 999})}),
    "reference fed the unconditional tokens": (
        2.1,
        {"mutate": reference_forward(lambda g: {"encoder_hidden_states": g.unconditional_tokens()})},
    ),
    "reference latents unscaled": (2.9, {"mutate": reference_latents_unscaled}),
    "unconditional tokens of zeros": (3.7, {"mutate": unconditional_tokens_of_zeros}),
    "unconditional rows see the bank": (4.0, {"mutate": unconditional_rows_see_the_bank}),
    "UNets swapped": (7.3, swapped_unets),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_plausible_mistake_is_seen(golden, mistake):
    vectors = golden("tiny_pipeline_salted_f64")
    moved, changed = MISTAKES[mistake]
    run = Run(vectors, **(changed() if callable(changed) else changed))
    # Not any failure, but that of this mistake.
    assert run.off(vectors) == pytest.approx(moved, rel=0.05)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal_to_published(run, vectors, **EXACT)


@pytest.mark.parametrize(
    "changed", [lambda images: images.flip(1), lambda images: images * 2 - 1], ids=["BGR poses", "centred poses"]
)
def test_a_mistake_in_the_pose_image_is_seen(golden, changed):
    vectors = golden("tiny_pipeline_salted_f64")

    def mutate(generator):
        encode = generator.networks.encode_poses
        generator.networks.encode_poses = lambda images: encode(changed(images))

    run = Run(vectors, mutate=mutate)
    assert 1e-3 < np.abs(run.pose_features.numpy() - vectors["pose_fea"]).max() < 0.1
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal_to_published(run, vectors, **{**EXACT, "pose": 1e-5})
