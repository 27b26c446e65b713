"""What is trained, against the sampler itself; and the objective, against its formulas written out."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import tiny
import torch
from miniature import UNET, miniature

from pose2id.training.objective import TRAINED, Objective, TrainedParts

# Two levels and a middle: every kind of block that attention stands in.
DEEP = {
    **UNET,
    "block_out_channels": [16, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
REFERENCES, POSES = 3, 2
ROWS = REFERENCES * POSES
ALL, NONE = torch.ones(ROWS, dtype=torch.bool), torch.zeros(ROWS, dtype=torch.bool)
MIXED = [
    torch.tensor([False, True, False, False, True, True]),
    torch.tensor([True, False, False, False, False, False]),
    torch.tensor([False, False, False, False, False, True]),
    torch.tensor([True, True, True, False, True, True]),
]


class Sampled:
    """Every step of the real sampler: what the denoising UNet got, and what it made of it; and the same for training.

    Row r * POSES + p of a batch is reference r in pose p.
    """

    def __init__(self):
        draws = torch.Generator().manual_seed(0)

        def drawn(*shape):
            return torch.rand(*shape, generator=draws, dtype=torch.float64)

        self.generator = generator = miniature(DEEP).to(dtype=torch.float64)
        identities, references = drawn(REFERENCES, 3, *generator.identity_encoder.image_size), drawn(3, 3, 16, 8)
        poses = drawn(POSES, 3, 16, 8)
        self.steps = []
        hook = generator.denoising_unet.register_forward_hook(
            lambda unet, args, output: self.steps.append((args[0].clone(), args[1], output[0].clone()))
        )
        noise = torch.randn(REFERENCES, POSES, *generator.latent_shape, generator=draws, dtype=torch.float64)
        generator.sample(
            identities, references, generator.encode_poses(poses), noise, num_inference_steps=4, guidance_scale=3.5
        )
        hook.remove()
        self.poses = poses.repeat(REFERENCES, 1, 1, 1)
        with torch.no_grad():
            self.latents = generator.encode_images(references).repeat_interleave(POSES, 0)
            self.features = generator.identity_encoder(identities * 2 - 1).repeat_interleave(POSES, 0)

    def rows(self, step, unconditional):
        """Arguments of `TrainedParts` for a step of the sampler, and what the sampler's UNet gave."""
        inputs, timestep, output = self.steps[step]
        noisy = inputs[:ROWS, : self.generator.latent_shape[0]]
        given = [noisy, timestep.repeat(ROWS), self.poses, self.latents, self.features, unconditional]
        alone, paired = output.chunk(2)
        return given, torch.where(unconditional[:, None, None, None], alone, paired)


@pytest.fixture(scope="module")
def sampled():
    return Sampled()


@pytest.fixture
def parts(sampled):
    parts = TrainedParts(sampled.generator.networks).train()
    yield parts
    parts.eval().requires_grad_(False)


def calls(module):
    """How often a module is called from now on."""
    made = []
    module.register_forward_pre_hook(lambda *_: made.append(1))
    return made


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("unconditional", [ALL, NONE, *MIXED], ids=["all", "none", *map(str, range(len(MIXED)))])
def test_a_sample_sees_what_the_rows_of_the_sampler_see(sampled, parts, step, unconditional):
    given, expected = sampled.rows(step, unconditional)
    with torch.no_grad():
        torch.testing.assert_close(parts(*given), expected, atol=1e-12, rtol=1e-12)


def test_the_sampler_began_at_pure_noise(sampled):
    assert [int(timestep) for _, timestep, _ in sampled.steps] == [999, 749, 499, 249]


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [3, 0, 4, 1, 5, 2]])
def test_rows_may_come_in_any_order(sampled, parts, order):
    given, expected = sampled.rows(1, MIXED[0])
    with torch.no_grad():
        torch.testing.assert_close(parts(*(rows[order] for rows in given)), expected[order], atol=1e-12, rtol=1e-12)


def test_samples_have_timesteps_of_their_own(sampled, parts):
    unconditional = MIXED[0]
    (first, expected), (second, others) = sampled.rows(0, unconditional), sampled.rows(2, unconditional)
    odd = torch.arange(ROWS) % 2 == 1
    mixed = [torch.where(odd.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(first, second, strict=True)]
    with torch.no_grad():
        wanted = torch.where(odd[:, None, None, None], others, expected)
        torch.testing.assert_close(parts(*mixed), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("unconditional", "expected"), [(ALL, 0), (NONE, 1), (MIXED[0], 1)])
def test_nobody_needs_no_reference_unet(sampled, parts, unconditional, expected):
    called = calls(sampled.generator.reference_unet)
    given, _ = sampled.rows(0, unconditional)
    parts(*given)
    assert len(called) == expected


@pytest.mark.parametrize("unconditional", [ALL, *MIXED], ids=["all", *map(str, range(len(MIXED)))])
def test_an_unconditional_row_knows_neither_reference_nor_identity(sampled, parts, unconditional):
    given, _ = sampled.rows(0, unconditional)
    with torch.no_grad():
        before = parts(*given)
        for place in (3, 4):
            nan = given[place].clone()
            nan[unconditional] = torch.nan
            torch.testing.assert_close(
                parts(*given[:place], nan, *given[place + 1 :]), before, atol=0, rtol=0, equal_nan=False
            )


def test_an_unconditional_row_keeps_its_pose(sampled, parts):
    given, expected = sampled.rows(0, ALL)
    given[2] = given[2].flip(0)
    with torch.no_grad():
        moved = (parts(*given) - expected).abs().flatten(1).amax(1)
    assert (moved > 1e-3).all()


def test_parts_stay_the_generators_own(sampled, parts):
    for name in TRAINED:
        assert getattr(parts, name) is sampled.generator.parts[name]
    assert {name.partition(".")[0] for name in parts.state_dict()} == set(TRAINED)


def test_nobody_is_the_grey_image(sampled, parts):
    grey = torch.full((1, 3, *sampled.generator.identity_encoder.image_size), 0.5, dtype=torch.float64)
    tokens = sampled.generator.encode_identity(grey)
    torch.testing.assert_close(parts.identity_tokens(parts.unconditional_feature), tokens, atol=1e-12, rtol=0)
    torch.testing.assert_close(sampled.generator.unconditional_tokens(), tokens, atol=1e-12, rtol=0)


def gradients(parts, given):
    parts.zero_grad()
    parts(*given).square().mean().backward()
    return {name: parameter.grad for name, parameter in parts.named_parameters()}


def test_what_nothing_depends_on_is_frozen(sampled, parts):
    found = gradients(parts, sampled.rows(1, MIXED[0])[0])
    frozen = {name for name, parameter in parts.named_parameters() if not parameter.requires_grad}
    # The reference UNet's last transformer block, behind the norm whose output its self-attention writes.
    block = "reference_unet.up_blocks.1.attentions.1.transformer_blocks.0."
    behind = tuple(f"{block}{name}." for name in ("attn1", "norm2", "attn2", "norm3", "ff"))
    projection = "reference_unet.up_blocks.1.attentions.1.proj_out."
    assert frozen == {name for name in found if name.startswith((*behind, projection))}
    assert {name for name, gradient in found.items() if gradient is None} == frozen
    assert not [name for name in found.keys() - frozen if not found[name].any()]


def test_an_unconditional_batch_teaches_the_reference_unet_nothing(sampled, parts):
    found = gradients(parts, sampled.rows(1, ALL)[0])
    learning = {name.partition(".")[0] for name, gradient in found.items() if gradient is not None}
    assert learning == {"denoising_unet", "identity_tokens", "pose_encoder"}


def test_gradient_checkpointing_changes_no_gradient(sampled, parts):
    given, _ = sampled.rows(1, MIXED[0])
    expected = gradients(parts, given)
    unets = (parts.reference_unet, parts.denoising_unet)
    called = calls(parts.denoising_unet.down_blocks[0].resnets[0])
    try:
        for unet in unets:
            unet.enable_gradient_checkpointing()
        found = gradients(parts, given)
    finally:
        for unet in unets:
            unet.disable_gradient_checkpointing()
    assert len(called) == 2  # once more on the way back
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=1e-12)


def signal():
    """Literal: share of the signal's power at each timestep, with the last of them rescaled to none."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    roots = np.sqrt(np.cumprod(1 - betas))
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


def scheduler(kind=diffusers.DDIMScheduler, **changed):
    return kind(**{**tiny.SCHEDULER, **changed})


@pytest.fixture
def drawn(rng):
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    return *(torch.from_numpy(rng.standard_normal((6, 4, 3, 2))).float() for _ in range(2)), timesteps


def test_noise_and_velocity(drawn):
    latents, noise, timesteps = drawn
    share = signal()[timesteps].reshape(-1, 1, 1, 1)
    objective = Objective(scheduler())
    noisy = np.sqrt(share) * latents.numpy() + np.sqrt(1 - share) * noise.numpy()
    np.testing.assert_allclose(objective.noisy(*drawn), noisy, atol=3e-5)
    velocity = np.sqrt(share) * noise.numpy() - np.sqrt(1 - share) * latents.numpy()
    np.testing.assert_allclose(objective.target(*drawn), velocity, atol=3e-5)


def test_the_last_timestep_is_pure_noise(drawn):
    latents, noise, _ = drawn
    last = torch.full((6,), 999)
    objective = Objective(scheduler())
    assert torch.equal(objective.noisy(latents, noise, last), noise)
    assert torch.equal(objective.target(latents, noise, last), -latents)


def test_noise_prediction(drawn):
    latents, noise, timesteps = drawn
    objective = Objective(scheduler(prediction_type="epsilon"))
    assert torch.equal(objective.target(latents, noise, timesteps), noise)
    velocity = Objective(scheduler())
    assert torch.equal(objective.noisy(*drawn), velocity.noisy(*drawn))


def test_whatever_the_generator_samples_with(drawn):
    """Another scheduler of the same noise has the same objective."""
    options = {name: value for name, value in tiny.SCHEDULER.items() if name != "clip_sample"}
    other = Objective(diffusers.EulerDiscreteScheduler(**options))
    expected = Objective(scheduler())
    assert torch.equal(other.noisy(*drawn), expected.noisy(*drawn))
    assert torch.equal(other.target(*drawn), expected.target(*drawn))


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("gamma", [1.0, 5.0, 1e6])
def test_min_snr_weights(prediction, gamma):
    timesteps = torch.tensor([0, 1, 100, 500, 900, 990, 999])
    share = signal()[timesteps]
    ratio = share / (1 - share)
    if prediction == "v_prediction":
        expected = np.minimum(ratio + 1, gamma) / (ratio + 1)
    else:
        # Where there is no signal, the limit.
        expected = np.where(ratio > 0, np.minimum(ratio, gamma) / np.where(ratio > 0, ratio, 1), 1)
    weights = Objective(scheduler(prediction_type=prediction), gamma).weights(timesteps)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-3)
    assert weights[-1] == 1  # what the sampler begins with is learnt


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_a_mean_of_weighted_means(drawn, gamma):
    prediction, target, timesteps = drawn
    objective = Objective(scheduler(), gamma)
    share = signal()[timesteps]
    weights = np.ones(6) if gamma is None else np.minimum(1 / (1 - share), gamma) * (1 - share)
    errors = [np.mean((a - b) ** 2) for a, b in zip(prediction.numpy(), target.numpy(), strict=True)]
    expected = np.mean(weights * errors)
    assert float(objective.loss(prediction, target, timesteps)) == pytest.approx(expected, rel=1e-4)
    # In at least single precision, whatever the network computes in.
    assert objective.loss(prediction.bfloat16(), target, timesteps).dtype == torch.float32


def test_a_prediction_that_has_no_formula():
    with pytest.raises(ValueError, match="prediction_type must be one of v_prediction, epsilon, got 'sample'"):
        Objective(scheduler(prediction_type="sample"))
