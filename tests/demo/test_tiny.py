"""The weights that come with the package: small enough, loadable anywhere, and of some use on people never seen."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
import torch

from pose2id import IdentityGenerator, generation_diagnostics
from pose2id.demo.people import SyntheticPedestrians
from pose2id.demo.stripes import colour_stripes
from pose2id.ipg import weights
from pose2id.ipg.pixels import to_tensor
from pose2id.training import start as starting

FOLDER = resources.files("pose2id.demo") / "tiny"


@pytest.fixture(scope="module")
def generator():
    return IdentityGenerator.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def people():
    """Six people of a world that nothing was trained or chosen on, by two cameras."""
    return [SyntheticPedestrians(6, seed=99).render(pid, pid % 2 + 1, 0).image for pid in range(1, 7)]


@pytest.fixture(scope="module")
def pictures(generator, people):
    return generator.generate(people, num_inference_steps=5, size=None, guidance_scale=2.0, progress=False)


def test_they_are_small_and_say_what_they_are_for():
    sizes = {path.name: len(path.read_bytes()) for path in FOLDER.iterdir()}
    assert sum(size for name, size in sizes.items() if name.endswith(".safetensors")) <= 12e6
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for said in ("tests and demos", "make_tiny_weights.py", "SyntheticPedestrians", "steps", "minutes"):
        assert said in card


def test_their_licence_passes_on(generator, tmp_path):
    assert generator.license == "mit"
    assert starting.start("tiny", image_size=(64, 32), device="cpu").license == "mit"
    generator.save_pretrained(tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
    assert "\nlicense: mit\n" in card
    assert "OpenRAIL" not in card


def test_they_need_no_hub(generator):
    # No Hub is running here: a request would be an error.
    assert generator.image_size == (128, 64)
    assert generator.dtype == torch.float32
    assert generator.sources == {}


def test_a_directory_of_that_name_is_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert IdentityGenerator.from_pretrained("tiny").image_size == (128, 64)
    with pytest.raises(FileNotFoundError, match="lacks"):
        IdentityGenerator.from_pretrained("./tiny")


def test_they_can_be_converted(tmp_path):
    weights.convert("tiny", tmp_path / "half", dtype=torch.float16)
    assert IdentityGenerator.from_pretrained(tmp_path / "half").image_size == (128, 64)


def test_pictures_look_like_their_person(people, pictures):
    generated = [colour_stripes([np.asarray(picture) for picture in of_person]) for of_person in pictures]
    diagnostics = generation_diagnostics(colour_stripes(people), np.stack(generated))
    assert diagnostics.retention > 0.12


def test_pictures_follow_the_pose(pictures):
    # The mean picture of a pose, of one half of the people and of the other one, without what all poses share.
    tensors = torch.stack([to_tensor(of_person) for of_person in pictures])  # (people, poses, 3, H, W)
    halves = [half.mean(0).flatten(1) for half in (tensors[::2], tensors[1::2])]
    first, second = (torch.nn.functional.normalize(half - half.mean(0), dim=1) for half in halves)
    alike = first @ second.T
    same = alike.diagonal().mean()
    others = (alike.sum() - alike.trace()) / (8 * 7)
    assert same - others > 0.1
