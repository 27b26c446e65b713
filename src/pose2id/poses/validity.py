"""PoseValid: does a pose look like a person who stands or walks? Named rules, each with its bounds, in one table.

Joints are measured from the neck, in lengths of the torso: from the neck to the middle of the visible hips. The paper
measures to the left hip, which gives a mirrored pose another verdict; here both sides are measured alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from pose2id.io.checks import checked_size
from pose2id.poses.skeleton import KEYPOINTS, Pose

# Whole numbers, so that a mirrored pose's are exactly the same: millionths, as in `Pose.key`, times the size.
_Point: TypeAlias = tuple[int, int]
_HIPS = ("left_hip", "right_hip")
_HEAD = ("nose", "left_eye", "right_eye", "left_ear", "right_ear")
_SIDES = ("left", "right")


@dataclass(frozen=True)
class Verdict:
    """What `check_pose` found; true if the pose is valid.

    Attributes:
        reasons: what is wrong, as "limb proportions: left shin 2.4 torso lengths, at most 1"; empty: nothing.
        rules: names of the rules that the pose breaks, in the order of `RULES`, each once.
    """

    reasons: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether the pose breaks no rule."""
        return not self.rules

    def __bool__(self) -> bool:
        return self.valid


@dataclass(frozen=True)
class Body:
    """Visible joints of a pose, from its neck.

    Attributes:
        points: of visible joints, and "hips" and "head", the middle of those visible: (x, y) from the neck, y down.
        torso: length of the torso in the same unit; 0: neck or hips are not visible, or in one place.
        visible: names of the joints that are visible.
    """

    points: dict[str, tuple[float, float]]
    torso: float
    visible: frozenset[str]

    def at(self, side: str, joint: str) -> tuple[float, float] | None:
        """Where a joint of one side is, or one that has no side."""
        return self.points.get(f"{side}_{joint}", self.points.get(joint))


_Measure: TypeAlias = Callable[[Body], Iterator[tuple[str, float]]]


@dataclass(frozen=True)
class Rule:
    """A rule: everything that it measures must lie in [low, high].

    Attributes:
        name: of the rule.
        kind: "occlusion", "positions", "angles", "limb proportions" or "symmetry".
        what: is measured, in words.
        unit: of the bounds.
        low: the least valid value, or minus infinity.
        high: the greatest valid value, or infinity.
        measure: "left" or "right", or "" for the whole body, and the value there; nothing where joints are missing.
    """

    name: str
    kind: str
    what: str
    unit: str
    low: float
    high: float
    measure: _Measure


def check_pose(pose: Pose, *, size: tuple[int, int] = (256, 128)) -> Verdict:
    """Whether a pose is that of a person who stands or walks, by the rules of `RULES`.

    What is not visible breaks no rule but those on occlusion. Without neck or hips nothing else can be measured.

    Args:
        pose: to check.
        size: (height, width) of the picture that its coordinates are fractions of, in any unit: its proportions count.
            Crops of people are about twice as high as wide.

    Returns:
        The verdict. A mirrored pose (`Pose.flipped`) gets the same one, but for left and right in reasons.
    """
    found = measured(pose, size=size)
    broken = [
        (rule, side, value) for rule in RULES for side, value in found[rule.name] if not rule.low <= value <= rule.high
    ]
    reasons = tuple(_reason(rule, side, value) for rule, side, value in broken)
    return Verdict(reasons, tuple(dict.fromkeys(rule.name for rule, _, _ in broken)))


def measured(pose: Pose, *, size: tuple[int, int] = (256, 128)) -> dict[str, list[tuple[str, float]]]:
    """What each rule of `RULES` measures of a pose, by the rule's name: (side, value), where side may be empty."""
    if not isinstance(pose, Pose):
        raise TypeError(f"pose must be a Pose, got {type(pose).__name__}.")
    body = body_of(pose, checked_size(size))
    return {rule.name: list(rule.measure(body)) for rule in RULES}


def _reason(rule: Rule, side: str, value: float) -> str:
    where = " ".join(word for word in (side, rule.name) if word)
    bound = f"at least {rule.low:g}" if value < rule.low else f"at most {rule.high:g}"
    # As many digits, at least 4, as it takes to show a value that is hardly outside as one that is.
    shown = (f"{value:.{digits}g}" for digits in range(4, 18))
    number = next(text for text in shown if not rule.low <= float(text) <= rule.high)
    return f"{rule.kind}: {where} {number} {rule.unit}, {bound}"


def body_of(pose: Pose, size: tuple[int, int]) -> Body:
    """Where the joints of a pose are from its neck, on a picture of that size."""
    height, width = size
    millionths = np.rint(np.nan_to_num(pose.keypoints) * 1e6).astype(np.int64).tolist()
    seen = {name: point for name, point, shown in zip(KEYPOINTS, millionths, pose.visible, strict=True) if shown}
    neck, hips = seen.get("neck"), [name for name in _HIPS if name in seen]
    if neck is None or not hips:
        return Body({}, 0.0, frozenset(seen))
    placed = {name: ((x - neck[0]) * width, (y - neck[1]) * height) for name, (x, y) in seen.items()}
    points: dict[str, tuple[float, float]] = {**placed, "hips": _middle([placed[name] for name in hips])}
    head = [placed[name] for name in _HEAD if name in placed]
    if head:
        points["head"] = _middle(head)
    return Body(points, math.hypot(*points["hips"]), frozenset(seen))


def _middle(points: list[_Point]) -> tuple[float, float]:
    x, y = zip(*points, strict=True)
    return sum(x) / len(x), sum(y) / len(y)


def _sides(body: Body, *joints: str) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """The places of joints, on each side on which all are visible; once, without a side, if none has one."""
    for side in _SIDES if any(f"left_{joint}" in KEYPOINTS for joint in joints) else ("",):
        points = [point for joint in joints if (point := body.at(side, joint)) is not None]
        if len(points) == len(joints) and body.torso:
            yield side, points


def _count(*names: str) -> _Measure:
    """How many of these joints are visible."""

    def measure(body: Body) -> Iterator[tuple[str, float]]:
        yield "", len(body.visible.intersection(names))

    return measure


def _count_of_sides(body: Body) -> Iterator[tuple[str, float]]:
    for side in _SIDES:
        yield side, sum(name.startswith(side) for name in body.visible)


def _torso_share(body: Body) -> Iterator[tuple[str, float]]:
    """The torso in parts of the distance from the neck to the farthest joint: 0 where nothing can be measured by it."""
    if body.points:
        farthest = max(math.hypot(*point) for point in body.points.values())
        yield "", body.torso / farthest if farthest else 0.0


def _below(joint: str) -> _Measure:
    """How far a joint is below the neck."""

    def measure(body: Body) -> Iterator[tuple[str, float]]:
        for side, ((_, y),) in _sides(body, joint):
            yield side, y / body.torso

    return measure


def _length(start: str, end: str) -> _Measure:
    """From joint to joint."""

    def measure(body: Body) -> Iterator[tuple[str, float]]:
        for side, points in _sides(body, start, end):
            yield side, math.dist(*points) / body.torso

    return measure


def _lean(upper: str, lower: str) -> _Measure:
    """Degrees between the way from joint to joint and straight down: 0 to 180, to whichever side."""

    def measure(body: Body) -> Iterator[tuple[str, float]]:
        for side, ((x, y), (lower_x, lower_y)) in _sides(body, upper, lower):
            yield side, math.degrees(math.atan2(abs(lower_x - x), lower_y - y))

    return measure


def _bend(start: str, joint: str, end: str) -> _Measure:
    """Degrees at a joint: 180 is straight."""

    def measure(body: Body) -> Iterator[tuple[str, float]]:
        for side, ((x, y), (at_x, at_y), (end_x, end_y)) in _sides(body, start, joint, end):
            a, b, c, d = x - at_x, y - at_y, end_x - at_x, end_y - at_y
            yield side, math.degrees(math.atan2(abs(a * d - b * c), a * c + b * d))

    return measure


def _difference(start: str, end: str) -> _Measure:
    """How much longer one side's limb is than the other's."""

    def measure(body: Body) -> Iterator[tuple[str, float]]:
        lengths = [length for _, length in _length(start, end)(body)]
        if len(lengths) == 2:
            yield "", abs(lengths[0] - lengths[1])

    return measure


def _twist(upper: str, lower: str) -> _Measure:
    """How far two pairs of joints are turned against each other.

    Left is right of right in a picture of somebody who looks at the camera; less than 0 says that one pair has it so,
    the other one not: the narrower pair's width. Otherwise it is that width, above 0.
    """

    def measure(body: Body) -> Iterator[tuple[str, float]]:
        points = [body.points.get(f"{side}_{joint}") for joint in (upper, lower) for side in _SIDES]
        if all(points) and body.torso:
            a, b, c, d = (point[0] for point in points if point is not None)
            narrower = min(abs(a - b), abs(c - d)) / body.torso
            yield "", math.copysign(narrower, (a - b) * (c - d))

    return measure


_ANY = math.inf
_VISIBLE, _LENGTHS = "visible", "torso lengths"
_BELOW, _APART, _ALIKE = f"{_LENGTHS} below the neck", f"{_LENGTHS} of difference", f"{_LENGTHS} the same way round"
# Bounds are quantiles, 0.5 and 99.5 %, of what a detector found on crops of 743 people, those whose hips are below the
# neck, rounded away from the middle; proportions have 15 % of room, because boxes around people are cut wider or
# narrower from set to set; shoulder height has a third, because that detector has no neck but the middle of the
# shoulders; and the eight standard poses are valid. `benchmarks/poses.py` measures, docs/training.md
# has the figures.
# fmt: off
RULES = (
    Rule("neck", "occlusion", "the neck", _VISIBLE, 1, _ANY, _count("neck")),
    Rule("hips", "occlusion", "the hips", _VISIBLE, 1, _ANY, _count(*_HIPS)),
    Rule("keypoints", "occlusion", "all 18", _VISIBLE, 11, _ANY, _count(*KEYPOINTS)),
    Rule("side", "occlusion", "the 8 of one side", _VISIBLE, 4, _ANY, _count_of_sides),
    Rule("torso", "positions", "neck to hips", "of the way to the farthest joint", 0.33, _ANY, _torso_share),
    Rule("head height", "positions", "middle of nose, eyes and ears", _BELOW, -0.55, -0.1, _below("head")),
    Rule("shoulder height", "positions", "shoulders", _BELOW, -0.2, 0.2, _below("shoulder")),
    Rule("wrist height", "positions", "wrists", _BELOW, -0.5, 1.4, _below("wrist")),
    Rule("ankle height", "positions", "ankles", _BELOW, 1.4, 2.7, _below("ankle")),
    Rule("torso lean", "angles", "neck to hips, from straight down", "degrees", -_ANY, 25, _lean("neck", "hips")),
    Rule("head lean", "angles", "head to neck, from straight down", "degrees", -_ANY, 70, _lean("head", "neck")),
    Rule("thigh lean", "angles", "hip to knee, from straight down", "degrees", -_ANY, 105, _lean("hip", "knee")),
    Rule("shin lean", "angles", "knee to ankle, from straight down", "degrees", -_ANY, 75, _lean("knee", "ankle")),
    Rule("knee angle", "angles", "at the knee; straight is 180", "degrees", 65, _ANY, _bend("hip", "knee", "ankle")),
    Rule("shoulder", "limb proportions", "neck to shoulder", _LENGTHS, -_ANY, 0.65, _length("neck", "shoulder")),
    Rule("upper arm", "limb proportions", "shoulder to elbow", _LENGTHS, 0.1, 0.9, _length("shoulder", "elbow")),
    Rule("forearm", "limb proportions", "elbow to wrist", _LENGTHS, -_ANY, 0.9, _length("elbow", "wrist")),
    Rule("hip", "limb proportions", "middle of the hips to hip", _LENGTHS, -_ANY, 0.38, _length("hips", "hip")),
    Rule("thigh", "limb proportions", "hip to knee", _LENGTHS, 0.2, 1.15, _length("hip", "knee")),
    Rule("shin", "limb proportions", "knee to ankle", _LENGTHS, 0.17, 1.2, _length("knee", "ankle")),
    Rule("eye", "limb proportions", "nose to eye", _LENGTHS, 0.03, 0.3, _length("nose", "eye")),
    Rule("upper arms", "symmetry", "lengths of both upper arms", _APART, -_ANY, 0.35, _difference("shoulder", "elbow")),
    Rule("forearms", "symmetry", "lengths of both forearms", _APART, -_ANY, 0.6, _difference("elbow", "wrist")),
    Rule("thighs", "symmetry", "lengths of both thighs", _APART, -_ANY, 0.4, _difference("hip", "knee")),
    Rule("shins", "symmetry", "lengths of both shins", _APART, -_ANY, 0.45, _difference("knee", "ankle")),
    Rule("shoulders and hips", "symmetry", "left and right of both", _ALIKE, -0.1, _ANY, _twist("shoulder", "hip")),
    Rule("ears and shoulders", "symmetry", "left and right of both", _ALIKE, -0.1, _ANY, _twist("ear", "shoulder")),
    Rule("eyes and ears", "symmetry", "left and right of both", _ALIKE, -0.04, _ANY, _twist("eye", "ear")),
)
"""The rules, in the order in which reasons name them."""
# fmt: on
