"""`Sampling`, samplers of one's own, and how often an image is decoded on its way."""

from __future__ import annotations

import dataclasses
import json
import types
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import pose2id
from pose2id import Sampling, poses
from pose2id.io import images
from pose2id.ipg import batch, generate_files, pixels
from pose2id.ipg.batch import fingerprint, missing_pictures
from pose2id.ipg.sampler import denoise

FEW = poses.standard()[:2]
OPTIONS = {"batch_size": 2, "progress": False}


@pytest.fixture(scope="module")
def generator():
    return tiny.generator()


@pytest.fixture
def people(tmp_path):
    """Three files of images."""
    for i, picture in enumerate(np.random.default_rng(1).integers(0, 256, (3, 60, 30, 3), dtype=np.uint8)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(3)]


def test_defaults_are_those_of_generate():
    sampling = Sampling()
    assert (sampling.steps, sampling.guidance, sampling.seed, sampling.size) == (20, 3.5, 42, (256, 128))
    assert pose2id.ipg.Sampling is Sampling
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.steps = 3


def test_numbers_become_plain_ones():
    given = Sampling(np.int64(3), np.float32(2), np.int32(7), [np.int64(64), 32])
    assert given == Sampling(3, 2.0, 7, (64, 32))
    note = {"num_inference_steps": 3, "guidance_scale": 2.0, "seed": 7, "size": [64, 32]}
    assert json.loads(json.dumps(given.note())) == note
    assert Sampling(size=None).note()["size"] is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"steps": 0}, ValueError, r"steps \(num_inference_steps\) must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, r"steps \(num_inference_steps\) must be an integer"),
        ({"guidance": float("nan")}, ValueError, r"guidance \(guidance_scale\) must be in \[0, 1000\]"),
        ({"guidance": 1001}, ValueError, r"guidance \(guidance_scale\) must be in \[0, 1000\]"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"size": (0, 128)}, ValueError, "size must be at least 1"),
        ({"size": "256x128"}, ValueError, r"size must be \(height, width\)"),
    ],
)
def test_it_checks_itself(given, error, message):
    with pytest.raises(error, match=message):
        Sampling(**given)


def test_keywords_change_it():
    changed = Sampling(seed=1).replaced(num_inference_steps=3, guidance_scale=1, size=None)
    assert changed == Sampling(3, 1.0, 1, None)
    with pytest.raises(TypeError, match="num_inference_stepz"):
        changed.replaced(num_inference_stepz=3)


def test_it_stands_for_the_keywords(generator, people, tmp_path):
    settings = {"num_inference_steps": 1, "guidance_scale": 2, "seed": 3, "size": (64, 32)}
    sampling = Sampling(1, 2, 3, (64, 32))
    expected = generator.generate(people[:1], FEW, output="tensor", progress=False, **settings)
    (given,) = generator.generate_iter(people[:1], FEW, output="tensor", progress=False, sampling=sampling)
    assert torch.equal(given, expected[0])
    assert generate_files(generator, people, tmp_path / "out", poses=FEW, progress=False, **settings).written == 6
    assert missing_pictures(generator, people, tmp_path / "out", poses=FEW, sampling=sampling) == 0
    assert generate_files(generator, people, tmp_path / "out", poses=FEW, sampling=sampling).kept == 6
    with pytest.raises(ValueError, match=r"steps \(num_inference_steps\) must be at most 1000, got 1001"):
        missing_pictures(generator, people, tmp_path / "out", sampling=Sampling(1001))


class Recorder:
    """A sampler that notes what it is asked for."""

    key = "recorder"  # what tells files made with it from others

    key = "recorder"  # tells what is made with it from what others make

    def __init__(self):
        self.calls = []

    def __call__(self, unet, scheduler, noise, pose_features, condition, **options):
        self.calls.append((tuple(noise.shape), len(pose_features), {**options, "generator": None}))
        return denoise(unet, scheduler, noise, pose_features, condition, **options)


def without_guidance(unet, scheduler, noise, pose_features, condition, *, guidance_scale, **options):
    rows = noise.shape[:2].numel()
    return denoise(unet, scheduler, noise, pose_features, condition.conditional(rows), guidance_scale=1.0, **options)


def test_a_sampler_of_ones_own(generator, people):
    recorder = Recorder()
    own = generator.replaced(sampler=recorder)
    sampling = Sampling(steps=2, size=None)
    options = {**OPTIONS, "output": "tensor", "sampling": sampling}
    expected = list(generator.generate_iter(people, FEW, **options))
    given = list(own.generate_iter(people, FEW, **options))
    assert all(map(torch.equal, given, expected))
    asked = {"num_inference_steps": 2, "guidance_scale": 3.5, "generator": None}
    assert recorder.calls == [((1, 2, *generator.latent_shape), 2, asked)] * 3
    assert own.replaced(round_bank=False).sampler is recorder
    own.sampler = denoise
    list(own.generate_iter(people[:1], FEW, **options))
    assert len(recorder.calls) == 3


def test_a_sampler_that_skips_guidance(generator, people):
    own = generator.replaced(sampler=without_guidance)
    options = {"output": "tensor", "num_inference_steps": 2, "progress": False}
    expected = generator.generate(people, FEW, guidance_scale=1, **options)
    given = own.generate(people, FEW, guidance_scale=3.5, **options)
    assert float((given - expected).abs().max()) <= 1.01 / 255


def test_pictures_of_another_sampler_are_not_kept(generator, people, tmp_path):
    generate_files(generator, people[:1], tmp_path / "out", poses=FEW, num_inference_steps=1, progress=False)
    for sampler in (without_guidance, Recorder()):
        own = generator.replaced(sampler=sampler)
        assert fingerprint(own) != fingerprint(generator)
        with pytest.raises(FileExistsError, match=r"different in: generator\."):
            generate_files(own, people[:1], tmp_path / "out", poses=FEW, num_inference_steps=1)


def test_samplers_that_nothing_tells_apart_write_no_files(generator, people, tmp_path):
    def local(*given, **options):
        return without_guidance(*given, **options)

    class Scaled:
        def sample(self, *given, **options):
            return without_guidance(*given, **options)

    script = types.FunctionType(without_guidance.__code__, globals(), "without_guidance")
    script.__module__ = "__main__"
    for sampler in (partial(without_guidance), local, Scaled().sample, script):
        with pytest.raises(ValueError, match="sampler must have a `key`"):
            generate_files(generator.replaced(sampler=sampler), people[:1], tmp_path / "out", poses=FEW)
    assert not (tmp_path / "out").exists()
    first, second = Recorder(), Recorder()
    second.key = "another"
    assert fingerprint(generator.replaced(sampler=first)) != fingerprint(generator.replaced(sampler=second))


@pytest.mark.parametrize("wrong", [lambda latents: latents[:, :1], lambda latents: None])
def test_what_a_sampler_returns_is_looked_at(generator, people, wrong):
    def sampler(*given, **options):
        return wrong(without_guidance(*given, **options))

    with pytest.raises((TypeError, ValueError), match=r"the sampler's latents must be a float tensor of shape \(1, 2"):
        generator.replaced(sampler=sampler).generate(people[:1], FEW[:2], num_inference_steps=1)


def test_a_setting_has_one_name():
    with pytest.raises(
        TypeError, match=r"no setting 'steps'\. They are num_inference_steps, guidance_scale, seed, size"
    ):
        Sampling().replaced(steps=2, num_inference_steps=3)


@pytest.fixture
def opened(monkeypatch, people):
    """How often each image's file is opened."""
    counts, open_image = Counter(), Image.open

    def counting(path, *args, **options):
        if Path(path) in people:
            counts[Path(path).name] += 1
        return open_image(path, *args, **options)

    monkeypatch.setattr(Image, "open", counting)
    return counts


def each(times):
    return {f"{i}.png": times for i in range(3)}


@pytest.mark.parametrize(("kept", "times"), [(pixels._KEPT_BYTES, 1), (0, 2)])
def test_images_are_decoded_once_where_memory_holds_them(generator, people, opened, monkeypatch, kept, times):
    monkeypatch.setattr(pixels, "_KEPT_BYTES", kept)
    generator.generate(people, FEW, num_inference_steps=1, **OPTIONS)
    assert opened == each(times)


@pytest.mark.parametrize(("kept", "times"), [(pixels._KEPT_BYTES, 1), (0, 2)])
def test_files_decode_images_once_more_at_most(generator, people, tmp_path, opened, monkeypatch, kept, times):
    monkeypatch.setattr(pixels, "_KEPT_BYTES", kept)
    options = {"poses": FEW, "num_inference_steps": 1, **OPTIONS}
    generate_files(generator, people, tmp_path / "out", **options)
    assert opened == each(times + 1)  # and once for the note that a generated picture would have
    opened.clear()
    assert generate_files(generator, people, tmp_path / "out", **options).kept == 6
    assert opened == each(2)


def test_the_latest_pictures_are_kept(people, opened, monkeypatch):
    monkeypatch.setattr(pixels, "_KEPT_BYTES", 2 * 3 * 60 * 30)
    references = pixels.References(people, ["first", "second", "third"])
    keys = [images.content_key(references[i]) for i in range(3)]
    some = references.some([2, 0])
    assert len(some) == 2
    assert images.content_key(some[0]) == keys[2]
    assert opened == each(1)
    assert images.content_key(some[1]) == keys[0]
    assert opened == {**each(1), "0.png": 2}
    people[1].write_bytes(b"no picture")
    with pytest.raises(ValueError, match="second cannot be read"):
        references[1]


def test_a_file_that_breaks_off_is_found_before_anything_is_generated(generator, people, tmp_path):
    content = people[1].read_bytes()
    people[1].write_bytes(content[: len(content) // 2])
    with Image.open(people[1]) as picture:  # the header is whole
        assert picture.size == (30, 60)
    with pytest.raises(ValueError, match=r"images\[1\] cannot be read"):
        generator.generate_iter(people, FEW)
    with pytest.raises(ValueError, match=r"image 1 cannot be read"):
        batch.generate_files(generator, people, tmp_path / "out")
