"""Runs of training in miniature: what is learnt, what is written, and what goes wrong."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import re
import shutil
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from miniature import STRESS, UNET, assert_equal, average, lines, losses, miniature, people, state, weights
from PIL import Image

from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.demo.pretraining import train_identity_encoder, train_vae
from pose2id.ipg import IdentityGenerator, TransReID
from pose2id.ipg.batch import generate_files
from pose2id.poses import Pose, detect
from pose2id.training import cache as latents
from pose2id.training import checkpoints
from pose2id.training import run as training
from pose2id.training.cache import identity_features
from pose2id.training.log import Metrics
from pose2id.training.objective import TRAINED, Objective, TrainedParts
from pose2id.training.pairs import Pairs, PairSettings, select
from pose2id.training.run import train
from pose2id.training.settings import TrainingSettings
from pose2id.training.table import table_of_folder
from pose2id.training.validation import people_shown, validate

# Everything at once, and a checkpoint of every step.
WHOLE = {
    "steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "schedule": "cosine",
    "optimizer": "adamw",
    "max_grad_norm": 0.5,
    "unconditional_ratio": 0.3,
    "snr_gamma": 5.0,
    "noise_offset": 0.05,
    "reference_variants": 2,
    "ema": 0.9,
    "checkpoint_every": 1,
    "keep_checkpoints": 9,
    "validate_every": 2,
    "validation_images": 2,
    "validation_steps": 1,
}
SHORT = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 1, "validation_images": 0}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return people(tmp_path_factory.mktemp("training") / "people")


@pytest.fixture(scope="module")
def run(images):
    """Trains in a directory."""

    def short(directory, generator=None, table=images, *, validation=None, device="cpu", **settings):
        generator = generator or miniature()
        return train(
            generator, table, directory, validation=validation, device=device, progress=False, **{**SHORT, **settings}
        )

    return short


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """(directory, result) of a run with all settings; not to be changed."""
    directory = tmp_path_factory.mktemp("training") / "whole"
    return directory, run(directory, **WHOLE)


@pytest.fixture(scope="module")
def short(run, tmp_path_factory):
    """Directory of a run with the short settings; not to be changed."""
    directory = tmp_path_factory.mktemp("training") / "short"
    run(directory)
    return directory


def until(directory, step, copy):
    """A copy of a run that was killed after this checkpoint."""
    shutil.copytree(directory, copy)
    for checkpoint in checkpoints.found(copy):
        if checkpoints.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(copy / "weights")
    return copy


def stepped(images, kind, settings):
    """Training, restated: the parts, losses and averages after each step of a plain loop."""
    given = TrainingSettings(**settings)
    generator = miniature()
    objective = Objective(generator.scheduler, given.snr_gamma)
    drawn = {name: getattr(given, name) for name in ("seed", "unconditional_ratio", "noise_offset", "flip", "erase")}
    sizes = {"image_size": (16, 8), "identity_size": (16, 8), "latent_shape": (4, 8, 4)}
    selection = select(images, poses=given.poses)
    pairs = Pairs(selection, PairSettings(**drawn, **sizes, variants=given.reference_variants))
    parts = TrainedParts(generator.networks).train()
    trained = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    optimizer = kind(trained, lr=0, weight_decay=given.weight_decay)
    average = None
    for step in range(given.steps):
        rate = given.learning_rate * min(1, (step + 1) / max(given.warmup_steps, 1))
        if given.schedule == "cosine":
            rate *= (1 + math.cos(math.pi * step / given.steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        numbers = range(step * given.batch_size, (step + 1) * given.batch_size)
        batch = torch.utils.data.default_collate([pairs[n] for n in numbers])
        latents, noise, timesteps = generator.encode_images(batch["target"]), batch["noise"], batch["timestep"]
        prediction = parts(
            objective.noisy(latents, noise, timesteps),
            timesteps,
            batch["pose"],
            generator.encode_images(batch["reference"]),
            identity_features(generator.networks, batch["identity"]),
            batch["unconditional"],
        )
        errors = (prediction - objective.target(latents, noise, timesteps)).square().mean((1, 2, 3))
        loss = (errors * objective.weights(timesteps)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, given.max_grad_norm)
        optimizer.step()
        now = {name: tensor.detach().clone() for name, tensor in parts.state_dict().items()}
        decay = min(given.ema or 0, (1 + step) / (10 + step))
        average = now if average is None else {k: average[k] * decay + now[k] * (1 - decay) for k in now}
        yield {"loss": loss.item(), "rate": rate, "networks": now, "average": average}


def test_training_is_a_plain_loop(whole, images):
    directory, result = whole
    for step, expected in enumerate(stepped(images, torch.optim.AdamW, WHOLE), 1):
        found = state(directory, step)
        assert losses(directory)[step - 1] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["optimizer"]["param_groups"][0]["lr"] == pytest.approx(expected["rate"])
        assert_equal(expected["networks"], found["networks"], atol=1e-5, rtol=1e-4)
        assert_equal(expected["average"], average(directory, step), atol=1e-5, rtol=1e-4)
    assert len(checkpoints.found(directory)) == result.step == step == 4


def test_the_papers_optimizer_and_a_constant_rate(run, images, tmp_path):
    settings = {**SHORT, "weight_decay": 0.5}
    run(tmp_path / "run", **settings)
    for step, expected in enumerate(stepped(images, torch.optim.Adam, settings), 1):
        found = state(tmp_path / "run", step)
        assert found["optimizer"]["param_groups"][0]["lr"] == 1e-3
        assert_equal(expected["networks"], found["networks"], atol=1e-5, rtol=1e-4)


def test_the_defaults_are_the_papers():
    given = TrainingSettings()
    assert (given.steps, given.batch_size, given.optimizer) == (80_000, 4, "adam")
    assert (given.learning_rate, given.weight_decay, given.schedule, given.warmup_steps) == (1e-5, 0.01, "constant", 0)
    assert (given.unconditional_ratio, given.mixed_precision, given.ema) == (0.1, "no", None)


def test_what_is_trained(whole, run, tmp_path):
    before = miniature()
    parts = TrainedParts(before.networks)
    frozen = {name for name, parameter in parts.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(name.startswith("reference_unet.up_blocks.0.attentions.1.") for name in frozen)
    written = weights(whole[0] / "weights")
    for name, part in before.parts.items():
        for key, tensor in part.state_dict().items():
            changed = not torch.equal(written[f"{name}.{key}"], tensor)
            assert changed == (name in TRAINED and f"{name}.{key}" not in frozen), f"{name}.{key}"


def test_what_is_written(whole):
    directory, result = whole
    assert result.weights == directory / "weights"
    assert {path.name for path in directory.iterdir()} == {
        ".lock",
        "run.json",
        "metrics.jsonl",
        "tensorboard",
        "samples",
        "weights",
        *(f"step-{step:08d}" for step in range(1, 5)),
    }
    assert sorted(path.name for path in (directory / "samples").iterdir()) == [
        f"step-{step:08d}.png" for step in (0, 2, 4)
    ]
    card = (result.weights / "README.md").read_text()
    assert "* learning_rate: 0.001" in card
    assert "* steps: 4\n" in card  # which the cosine depends on
    assert "for 4 steps, 16 x 8 pixels, on 9 images of 3 people" in card
    found = result.diagnostics.retention
    assert f"Mean loss of the last 4 steps {result.loss:.4f}. Identity retention {found:.3f}.\n" in card
    assert (directory / "step-00000004" / "weights" / "README.md").read_text() == card
    assert "retention" not in (directory / "step-00000003" / "weights" / "README.md").read_text()


def test_weights_are_the_average(whole):
    directory, result = whole
    last = state(directory, 4)
    trained = {name: t for name, t in weights(result.weights).items() if name.partition(".")[0] in TRAINED}
    assert_equal(average(directory, 4), trained)
    assert_equal(weights(directory / "step-00000004" / "weights"), weights(result.weights))
    assert not torch.equal(
        last["networks"]["denoising_unet.conv_out.weight"], trained["denoising_unet.conv_out.weight"]
    )


def test_steps_that_rates_do_not_depend_on_are_no_setting_of_weights(short):
    for path in (short / "weights", short / "step-00000001" / "weights"):
        assert "* steps" not in (path / "README.md").read_text()


def test_weights_without_an_average(short):
    trained = {name: t for name, t in weights(short / "weights").items() if name.partition(".")[0] in TRAINED}
    last = state(short, 2)
    assert_equal({name: last["networks"][name] for name in trained}, trained)
    assert "average" not in last


def test_weights_generate_as_the_trained_generator_does(run, tmp_path):
    generator = miniature()
    result = run(tmp_path / "run", generator)
    loaded = IdentityGenerator.from_pretrained(result.weights, device="cpu")
    person = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 8, 3), np.uint8))
    options = {"num_inference_steps": 2, "size": None, "output": "tensor", "progress": False}
    expected = generator.to("cpu").generate([person], **options)
    assert torch.equal(loaded.generate([person], **options), expected)
    assert not torch.equal(miniature().generate([person], **options), expected)
    assert loaded.image_size == generator.image_size
    assert loaded.scheduler.config.rescale_betas_zero_snr


def test_sources_and_settings_are_kept(run, tmp_path):
    generator = miniature()
    generator.sources["user/weights"] = "0123456789"
    generator.license = "mit"
    generator.round_bank = False
    result = run(tmp_path / "run", generator, steps=1)
    loaded = IdentityGenerator.from_pretrained(result.weights, device="cpu")
    assert loaded.sources == {"user/weights": "0123456789"}
    assert loaded.license == "mit"
    assert loaded.round_bank is False
    assert "user/weights at commit 0123456789" in (result.weights / "README.md").read_text()


@pytest.mark.parametrize("ema", [pytest.param(None, marks=STRESS), 0.9])
def test_the_first_validation_is_of_what_training_starts_from(run, tmp_path, ema):
    settings = {"steps": 1, "validate_every": 1, "validation_images": 2, "validation_steps": 1, "ema": ema}
    run(tmp_path / "run", **settings)
    run(tmp_path / "still", **settings, learning_rate=1e-12)
    first, last = ([line for line in lines(tmp_path / name) if "loss" not in line] for name in ("run", "still"))
    assert [line["step"] for line in first] == [0, 1]
    assert first[0] == last[0]
    assert last[1]["own_cosine"] == pytest.approx(first[0]["own_cosine"], abs=1e-5)
    assert first[1]["own_cosine"] != pytest.approx(first[0]["own_cosine"], abs=1e-5)


def test_licence_and_sources_are_those_of_the_first_start(run, tmp_path, caplog):
    first = miniature().replaced(sources={"user/weights": "0123"})
    run(tmp_path / "run", first)
    directory = until(tmp_path / "run", 1, tmp_path / "copy")
    result = run(directory, miniature().replaced(license="other", round_bank=not first.round_bank))
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [re.search(r"goes on with the (\w+) that it began with", text)[1] for text in told] == [
        "license",
        "sources",
        "round_bank",
    ]
    card = (result.weights / "README.md").read_text()
    assert "\nlicense: creativeml-openrail-m\n" in card
    assert "user/weights at commit 0123" in card
    loaded = IdentityGenerator.from_pretrained(result.weights, device="cpu")
    assert (loaded.license, loaded.sources) == ("creativeml-openrail-m", {"user/weights": "0123"})
    assert loaded.round_bank == first.round_bank
    starts = [json.loads((path / "run.json").read_text())["start"] for path in (tmp_path / "run", directory)]
    assert starts[0] == starts[1]


def test_where_a_run_began_is_on_its_cards(run, tmp_path, caplog):
    run(tmp_path / "run", origin="somewhere")
    directory = until(tmp_path / "run", 1, tmp_path / "copy")
    result = run(directory, origin="elsewhere")
    assert "goes on with the origin that it began with, 'somewhere'" in caplog.text
    assert " Started from somewhere. Mean loss" in (result.weights / "README.md").read_text()


def test_a_bank_that_is_rounded_otherwise_has_no_part_in_training(short, run, tmp_path):
    generator = miniature()
    generator.round_bank = not generator.round_bank
    assert_equal(weights(short / "weights"), weights(run(until(short, 1, tmp_path / "run"), generator).weights))


def test_a_directory_below_home(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = run("~/run")
    assert result.weights == tmp_path / "run" / "weights"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    IdentityGenerator.from_pretrained(result.weights, device="cpu")


def test_accelerates_environment_changes_nothing(short, run, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state(reset_partial_state=True)  # or what the other run found there would still hold
    assert_equal(weights(short / "weights"), weights(run(tmp_path / "run").weights))
    assert state(tmp_path / "run", 2)["networks"].keys() == state(short, 2)["networks"].keys()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_weights_in_shards_are_refused(run, tmp_path, monkeypatch, kind):
    from accelerate import Accelerator, DistributedType  # noqa: PLC0415

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(ValueError, match=f"accelerate must be set up for one process or several .*got {kind}"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_gpu_on_request(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be 'cpu' or None where torch finds no CUDA device, got 'cuda'"):
        run(tmp_path / "run", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="device must be what accelerate is set up for, 'cpu', or None, got 'cuda'"):
        run(tmp_path / "run", device="cuda")


def test_the_loss_of_a_process_that_writes_nothing(short):
    silent = Metrics(short, 2)
    assert silent.recent_loss() == pytest.approx(np.mean(losses(short)))
    before = (short / "metrics.jsonl").read_bytes()
    silent.add(3, loss=1.0)
    silent.close()
    assert (short / "metrics.jsonl").read_bytes() == before


def test_a_run_that_begins_anew_records_its_start_once(whole, run, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    for checkpoint in checkpoints.found(tmp_path / "run"):
        shutil.rmtree(checkpoint)
    shutil.rmtree(tmp_path / "run" / "weights")
    run(tmp_path / "run", **WHOLE)
    events = on_board(tmp_path / "run")
    assert [step for step, _ in events["retention"]] == [0, 2, 4]
    assert lines(tmp_path / "run") == lines(whole[0])


def test_record(whole):
    directory, result = whole
    found = lines(directory)
    assert [line["step"] for line in found] == [0, 1, 2, 2, 3, 4, 4]
    assert [set(line) - {"step"} for line in found if "loss" not in line] == [
        {"retention", "own_cosine", "other_cosine"}
    ] * 3
    assert result.loss == pytest.approx(np.mean(losses(directory)))
    assert result.diagnostics.retention == found[-1]["retention"]
    assert result.diagnostics.own_cosine == found[-1]["own_cosine"]
    assert -1 <= found[-1]["other_cosine"] <= 1


def on_board(directory):
    """(step, value) of what TensorBoard shows, by name; of samples (step,)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    shown = {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]}
    return {**shown, "samples": [(event.step,) for event in board.Images("samples")]}


def test_tensorboard_has_the_same(whole):
    directory, _ = whole
    shown = on_board(directory)
    assert shown.keys() == {"loss", "retention", "own_cosine", "other_cosine", "samples"}
    assert shown.pop("samples") == [(0,), (2,), (4,)]
    for name, found in shown.items():
        recorded = [(line["step"], line[name]) for line in lines(directory) if name in line]
        np.testing.assert_allclose(found, recorded, rtol=1e-6)


def test_samples_show_who_in_which_pose_and_what_came_out(whole):
    """A row of poses, and below it a row for each person: the reference, and eight pictures."""
    with Image.open(whole[0] / "samples" / "step-00000004.png") as sheet:
        assert sheet.mode == "RGB"
        shown = np.asarray(sheet)
    assert shown.shape[1] >= 9 * 8
    assert shown.shape[0] >= 2 * 16
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"validate_every": 1}, marks=STRESS),
        pytest.param({"validate_every": 0, "checkpoint_every": 3}, marks=STRESS),
        {"validation_images": 0, "workers": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
def test_what_the_weights_do_not_depend_on(whole, run, tmp_path, changed):
    result = run(tmp_path / "run", **{**WHOLE, **changed})
    assert_equal(weights(whole[1].weights), weights(result.weights))
    assert losses(tmp_path / "run") == losses(whole[0])
    assert (result.diagnostics is None) == ("validation_images" in changed)


@pytest.mark.parametrize("changed", [{"gradient_accumulation": 2}, {"gradient_checkpointing": True}, {"cache": True}])
def test_what_the_weights_depend_on_by_rounding_alone(whole, run, tmp_path, changed):
    result = run(tmp_path / "run", **{**WHOLE, **changed, "validation_images": 0, "checkpoint_every": 4})
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole[0]), rtol=1e-4)
    assert_equal(weights(whole[1].weights), weights(result.weights), atol=2e-4, rtol=1e-3)
    assert (tmp_path / "run" / "latents").exists() == ("cache" in changed)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"unconditional_ratio": 1.0}, {"flip": 0.0, "erase": 0.0}], ids=str)
def test_what_the_losses_depend_on(short, run, tmp_path, changed):
    run(tmp_path / "run", **changed)
    assert losses(tmp_path / "run") != losses(short)


def test_nobody_to_be_seen(run, tmp_path):
    """All samples unconditional: the reference UNet learns nothing."""
    result = run(tmp_path / "run", unconditional_ratio=1.0)
    before = miniature().reference_unet.state_dict()
    after = IdentityGenerator.from_pretrained(result.weights, device="cpu").reference_unet.state_dict()
    assert_equal(before, after)


def test_half_precision(short, run, tmp_path):
    result = run(tmp_path / "run", mixed_precision="bf16")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(short), rtol=0.05)
    assert losses(tmp_path / "run") != losses(short)
    assert {tensor.dtype for tensor in weights(result.weights).values()} == {torch.float32}
    assert {tensor.dtype for tensor in state(tmp_path / "run", 2)["networks"].values()} == {torch.float32}


@pytest.mark.parametrize("ends", ["well", "in an error", "before it began"])
def test_the_generator_generates_again_afterwards(run, tmp_path, monkeypatch, ends):
    if ends == "in an error":
        monkeypatch.setattr(Objective, "loss", lambda *_: torch.tensor(math.nan, requires_grad=True))
    if ends == "before it began":
        monkeypatch.setattr(training, "new_optimizer", lambda *_: 1 / 0)
    generator = miniature()
    with nullcontext() if ends == "well" else pytest.raises(ArithmeticError):
        run(tmp_path / "run", generator, gradient_checkpointing=True)
    for name, part in generator.parts.items():
        assert not any(module.training for module in part.modules())
        assert not any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
        assert name not in TRAINED or not any(parameter.requires_grad for parameter in part.parameters())


def test_parts_that_cannot_be_written(run, tmp_path):
    class Own(TransReID):
        pass

    encoder = Own((16, 8), patch_size=4, stride=4, dim=8, depth=2, heads=2)
    with pytest.raises(TypeError, match="identity_encoder must be a TransReID to be saved, got Own"):
        run(tmp_path / "run", miniature().replaced(identity_encoder=encoder))
    assert not (tmp_path / "run").exists()


def test_a_generator_in_half_precision_is_trained_in_single(run, tmp_path):
    generator = miniature().to(dtype=torch.bfloat16)
    run(tmp_path / "run", generator, steps=1)
    assert generator.dtype == torch.float32


@pytest.mark.parametrize("step", [pytest.param(1, marks=STRESS), 3])
def test_a_resumed_run_ends_as_the_uninterrupted_one(whole, run, tmp_path, step):
    directory = until(whole[0], step, tmp_path / "run")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.1')  # as it was killed
    (directory / ".unfinished-deadbeef").mkdir()
    (directory / ".unfinished-deadbeef" / "training.pt").write_bytes(b"half")
    # What the parts were before doesn't count, nor where the images are.
    result = run(directory, **WHOLE)
    assert (result.step, result.loss) == (4, whole[1].loss)
    assert_equal(weights(whole[1].weights), weights(result.weights))
    assert (directory / "metrics.jsonl").read_text() == (whole[0] / "metrics.jsonl").read_text()
    assert result.diagnostics == whole[1].diagnostics
    last, expected = state(directory, 4), state(whole[0], 4)
    assert_equal(average(whole[0], 4), average(directory, 4))
    assert expected["optimizer"]["param_groups"] == last["optimizer"]["param_groups"]
    for i, moments in expected["optimizer"]["state"].items():
        assert_equal(moments, last["optimizer"]["state"][i])
    assert {path.name for path in directory.iterdir()} == {path.name for path in whole[0].iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which files are mapped")
def test_a_resumed_run_holds_no_checkpoint(whole, run, tmp_path, monkeypatch):
    """On a CPU an optimizer's numbers would stay those of the file, and so its room on the disk, when it is removed."""
    add, seen = Metrics.add, []

    def asked(self, step, **values):
        seen.append("training.pt" in Path("/proc/self/maps").read_text())
        add(self, step, **values)

    monkeypatch.setattr(Metrics, "add", asked)
    run(until(whole[0], 2, tmp_path / "run"), **WHOLE)
    assert seen
    assert not any(seen)


def test_a_finished_run_stays_as_it_is(whole, run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole[0], directory)
    names = ["weights/denoising_unet.safetensors", "step-00000004/training.pt", "samples/step-00000004.png"]
    before = [(directory / name).stat().st_mtime_ns for name in names]
    result = run(directory, **WHOLE)
    assert (result.weights, result.step, result.loss) == (directory / "weights", 4, whole[1].loss)
    assert [(directory / name).stat().st_mtime_ns for name in names] == before
    assert (directory / "metrics.jsonl").read_text() == (whole[0] / "metrics.jsonl").read_text()


def test_killed_before_the_weights_were_published(short, run, tmp_path):
    directory = until(short, 2, tmp_path / "run")
    assert_equal(weights(short / "weights"), weights(run(directory).weights))


def test_killed_before_it_began(short, run, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / ".run.json.0123456789abcdef").write_text("{")
    assert_equal(weights(short / "weights"), weights(run(directory).weights))


def test_images_may_move(short, run, images, tmp_path):
    directory = until(short, 1, tmp_path / "run")
    moved = []
    for image in images:
        shutil.copy(image.path, tmp_path / image.path.name)
        moved.append(replace(image, path=tmp_path / image.path.name))
    assert_equal(weights(short / "weights"), weights(run(directory, table=moved).weights))


def test_kept_checkpoints(run, tmp_path):
    run(tmp_path / "run", steps=4, keep_checkpoints=2)
    assert [checkpoints.step_of(path) for path in checkpoints.found(tmp_path / "run")] == [3, 4]
    run(tmp_path / "other", steps=3, checkpoint_every=2, keep_checkpoints=9)
    assert [checkpoints.step_of(path) for path in checkpoints.found(tmp_path / "other")] == [2, 3]
    for checkpoint in checkpoints.found(tmp_path / "other"):
        assert sorted(path.name for path in checkpoint.iterdir()) == ["training.pt", "weights"]
        IdentityGenerator.from_pretrained(checkpoint / "weights", device="cpu")


def test_latents_of_other_frozen_parts_are_not_taken(run, tmp_path):
    settings = {"cache": True, "reference_variants": 2}
    run(tmp_path / "run", **settings)
    run(tmp_path / "other", miniature(salt="other"), **settings)
    directory = until(tmp_path / "other", 1, tmp_path / "copy")
    shutil.rmtree(directory / "latents")
    shutil.copytree(tmp_path / "run" / "latents", directory / "latents")
    run(directory, miniature(salt="other"), **settings)
    assert losses(directory) == losses(tmp_path / "other")


def test_latents_are_on_the_disk_before_their_key(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(latents, "to_disk", lambda folder: seen.append(sorted(path.name for path in folder.iterdir())))
    run(tmp_path / "run", cache=True, reference_variants=2)
    assert seen == [["features.npy", "references.npy", "targets.npy"]]


def test_damaged_latents_are_made_anew(run, tmp_path):
    settings = {"cache": True, "reference_variants": 2}
    run(tmp_path / "run", **settings)
    directory = until(tmp_path / "run", 1, tmp_path / "copy")
    (directory / "latents" / "key.json").unlink()
    (directory / "latents" / "targets.npy").write_bytes(b"half")
    run(directory, **settings)
    assert losses(directory) == losses(tmp_path / "run")


@contextmanager
def files_of_at_most(size):
    """Files that grow no larger in this process, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_saved(content, file):
    file.write(b"half")
    no_space()


@pytest.mark.parametrize(
    "what", [pytest.param("weights", marks=STRESS), "state", pytest.param("saving", marks=STRESS), "moving"]
)
def test_a_full_disk(short, run, tmp_path, monkeypatch, what):
    largest = max(path.stat().st_size for path in (short / "weights").iterdir())
    assert largest < (short / "step-00000002" / "training.pt").stat().st_size // 2
    write = checkpoints.write

    def full(directory, step, *args, **options):
        if step == 1:
            return write(directory, step, *args, **options)
        if what in ("weights", "state"):
            with files_of_at_most(largest // 2 if what == "weights" else largest * 3 // 2):
                return write(directory, step, *args, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*(("torch.save", half_saved) if what == "saving" else ("pathlib.Path.replace", no_space)))
            return write(directory, step, *args, **options)

    monkeypatch.setattr(checkpoints, "write", full)
    directory = tmp_path / "run"
    with pytest.raises(OSError, match="checkpoint") as caught:
        run(directory)
    assert f"the checkpoint of step 2 cannot be written to {directory}" in str(caught.value)
    assert "start the run again" in str(caught.value)
    assert [path.name for path in checkpoints.found(directory)] == ["step-00000001"]
    assert [path.name for path in directory.glob(".*")] == [".lock"]
    assert not (directory / "weights").exists()
    assert_equal(weights(short / "step-00000001" / "weights"), weights(directory / "step-00000001" / "weights"))

    monkeypatch.undo()
    assert_equal(weights(short / "weights"), weights(run(directory).weights))


def test_a_device_that_fails_is_no_full_disk(run, tmp_path, monkeypatch):
    def failing(content, file):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(RuntimeError, match=r"^CUDA error"):
        run(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("*step*")] == []
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [".lock"]


def test_a_full_disk_at_the_first_checkpoint(run, tmp_path):
    with files_of_at_most(50_000), pytest.raises(OSError, match="the checkpoint of step 1 cannot be written"):
        run(tmp_path / "run")
    assert checkpoints.found(tmp_path / "run") == []
    assert run(tmp_path / "run").step == 2


def test_a_full_disk_when_latents_are_kept(run, tmp_path):
    settings = {"cache": True, "reference_variants": 2}
    with files_of_at_most(2000), pytest.raises(OSError, match=r"latents/\w+\.npy cannot be written"):
        run(tmp_path / "run", **settings)
    run(tmp_path / "run", **settings)
    run(tmp_path / "other", **settings)
    assert losses(tmp_path / "run") == losses(tmp_path / "other")


def test_a_full_disk_when_weights_are_published(short, run, tmp_path):
    directory = until(short, 2, tmp_path / "run")
    newest = re.escape(str(directory / "step-00000002" / "weights"))
    with files_of_at_most(50_000), pytest.raises(OSError, match=rf"training is complete.* They are in {newest}; make"):
        run(directory)
    assert not (directory / "weights").exists()
    assert not list(directory.glob(".unfinished-*"))
    assert_equal(weights(short / "weights"), weights(run(directory).weights))


def test_weights_that_cannot_be_replaced_stay(short, run, tmp_path, monkeypatch):
    shutil.copytree(short, tmp_path / "run")
    shutil.copytree(short / "step-00000001", tmp_path / "run" / "step-00000003")
    monkeypatch.setattr("pathlib.Path.replace", no_space)
    with pytest.raises(OSError, match="training is complete"):
        checkpoints.publish(tmp_path / "run")
    assert_equal(weights(short / "weights"), weights(tmp_path / "run" / "weights"))
    assert hidden(tmp_path / "run") == {".lock"}
    monkeypatch.undo()
    checkpoints.publish(tmp_path / "run")
    assert_equal(weights(short / "step-00000001" / "weights"), weights(tmp_path / "run" / "weights"))
    assert hidden(tmp_path / "run") == {".lock"}


def hidden(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob(".*")}


def test_killed_between_old_weights_and_new(short, run, tmp_path, monkeypatch):
    """The old ones come back at the next start."""
    shutil.copytree(short, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_settle_previous", lambda _: None)
        replace_path = Path.replace

        def killed(path, target):
            if Path(target).name == "weights":
                raise SystemExit
            return replace_path(path, target)

        patch.setattr("pathlib.Path.replace", killed)
        with pytest.raises(SystemExit):
            run(tmp_path / "run", steps=3)
    assert not (tmp_path / "run" / "weights").exists()
    with pytest.raises(ValueError, match="validation"):
        run(tmp_path / "run", steps=4, validation=["nowhere.png", "there.png"], validation_images=2)
    assert_equal(weights(short / "weights"), weights(tmp_path / "run" / "weights"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["published"] is None
    run(tmp_path / "run", steps=3)
    assert_equal(weights(tmp_path / "run" / "step-00000003" / "weights"), weights(tmp_path / "run" / "weights"))
    assert hidden(tmp_path / "run") == {".lock"}


def test_killed_before_old_checkpoints_were_removed(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "prune", lambda directory, _: checkpoints.found(directory)[2:] and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", steps=3, keep_checkpoints=2)
    assert len(checkpoints.found(tmp_path / "run")) == 3
    run(tmp_path / "run", steps=3, keep_checkpoints=2)
    assert [checkpoints.step_of(path) for path in checkpoints.found(tmp_path / "run")] == [2, 3]
    run(tmp_path / "run", steps=3, keep_checkpoints=1)  # a finished run stays as it is
    assert len(checkpoints.found(tmp_path / "run")) == 2


def test_killed_after_new_weights(short, run, tmp_path, monkeypatch):
    """They are not taken for those of another step."""
    shutil.copytree(short, tmp_path / "run")
    publish = checkpoints.publish

    def killed(directory):
        publish(directory)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "publish", killed)
        with pytest.raises(SystemExit):
            run(tmp_path / "run", steps=3, keep_checkpoints=9)
    shutil.rmtree(tmp_path / "run" / "step-00000003")
    assert_equal(weights(short / "weights"), weights(run(tmp_path / "run", steps=2).weights))


def test_killed_while_a_model_card_is_written(run, tmp_path, monkeypatch):
    settings = {"validation_images": 2, "validation_steps": 1, "validate_every": 0, "checkpoint_every": 2}
    run(tmp_path / "run", **settings)
    (tmp_path / "run" / "step-00000002" / "weights" / ".README.md.0123456789abcdef").write_text("half")
    run(tmp_path / "run", **settings, steps=3)
    assert hidden(tmp_path / "run") == {".lock"}


def test_a_finished_run_that_is_validated_later(short, run, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    result = run(tmp_path / "run", validation_images=2, validation_steps=1)
    cards = [path / "README.md" for path in (result.weights, tmp_path / "run" / "step-00000002" / "weights")]
    assert cards[0].read_text() == cards[1].read_text()
    assert f"Identity retention {result.diagnostics.retention:.3f}." in cards[0].read_text()
    # From then on nothing touches them.
    for card in cards:
        card.write_text("My own words.")
    again = run(tmp_path / "run", validation_images=2, validation_steps=1)
    assert again.diagnostics is None
    assert [card.read_text() for card in cards] == ["My own words."] * 2


def test_a_lost_record_takes_nothing_from_the_model_card(run, tmp_path):
    settings = {"validation_images": 2, "validation_steps": 1}
    result = run(tmp_path / "run", **settings)
    card = (result.weights / "README.md").read_text()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    run(tmp_path / "run", **settings)
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2
    for path in (result.weights, tmp_path / "run" / "step-00000002" / "weights"):
        assert (path / "README.md").read_text() == card


def test_samples_of_later_steps_are_dropped(run, tmp_path):
    settings = {"checkpoint_every": 2, "validate_every": 3, "validation_images": 2, "validation_steps": 1}
    run(tmp_path / "run", steps=4, **settings)
    directory = until(tmp_path / "run", 2, tmp_path / "copy")
    (directory / "samples" / "step-best.png").touch()
    run(directory, steps=4, **{**settings, "validate_every": 0})
    assert sorted(path.name for path in (directory / "samples").iterdir()) == [
        "step-00000000.png",
        "step-00000004.png",
        "step-best.png",
    ]
    assert [step for (step,) in on_board(directory)["samples"]] == [0, 4]
    assert [line["step"] for line in lines(directory)] == [0, 1, 2, 3, 4, 4]


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("damage", ["half", "garbage", "empty", "code", "missing"])
def test_a_damaged_checkpoint(short, run, tmp_path, capsys, damage):
    directory = until(short, 2, tmp_path / "run")
    path = directory / "step-00000002" / "training.pt"
    if damage == "code":
        torch.save({"networks": Code()}, path)
    elif damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes({"half": content[: len(content) // 2], "garbage": b"no checkpoint", "empty": b""}[damage])
    with pytest.raises(ValueError, match=f"{damage if damage == 'missing' else 'damaged'}") as caught:
        run(directory)
    assert f"Remove {path.parent} to go on from the checkpoint before it." in str(caught.value)
    assert str(path) in str(caught.value)
    assert capsys.readouterr().out == ""
    if damage == "half":
        shutil.rmtree(path.parent)
        assert_equal(weights(short / "weights"), weights(run(directory).weights))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        '{"settings": 5, "images": ""}',
        '{"settings": {}, "images": "", "generator": ""}',
    ],
)
def test_a_damaged_description_is_named(short, run, tmp_path, content):
    directory = until(short, 1, tmp_path / "run")
    (directory / "run.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(directory / "run.json"))):
        run(directory)


@pytest.mark.parametrize("content", ["garbage\n", "[" * 100_000 + "\n", "[]\n", '{"loss": 0.5}\n'])
def test_a_damaged_record_is_named(short, run, tmp_path, content):
    directory = until(short, 1, tmp_path / "run")
    (directory / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(directory / "metrics.jsonl"))):
        run(directory)


def test_a_lost_record_costs_nothing_else(short, run, tmp_path):
    directory = until(short, 1, tmp_path / "run")
    (directory / "metrics.jsonl").unlink()
    shutil.rmtree(directory / "tensorboard")
    assert_equal(weights(short / "weights"), weights(run(directory).weights))
    assert losses(directory) == losses(short)[1:]


def test_a_directory_with_other_things(run, tmp_path):
    names = ["notes.txt", ".settings.json.bak", ".metrics.jsonl.old", ".unfinished-business"]
    for name in names:
        directory = tmp_path / name.strip(".")
        directory.mkdir()
        (directory / name).write_text("mine")
        with pytest.raises(FileExistsError, match="must be new, empty, or the directory of a run"):
            run(directory)
        assert [path.name for path in directory.iterdir()] == [name]
    folder = tmp_path / "folder"
    (folder / ".unfinished-business").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=str(folder)):
        run(folder)
    assert (folder / ".unfinished-business").is_dir()


def test_a_run_keeps_what_is_not_its_own(short, run, tmp_path):
    directory = until(short, 1, tmp_path / "run")
    for name in ("notes.txt", ".settings.json.bak", ".metrics.jsonl.old"):
        (directory / name).write_text("mine")
    run(directory)
    for name in ("notes.txt", ".settings.json.bak", ".metrics.jsonl.old"):
        assert (directory / name).read_text() == "mine"


def test_a_file_in_place_of_a_directory(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{tmp_path / 'file'} must be new, empty, or the directory of a run"):
        run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_directory_and_one_below_none(run, tmp_path):
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty", steps=1)
    run(tmp_path / "a" / "b" / "c", steps=1)


@pytest.mark.parametrize(
    "what", ["fewer", "another order", "another pose", "another identity", "another size", "another byte"]
)
def test_other_images_are_refused(short, run, images, tmp_path, what):
    directory = until(short, 1, tmp_path / "run")
    table = list(images)
    if what == "fewer":
        del table[0]
    elif what == "another order":
        table[0], table[1] = table[1], table[0]
    elif what == "another pose":
        table[0] = replace(table[0], pose=table[1].pose)
    elif what == "another identity":
        table[0] = replace(table[0], identity=table[-1].identity)
    elif what == "another byte":  # in a file of the same name and size
        begun, changed = tmp_path / "begun" / table[0].path.name, tmp_path / "changed" / table[0].path.name
        for path, end in ((begun, b"0"), (changed, b"1")):
            path.parent.mkdir()
            path.write_bytes(table[0].path.read_bytes() + end)
        run(tmp_path / "other", table=[replace(table[0], path=begun), *table[1:]])
        directory = until(tmp_path / "other", 1, tmp_path / "copy")
        table[0] = replace(table[0], path=changed)
    else:
        Image.new("RGB", (20, 40)).save(tmp_path / table[0].path.name)
        table[0] = replace(table[0], path=tmp_path / table[0].path.name)
    with pytest.raises(ValueError, match=f"images must be those that the run in {directory} began with"):
        run(directory, table=table)
    assert checkpoints.step_of(checkpoints.found(directory)[-1]) == 1


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"schedule": "cosine", "steps": 8}, "steps 2 then, 8 now, schedule 'constant' then, 'cosine' now"),
        ({"learning_rate": 1e-4, "seed": 1}, "learning_rate 0.001 then, 0.0001 now, seed 42 then, 1 now"),
        ({"ema": 0.9}, "ema None then, 0.9 now"),
    ],
)
def test_other_settings_are_refused(short, run, tmp_path, changed, shown):
    directory = until(short, 1, tmp_path / "run")
    with pytest.raises(ValueError, match="settings must be those that the run in") as caught:
        run(directory, **changed)
    assert str(caught.value).endswith(f"began with: {shown}. Train in another directory.")
    assert str(directory) in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # bitsandbytes' own
def test_numbers_of_numpy(short, run, tmp_path):
    result = run(tmp_path / "run", steps=np.int64(2), learning_rate=np.float64(1e-3), batch_size=np.int32(2))
    assert_equal(weights(short / "weights"), weights(result.weights))
    assert (tmp_path / "run" / "run.json").read_bytes() == (short / "run.json").read_bytes()


def test_8_bit_states_are_kept_as_well(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = {"steps": 3, "optimizer": "adamw8bit"}
    expected = run(tmp_path / "run", **settings)
    moments = state(tmp_path / "run", 3)["optimizer"]["state"].values()
    tensors = [tensor for of_one in moments for tensor in of_one["__bnb_optimizer_quant_state__"].values()]
    assert torch.uint8 in {tensor.dtype for tensor in tensors}
    assert_equal(
        weights(expected.weights), weights(run(until(tmp_path / "run", 1, tmp_path / "copy"), **settings).weights)
    )
    plain = run(tmp_path / "plain", steps=3, optimizer="adamw")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "plain"), rtol=1e-2)
    assert_equal(weights(plain.weights), weights(expected.weights), atol=2e-3, rtol=0)


@pytest.mark.parametrize("ema", [pytest.param(None, marks=STRESS), 0.9])
def test_a_finished_run_goes_on_to_more_steps(run, tmp_path, ema):
    run(tmp_path / "run", ema=ema)
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    result = run(tmp_path / "run", steps=4, ema=ema)
    expected = run(tmp_path / "at once", steps=4, ema=ema)
    assert result.step == 4
    assert losses(tmp_path / "run") == losses(tmp_path / "at once")
    assert_equal(weights(expected.weights), weights(result.weights))
    assert (result.weights / "README.md").read_text() == (expected.weights / "README.md").read_text()
    assert_equal(weights(result.weights), weights(run(tmp_path / "run", steps=4, ema=ema).weights))

    # Stopped on the way there, even at the very end, it keeps the weights that it had.
    stopped = tmp_path / "stopped"
    before = weights(stopped / "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(stopped, steps=4, ema=ema)
    assert_equal(before, weights(stopped / "weights"))
    assert_equal(weights(expected.weights), weights(run(stopped, steps=4, ema=ema).weights))
    assert not list(stopped.glob(".unfinished-*"))


def test_a_run_that_cannot_go_on_to_more_steps_keeps_its_weights(short, run, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    with pytest.raises(ValueError, match="validation"):
        run(tmp_path / "run", steps=4, validation=["nowhere.png", "there.png"], validation_images=2)
    (tmp_path / "run" / "step-00000002" / "training.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        run(tmp_path / "run", steps=4)
    assert_equal(weights(short / "weights"), weights(tmp_path / "run" / "weights"))


def test_nobody_has_more_steps_who_did_not_ask_for_them(short, images, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    settings = {name: value for name, value in SHORT.items() if name != "steps"}
    with pytest.raises(ValueError, match=r"steps 2 then, 80000 now\. Pass steps=80000 if"):
        train(miniature(), images, tmp_path / "run", device="cpu", **settings)
    # What is refused leaves no trace in the run's file.
    longer = {**SHORT, "steps": 9, "validation_images": 2}
    with pytest.raises(ValueError, match="validation"):
        train(miniature(), images, tmp_path / "run", device="cpu", validation=["nowhere.png"], **longer)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["steps"] == 2


def test_weights_of_another_step_are_replaced(short, run, tmp_path):
    run(tmp_path / "run", steps=4, keep_checkpoints=9)
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    shutil.rmtree(tmp_path / "run" / "step-00000003")
    result = run(tmp_path / "run", steps=2)
    assert result.step == 2
    assert_equal(weights(short / "weights"), weights(result.weights))
    assert "for 2 steps" in (result.weights / "README.md").read_text()


def test_a_run_without_its_checkpoints_is_left_alone(short, run, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    for checkpoint in checkpoints.found(tmp_path / "run"):
        shutil.rmtree(checkpoint)
    with pytest.raises(FileExistsError, match="has weights of a run whose checkpoints are gone"):
        run(tmp_path / "run", seed=7)
    assert_equal(weights(short / "weights"), weights(tmp_path / "run" / "weights"))
    assert losses(tmp_path / "run") == losses(short)


def test_a_run_ends_earlier_than_it_was_to(short, run, tmp_path):
    run(tmp_path / "run", steps=4)
    directory = until(tmp_path / "run", 2, tmp_path / "copy")
    assert_equal(weights(short / "weights"), weights(run(directory, steps=2).weights))


def test_steps_that_were_done_are_not_undone(short, run, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    with pytest.raises(ValueError, match=r"steps must be at least the 2 that the run in .* has done, got 1\."):
        run(tmp_path / "run", steps=1)
    assert_equal(weights(short / "weights"), weights(tmp_path / "run" / "weights"))


def test_a_cosine_ends_where_it_was_to(run, tmp_path):
    run(tmp_path / "run", schedule="cosine")
    with pytest.raises(
        ValueError, match=r"steps 2 then, 3 now\. With a cosine .* from the weights in .*step-00000002.weights\.$"
    ):
        run(tmp_path / "run", schedule="cosine", steps=3)
    assert (tmp_path / "run" / "weights").exists()


FREE = {"checkpoint_every", "keep_checkpoints", "workers"}
FREE |= {"validate_every", "validation_images", "validation_steps", "validation_guidance"}


def test_settings_that_may_change(short, run, tmp_path):
    directory = until(short, 1, tmp_path / "run")
    fixed = json.loads((directory / "run.json").read_text())["settings"]
    assert fixed.keys() == {"ifr", *asdict(TrainingSettings())} - set(FREE)
    changed = {"checkpoint_every": 1, "keep_checkpoints": 1, "validate_every": 1}
    result = run(directory, **changed, validation_images=2, validation_steps=1)
    assert_equal(weights(short / "weights"), weights(result.weights))
    assert [path.name for path in checkpoints.found(directory)] == ["step-00000002"]


def overturned(image):
    return replace(image, pose=Pose(image.pose.keypoints * (1, -1) + (0, 1)))


def test_only_valid_poses_are_trained_on(run, images, tmp_path):
    """A run goes on with them to the same weights, and not with all; runs from before had all."""
    table = [overturned(image) if i % 3 == 0 and image.pose else image for i, image in enumerate(images)]
    given = {"table": table}
    for poses in ("all", "valid"):
        run(tmp_path / poses, poses=poses, **given)
    ours, theirs = (weights(tmp_path / poses / "weights") for poses in ("valid", "all"))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    going = until(tmp_path / "valid", 1, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"poses 'valid' then, 'all' now\. Train in another directory"):
        run(going, poses="all", **given)
    assert_equal(ours, weights(run(going, **given).weights))
    old = until(tmp_path / "all", 1, tmp_path / "old")
    content = json.loads((old / "run.json").read_text())
    for name in ("clean", "poses", "occlude"):
        del content["settings"][name]
    del content["cleansing"], content["poses_refused"]
    (old / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="poses 'all' then, 'valid' now"):
        run(old, poses="valid", **given)
    assert_equal(theirs, weights(run(old, **given).weights))


@pytest.mark.parametrize("what", ["VAE and encoder", "image_size", "architecture", "scheduler"])
def test_another_generator_is_refused(short, run, tmp_path, what):
    directory = until(short, 1, tmp_path / "run")
    generator = {
        "VAE and encoder": lambda: miniature(salt="other"),
        "image_size": lambda: miniature(image_size=(32, 16)),
        "architecture": lambda: miniature({**UNET, "layers_per_block": 2}),
        "scheduler": miniature,
    }[what]()
    if what == "scheduler":
        generator.scheduler = diffusers.DDIMScheduler(**{**tiny.SCHEDULER, "prediction_type": "epsilon"})
    with pytest.raises(ValueError, match=f"generator must be the one that the run in {directory} began with"):
        run(directory, generator)


def test_a_generator_that_has_been_trained_may_go_on(short, run, tmp_path):
    """The same object: what the checkpoint holds counts, not what the parts became since."""
    generator = miniature()
    run(tmp_path / "run", generator)
    directory = until(tmp_path / "run", 1, tmp_path / "copy")
    assert_equal(weights(short / "weights"), weights(run(directory, generator).weights))


def test_a_loss_that_is_no_number(short, run, tmp_path, monkeypatch):
    loss, called = Objective.loss, []

    def broken(self, *args):
        called.append(1)
        return loss(self, *args) * (math.nan if len(called) == 2 else 1)

    monkeypatch.setattr(Objective, "loss", broken)
    directory = tmp_path / "run"
    with pytest.raises(FloatingPointError, match="of step 2 is nan") as caught:
        run(directory)
    assert "learning_rate" in str(caught.value)
    assert [path.name for path in checkpoints.found(directory)] == ["step-00000001"]
    assert [line["step"] for line in lines(directory)] == [1]
    assert_equal(weights(short / "step-00000001" / "weights"), weights(directory / "step-00000001" / "weights"))
    monkeypatch.undo()
    assert_equal(weights(short / "weights"), weights(run(directory).weights))


@pytest.mark.parametrize(
    ("max_grad_norm", "value"),
    [
        (1.0, math.nan),
        (0.0, math.inf),
        pytest.param(1.0, math.inf, marks=STRESS),
        pytest.param(0.0, math.nan, marks=STRESS),
    ],
)
def test_a_gradient_that_is_no_number(run, tmp_path, value, max_grad_norm):
    """In the last step, whose weights nobody would see through the loss."""
    generator, seen = miniature(), []
    generator.denoising_unet.conv_out.bias.requires_grad_()

    def spoilt(gradient):
        seen.append(1)
        return gradient * value if len(seen) == 2 else gradient

    generator.denoising_unet.conv_out.bias.register_hook(spoilt)
    with pytest.raises(FloatingPointError, match="step 2"):
        run(tmp_path / "run", generator, max_grad_norm=max_grad_norm)
    assert [path.name for path in checkpoints.found(tmp_path / "run")] == ["step-00000001"]
    assert not (tmp_path / "run" / "weights").exists()


@pytest.fixture(params=[pytest.param(False, marks=STRESS), True], ids=["plain", "fused"])
def scaled(request, monkeypatch):
    """Losses are scaled as with fp16 on a GPU, for the optimizer's form that is taken there and for the other one."""
    original = training.new_accelerator

    def accelerator(*given):
        made = original(*given)
        made.scaler = torch.amp.GradScaler("cpu")
        made.unscale_gradients = lambda: [made.scaler.unscale_(some.optimizer) for some in made._optimizers]
        return made

    monkeypatch.setattr(training, "new_accelerator", accelerator)
    monkeypatch.setattr(
        training,
        "new_optimizer",
        lambda given, parameters: torch.optim.Adam(parameters, given.learning_rate, fused=request.param),
    )


def with_infinite_gradients(steps):
    """A generator of which a gradient is infinite in these steps, and the loss never."""
    generator, seen = miniature(), []
    bias = generator.denoising_unet.conv_out.bias.requires_grad_()

    def spoilt(gradient):
        seen.append(1)
        return gradient * (math.inf if len(seen) in steps else 1)

    bias.register_hook(spoilt)
    return generator


@pytest.mark.usefixtures("scaled")
def test_with_a_scaler_a_step_may_be_left_out(run, tmp_path):
    result = run(tmp_path / "run", with_infinite_gradients({2, 3, 5}), steps=6, checkpoint_every=1, keep_checkpoints=6)
    assert result.step == 6
    after = [state(tmp_path / "run", step)["networks"] for step in range(1, 7)]
    name = "pose_encoder.conv_out.weight"
    moved = [not torch.equal(one[name], other[name]) for one, other in itertools.pairwise(after)]
    assert moved == [False, False, True, False, True]


@pytest.mark.usefixtures("scaled")
def test_with_a_scaler_not_all_steps_may_be_left_out(run, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_MOST_SKIPPED", 3)
    generator = with_infinite_gradients({1, 3, 4, 5, 6, 7, 8})
    with pytest.raises(FloatingPointError, match="in each of 3 steps up to the end of step 5 is"):
        run(tmp_path / "run", generator, steps=8)
    assert checkpoints.step_of(checkpoints.found(tmp_path / "run")[-1]) == 4


def test_a_weight_that_is_no_number(run, tmp_path):
    generator = miniature()
    with torch.no_grad():
        generator.pose_encoder.conv_in.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="of step 1 is nan"):
        run(tmp_path / "run", generator)
    assert checkpoints.found(tmp_path / "run") == []
    assert run(tmp_path / "run").step == 2


def test_what_was_left_out_is_logged(run, images, tmp_path, caplog):
    (tmp_path / "broken.png").write_text("no image")
    table = [replace(images[0], path=tmp_path / "broken.png"), *images[1:]]
    with caplog.at_level(logging.INFO, "pose2id"):
        run(tmp_path / "run", table=table, steps=1)
        run(tmp_path / "run", table=table, steps=1)
    assert [record.levelname for record in caplog.records if "8 images" in record.message] == ["WARNING"] * 2
    assert "8 images of 3 people: 6 targets" in caplog.text
    assert "data cleansing: none left out, 8 images are fewer than 50" in caplog.text
    assert "unreadable: 1 (" in caplog.text
    assert str(tmp_path / "broken.png") in caplog.text
    assert "going on from step 1" in caplog.text


def test_a_run_that_leaves_nothing_out_warns_of_nothing(run, tmp_path, caplog):
    run(tmp_path / "run", steps=1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_progress_is_logged_where_no_bar_is_shown(run, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("pose2id.training.run._TELL_EVERY", -1)
    with caplog.at_level(logging.INFO, "pose2id"):
        run(tmp_path / "run", checkpoint_every=2)
    assert re.search(r"^step 1 of 2, loss \d\.\d{4}$", "\n".join(caplog.messages), re.MULTILINE)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("before the first checkpoint", marks=STRESS),
        "in a validation",
        pytest.param("in a step", marks=STRESS),
    ],
)
def test_interrupted(whole, run, tmp_path, caplog, where):
    """What was done stays, and the end is the same: record, samples, model card and all."""
    calls = {"before the first checkpoint": 1, "in a validation": 2, "in a step": 3}[where]
    place, name = (training._Run, "_optimize") if where == "in a step" else (training, "validate")
    function, seen = getattr(place, name), []

    def interrupted(*args):
        seen.append(args)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", **WHOLE)
    known = "its beginning" if "before" in where else "step 2, its newest checkpoint"
    assert f"interrupted; started again, the run goes on from {known}" in caplog.messages
    result = run(tmp_path / "run", **WHOLE)
    directory = whole[0]
    assert lines(tmp_path / "run") == lines(directory)
    for path in (
        *(directory / "samples").iterdir(),
        *directory.glob("*/weights/*"),
        *(directory / "weights").iterdir(),
    ):
        assert (tmp_path / "run" / path.relative_to(directory)).read_bytes() == path.read_bytes(), path
    assert on_board(tmp_path / "run") == on_board(directory)
    assert result.diagnostics == whole[1].diagnostics


def test_the_samplers_settings_in_validations(images):
    people = [images[0].path, images[3].path]
    retentions = {
        validate(miniature(), people, TrainingSettings(**{"validation_steps": 1, **given}))[1].retention
        for given in ({}, {"validation_steps": 2}, {"validation_guidance": 1.0})
    }
    assert len(retentions) == 3


def test_people_to_validate_with(run, images, tmp_path):
    chosen = [images[3].path, np.asarray(Image.open(images[6].path)), images[0].path]
    settings = {"steps": 1, "validate_every": 0, "validation_steps": 1}
    result = run(tmp_path / "run", validation=chosen, validation_images=2, **settings)
    other = run(tmp_path / "other", validation=chosen[1:], validation_images=2, **settings)
    same = run(tmp_path / "same", validation=chosen[:2], validation_images=4, **settings)
    assert result.diagnostics == same.diagnostics != other.diagnostics
    assert people_shown(images, 2) == [images[0].path, images[3].path]  # without any, people who are trained on


def test_steps_after_a_validation_train_on(run, tmp_path, monkeypatch):
    """In training mode, without which gradient checkpointing keeps all activations."""
    generator, loss, modes = miniature(), Objective.loss, []

    def watched(self, *args):
        modes.append({name: generator.parts[name].training for name in TRAINED})
        return loss(self, *args)

    monkeypatch.setattr(Objective, "loss", watched)
    run(tmp_path / "run", generator, validate_every=1, validation_images=2, validation_steps=1)
    assert modes == [dict.fromkeys(TRAINED, True)] * 2
    assert not generator.vae.training
    assert not generator.identity_encoder.training


BAD_SETTINGS = {
    "steps": [0, -1, 1.5, "4", True],
    "batch_size": [0],
    "gradient_accumulation": [0],
    "learning_rate": [0, -1e-5, 2, math.nan, "1e-5"],
    "warmup_steps": [-1],
    "schedule": ["linear", None],
    "optimizer": ["sgd"],
    "weight_decay": [-0.1, 2],
    "max_grad_norm": [-1, math.inf],
    "unconditional_ratio": [-0.1, 1.1, math.nan],
    "snr_gamma": [0, -5, "5"],
    "noise_offset": [-0.1, 2],
    "clean": ["yes", 1, None],
    "poses": ["some", None],
    "flip": [-1, 2],
    "erase": [-1, 2],
    "occlude": [-1, 2, "0.5"],
    "reference_variants": [0, 1.5],
    "cache": ["yes", 1, True],
    "ema": [1, 0, 0.0, -0.1, "0.9"],
    "mixed_precision": ["float16", None],
    "gradient_checkpointing": [1],
    "seed": [-1, 0.5],
    "checkpoint_every": [0],
    "keep_checkpoints": [0],
    "validate_every": [-1],
    "validation_images": [1, -1],
    "validation_steps": [0, 1001],
    "validation_guidance": [-1, math.inf, "2"],
    "workers": [-1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, some in BAD_SETTINGS.items() for value in some])
def test_bad_settings_are_named(name, value):
    with pytest.raises(
        (TypeError, ValueError),
        match=rf"^{'reference_variants' if value is True and name == 'cache' else name} must be .*got ",
    ):
        TrainingSettings(**{name: value})


def test_every_setting_is_checked():
    assert BAD_SETTINGS.keys() == asdict(TrainingSettings()).keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lerning_rate": 1e-3}, "unexpected keyword argument 'lerning_rate'"),
        ({"batch_size": 3, "gradient_accumulation": 2}, r"batch_size must be a multiple of .*got 3 with 1 x 2"),
        ({"table": []}, "images must hold two images of a person"),
        ({"table": ["a.png"]}, r"images\[0\] must be a PersonImage.*got str"),
        ({"generator": "tiny"}, "generator must be an IdentityGenerator, got str"),
        ({"device": "gpu"}, "device must be 'cpu', 'cuda' or None.*got 'gpu'"),
        ({"device": "cuda:1"}, "device must be 'cpu', 'cuda' or None.*got 'cuda:1'.*CUDA_VISIBLE_DEVICES"),
        ({"mixed_precision": "fp16"}, "mixed_precision"),
        ({"validation": [np.zeros((16, 8, 3), np.uint8)], "validation_images": 4}, "validation must show at least 2"),
        ({"validation": ["nowhere.png"] * 2, "validation_images": 4}, r"validation.*nowhere\.png"),
    ],
)
def test_bad_arguments(run, tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(checkpoints, "write", None)  # nothing is trained before it is said
    with pytest.raises((TypeError, ValueError), match=message):
        run(tmp_path / "run", **given)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("progress", lambda images, flag: train(miniature(), images, "run", progress=flag)),
        ("progress", lambda images, flag: table_of_folder(images[0].path.parent, progress=flag)),
        ("progress", lambda images, flag: detect([images[0].path], print, progress=flag)),
        ("progress", lambda images, flag: write_people(SyntheticPedestrians(1), "drawn", progress=flag)),
        ("progress", lambda images, flag: train_vae([images[0].path], image_size=(16, 8), progress=flag)),
        ("progress", lambda images, flag: train_identity_encoder([images[0].path], [1], progress=flag)),
        ("progress", lambda images, flag: miniature().generate([images[0].path], progress=flag)),
        ("progress", lambda images, flag: generate_files(miniature(), [images[0].path], "out", progress=flag)),
        ("overwrite", lambda images, flag: generate_files(miniature(), [images[0].path], "out", overwrite=flag)),
        ("grid", lambda images, flag: generate_files(miniature(), [images[0].path], "out", grid=flag)),
        ("round_bank", lambda images, flag: miniature().replaced(round_bank=flag)),
        ("compile", lambda images, flag: IdentityGenerator.from_pretrained("tiny", compile=flag)),
        ("local_files_only", lambda images, flag: IdentityGenerator.from_pretrained("tiny", local_files_only=flag)),
    ],
)
@pytest.mark.parametrize("flag", [1, None, "no"])
def test_flags_are_true_or_false(images, tmp_path, monkeypatch, name, function, flag):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=f"{name} must be True or False, got {flag!r}"):
        function(images, flag)
    assert not list(tmp_path.iterdir())


def test_missing_extras(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="optimizer='adamw8bit' needs bitsandbytes: pip install bitsandbytes"):
        run(tmp_path / "run", optimizer="adamw8bit")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=re.escape('pip install "pose2id[train]"')):
        run(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_run_at_a_time(run, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    with FileLock(directory / ".lock"), pytest.raises(FileExistsError, match="is being trained in by another process"):
        run(directory)
    assert run(directory, steps=1).step == 1


def test_a_start_without_a_checkpoint_that_begins_with_other_weights(run, tmp_path, monkeypatch, caplog):
    generator, directory = miniature(), tmp_path / "run"
    monkeypatch.setattr(checkpoints, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(directory, generator)
    monkeypatch.undo()
    run(directory, generator, steps=1)  # trained in place before
    assert "begins anew, with other weights" in caplog.text
    caplog.clear()
    monkeypatch.setattr(checkpoints, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "fresh")
    monkeypatch.undo()
    run(tmp_path / "fresh", steps=1)
    assert "begins anew" not in caplog.text


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_people_to_validate_with_are_different_ones(run, images, tmp_path):
    # As tables list them: one person after the other.
    assert images[0].identity == images[1].identity
    settings = {"validation_images": 3, "validation_steps": 1, "validate_every": 0}
    result = run(tmp_path / "run", validation=images, steps=1, **settings)
    with Image.open(tmp_path / "run" / "samples" / "step-00000001.png") as sheet:
        shown = [sheet.crop((0, top, 8, top + 16)) for top in range(0, sheet.height, 2 * 16 + 2 * 4)]
    assert result.diagnostics is not None
    assert len({picture.tobytes() for picture in shown}) == 3
    with pytest.raises(ValueError, match="validation must show at least 2 people"):
        run(tmp_path / "other", validation=images[:2], validation_images=2)


def test_dropout_is_refused(run, tmp_path):
    generator = miniature()
    generator.denoising_unet.down_blocks[0].resnets[0].dropout.p = 0.1
    with pytest.raises(ValueError, match="dropout of 0"):
        run(tmp_path / "run", generator)
