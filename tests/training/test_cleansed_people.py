"""Data cleansing at the start of a run."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from miniature import assert_equal, miniature, people, weights

from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.ipg import IdentityGenerator
from pose2id.ipg.pixels import load_reference, pixels
from pose2id.poses import Pose, validity
from pose2id.training import checkpoints, cleansed_people
from pose2id.training import run as training
from pose2id.training.cleansed_people import LEAST_CLEANSED, Cleansed, Dropped, cleanse
from pose2id.training.cleansing import clean
from pose2id.training.pairs import select
from pose2id.training.run import train
from pose2id.training.table import read_table

SHORT = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 1, "validation_images": 0}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """18 people on three images each."""
    table = people(tmp_path_factory.mktemp("cleansing") / "people", 18)
    assert len(table) >= LEAST_CLEANSED
    return table


def run(directory, table, **settings):
    return train(miniature(), table, directory, device="cpu", progress=False, **{**SHORT, **settings})


def recorded(directory):
    return json.loads((directory / "run.json").read_text())


def rewritten(directory, content):
    (directory / "run.json").write_text(json.dumps(content))


def killed_after_one_step(directory):
    """The run as if it had been killed between its checkpoints."""
    newest = checkpoints.found(directory)[-1]
    for path in (newest, directory / "weights"):
        path.rename(directory.parent / f"{directory.name}-{path.name}")
    return weights(directory.parent / f"{directory.name}-weights")


def by_hand(images, generator):
    """`clean` on the encoder's features of plain images, one by one."""
    with torch.no_grad():
        features = [
            generator.identity_encoder(pixels(load_reference(image.path, ""), (16, 8))[None] * 2 - 1)[0]
            for image in images
        ]
    return clean(torch.stack(features), [image.identity for image in images])


@pytest.fixture(scope="module")
def cleansed(images, tmp_path_factory):
    """(directory, weights) of a run that was killed after one step of two; not to be changed."""
    directory = tmp_path_factory.mktemp("cleansing") / "run"
    run(directory, images)
    return directory, killed_after_one_step(directory)


@pytest.fixture
def going(cleansed, tmp_path):
    return shutil.copytree(cleansed[0], tmp_path / "going")


def test_what_the_distances_say_is_left_out_and_recorded(images, cleansed):
    expected = by_hand(images, miniature())
    content = recorded(cleansed[0])
    dropped = content["cleansing"]["dropped"]
    assert content["settings"]["clean"] is True
    assert content["settings"]["poses"] == "valid"
    assert content["cleansing"]["num_images"] == len(images)
    assert {image["place"] for image in dropped} == set(np.flatnonzero(~expected.kept).tolist())
    assert [image["distance"] for image in dropped] == sorted((image["distance"] for image in dropped), reverse=True)
    for image in dropped:
        place = image["place"]
        assert (image["image"], image["identity"]) == (images[place].path.name, images[place].identity)
        assert image["reason"] == expected.reasons[place]
        assert image["distance"] == pytest.approx(expected.distances[place], rel=1e-5)
    assert {image["reason"] for image in dropped} == {"far", "near"}
    trained = select(images, poses="valid")
    assert [name for name, _ in content["poses_refused"]] == [
        name for name, _ in trained.refused if name not in {image["image"] for image in dropped}
    ]


def test_a_run_does_not_judge_again(images, cleansed, going, monkeypatch, caplog):
    """What another device would find must not matter."""
    monkeypatch.setattr(cleansed_people, "clean_people", None)
    with caplog.at_level(logging.INFO, "pose2id"):
        assert_equal(cleansed[1], weights(run(going, images).weights))
    assert recorded(going)["cleansing"] == recorded(cleansed[0])["cleansing"]
    assert "once in a run" not in caplog.text


@pytest.fixture
def unread(monkeypatch):
    """An image that is read, or a feature that is computed, fails."""
    monkeypatch.setattr(training, "select", None)
    monkeypatch.setattr(cleansed_people, "identity_features", None)


def test_a_directory_in_use_is_told_of_before_images_are_read(images, going, tmp_path, unread):
    (tmp_path / "new").mkdir()
    for directory in (going, tmp_path / "new"):
        lock = FileLock(directory / ".lock")
        with lock, pytest.raises(FileExistsError, match="is being trained in by another process"):
            run(directory, images)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.5}, "settings must be those that the run in .*learning_rate 0.001 then, 0.5 now"),
        ({"clean": False}, "clean True then, False now"),
        ({"salt": "other"}, "generator must be the one that the run in"),
    ],
)
def test_a_run_of_something_else_is_told_of_before_images_are_read(images, going, unread, changed, message):
    before = {path: path.read_bytes() for path in going.rglob("*") if path.is_file()}
    generator = miniature(salt=changed.pop("salt", ""))
    with pytest.raises(ValueError, match=message):
        train(generator, images, going, device="cpu", progress=False, **{**SHORT, **changed})
    assert {path: path.read_bytes() for path in going.rglob("*") if path.is_file()} == before


def test_weights_without_checkpoints_are_told_of_before_images_are_read(images, going, unread):
    checkpoints.found(going)[-1].rename(going / "weights")
    with pytest.raises(FileExistsError, match="has weights of a run whose checkpoints are gone"):
        run(going, images)


def test_the_directory_is_locked_while_images_are_judged(images, tmp_path, monkeypatch):
    """And a start that is killed then leaves a directory to begin in."""

    def second(*_):
        with pytest.raises(Timeout):
            FileLock(tmp_path / "run" / ".lock").acquire(timeout=0)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        raise KeyboardInterrupt

    judged = cleansed_people.clean_people
    monkeypatch.setattr(cleansed_people, "clean_people", second)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", images)
    monkeypatch.setattr(cleansed_people, "clean_people", judged)
    assert run(tmp_path / "run", images).step == 2


@pytest.mark.parametrize("record", [None, "damaged", {"dropped": [{}]}, {"dropped": 1}])
def test_a_lost_record_is_made_again(images, cleansed, going, record):
    content = recorded(going)
    found, content["cleansing"] = content["cleansing"], record
    rewritten(going, content)
    assert_equal(cleansed[1], weights(run(going, images).weights))
    assert recorded(going)["cleansing"] == found


def test_cleansing_can_be_switched_off(images, cleansed, going, tmp_path):
    with pytest.raises(ValueError, match=r"clean True then, False now\. Train in another directory"):
        run(going, images, clean=False)
    run(tmp_path / "off", images, clean=False)
    content = recorded(tmp_path / "off")
    assert content["cleansing"] is None
    assert content["settings"]["clean"] is False
    ours = weights(tmp_path / "off" / "weights")
    assert any(not torch.equal(ours[name], cleansed[1][name]) for name in ours)


def test_other_images_are_not_those_of_the_record(images, going, monkeypatch):
    """Which is told before they are judged."""
    monkeypatch.setattr(cleansed_people, "identity_features", None)
    with pytest.raises(ValueError, match="images must be those that the run in"):
        run(going, images[:-1])


def test_a_run_without_a_checkpoint_begins_with_other_images(images, going):
    """As the first start left nothing that depends on its own."""
    shutil.rmtree(checkpoints.found(going)[-1])
    before = recorded(going)["cleansing"]
    assert run(going, images[:-1]).step == 2
    after = recorded(going)["cleansing"]
    assert (before["num_images"], after["num_images"]) == (54, 53)
    assert before["key"] != after["key"]


def test_other_rules_of_poses_would_be_another_run(images, going, monkeypatch):
    """Those of another version: targets would be others, without a word."""
    assert recorded(going)["poses_refused"]
    monkeypatch.setattr(validity, "RULES", ())
    with pytest.raises(ValueError, match=r"poses must be valid by the rules that the run in .* began with: \d+ poses"):
        run(going, images)


def test_runs_of_older_versions_go_on_as_they_were(images, tmp_path):
    """Without cleansing, with all poses, and with no flag for it; not as something else."""
    run(tmp_path / "old", images, clean=False, poses="all")
    expected = killed_after_one_step(tmp_path / "old")
    content = recorded(tmp_path / "old")
    del content["cleansing"], content["poses_refused"], content["settings"]["clean"]
    rewritten(tmp_path / "old", content)
    with pytest.raises(ValueError, match="clean False then, True now"):
        run(tmp_path / "old", images, clean=True)
    with pytest.raises(ValueError, match="poses 'all' then, 'valid' now"):
        run(tmp_path / "old", images, poses="valid")
    assert_equal(expected, weights(run(tmp_path / "old", images).weights))
    assert recorded(tmp_path / "old")["settings"]["clean"] is False
    # And a second time, when the file names it: that run is one without cleansing.
    with pytest.raises(ValueError, match="clean False then, True now"):
        run(tmp_path / "old", images)


def test_a_run_tells_what_it_left_out(images, tmp_path, caplog):
    upset = [replace(image, pose=Pose(image.pose.keypoints * (1, -1) + (0, 1))) for image in images[3:5]]
    with caplog.at_level(logging.INFO, "pose2id"):
        run(tmp_path / "run", [*images[:3], *upset, *images[5:]], steps=1)
    lines = [line for message in caplog.messages for line in message.splitlines()]
    began, ended, *told = [line for line in lines if "cleansing" in line]
    assert len(told) == 1
    dropped = recorded(tmp_path / "run")["cleansing"]["dropped"]
    assert began == "data cleansing: features of 54 images of 18 people, once in a run"
    assert ended == f"data cleansing: {len(dropped)} of 54 images are left out"
    far = sum(image["reason"] == "far" for image in dropped)
    counts = f"left out {len(dropped)} of 54 images, {far} far from their person's mean, {len(dropped) - far} near it"
    assert f"data cleansing: {counts} ({dropped[0]['image']} far; " in told[0]
    refused = recorded(tmp_path / "run")["poses_refused"]
    assert f"({len(refused)} whose pose is not valid)" in lines[2]
    [names] = [line for line in lines if line.startswith("poses that are not valid: ")]
    assert refused[0][0] in names


def test_the_tiny_encoder_finds_a_wrong_person(tmp_path):
    drawn = SyntheticPedestrians(20, num_cameras=3, images_per_camera=1, seed=7)
    table = read_table(write_people(drawn, tmp_path / "people", progress=False))
    wrong = replace(table[30], path=tmp_path / "copy.png")
    wrong.path.write_bytes(table[3].path.read_bytes())
    table[30] = wrong
    generator = IdentityGenerator.from_pretrained("tiny", device="cpu")
    found = cleanse(table, [""] * len(table), generator, None, progress=False)
    assert [image.place for image in found.dropped if image.reason == "far"] == [30]
    assert "copy.png far" in str(found)


def test_lines_of_a_person_need_not_be_neighbours(images):
    """Nor do batches end where people do: as `clean` would have it, in the table's places."""
    table = [images[i] for i in np.random.default_rng(0).permutation(len(images))]
    expected = by_hand(table, miniature())
    found = cleanse(table, [""] * len(table), miniature(), None, progress=False)
    assert {image.place: image.reason for image in found.dropped} == {
        i: reason for i, reason in enumerate(expected.reasons) if reason
    }
    for image in found.dropped:
        assert image.identity == table[image.place].identity
        assert image.distance == pytest.approx(expected.distances[image.place], rel=1e-5)


def test_the_default_device_changes_nothing(images, monkeypatch):
    generator = miniature()
    expected = cleanse(images, [""] * len(images), generator, None, progress=False)

    def loader(crops, *, batch_size, num_workers):  # torch's own draws a number on the default device, which meta lacks
        del num_workers
        for start in range(0, len(crops), batch_size):
            yield torch.stack([crops[i] for i in range(start, min(start + batch_size, len(crops)))])

    monkeypatch.setattr(cleansed_people, "DataLoader", loader)
    torch.set_default_device("meta")
    try:
        found = cleanse(images, [""] * len(images), generator, None, progress=False)
    finally:
        torch.set_default_device(None)
    assert found == expected


def test_small_tables_are_left_alone(images, monkeypatch):
    monkeypatch.setattr(cleansed_people, "identity_features", None)
    found = cleanse(images[: LEAST_CLEANSED - 1], [""] * (LEAST_CLEANSED - 1), miniature(), None, progress=False)
    assert found.dropped == ()
    assert str(found) == "data cleansing: none left out, 49 images are fewer than 50"


def test_the_smallest_table_that_is_judged(images):
    given = images[:LEAST_CLEANSED]
    found = cleanse(given, [""] * LEAST_CLEANSED, miniature(), None, progress=False)
    assert {image.place for image in found.dropped} == set(np.flatnonzero(~by_hand(given, miniature()).kept).tolist())


def drop(*places):
    return lambda images, _: Cleansed("key", 50, tuple(Dropped(i, images[i].path.name, "", 1.0, "far") for i in places))


def test_people_who_lose_an_image_may_make_no_pair(images):
    two_and_three = [images[0], images[2], *images[3:6]]
    selection = select(two_and_three, cleanse=drop(1, 2))
    assert selection.images == images[4:6]
    assert selection.alone == [images[0]]
    assert selection.targets == [0, 1]
    assert "left out, no second image or no pose of the person: 1 (" in str(selection)
    # The only target is gone; the others are references to nothing.
    untold = [images[0], *(replace(image, pose=None) for image in images[1:3]), *images[3:6]]
    selection = select(untold, cleanse=drop(0))
    assert selection.images == images[3:6]
    assert selection.alone == untold[1:3]


def test_an_image_is_left_out_once(images):
    """What cleansing drops is not a pose that was refused, too."""
    upset = replace(images[3], pose=Pose(images[3].pose.keypoints * (1, -1) + (0, 1)))
    given = [upset, *images[4:6], *images[6:9]]
    refused = [name for name, _ in select(given, poses="valid").refused]
    found = select(given, poses="valid", cleanse=drop(0))
    assert [name for name, _ in found.refused] == refused[1:]
    assert refused[0] == upset.path.name


def test_only_what_could_be_trained_on_is_judged(images, tmp_path):
    broken = replace(images[3], path=tmp_path / "broken.png")
    asked = []
    select(
        [images[0], images[2], broken, images[4], *images[6:9]],
        cleanse=lambda *given: asked.append(given) or Cleansed("key", 5),
    )
    assert asked[0][0] == [images[0], images[2], *images[6:9]]
    assert len(asked[0][1]) == 5


def test_nothing_is_left(images):
    given = images[3:6]
    with pytest.raises(ValueError, match=r"images must hold two images.*clean=False \(--no-clean\)") as caught:
        select(given, cleanse=drop(0, 1))
    assert "--poses" not in str(caught.value)
    upset = [replace(image, pose=Pose(image.pose.keypoints * (1, -1) + (0, 1))) for image in given]
    with pytest.raises(ValueError, match=r'poses="all" \(--poses all\)') as caught:
        select(upset, poses="valid")
    assert "--no-clean" not in str(caught.value)
    assert "none can be used: 3 have such a pose" in str(caught.value)  # not "a valid pose", which none is
