"""Each part against vectors of the published code."""

from __future__ import annotations

import numpy as np
import pytest
import recipe
import tiny
import torch
from PIL import Image

from pose2id.ipg import IdentityTokens, PoseEncoder, TransReID, weights
from pose2id.ipg.generator import pixels, to_pictures


@pytest.fixture(scope="module")
def encoder():
    return recipe.filled(TransReID()).eval()


def test_identity_encoder(golden, encoder):
    vectors = golden("transreid")
    images = torch.from_numpy(vectors["input_u8"]).permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.no_grad():
        features = encoder(torch.cat([images, torch.zeros(1, 3, 256, 128)]))
    np.testing.assert_allclose(features.numpy(), vectors["output"], atol=1e-5)
    # The batch norms of the published model are not in the feature.
    assert np.abs(features.numpy() - vectors["output_neck_after"]).max() > 0.1


def test_identity_encoder_shuffles_as_published(golden, encoder):
    class Positions(torch.nn.Module):
        def forward(self, images):
            return torch.arange(211.0).view(1, 211, 1)

    seen = []

    class Record(torch.nn.Module):
        def forward(self, tokens):
            seen.append(tokens[..., 0])
            return tokens

    permutation = golden("transreid")["shuffle_perm"]
    base, first, second = encoder.base, encoder.b1, encoder.b2
    encoder.base, encoder.b1, encoder.b2 = Positions(), Record(), Record()
    try:
        encoder(torch.zeros(1, 3, 256, 128))
    finally:
        encoder.base, encoder.b1, encoder.b2 = base, first, second
    parts = seen[0] if len(seen[0]) == 4 else seen[1]
    for i, part in enumerate(parts.int().tolist()):
        assert part == [0, *permutation[52 * i : 52 * (i + 1)]]


def test_identity_encoder_in_other_sizes():
    encoder = TransReID((64, 32), patch_size=16, stride=12, dim=32, depth=3, heads=4, parts=2)
    assert encoder(torch.zeros(2, 3, 64, 32)).shape == (2, 96) == (2, encoder.feature_dim)
    assert TransReID(**encoder.config).state_dict().keys() == encoder.state_dict().keys()
    with pytest.raises(ValueError, match=r"multiple of groups=2.*got 9"):
        TransReID((48, 48), stride=16)


def test_identity_tokens(golden):
    vectors = golden("ifr")
    with torch.no_grad():
        tokens = recipe.filled(IdentityTokens())(torch.from_numpy(vectors["input"]))
    np.testing.assert_allclose(tokens.numpy(), vectors["output"], atol=1e-5)


def test_pose_encoder(golden):
    vectors = golden("pose_guider")
    images = torch.from_numpy(vectors["input_u8"]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        features = recipe.filled(PoseEncoder())(images)
    np.testing.assert_allclose(features.numpy(), vectors["output"], atol=1e-6)


def test_scheduler(golden):
    vectors = golden("scheduler")
    scheduler = weights.Weights({}, {}).scheduler()  # that of the published layout
    np.testing.assert_array_equal(scheduler.alphas_cumprod.numpy(), vectors["alphas_cumprod"])
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -50))
    latents = torch.from_numpy(vectors["x0"])
    for i, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(torch.from_numpy(vectors[f"v_{i}"]), timestep, latents).prev_sample
        np.testing.assert_allclose(latents.numpy(), vectors[f"x_{i}"], atol=1e-6)


@pytest.mark.parametrize("name", ["market", "odd"])
def test_preprocessing(published_vectors, name):
    vectors, _ = published_vectors("preprocess")
    picture = Image.fromarray(vectors[f"{name}_rgb"])
    for size, expected in (((512, 256), "lanczos_512x256"), ((256, 128), "reid_u8_256x128")):
        given = pixels(picture, size)
        assert given.dtype == torch.float32
        np.testing.assert_array_equal((given * 255).round().permute(1, 2, 0), vectors[f"{name}_{expected}"])


def test_pictures_are_truncated_and_resized_as_published(published_vectors):
    vectors, _ = published_vectors("preprocess")
    images = np.random.default_rng(603).random((512, 256, 3)).astype(np.float32)
    (picture,) = to_pictures(torch.from_numpy(images).permute(2, 0, 1)[None], (256, 128))
    np.testing.assert_array_equal(np.array(picture), vectors["out_seed603_resized_default"])


def test_pictures_by_the_letter():
    images = np.random.default_rng(603).random((64, 32, 3)).astype(np.float32)
    tensor = torch.from_numpy(images).permute(2, 0, 1)[None]
    truncated = Image.fromarray(np.floor(images.astype(np.float64) * 255).astype(np.uint8))
    np.testing.assert_array_equal(np.array(to_pictures(tensor, None)[0]), np.array(truncated))
    for size in ((32, 16), (100, 40)):
        resized = truncated.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.array(to_pictures(tensor, size)[0]), np.array(resized))


def test_what_each_encoder_sees():
    person, pose = np.random.default_rng(5).integers(0, 256, (2, 90, 41, 3), dtype=np.uint8)
    generator = tiny.generator()
    seen = {}
    encode = generator.vae.encode
    generator.vae.encode = lambda images: seen.setdefault("vae", images) is None or encode(images)
    for name in ("identity_encoder", "pose_encoder"):
        generator.parts[name].register_forward_pre_hook(lambda part, args, name=name: seen.setdefault(name, args[0]))
    generator.unconditional_tokens()
    assert torch.equal(seen.pop("identity_encoder"), torch.zeros(1, 3, 64, 32))
    generator.generate([person], [pose], num_inference_steps=1, guidance_scale=1)

    def resized(array, height, width):
        lanczos = Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(lanczos)).permute(2, 0, 1)[None].double() / 255

    expected = {
        "identity_encoder": (resized(person, 64, 32) - 0.5) / 0.5,
        "vae": resized(person, 128, 64) * 2 - 1,
        "pose_encoder": resized(pose, 128, 64),
    }
    for name, images in expected.items():
        torch.testing.assert_close(seen[name].double(), images, atol=1e-6, rtol=0)


def test_pictures_that_are_not_finite():
    with pytest.raises(ValueError, match="must be finite"):
        to_pictures(torch.tensor([0.5, float("nan"), 0.5]).view(1, 3, 1, 1), None)
