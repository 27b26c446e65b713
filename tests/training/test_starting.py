"""Where training starts: which weights are taken, downloaded and new, and what an error says."""

from __future__ import annotations

import json

import diffusers
import pytest
import tiny
import torch
from conftest import ROOT
from miniature import UNET, assert_equal, miniature
from safetensors.torch import save_file

from pose2id.ipg.weights import PARTS, VAE_REPO, open_weights
from pose2id.training import start as starting
from pose2id.training.objective import TRAINED

REPO, DIFFUSION = "user/weights", "user/diffusion"
SD_FILES = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Directory of a generator's weights."""
    directory = tmp_path_factory.mktemp("starting") / "weights"
    generator = miniature()
    generator.round_bank = False
    generator.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def stock():
    """A UNet as Stable Diffusion's: nobody has made it a generator's yet."""
    torch.manual_seed(5)
    return diffusers.UNet2DConditionModel(**UNET)


@pytest.fixture(scope="module")
def diffusion(stock, tmp_path_factory):
    """Directory as that of Stable Diffusion, with a UNet in half precision and other folders beside it."""
    directory = tmp_path_factory.mktemp("starting") / "diffusion"
    (directory / "unet").mkdir(parents=True)
    (directory / "vae").mkdir()
    (directory / "vae" / "config.json").write_text("{}")
    (directory / "model_index.json").write_text("{}")
    config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", **UNET}
    (directory / "unet" / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.half() for name, tensor in stock.state_dict().items()},
        directory / "unet" / "diffusion_pytorch_model.safetensors",
    )
    return directory


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.*") if path.is_file()
    }


def asked_for(hub, repo):
    """Files of a repository that a client asked the Hub for."""
    return {r.path.partition("/resolve/")[2].partition("/")[2] for r in hub.requests if r.path.startswith(f"/{repo}/")}


def assert_from(unet, stock, *, head=True):
    """The stock UNet's weights, rounded to half precision as its file is."""
    expected = {name: tensor.half().float() for name, tensor in stock.state_dict().items()}
    if not head:
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith(("conv_out", "conv_norm"))}
    assert_equal(expected, unet.state_dict())


def test_fine_tuning(weights):
    generator = starting.start(weights, device="cpu")
    before = miniature()
    for name, part in generator.parts.items():
        assert_equal(before.parts[name].state_dict(), part.state_dict())
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert generator.image_size == (16, 8)
    assert generator.round_bank is False
    assert generator.scheduler.config.prediction_type == "v_prediction"
    assert generator.sources == {}


def test_the_licence_is_that_of_what_training_starts_from(weights, diffusion, stock, tmp_path):
    def license_of(*place, **options):
        return starting.start(*place, **options, device="cpu").license

    assert license_of(weights) == "creativeml-openrail-m"
    assert license_of(weights, unet=diffusion) == "creativeml-openrail-m"
    assert license_of(weights, unet=UNET) == "other"
    miniature().replaced(license="mit").save_pretrained(tmp_path / "mit")
    assert license_of(tmp_path / "mit") == "mit"
    assert license_of(tmp_path / "mit", unet=UNET) == "other"
    assert license_of(tmp_path / "mit", unet=UNET, license="mit") == "mit"
    assert license_of(weights, license="openrail++") == "openrail++"
    assert license_of(tmp_path / "mit", unet=diffusion) == "creativeml-openrail-m"
    miniature().vae.save_pretrained(tmp_path / "vae")
    assert license_of(tmp_path / "mit", vae=tmp_path / "vae") == "mit"
    with pytest.raises(ValueError, match="license must be"):
        license_of(weights, license="My Own")
    parts = {"identity_encoder": miniature().identity_encoder, "vae": miniature().vae, "image_size": (16, 8)}
    assert starting.fresh(**parts, unet=UNET).license == "other"
    assert starting.fresh(**parts, unet=UNET, license="mit").license == "mit"
    assert starting.fresh(**parts, unet=stock).license == "creativeml-openrail-m"


def test_weights_in_half_precision_become_single(tmp_path):
    miniature().to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    generator = starting.start(tmp_path / "half", device="cpu")
    assert generator.dtype == torch.float32
    other = starting.start(tmp_path / "half", unet=UNET, device="cpu")
    assert {parameter.dtype for part in other.parts.values() for parameter in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("unet", [None, UNET], ids=["fine-tuning", "from scratch"])
def test_image_size(weights, unet):
    generator = starting.start(weights, unet=unet, image_size=(32, 24))
    assert generator.image_size == (32, 24)
    assert generator.latent_shape == (4, 16, 12)


def test_from_a_configuration(weights):
    options = {"unet": {**UNET, "cross_attention_dim": 12}, "num_tokens": 3, "device": "cpu"}
    generator = starting.start(weights, **options, seed=4)
    before = miniature()
    for name in ("identity_encoder", "vae"):
        assert_equal(before.parts[name].state_dict(), generator.parts[name].state_dict())
    tokens = generator.identity_tokens
    assert (tokens.feature_dim, tokens.num_tokens, tokens.dim) == (40, 3, 12)
    assert generator.pose_encoder.downscale == 2
    assert generator.image_size == (16, 8)
    assert generator.round_bank is False
    same = starting.start(weights, **options, seed=4)
    other = starting.start(weights, **options, seed=5)
    for name in TRAINED:
        assert_equal(generator.parts[name].state_dict(), same.parts[name].state_dict())
    assert not torch.equal(other.identity_tokens.proj_motion.weight, tokens.proj_motion.weight)
    assert not torch.equal(other.denoising_unet.conv_in.weight, generator.denoising_unet.conv_in.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("unet", [None, UNET], ids=["fine-tuning", "from scratch"])
def test_the_gpu_is_the_default(weights, unet):
    on_cpu = starting.start(weights, unet=unet, device="cpu")
    on_cuda = starting.start(weights, unet=unet)
    for name, part in on_cuda.parts.items():
        assert {tensor.device.type for tensor in part.state_dict().values()} <= {"cuda"}
        assert_equal(on_cpu.parts[name].state_dict(), part.cpu().state_dict())


def test_from_a_file_of_a_configuration(weights, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(UNET))
    expected = starting.start(weights, unet=UNET)
    for given in (tmp_path / "small.json", str(tmp_path / "small.json")):
        found = starting.start(weights, unet=given)
        assert_equal(expected.denoising_unet.state_dict(), found.denoising_unet.state_dict())
    with pytest.raises(FileNotFoundError, match=r"unet .*none\.json must be a JSON file, and there is none"):
        starting.start("nobody/nothing", unet=tmp_path / "none.json")  # said before weights are looked for


def test_channels_of_a_configuration_are_the_vaes():
    tiny_unet = {**UNET, "sample_size": 16}
    generator = starting.start("tiny", unet=tiny_unet, num_tokens=2)
    assert generator.latent_shape[0] == 8
    for unet in (generator.reference_unet, generator.denoising_unet):
        assert (unet.config.in_channels, unet.config.out_channels) == (8, 8)
    with pytest.raises(
        ValueError, match=r"latent_channels and denoising_unet\.config\.in_channels must be equal, got 8 and 4"
    ):
        starting.start("tiny", unet={**tiny_unet, "in_channels": 4}, num_tokens=2)


def test_published_sizes_are_the_defaults(weights):
    generator = starting.start(weights, unet=UNET)
    assert generator.identity_tokens.num_tokens == 20
    assert generator.pose_encoder.config["channels"] == [16, 32]  # of four: 16, 32, 64, 128
    assert generator.pose_encoder.config["out_channels"] == 16


def test_two_equal_unets_that_share_nothing(weights, stock, diffusion):
    for unet in (UNET, diffusion):
        generator = starting.start(weights, unet=unet)
        reference, denoising = generator.reference_unet.state_dict(), generator.denoising_unet.state_dict()
        assert_equal(reference, {name: tensor for name, tensor in denoising.items() if name in reference})
        assert {name.split(".")[0] for name in denoising.keys() - reference.keys()} == {"conv_norm_out", "conv_out"}
        with torch.no_grad():
            for parameter in generator.denoising_unet.parameters():
                parameter.fill_(7)
        assert not any((tensor == 7).all() for tensor in generator.reference_unet.state_dict().values())


def test_poses_begin_to_count_as_they_are_learnt(weights):
    generator = starting.start(weights, unet=UNET)
    last = generator.pose_encoder.conv_out
    assert not last.weight.any()
    assert not last.bias.any()
    assert not generator.encode_poses(torch.rand(2, 3, 16, 8)).any()
    assert generator.pose_encoder.conv_in.weight.any()


def test_a_new_generator_draws_on_its_own_seed():
    encoder, vae = miniature().identity_encoder, miniature().vae
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = starting.fresh(identity_encoder=encoder, vae=vae, unet=UNET, image_size=(16, 8))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = starting.fresh(identity_encoder=encoder, vae=vae, unet=UNET, image_size=(16, 8))
    for name in TRAINED:
        assert_equal(first.parts[name].state_dict(), second.parts[name].state_dict())
    assert first.scheduler.config.prediction_type == "v_prediction"
    assert first.scheduler.config.rescale_betas_zero_snr
    assert first.scheduler.config.timestep_spacing == "trailing"


def test_a_new_generator_of_given_parts(stock):
    encoder, vae = miniature().identity_encoder, miniature().vae
    unet = diffusers.UNet2DConditionModel(**UNET)
    unet.load_state_dict(stock.state_dict())
    scheduler = diffusers.DDIMScheduler(**{**tiny.SCHEDULER, "prediction_type": "epsilon"})
    generator = starting.fresh(
        identity_encoder=encoder,
        vae=vae,
        unet=unet,
        num_tokens=5,
        pose_channels=(8, 4),
        scheduler=scheduler,
        image_size=(16, 8),
        round_bank=False,
        sources={"user/name": "1234"},
    )
    assert_equal(stock.state_dict(), generator.denoising_unet.state_dict())
    assert generator.pose_encoder.config == {"out_channels": 16, "channels": [8, 4]}
    assert generator.scheduler is scheduler
    assert generator.identity_encoder is encoder
    assert generator.sources == {"user/name": "1234"}


def test_from_a_directory_of_stable_diffusion(weights, stock, diffusion):
    generator = starting.start(weights, unet=diffusion, device="cpu")
    assert_from(generator.denoising_unet, stock)
    assert_from(generator.reference_unet, stock, head=False)
    assert generator.dtype == torch.float32
    assert generator.sources == {}


@pytest.fixture
def online(hub, weights, diffusion):
    """The Hub with both, and the commits."""
    return {REPO: hub.add(REPO, contents(weights)), DIFFUSION: hub.add(DIFFUSION, contents(diffusion))}


def test_from_the_hub(hub, online, stock, tmp_path):
    generator = starting.start(REPO, unet=DIFFUSION, cache_dir=tmp_path, device="cpu")
    assert_from(generator.denoising_unet, stock)
    assert generator.sources == online
    # Neither the weights that are not needed, nor the rest of a diffusion model.
    assert asked_for(hub, DIFFUSION) == SD_FILES
    needed = {"pose2id.json", "identity_encoder.safetensors", "vae.safetensors"}
    assert asked_for(hub, REPO) == needed
    hub.requests.clear()
    hub.stop()
    again = starting.start(REPO, unet=DIFFUSION, cache_dir=tmp_path, device="cpu", local_files_only=True)
    for name in PARTS:
        assert_equal(generator.parts[name].state_dict(), again.parts[name].state_dict())
    assert again.sources == online
    assert hub.requests == []


def test_sources_are_saved_with_the_weights(hub, online, tmp_path):
    starting.start(REPO, unet=DIFFUSION, cache_dir=tmp_path / "cache").save_pretrained(tmp_path / "saved")
    assert starting.start(tmp_path / "saved").sources == online


def test_fine_tuning_from_the_hub(hub, online, tmp_path):
    generator = starting.start(REPO, cache_dir=tmp_path)
    assert generator.sources == {REPO: online[REPO]}
    assert {f"{name}.safetensors" for name in PARTS} <= asked_for(hub, REPO)


def test_a_pinned_unet(hub, online, stock, tmp_path):
    hub.add(DIFFUSION, {"unet/config.json": b"{}"})
    generator = starting.start(REPO, unet=f"{DIFFUSION}@{online[DIFFUSION]}", cache_dir=tmp_path, device="cpu")
    assert_from(generator.denoising_unet, stock)
    assert generator.sources == online
    with pytest.raises(ValueError, match="unet"):
        starting.start(REPO, unet=DIFFUSION, cache_dir=tmp_path)


def test_a_pinned_revision_is_that_of_the_weights(hub, online, stock, tmp_path):
    hub.add(REPO, {"pose2id.json": b"{}"})
    generator = starting.start(REPO, unet=DIFFUSION, revision=online[REPO], cache_dir=tmp_path)
    assert generator.sources == online


def test_published_weights_without_their_unets(hub, tmp_path):
    """Of five published files the encoder alone is needed, and the VAE from elsewhere."""
    shapes = json.loads((ROOT / "tests" / "golden" / "published_shapes.json").read_text())
    encoder = PARTS["identity_encoder"].published_file
    path = tmp_path / encoder
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes[encoder].items()}, path)
    names = [part.published_file for part in PARTS.values() if part.config is not None]
    hub.add(REPO, {name: path.read_bytes() if name == encoder else b"broken" for name in names})
    vae = tmp_path / "vae.safetensors"
    save_file(tiny.parts()["vae"].state_dict(), vae)
    config = json.dumps(tiny.VAE).encode()
    hub.add(VAE_REPO, {"config.json": config, "diffusion_pytorch_model.safetensors": vae.read_bytes()})
    found = open_weights(REPO, without=TRAINED, cache_dir=tmp_path / "cache")
    assert set(found.files) == {"identity_encoder", "vae"}
    assert asked_for(hub, REPO) <= {encoder, "pose2id.json"}


def test_a_unet_that_is_nowhere(hub, online, weights, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"unet must be a directory or a repository .*'user/nowhere'"):
        starting.start(weights, unet="user/nowhere", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"unet must be a directory or a repository"):
        starting.start(weights, unet=tmp_path / "nowhere", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"revision must be .*got 'v9'"):
        starting.start(weights, unet=f"{DIFFUSION}@v9", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"user/weights at 'main' lacks unet/config\.json, unet/diffusion_pyto"):
        starting.start(weights, unet=REPO, cache_dir=tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(UNET))
    with pytest.raises(FileNotFoundError, match=r"lacks unet/diffusion_pytorch_model\.safetensors"):
        starting.start(weights, unet=tmp_path)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ("{", {}, r"config\.json is not valid JSON"),
        (json.dumps(UNET), {"x": torch.zeros(1)}, r"missing: .*1 unexpected: x"),
        (json.dumps({**UNET, "layers_per_block": 2}), None, "missing"),
        (json.dumps({**UNET, "block_out_channels": [16, 16]}), None, "unet"),
    ],
)
def test_a_unet_that_is_none(weights, stock, tmp_path, config, tensors, message):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(config)
    given = stock.state_dict() if tensors is None else tensors
    save_file(given, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=message):
        starting.start(weights, unet=tmp_path)


def test_damaged_weights_of_a_unet(weights, diffusion, tmp_path):
    (tmp_path / "unet").mkdir()
    for name in SD_FILES:
        (tmp_path / name).write_bytes((diffusion / name).read_bytes()[: 500 if name.endswith("rs") else None])
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        starting.start(weights, unet=tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_size": (17, 9)}, r"image_size must be in multiples of 2, got \(17, 9\)"),
        ({"image_size": (17, 9), "unet": UNET}, r"image_size must be in multiples of 2, got \(17, 9\)"),
        ({"image_size": "16x8"}, "image_size must be"),
        ({"image_size": (0, 8)}, "image_size must be at least 1"),
        ({"num_tokens": 7}, "num_tokens must not be given without unet"),
        ({"num_tokens": 0, "unet": UNET}, "num_tokens must be at least 1"),
        ({"num_tokens": 2.5, "unet": UNET}, "num_tokens must be an integer"),
        ({"seed": "a", "unet": UNET}, "seed must be an integer"),
        ({"seed": -1, "unet": UNET}, "seed must be at least 0"),
        ({"unet": 5}, "PathLike.*not .?int"),
        ({"unet": {**UNET, "colour": 3}}, "unet must be .*colour"),
        ({"unet": {**UNET, "block_out_channels": [16, 16]}}, "unet must be .*block_out_channels"),
        ({"unet": {**UNET, "in_channels": 5}}, "must be equal, got 4 and 5"),
        ({"device": "gpu"}, "device must be"),
        ({"device": "gpu", "unet": UNET}, "device must be"),
        ({"dtype": torch.float16}, "dtype"),
        ({"colour": 3}, "colour"),
        ({"colour": 3, "unet": UNET}, "colour"),
    ],
)
def test_bad_input(weights, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        starting.start(weights, **given)


def test_no_weights():
    with pytest.raises(FileNotFoundError, match="must be a directory or a repository"):
        starting.start("nowhere")
