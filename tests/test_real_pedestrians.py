"""examples/train_real_pedestrians.py from end to end: drawn people in the real ones' layout, networks in miniature."""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import replace

import numpy as np
import onnx_files
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from pose2id import Centralizer, IdentityGenerator, evaluate, fuse, nfc
from pose2id.demo.people import SyntheticPedestrians
from pose2id.ipg import TransReID
from pose2id.training import start as starting
from pose2id.training.settings import TrainingSettings
from pose2id.training.table import read_table

pytest.importorskip("accelerate")
onnxruntime = pytest.importorskip("onnxruntime")
import train_real_pedestrians as script  # noqa: E402 - needs both

FIRST_TEST_PERSON = 5
WORDS = "--size miniature --sampler-steps 1 --device cpu --workers 0"
MID = script.SIZES["mid"]
MINIATURE = script.Size(
    encoder={"image_size": (128, 64), "patch_size": 16, "stride": 16, "dim": 16, "depth": 2, "heads": 2},
    encoder_training={**MID.encoder_training, "steps": 2},
    vae={"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4, "block_out_channels": [4, 4, 8, 8]},
    vae_training={"batch_size": 4, "steps": 2},
    unet=MID.unet
    | {"in_channels": 4, "out_channels": 4, "block_out_channels": [16, 16, 16], "layers_per_block": 1}
    | {"norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2},
    rest={"num_tokens": 2, "pose_channels": [4, 4, 4, 4]},
    training=MID.training | {"steps": 2, "batch_size": 4, "reference_variants": 2, "validation_steps": 1},
)


def run(out, data, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(script.SIZES, "miniature", MINIATURE)
        patch.setattr("sys.argv", ["script", "--data", str(data), "--out", str(out), *WORDS.split(), *words])
        script.main()


def write_crops(path, samples):
    """A zip of JPEGs; the crops' names."""
    names, numbers = [], {}
    with zipfile.ZipFile(path, "w") as archive:
        for pid, sample in samples:
            number = numbers[pid] = numbers.get(pid, -1) + 1
            content = io.BytesIO()
            Image.fromarray(sample.image).save(content, "JPEG", quality=95)
            archive.writestr(f"{pid:04d}_c{sample.camid}_{number:02d}.jpg", content.getvalue())
            names.append(f"{pid:04d}_{number:02d}.jpg")
    return names


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """4 training and 3 test people, by 2 cameras twice each."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("images", "models"):
        (folder / name).mkdir()
    people = SyntheticPedestrians(7, num_cameras=2, images_per_camera=2, occlusion=0.0)
    trained = [(sample.pid, sample) for sample in people[:16]]
    names = write_crops(folder / "images" / "cuhk03_p1_det_train743_64x128.zip", trained)
    keypoints = np.stack([np.column_stack([sample.keypoints, 0.3 + 0.7 * sample.visible]) for _, sample in trained])
    keypoints[..., 2] -= 0.05  # visible and 0.95, or hidden and 0.25
    keypoints[1] = np.nan
    keypoints[2, 1, 0] = 2.3  # a neck far beyond the border
    np.savez(folder / "cuhk03_p1_det_train743_poses.npz", keypoints=keypoints.astype(np.float16), names=names)
    tested = [(sample.pid, sample) for sample in people[16:]]
    names = write_crops(folder / "images" / "cuhk03_p1_det_val100_64x128.zip", tested)
    np.savez(
        folder / "cuhk03_p1_det_val100.npz",
        feat_osnet_msmt17=np.random.default_rng(0).normal(size=(12, 8)).astype(np.float16),
        pids=people.pids[16:].astype(np.int32),
        camids=(people.camids[16:] - 1).astype(np.int8),
        is_query=np.tile([True, False], 6),
        names=[f"detected_val/{int(name[:4]) - FIRST_TEST_PERSON:04d}{name[4:]}" for name in names],
    )
    (folder / "models" / "osnet_x0_25_msmt17.onnx").write_bytes(onnx_files.stripes())
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The directory of a run with all stages."""
    out = tmp_path_factory.mktemp("finished") / "real"
    run(out, data)
    return out


def test_the_table_has_the_keypoints_that_are_visible(finished):
    images = read_table(finished / "people" / "train.csv")
    people = SyntheticPedestrians(7, num_cameras=2, images_per_camera=2, occlusion=0.0)
    assert [image.path.name for image in images[:4]] == [f"0001_c{c}_{i:02d}.jpg" for i, c in enumerate((1, 1, 2, 2))]
    assert [image.identity for image in images] == [f"{person:04d}" for person in (1, 2, 3, 4) for _ in range(4)]
    assert [image.camera for image in images] == ["1", "1", "2", "2"] * 4
    assert images[1].pose is None
    expected = people[2].visible.copy()
    expected[1] = False
    np.testing.assert_array_equal(images[2].pose.visible, expected)
    np.testing.assert_allclose(
        images[0].pose.keypoints[people[0].visible], people[0].keypoints[people[0].visible], atol=1e-3
    )


def test_what_is_measured(finished, data):
    folder = finished / "evaluation-1-steps"
    content = json.loads((folder / "results.json").read_text())
    rows = {row["name"]: row["mAP"] for row in content["rows"]}
    ipg = ["IPG", "IPG + NFC", "IPG + re-ranking", "IPG + NFC + re-ranking"]
    plain = ["baseline", "NFC", "re-ranking", "NFC + re-ranking"]
    sets = dict.fromkeys(["recorded features (of larger crops)", "features of the crops"], plain)
    sets |= {f"{name}eta {eta}": ipg for eta in ("2", "1", "0.25") for name in ("", "control, ")}
    assert list(rows) == [f"{name}: {row}" for name, names in sets.items() for row in names]

    with np.load(data / "cuhk03_p1_det_val100.npz") as file:
        labels = {name: file[name] for name in ("pids", "camids", "is_query", "feat_osnet_msmt17")}
    query = labels["is_query"]

    def measured(features):
        sides = [features[query], features[~query]]
        return [
            evaluate(*pair, *(labels[name][side] for name in ("pids", "camids") for side in (query, ~query))).mAP
            for pair in (sides, [nfc(side) for side in sides])
        ]

    model = Centralizer(stripes, transform="torchreid")
    names = [
        f"{p:04d}_c{c + 1}_{i % 4:02d}" for i, (p, c) in enumerate(zip(labels["pids"], labels["camids"], strict=True))
    ]
    originals = model.extract([finished / "people" / "test" / f"{name}.jpg" for name in names], normalize=False)
    generated = np.stack(
        [
            model.extract([folder / f"generated/pose{m}/{name}.png" for name in names], normalize=False)
            for m in range(1, 9)
        ],
        axis=1,
    )
    assert measured(originals) == pytest.approx([rows[f"features of the crops: {name}"] for name in plain[:2]])
    recorded = measured(labels["feat_osnet_msmt17"].astype(np.float32))
    assert recorded == pytest.approx([rows[f"recorded features (of larger crops): {name}"] for name in plain[:2]])
    for eta in (2, 1, 0.25):
        fused = measured(fuse(originals, generated, eta))
        assert fused == pytest.approx([rows[f"eta {eta:g}: {name}"] for name in ipg[:2]])
        control = measured(fuse(originals, np.stack([generated.mean(0)] * len(originals)), eta))
        assert control == pytest.approx([rows[f"control, eta {eta:g}: {name}"] for name in ipg[:2]])
        curve = content["by_number"][f"eta {eta:g}: IPG"]
        assert len(curve) == 9
        assert curve[8] == pytest.approx(fused[0])
        assert curve[3] == pytest.approx(measured(fuse(originals, generated[:, :3], eta))[0])


def stripes(images):
    """What the model in the ONNX file computes."""
    return torch.nn.functional.adaptive_avg_pool2d(images, (8, 1)).flatten(1).numpy()


def test_what_lies_in_the_directory(finished):
    assert (finished / ".gitignore").read_text() == "*\n"
    folder = finished / "evaluation-1-steps"
    assert len(list((folder / "generated" / "sheets").iterdir())) == 12
    with Image.open(folder / "overview.png") as overview:
        assert overview.height == 3 * (2 * 128 + 4) + 2 * 4
    assert "retention" in (folder / "results.txt").read_text()
    stages = [json.loads(line) for line in (finished / "stages.jsonl").read_text().splitlines()]
    names = ["baseline", "table", "identity encoder", "VAE", "training", "generation", "features of generated pictures"]
    assert [line["stage"] for line in stages] == names


def test_started_again_it_computes_nothing_anew(finished, data, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(script, "train", never)
    monkeypatch.setattr(script, "extracted", never)
    expected = (finished / "evaluation-1-steps" / "results.txt").read_text()
    run(finished, data)
    printed = capsys.readouterr().out
    assert "Written(written=0, kept=96)" in printed
    assert expected in printed


def test_fewer_people(finished, data, tmp_path, capsys):
    run(tmp_path / "few", data, "--baseline", "--test-people", "2")
    assert "2 test people: 4 queries, 4 gallery images" in capsys.readouterr().out
    assert not (tmp_path / "few" / "settings.json").exists()
    with pytest.raises(SystemExit, match="has other settings than these: people, training\\."):
        run(finished, data, "--people", "3", "--steps", "5")


@pytest.mark.parametrize("size", ["mid", "small"])
def test_sizes(size):
    """Networks that build and fit; nothing is trained."""
    size = script.SIZES[size]
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(**size.vae, **blocks)
        encoder = TransReID(**size.encoder)
        generator = starting.fresh(
            identity_encoder=encoder, vae=vae, unet=size.unet, image_size=script.IMAGE_SIZE, **size.rest
        )
    assert generator.latent_shape == (8, 16, 8)
    assert TrainingSettings(**size.training).steps == size.training["steps"]


def test_steps_and_batches_of_the_command_line(monkeypatch):
    words = "--size small --encoder-steps 3 --vae-steps 4 --steps 5 --batch-size 6"
    monkeypatch.setattr("sys.argv", ["script", "--data", "/nowhere", *words.split()])
    monkeypatch.setattr(script.Path, "is_file", lambda _: True)
    size = script.chosen_size(script.arguments())
    assert (size.encoder_training["steps"], size.vae_training["steps"]) == (3, 4)
    assert (size.training["steps"], size.training["batch_size"]) == (5, 6)
    assert size.unet == script.SIZES["small"].unet


@pytest.mark.parametrize("what", ["identity", "crop"])
def test_test_people_are_not_trained_on(finished, tmp_path, what):
    images = read_table(finished / "people" / "train.csv")
    paths = sorted((finished / "people" / "test").iterdir())
    pids = np.array([int(path.name[:4]) for path in paths])
    none = np.zeros(len(paths), bool)
    people = script.TestPeople(paths, pids, pids, none, np.zeros((len(paths), 2), np.float16))
    script.check_unseen(images, people)
    if what == "identity":
        images[0] = replace(images[0], identity=f"{pids[3]:04d}")
        named = images[0].identity
    else:
        images[0] = replace(images[0], path=paths[3])
        named = paths[3].name
    with pytest.raises(SystemExit, match=f"test people must not be trained on, and {named} is"):
        script.check_unseen(images, people)


def test_trained_parts_are_kept_where_training_stopped(data, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.training, "train", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "out", data, "--people", "3")
    assert len({image.identity for image in read_table(tmp_path / "out" / "people" / "train.csv")}) == 3
    counted = dict(re.findall(r"^(\w+) +([\d,]+) parameters$", capsys.readouterr().out, re.MULTILINE))
    assert {"identity_encoder", "vae", "reference_unet", "denoising_unet"} < set(counted)
    assert {path.name for path in (tmp_path / "out").glob("*.pt")} == {"encoder.pt", "vae.pt"}


def test_the_vae_keeps_its_scaling_factor(finished):
    content = torch.load(finished / "vae.pt", weights_only=True)
    generator = IdentityGenerator.from_pretrained(finished / "run" / "weights", dtype=torch.float32, device="cpu")
    assert generator.vae.config.scaling_factor == content["config"]["scaling_factor"] != 0.18215
    for name, values in content["state"].items():
        assert torch.equal(generator.vae.state_dict()[name], values)


@pytest.mark.parametrize("name", ["../0001_c1_00.jpg", "/tmp/0001_c1_00.jpg", "a/0001_c1_00.jpg", "0001_c1_00.jpg.exe"])
def test_archives_with_other_names_are_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "crops.zip", "w") as archive:
        archive.writestr("0001_c1_01.jpg", b"")
        archive.writestr(name, b"")
    with pytest.raises(SystemExit, match="must hold crops"):
        script.unzip(tmp_path / "crops.zip", tmp_path / "crops")
    assert list(tmp_path.iterdir()) == [tmp_path / "crops.zip"]


def test_missing_data_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", tmp_path)
    assert "has no images/cuhk03_p1_det_train743_64x128.zip" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
