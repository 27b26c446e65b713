"""RegDB: visible and thermal images."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pose2id.datasets.dataset import Dataset, Split
from pose2id.datasets.layout import (
    Layout,
    check_listed,
    entries,
    image_names,
    joined,
    list_lines,
    missing,
    part,
    split_from,
    top_of,
    unlisted,
    unread,
    warn_of,
)
from pose2id.io.checks import checked_choice, checked_count, first_few

DIRECTIONS = ("visible-to-thermal", "thermal-to-visible")
KINDS = {"visible": 1, "thermal": 2}  # the two cameras
LAYOUT = Layout(
    "RegDB",
    (("visible", "thermal"), ("visible", "idx"), ("thermal", "idx")),
    """
RegDB/
    Visible/285/male_back_v_05528_285.bmp
    Thermal/285/male_back_t_02192_285.bmp
    idx/
        test_visible_1.txt, test_thermal_1.txt ... _10.txt     Visible/285/male_back_v_05528_285.bmp 0
        train_visible_1.txt, train_thermal_1.txt ... _10.txt   (may be missing)""",
)
TRIALS, IMAGES, IDENTITIES = 10, 2_060, 206  # as published; images of one side in one trial
_TEST = re.compile(r"test_(visible|thermal)_(\d+)\.txt")


def regdb(root: str | os.PathLike[str], *, direction: str | None = None, trial: int | None = None) -> Dataset:
    """Read RegDB: 10 published trials, each with 206 people to train with and 206 others to test.

    Identities are the numbers of the folders: those in the lists are counted anew in each trial. Cameras are 1
    (visible) and 2 (thermal); the protocol drops nothing by them. A model trained in one trial has seen the people of
    others' tests: give its `trial`.

    Counts: Nguyen et al., "Person Recognition System Based on a Combination of Body Images from Visible Light and
    Thermal Cameras", Sensors 2017 (412 people, 10 images of each kind), and the halves of the published lists; lists as
    read by `data_manager.py` of github.com/mangye16/Cross-Modal-Re-ID-baseline.

    Args:
        root: RegDB, whatever it is called, or a folder up to two levels above it.
        direction: "visible-to-thermal" (None) or "thermal-to-visible": what is searched for among what.
        trial: one trial, with its training images; None: all that there are, without training images.

    Raises:
        FileNotFoundError: a folder, a list or a listed image is missing.
        ValueError: lists that do not fit, or no such trial.
    """
    asked, searched = (checked_choice(direction or DIRECTIONS[0], "direction", DIRECTIONS)).split("-to-")
    top = top_of(root, LAYOUT)
    idx, folders = part(top, "idx", LAYOUT), {kind: part(top, kind, LAYOUT) for kind in KINDS}
    numbers = _trials(idx, trial)
    lists = {(kind, number): _lines(idx, "test", kind, number) for kind in KINDS for number in numbers}
    people = {number: _people(number, lists["visible", number] + lists["thermal", number]) for number in numbers}
    splits, rows, notes = {}, {}, unread(top, [idx, *folders.values()])
    for kind, folder in folders.items():
        there = [f"{folder.name}/{name}" for name in image_names(folder, LAYOUT.name)]
        used = sorted({name for number in numbers for name, _ in lists[kind, number]})
        for number in numbers:
            check_listed([name for name, _ in lists[kind, number]], there, top, LAYOUT.name)
        splits[kind] = _split(top, used, kind)
        at = {name: row for row, name in enumerate(used)}
        rows[kind] = [np.array([at[name] for name, _ in lists[kind, number]], dtype=np.int64) for number in numbers]
        notes += unlisted(there, used, f"{folder.name} for testing") if trial is None else ()
    train = None if trial is None else _train(top, idx, trial)
    if trial is None:
        notes += ("Training images differ from trial to trial: trial=1 gives those of the first.",)
    differ = _differences(numbers, lists, people, trial)
    if train is not None and len(train) != 2 * IMAGES:
        differ.append(f"train: {len(train):,} images found, {2 * IMAGES:,} published")
    notes += warn_of(LAYOUT.name, differ)
    trials: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...] = tuple(
        zip(rows[asked], rows[searched], strict=True)
    )
    return Dataset(LAYOUT.name, top, splits[asked], splits[searched], train, "regdb", trials=trials, notes=notes)


def _trials(idx: Path, trial: int | None) -> list[int]:
    found = [_TEST.fullmatch(name) for name in entries(idx)]
    numbers = {kind: sorted(int(match[2]) for match in found if match and match[1] == kind) for kind in KINDS}
    if not numbers["visible"] or numbers["visible"] != numbers["thermal"]:
        given = ", ".join(f"{kind} {first_few(listed, most=10) or 'none'}" for kind, listed in numbers.items())
        raise missing(idx, f"pair of test_visible_T.txt and test_thermal_T.txt for each trial T ({given})", LAYOUT)
    if trial is None:
        return numbers["visible"]
    if checked_count(trial, "trial") not in numbers["visible"]:
        raise ValueError(f"trial must be one of {first_few(numbers['visible'], most=10)}, got {trial}.")
    return [int(trial)]


def _lines(idx: Path, side: str, kind: str, number: int) -> list[tuple[str, int]]:
    path = part(idx, f"{side}_{kind}_{number}.txt", LAYOUT)
    lines = list_lines(path, LAYOUT.name)
    bad = [name for name, _ in lines if not re.fullmatch(rf"{kind}/\d+/[^/]+", name, re.IGNORECASE)]
    if bad:
        raise ValueError(f"{LAYOUT.name}: {path} must list images as {kind.title()}/1/name, got {first_few(bad)}.")
    return lines


def _person(name: str) -> int:
    return int(name.split("/")[1])


def _people(number: int, lines: list[tuple[str, int]]) -> set[int]:
    """The people of a trial; the list's own numbers and the folders must tell them apart alike."""
    pairs = {(label, _person(name)) for name, label in lines}
    people = {person for _, person in pairs}
    if not len(pairs) == len(people) == len({label for label, _ in pairs}):
        raise ValueError(f"{LAYOUT.name}: each label of trial {number} must be one folder, for both kinds of images.")
    return people


def _split(top: Path, names: list[str], kind: str) -> Split:
    return split_from(top, names, [_person(name) for name in names], [KINDS[kind]] * len(names))


def _train(top: Path, idx: Path, trial: int) -> Split | None:
    names = entries(idx)
    if not all(f"train_{kind}_{trial}.txt" in names for kind in KINDS):
        return None
    lists = {kind: sorted(name for name, _ in _lines(idx, "train", kind, trial)) for kind in KINDS}
    for kind, listed in lists.items():
        folder = part(top, kind, LAYOUT)
        there = [f"{folder.name}/{name}" for name in image_names(folder, LAYOUT.name)]
        check_listed(listed, there, top, LAYOUT.name)
    return joined([_split(top, listed, kind) for kind, listed in lists.items()])


def _differences(
    numbers: list[int],
    lists: dict[tuple[str, int], list[tuple[str, int]]],
    people: dict[int, set[int]],
    trial: int | None,
) -> list[str]:
    differ = []
    if trial is None and len(numbers) != TRIALS:
        differ.append(f"{len(numbers)} trials found, {TRIALS} published")
    for number in numbers:
        found = {f"{kind} images": len(lists[kind, number]) for kind in KINDS} | {"identities": len(people[number])}
        published = dict(zip(found, (IMAGES, IMAGES, IDENTITIES), strict=True))
        differ += [
            f"trial {number}: {count:,} {what} found, {published[what]:,} published"
            for what, count in found.items()
            if count != published[what]
        ]
    return differ
