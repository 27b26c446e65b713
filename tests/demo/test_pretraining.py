"""The two frozen parts, trained in miniature: what they learn, from what alone, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from miniature import VAE, assert_equal, miniature
from PIL import Image

from pose2id.demo import pretraining as module
from pose2id.demo.people import SyntheticPedestrians
from pose2id.demo.pretraining import train_identity_encoder, train_vae
from pose2id.ipg import IdentityGenerator, TransReID

PEOPLE = SyntheticPedestrians(8, num_cameras=2, images_per_camera=3, seed=5, size=(32, 16), occlusion=0)
TRAINED_ON, UNSEEN = range(6), range(6, 8)
ENCODER = {"image_size": (32, 16), "patch_size": 8, "stride": 8, "dim": 32, "depth": 2, "heads": 2}
OPTIONS = {"config": ENCODER, "people_per_batch": 4, "images_per_person": 3, "progress": False}


def of(people):
    """Images of some of the people, and who is on them."""
    samples = [PEOPLE[i] for i in np.flatnonzero(np.isin(PEOPLE.pids - 1, people))]
    return [sample.image for sample in samples], np.array([sample.pid for sample in samples])


def tensor(images, size=(32, 16)):
    """(B, 3, H, W) in [-1, 1]."""
    pictures = [np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def learnt():
    """The losses of a training function."""

    def losses(function, *args, **options):
        seen, optimize = [], module._optimize

        def watched(model, loss, *others):
            def value():
                seen.append(loss())
                return seen[-1]

            return optimize(model, value, *others)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_optimize", watched)
            trained = function(*args, **options)
        return trained, [float(value.detach()) for value in seen]

    return losses


@pytest.fixture(scope="module")
def encoder(learnt):
    """A trained encoder and its losses."""
    images, pids = of(TRAINED_ON)
    return learnt(train_identity_encoder, images, pids, steps=100, learning_rate=3e-3, **OPTIONS)


@pytest.fixture(scope="module")
def vae(learnt):
    """A trained VAE and its losses."""
    images, _ = of(TRAINED_ON)
    return learnt(
        train_vae, images, image_size=(32, 16), config=VAE, steps=120, batch_size=8, learning_rate=3e-3, progress=False
    )


def told_apart(encoder, people):
    """Mean cosine among images of a person minus that among others', and how often the nearest image is the person's.

    Of features minus their mean, as the batch norm of the training sees them.
    """
    images, pids = of(people)
    with torch.no_grad():
        features = encoder(tensor(images))
    features = F.normalize(features - features.mean(0), dim=1)
    cosines, same = features @ features.T, torch.from_numpy(pids[:, None] == pids)
    itself = torch.eye(len(pids), dtype=torch.bool)
    nearest = cosines.masked_fill(itself, -2).argmax(1)
    separation = cosines[same & ~itself].mean() - cosines[~same].mean()
    return float(separation), float(same[torch.arange(len(pids)), nearest].float().mean())


def test_an_encoder_learns_who_is_who(encoder):
    trained, losses = encoder
    assert len(losses) == 100
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    images, pids = of(TRAINED_ON)
    start = train_identity_encoder(images, pids, steps=1, learning_rate=1e-9, **OPTIONS)
    # 0.70 and 0.89, of 0.14 and 0.28.
    separation, rank1 = told_apart(trained, TRAINED_ON)
    assert separation > 0.5
    assert rank1 > 0.7
    assert max(told_apart(start, TRAINED_ON)) < 0.45


def test_a_trained_encoder_is_a_generators_part(encoder):
    trained, _ = encoder
    assert type(trained) is TransReID
    assert not trained.training
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    assert trained.config == {**TransReID(**ENCODER).config}
    assert trained(torch.zeros(1, 3, 32, 16)).shape == (1, trained.feature_dim)
    assert trained.state_dict().keys() == TransReID(**ENCODER).state_dict().keys()


def test_a_vae_learns_to_rebuild(vae):
    trained, losses = vae
    assert len(losses) == 120
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    images, _ = of(UNSEEN)
    start = train_vae(images, image_size=(32, 16), config=VAE, steps=1, learning_rate=1e-9, progress=False)

    def error(vae):
        with torch.no_grad():
            return float((vae.decode(vae.encode(tensor(images)).latent_dist.mean).sample - tensor(images)).abs().mean())

    assert error(trained) < 0.5 * error(start)
    assert not trained.training
    assert not any(parameter.requires_grad for parameter in trained.parameters())


def test_a_vae_has_plain_blocks_unless_it_is_told_otherwise():
    options = {"image_size": (32, 16), "steps": 1, "batch_size": 1, "progress": False}
    config = {"block_out_channels": [4, 4, 8], "norm_num_groups": 4}
    plain = train_vae(of(UNSEEN)[0][:1], config=config, **options).config
    assert plain.down_block_types == ["DownEncoderBlock2D"] * 3
    assert plain.up_block_types == ["UpDecoderBlock2D"] * 3
    told = train_vae(
        of(UNSEEN)[0][:1], config={**config, "down_block_types": ["AttnDownEncoderBlock2D"] * 3}, **options
    )
    assert told.config.down_block_types == ["AttnDownEncoderBlock2D"] * 3
    assert len(train_vae(of(UNSEEN)[0][:1], **options).encoder.down_blocks) == 1  # diffusers' default


def test_latents_are_scaled_to_unit_deviation(vae):
    trained, _ = vae
    images, _ = of(TRAINED_ON)
    with torch.no_grad():
        means = trained.encode(tensor(images)).latent_dist.mean
    assert float(means.std()) * trained.config.scaling_factor == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("config", [{}, {"scaling_factor": 0.18215}], ids=["unnamed", "named"])
def test_the_scaling_factor_is_kept_with_the_weights(config, tmp_path):
    images, _ = of(UNSEEN)
    given = {name: value for name, value in VAE.items() if name != "scaling_factor"}
    vae = train_vae(images, image_size=(16, 8), config={**given, **config}, steps=1, batch_size=1, progress=False)
    other = miniature()
    parts = {**other.parts, "vae": vae}
    IdentityGenerator(**parts, scheduler=other.scheduler, image_size=(16, 8)).save_pretrained(tmp_path / "weights")
    loaded = IdentityGenerator.from_pretrained(tmp_path / "weights", device="cpu")
    assert loaded.vae.config.scaling_factor == vae.config.scaling_factor
    assert vae.config.scaling_factor not in (1.0, 0.18215)


def briefly(what, seed=0, images=None):
    images, pids = of(UNSEEN) if images is None else images
    if what == "encoder":
        options = {**OPTIONS, "people_per_batch": 2}
        return train_identity_encoder(images, pids, steps=2, seed=seed, **options)
    return train_vae(images, image_size=(16, 8), config=VAE, steps=2, batch_size=2, seed=seed, progress=False)


@pytest.mark.parametrize("what", ["encoder", "vae"])
def test_a_function_of_the_seed(what):
    torch.manual_seed(1)
    np.random.default_rng(1)
    state = torch.get_rng_state()
    first = briefly(what)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = briefly(what), briefly(what, seed=1)
    assert_equal(first.state_dict(), second.state_dict())
    assert any(not torch.equal(tensor, other.state_dict()[name]) for name, tensor in first.state_dict().items())
    if what == "vae":
        assert first.config.scaling_factor == second.config.scaling_factor != other.config.scaling_factor


@pytest.mark.parametrize("what", ["encoder", "vae"])
def test_images_of_any_kind(what, tmp_path):
    images, pids = of(UNSEEN)
    paths = []
    for i, image in enumerate(images):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(paths[-1])
    before = [image.copy() for image in images]
    kinds = [paths, [Image.fromarray(image) for image in images], np.stack(images)]
    expected = briefly(what, images=(images, pids)).state_dict()
    for given in kinds:
        assert_equal(expected, briefly(what, images=(given, pids.tolist())).state_dict())
    assert all(np.array_equal(*pair) for pair in zip(images, before, strict=True))


def test_people_with_one_image_are_left_out():
    images, pids = of(UNSEEN)
    lonely = np.zeros((32, 16, 3), np.uint8)
    with_one = briefly("encoder", images=([*images, lonely], [*pids, 99]))
    assert_equal(briefly("encoder").state_dict(), with_one.state_dict())


def test_people_with_fewer_images_than_asked_for():
    images, pids = of(UNSEEN)
    chosen = [0, 1, 6, 7]  # two of each, where a batch takes three
    encoder = briefly("encoder", images=([images[i] for i in chosen], pids[chosen]))
    assert all(torch.isfinite(tensor).all() for tensor in encoder.state_dict().values())


def test_learning_rates_rise_and_fall():
    """Over the first twentieth, and with a cosine."""
    seen, step = [], torch.optim.AdamW.step

    def watched(self, *args, **options):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    images, _ = of(UNSEEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        config = {"block_out_channels": [4], "norm_num_groups": 4}
        train_vae(images, image_size=(8, 4), config=config, steps=40, batch_size=1, learning_rate=0.01, progress=False)
    cosine = [0.01 * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(40)]
    np.testing.assert_allclose(seen, [0.005, *cosine[1:]], rtol=1e-6)


IMAGES, PIDS = of(UNSEEN)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": []}, "images must hold at least one image"),
        ({"images": "people.png"}, "images must be a sequence of images"),
        ({"images": [*IMAGES[:-1], "nowhere.png"]}, r"images\[11\] cannot be read"),
        ({"pids": PIDS[:-1]}, r"pids must have shape \(12,\)"),
        ({"pids": [pid + 0.5 for pid in PIDS]}, "pids must hold integers"),
        ({"pids": None}, "pids must hold integers, got None"),
        ({"pids": np.arange(12)}, "pids must hold at least people_per_batch=2 people with two images or more, got 0"),
        ({"people_per_batch": 3}, "at least people_per_batch=3 people with two images or more, got 2"),
        ({"people_per_batch": 1}, "people_per_batch must be at least 2, got 1"),
        ({"images_per_person": 1}, "images_per_person must be at least 2, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"learning_rate": 2}, r"learning_rate must be in \[0, 1\], got 2"),
        ({"weight_decay": -1}, "weight_decay must be"),
        ({"device": "gpu"}, "device must be a torch device"),
        ({"config": {**ENCODER, "stride": 16}}, "image_size, patch_size and stride"),
    ],
)
def test_bad_input_of_the_encoder(given, message):
    options = {"images": IMAGES, "pids": PIDS, "steps": 1, **OPTIONS, "people_per_batch": 2, **given}
    with pytest.raises((TypeError, ValueError), match=message):
        train_identity_encoder(options.pop("images"), options.pop("pids"), **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": []}, "images must hold at least one image"),
        ({"image_size": (15, 8)}, r"image_size must be in multiples of 2, .*got \(15, 8\)"),
        ({"image_size": 16}, r"image_size must be \(height, width\)"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"device": "gpu"}, "device must be a torch device"),
    ],
)
def test_bad_input_of_the_vae(given, message):
    options = {"images": IMAGES, "image_size": (16, 8), "steps": 1, "config": VAE, "progress": False, **given}
    with pytest.raises((TypeError, ValueError), match=message):
        train_vae(options.pop("images"), **options)


def test_the_triplets_of_a_batch():
    """Batch-hard with a soft margin, written out."""
    draws = torch.Generator().manual_seed(0)
    features, who = torch.randn(9, 5, generator=draws), torch.tensor([0, 1, 2] * 3)
    losses = []
    for i in range(9):
        distances = [(float((features[i] - other).norm()), int(who[j] == who[i])) for j, other in enumerate(features)]
        farthest = max(distance for distance, same in distances if same)
        nearest = min(distance for distance, same in distances if not same)
        losses.append(math.log1p(math.exp(farthest - nearest)))
    assert float(module._batch_hard_triplet(features, who)) == pytest.approx(np.mean(losses), rel=1e-5)
