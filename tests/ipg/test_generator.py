"""`IdentityGenerator`: what its arguments do, what fits together, and what it refuses."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import recipe
import tiny
import torch
from PIL import Image
from torch import nn

from pose2id import IdentityGenerator
from pose2id.ipg import IdentityTokens, PoseEncoder, TransReID
from pose2id.ipg.pixels import References

STEPS = 2


@pytest.fixture(scope="module")
def generator():
    return tiny.generator()


@pytest.fixture(scope="module")
def people():
    return list(np.random.default_rng(1).integers(0, 256, (3, 100, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def poses():
    return list(np.random.default_rng(2).integers(0, 256, (2, 128, 64, 3), dtype=np.uint8))


def noise(generator, images=3, poses=2):
    seeded = torch.Generator().manual_seed(0)
    return torch.randn(images, poses, *generator.latent_shape, generator=seeded)


def arrays(pictures):
    return np.array([[np.array(picture) for picture in row] for row in pictures])


def test_every_person_in_every_pose(generator, people, poses):
    pictures = generator.generate(people, poses, num_inference_steps=STEPS)
    assert [len(row) for row in pictures] == [2, 2, 2]
    assert all(isinstance(p, Image.Image) and p.size == (128, 256) and p.mode == "RGB" for row in pictures for p in row)
    assert len(np.unique(arrays(pictures).reshape(6, -1), axis=0)) == 6


def test_one_image_does_not_depend_on_the_others(generator, people, poses):
    latents = noise(generator)
    together = arrays(generator.generate(people, poses, num_inference_steps=STEPS, latents=latents, batch_size=2))
    for i in (2, 0):
        alone = generator.generate(people[i : i + 1], poses, num_inference_steps=STEPS, latents=latents[i : i + 1])
        np.testing.assert_array_equal(arrays(alone)[0], together[i])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_several_references_in_one_batch(people, poses, guidance_scale):
    generator = tiny.generator(torch.float64)
    images = torch.from_numpy(np.stack(people)).permute(0, 3, 1, 2).double() / 255
    identity = nn.functional.interpolate(images, generator.identity_encoder.image_size)
    whole = nn.functional.interpolate(images, generator.image_size)
    features = generator.encode_poses(torch.from_numpy(np.stack(poses)).permute(0, 3, 1, 2).double() / 255)
    latents = noise(generator)
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale}
    together = generator.sample(identity, whole, features, latents, **options)
    for i in range(3):
        row = slice(i, i + 1)
        alone = generator.sample(identity[row], whole[row], features, latents[row], **options)
        torch.testing.assert_close(together[row], alone, atol=1e-12, rtol=0)
    for i in range(2):
        row = slice(i, i + 1)
        alone = generator.sample(identity, whole, features[row], latents[:, row], **options)
        torch.testing.assert_close(together[:, row], alone, atol=1e-12, rtol=0)


def test_guidance_is_what_its_formula_says(people, poses):
    generator = tiny.generator(torch.float64)
    options = {"num_inference_steps": 1, "latents": noise(generator, 1), "size": None}

    def denoised(scale):
        seen = []
        decode = generator.networks.decode
        generator.networks.decode = lambda latents: seen.append(latents) or decode(latents)
        generator.generate(people[:1], poses, guidance_scale=scale, **options)
        del generator.networks.decode
        return seen[0]

    unconditional, conditional = denoised(0), denoised(1)
    # One step is linear in the prediction.
    expected = unconditional + 3.5 * (conditional - unconditional)
    torch.testing.assert_close(denoised(3.5), expected, atol=1e-9, rtol=0)


def test_a_generator_draws_one_block_of_noise_per_image(generator, people, poses):
    seeded = torch.Generator().manual_seed(12580)
    drawn = torch.stack([torch.randn(2, *generator.latent_shape, generator=seeded) for _ in people])
    given = generator.generate(people, poses, num_inference_steps=STEPS, latents=drawn)
    by_seed = generator.generate(
        people, poses, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(12580)
    )
    np.testing.assert_array_equal(arrays(given), arrays(by_seed))
    other = generator.generate(people, poses, num_inference_steps=STEPS)
    assert (arrays(other) != arrays(given)).any()


def test_kinds_of_images(generator, people, poses, tmp_path):
    path = tmp_path / "person.png"
    Image.fromarray(people[0]).save(path)
    tensor = torch.from_numpy(people[0]).permute(2, 0, 1) / 255
    kinds = [people[0], Image.fromarray(people[0]), path, str(path), tensor]
    latents = noise(generator, 1).repeat(len(kinds), 1, 1, 1, 1)
    pictures = arrays(generator.generate(kinds, poses, num_inference_steps=STEPS, latents=latents, batch_size=2))
    for i in range(len(kinds)):
        np.testing.assert_array_equal(pictures[i], pictures[0])


def test_blue_first(generator, people, poses, tmp_path):
    path = tmp_path / "person.png"
    Image.fromarray(people[0]).save(path)
    tensor = torch.from_numpy(people[0]).permute(2, 0, 1) / 255
    options = {"num_inference_steps": STEPS, "latents": noise(generator, 4), "batch_size": 2}
    expected = arrays(generator.generate([people[0]] * 4, poses, **options))
    mixed = [path, Image.fromarray(people[0]), people[0][..., ::-1], tensor.flip(0)]
    np.testing.assert_array_equal(arrays(generator.generate(mixed, poses, colors="bgr", **options)), expected)
    options["latents"] = None  # the noise follows the pixels
    whole = np.stack(people)
    drawn = arrays(generator.generate(whole, poses, **options))
    for blue_first in (whole[..., ::-1], [person[..., ::-1] for person in people]):
        found = generator.generate_iter(blue_first, poses, colors="bgr", **options)
        np.testing.assert_array_equal(arrays(found), drawn)
    assert (arrays(generator.generate(whole[..., ::-1], poses, **options)) != drawn).any()


def test_references_hold_their_colours(generator, people, poses):
    references = References(people[:1])
    with pytest.raises(ValueError, match="colors must be 'rgb' with References, which hold RGB pictures, got 'bgr'"):
        generator.generate_iter(references, poses, colors="bgr")
    assert next(generator.generate_iter(references, poses, num_inference_steps=1, colors="rgb"))


def test_sizes(generator, people, poses):
    for size, expected in (((256, 128), (128, 256)), ((128, 64), (64, 128)), (None, (64, 128))):
        ((picture, _),) = generator.generate(people[:1], poses, num_inference_steps=1, size=size)
        assert picture.size == expected


def test_what_stays_is_computed_once(people, poses):
    generator = tiny.generator()
    calls = {name: [] for name in ("identity_encoder", "pose_encoder", "reference_unet", "denoising_unet")}
    for name, seen in calls.items():
        hook = lambda part, args, output, seen=seen: seen.append(len(args[0]))  # noqa: E731
        generator.parts[name].register_forward_hook(hook)
    projections = []
    for name in ("to_k", "to_v"):
        attention = generator.denoising_unet.mid_block.attentions[0].transformer_blocks[0].attn2
        getattr(attention, name).register_forward_hook(lambda part, args, output: projections.append(len(args[0])))
    generator.generate(people, poses, num_inference_steps=3, batch_size=2)
    # Of each image, and of none: no cache of that could see every way to change weights.
    assert calls["identity_encoder"] == [1, 1] * 3
    assert calls["pose_encoder"] == [2]
    assert calls["reference_unet"] == [1, 1, 1]
    assert calls["denoising_unet"] == [4] * 9
    assert projections == [2] * 6
    generator.generate(people[:1], poses, num_inference_steps=1, guidance_scale=1)
    assert len(calls["identity_encoder"]) == 7


def test_constants_follow_the_weights(people, poses):
    options = {"num_inference_steps": 1, "latents": noise(tiny.generator(), 1)}

    def pictures(generator):
        return arrays(generator.generate(people[:1], poses, **options))

    generator = tiny.generator()
    before = pictures(generator)
    recipe.filled(generator.identity_tokens, "other/")
    changed = pictures(generator)
    assert (changed != before).any()
    weight, tokens = next(generator.identity_tokens.parameters()), generator.unconditional_tokens()
    weight.data.mul_(2)  # as averages of weights are written, which no version counts
    assert not torch.equal(generator.unconditional_tokens(), tokens)
    weight.data.div_(2)
    other = recipe.filled(IdentityTokens(160, 20, 32), "other/")
    np.testing.assert_array_equal(pictures(tiny.generator(identity_tokens=other)), changed)
    generator.networks.identity_tokens = tiny.parts()["identity_tokens"]
    np.testing.assert_array_equal(pictures(generator), before)
    fresh = tiny.generator()
    with torch.autocast("cpu", torch.bfloat16):
        fresh.generate(people[:1], poses, **options)
    np.testing.assert_array_equal(pictures(fresh), before)


def test_parts_are_put_into_eval_mode(people, poses):
    class Forgetful(nn.Sequential):
        image_size = (64, 32)

    parts = tiny.parts()
    encoder = Forgetful(parts["identity_encoder"], nn.Dropout(0.5)).train()
    latents = noise(tiny.generator(), 1)
    given = tiny.generator(identity_encoder=encoder).generate(people[:1], poses, num_inference_steps=1, latents=latents)
    expected = tiny.generator().generate(people[:1], poses, num_inference_steps=1, latents=latents)
    np.testing.assert_array_equal(arrays(given), arrays(expected))


def test_noise_does_not_follow_the_default_dtype(people, poses):
    def pictures():
        seeded = torch.Generator().manual_seed(3)
        return arrays(generator.generate(people[:1], poses, num_inference_steps=1, generator=seeded))

    generator = tiny.generator()
    expected = pictures()
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(pictures(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_picture_stays_behind_in_a_model(people, poses):
    generator = tiny.generator()
    generator.generate(people[:1], poses, num_inference_steps=1)
    for unet in (generator.reference_unet, generator.denoising_unet):
        for processor in unet.attn_processors.values():
            assert all(isinstance(value, str) for value in vars(processor).values())
        assert not any(tensor is not None and not isinstance(tensor, nn.Parameter) for tensor in unet.buffers())


def test_state_dicts_stay_those_of_stock_unets():
    fresh = tiny.parts()
    names = {name: set(fresh[name].state_dict()) for name in ("reference_unet", "denoising_unet")}
    generator = IdentityGenerator(**fresh)
    assert set(generator.denoising_unet.state_dict()) == names["denoising_unet"]
    head = {"conv_norm_out.weight", "conv_norm_out.bias", "conv_out.weight", "conv_out.bias"}
    assert set(generator.reference_unet.state_dict()) == names["reference_unet"] - head
    # A second generator of the same parts changes nothing more.
    again = IdentityGenerator(**fresh)
    assert again.denoising_unet.conv_in is generator.denoising_unet.conv_in


def test_inputs_are_left_as_they_are(generator, people, poses):
    latents = noise(generator, 1)
    before = [people[0].copy(), poses[0].copy(), latents.clone()]
    generator.generate(people[:1], poses, num_inference_steps=STEPS, latents=latents)
    for given, kept in zip((people[0], poses[0], latents), before, strict=True):
        np.testing.assert_array_equal(given, kept)


def test_more_pictures_than_are_decoded_at_once(generator):
    latents = noise(generator, 1, 11)[0]
    sizes = []
    decode = generator.vae.decode
    generator.vae.decode = lambda part, **options: sizes.append(len(part)) or decode(part, **options)
    together = generator.decode(latents)
    generator.vae.decode = decode
    assert sizes == [4, 4, 3]
    alone = torch.cat([generator.decode(latents[i : i + 1]) for i in range(11)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_bank_is_rounded_only_where_it_changes_something(people, poses):
    def pictures(dtype, round_bank):
        generator = tiny.generator(dtype, round_bank=round_bank)
        images = torch.from_numpy(people[0]).permute(2, 0, 1)[None].to(dtype) / 255
        features = generator.encode_poses(nn.functional.interpolate(images, (128, 64)))
        latents = noise(generator, 1, 1)
        return generator.sample(
            nn.functional.interpolate(images, (64, 32)),
            nn.functional.interpolate(images, (128, 64)),
            features,
            latents,
            num_inference_steps=STEPS,
        )

    assert torch.equal(pictures(torch.float64, True), pictures(torch.float64, False))
    difference = (pictures(torch.float32, True) - pictures(torch.float32, False)).abs().max()
    assert 1e-6 < difference < 2e-3


def test_the_bank_is_rounded_by_default():
    assert IdentityGenerator(**tiny.parts()).round_bank is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(generator, people, poses, dtype):
    half = tiny.generator(dtype)
    latents = noise(generator, 1)
    options = {"num_inference_steps": STEPS, "latents": latents, "guidance_scale": 1.0}
    expected = arrays(generator.generate(people[:1], poses, **options)).astype(float)
    seen = []
    step = half.scheduler.step
    half.scheduler.step = lambda *args, **kwargs: seen.append(args[2].dtype) or step(*args, **kwargs)
    given = arrays(half.generate(people[:1], poses, **options))
    assert seen == [torch.float32] * STEPS
    assert np.abs(given - expected).mean() < 4


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1), (torch.bfloat16, 6), (torch.float16, 4)])
def test_cuda_gives_the_same_pictures(generator, people, poses, dtype, near):
    options = {"num_inference_steps": STEPS, "latents": noise(generator), "guidance_scale": 1.0}
    expected = arrays(generator.generate(people, poses, **options)).astype(float)
    on_cuda = tiny.generator(dtype).to("cuda")
    assert on_cuda.device.type == "cuda"
    assert np.abs(arrays(on_cuda.generate(people, poses, **options)) - expected).mean() < near


@pytest.fixture(scope="module")
def denoised(people, poses):
    """Latents that a scheduler comes to, by its name and its steps."""

    def denoised(name, steps):
        kind = getattr(diffusers, name)
        generator = tiny.generator(torch.float64, scheduler=kind.from_config(tiny.SCHEDULER))
        seen = []
        decode = generator.networks.decode
        generator.networks.decode = lambda latents: seen.append(latents) or decode(latents)
        options = {"guidance_scale": 1.0, "latents": noise(generator, 1, 1), "num_inference_steps": steps}
        generator.generate(people[:1], poses[:1], **options)
        return seen[0]

    return denoised


@pytest.fixture(scope="module")
def exact(denoised):
    return denoised("DDIMScheduler", 200)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_other_schedulers_solve_the_same_equation(denoised, exact, scheduler):
    few, many = (float((denoised(scheduler, steps) - exact).abs().max()) for steps in (10, 100))
    assert many < few / 4
    assert many < 0.1


def test_another_identity_encoder_and_pose_encoder(people, poses):
    class Mean(nn.Module):
        image_size = (32, 16)

        def forward(self, images):
            assert images.shape[1:] == (3, 32, 16)
            return images.mean((2, 3))

    class Blocks(nn.Module):
        out_channels, downscale = 32, 8

        def forward(self, images):
            return nn.functional.avg_pool2d(images, 8).repeat(1, 11, 1, 1)[:, :32]

    generator = tiny.generator(
        identity_encoder=Mean(), identity_tokens=recipe.filled(IdentityTokens(3, 20, 32)), pose_encoder=Blocks()
    )
    assert generator.generate(people[:1], poses, num_inference_steps=STEPS)[0][0].size == (128, 256)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"identity_encoder": TransReID((64, 32), dim=64, depth=2, heads=4)},
            r"identity_encoder.feature_dim and identity_tokens.feature_dim must be equal, got 320 and 160",
        ),
        (
            {"identity_tokens": IdentityTokens(160, 20, 64)},
            r"identity_tokens.dim and denoising_unet.config.cross_attention_dim must be equal, got 64 and 32",
        ),
        (
            {"reference_unet": diffusers.UNet2DConditionModel(**{**tiny.UNET, "cross_attention_dim": 16})},
            r"identity_tokens.dim and reference_unet.config.cross_attention_dim must be equal, got 32 and 16",
        ),
        (
            {"reference_unet": diffusers.UNet2DConditionModel(**{**tiny.UNET, "layers_per_block": 2})},
            r"must have the same self-attentions; \d+ differ, from down_blocks",
        ),
        ({"pose_encoder": PoseEncoder(64)}, r"pose_encoder.out_channels and denoising_unet.*64 and 32"),
        ({"pose_encoder": PoseEncoder(32, (8, 16))}, r"pose_encoder.downscale and vae_scale_factor.*2 and 8"),
        (
            {"vae": diffusers.AutoencoderKL(**{**tiny.VAE, "latent_channels": 8})},
            r"vae.config.latent_channels and denoising_unet.config.in_channels must be equal, got 8 and 4",
        ),
        ({"image_size": (128, 60)}, r"image_size must be in multiples of 8, got \(128, 60\)"),
        ({"image_size": (128,)}, r"image_size must be \(height, width\)"),
    ],
)
def test_parts_that_do_not_fit(replaced, message):
    with pytest.raises(ValueError, match=message):
        tiny.generator(**replaced)


def test_one_unet_for_both():
    parts = tiny.parts()
    with pytest.raises(ValueError, match="must be two modules, got one"):
        IdentityGenerator(**{**parts, "reference_unet": parts["denoising_unet"]})


def test_a_unet_has_one_role():
    first = tiny.generator()
    with pytest.raises(ValueError, match="reference_unet must not be the denoising_unet of another generator"):
        tiny.generator(reference_unet=first.denoising_unet)
    with pytest.raises(ValueError, match="denoising_unet must not be the reference_unet of another generator"):
        tiny.generator(denoising_unet=first.reference_unet)
    centred = diffusers.UNet2DConditionModel(**tiny.UNET, center_input_sample=True)
    with pytest.raises(ValueError, match="center_input_sample must be False"):
        tiny.generator(denoising_unet=centred)


def test_parts_of_several_dtypes(people, poses):
    parts = tiny.parts()
    with pytest.raises(ValueError, match=r"networks must be of one dtype .* pose_encoder torch.float64"):
        IdentityGenerator(**{**parts, "pose_encoder": parts["pose_encoder"].double()})
    half = tiny.generator(torch.bfloat16)
    half.vae.float()
    mixed = IdentityGenerator(**half.parts, scheduler=half.scheduler, image_size=half.image_size)
    assert mixed.generate(people[:1], poses, num_inference_steps=1)[0][0].size == (128, 256)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"images": []}, ValueError, "images must hold at least one image"),
        ({"poses": []}, ValueError, "poses must hold at least one image"),
        ({"images": np.zeros((9, 9, 3), np.uint8)}, TypeError, "images must be a sequence of images"),
        ({"images": ["/no/where.png"]}, ValueError, r"images\[0\] cannot be read"),
        ({"poses": [torch.full((3, 8, 8), 255.0)]}, ValueError, r"poses\[0\] must be a float image in \[0, 1\]"),
        (
            {"images": [torch.full((3, 8, 8), float("nan"))]},
            ValueError,
            r"images\[0\] must be a float image in \[0, 1\]",
        ),
        ({"images": [3]}, TypeError, r"images\[0\] must be a path"),
        ({"images": [3], "colors": "bgr"}, TypeError, r"images\[0\] must be a path"),
        ({"colors": "BGR"}, ValueError, "colors must be one of 'rgb', 'bgr', got 'BGR'"),
        (
            {"images": [np.zeros((0, 9, 3), np.uint8)], "colors": "bgr"},
            ValueError,
            r"images\[0\] must hold pixels, got an empty image",
        ),
        ({"num_inference_steps": 0}, ValueError, r"steps \(num_inference_steps\) must be at least 1, got 0"),
        ({"num_inference_steps": 1001}, ValueError, r"steps \(num_inference_steps\) must be at most 1000, got 1001"),
        ({"num_inference_steps": 2.0}, TypeError, r"steps \(num_inference_steps\) must be an integer"),
        ({"guidance_scale": -1}, ValueError, r"guidance \(guidance_scale\) must be in"),
        ({"guidance_scale": float("nan")}, ValueError, r"guidance \(guidance_scale\) must be in"),
        (
            {"latents": torch.zeros(1, 2, 4, 8, 8)},
            ValueError,
            r"latents must be a float tensor of shape \(1, 2, 4, 16, 8\)",
        ),
        ({"latents": torch.zeros(1, 2, 4, 16, 8, dtype=torch.int64)}, TypeError, "latents must be a float tensor"),
        ({"latents": np.zeros((1, 2, 4, 16, 8))}, TypeError, "latents must be a float tensor"),
        ({"generator": 12580}, TypeError, r"generator must be a torch.Generator, got int. For a seed"),
        ({"size": (0, 128)}, ValueError, "size must be at least 1, got 0"),
        ({"size": 128}, ValueError, r"size must be \(height, width\)"),
    ],
)
def test_bad_input(generator, people, poses, changed, error, message):
    given = {"images": people[:1], "poses": poses, "num_inference_steps": STEPS, **changed}
    with pytest.raises(error, match=message):
        generator.generate(given.pop("images"), given.pop("poses"), **given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"identity_images": torch.zeros(1, 3, 32, 32)},
            r"identity_images must be a float tensor of shape \(1, 3, 64, 32\)",
        ),
        ({"references": torch.zeros(1, 3, 64, 64)}, r"references must be a float tensor of shape \(1, 3, 128, 64\)"),
        ({"latents": torch.zeros(1, 1, 4, 16, 8)}, r"latents must be a float tensor of shape \(1, 2, 4, 16, 8\)"),
        ({"num_inference_steps": 0}, r"steps \(num_inference_steps\) must be at least 1"),
    ],
)
def test_bad_tensors(generator, changed, message):
    given = {
        "identity_images": torch.zeros(1, 3, 64, 32),
        "references": torch.zeros(1, 3, 128, 64),
        "pose_features": generator.encode_poses(torch.zeros(2, 3, 128, 64)),
        "latents": torch.zeros(1, 2, 4, 16, 8),
        "num_inference_steps": 1,
    }
    with pytest.raises(ValueError, match=message):
        generator.sample(**{**given, **changed})
    with pytest.raises(ValueError, match=r"images must be a float tensor of shape \(2, 3, 128, 64\)"):
        generator.encode_poses(torch.zeros(2, 3, 64, 64))


def test_a_scheduler_that_is_none():
    for scheduler in (None, diffusers.FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(TypeError, match="scheduler must be a diffusers scheduler for noise prediction"):
            tiny.generator(scheduler=scheduler)


MISFITS = [
    (diffusers.EDMEulerScheduler, {}, ValueError, "another kind of noise schedule"),
    (diffusers.IPNDMScheduler, {}, ValueError, "another kind of noise schedule"),
    (diffusers.DDPMWuerstchenScheduler, {}, ValueError, "another kind of noise schedule"),
    (diffusers.UniPCMultistepScheduler, {"use_flow_sigmas": True}, ValueError, "another kind of noise schedule"),
    (diffusers.DDIMScheduler, {"prediction_type": "flow_prediction"}, ValueError, "prediction_type 'flow_prediction'"),
    (diffusers.DDIMInverseScheduler, {}, ValueError, "lead from images to noise"),
    (diffusers.DPMSolverMultistepInverseScheduler, {}, ValueError, "lead from images to noise"),
    (diffusers.RePaintScheduler, {}, TypeError, "whose step needs more .*original_image"),
    (diffusers.FlowMatchEulerDiscreteScheduler, {}, TypeError, "without init_noise_sigma, scale_model_input"),
]


@pytest.mark.parametrize(("kind", "changed", "error", "message"), MISFITS)
def test_schedulers_that_do_not_fit(generator, kind, changed, error, message):
    before = generator.scheduler
    scheduler = kind.from_config({**tiny.SCHEDULER, **changed})
    with pytest.raises(error, match=rf"scheduler must be .* for noise prediction, got {kind.__name__}.*{message}"):
        generator.scheduler = scheduler
    with pytest.raises(error, match=message):
        generator.replaced(scheduler=scheduler)
    assert generator.scheduler is before


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("name", ["DDPM", "PNDM", "EulerAncestralDiscrete", "HeunDiscrete", "LCM", "UniPCMultistep"])
def test_a_scheduler_that_fits_can_be_assigned(generator, name):
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(tiny.SCHEDULER)
    other = generator.replaced(scheduler=scheduler)
    other.scheduler = generator.scheduler
    other.scheduler = scheduler
    assert other.scheduler is scheduler


def test_a_generator_draws_the_noise_of_steps_for_each_picture(people, poses):
    generator = tiny.generator(torch.float64, scheduler=diffusers.DDPMScheduler(**tiny.SCHEDULER))

    def pictures(batch_size):
        options = {"num_inference_steps": 2, "batch_size": batch_size, "output": "tensor"}
        return generator.generate(people[:2], poses[:2], generator=torch.Generator().manual_seed(1), **options)

    torch.testing.assert_close(pictures(1), pictures(4), rtol=0, atol=2.01 / 255)


def test_schedulers_that_add_noise_take_the_generator(people, poses):
    generator = tiny.generator(scheduler=diffusers.DDPMScheduler(**tiny.SCHEDULER))

    def pictures(seed):
        options = {"num_inference_steps": 3, "latents": noise(generator, 1)}
        return arrays(generator.generate(people[:1], poses, generator=torch.Generator().manual_seed(seed), **options))

    np.testing.assert_array_equal(pictures(1), pictures(1))
    assert (pictures(1) != pictures(2)).any()


def test_what_a_generator_shows():
    assert repr(tiny.generator(sources={"a/b": "0123"})) == (
        "IdentityGenerator(128 x 64, torch.float32 on cpu, {'a/b': '0123'})"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(people, poses, value):
    parts = tiny.parts()
    parts["vae"].decoder.conv_out.bias.data[0] = value
    with pytest.raises(
        ValueError, match=r"pictures of images\[0\] must be finite, got NaN or infinity in picture 1 of 2"
    ):
        IdentityGenerator(**parts).generate(people[:1], poses, num_inference_steps=1)
