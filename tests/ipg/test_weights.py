"""Weights in both layouts: what is read, what is refused, and what an error says."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import diffusers
import numpy as np
import pytest
import recipe
import tiny
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from pose2id import IdentityGenerator
from pose2id.cli import main
from pose2id.ipg import PoseEncoder, convert, weights
from pose2id.ipg.sampler import denoise

SHAPES = json.loads((ROOT / "tests" / "golden" / "published_shapes.json").read_text())
PARTS = {part.published_file: name for name, part in weights.PARTS.items()}
UNUSED_ENCODER_KEYS = 46  # of 210: a block, a norm, a classifier of the ViT, five heads with a batch norm each


def constant(key):
    return (zlib.crc32(key.encode()) % 1000 - 500) / 1000


def stored(shapes):
    """A state dict of the given shapes that takes a few bytes a tensor: one value each, that tells its key."""
    return {
        key: torch.tensor(0) if key.endswith("num_batches_tracked") else torch.tensor(constant(key)).expand(shape)
        for key, shape in shapes.items()
    }


def write_published(folder, changed=None):
    """The five published files at full size, and a small VAE beside them."""
    folder.mkdir()
    for file, shapes in SHAPES.items():
        if file.endswith(".pth"):
            torch.save((changed or {}).get(file, stored(shapes)), folder / file)
    vae = folder / "vae"
    vae.mkdir()
    (vae / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **tiny.VAE}))
    save_file(tiny.parts()["vae"].state_dict(), vae / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("weights") / "published")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "own"
    tiny.generator().save_pretrained(folder)
    return folder


def opened(folder, **options):
    return weights.open_weights(folder, vae=options.pop("vae", folder / "vae"), **options)


def pictures(generator):
    images = list(np.random.default_rng(0).integers(0, 256, (3, 100, 50, 3), dtype=np.uint8))
    noise = torch.randn(1, 2, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    return [np.array(p) for p in generator.generate(images[:1], images[1:], num_inference_steps=2, latents=noise)[0]]


def test_own_layout_gives_the_same_pictures(own):
    assert sorted(path.name for path in own.iterdir()) == sorted(
        ["README.md", "pose2id.json", *(f"{name}.safetensors" for name in weights.PARTS)]
    )
    loaded = IdentityGenerator.from_pretrained(own, device="cpu")
    np.testing.assert_array_equal(pictures(loaded), pictures(tiny.generator()))
    assert loaded.image_size == (128, 64)
    assert loaded.sources == {}
    assert not any(parameter.requires_grad for part in loaded.parts.values() for parameter in part.parameters())


def test_the_model_card_has_the_licence_and_no_path(own):
    card = (own / "README.md").read_text()
    assert "license: creativeml-openrail-m" in card
    assert "CreativeML OpenRAIL-M" in card
    assert IdentityGenerator.from_pretrained(own, device="cpu").license == "creativeml-openrail-m"
    assert str(own.parent) not in card + (own / "pose2id.json").read_text()


@pytest.mark.parametrize(("name", "said"), [("mit", "named above, mit."), ("other", "terms of whoever")])
def test_another_licence(tmp_path, name, said):
    assert tiny.generator().replaced(license=name).license == name
    tiny.generator(license=name).save_pretrained(tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text()
    assert f"\nlicense: {name}\n" in card
    assert said in card
    assert "OpenRAIL" not in card
    weights.convert(tmp_path / "own", tmp_path / "half", dtype=torch.float16)
    assert IdentityGenerator.from_pretrained(tmp_path / "half", device="cpu").license == name


@pytest.mark.parametrize(
    ("given", "error"), [(None, ValueError), ("MIT\nlibrary_name: x", ValueError), ("", ValueError)]
)
def test_a_licence_that_is_none(tmp_path, given, error):
    with pytest.raises(error, match="license must be a name of the Hub such as 'mit'"):
        tiny.generator(license=given)


def test_a_licence_that_is_none_is_not_saved(tmp_path):
    generator = tiny.generator()
    generator.license = "mit\nbase_model: another"
    with pytest.raises(ValueError, match="license must be"):
        generator.save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_another_unet_has_another_licence():
    generator = tiny.generator(license="mit")
    assert generator.replaced(vae=generator.vae).license == "mit"
    assert generator.replaced(denoising_unet=generator.denoising_unet).license == "creativeml-openrail-m"
    assert generator.replaced(reference_unet=generator.reference_unet, license="other").license == "other"


def test_weights_that_were_saved_without_a_licence(tmp_path, own):
    shutil.copytree(own, tmp_path / "old")
    content = json.loads((own / "pose2id.json").read_text())
    del content["license"]
    (tmp_path / "old" / "pose2id.json").write_text(json.dumps(content))
    assert opened(tmp_path / "old", vae=weights.VAE_REPO).license == "creativeml-openrail-m"


def test_everything_that_is_configured_is_saved(tmp_path):
    replaced = {"scheduler": diffusers.DDPMScheduler(prediction_type="v_prediction"), "round_bank": False}
    tiny.generator(**replaced, sources={"somebody/weights": "0123"}).save_pretrained(tmp_path / "own")
    loaded = IdentityGenerator.from_pretrained(tmp_path / "own", device="cpu")
    assert isinstance(loaded.scheduler, diffusers.DDPMScheduler)
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert loaded.round_bank is False
    assert loaded.sources == {"somebody/weights": "0123"}
    assert "somebody/weights at commit 0123" in (tmp_path / "own" / "README.md").read_text()
    assert pictures(loaded)[0].shape == (256, 128, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parts_come_in_the_dtype_asked_for(own, dtype):
    loaded = IdentityGenerator.from_pretrained(own, dtype=dtype, device="cpu")
    for name, part in loaded.parts.items():
        expected = load_file(own / f"{name}.safetensors")
        assert part.state_dict().keys() == expected.keys()
        for key, tensor in part.state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected[key].to(dtype))


@pytest.mark.parametrize("name", [name for name in weights.PARTS if name != "vae"])
def test_full_size_parts_load_by_key_name(published, name):
    part = opened(published).load(name, dtype=torch.float16, device="cpu")
    state = part.state_dict()
    file = weights.PARTS[name].published_file
    lacking = set(SHAPES[file]) - set(state)
    # Only what inference does not need is left out.
    assert all(re.match(weights.PARTS[name].unused, key) for key in lacking)
    assert len(lacking) == (UNUSED_ENCODER_KEYS if name == "identity_encoder" else 0)
    for key, tensor in state.items():
        assert list(tensor.shape) == SHAPES[file][key]
        assert tensor.is_contiguous()
        assert tensor.flatten()[0] == tensor.flatten()[-1] == torch.tensor(constant(key)).half()
    # Figures of the published files (values), less what is left out.
    published_values = {
        "denoising_unet": 859_520_964,
        "reference_unet": 859_508_800,
        "pose_encoder": 514_896,
        "identity_tokens": 58_999_296,
        "identity_encoder": 103_656_429,
    }
    missing_values = sum(int(np.prod(SHAPES[file][key])) for key in lacking)
    assert sum(tensor.numel() for tensor in state.values()) == published_values[name] - missing_values


def test_the_published_vae_fits(tmp_path, published):
    shapes = SHAPES["diffusion_pytorch_model.safetensors"]
    (tmp_path / "config.json").write_text(json.dumps(tiny.PUBLISHED_VAE))
    save_file(
        {key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    vae = opened(published, vae=tmp_path).load("vae", dtype=torch.float16, device="cpu")
    assert sum(tensor.numel() for tensor in vae.state_dict().values()) == 83_653_863


def removed(state):
    key = next(key for key in state if key.endswith("weight"))
    return {name: tensor for name, tensor in state.items() if name != key}, f"1 missing: {key}"


def added(state):
    return {**state, "surplus.weight": torch.zeros(3)}, "1 unexpected: surplus.weight"


def renamed(state):
    key = next(key for key in state if key.endswith("weight"))
    new = {name if name != key else "other.weight": tensor for name, tensor in state.items()}
    return new, f"1 missing: {key}; 1 unexpected: other.weight"


def reshaped(state):
    key = next(key for key in state if key.endswith("weight"))
    shape = tuple(state[key].shape)
    return {**state, key: torch.zeros(1, 2)}, f"1 of another shape: {key} (1, 2) for {shape}"


def of_integers(state):
    key = next(key for key in state if key.endswith("weight"))
    return {**state, key: torch.zeros(1, dtype=torch.int64).expand(state[key].shape)}, f"1 not floating: {key}"


@pytest.mark.parametrize("change", [removed, added, renamed, reshaped, of_integers])
@pytest.mark.parametrize("file", [file for file in SHAPES if file.endswith(".pth")])
def test_published_files_are_strict(tmp_path, published, file, change):
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in published.iterdir():
        (folder / path.name).symlink_to(path)
    state, message = change(stored(SHAPES[file]))
    (folder / file).unlink()
    torch.save(state, folder / file)
    with pytest.raises(ValueError, match="do not fit their networks") as caught:
        opened(folder)
    # That part and no other.
    assert str(caught.value).splitlines()[1:] == [f"  {PARTS[file]} ({file}): {message}"]


@pytest.mark.parametrize("change", [removed, added, renamed, reshaped, of_integers])
@pytest.mark.parametrize("name", weights.PARTS)
def test_own_files_are_strict(tmp_path, own, name, change):
    shutil.copytree(own, tmp_path / "own")
    file = tmp_path / "own" / f"{name}.safetensors"
    state, message = change(load_file(file))
    save_file({key: tensor.clone() for key, tensor in state.items()}, file)
    with pytest.raises(ValueError, match=re.escape(f"{name} ({name}.safetensors): {message}")):
        IdentityGenerator.from_pretrained(tmp_path / "own", device="cpu")


def test_one_error_for_all_parts(tmp_path):
    changed = {file: added(stored(SHAPES[file]))[0] for file in ("IFR.pth", "pose_guider.pth")}
    changed["denoising_unet.pth"] = stored(SHAPES["pose_guider.pth"])
    with pytest.raises(ValueError, match="do not fit their networks") as caught:
        opened(write_published(tmp_path / "changed", changed))
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["identity_tokens", "denoising_unet", "pose_encoder"]
    # A long list is cut, and counted.
    assert "682 missing" in lines[2]
    assert len(lines[2]) < 2000


def test_keys_that_inference_does_not_need(tmp_path):
    encoder, reference = SHAPES["transformer_20.pth"], SHAPES["reference_unet.pth"]
    needed = {
        key: shape for key, shape in encoder.items() if not re.match(weights.PARTS["identity_encoder"].unused, key)
    }
    head = {"conv_norm_out.weight": [320], "conv_norm_out.bias": [320], "conv_out.weight": [4, 320, 3, 3]}
    changed = {"transformer_20.pth": stored(needed), "reference_unet.pth": stored({**reference, **head})}
    opened(write_published(tmp_path / "lean", changed))
    with pytest.raises(ValueError, match=r"identity_encoder \(transformer_20.pth\): 1 unexpected: base.sie_embed"):
        opened(
            write_published(
                tmp_path / "cameras", {"transformer_20.pth": stored({**needed, "base.sie_embed": [6, 1, 768]})}
            )
        )


def test_a_data_parallel_prefix_is_taken_off(tmp_path):
    prefixed = {f"module.{key}": tensor for key, tensor in stored(SHAPES["transformer_20.pth"]).items()}
    opened(write_published(tmp_path / "prefixed", {"transformer_20.pth": prefixed}))


def test_a_vae_with_the_old_attention_names(tmp_path, published):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = tiny.parts()["vae"].state_dict()
    old = {re.sub(r"to_q|to_k|to_v|to_out\.0", lambda match: new[match[0]], key): t for key, t in state.items()}
    assert sum("proj_attn" in key for key in old) == 4
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **tiny.VAE}))
    save_file(old, folder / "diffusion_pytorch_model.safetensors")
    vae = opened(published, vae=folder).load("vae", dtype=torch.float32, device="cpu")
    # diffusers' own loader reads such files too.
    expected = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).state_dict()
    assert vae.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in vae.state_dict().items())


def test_another_vae_for_weights_that_bring_one(tmp_path, own):
    other = recipe.filled(diffusers.AutoencoderKL(**tiny.VAE), "other/")
    other.save_pretrained(tmp_path)
    loaded = IdentityGenerator.from_pretrained(own, vae=tmp_path, device="cpu")
    assert torch.equal(loaded.vae.encoder.conv_in.weight, other.encoder.conv_in.weight)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zipped):
    ran = tmp_path / "ran"
    state = {**stored(SHAPES["IFR.pth"]), "surplus": Harmful(ran)}
    folder = write_published(tmp_path / "harmful")
    torch.save(state, folder / "IFR.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"IFR.pth is damaged or holds more than tensors, and was not loaded"
    ) as caught:
        opened(folder)
    assert not ran.exists()
    assert "weights_only=False" not in str(caught.value)  # how to run it all the same is nothing to suggest


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.*TorchScript:UserWarning")
def test_other_archives_are_refused_without_a_word_on_how_to_run_them(tmp_path):
    folder = write_published(tmp_path / "scripted")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(folder / "IFR.pth"))
    with pytest.raises(ValueError, match="was not loaded") as caught:
        opened(folder)
    assert "weights_only" not in str(caught.value)


def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"
    folder = write_published(tmp_path / "harmful")
    (folder / "IFR.pth").write_bytes(pickle.dumps(Harmful(ran), protocol=2))
    with pytest.raises(ValueError, match="was not loaded"):
        opened(folder)
    assert not ran.exists()


def test_files_of_old_torch_versions_are_read(tmp_path, published):
    folder = write_published(tmp_path / "old")
    torch.save(stored(SHAPES["pose_guider.pth"]), folder / "pose_guider.pth", _use_new_zipfile_serialization=False)
    state = opened(folder).state("pose_encoder")
    assert state["conv_in.bias"].tolist() == [pytest.approx(constant("conv_in.bias"))] * 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "IFR.pth"),
        (b"<!doctype html><title>Not found</title>", "IFR.pth is damaged or holds more than tensors"),
        ("half", "IFR.pth is damaged or holds more than tensors"),
        ("list", "IFR.pth must map names to tensors"),
        ("nested", "IFR.pth must map names to tensors"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    folder = write_published(tmp_path / "damaged")
    path = folder / "IFR.pth"
    if content == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content in ("list", "nested"):
        torch.save([torch.zeros(1)] if content == "list" else {"state_dict": stored(SHAPES["IFR.pth"])}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened(folder)


def test_a_git_lfs_pointer_is_told(tmp_path):
    folder = write_published(tmp_path / "pointer")
    (folder / "IFR.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"IFR.pth is a Git LFS pointer.*git lfs pull"):
        opened(folder)


def test_a_sampler_of_ones_own(own):
    def sampler(*given, **options):
        return denoise(*given, **options)

    assert IdentityGenerator.from_pretrained(own, device="cpu", sampler=sampler).sampler is sampler
    assert IdentityGenerator.from_pretrained(own, device="cpu").sampler is denoise


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float16"}, TypeError, "dtype must be one of"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of"),
        ({"device": "gpu"}, ValueError, "device must be a torch device"),
        ({"repo_or_dir": None}, TypeError, "PathLike.*not .?NoneType"),
        (
            {"repo_or_dir": "mistyped"},
            FileNotFoundError,
            "'mistyped'. Known are the published 'yuanc3/Pose2ID', or the .*'tiny'",
        ),
        ({"repo_or_dir": "mistyped", "sampler": "ddim"}, TypeError, "sampler must be callable"),
    ],
)
def test_bad_arguments(own, options, error, message):
    with pytest.raises(error, match=message):
        IdentityGenerator.from_pretrained(**{"repo_or_dir": own, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(own):
    with pytest.raises(ValueError, match="it sees no CUDA device"):
        IdentityGenerator.from_pretrained(own, device="cuda")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_saved_files_have_the_permissions_of_new_files(own, tmp_path):
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in own.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_cut_safetensors_file_is_named(tmp_path, own):
    shutil.copytree(own, tmp_path / "own")
    file = tmp_path / "own" / "vae.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"vae.safetensors is damaged or not a safetensors file"):
        IdentityGenerator.from_pretrained(tmp_path / "own", device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format=2), "must have format 1, got 2"),
        (lambda content: content["parts"].pop("vae"), "must hold an object 'vae', got null"),
        (lambda content: content.update(parts=3), "must hold an object 'parts', got 3"),
        (
            lambda content: content["parts"].update(denoising_unet="a/b"),
            "must hold an object 'denoising_unet', got \"a/b\"",
        ),
        (lambda content: content.pop("scheduler"), "must hold an object 'scheduler', got null"),
        (lambda content: content.update(sources=["a/b"]), "must hold an object 'sources'"),
        (
            lambda content: content["scheduler"].update(_class_name="DiffusionPipeline"),
            "_class_name of the scheduler .* must be one of diffusers",
        ),
        (lambda content: content["scheduler"].update(_class_name="SchedulerMixin"), "configuration of the scheduler"),
        (
            lambda content: content["scheduler"].pop("_class_name"),
            "_class_name of the scheduler .* must be one of diffusers",
        ),
        (lambda content: content["scheduler"].update(beta_schedule="none"), "configuration of the scheduler"),
        (lambda content: content["parts"]["pose_encoder"].update(width=3), "configuration of pose_encoder"),
        (lambda content: content["parts"]["pose_encoder"].update(channels=[]), "configuration of pose_encoder"),
        (lambda content: content["parts"]["identity_encoder"].update(stride=0), "configuration of identity_encoder"),
        (lambda content: content["parts"]["identity_encoder"].update(heads=5), "dim must be a multiple of heads"),
        (
            lambda content: content["parts"]["identity_encoder"].update(depth=10**8),
            "configuration of identity_encoder builds no TransReID: more than 10,000 tensors",
        ),
        (
            lambda content: content["parts"]["denoising_unet"].update(transformer_layers_per_block=10**8),
            "configuration of denoising_unet builds no UNet2DConditionModel: more than 10,000 tensors",
        ),
        (
            lambda content: content["scheduler"].update(num_train_timesteps=10**12),
            r"configuration of the scheduler .*num_train_timesteps 1e\+12, more than 100,000",
        ),
        (lambda content: content["settings"].pop("round_bank"), "settings in .* must be image_size and round_bank"),
        (
            lambda content: content["settings"].update(round_bank="false"),
            "settings in .* must be image_size and round_bank",
        ),
        (lambda content: content["settings"].update(image_size=[128]), "image_size"),
        (lambda content: content["settings"].update(image_size=[10**9] * 2), r"pose2id\.json: image_size .* most 8192"),
        (
            lambda content: content["settings"].update(image_size=[10**400, 64]),
            r"pose2id\.json: image_size .* most 8192",
        ),
        (lambda content: content["settings"].update(image_size=[1.5, 64]), r"pose2id\.json: image_size must be an int"),
        (lambda content: content["scheduler"].update(num_train_timesteps=10**400), "more than 100,000"),
        (lambda content: content["settings"].update(image_size=[100, 64]), "image_size must be in multiples of 8"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, own, change, message):
    shutil.copytree(own, tmp_path / "own")
    file = tmp_path / "own" / "pose2id.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        IdentityGenerator.from_pretrained(tmp_path / "own", device="cpu")


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_json_that_is_none(tmp_path, own, content):
    shutil.copytree(own, tmp_path / "own")
    (tmp_path / "own" / "pose2id.json").write_text(content)
    with pytest.raises(ValueError, match=r"pose2id.json"):
        IdentityGenerator.from_pretrained(tmp_path / "own", device="cpu")


def test_a_vae_directory_with_an_at_sign(tmp_path, published):
    shutil.copytree(published / "vae", tmp_path / "vae@v2")
    assert opened(published, vae=str(tmp_path / "vae@v2")).files["vae"].parent.name == "vae@v2"


def test_the_published_settings(published):
    found = opened(published)
    assert found.settings == {"image_size": [512, 256], "round_bank": True}
    assert found.sources == {}
    assert type(found.scheduler()) is diffusers.DDIMScheduler


def test_missing_files_are_named(tmp_path, own, published):
    with pytest.raises(FileNotFoundError, match=r"repo_or_dir must be a directory or a repository.*'/no/where'"):
        IdentityGenerator.from_pretrained("/no/where")
    shutil.copytree(own, tmp_path / "own")
    (tmp_path / "own" / "vae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"own lacks vae.safetensors \(no such file\)"):
        IdentityGenerator.from_pretrained(tmp_path / "own")
    shutil.copytree(published, tmp_path / "published")
    for file in ("IFR.pth", "denoising_unet.pth"):
        (tmp_path / "published" / file).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks IFR.pth, denoising_unet.pth \(no such file\).*pose2id.json"):
        opened(tmp_path / "published")
    with pytest.raises(FileNotFoundError, match=r"vae must be a directory or a repository"):
        opened(published, vae="./nowhere/here")


def test_saving_leaves_nothing_half_written(tmp_path, monkeypatch):
    generator = tiny.generator()
    written = []

    def full_disk(tensors, path, **options):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        generator.save_pretrained(tmp_path / "own")
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["absolute", "here", "link", "nested"])
def test_places_to_save_to(tmp_path, monkeypatch, how):
    target = tmp_path / "weights"
    if how != "nested":
        target.mkdir()
    monkeypatch.chdir(tmp_path if how != "here" else target)
    (tmp_path / "link").symlink_to(target)
    given = {"absolute": target, "here": ".", "link": tmp_path / "link", "nested": "weights/below/deeper"}[how]
    tiny.generator().save_pretrained(given)
    assert len(list(Path(given).iterdir())) == 8
    assert IdentityGenerator.from_pretrained(given, device="cpu").image_size == (128, 64)


def test_the_configuration_comes_last(tmp_path, monkeypatch):
    moved = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: moved.append(path.name) or rename(path, target))
    tiny.generator().save_pretrained(tmp_path / "own")
    assert len(moved) == 8
    assert moved[-1] == "pose2id.json"


def test_a_failure_at_the_very_end_leaves_nothing(tmp_path, monkeypatch):
    rename = Path.rename

    def broken(path, target):
        if path.name == "vae.safetensors":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="Input/output error"):
        tiny.generator().save_pretrained(tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


def test_what_others_put_there_meanwhile_stays(tmp_path, monkeypatch):
    def disturbed(tensors, path, **options):
        (tmp_path / "own" / "notes.txt").write_text("mine")
        raise OSError(28, "No space left on device")

    (tmp_path / "own").mkdir()
    monkeypatch.setattr(weights, "save_file", disturbed)
    with pytest.raises(OSError, match="No space left"):
        tiny.generator().save_pretrained(tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["notes.txt"]


def test_saving_replaces_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    tiny.generator().save_pretrained(tmp_path / "empty")
    assert len(list((tmp_path / "empty").iterdir())) == 8
    for target in (tmp_path / "empty", tmp_path / "empty" / "README.md"):
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            tiny.generator().save_pretrained(target)
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            convert("somebody/weights", target)


def test_a_part_of_another_class_is_not_saved(tmp_path):
    class Encoder(torch.nn.Module):
        image_size = (64, 32)

        def forward(self, images):
            return torch.zeros(len(images), 160)

    with pytest.raises(TypeError, match=r"identity_encoder must be a TransReID to be saved, got Encoder"):
        tiny.generator(identity_encoder=Encoder()).save_pretrained(tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_of_another_class_is_not_saved(tmp_path):
    class DDIMScheduler(diffusers.DDIMScheduler):
        pass

    with pytest.raises(TypeError, match=r"scheduler must be one of diffusers to be saved, got .*DDIMScheduler"):
        tiny.generator(scheduler=DDIMScheduler(**tiny.SCHEDULER)).save_pretrained(tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


def test_conversion_writes_what_loading_and_saving_writes(tmp_path, own):
    vae = tmp_path / "vae"
    recipe.filled(diffusers.AutoencoderKL(**tiny.VAE)).save_pretrained(vae)
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/somebody/secret"}))
    convert(own, tmp_path / "converted", vae=vae)
    IdentityGenerator.from_pretrained(own, vae=vae, device="cpu").save_pretrained(tmp_path / "saved")
    for name in ("pose2id.json", "README.md"):
        assert (tmp_path / "converted" / name).read_text() == (tmp_path / "saved" / name).read_text()
    assert "secret" not in (tmp_path / "converted" / "pose2id.json").read_text()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "float16"])
def test_conversion_to_dtypes_that_hold_no_weights(tmp_path, own, dtype):
    with pytest.raises(
        TypeError, match=r"dtype must be one of torch\.float32, torch\.float16, torch\.bfloat16, torch\.float64"
    ):
        convert(own, tmp_path / "converted", dtype=dtype)
    with pytest.raises(TypeError, match="dtype must be one of"):
        IdentityGenerator.from_pretrained(own, dtype=dtype)
    with pytest.raises(TypeError, match="dtype must be one of"):
        tiny.generator().to(dtype=dtype)


def test_a_key_with_and_without_prefix(tmp_path):
    state = stored(SHAPES["IFR.pth"])
    twice = {**state, "module.norm_motion.bias": torch.zeros(768)}
    with pytest.raises(ValueError, match="must hold each key once"):
        opened(write_published(tmp_path / "twice", {"IFR.pth": twice}))


def test_conversion_of_published_weights(tmp_path, capsys):
    # The published file names with small parts: their configurations are what the layout lacks.
    parts = tiny.generator().parts
    source = tmp_path / "own"
    tiny.generator().save_pretrained(source)
    assert main(["convert", str(source), str(tmp_path / "half"), "--dtype", "float16"]) == 0
    assert str(tmp_path / "half") in capsys.readouterr().out
    for name, part in parts.items():
        state = load_file(tmp_path / "half" / f"{name}.safetensors")
        assert state.keys() == part.state_dict().keys()
        assert all(torch.equal(tensor, part.state_dict()[key].half()) for key, tensor in state.items())
    convert(tmp_path / "half", tmp_path / "same")
    assert load_file(tmp_path / "same" / "vae.safetensors")["quant_conv.bias"].dtype == torch.float16
    assert main(["convert", str(source), str(tmp_path / "half")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_conversion_of_full_size_parts(tmp_path, monkeypatch, published):
    monkeypatch.setattr(weights, "PARTS", {name: weights.PARTS[name] for name in ("pose_encoder", "identity_tokens")})
    monkeypatch.setattr(weights, "_with_vae", lambda found, place: found)
    convert(published, tmp_path / "own", vae=published / "vae")
    state = load_file(tmp_path / "own" / "pose_encoder.safetensors")
    assert {key: list(tensor.shape) for key, tensor in state.items()} == SHAPES["pose_guider.pth"]
    configs = json.loads((tmp_path / "own" / "pose2id.json").read_text())["parts"]
    assert configs["pose_encoder"] == {"out_channels": 320, "channels": [16, 32, 64, 128]}
    assert configs["identity_tokens"] == {"feature_dim": 3840, "num_tokens": 20, "dim": 768}
    assert all(torch.all(tensor == torch.tensor(constant(key))) for key, tensor in state.items())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_published_files_are_mapped_and_not_read(tmp_path):
    big = {"a": torch.zeros(50_000_000), "b": torch.ones(3)}
    torch.save(big, tmp_path / "big.pth")
    del big
    script = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from pose2id.ipg import weights
        resident = lambda: int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
        before = resident()
        state = weights._read("denoising_unet", Path(sys.argv[1]))
        print(state["b"].sum().item(), resident() - before)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "big.pth")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total, grown = done.stdout.split()
    assert total == "3.0"
    assert float(grown) < 100e6  # of 200


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_parts_and_one_more(tmp_path):
    config = {**tiny.UNET, "block_out_channels": [96, 192, 384, 384], "layers_per_block": 2}
    unets = [diffusers.UNet2DConditionModel(**config) for _ in range(2)]
    unet = sum(parameter.numel() for parameter in unets[0].parameters()) * 4
    assert unet > 250e6
    parts = {"denoising_unet": unets[0], "reference_unet": unets[1], "pose_encoder": PoseEncoder(96)}
    tiny.generator(**parts).save_pretrained(tmp_path / "own")
    script = textwrap.dedent(
        """
        import sys, torch, tiny
        from pathlib import Path
        from pose2id import IdentityGenerator
        tiny.generator()
        status = Path("/proc/self/status")
        resident = lambda name: int(status.read_text().split(name + ":")[1].split()[0]) * 1024
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before = resident("VmRSS")
        generator = IdentityGenerator.from_pretrained(sys.argv[1], dtype=torch.float16, device="cpu")
        print(resident("VmHWM") - before)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "own")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "tests")
    # Both UNets in half precision, and the file of one, mapped into memory: read whole before, it would be three units.
    assert unet < int(done.stdout) < 2 * unet + 100e6
