"""Identity tokens without IFR: the encoder's feature itself, in tokens, in weights and in pictures."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pose2id import poses
from pose2id.ipg import IdentityGenerator, IdentityTokens, TransReID, generate_files, weights
from pose2id.ipg.folder import read_note

FILE = "identity_tokens.safetensors"
PEOPLE = list(np.random.default_rng(5).integers(0, 256, (2, 64, 32, 3), dtype=np.uint8))
FEW = list(poses.standard()[:2])


def without_ifr():
    return tiny.generator(identity_tokens=IdentityTokens(160, dim=32, ifr=False))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Weights without IFR, not to be changed."""
    folder = tmp_path_factory.mktemp("without") / "own"
    without_ifr().save_pretrained(folder)
    return folder


def pictures(generator, **options):
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "size": None, "output": "tensor", **options}
    return generator.generate(PEOPLE, FEW, progress=False, **options)


def test_tokens_are_the_feature():
    tokens = IdentityTokens(6, dim=2, ifr=False)
    given = torch.tensor([[1.0, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    assert tokens(given).tolist() == [[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]]
    assert (tokens.ifr, tokens.num_tokens, tokens.state_dict()) == (False, 3, {})
    published = IdentityTokens(ifr=False)
    assert (published.feature_dim, published.num_tokens, published.dim) == (3840, 5, 768)  # the paper's
    assert IdentityTokens(6, 3, 2, ifr=False).config == tokens.config
    assert IdentityTokens(**tokens.config).config == tokens.config


def test_tokens_are_the_global_feature_and_that_of_each_part():
    generator = without_ifr()
    encoder, images = generator.identity_encoder, torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        expected = torch.stack(encoder(images * 2 - 1).split(32, dim=1), dim=1)
        grey = encoder(torch.zeros(1, 3, 64, 32)).view(1, 5, 32)
    assert expected.shape == (2, 5, 32)
    assert torch.equal(generator.encode_identity(images), expected)
    assert torch.equal(generator.unconditional_tokens(), grey)


def test_older_versions_read_the_configuration_of_ifr():
    assert IdentityTokens().config == {"feature_dim": 3840, "num_tokens": 20, "dim": 768}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((480, None, 64), r"multiple of cross_attention_dim .*feature_dim 480 .*cross_attention_dim 64 .*num_tokens 7"),
        ((6, None, 8), r"multiple of cross_attention_dim .*feature_dim 6 .*cross_attention_dim 8 "),
        ((6, 2, 2), r"feature_dim 6 .*cross_attention_dim 2 .*num_tokens 2"),
        ((6, 0, 2), "num_tokens must be at least 1, got 0"),
        ((6, None, 2.0), "dim must be an integer, got 2.0"),
        ((6.0, None, 2), "feature_dim must be an integer, got 6.0"),
    ],
)
def test_features_that_are_not_cut_into_tokens(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        IdentityTokens(*given, ifr=False)


def test_a_flag_is_true_or_false():
    with pytest.raises(TypeError, match="ifr must be True or False, got 'no'"):
        IdentityTokens(ifr="no")


def test_weights_keep_it(own, tmp_path):
    described = json.loads((own / "pose2id.json").read_text())["parts"]["identity_tokens"]
    assert described == {"feature_dim": 160, "num_tokens": 5, "dim": 32, "ifr": False}
    assert load_file(own / FILE) == {}
    loaded = IdentityGenerator.from_pretrained(own, device="cpu")
    assert not loaded.identity_tokens.ifr
    expected = pictures(without_ifr())
    assert torch.equal(pictures(loaded), expected)
    assert not torch.equal(pictures(tiny.generator()), expected)
    weights.convert(own, tmp_path / "half", dtype=torch.float16)
    half = IdentityGenerator.from_pretrained(tmp_path / "half", device="cpu", dtype=torch.float16)
    assert half.unconditional_tokens().dtype == torch.float16
    assert half.identity_tokens.config == described


def test_weights_keep_it_on_the_hub(hub, tmp_path):
    without_ifr().push_to_hub("user/without", token="hf_secret")
    loaded = IdentityGenerator.from_pretrained("user/without", cache_dir=tmp_path, device="cpu")
    assert loaded.identity_tokens.config == without_ifr().identity_tokens.config
    assert torch.equal(pictures(loaded), pictures(without_ifr()))


def of_ifr():
    return tiny.parts()["identity_tokens"].state_dict()


@pytest.mark.parametrize(
    ("ifr", "tensors", "message"),
    [
        (False, {"surplus": torch.zeros(1)}, "1 unexpected: surplus"),
        (False, of_ifr(), "4 unexpected: "),
        (True, {}, "4 missing: "),
        (True, None, None),
    ],
)
def test_keys_are_strict(own, tmp_path, ifr, tensors, message):
    folder = shutil.copytree(own, tmp_path / "own")
    content = json.loads((folder / "pose2id.json").read_text())
    content["parts"]["identity_tokens"] |= {"ifr": ifr, "num_tokens": 20 if ifr else 5}
    (folder / "pose2id.json").write_text(json.dumps(content))
    save_file(of_ifr() if tensors is None else tensors, folder / FILE)
    if message is None:
        assert IdentityGenerator.from_pretrained(folder, device="cpu").identity_tokens.ifr
        return
    with pytest.raises(ValueError, match=re.escape(f"identity_tokens ({FILE}): {message}")):
        IdentityGenerator.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("changed", [{"ifr": "no"}, {"num_tokens": 4}, {"dim": 48}])
def test_a_wrong_configuration_is_named(own, tmp_path, changed):
    folder = shutil.copytree(own, tmp_path / "own")
    content = json.loads((folder / "pose2id.json").read_text())
    content["parts"]["identity_tokens"] |= changed
    (folder / "pose2id.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the configuration of identity_tokens builds no IdentityTokens"):
        IdentityGenerator.from_pretrained(folder, device="cpu")


def test_its_pictures_are_others(tmp_path):
    Image.fromarray(PEOPLE[0]).save(tmp_path / "person.png")
    options = {"poses": FEW[:1], "num_inference_steps": 1, "progress": False}
    generate_files(without_ifr(), [tmp_path / "person.png"], tmp_path / "out", **options)
    generate_files(tiny.generator(), [tmp_path / "person.png"], tmp_path / "other", **options)
    note, other = (read_note(tmp_path / name / "pose1" / "person.png") for name in ("out", "other"))
    assert {name for name in note if note[name] != other[name]} == {"generator"}
    with pytest.raises(FileExistsError, match="different in: generator"):
        generate_files(without_ifr(), [tmp_path / "person.png"], tmp_path / "other", **options)


def test_the_published_sizes_fit_each_other():
    with torch.device("meta"):
        assert TransReID().feature_dim == IdentityTokens(ifr=False).feature_dim


@pytest.mark.gpu
def test_pictures_in_half_precision_on_a_gpu(own):
    loaded = IdentityGenerator.from_pretrained(own, device="cuda", dtype=torch.float16)
    expected = pictures(loaded).cpu()
    assert float((expected - pictures(without_ifr())).abs().mean()) < 0.05
    loaded.enable_model_cpu_offload()
    assert float((pictures(loaded).cpu() - expected).abs().max()) <= 2.01 / 255
