"""Training without IFR: where it starts, what its checkpoints hold, how it goes on, and the command."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from miniature import UNET, assert_equal, losses, miniature, people, state, weights

from pose2id import IdentityGenerator
from pose2id.cli import main
from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.ipg import IdentityTokens
from pose2id.training import start as starting
from pose2id.training.run import train
from pose2id.training.table import read_table

SHORT = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 1, "validation_images": 0}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return people(tmp_path_factory.mktemp("without") / "people")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Directory of weights with IFR."""
    folder = tmp_path_factory.mktemp("without") / "own"
    miniature().save_pretrained(folder)
    return folder


def without_ifr():
    return miniature().replaced(identity_tokens=IdentityTokens(40, dim=8, ifr=False))


@pytest.fixture(scope="module")
def run(images):
    def short(directory, generator=None, **settings):
        given = {**SHORT, **settings}
        return train(generator or without_ifr(), images, directory, device="cpu", progress=False, **given)

    return short


def until_the_first_step(directory, copy):
    """A copy of a run of two steps that was killed after the first."""
    shutil.copytree(directory, copy)
    shutil.rmtree(copy / "step-00000002")
    shutil.rmtree(copy / "weights")
    return copy


def test_from_a_configuration(own):
    options = {"unet": UNET, "device": "cpu", "seed": 4}
    generator, other = starting.start(own, ifr=False, **options), starting.start(own, **options)
    assert generator.identity_tokens.config == {"feature_dim": 40, "num_tokens": 5, "dim": 8, "ifr": False}
    assert other.identity_tokens.ifr
    for name in generator.parts.keys() - {"identity_tokens"}:  # so that runs with and without IFR can be compared
        assert_equal(other.parts[name].state_dict(), generator.parts[name].state_dict())


def test_from_weights_with_ifr(own, tmp_path, caplog):
    caplog.set_level(logging.INFO, starting.__name__)
    generator = starting.start(own, ifr=False, image_size=(32, 16), device="cpu")
    assert f"IFR of {own} is dropped" in caplog.text
    assert generator.identity_tokens.config == {"feature_dim": 40, "num_tokens": 5, "dim": 8, "ifr": False}
    assert (generator.image_size, generator.license) == ((32, 16), "creativeml-openrail-m")
    for name, part in miniature().parts.items():
        assert_equal({} if name == "identity_tokens" else part.state_dict(), generator.parts[name].state_dict())
    generator.save_pretrained(tmp_path / "without")
    caplog.clear()
    for ifr in (None, False):  # as the weights have it
        assert not starting.start(tmp_path / "without", ifr=ifr, device="cpu").identity_tokens.ifr
    assert starting.start(own, ifr=True, device="cpu").identity_tokens.ifr
    assert "dropped" not in caplog.text
    with pytest.raises(ValueError, match=r"ifr must not be True for .*without, weights without IFR. Pass unet"):
        starting.start(tmp_path / "without", ifr=True, device="cpu")


@pytest.mark.parametrize("unet", [None, {**UNET, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64}])
def test_widths_that_do_not_fit(unet):
    with pytest.raises(ValueError, match=r"got feature_dim 480 .*, cross_attention_dim 64 \(of the UNets\)"):
        starting.start("tiny", unet=unet, ifr=False, device="cpu")


def test_drawn_people_can_be_trained_on_from_the_tiny_encoder():
    unet = {**UNET, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 96}
    tokens = starting.start("tiny", unet=unet, ifr=False, device="cpu").identity_tokens
    assert (tokens.num_tokens, tokens.dim) == (5, 96)  # the global feature and four of parts, as at full size


def test_bad_input(own):
    with pytest.raises(TypeError, match="ifr must be True or False, got 'no'"):
        starting.start(own, ifr="no")
    with pytest.raises(ValueError, match=r"num_tokens 3\."):
        starting.start(own, unet=UNET, num_tokens=3, ifr=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam"},
        {"optimizer": "adamw", "ema": 0.9, "unconditional_ratio": 0.5, "cache": True, "reference_variants": 2},
    ],
    ids=["the paper's", "everything"],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(run, tmp_path, settings):
    whole = run(tmp_path / "whole", **settings)
    assert not [name for name in state(tmp_path / "whole", 2)["networks"] if name.startswith("identity_tokens")]
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["settings"]["ifr"] is False
    assert "\n* ifr: False\n" in (whole.weights / "README.md").read_text()
    generator = IdentityGenerator.from_pretrained(whole.weights, device="cpu")
    assert not generator.identity_tokens.ifr
    before, trained = miniature().denoising_unet.state_dict(), generator.denoising_unet.state_dict()
    keys = [name for name in trained if ".attn2.to_k." in name]  # what reads the tokens has learned
    assert keys
    assert not any(torch.equal(trained[name], before[name]) for name in keys)

    directory = until_the_first_step(tmp_path / "whole", tmp_path / "run")
    again = run(directory, **settings)
    assert (again.step, again.loss) == (whole.step, whole.loss)
    assert_equal(weights(whole.weights), weights(again.weights))
    assert_equal(state(tmp_path / "whole", 2)["networks"], state(directory, 2)["networks"])


def test_gradient_checkpointing_changes_nothing(run, tmp_path):
    """Nothing that the reference UNet is given needs a gradient here."""
    expected = run(tmp_path / "kept", steps=1)
    again = run(tmp_path / "again", steps=1, gradient_checkpointing=True)
    assert again.loss == pytest.approx(expected.loss, rel=1e-6)
    assert_equal(weights(expected.weights), weights(again.weights), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("began", [without_ifr, miniature])
def test_a_run_does_not_change_sides(run, tmp_path, began):
    run(tmp_path / "run", began(), steps=1)
    other = miniature if began is without_ifr else without_ifr
    given = f"ifr {began is miniature} then, {began is without_ifr} now. Train in another directory."
    with pytest.raises(ValueError, match=f"settings must be those that .* began with: {given}"):
        run(tmp_path / "run", other(), steps=1)


def test_runs_of_versions_that_knew_ifr_alone_go_on(run, tmp_path):
    run(tmp_path / "run", miniature())
    directory = until_the_first_step(tmp_path / "run", tmp_path / "old")
    content = json.loads((directory / "run.json").read_text())
    assert content["settings"].pop("ifr") is True
    (directory / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="ifr True then, False now"):
        run(directory)
    result = run(directory, miniature())
    assert_equal(weights(tmp_path / "run" / "weights"), weights(result.weights))


@pytest.fixture
def command(own, tmp_path):
    drawn = SyntheticPedestrians(2, num_cameras=1, images_per_camera=2, seed=5, size=(32, 16))
    table = write_people(drawn, tmp_path / "people", progress=False)

    def run(*flags, given=own):
        words = ["train", str(table), "--out", str(tmp_path / "run"), "--weights", str(given), "--device", "cpu"]
        for name, value in SHORT.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return main([*words, *flags])

    return run


def test_the_command(command, own, tmp_path, capsys, caplog):
    assert command("--no-ifr") == 0
    assert f"IFR of {own} is dropped" in caplog.text
    assert not IdentityGenerator.from_pretrained(tmp_path / "run" / "weights", device="cpu").identity_tokens.ifr
    capsys.readouterr()
    assert command() == 2
    assert "ifr False then, True now. Train in another directory." in capsys.readouterr().err
    caplog.clear()
    shutil.rmtree(tmp_path / "run" / "step-00000002")
    (tmp_path / "run.yaml").write_text("ifr: false\n")
    assert command("--config", str(tmp_path / "run.yaml")) == 0  # the same run
    assert "going on from step 1" in caplog.text
    (tmp_path / "run").rename(tmp_path / "first")
    assert command(given=tmp_path / "first" / "weights") == 0  # as the weights have it
    assert not IdentityGenerator.from_pretrained(tmp_path / "run" / "weights", device="cpu").identity_tokens.ifr
    assert command("--ifr", given=tmp_path / "first" / "weights") == 2
    assert "--ifr must not be True for" in capsys.readouterr().err


def test_the_command_says_what_does_not_fit(command, capsys):
    assert command("--no-ifr", given="tiny") == 2
    assert "got feature_dim 480 (of the identity encoder), cross_attention_dim 64 (of the" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_loss_falls_on_a_gpu(precision, tmp_path):
    drawn = SyntheticPedestrians(6, num_cameras=2, images_per_camera=2)
    table = read_table(write_people(drawn, tmp_path / "drawn", progress=False))
    unet = {"sample_size": 16, "in_channels": 8, "out_channels": 8, "norm_num_groups": 8, "cross_attention_dim": 96}
    unet |= {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "attention_head_dim": 4}
    settings = {"steps": 60, "batch_size": 8, "learning_rate": 1e-3, "mixed_precision": precision}
    result = train(
        starting.start("tiny", unet=unet, ifr=False), table, tmp_path / "run", **settings, validation_images=0
    )
    found = losses(tmp_path / "run")
    assert sum(found[-10:]) < 0.8 * sum(found[:10])
    assert not IdentityGenerator.from_pretrained(result.weights).identity_tokens.ifr
