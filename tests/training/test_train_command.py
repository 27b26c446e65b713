"""`pose2id train`: options from flags and from a file, a whole run in miniature, and errors that name what is wrong."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import typing
from dataclasses import asdict

import numpy as np
import pytest
import torch
from miniature import miniature
from safetensors.torch import load_file

from pose2id import IdentityGenerator
from pose2id.cli import main
from pose2id.cli import train as train_command
from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.ipg.weights import VAE_REPO
from pose2id.training import checkpoints, cleansed_people
from pose2id.training import run as training
from pose2id.training import start as starting
from pose2id.training.cleansing import Cleansing
from pose2id.training.objective import Objective
from pose2id.training.settings import TrainingSettings
from pose2id.training.table import read_table

# As little as can be trained.
SHORT = {"steps": 2, "batch_size": 2, "checkpoint_every": 1, "validation_images": 0, "device": "cpu"}
UNET = {
    "block_out_channels": [8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"],
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Path of the table of 2 people, 2 images of each."""
    people = SyntheticPedestrians(2, num_cameras=1, images_per_camera=2, seed=5, size=(32, 16))
    return write_people(people, tmp_path_factory.mktemp("command") / "people", progress=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Directory of weights for 16x8 pixels."""
    directory = tmp_path_factory.mktemp("command") / "weights"
    miniature().save_pretrained(directory)
    return directory


@pytest.fixture
def command(table, weights, tmp_path):
    """Runs the command with these options, flags before a file, and returns its status."""

    def run(*flags, directory=tmp_path / "run", config=None, **options):
        given = ["train", str(table), "--out", str(directory), *flags]
        for name, value in options.items():
            given += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        if not {"weights"} & options.keys() and "weights" not in str(config):
            given += ["--weights", str(weights)]
        if config is not None:
            (tmp_path / "run.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
            given += ["--config", str(tmp_path / "run.yaml")]
        return main(given)

    return run


@pytest.fixture
def taken(monkeypatch):
    """What the command hands on, in place of training."""
    seen = {}

    def start(place, **options):
        seen.update(start=(place, options))
        return "generator"

    def train(generator, images, directory, **options):
        seen.update(train=(generator, images, directory, options))
        return training.TrainingResult(directory, 2, 0.5, None)

    monkeypatch.setattr(starting, "start", start)
    monkeypatch.setattr(training, "train", train)
    return seen


def kind(annotation):
    """What a flag's text becomes."""
    (found,) = {option for option in typing.get_args(annotation) or (annotation,) if option is not type(None)}
    return found


def test_flags_are_the_settings_one_to_one():
    hints = typing.get_type_hints(TrainingSettings)
    assert [name for name, _, _ in train_command.SETTINGS] == list(asdict(TrainingSettings()))
    assert {name: given for name, given, _ in train_command.SETTINGS} == {n: kind(hint) for n, hint in hints.items()}


def test_the_help_quotes_the_defaults():
    defaults = asdict(TrainingSettings())
    parser = argparse.ArgumentParser()
    train_command.add_options(parser)
    described = {action.dest: action.help for action in parser._actions}
    for name, _, text in train_command.SETTINGS:
        assert described[name].startswith(text)
        quoted, default = re.search(r"\(([^()]*)\)$", text)[1], defaults[name]
        if default is None or default is False:
            assert quoted in ("off", "endless"), name
        elif default is True:
            assert quoted == "on", name
        elif isinstance(default, str):
            assert quoted == default, name
        else:
            assert float(quoted) == default, name


def test_the_help_quotes_the_defaults_of_the_start():
    texts = {name: text for name, _, text in train_command.STARTING}
    signature = inspect.signature(starting.start).parameters
    assert texts["weights"].endswith(f"({next(iter(signature.values())).default})")
    assert texts["vae"].endswith(f"({VAE_REPO})")
    assert texts["num_tokens"].endswith("(20)")
    assert texts["revision"].endswith("(main)")


def test_help_costs_no_import():
    code = """
import sys
from pose2id.cli import main
try:
    main(["train", "--help"])
except SystemExit as end:
    assert end.code == 0
assert not {"torch", "diffusers", "accelerate", "yaml"} & sys.modules.keys()
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for name, _, _ in (*train_command.SETTINGS, *train_command.STARTING):
        assert f"--{name.replace('_', '-')}" in shown


ALL = {
    "steps": 3,
    "batch_size": 5,
    "gradient_accumulation": 5,
    "learning_rate": 2e-5,
    "warmup_steps": 7,
    "schedule": "cosine",
    "optimizer": "adamw",
    "weight_decay": 0.02,
    "max_grad_norm": 2.0,
    "unconditional_ratio": 0.2,
    "snr_gamma": 5.0,
    "noise_offset": 0.05,
    "clean": True,
    "poses": "all",
    "flip": 0.25,
    "erase": 0.75,
    "occlude": 0.4,
    "reference_variants": 4,
    "cache": True,
    "ema": 0.99,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "seed": 3,
    "checkpoint_every": 11,
    "keep_checkpoints": 12,
    "validate_every": 13,
    "validation_images": 14,
    "validation_steps": 15,
    "validation_guidance": 2.5,
    "workers": 16,
}
START = {"num_tokens": 5, "vae": "user/vae", "revision": "v2", "cache_dir": "/cache", "local_files_only": True}
START |= {"license": "mit"}


def test_every_option_arrives(command, taken, table, tmp_path):
    assert ALL.keys() == asdict(TrainingSettings()).keys()
    options = {"weights": "user/name", "unet": "user/unet", "image_size": "32x16", "device": "cpu", "validation": table}
    for given in ("flags", "file"):
        taken.clear()
        together = {**ALL, **START, **options}
        if given == "flags":
            assert command(**together) == 0
        else:
            assert command(config=json.dumps({**together, "validation": str(table)})) == 0
        place, started = taken["start"]
        assert place == "user/name"
        assert started == {**START, "unet": "user/unet", "image_size": (32, 16), "device": "cpu"}
        generator, images, directory, trained = taken["train"]
        assert (generator, images) == ("generator", read_table(table))
        assert str(directory) == str(tmp_path / "run")
        assert trained.pop("device") == "cpu"
        assert trained.pop("validation") == images
        assert trained.pop("origin") == "the UNet of user/unet, with identity encoder and VAE of user/name"
        trained.pop("progress", None)
        assert trained == ALL
        assert {name: type(value) for name, value in trained.items()} == {n: type(v) for n, v in ALL.items()}


def test_nothing_is_said_for_what_is_not_given(command, taken):
    assert command(weights="w") == 0
    assert taken["start"] == ("w", {"device": "cpu"})
    assert taken["train"][3].pop("origin") == "w"
    assert {name for name, value in taken["train"][3].items() if value is not None} <= {"progress"}


def test_cards_name_no_folders(command, taken, tmp_path):
    (tmp_path / "secret" / "mine").mkdir(parents=True)
    (tmp_path / "secret" / "small.json").write_text("{}")
    for unet, said in (
        (None, "mine"),
        (tmp_path / "secret" / "small.json", "random UNets, with identity encoder and VAE of mine"),
        (tmp_path / "secret" / "mine", "the UNet of mine, with identity encoder and VAE of mine"),
    ):
        taken.clear()
        assert command(weights=tmp_path / "secret" / "mine", **({} if unet is None else {"unet": unet})) == 0
        assert taken["train"][3]["origin"] == said


def test_flags_go_before_the_file(command, taken):
    content = "steps: 5\nbatch_size: 8\ncache: true\nreference_variants: 2\nweights: from/file\nlearning_rate: 1e-4\n"
    assert command("--no-cache", "--steps", "9", config=content, weights="from/flag") == 0
    assert taken["start"][0] == "from/flag"
    settings = taken["train"][3]
    assert (settings["steps"], settings["batch_size"], settings["cache"]) == (9, 8, False)
    assert settings["learning_rate"] == 1e-4


def test_cleansing_can_be_switched_off(command, taken):
    assert command("--no-clean", weights="w") == 0
    assert taken["train"][3]["clean"] is False


@pytest.mark.parametrize(
    ("content", "name", "value"),
    [
        ("clean: false", "clean", False),
        ("learning_rate: 1e-5", "learning_rate", 1e-5),  # text, in YAML 1.1
        ("learning_rate: 0.001", "learning_rate", 0.001),
        ("snr_gamma: 5", "snr_gamma", 5.0),
        ("snr_gamma: null", "snr_gamma", None),
        ("ema:", "ema", None),
        ("cache: yes\nreference_variants: 1", "cache", True),
        ("gradient_checkpointing: off", "gradient_checkpointing", False),
        ("mixed_precision: 'no'", "mixed_precision", "no"),
        ("# a comment\nsteps: 7  # another one", "steps", 7),
    ],
)
def test_values_of_a_file(command, taken, content, name, value):
    assert command(config=content) == 0
    assert taken["train"][3].get(name) == value


def test_image_sizes_and_networks_of_a_file(command, taken, tmp_path):
    assert command(config="image_size: 32x16") == 0
    assert taken["start"][1]["image_size"] == (32, 16)
    assert command(config="image_size: [48, 16]") == 0
    assert taken["start"][1]["image_size"] == (48, 16)
    assert command(config=f"unet: {json.dumps(UNET)}") == 0
    assert taken["start"][1]["unet"] == UNET
    (tmp_path / "unet.json").write_text(json.dumps(UNET))
    assert command(unet=tmp_path / "unet.json") == 0
    assert taken["start"][1]["unet"] == str(tmp_path / "unet.json")


def tensors(directory):
    return {f"{path.stem}.{key}": t for path in directory.glob("*.safetensors") for key, t in load_file(path).items()}


def same(tensors, others):
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_a_whole_run_interrupted_and_gone_on_with(command, weights, tmp_path, capsys, caplog, monkeypatch):
    assert command(directory=tmp_path / "whole", **SHORT) == 0
    shown = capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert shown == (
        f"2 steps, loss {np.mean(losses):.4f} (mean of the last 2)\nweights: {tmp_path / 'whole' / 'weights'}\n"
    )
    assert "4 images of 2 people: 4 targets" in caplog.text
    trained = tensors(tmp_path / "whole" / "weights")
    before = tensors(weights)
    assert trained.keys() == before.keys()
    changed = {name.partition(".")[0] for name in trained if not torch.equal(trained[name], before[name])}
    assert changed == {"reference_unet", "denoising_unet", "identity_tokens", "pose_encoder"}
    IdentityGenerator.from_pretrained(tmp_path / "whole" / "weights", device="cpu")

    write = checkpoints.write

    def interrupted(directory, step, *args, **options):
        if step == 2:
            raise KeyboardInterrupt
        return write(directory, step, *args, **options)

    monkeypatch.setattr(checkpoints, "write", interrupted)
    assert command(**SHORT) == 130
    assert not (tmp_path / "run" / "weights").exists()
    monkeypatch.setattr(checkpoints, "write", write)
    caplog.clear()
    assert command(**SHORT) == 0
    assert "going on from step 1" in caplog.text
    assert same(tensors(tmp_path / "run" / "weights"), trained)
    assert capsys.readouterr().out == shown.replace("/whole/", "/run/")


def test_a_longer_run_is_told(command, capsys, caplog):
    assert command(**SHORT) == 0
    assert command(**{**SHORT, "steps": 3}) == 0
    assert "goes on to 3 steps, where it was to have 2" in caplog.text
    assert "3 steps, loss" in capsys.readouterr().out


def test_a_run_from_scratch_with_validation(command, tmp_path, capsys):
    (tmp_path / "unet.json").write_text(json.dumps(UNET))
    options = {"unet": tmp_path / "unet.json", "num_tokens": 3, "image_size": "32x16", "learning_rate": 1e-3}
    assert command(**{**SHORT, **options, "validation_images": 2, "validation_steps": 1}) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^generated images of 2 originals: cosine to their own .*retention", shown, re.MULTILINE)
    assert not re.search(r"eta 0\)|published weights", shown)  # the reading is for ReID models
    generator = IdentityGenerator.from_pretrained(tmp_path / "run" / "weights", device="cpu")
    assert generator.image_size == (32, 16)
    assert generator.identity_tokens.num_tokens == 3
    samples = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert samples == ["step-00000000.png", "step-00000002.png"]


@pytest.mark.parametrize("name", [name for name, kind, _ in train_command.SETTINGS if kind is not bool])
def test_errors_name_the_option_as_it_was_typed(name, command, capsys):
    assert command(**{name: -1}) == 2
    assert capsys.readouterr().err.startswith(f"pose2id: --{name.replace('_', '-')} must be ")
    assert command(config=f"{name}: {'x' if isinstance(ALL[name], str) else -1}") == 2
    assert capsys.readouterr().err.startswith(f"pose2id: {name} must be ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "/no"}, "--weights must be a directory or a repository"),
        ({"unet": "/no.json"}, "--unet /no.json must be a JSON file"),
        ({"num_tokens": 3}, "--num-tokens must not be given without unet"),
        ({"image_size": "15x8"}, "--image-size must be in multiples of 2"),
        ({"device": "meta"}, "--device must be 'cpu', 'cuda' or None"),
        ({"validation": "/no.csv"}, "table must be a CSV file, and /no.csv cannot be read"),
        ({"config": None}, "--config /no.yaml cannot be used: No such file or directory."),
    ],
)
def test_errors_of_the_start_name_the_option(options, message, command, capsys):
    words = ["--config", "/no.yaml"] if options.pop("config", "") is None else []
    assert command(*words, **options) == 2
    assert capsys.readouterr().err.startswith(f"pose2id: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bach_size: 8", r"run\.yaml must only hold weights, .*got bach_size\. Did you mean batch_size\?"),
        ("learning-rate: 8", r"run\.yaml must only hold weights, .*got learning-rate\. Did you mean learning_rate\?"),
        ("batch_size: 8\nout: here", r"run\.yaml must only hold .*got out\."),
        ("- batch_size", r"run\.yaml must map names to values \(batch_size: 8\), got list\."),
        ("", r"run\.yaml must map names to values .*got NoneType\."),
        ("batch_size: [", r"run\.yaml .*YAML"),
        ("batch_size: !!python/object/apply:os.getcwd []", r"run\.yaml .*YAML"),
        (b"\xff\xfe\x00", r"run\.yaml .*YAML"),
        ("learning_rate: fast", r"learning_rate.*'fast'"),
        ("learning_rate: true", "learning_rate.*True"),
        ("steps: many", "steps.*'many'"),
        ("steps: 1.5", "steps.*1.5"),
        ("cache: 'yes'", "cache.*'yes'"),
        ("cache: true", "reference_variants must be a number with cache=True"),
        ("schedule: 3", "schedule.*3"),
        ("image_size: 16", r"image_size.*HEIGHTxWIDTH or \[HEIGHT, WIDTH\].*16"),
        ("image_size: [16, 8, 3]", r"image_size.*\[16, 8, 3\]"),
        ("image_size: [16.0, 8]", r"image_size.*\[16\.0, 8\]"),
        ("image_size: 16x", "image.size.*16x"),
        ("validation: 5", "validation.*5"),
        ("cache_dir: 5", "cache_dir.*5"),
        ("device: 5", "device.*5"),
        ("local_files_only: 'no'", "local_files_only.*'no'"),
        ("unet: 5", "unet.*5"),
    ],
)
def test_errors_of_a_file(command, taken, capsys, content, message):
    flags = {name: value for name, value in SHORT.items() if f"{name}:" not in str(content)}
    assert command(config=content, **flags) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert "train" not in taken


def test_it_says_when_data_cleansing_begins_and_ends(command, caplog, monkeypatch):
    """It may take minutes, and there is no bar without a terminal."""
    monkeypatch.setattr(cleansed_people, "LEAST_CLEANSED", 4)
    monkeypatch.setattr(cleansed_people, "clean_people", lambda people: judged(sum(map(len, people))))
    assert command(**SHORT) == 0
    told = caplog.messages
    began = told.index("data cleansing: features of 4 images of 2 people, once in a run")
    assert told[began + 1] == "data cleansing: 0 of 4 images are left out"


def judged(n):
    return Cleansing(np.ones(n, bool), np.ones(n), ("",) * n, 0, 2)


def test_errors(command, weights, table, tmp_path, capsys, monkeypatch):
    def said(**options):
        assert command(**{**SHORT, **options}) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("pose2id: ")
        return shown.err

    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    assert "seed must be at least 0, got -1" in said(seed=-1)
    assert "optimizer must be one of 'adam', 'adamw'" in said(optimizer="sgd")
    assert "--learning-rate must be in [1e-12, 1], got nan" in said(learning_rate="nan")
    assert "--image-size must be HEIGHTxWIDTH in pixels, such as 256x128, got '16*8'" in said(image_size="16*8")
    assert "--image-size must be in multiples of 2, got (61, 30)" in said(image_size="61x30")
    assert str(tmp_path / "broken.json") in said(unet=tmp_path / "broken.json")
    assert str(tmp_path / "list.json") in said(unet=tmp_path / "list.json")
    assert "missing.json" in said(unet=tmp_path / "missing.json")
    assert "missing.csv" in said(validation=tmp_path / "missing.csv")
    assert "nowhere" in said(weights=tmp_path / "nowhere")
    assert "device must be 'cpu'" in said(device="tpu")
    assert "--num-tokens must not be given without unet" in said(num_tokens=5)
    assert not (tmp_path / "run").exists()

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "must be new, empty, or the directory of a run" in said()
    (tmp_path / "run" / "notes.txt").unlink()

    monkeypatch.setattr(Objective, "loss", lambda self, prediction, *_: prediction.mean() * torch.nan)
    assert "of step 1 is nan" in said()
    monkeypatch.undo()
    assert command(**SHORT) == 0
    capsys.readouterr()
    assert "batch_size 2 then, 3 now" in said(batch_size=3)


def test_tables_and_directories_are_checked_before_anything_is_downloaded(command, table, taken, tmp_path, capsys):
    (tmp_path / "table.csv").write_text("path,identity\na.png,1\nb.png,1\n")
    assert main(["train", str(tmp_path / "table.csv"), "--out", str(tmp_path / "run")]) == 2
    assert "2 images of which none can be used: 0 have such a pose, 1 people" in capsys.readouterr().err
    pose = json.dumps([[0.5, 0.5]] * 18)
    lines = [f'{name},1,"{pose}"' for name in ("a.png", "b.png")]
    (tmp_path / "table.csv").write_text("\n".join(["path,identity,keypoints", *lines]))
    assert main(["train", str(tmp_path / "table.csv"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "--validation must show at least 2 people" in said
    assert "got 1. Show others (--validation TABLE), or none: " in said
    (tmp_path / "file").touch()
    assert command(directory=tmp_path / "file") == 2
    assert "must be new, empty, or the directory of a run" in capsys.readouterr().err
    assert taken == {}


def test_a_table_that_was_cleansed_is_not_cleansed_silently(command, table, taken, caplog, monkeypatch):
    def told():
        caplog.clear()
        assert command() == command("--no-clean") == 0
        return [line for line in caplog.messages if "--no-clean" in line]

    assert told() == []
    dropped = table.with_suffix(".dropped.csv")
    dropped.touch()
    try:
        [line] = told()
        assert line.startswith(
            f"{table} is what pose2id clean kept ({dropped.name} is there): training leaves out more"
        )
        monkeypatch.setenv("RANK", "1")
        assert told() == []
    finally:
        dropped.unlink()


def test_flags_that_are_none(table, capsys):
    for flags in (["--schedul", "cosine"], ["--steps", "x"], ["--learning-rte", "1"], ["--cache", "yes", "x"], []):
        with pytest.raises(SystemExit, match="2"):
            main(["train", *([str(table)] if flags else []), *flags])
    shown = capsys.readouterr().err
    assert "argument --steps: invalid int value: 'x'" in shown
    assert "--out" in shown


def test_a_file_needs_the_extra(command, taken, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert command(config="steps: 5") == 2
    assert '--config needs the extra "train": pip install "pose2id[train]"' in capsys.readouterr().err
    assert command(steps=5) == 0
