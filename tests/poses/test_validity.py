from __future__ import annotations

import math
import re
import runpy
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pose2id.poses import KEYPOINTS, Pose, Verdict, check_pose, standard
from pose2id.poses.skeleton import HIGHEST, LOWEST, THRESHOLD
from pose2id.poses.validity import RULES, measured

NAMES = [rule.name for rule in RULES]
HEAD = ("nose", "left_eye", "right_eye", "left_ear", "right_ear")
TURN = {"right": -1, "left": 1}


class Body:
    """A standard pose as the rules see it: the neck at (0, 0), a torso of length 1."""

    def __init__(self, pose=None):
        placed = dict(zip(KEYPOINTS, (pose or standard()[0]).keypoints * (0.5, 1.0), strict=True))
        self.neck, hips = placed["neck"], (placed["left_hip"] + placed["right_hip"]) / 2
        self.torso = np.hypot(*(hips - self.neck))
        self.at = {name: (point - self.neck) / self.torso for name, point in placed.items()}
        self.at["hips"] = (hips - self.neck) / self.torso

    def hide(self, *names):
        for name in names:
            self.at[name] = np.full(2, np.nan)

    def pose(self):
        points = np.array([self.at[name] for name in KEYPOINTS])
        return Pose((points * self.torso + self.neck) * (2.0, 1.0))


def turned(degrees):
    """Straight down, turned."""
    return np.array([math.sin(math.radians(degrees)), math.cos(math.radians(degrees))])


def hidden(order):
    """Keep as many of these as the value says, and everything else."""

    def move(body, value, side):
        names = [name.format(side=side) for name in order]
        body.hide(*names[int(value) :])

    return move


def most_hidden(body, value, side):
    body.hide(*[name for name in reversed(KEYPOINTS) if name not in ("neck", "left_hip")][: 18 - int(value)])


def height(joint):
    def move(body, value, side):
        body.at[f"{side}_{joint}"] = np.array([body.at[f"{side}_{joint}"][0], value])

    return move


def height_of_head(body, value, side):
    shift = value - np.mean([body.at[name][1] for name in HEAD])
    for name in HEAD:
        body.at[name] = body.at[name] + (0, shift)


def far_ankle(body, value, side):
    body.at[f"{side}_ankle"] = turned(5) / value


def lean(start, end):
    def move(body, value, side):
        upper, lower = body.at[f"{side}_{start}"], f"{side}_{end}"
        body.at[lower] = upper + np.hypot(*(body.at[lower] - upper)) * turned(TURN[side] * value)

    return move


def lean_of_torso(body, value, side):
    for name in ("left_hip", "right_hip"):
        body.at[name] = body.at[name] - body.at["hips"] + turned(TURN[side] * value)


def lean_of_head(body, value, side):
    middle = np.mean([body.at[name] for name in HEAD], axis=0)
    for name in HEAD:
        body.at[name] = body.at[name] - middle - 0.4 * turned(TURN[side] * value)


def bent_knee(body, value, side):
    knee = body.at[f"{side}_knee"] = body.at[f"{side}_hip"] + 0.7 * turned(0)
    body.at[f"{side}_ankle"] = knee + 0.7 * turned(180 - value)


def length(start, end):
    def move(body, value, side):
        name = f"{side}_{start}" if f"{side}_{start}" in KEYPOINTS else start
        body.at[f"{side}_{end}"] = body.at[name] + value * turned(20)

    return move


def width_of_hips(body, value, side):
    for name, sign in (("left_hip", 1), ("right_hip", -1)):
        body.at[name] = body.at["hips"] + (sign * value, 0)


def difference(start, end):
    def move(body, value, side):
        other = "left" if side == "right" else "right"
        short = np.hypot(*(body.at[f"{other}_{end}"] - body.at[f"{other}_{start}"]))
        body.at[f"{side}_{end}"] = body.at[f"{side}_{start}"] + (short + value) * turned(10)

    return move


def twist(upper, lower):
    def move(body, value, side):
        wide, narrow = (upper, lower) if side == "left" else (lower, upper)
        for joint, width in ((wide, 0.4), (narrow, value)):
            middle = (body.at[f"left_{joint}"][0] + body.at[f"right_{joint}"][0]) / 2
            for name, sign in ((f"left_{joint}", 0.5), (f"right_{joint}", -0.5)):
                body.at[name] = np.array([middle + sign * width, body.at[name][1]])

    return move


# How to make the rule of a name measure a value. A rule without a line here fails below.
MOVES = {
    "neck": hidden(["neck"]),
    "hips": hidden(["left_hip", "right_hip"]),
    "keypoints": most_hidden,
    "side": hidden(
        [f"{{side}}_{joint}" for joint in ("shoulder", "hip", "eye", "ear", "elbow", "wrist", "knee", "ankle")]
    ),
    "torso": far_ankle,
    "head height": height_of_head,
    "shoulder height": height("shoulder"),
    "wrist height": height("wrist"),
    "ankle height": height("ankle"),
    "torso lean": lean_of_torso,
    "head lean": lean_of_head,
    "thigh lean": lean("hip", "knee"),
    "shin lean": lean("knee", "ankle"),
    "knee angle": bent_knee,
    "shoulder": length("neck", "shoulder"),
    "upper arm": length("shoulder", "elbow"),
    "forearm": length("elbow", "wrist"),
    "hip": width_of_hips,
    "thigh": length("hip", "knee"),
    "shin": length("knee", "ankle"),
    "eye": length("nose", "eye"),
    "upper arms": difference("shoulder", "elbow"),
    "forearms": difference("elbow", "wrist"),
    "thighs": difference("hip", "knee"),
    "shins": difference("knee", "ankle"),
    "shoulders and hips": twist("shoulder", "hip"),
    "ears and shoulders": twist("ear", "shoulder"),
    "eyes and ears": twist("eye", "ear"),
}
BOUNDS = [
    pytest.param(rule, bound, outwards, id=f"{rule.name} {bound:g}")
    for rule in RULES
    for bound, outwards in ((rule.low, -1), (rule.high, 1))
    if math.isfinite(bound)
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("rule", "bound", "outwards"), BOUNDS)
def test_a_rule_holds_just_inside_its_bounds_and_is_broken_just_outside(rule, bound, outwards, side):
    counted = rule.unit == "visible"
    step = outwards * max(abs(bound), 0.1) / 500
    for value, breaks in (
        ((bound, False), (bound - 1, True)) if counted else ((bound - step, False), (bound + step, True))
    ):
        body = Body()
        MOVES[rule.name](body, value, side)
        pose = body.pose()
        values = [found for _, found in measured(pose)[rule.name]]
        assert any(found == pytest.approx(value, abs=abs(step) / 10) for found in values), (value, values)
        verdict = check_pose(pose)
        assert (rule.name in verdict.rules) == breaks, (value, verdict)
        shown = f"at {'least' if outwards < 0 else 'most'} {bound:g}"
        mine = [reason for reason in verdict.reasons if rule.name in reason and reason.startswith(rule.kind)]
        assert any(reason.endswith(shown) for reason in mine) or not breaks, verdict


def test_rules_are_few_kinds_with_names_of_their_own_and_a_bound_each():
    assert len(set(NAMES)) == len(NAMES)
    assert {rule.kind for rule in RULES} == {"occlusion", "positions", "angles", "limb proportions", "symmetry"}
    assert {param.values[0].name for param in BOUNDS} == set(NAMES) == set(MOVES)
    assert all(rule.low < rule.high and rule.what and rule.unit for rule in RULES)


@pytest.mark.parametrize("pose", standard(), ids=lambda pose: pose.name)
def test_standard_poses_are_valid(pose):
    for each in (pose, pose.flipped()):
        assert check_pose(each) == Verdict()
        assert check_pose(each)
        assert check_pose(each).valid
    for names in (("left_hip",), ("right_hip",), ("left_wrist", "right_ankle")):
        body = Body(pose)
        body.hide(*names)
        left, right = check_pose(body.pose()), check_pose(body.pose().flipped())
        assert left.rules == right.rules


@pytest.mark.parametrize("seed", range(2))
def test_shuffled_and_overturned_standard_poses_are_not_valid(seed):
    for pose in standard():
        assert "torso lean" in check_pose(Pose(pose.keypoints * (1, -1) + (0, 1))).rules
        assert not check_pose(Pose(np.random.default_rng(seed).permutation(pose.keypoints)))


def test_reasons_say_where_how_much_and_what_would_be_right():
    body = Body()
    body.at["left_knee"] = body.at["left_hip"] + 0.5 * turned(0)
    body.at["left_ankle"] = body.at["left_knee"] + 2.5 * turned(0)
    verdict = check_pose(body.pose())
    assert "limb proportions: left shin 2.5 torso lengths, at most 1.2" in verdict.reasons
    assert {"ankle height", "shin", "shins"} <= set(verdict.rules)
    assert list(verdict.rules) == [name for name in NAMES if name in verdict.rules]
    assert not verdict
    assert not verdict.valid


@pytest.mark.parametrize("excess", [1e-4, 1e-5, -1e-5])
def test_a_value_hardly_outside_is_shown_outside(excess):
    body = Body()
    bound = 1.2 if excess > 0 else 0.17
    body.at["left_ankle"] = body.at["left_knee"] + (bound + excess) * turned(0)
    (reason,) = (reason for reason in check_pose(body.pose()).reasons if "left shin" in reason)
    shown, end = re.fullmatch(
        r"limb proportions: left shin ([\d.]+) torso lengths, at (least|most) [\d.]+", reason
    ).groups()
    assert (float(shown) > bound) == (end == "most") == (excess > 0)
    assert float(shown) != bound


def test_without_neck_or_hips_the_reason_is_that():
    body = Body()
    body.hide("neck")
    assert check_pose(body.pose()) == Verdict(("occlusion: neck 0 visible, at least 1",), ("neck",))
    body = Body()
    body.hide("left_hip", "right_hip")
    assert check_pose(body.pose()) == Verdict(("occlusion: hips 0 visible, at least 1",), ("hips",))
    for hip in ("left_hip", "right_hip"):  # one is enough
        body = Body()
        body.hide(hip)
        assert check_pose(body.pose())
    alone = np.full((18, 2), np.nan)
    alone[0] = 0.5
    assert check_pose(Pose(alone)).rules == ("neck", "hips", "keypoints", "side")


def test_a_torso_without_length_is_refused():
    assert check_pose(Pose(np.full((18, 2), 0.5))).rules == ("torso",)
    folded = standard()[0].keypoints.copy()
    folded[[8, 11]] = folded[1]
    assert check_pose(Pose(folded)).rules == ("torso",)


def spoiled(seed):
    """A standard pose with noise of any strength on it, and some of its joints missing."""
    draws = np.random.default_rng(seed)
    keypoints = standard()[draws.integers(8)].keypoints.copy()
    keypoints += draws.normal(size=(18, 2)) * draws.choice([0, 0.01, 0.05, 0.3])
    keypoints[draws.random(18) < draws.choice([0, 0.1, 0.5])] = np.nan
    keypoints[0] = draws.random(2)
    return Pose(np.clip(keypoints, LOWEST, HIGHEST))


seeds = st.integers(0, 2**32)


@given(seeds, st.sampled_from([(256, 128), (200, 100), (128, 128), (97, 31)]))
def test_a_mirrored_pose_gets_the_same_verdict(seed, size):
    pose = spoiled(seed)
    ours, mirrored = check_pose(pose, size=size), check_pose(pose.flipped(), size=size)
    assert ours.rules == mirrored.rules
    other = {"left": "right", "right": "left"}
    assert sorted(" ".join(other.get(word, word) for word in reason.split(" ")) for reason in ours.reasons) == sorted(
        mirrored.reasons
    )


def values(pose, size=(256, 128)):
    return {(name, side): value for name, found in measured(pose, size=size).items() for side, value in found}


@given(seeds, st.floats(0.3, 1), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
def test_place_and_scale_do_not_matter(seed, scale, right, down):
    pose = spoiled(seed)
    moved = pose.keypoints * scale + (right, down)
    if np.isnan(moved).all() or (moved < LOWEST).any() or (moved > HIGHEST).any():
        return
    ours = values(pose)
    if ("torso", "") in ours and ours["torso", ""] < 0.05:  # lengths in millionths of a torso that hardly has any
        return
    assert values(Pose(moved)) == pytest.approx(ours, rel=1e-3, abs=1e-3)


def test_the_picture_s_proportions_count():
    pose = standard()[2]
    square = Pose((pose.keypoints - 0.5) * (0.5, 1) + 0.5)  # the same person with room to both sides
    assert values(square, (256, 256)) == pytest.approx(values(pose), abs=1e-3)
    assert values(pose, (128, 64)) == values(pose)
    assert check_pose(square, size=(256, 256)).valid
    assert "shin" in check_pose(pose, size=(128, 128)).rules


@given(seeds)
def test_rules_equal_their_restatement(seed):
    pose = spoiled(seed)
    x = {name: np.array([px * 128, py * 256]) for name, (px, py) in zip(KEYPOINTS, pose.keypoints, strict=True)}
    hips = np.nanmean([x["left_hip"], x["right_hip"]], axis=0) if pose.visible[[8, 11]].any() else np.full(2, np.nan)
    torso = np.sqrt(((hips - x["neck"]) ** 2).sum())
    ours = values(pose)
    expected = {("torso lean", ""): math.degrees(math.acos(np.clip((hips - x["neck"])[1] / torso, -1, 1)))}
    for side in ("left", "right"):
        hip, knee, ankle = (x[f"{side}_{joint}"] for joint in ("hip", "knee", "ankle"))
        thigh, shin = hip - knee, ankle - knee
        cosine = (thigh @ shin) / np.sqrt((thigh @ thigh) * (shin @ shin))
        expected["knee angle", side] = math.degrees(math.acos(np.clip(cosine, -1, 1)))
        expected["shin", side] = np.sqrt(shin @ shin) / torso
        expected["wrist height", side] = (x[f"{side}_wrist"] - x["neck"])[1] / torso
        expected["thigh lean", side] = math.degrees(math.acos(np.clip(-thigh[1] / np.sqrt(thigh @ thigh), -1, 1)))
    expected["shins", ""] = abs(expected["shin", "left"] - expected["shin", "right"])
    for key, value in expected.items():
        if math.isnan(value) or math.isnan(torso):
            assert key not in ours
        else:
            assert ours[key] == pytest.approx(value, rel=1e-3, abs=0.05)


def test_unfit_arguments():
    with pytest.raises(TypeError, match="pose must be a Pose, got ndarray"):
        check_pose(standard()[0].keypoints)
    with pytest.raises(ValueError, match="size must be"):
        check_pose(standard()[0], size=2)
    with pytest.raises(ValueError, match="size must be"):
        check_pose(standard()[0], size=(0, 128))


def test_of_a_detector_s_poses_each_rule_refuses_few(real_features):
    file = real_features("train743_poses")
    keypoints = file["keypoints"].astype(np.float64)
    points = keypoints[..., :2]
    near = ((points >= LOWEST) & (points <= HIGHEST)).all(2)
    points[~(near & (keypoints[..., 2] >= THRESHOLD))] = np.nan
    verdicts = [check_pose(Pose(each)) for each in points if not np.isnan(each).all()]
    assert len(verdicts) == 6870
    for name in NAMES:
        assert sum(name in verdict.rules for verdict in verdicts) <= 0.016 * len(verdicts), name
    assert 0.05 < sum(not verdict for verdict in verdicts) / len(verdicts) < 0.08


def test_the_documented_bounds_are_those_of_the_rules():
    rows = re.findall(
        r"^\| (\w[\w ]*): ([\w ]+) \|(.*)\|$", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.M
    )
    documented = [(kind, name, *(cell.strip() for cell in cells.split("|")[:4])) for kind, name, cells in rows]
    shown = lambda bound: f"{bound:g}" if math.isfinite(bound) else ""  # noqa: E731
    assert documented == [
        (rule.kind, rule.name, rule.what, rule.unit, shown(rule.low), shown(rule.high)) for rule in RULES
    ]


def test_the_script_measures_and_draws(tmp_path, monkeypatch, capsys):
    """On standard poses in place of a detector's, every other one upside down."""
    keypoints = np.array([pose.keypoints for pose in standard()] * 2)
    keypoints[::2] = keypoints[::2] * (1, -1) + (0, 1)
    found = np.dstack([keypoints, ~np.isnan(keypoints[..., 0])])
    crops = [f"{i:04d}_00.jpg" for i in range(len(found))]
    for name in ("train743", "val100"):
        np.savez(tmp_path / f"cuhk03_p1_det_{name}_poses.npz", keypoints=found, names=np.array(crops))
    (tmp_path / "images").mkdir()
    with zipfile.ZipFile(tmp_path / "images" / "cuhk03_p1_det_train743_64x128.zip", "w") as archive:
        for crop in crops:
            with archive.open(crop.replace("_", "_c1_"), "w") as file:
                Image.new("RGB", (64, 128)).save(file, "JPEG")
    script = [str(ROOT / "benchmarks" / "poses.py"), str(tmp_path), "--sheets", str(tmp_path / "sheets")]
    monkeypatch.setattr(sys, "argv", script)
    runpy.run_path(script[0], run_name="__main__")
    printed = capsys.readouterr().out
    assert "| any | | | | | | | 50.00 | 50.00 |" in printed
    assert "people found: 16 (train743), 16 (val100)" in printed
    for what in ("upside down", "keypoints shuffled", "left half missing", "lower half missing"):
        assert f"| {what} | 100.0 | 100.0 |" in printed
    for sheet, count in (("refused", 8), ("accepted", 8)):
        assert len((tmp_path / "sheets" / f"{sheet}.txt").read_text(encoding="utf-8").splitlines()) == count
        with Image.open(tmp_path / "sheets" / f"{sheet}.png") as picture:
            assert picture.size == (2160, 300)
