"""The paper's ablations: what a picture depends on when one of its conditions is left out, and what its files tell."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from pose2id import poses
from pose2id.cli import main
from pose2id.ipg import Sampling, generate_files, reference
from pose2id.ipg.batch import missing_pictures
from pose2id.ipg.folder import read_note
from pose2id.ipg.noise import ItemNoise
from pose2id.ipg.pictures import PictureFolder
from pose2id.ipg.sampling import ABLATIONS

PEOPLE = np.random.default_rng(5).integers(0, 256, (2, 64, 32, 3), dtype=np.uint8)
FEW = list(poses.standard()[:2])
OPTIONS = {"num_inference_steps": 2, "size": None, "output": "tensor", "progress": False}


@pytest.fixture(scope="module")
def generator():
    return tiny.generator()


def pictures(generator, ablation, guidance=2.0, people=PEOPLE, drawn=FEW, **options):
    """(N, M, 3, H, W) from one noise for all, so that a difference comes from what is seen."""
    noise = ItemNoise(0, "image", "pose").latents(generator.latent_shape)
    latents = noise.expand(len(people), len(drawn), *noise.shape)
    return generator.generate(
        list(people), drawn, guidance_scale=guidance, latents=latents, ablation=ablation, **OPTIONS | options
    )


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(
    ("ablation", "by_person", "by_pose"),
    [
        ("none", True, True),
        ("pose-alone", False, True),
        ("appearance-alone", True, False),
        ("no-bank", True, True),
        ("no-tokens", True, True),
    ],
)
def test_what_pictures_depend_on(generator, ablation, by_person, by_pose, guidance):
    made = pictures(generator, ablation, guidance)
    assert torch.equal(made[0], made[1]) is not by_person
    assert torch.equal(made[:, 0], made[:, 1]) is not by_pose


def test_each_ablation_is_another_picture(generator):
    made = [pictures(generator, ablation) for ablation in ABLATIONS]
    assert torch.equal(
        made[0], generator.generate(list(PEOPLE), FEW, guidance_scale=2.0, latents=noise(generator), **OPTIONS)
    )
    assert len({array.numpy().tobytes() for array in made}) == len(ABLATIONS)


def noise(generator):
    return ItemNoise(0, "image", "pose").latents(generator.latent_shape).expand(2, 2, *generator.latent_shape)


def test_pose_alone_is_what_unconditional_rows_see(generator, monkeypatch):
    unguided = pictures(generator, "pose-alone", 1.0)
    guided = pictures(generator, "pose-alone", 7.0)  # conditional rows are unconditional ones: no scale matters
    assert float((guided - unguided).abs().max()) <= 1.01 / 255
    project = reference.project
    monkeypatch.setattr(
        reference,
        "project",
        lambda unet, bank, tokens, **given: project(unet, {}, given["unconditional"].expand_as(tokens), **given),
    )  # both as the sampler's unconditional rows
    assert torch.equal(pictures(generator, "none", 7.0), guided)


def test_the_encoder_is_not_asked_without_tokens_nor_the_vae_without_a_bank(generator, monkeypatch):
    asked = []
    for name in ("encode_identity", "encode_images"):
        method = getattr(generator.networks, name)
        monkeypatch.setattr(
            generator.networks, name, lambda images, name=name, method=method: (asked.append(name), method(images))[1]
        )
    for ablation, expected in (
        ("none", {"encode_identity", "encode_images"}),
        ("pose-alone", set()),
        ("appearance-alone", {"encode_identity", "encode_images"}),
        ("no-bank", {"encode_identity"}),
        ("no-tokens", {"encode_images"}),
    ):
        asked.clear()
        pictures(generator, ablation)
        assert set(asked) == expected


def test_no_tokens_hides_the_identity_from_the_reference_unet_too(generator, monkeypatch):
    seen, write = [], reference.write
    monkeypatch.setattr(
        reference,
        "write",
        lambda unet, latents, tokens, **given: (seen.append(tokens), write(unet, latents, tokens, **given))[1],
    )
    pictures(generator, "no-tokens")
    nobody = generator.unconditional_tokens()
    assert torch.equal(seen[0], nobody.expand_as(seen[0]))


def test_batches_change_nothing(generator):
    for ablation in ABLATIONS:
        whole, single = (pictures(generator, ablation, batch_size=size) for size in (4, 1))
        assert float((whole - single).abs().max()) <= 2.01 / 255


def test_a_word_that_is_none(generator):
    with pytest.raises(ValueError, match=r"ablation must be one of 'none', 'pose-alone', .*, got 'pose'"):
        generator.generate(list(PEOPLE), ablation="pose")
    # Generators of one's own, which know no ablation, are not asked for one.
    assert "ablation" not in Sampling().keywords()
    assert Sampling().replaced(ablation="no-bank").keywords()["ablation"] == "no-bank"


@pytest.fixture
def people(tmp_path):
    folder = tmp_path / "people"
    folder.mkdir()
    for i, image in enumerate(PEOPLE):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def test_files_of_an_ablation_are_no_others(generator, people, tmp_path, caplog):
    options = {"poses": FEW, "num_inference_steps": 1, "progress": False}
    paths, out, ablated = sorted(people.iterdir()), tmp_path / "out", tmp_path / "ablated"
    generate_files(generator, [people], out, **options)
    generate_files(generator, [people], ablated, ablation="no-bank", **options)
    assert "ablation" not in read_note(out / "pose1" / "0.png")  # as it was before there were any: files are kept
    assert read_note(ablated / "pose1" / "0.png")["ablation"] == "no-bank"
    assert missing_pictures(generator, [people], ablated, poses=FEW, num_inference_steps=1, ablation="no-bank") == 0
    for directory, ablation in ((out, "no-bank"), (ablated, "none"), (ablated, "no-tokens")):
        with pytest.raises(FileExistsError, match="different in: ablation"):
            generate_files(generator, [people], directory, ablation=ablation, **options)

    list(PictureFolder(out)(paths))
    assert not caplog.records
    list(PictureFolder(ablated)(paths))
    assert "were generated for an ablation: no-bank" in caplog.text
    (ablated / "pose2" / "1.png").write_bytes((out / "pose2" / "1.png").read_bytes())
    with pytest.raises(ValueError, match=r"pictures must be of one ablation, and .*0.png has 'no-bank' and .*1.png"):
        list(PictureFolder(ablated)(paths))


def test_the_command(people, tmp_path, capsys):
    given = ["generate", str(people), "--weights", "tiny", "--steps", "1", "--size", "64x32", "--device", "cpu"]
    assert main([*given, "--out", str(tmp_path / "a"), "--ablation", "pose-alone", "--guidance", "1"]) == 0
    assert read_note(tmp_path / "a" / "pose8" / "1.png")["ablation"] == "pose-alone"
    assert main([*given, "--out", str(tmp_path / "b"), "--poses", "random", "--seed", "3"]) == 0
    keys = [read_note(tmp_path / "b" / f"pose{m}" / "0.png")["pose"] for m in range(1, 9)]
    assert keys == [pose.key for pose in poses.scrambled(seed=3)]
    printed = capsys.readouterr()
    assert "may not be a person's" not in printed.err
    assert main([*given, "--out", str(tmp_path / "c"), "--ablation", "pose"]) == 2
    assert "--ablation must be one of" in capsys.readouterr().err
