"""Every Python snippet and every pose2id command of README and docs runs; every example too."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
import types
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT
from PIL import Image
from stand_ins import boxmot_reid as boxmot
from stand_ins import bpbreid, deep_person_reid, fastreid, roboflow_reid, saai, transreid

from pose2id.cli import main
from pose2id.demo import SyntheticPedestrians, colour_stripes
from pose2id.demo import write_people as draw_people
from pose2id.poses import Pose, write

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Of what takes minutes: option to value.
MINE = ("my_people", "my_keypoints")
SHORTER = {"--people": "3", "-n": "2", "--steps": "2", "--batch-size": "2"}


def write_people(given):
    for path, image in zip(given["paths"], given["images"], strict=False):
        Path(path).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)


def write_my_people():
    """A user's crops, a folder for each person, and their keypoints."""
    for i, sample in enumerate(SyntheticPedestrians(3, num_cameras=2, images_per_camera=2, size=(64, 32))[:]):
        image, keypoints = (Path(name, f"person{sample.pid}", f"{i}_c{sample.camid}") for name in MINE)
        for path in (image, keypoints):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample.image).save(image.with_suffix(".png"))
        seen = np.where(sample.visible[:, None], sample.keypoints, np.nan).astype(np.float64)
        write([Pose(seen)], keypoints.with_suffix(".json"))


MY_MODEL = """
from pose2id import Extractor

extractor = Extractor(lambda batch: batch.unflatten(2, (4, -1)).mean((3, 4)).flatten(1), transform="transreid")
"""


@pytest.fixture
def my_model(tmp_path, monkeypatch):
    """A user's model and crops, as the commands on data sets have them."""
    (tmp_path / "my_model.py").write_text(MY_MODEL, encoding="utf-8")
    people = SyntheticPedestrians(4, num_cameras=2, images_per_camera=2)
    lines = ["path,identity,camera,split"]
    for i, sample in enumerate(people[:]):
        path = tmp_path / "crops" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(sample.image).save(path)
        lines.append(f"crops/{i}.png,p{sample.pid},{sample.camid},{('query', 'gallery')[i % 2]}")
    (tmp_path / "crops.csv").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_model", None)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page):
    return "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of small weights, for the repository of the large ones."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tiny.generator(image_size=(64, 32)).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def given():
    """What the snippets take for granted: a user's features, labels, pictures, model and files."""
    people = SyntheticPedestrians(8)
    images = [sample.image for sample in people]
    features = colour_stripes(np.stack(images))
    q, g = people.query_gallery()
    return {
        "query_feats": features[q],
        "gallery_feats": features[g],
        "q_pids": people.pids[q],
        "g_pids": people.pids[g],
        "q_camids": people.camids[q],
        "g_camids": people.camids[g],
        "images": images[:2],
        "paths": [f"people/{i}.png" for i in range(2)],
        "pose_drawings": images[5:7],
        "cameras": torch.tensor(people.camids[:2]),
        "model": lambda batch, cam_label: batch.mean((2, 3)) + 0.1 * cam_label[:, None],
        "query_parts": features[q].reshape(len(q), 4, -1),
        "gallery_parts": features[g].reshape(len(g), 4, -1),
        "q_visible": np.arange(4 * len(q)).reshape(-1, 4) % 5 > 0,
        "g_visible": np.arange(4 * len(g)).reshape(-1, 4) % 7 > 0,
        "raw_feats": features[:4],
        "generated_feats": np.stack([features[4:7]] * 4),
    }


@pytest.fixture
def code_bases(given, monkeypatch):
    """What docs/your-code-base.md takes: code bases in miniature and the examples, by their modules' names."""

    class Engine(deep_person_reid.Engine):
        pass

    class ImagePartBasedEngine(bpbreid.ImagePartBasedEngine):
        pass

    contents = {
        "torchreid.engine": {"Engine": Engine},
        "torchreid.engine.image.part_based_engine": {"ImagePartBasedEngine": ImagePartBasedEngine},
        "fastreid.engine.defaults": {"ReidEvaluator": fastreid.ReidEvaluator},
        "processor.processor": {"R1_mAP_eval": transreid.R1_mAP_eval},
        "utils.eval_sysu": {"AIM": saai.AIM, "pairwise_distance": saai.pairwise_distance},
        "boxmot.reid.core": {"ReID": lambda weights: boxmot.ReID(boxmot.Backend())},
    }
    modules = {}
    for name, content in contents.items():
        for depth in range(1, name.count(".") + 2):
            path = ".".join(name.split(".")[:depth])
            monkeypatch.setitem(sys.modules, path, modules.setdefault(path, types.ModuleType(path)))
            if depth > 1:
                setattr(modules[path.rpartition(".")[0]], path.rpartition(".")[2], modules[path])
        vars(modules[name]).update(content)
    for path in (ROOT / "examples" / "code_bases").glob("*.py"):
        spec = spec_from_file_location(path.stem, path)
        monkeypatch.setitem(sys.modules, path.stem, module_from_spec(spec))
        spec.loader.exec_module(sys.modules[path.stem])
    sides = {"query_feat": given["query_feats"], "gall_feat": given["gallery_feats"]}
    return {
        **{name: features.astype(np.float64) for name, features in sides.items()},
        **{"query_cam": given["q_camids"], "gall_cam": given["g_camids"], "crops": given["images"]},
        "reid_model": roboflow_reid.ReIDModel(),
        "query_split": roboflow_reid.ReIDSplit(("people/0.png",), np.array([1]), np.array([1])),
        "gallery_split": roboflow_reid.ReIDSplit(("people/1.png",), np.array([1]), np.array([2])),
    }


@pytest.fixture
def a_cluster(page, request):
    """Ray, running and connected, where a page needs it: starting it for each command takes long."""
    if page.name in ("distributed.md", "README.md"):
        request.getfixturevalue("two_nodes")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# numpy about tensors that diffusers' solvers hand it.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_python_snippets_of(page, a_cluster, given, code_bases, weights, hub, my_model, tmp_path, monkeypatch):
    hub.add("yuanc3/Pose2ID", weights)
    monkeypatch.chdir(tmp_path)
    write_people(given)
    np.save("gallery.npy", given["gallery_feats"])
    draw_people(SyntheticPedestrians(3, num_cameras=2, images_per_camera=1), "cameras")
    for i in range(8):
        shutil.copytree("people", f"generated/pose{i + 1}")
    namespace = given | code_bases
    for snippet in blocks(page, "python"):
        exec(compile(snippet, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of(page, a_cluster, given, weights, hub, my_model, tmp_path, monkeypatch):
    hub.add("yuanc3/Pose2ID", weights)
    monkeypatch.chdir(tmp_path)
    keys = ("query_feats", "gallery_feats", "q_pids", "g_pids", "q_camids", "g_camids")
    np.savez("features.npz", **{key: given[key] for key in keys})
    if page.name == "distributed.md":
        np.save("features.npy", given["gallery_feats"])
    write_people(given)
    write_my_people()
    for line in commands(page):
        words = shlex.split(line, comments=True)
        if words[:1] == ["pose2id"] and words != ["pose2id", "demo"]:  # the bare demo has tests of its own
            shorter = [SHORTER.get(before, word) for before, word in pairwise(words)]
            assert main(shorter) == 0, line


def test_there_are_snippets_and_commands():
    assert len(blocks(PAGES[0], "python")) >= 4
    assert sum(line.startswith("pose2id") for line in commands(PAGES[0])) >= 3


@pytest.mark.parametrize("name", ["existing_pipeline", "own_model"])
def test_example(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words", "written"),
    [
        ("generate_one", [], "sheet.png"),
        ("generate_one", ["people/0.png", "one.png"], "one.png"),
        ("generate_folder", ["people", "new"], "new/sheets/1.png"),
        ("whole_pipeline", ["--people", "4", "--poses", "2"], None),
    ],
)
def test_example_of_generation(name, words, written, given, weights, hub, tmp_path, monkeypatch, capsys):
    hub.add("yuanc3/Pose2ID", weights)
    monkeypatch.chdir(tmp_path)
    write_people(given)
    monkeypatch.setattr("sys.argv", [name, *words, "--steps", "2"])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    if written is None:
        assert len(re.findall(r"mAP +\d", printed)) == 4
        assert "retention" in printed
    else:
        with Image.open(written) as sheet:
            assert sheet.size == (9 * 128 + 8 * 4, 2 * 256 + 4)


def test_example_of_a_live_gallery(capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["live_gallery.py", "--tracker", "overlaps"])
    runpy.run_path(str(ROOT / "examples" / "live_gallery.py"), run_name="__main__")
    printed = capfd.readouterr().out
    right = int(re.search(r"^(\d+) of 14 in camera 2 are right; Gallery\(27 images", printed, re.MULTILINE)[1])
    assert right >= 9
    assert re.search(r": unknown, distance [\d.]+ \(unknown\)$", printed, re.MULTILINE)  # the newcomer
    assert "\n12 tracks that ended more than 100 frames ago are removed" in printed
    assert "another process: 15 tracks on file, nearest is newcomer 181" in printed


def test_example_of_real_features(given, tmp_path, capsys, monkeypatch):
    queries = len(given["query_feats"])
    np.savez(
        tmp_path / "all.npz",
        feat_stripes=np.concatenate([given["query_feats"], given["gallery_feats"]]),
        pids=np.concatenate([given["q_pids"], given["g_pids"]]).astype(np.int32),
        camids=np.concatenate([given["q_camids"], given["g_camids"]]).astype(np.int8),
        is_query=np.arange(queries + len(given["gallery_feats"])) < queries,
    )
    monkeypatch.setattr("sys.argv", ["real_features.py", str(tmp_path / "all.npz")])
    runpy.run_path(str(ROOT / "examples" / "real_features.py"), run_name="__main__")
    assert "NFC + re-ranking" in capsys.readouterr().out


def test_the_layout_page_lists_every_file_of_gpu_tests():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    with_gpu = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    assert len(with_gpu) > 10
    for path in with_gpu:
        assert path == Path(__file__) or f"{path.name}`" in page


def anchors(page):
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_readme_lead_somewhere():
    # MkDocs looks after those of the docs.
    links = re.findall(r"\]\(([^):]+)\)", PAGES[0].read_text(encoding="utf-8"))
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).is_file(), link
        assert not anchor or anchor in anchors(ROOT / path), link


def test_the_line_that_everybody_copies_is_short():
    # A phone shows 50 characters of code, see docs/extra.css.
    for page in (PAGES[0], ROOT / "docs" / "index.md"):
        assert max(map(len, blocks(page, "python")[0].splitlines())) <= 50


def test_pictures_of_the_docs_exist():
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            with Image.open(page.parent / target) as picture:
                assert picture.size[0] > 300
