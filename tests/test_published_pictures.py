"""benchmarks/published_pictures.py: what it measures, on made features; and its figures, on the pictures themselves."""

from __future__ import annotations

import csv
import importlib
import io
import zipfile

import numpy as np
import pytest
from conftest import ROOT, SHARED
from PIL import Image

from pose2id import GenerationDiagnostics, generation_diagnostics

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("published_pictures")


@pytest.fixture
def made(rng):
    """References and 8 pictures of 12 people: whom a picture shows is clearer than in a reference."""
    people = rng.standard_normal((12, 32))
    pictures = people[:, None] + 0.8 * rng.standard_normal((12, 8, 32))
    return people + 1.5 * rng.standard_normal((12, 32)), pictures


def test_retention_is_the_librarys(script, made):
    originals, pictures = made
    table, everybody = script.cosines(originals, list(pictures)), np.arange(12)
    found = generation_diagnostics(originals, pictures)
    one_group = np.zeros(12, int)
    own, other = script.own_and_others(table, everybody, one_group)
    assert (own, other) == (pytest.approx(found.own_cosine), pytest.approx(found.other_cosine))
    assert script.retention(table, everybody, one_group) == pytest.approx(found.retention)
    row = script.worth("made", originals, list(pictures), one_group)
    assert f"{100 * found.retention:.1f} [" in row
    assert f"| {found.consistency:.3f} |" in row


def test_others_are_of_the_own_group_and_never_oneself(script, rng):
    table, groups = rng.uniform(size=(4, 4)), np.array([0, 0, 1, 1])
    assert script.own_and_others(table, np.arange(4), groups)[1] == pytest.approx(
        np.mean([table[0, 1], table[1, 0], table[2, 3], table[3, 2]])
    )
    own, other = script.own_and_others(table, np.array([0, 0, 1]), np.zeros(4, int))
    assert own == pytest.approx((2 * table[0, 0] + table[1, 1]) / 3)
    assert other == pytest.approx((table[0, 1] + table[1, 0]) / 2)


def test_draws_keep_the_groups_sizes(script):
    groups = np.array([0, 0, 0, 1, 1])
    drawn = list(script.draws(groups))
    assert len(drawn) > 500
    for people in drawn:
        assert (groups[people] == groups).all()
        assert all(len(set(people[groups == group])) > 1 for group in (0, 1))


def test_held_out_pictures_gain_from_their_person_and_not_from_anybody(script, made, rng):
    originals, pictures = made
    one_group = np.zeros(12, int)
    as_is, some, much = script.held_out(originals, pictures, one_group, etas=(0, 1, 4), splits=2)
    np.testing.assert_allclose(as_is.control, as_is.rank1)
    assert as_is.rank1.mean() + 0.05 < some.rank1.mean() <= much.rank1.mean()
    assert as_is.separation.mean() < some.separation.mean() < much.separation.mean()
    assert as_is.own.mean() > some.own.mean() > much.own.mean()
    assert as_is.id2 > some.id2
    assert some.control.mean() < as_is.rank1.mean() + 0.05

    anybody = rng.standard_normal((12, 8, 32))
    before, after = script.held_out(originals, anybody, one_group, etas=(0, 2), splits=4)
    assert abs(after.rank1.mean() - before.rank1.mean()) < 0.1
    assert len(script.held_out_table([before, after], one_group, (0, 2)).splitlines()) == 4


def test_people_are_compared_within_their_group(script, made):
    originals, pictures = made
    pairs = np.repeat(np.arange(6), 2)
    (found,) = script.held_out(originals, pictures, pairs, etas=(0,), splits=1)
    (together,) = script.held_out(originals, pictures, np.zeros(12, int), etas=(0,), splits=1)
    np.testing.assert_allclose(found.own, together.own)
    assert found.rank1.mean() > together.rank1.mean()


def test_people_of_an_archive(script, tmp_path):
    table, path = io.StringIO(), tmp_path / "pictures.zip"
    writer = csv.writer(table)
    writer.writerow(["path", "pid", "camid", "set", "kind"])
    with zipfile.ZipFile(path, "w") as archive:
        for pid in (3, 1):
            for camid in range(3):
                content = io.BytesIO()
                Image.new("RGB", (4, 8), (pid, camid, 0)).save(content, "PNG")
                archive.writestr(f"{pid}_{camid}.png", content.getvalue())
                writer.writerow([f"{pid}_{camid}.png", pid, camid, f"set{pid}", "gen" if camid else "ref"])
        archive.writestr("labels.csv", table.getvalue())
    found = script.read_people(path)
    assert found.sets == ["set3", "set1"]
    assert [image.getpixel((0, 0)) for image in found.references] == [(3, 0, 0), (1, 0, 0)]
    assert [[p.getpixel((0, 0))[:2] for p in some] for some in found.pictures] == [[(3, 1), (3, 2)], [(1, 1), (1, 2)]]


@pytest.mark.parametrize("shown", ["themselves", "somebody else"])
def test_labelled_people(script, tmp_path, monkeypatch, shown):
    count, shift = 6, 0 if shown == "themselves" else 1
    path = tmp_path / script.CUHK03_IMAGES
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for pid in range(count + 1):
            for camera in (1, 2):
                for number in range(1 if pid == 0 and camera == 2 else 3):  # person 0 has too few images
                    content = io.BytesIO()
                    Image.new("RGB", (4, 8), (pid, camera, number)).save(content, "PNG")
                    archive.writestr(f"{pid:04d}_c{camera}_{number:02d}.jpg", content.getvalue())

    def embed(images):
        # Who, three times as much as which camera and which image.
        colors = np.array([image.getpixel((0, 0)) for image in images])
        return np.concatenate([3 * np.eye(count + 1)[colors[:, 0]], np.eye(3)[colors[:, 1]], colors[:, 2:]], axis=1)

    def pictures(images):
        # Somebody else in each camera: a wrong person who is always the same would be found again, too.
        seen = [image.getpixel((0, 0)) for image in images]
        return [[Image.new("RGB", (4, 8), (1 + (p - 1 + shift * c) % count, 1, 0))] * 2 for p, c, _ in seen]

    monkeypatch.setattr(script, "tiny_pictures", pictures)
    told, _, *rows = script.labelled(tmp_path, 4, embed)
    assert told.startswith("16 images of 4 people")
    assert len(rows) == len(script.ETAS)
    values = [[cell.split()[0] for cell in row.strip("|").split("|")] for row in rows]
    assert values[0][1:3] == ["100.0", "0.0"]
    assert (float(values[-1][1]) == 100) == (shown == "themselves")
    assert all(eta == f"{given:g}" for (eta, *_), given in zip(values, script.ETAS, strict=True))


def test_the_figures_that_the_reading_stands_on(script):
    if not (SHARED / "data" / script.PICTURES).exists():
        pytest.skip("the published pictures are not on this machine")
    pytest.importorskip("onnxruntime")
    people = script.read_people(SHARED / "data" / script.PICTURES)
    _, embed = next(script.models(SHARED / "data"))
    own, generated = script.embedded(embed, people.references, people.pictures)
    assert generated.shape == (15, 20, 512)
    assert generation_diagnostics(own, generated).retention == pytest.approx(0.44, abs=0.01)

    groups = np.unique(people.sets, return_inverse=True)[1]
    table, everybody = script.cosines(own, list(generated)), np.arange(15)
    within = script.retention(table, everybody, groups)
    low, _ = script.interval([script.retention(table, drawn, groups) for drawn in script.draws(groups)])
    assert (within, low) == (pytest.approx(0.393, abs=0.005), pytest.approx(0.336, abs=0.01))
    assert "39%, at least 34%" in GenerationDiagnostics(within, 0.0, None).reading
