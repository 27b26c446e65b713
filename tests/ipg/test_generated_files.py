"""`pose2id generate` and `generate_files`: which files there are, what they hold; none is lost or half there."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from pose2id import IdentityGenerator, poses
from pose2id.cli import main
from pose2id.datasets import open_dataset
from pose2id.ipg import batch as files
from pose2id.ipg import generate_files
from pose2id.ipg.batch import collect_images, contact_sheet, missing_pictures, seconds_per_picture
from pose2id.ipg.pictures import PictureFolder

FEW = poses.standard()[:2]
OPTIONS = {"poses": FEW, "num_inference_steps": 1, "progress": False}


@pytest.fixture(scope="module")
def generator():
    return tiny.generator()


@pytest.fixture
def people(tmp_path):
    """A directory of three images, one of them deeper."""
    pictures = np.random.default_rng(1).integers(0, 256, (3, 60, 30, 3), dtype=np.uint8)
    for name, picture in zip(("a.png", "b.jpg", "cam1/a.png"), pictures, strict=True):
        path = tmp_path / "people" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return tmp_path / "people"


def below(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def contents(directory):
    return {name: (directory / name).read_bytes() for name in below(directory)}


def test_one_file_for_each_image_and_pose(generator, people, tmp_path):
    out = tmp_path / "out"
    assert generate_files(generator, [people], out, **OPTIONS) == files.Written(6, 0)
    names = ("a.png", "b.png", "cam1/a.png")
    assert below(out) == {f"pose{pose}/{name}" for pose in (1, 2) for name in names}
    images = [people / "a.png", people / "b.jpg", people / "cam1" / "a.png"]
    expected = generator.generate(images, FEW, num_inference_steps=1, progress=False)
    for name, row in zip(names, expected, strict=True):
        for pose, picture in enumerate(row):
            with Image.open(out / f"pose{pose + 1}" / name) as saved:
                assert np.array_equal(saved, picture)


def test_a_file_tells_what_it_was_made_from(people, tmp_path):
    generator = tiny.generator(torch.float64, sources={"yuanc3/Pose2ID": "0123"})
    settings = {**OPTIONS, "seed": np.int64(7), "size": None, "num_inference_steps": np.int64(3), "guidance_scale": 2}
    generate_files(generator, [people / "a.png"], tmp_path / "out", grid=True, **settings)
    with Image.open(people / "a.png") as reference:
        image = files.content_key(reference)
    made = {"image": image, "generated": True, "seed": 7, "num_inference_steps": 3, "guidance_scale": 2.0, "size": None}
    made |= {"generator": files.fingerprint(generator), "dtype": "float64", "weights": {"yuanc3/Pose2ID": "0123"}}
    for file, pose in (("pose2/a.png", FEW[1].key), ("sheets/a.png", [pose.key for pose in FEW])):
        with Image.open(tmp_path / "out" / file) as picture:
            assert json.loads(picture.info["pose2id"]) == {**made, "pose": pose}


def test_an_interrupted_run_goes_on(generator, people, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {**OPTIONS, "batch_size": 2}
    generate_files(generator, [people], whole, **options)
    save, saved = files._save, []

    def interrupted(content, target):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(target)
        save(content, target)

    monkeypatch.setattr(files, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_files(generator, [people], out, **options)
    monkeypatch.setattr(files, "_save", save)
    assert len(below(out)) == 3
    kept = {name: (out / name).stat().st_mtime_ns for name in below(out)}
    settings = {"poses": FEW, "num_inference_steps": 1}
    assert missing_pictures(generator, [people], out, **settings) == 3
    assert generate_files(generator, [people], out, **options) == files.Written(3, 3)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert contents(out) == contents(whole)
    before = {name: (out / name).stat().st_mtime_ns for name in below(out)}
    assert generate_files(generator, [people], out, **options) == files.Written(0, 6)
    assert {name: (out / name).stat().st_mtime_ns for name in below(out)} == before


def cut(content):
    return content[:-200]


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("damage", [cut, flipped])
def test_damaged_pictures_are_made_anew(generator, people, tmp_path, damage, overwrite):
    out, options = tmp_path / "out", {**OPTIONS, "grid": True, "overwrite": overwrite, "batch_size": 2}
    generate_files(generator, [people], out, **options)
    whole = contents(out)
    for name in ("pose2/b.png", "sheets/a.png"):
        (out / name).write_bytes(damage(whole[name]))
    with pytest.raises(ValueError, match=r"pose2/b\.png must be a whole picture, and is damaged .*Generate it anew"):
        PictureFolder(out, FEW)([people / "b.jpg"])
    assert generate_files(generator, [people], out, **options) == files.Written(1, 5)
    assert contents(out) == whole


SETTINGS = {"seed": 1, "guidance_scale": 2.0, "num_inference_steps": 2, "size": (64, 32)}


@pytest.mark.parametrize("changed", [*SETTINGS, "image", "foreign"])
def test_other_files_are_not_replaced_unasked(generator, people, tmp_path, changed):
    out, options = tmp_path / "out", dict(OPTIONS)
    generate_files(generator, [people], out, **options)
    if changed in SETTINGS:
        options[changed] = SETTINGS[changed]
    if changed == "image":
        Image.new("RGB", (30, 60), "red").save(people / "b.jpg")
    if changed == "foreign":
        (out / "pose1" / "b.png").write_text("no picture")
    before = contents(out)
    difference = "no note of pose2id" if changed == "foreign" else changed
    with pytest.raises(FileExistsError, match=rf"\d files are in the place .*different in: {difference}\."):
        generate_files(generator, [people], out, **options)
    assert contents(out) == before
    written = generate_files(generator, [people], out, overwrite=True, **options)
    assert written.written == {"image": 2, "foreign": 1}.get(changed, 6)
    changed_names = {name for name, content in contents(out).items() if content != before[name]}
    assert changed_names >= {"pose1/b.png"}
    assert len(changed_names) == written.written
    assert generate_files(generator, [people], out, **options).kept == 6


def no_change(generator):
    pass


def other_weights(generator):
    generator.denoising_unet.conv_in.weight.data *= 0.9


def other_schedule(generator):
    generator.scheduler = type(generator.scheduler).from_config(generator.scheduler.config, timestep_spacing="leading")


def other_rounding(generator):
    generator.round_bank = False


def other_precision_of_the_vae(generator):
    generator.vae.double()


def other_sources(generator):
    generator.sources = {"user/name": "0123"}


@pytest.mark.parametrize(
    "change", [other_weights, other_schedule, other_rounding, other_precision_of_the_vae, other_sources]
)
def test_pictures_of_another_generator_are_not_kept(people, tmp_path, change):
    generate_files(tiny.generator(), [people / "a.png"], tmp_path / "out", **OPTIONS)
    assert generate_files(tiny.generator(), [people / "a.png"], tmp_path / "out", **OPTIONS).kept == 2
    other = tiny.generator()
    change(other)
    with pytest.raises(FileExistsError, match=r"different in: (generator|weights)\."):
        generate_files(other, [people / "a.png"], tmp_path / "out", **OPTIONS)


def test_sets_of_poses_do_not_mix(generator, people, tmp_path):
    three = {**OPTIONS, "poses": poses.standard()[:3]}
    generate_files(generator, [people / "a.png"], tmp_path / "out", **three)
    with pytest.raises(FileExistsError, match="must not hold pictures in more than 2 poses"):
        generate_files(generator, [people / "a.png"], tmp_path / "out", overwrite=True, **OPTIONS)


def test_another_run_into_the_same_directory_is_noticed(generator, people, tmp_path, monkeypatch):
    out, iterate = tmp_path / "out", generator.generate_iter

    def meanwhile(*args, **options):
        results = iterate(*args, **options)
        monkeypatch.setattr(generator, "generate_iter", iterate)
        generate_files(generator, [people / "b.jpg"], out, **{**OPTIONS, "seed": 1})
        return results

    monkeypatch.setattr(generator, "generate_iter", meanwhile, raising=False)
    with pytest.raises(FileExistsError, match="different in: seed"):
        generate_files(generator, [people], out, **OPTIONS)
    assert below(out) == {f"pose{pose}/{name}.png" for pose in (1, 2) for name in "ab"}


def test_generated_pictures_are_no_people(generator, people, tmp_path):
    generate_files(generator, [people / "a.png"], people / "gen", **OPTIONS)
    with pytest.raises(ValueError, match=r"image gen/pose1/a must be a person's, and .* was generated by pose2id"):
        generate_files(generator, [people], people / "other", **OPTIONS)
    with pytest.raises(ValueError, match="images must not be inside the directory to write"):
        generate_files(generator, [people], people, **OPTIONS)


def test_a_failure_leaves_nothing_half_written(generator, people, tmp_path, monkeypatch):
    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:4])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        generate_files(generator, [people], tmp_path / "out", **OPTIONS)
    assert below(tmp_path / "out") == set()


def test_bad_input_writes_nothing(generator, people, tmp_path):
    for i in range(12):
        (people / f"broken{i:02}.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(ValueError, match=r"(?s)image broken00 cannot be read: .*image broken09 cannot .*and 2 more"):
        generate_files(generator, [people], tmp_path / "out", **OPTIONS)
    for file in people.glob("broken*"):
        file.unlink()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        generate_files(generator, [people], tmp_path / "file", **OPTIONS)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "pose2").touch()
    for where in ("file/out", "in"):
        with pytest.raises(FileExistsError, match=r"must be a folder, and .*(file|pose2) is a file"):
            generate_files(generator, [people], tmp_path / where, **OPTIONS)
    assert below(tmp_path / "in") == {"pose2"}
    for function in (generate_files, missing_pictures):
        with pytest.raises(ValueError, match="seed must be at least 0"):
            function(generator, [people], tmp_path / "out", seed=-5)
        with pytest.raises(TypeError, match="num_inference_stepz"):
            function(generator, [people], tmp_path / "out", num_inference_stepz=5)
    for option, message in (({"num_inference_steps": 0}, "num_inference_steps"), ({"guidance_scale": -1}, "guidance")):
        with pytest.raises(ValueError, match=message):
            generate_files(generator, [people], tmp_path / "out", **{**OPTIONS, **option})
    assert not (tmp_path / "out").exists()


def test_sheets_come_with_their_pictures(generator, people, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(files, "_save", lambda content, target: written.append(target.parent.name))
    monkeypatch.setattr(files, "load_image", lambda path, name: Image.new("RGB", (8, 16)))
    generate_files(generator, [people / "a.png", people / "b.jpg"], tmp_path / "out", grid=True, **OPTIONS)
    assert written == ["pose1", "pose2", "sheets"] * 2


def test_other_sheets_are_not_replaced_unasked(generator, people, tmp_path):
    sheet = tmp_path / "out" / "sheets" / "a.png"
    sheet.parent.mkdir(parents=True)
    Image.new("RGB", (5, 5), "red").save(sheet)
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match="no note of pose2id"):
        generate_files(generator, [people], tmp_path / "out", grid=True, **OPTIONS)
    assert contents(tmp_path / "out") == before
    generate_files(generator, [people], tmp_path / "out", grid=True, overwrite=True, **OPTIONS)
    written = sheet.stat().st_mtime_ns
    generate_files(generator, [people], tmp_path / "out", grid=True, **OPTIONS)
    assert sheet.stat().st_mtime_ns == written


def test_sheets(generator, people, tmp_path):
    out = tmp_path / "out"
    generate_files(generator, [people], out, **OPTIONS)
    assert generate_files(generator, [people], out, grid=True, **OPTIONS) == files.Written(0, 6)
    assert {name for name in below(out) if name.startswith("sheets")} == {
        "sheets/a.png",
        "sheets/b.png",
        "sheets/cam1/a.png",
    }
    with Image.open(people / "b.jpg") as reference, Image.open(out / "sheets" / "b.png") as sheet:
        pictures = [Image.open(out / f"pose{pose}" / "b.png").convert("RGB") for pose in (1, 2)]
        drawings = [poses.draw(pose) for pose in FEW]
        assert np.array_equal(sheet, contact_sheet(reference, drawings, pictures))
        given = np.array(sheet)
    assert given.shape == (2 * 256 + 4, 3 * 128 + 2 * 4, 3)
    np.testing.assert_array_equal(given[260:, 132:260], pictures[0])
    np.testing.assert_array_equal(given[260:, 264:392], pictures[1])
    np.testing.assert_array_equal(given[:256, 132:260], drawings[0].resize((128, 256), Image.Resampling.BICUBIC))
    assert (given[260:, :128] == 255).all()


class TestCollect:
    """Names and files of what the caller points at."""

    def test_names(self, people):
        assert collect_images([people]) == {
            "a": people / "a.png",
            "b": people / "b.jpg",
            "cam1/a": people / "cam1" / "a.png",
        }
        assert list(collect_images([people / "b.jpg", people / "cam1" / "a.png"])) == ["b", "a"]

    def test_what_is_left_out(self, people):
        for name in ("notes.txt", ".hidden.png", "out/pose1/a.png"):
            path = people / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((people / "a.png").read_bytes())
        assert set(collect_images([people], people / "out")) == {"a", "b", "cam1/a"}

    def test_links_are_followed(self, people, tmp_path):
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked" / "link").symlink_to(people)
        assert set(collect_images([tmp_path / "linked"])) == {"link/a", "link/b", "link/cam1/a"}

    @pytest.mark.parametrize(
        ("folder", "names"), [("people", ["cam1/a", "a"]), (".", ["people/cam1/a", "people/a"]), ("x", ["cam1/a", "a"])]
    )
    def test_a_table_names_images_by_their_common_folder(self, folder, names, people, tmp_path):
        (tmp_path / "x").mkdir()
        table = tmp_path / folder / "some.CSV"
        paths = [os.path.relpath(people / name, table.parent) for name in ("cam1/a.png", "a.png")]
        table.write_text(f"path,identity,camera\n{paths[0]},1,\n{paths[1]},-1,2\n{paths[1]}x,unknown,2\n")
        (people / "a.pngx").write_bytes(b"")
        assert list(collect_images([table])) == names
        assert list(collect_images([table], root=tmp_path)) == ["people/cam1/a", "people/a"]

    def test_errors(self, people, tmp_path):
        with pytest.raises(ValueError, match=r"images must have different names, got .*people/a.png and .*cam1/a.png"):
            collect_images([people / "a.png", people / "cam1"])
        with pytest.raises(FileNotFoundError, match="there is no"):
            collect_images([tmp_path / "nobody"])
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="must hold image files"):
            collect_images([tmp_path / "empty"])
        with pytest.raises(ValueError, match="at least one file"):
            collect_images([])
        with pytest.raises(TypeError, match="Wrap it in a list"):
            collect_images(str(people))


def test_the_probe_counts_steps(generator, people, monkeypatch):
    clock, steps_seen = [0.0], []
    monkeypatch.setattr(files.time, "perf_counter", lambda: clock[0])

    def generate_iter(images, drawings, *, sampling, **_):
        steps_seen.append((len(images), len(drawings), sampling.steps))
        clock[0] += len(images) * len(drawings) * (5 + 2 * sampling.steps)
        return []

    monkeypatch.setattr(generator, "generate_iter", generate_iter, raising=False)
    assert seconds_per_picture(generator, people / "a.png", num_inference_steps=20) == pytest.approx(45)
    assert seconds_per_picture(generator, people / "a.png", num_inference_steps=1) == pytest.approx(7)
    assert steps_seen[:3] == [(1, 1, 1), (1, 1, 1), (1, 1, 3)]
    monkeypatch.setattr(type(generator), "device", torch.device("cuda"))
    for batch_size, many, expected in ((20, FEW, (10, 2, 1)), (3, None, (1, 3, 1)), (1, FEW, (1, 1, 1))):
        steps_seen.clear()
        seconds = seconds_per_picture(generator, people / "a.png", many or "standard", batch_size=batch_size)
        assert seconds == pytest.approx(45)
        assert steps_seen[0] == expected


@pytest.fixture(scope="module")
def weights(generator, tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights") / "tiny"
    generator.save_pretrained(directory)
    return directory


@pytest.fixture
def command(weights, people, tmp_path):
    """The command on tiny weights; returns its exit status."""

    def run(*words, images=(str(people),)):
        given = ["generate", *images, "--out", str(tmp_path / "out"), "--weights", str(weights)]
        return main([*given, "--steps", "1", "--device", "cpu", *words])

    return run


def test_the_command(command, weights, people, tmp_path, capsys):
    poses.write(FEW, tmp_path / "poses.json")
    words = ("--poses", str(tmp_path / "poses.json"), "--seed", "3", "--guidance", "2", "--size", "64x32", "--grid")
    assert command(*words, "--dtype", "bfloat16", "--batch-size", "4") == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out == f"wrote 6 pictures to {out}\n"
    names = ("a.png", "b.png", "cam1/a.png")
    assert below(out) == {f"{folder}/{name}" for folder in ("pose1", "pose2", "sheets") for name in names}
    generator = IdentityGenerator.from_pretrained(weights, dtype=torch.bfloat16, device="cpu")
    options = {"num_inference_steps": 1, "seed": 3, "guidance_scale": 2.0, "size": (64, 32), "batch_size": 4}
    expected = generator.generate([people / "a.png", people / "b.jpg"], FEW, **options)
    with Image.open(out / "pose2" / "b.png") as picture:
        assert np.array_equal(picture, expected[1][1])
    assert command(*words, "--dtype", "bfloat16", "--batch-size", "4") == 0
    assert capsys.readouterr().out == f"wrote 0 pictures to {out}; 6 were there already\n"


def test_the_command_takes_a_table(command, people, tmp_path, capsys):
    """Its images alone, whatever is beside them; pictures are found by the table as a data set, and go on."""
    table = tmp_path / "tables" / "two.csv"
    table.parent.mkdir()
    table.write_text("path,identity,camera,keypoints\n../people/cam1/a.png,7,,\n../people/a.png,-1,,\n")
    poses.write(FEW, tmp_path / "poses.json")
    words, out = ("--poses", str(tmp_path / "poses.json")), tmp_path / "out"
    assert command(*words, images=[str(table)]) == 0
    assert capsys.readouterr().out == f"wrote 4 pictures to {out}\n"
    assert below(out) == {"pose1/a.png", "pose2/a.png", "pose1/cam1/a.png", "pose2/cam1/a.png"}
    found = PictureFolder(out, FEW)(open_dataset(table).query.paths)
    assert list(found) == [[out / f"pose{m}" / name for m in (1, 2)] for name in ("cam1/a.png", "a.png")]
    (out / "pose2" / "cam1" / "a.png").unlink()
    assert command(*words, "--dry-run", images=[str(table)]) == 0
    assert capsys.readouterr().out.startswith("1 pictures to generate, of 2 images in 2 poses")
    assert command(*words, images=[str(table)]) == 0
    assert capsys.readouterr().out == f"wrote 1 pictures to {out}; 3 were there already\n"


def test_the_command_warns_of_poses_that_are_not_valid(command, people, tmp_path, caplog):
    overturned = poses.Pose(FEW[0].keypoints * (1, -1) + (0, 1), "overturned")
    poses.write([FEW[0], overturned], tmp_path / "poses.json")
    words = ("--poses", str(tmp_path / "poses.json"))
    assert command(*words, images=[str(people / "a.png")]) == 0
    [told] = [line for line in caplog.messages if "pose2" in line]
    assert told.startswith(f"pose2 (overturned) of {tmp_path / 'poses.json'} may not be a person's: positions: head")
    assert "; angles: torso lean 17" in told
    assert below(tmp_path / "out") == {"pose1/a.png", "pose2/a.png"}


def test_the_standard_poses_are_the_default(command, people, tmp_path):
    assert command(images=[str(people / "a.png")]) == 0
    assert below(tmp_path / "out") == {f"pose{i}/a.png" for i in range(1, 9)}


def test_a_dry_run_writes_nothing(command, tmp_path, capsys, monkeypatch):
    assert command("--dry-run") == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    assert printed.startswith(f"24 pictures to generate, of 3 images in 8 poses; {out} is not touched\nabout ")
    assert " on cpu: " in printed
    assert not out.exists()
    monkeypatch.setattr(files, "seconds_per_picture", lambda *_, **__: 3600)
    assert command("--dry-run") == 0
    assert "about 24 hours on cpu: 0.000278 pictures/s" in capsys.readouterr().out
    monkeypatch.setattr(files, "seconds_per_picture", lambda *_, **__: 1)
    assert command("--dry-run") == 0
    assert "about 24 seconds on cpu" in capsys.readouterr().out
    assert command() == 0
    capsys.readouterr()
    assert command("--dry-run") == 0
    assert capsys.readouterr().out.startswith("0 pictures to generate")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "256"], "--size must be HEIGHTxWIDTH"),
        (["--size", "0x10"], "pose2id: --size must be at least 1"),
        (["--steps", "0", "--weights", "/no/weights"], "pose2id: --steps must be at least 1"),
        (["--guidance", "-1", "--weights", "/no/weights"], "pose2id: --guidance must be in"),
        (["--batch-size", "0", "--weights", "/no/weights"], "--batch-size must be at least 1"),
        (["--seed", "-5", "--weights", "/no/weights"], "pose2id: --seed must be at least 0"),
        (["--poses", "nowhere.json"], "pose2id: --poses nowhere.json cannot be used: No such file or directory."),
        (["--weights", "/no/weights"], "pose2id: --weights must be a directory or a repository"),
        (["--device", "gpu"], "pose2id: --device must be"),
        (["--device", "meta"], "pose2id: --device must be one that torch can compute on here, got 'meta'."),
        (["--offload", "--device", "cpu"], "pose2id: --offload must not be given with --device cpu"),
    ],
)
def test_bad_words(command, tmp_path, capsys, words, message):
    assert command(*words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_are_checked_before_weights_are_loaded(command, tmp_path, capsys):
    assert command("--weights", "/no/weights", images=["/no/image.png"]) == 2
    assert "there is no /no/image.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_words_for_the_weights(command, monkeypatch):
    seen = {}

    class StopHereError(Exception):
        pass

    def from_pretrained(weights, **options):
        seen.update(options)
        raise StopHereError

    monkeypatch.setattr(IdentityGenerator, "from_pretrained", from_pretrained)
    words = ("--compile", "--local-files-only", "--revision", "v1", "--vae", "a/b@c", "--cache-dir", "d")
    with pytest.raises(StopHereError):
        command(*words, "--dtype", "bfloat16")
    assert seen == {
        "device": "cpu",
        "dtype": torch.bfloat16,
        "compile": True,
        "local_files_only": True,
        "revision": "v1",
        "vae": "a/b@c",
        "cache_dir": "d",
    }
    with pytest.raises(StopHereError):
        command("--offload", "--device", "cuda")
    assert (seen["device"], seen["dtype"], seen["compile"]) == ("cpu", torch.float16, False)


def test_an_interruption_is_no_traceback(command, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "generate_files", interrupted)
    assert command() == 130
    assert capsys.readouterr().err.endswith("pose2id: interrupted\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="offloading works here")
def test_offload_without_a_gpu(command, capsys):
    assert command("--offload", "--device", "cuda") == 2
    assert "it sees no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_command_with_offload(command, tmp_path):
    assert command("--offload", "--device", "cuda") == 0
    assert len(below(tmp_path / "out")) == 24
