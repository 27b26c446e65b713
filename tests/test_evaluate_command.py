"""`pose2id evaluate` and `extract` on data sets: what direct calls give, kept, with generated images, on a page."""

from __future__ import annotations

import csv
import html
import importlib
import itertools
import json
import os
import re
import sys

import numpy as np
import pytest
from datasets import trees
from PIL import Image

from pose2id import Centralizer, evaluate
from pose2id.cli import main
from pose2id.datasets import open_dataset
from pose2id.io.feature_files import FeatureFile
from pose2id.ipg.batch import collect_images
from pose2id.report import compare, records, study
from pose2id.retrieval import protocols

MODEL = """
import torch
from pose2id import Extractor
from pose2id.extractor import Preprocess

class Stripes(torch.nn.Module):
    seen = 0

    def forward(self, batch):
        Stripes.seen += len(batch)
        return batch.unflatten(2, (4, -1)).mean((3, 4)).flatten(1)

extractor = Extractor(Stripes(), transform=Preprocess((16, 8), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)), batch_size=7)
"""
MARKET = "my_stripes:extractor"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a model in it, and a home for the cache."""
    (tmp_path / "my_stripes.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_stripes", None)


def paint(path, pid, rng, size=(10, 20)):
    """A person's colours, with noise."""
    colours = np.random.default_rng(pid + 10).integers(40, 216, (4, 1, 3))
    pixels = np.repeat(np.repeat(colours, size[1] // 4, 0), size[0], 1) + rng.normal(0, 25, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def market(folder, rng):
    """Market1501's layout: 6 people by 3 cameras, junk and distractors."""
    root = folder / "Market-1501-v15.09.15"
    for pid in range(1, 7):
        for cam in (1, 2, 3):
            for name, count in (("query", 1), ("bounding_box_test", 2)):
                for i in range(count):
                    paint(root / name / f"{pid:04d}_c{cam}s1_{i:06d}_00.jpg", pid, rng)
    paint(root / "bounding_box_test" / "-1_c1s1_000000_00.jpg", 90, rng)
    paint(root / "bounding_box_test" / "0000_c2s1_000000_00.jpg", 91, rng)
    return root


def direct(root):
    """Features and labels of a data set by direct calls."""
    from my_stripes import extractor  # noqa: PLC0415 - made by the test

    found = open_dataset(root)
    feats = tuple(
        extractor(list(split.paths), normalize=False, progress=False).numpy() for split in (found.query, found.gallery)
    )
    return feats, (found.query.pids, found.gallery.pids, found.query.camids, found.gallery.camids), found


def rows(capsys, *words):
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return {row.pop("name"): row for row in json.loads(capsys.readouterr().out)["rows"]}


def same(found, expected):
    expected = {row["name"]: row for row in records(expected)}
    assert list(found) == list(expected)
    for name, row in found.items():
        assert {**row, "name": name} == pytest.approx(expected[name], nan_ok=True)


@pytest.mark.filterwarnings("ignore:Market1501 is not as published")
def test_a_data_set_with_a_model(market, capsys):
    found = rows(capsys, market, "--model", MARKET, "--workers", 0)
    feats, labels, _ = direct(market)
    same(found, compare(feats, labels))
    assert found["baseline"]["mAP"] == evaluate(*feats, *labels).mAP
    assert list(found)[:4] == ["baseline", "NFC", "auto", "auto, cameras"]


@pytest.mark.filterwarnings("ignore:Market1501 is not as published")
def test_features_are_kept_and_used_again(market, folder, capsys):
    words = market, "--model", MARKET, "--workers", 0, "--cache", folder / "cache"
    first = rows(capsys, *words)
    from my_stripes import Stripes  # noqa: PLC0415

    seen = Stripes.seen
    assert seen == 18 + 38
    assert rows(capsys, *words) == first
    assert Stripes.seen == seen
    paint(market / "query" / "0001_c1s1_000000_00.jpg", 3, np.random.default_rng(0))
    assert main(["evaluate", *map(str, words)]) == 2
    assert "of other images. Choose another name, or overwrite it" in capsys.readouterr().err
    assert rows(capsys, *words, "--overwrite") != first
    assert Stripes.seen == 2 * seen


@pytest.mark.filterwarnings("ignore:Market1501 is not as published")
def test_features_that_were_extracted_before(market, folder, capsys):
    assert main(["extract", str(market), "--model", MARKET, "--workers", "0", "--out", "f.npy"]) == 0
    assert capsys.readouterr().out == "f.npy: features of 56 images, 12 values each\n"
    feats, labels, found = direct(market)
    np.testing.assert_array_equal(np.load("f.npy"), np.concatenate(feats))
    with open("f.npy.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["path"] for line in lines] == [*found.query.paths, *found.gallery.paths]
    assert [line["split"] for line in lines] == ["query"] * 18 + ["gallery"] * 38
    assert [int(line["identity"]) for line in lines] == np.concatenate(labels[:2]).tolist()
    assert [int(line["camera"]) for line in lines] == np.concatenate(labels[2:]).tolist()
    same(rows(capsys, market, "--features", "f.npy"), compare(feats, labels))
    np.save("short.npy", np.load("f.npy")[:-1])
    assert main(["evaluate", str(market), "--features", "short.npy"]) == 2
    assert (
        "--features must have shape (56, D), one row an image, queries first, got (55, 12)" in capsys.readouterr().err
    )


def test_every_image_of_a_folder(folder, rng):
    names = ["a/1.png", "a/c/2.png", "b.jpg"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"not-utf-8-\xff.png"))
    for name in names:
        paint(folder / "pictures" / name, 1, rng)
    assert main(["extract", "pictures", "--all-images", "--model", MARKET, "--out", "f.npy", "--workers", "0"]) == 0
    assert np.load("f.npy").shape == (len(names), 12)
    with open("f.npy.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [line["path"] for line in csv.DictReader(file)] == [f"pictures/{name}" for name in names]


@pytest.fixture
def generated(market, rng):
    """Pictures of every image in 3 poses."""
    root = market.parent / "generated"
    for name in ("query", "bounding_box_test"):
        for path in sorted((market / name).glob("*.jpg")):
            for m in (1, 2, 3):
                paint(root / f"pose{m}" / name / f"{path.stem}.png", max(int(path.name.split("_")[0]), 0), rng)
    return root


def features_of_pictures(found, root):
    from my_stripes import extractor  # noqa: PLC0415

    feats = []
    for split in (found.query, found.gallery):
        names = [path.split("Market-1501-v15.09.15/")[1].rsplit(".", 1)[0] for path in split.paths]
        files = [root / f"pose{m}" / f"{name}.png" for name in names for m in (1, 2, 3)]
        feats.append(extractor(files, normalize=False, progress=False).numpy().reshape(len(names), 3, -1))
    return tuple(feats)


@pytest.mark.filterwarnings("ignore:Market1501 is not as published")
def test_generated_images_and_the_papers_tables(market, generated, capsys):
    words = market, "--model", MARKET, "--workers", 0, "--generated", generated
    found = rows(capsys, *words)
    feats, labels, data = direct(market)
    pictures = features_of_pictures(data, generated)
    same(found, compare(feats, labels, generated=pictures))
    content = FeatureFile(*feats, *labels)
    for table in ("2", "3", "4", "6", "7", "eta", "same-pose"):
        expected = study(table, content, generated=pictures, subsets=2, seed=3)
        same(rows(capsys, *words, "--table", table, "--subsets", 2, "--seed", 3), expected)
    found = rows(capsys, *words, "--table", "2", "--published", "transreid")
    assert found["IPG + NFC"]["published_mAP"] == pytest.approx(0.9039)
    assert found["IPG + NFC"]["published_Rank-1"] == pytest.approx(0.9474)
    eta = rows(capsys, *words, "--table", "2", "--eta", 0.5, "--k1", 3)
    same(eta, study("2", content, generated=pictures, centralizer=Centralizer(k1=3, k2=2, eta=0.5)))


@pytest.mark.filterwarnings("ignore:Market1501 is not as published")
def test_the_page_of_a_data_set(market, generated, folder, capsys):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    words = "--model", MARKET, "--workers", "0", "--generated", str(generated), "--table", "6", "--subsets", "1"
    assert main(["evaluate", str(market), *words, "--report", "page"]) == 0
    told = capsys.readouterr()
    assert told.err.splitlines()[-1] == "wrote page/index.html"
    text = (folder / "page" / "index.html").read_text(encoding="utf-8")
    *_, summary, reading = told.out.splitlines()
    assert summary.startswith("generated images of ")
    for line in (summary, reading):
        assert line in html.unescape(text)
    assert "<h1>pose2id on Market1501</h1>" in text
    assert "What “auto, cameras” did" in text
    assert "mAP by M" in text
    names = set(re.findall(r'src="(images/[^"]+)"', text))
    assert len(names) > 20
    for name in names:
        with Image.open(folder / "page" / name) as picture:
            picture.load()
    before = sorted(path.name for path in (folder / "page").iterdir())
    assert main(["evaluate", str(market), *words, "--report", "page"]) == 2
    assert "page exists and is not empty" in capsys.readouterr().err
    assert sorted(path.name for path in (folder / "page").iterdir()) == before


@pytest.mark.filterwarnings("ignore:Market1501 is not as published")
@pytest.mark.parametrize("form", ["csv", "markdown", "latex"])
def test_forms_of_the_table(form, market, capsys):
    assert main(["evaluate", str(market), "--model", MARKET, "--workers", "0", "--format", form, "--no-rerank"]) == 0
    feats, labels, _ = direct(market)
    found = compare(feats, labels, rerank=False)
    expected = {"csv": found.to_csv, "markdown": found.to_markdown, "latex": found.to_latex}[form]()
    assert capsys.readouterr().out.strip() == expected.strip()


def test_a_folder_of_identities_is_searched_for_each_image(folder, rng, capsys):
    for pid in range(4):
        for i in range(3):
            paint(folder / "people" / f"person{pid}" / f"{i}.jpg", pid, rng)
    found = rows(capsys, "people", "--model", MARKET, "--workers", 0)
    (x, _), labels, data = direct("people")
    assert data.gallery is data.query
    assert list(found) == ["baseline", "NFC", "auto"]
    same(found, compare((x, x), labels[:2], protocol=protocols.LEAVE_ONE_OUT))
    assert main(["evaluate", "people", "--model", MARKET]) == 0
    printed = capsys.readouterr().out
    assert "people, protocol leave-one-out" in printed
    assert "12 queries (12 with a match), 12 gallery images" in printed


@pytest.mark.filterwarnings("ignore:SYSU-MM01 is not as published")
@pytest.mark.parametrize(("mode", "shots"), [("all", 1), ("indoor", 2)])
def test_trials_of_sysu_mm01(mode, shots, folder, rng, capsys):
    root = folder / "SYSU-MM01"
    ids = [6, 10, 17]
    for pid in ids:
        for cam in range(1, 7):
            for i in range(1, 4):
                paint(root / f"cam{cam}" / f"{pid:04d}" / f"{i:04d}.jpg", pid, rng)
    (root / "exp").mkdir()
    (root / "exp" / "test_id.txt").write_text(",".join(map(str, ids)))
    words = root, "--model", MARKET, "--workers", 0, "--mode", mode, "--shots", shots
    found = rows(capsys, *words)
    feats, labels, data = direct(root)
    protocol = protocols.sysu_mm01(mode, shots)
    paths = data.query.paths, data.gallery.paths
    # The paper's weight on this set is 1/4, and plays no part without generated images.
    same(found, compare(feats, labels, protocol=protocol, paths=paths))
    assert len(compare(feats, labels, protocol=protocol, paths=paths, rerank=False)[0].result.trials) == 10


@pytest.mark.filterwarnings("ignore:MARS is not as published")
def test_tracklets_are_pooled(folder, rng, capsys):
    root = trees.mars(folder / "MARS")
    for path in sorted(root.rglob("*.jpg")):
        paint(path, int(path.name[:4]) if path.name[:4].isdigit() else 70, rng)
    data = open_dataset(root)
    if not set(data.query.pids) & set(data.gallery.pids):
        pytest.fail("the miniature has no match")
    found = rows(capsys, root, "--model", MARKET, "--workers", 0, "--no-rerank")
    feats, labels, _ = direct(root)
    splits = data.query, data.gallery
    pooled, firsts = zip(*(protocols.pool(x, s.tracklets) for x, s in zip(feats, splits, strict=True)), strict=True)
    assert main(["evaluate", str(root), "--model", MARKET, "--generated", "g"]) == 2
    assert "--generated and --weights must be left out" in capsys.readouterr().err
    means = [
        np.stack([x[split.tracklets == t].mean(0) for t in dict.fromkeys(split.tracklets.tolist())])
        for x, split in zip(feats, splits, strict=True)
    ]
    for got, expected in zip(pooled, means, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    pids = [labels[i][firsts[i % 2]] for i in range(4)]
    same(found, compare(tuple(pooled), pids, rerank=False))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["people"], "--model or --features must be given for the images of people"),
        (["people", "--model", MARKET, "--features", "f.npy"], "and not both"),
        (["people", "--model", MARKET, "--gallery", "g.npy"], "--gallery must be given with a feature file"),
        (["f.npz", "--model", MARKET], "--model must be given with a folder or .csv"),
        (["people", "--model", "nothing"], "--model must be module:callable"),
        (["people", "--features", "f.npy", "--generated", "g"], "--model must be given with generated images"),
        (["people", "--model", MARKET, "--protocol", "best"], "--protocol must be one of"),
        (["people", "--model", MARKET, "--shots", "1"], "--shots must be left out"),
        (["people", "--model", MARKET, "--boxes", "labeled"], "--boxes is of cuhk03 alone"),
        (["people", "--model", MARKET, "--table", "11"], "--table must be one of"),
        (["people", "--model", MARKET, "--table", "4"], "--generated must be given for table"),
        (["people", "--model", MARKET, "--table", "2", "--published", "osnet"], "--published must be a model"),
        (["people", "--model", MARKET, "--protocol", "regdb"], "--protocol must be leave-one-out or vehicleid"),
        (["people", "--model", MARKET, "--protocol", "market1501"], "got 'market1501': each image would be its own"),
        (["none"], "none"),
    ],
)
def test_errors_name_the_option(words, message, folder, rng, capsys):
    for pid in range(3):
        for i in range(2):
            paint(folder / "people" / f"p{pid}" / f"{i}.jpg", pid, rng)
    np.save("f.npy", np.ones((6, 4)))
    np.savez("f.npz", query_feats=np.ones((2, 3)), gallery_feats=np.ones((2, 3)))
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "home").exists()  # no image went through the model


def test_a_table_whose_images_lie_elsewhere(folder, rng, capsys):
    """`--weights` names pictures as `pose2id generate TABLE` does, so that they complete one another."""
    rows_of_table = ["path,identity,camera,split"]
    for pid, split in itertools.product(range(2), ("query", "gallery")):
        paint(folder / "crops" / split / f"{pid}.jpg", pid, rng)
        rows_of_table.append(f"../crops/{split}/{pid}.jpg,{pid},{split},{split}")
    paint(folder / "train" / "7.jpg", 7, rng)  # which moves the folder that all of them have in common
    rows_of_table.append("../train/7.jpg,7,query,train")
    (folder / "tables").mkdir()
    (folder / "tables" / "t.csv").write_text("\n".join(rows_of_table))
    words = "tables/t.csv", "--model", MARKET, "--workers", 0, "--weights", "tiny", "--generated", "made"
    assert "IPG" in rows(capsys, *words, "--device", "cpu")
    made = {path.relative_to(folder / "made").as_posix() for path in (folder / "made").rglob("*.png")}
    names = {f"crops/{split}/{pid}" for pid in range(2) for split in ("query", "gallery")}
    assert made == {f"pose{m}/{name}.png" for m in range(1, 9) for name in names}
    assert set(collect_images([folder / "tables" / "t.csv"])) == {*names, "train/7"}


def test_the_tiny_weights_draw_what_is_missing(folder, rng, capsys):
    """`--weights`: pictures are made once, and then measured."""
    for pid in range(2):
        for i in range(2):
            paint(folder / "people" / f"p{pid}" / f"{i}.jpg", pid, rng)
    words = "people", "--model", MARKET, "--workers", 0, "--weights", "tiny", "--generated", "made", "--device", "cpu"
    first = rows(capsys, *words)
    assert [name for name in first if name.startswith("IPG")] == ["IPG", "IPG + NFC", "IPG + auto"]
    made = sorted(path.relative_to(folder / "made").as_posix() for path in (folder / "made").rglob("*.png"))
    assert made == sorted(f"pose{m}/p{pid}/{i}.png" for m in range(1, 9) for pid in range(2) for i in range(2))
    times = [(folder / "made" / name).stat().st_mtime_ns for name in made]
    assert rows(capsys, *words) == first
    assert times == [(folder / "made" / name).stat().st_mtime_ns for name in made]

    assert main(["evaluate", *map(str, words)]) == 0
    *_, said, summary, _ = capsys.readouterr().out.splitlines()
    assert said == "One image of each person in the gallery:"
    extractor = importlib.import_module("my_stripes").extractor
    of_each = [folder / "people" / f"p{pid}" / "0.jpg" for pid in range(2)]
    assert summary == Centralizer(extractor, generated="made").diagnose(of_each, progress=False).summary

    # Finished pictures under other names, as `pose2id generate people` gives from another folder, are not drawn again.
    other = folder / "other"
    for name in made:
        pose, _, rest = name.partition("/")
        (other / pose / "people" / rest).parent.mkdir(parents=True, exist_ok=True)
        (folder / "made" / name).rename(other / pose / "people" / rest)
    words = (*words[:-3], "other", *words[-2:])
    assert rows(capsys, *words) == first
    assert len([*other.rglob("*.png")]) == len(made)
    (other / "pose3" / "people" / "p1" / "1.png").unlink()
    assert main(["evaluate", *map(str, words)]) == 2
    assert "Complete them with `pose2id generate`" in capsys.readouterr().err
    assert len([*other.rglob("*.png")]) == len(made) - 1
