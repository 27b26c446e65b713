"""What the rules of PoseValid refuse: of poses that a detector found, and of poses spoiled on purpose.

    python benchmarks/poses.py DATA                 # DATA: cuhk03_p1_det_train743_poses.npz and ..._val100_poses.npz
    python benchmarks/poses.py DATA --sheets OUT    # and pictures to look at: refused and accepted poses over crops

Bounds come from the 743 training people; the 100 others set none. Each file holds names and keypoints (N, 18, 3): x, y,
confidence, NaN where nobody was found. Sheets show real people: look at them, and leave them where they are.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pose2id.poses import KEYPOINTS, LIMBS, PALETTE, Pose, check_pose
from pose2id.poses.skeleton import HIGHEST, LOWEST, THRESHOLD
from pose2id.poses.validity import RULES, measured

SETS = ("train743", "val100")
QUANTILES = (0.5, 99.5)
_UPPER = [i for i, name in enumerate(KEYPOINTS) if not name.endswith(("hip", "knee", "ankle"))]
_LOWER = [i for i in range(len(KEYPOINTS)) if i not in _UPPER]
_OF_SIDE = {side: [i for i, name in enumerate(KEYPOINTS) if name.startswith(side)] for side in ("left", "right")}
_LIMBS = ((2, 3, 4), (5, 6, 7), (8, 9, 10), (11, 12, 13))

Spoiled = Callable[[NDArray[np.float64], NDArray[np.float64], np.random.Generator], NDArray[np.float64]]


def load(data: Path, name: str) -> dict[str, Pose]:
    """Poses of the crops on which somebody was found, by the crop's name."""
    with np.load(data / f"cuhk03_p1_det_{name}_poses.npz") as file:
        found, names = file["keypoints"].astype(np.float64), file["names"].tolist()
    keypoints = found[..., :2]
    near = ((keypoints >= LOWEST) & (keypoints <= HIGHEST)).all(axis=2)
    keypoints[~(near & (found[..., 2] >= THRESHOLD))] = np.nan
    return {crop: Pose(points) for crop, points in zip(names, keypoints, strict=True) if not np.isnan(points).all()}


def _upside_down(pose: NDArray[np.float64], _: NDArray[np.float64], __: np.random.Generator) -> NDArray[np.float64]:
    return pose * (1, -1) + (0, 1)


def _long_limb(pose: NDArray[np.float64], _: NDArray[np.float64], draws: np.random.Generator) -> NDArray[np.float64]:
    """A whole arm or leg, if one is visible, twice as long."""
    limbs = [limb for limb in _LIMBS if not np.isnan(pose[list(limb), 0]).any()] or _LIMBS
    root, *others = limbs[draws.integers(len(limbs))]
    pose[others] = 2 * pose[others] - pose[root]
    return pose


def _shuffled(pose: NDArray[np.float64], _: NDArray[np.float64], draws: np.random.Generator) -> NDArray[np.float64]:
    seen = np.flatnonzero(~np.isnan(pose[:, 0]))
    pose[seen] = pose[draws.permutation(seen)]
    return pose


def _exchanged(pose: NDArray[np.float64], _: NDArray[np.float64], draws: np.random.Generator) -> NDArray[np.float64]:
    """Two joints in each other's place."""
    pair = draws.choice(np.flatnonzero(~np.isnan(pose[:, 0])), 2, replace=False)
    pose[pair] = pose[pair[::-1]]
    return pose


def _crossed(part: list[int]) -> Spoiled:
    """Left and right in each other's place, in one part of the body."""
    left, right = ([i for i in part if i in _OF_SIDE[side]] for side in ("left", "right"))
    partners = [KEYPOINTS.index(KEYPOINTS[i].replace("left", "right")) for i in left]
    assert sorted(partners) == sorted(right)

    def spoil(pose: NDArray[np.float64], _: NDArray[np.float64], __: np.random.Generator) -> NDArray[np.float64]:
        pose[left + partners] = pose[partners + left]
        return pose

    return spoil


def _without(part: list[int]) -> Spoiled:
    def spoil(pose: NDArray[np.float64], _: NDArray[np.float64], __: np.random.Generator) -> NDArray[np.float64]:
        pose[part] = np.nan
        return pose

    return spoil


def _mixed(pose: NDArray[np.float64], other: NDArray[np.float64], _: np.random.Generator) -> NDArray[np.float64]:
    """The upper body of one person, hips and legs of another one."""
    pose[_LOWER] = other[_LOWER]
    return pose


SPOILED: dict[str, Spoiled] = {
    "upside down": _upside_down,
    "an arm or leg twice as long": _long_limb,
    "keypoints shuffled": _shuffled,
    "two keypoints exchanged": _exchanged,
    "left and right crossed, upper half": _crossed(_UPPER),
    "left and right crossed, lower half": _crossed(_LOWER),
    "left half missing": _without(_OF_SIDE["left"]),
    "right half missing": _without(_OF_SIDE["right"]),
    "upper half missing": _without(_UPPER),
    "lower half missing": _without(_LOWER),
    "upper half of one, lower half of another": _mixed,
}


def extremes(poses: list[Pose]) -> dict[str, NDArray[np.float64]]:
    """(N, 2) least and greatest value of each rule, NaN where it measures nothing."""
    rows = [measured(pose) for pose in poses]
    found = {}
    for rule in RULES:
        values = [[value for _, value in row[rule.name]] or [np.nan] for row in rows]
        found[rule.name] = np.array([(min(each), max(each)) for each in values])
    return found


def spoil(poses: list[Pose], how: Spoiled, seed: int) -> list[Pose]:
    """Valid poses, each spoiled with another one's help; those that this takes out of a pose's limits are left out."""
    draws = np.random.default_rng(seed)
    others = np.roll(draws.permutation(len(poses)), 1)
    spoiled = []
    for pose, other in zip(poses, others, strict=True):
        keypoints = how(pose.keypoints.copy(), poses[other].keypoints, draws)
        near = ((keypoints >= LOWEST) & (keypoints <= HIGHEST)).all(axis=1)
        keypoints[~near] = np.nan
        spoiled.append(Pose(keypoints))
    return spoiled


def tables(data: Path) -> None:
    """Print both tables, as Markdown."""
    sets = {name: list(load(data, name).values()) for name in SETS}
    verdicts = {name: [check_pose(pose) for pose in poses] for name, poses in sets.items()}
    values = extremes(sets["train743"])
    upright = values["torso lean"][:, 1] < 90
    print("| rule | measures | unit | at least | at most | 0.5 % | 99.5 % | " + ", % | ".join(SETS) + ", % |")
    print("|---|---|---|" + "--:|" * (4 + len(SETS)))
    for rule in RULES:
        low, high = (np.nanpercentile(values[rule.name][upright, i], QUANTILES[i]) for i in (0, 1))
        shares = (np.mean([rule.name in verdict.rules for verdict in verdicts[name]]) for name in SETS)
        bounds = (f"{bound:g}" if np.isfinite(bound) else "" for bound in (rule.low, rule.high))
        cells = [rule.what, rule.unit, *bounds, f"{low:.2f}", f"{high:.2f}", *(f"{100 * x:.2f}" for x in shares)]
        print(f"| {rule.kind}: {rule.name} | {' | '.join(cells)} |")
    shares = [f"{100 * np.mean([not verdict for verdict in verdicts[name]]):.2f}" for name in SETS]
    print(f"| any | | | | | | | {' | '.join(shares)} |\n")
    print(f"people found: {', '.join(f'{len(poses)} ({name})' for name, poses in sets.items())}")
    print(f"hips below the neck: {upright.sum()} of train743; the quantiles are theirs\n")
    print("| spoiled | " + " | ".join(f"{name}, % refused" for name in SETS) + " |\n|---|" + "--:|" * len(SETS))
    valid = {name: [p for p, v in zip(sets[name], verdicts[name], strict=True) if v] for name in SETS}
    for seed, (what, how) in enumerate(SPOILED.items()):
        shares = (np.mean([not check_pose(pose) for pose in spoil(valid[name], how, seed)]) for name in SETS)
        print(f"| {what} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")


def sheets(data: Path, out: Path, count: int, seed: int = 0) -> None:
    """Refused and accepted poses of the training people over their crops."""
    poses = load(data, "train743")
    verdicts = {name: check_pose(pose) for name, pose in poses.items()}
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(data / "images" / "cuhk03_p1_det_train743_64x128.zip") as crops:
        files = {re.sub(r"_c\d+_", "_", name): name for name in crops.namelist()}
        for title, wanted in (("refused", False), ("accepted", True)):
            names = [name for name, verdict in verdicts.items() if bool(verdict) is wanted]
            chosen = sorted(np.random.default_rng(seed).choice(names, min(count, len(names)), replace=False))
            cells = []
            for name in chosen:
                with crops.open(files[name]) as file:
                    cells.append(_cell(Image.open(file).convert("RGB"), poses[name], verdicts[name].rules))
            sheet = Image.new("RGB", (8 * 270, -(-len(cells) // 8) * 300), "white")
            for i, cell in enumerate(cells):
                sheet.paste(cell, (i % 8 * 270, i // 8 * 300))
            sheet.save(out / f"{title}.png")
            (out / f"{title}.txt").write_text(
                "".join(f"{i}: {name} {verdicts[name].reasons}\n" for i, name in enumerate(chosen)), encoding="utf-8"
            )


def _cell(crop: Image.Image, pose: Pose, rules: tuple[str, ...]) -> Image.Image:
    crop = crop.resize((128, 256), Image.Resampling.LANCZOS)
    drawn = crop.copy()
    pencil = ImageDraw.Draw(drawn)
    points = (pose.keypoints * (128, 256)).tolist()
    for (start, end), colour in zip(LIMBS, PALETTE, strict=False):
        if pose.visible[[start, end]].all():
            pencil.line([tuple(points[start]), tuple(points[end])], fill=colour, width=3)
    cell = Image.new("RGB", (266, 296), "white")
    cell.paste(crop, (0, 0))
    cell.paste(drawn, (130, 0))
    ImageDraw.Draw(cell).text((2, 258), "\n".join((", ".join(rules[:3]), ", ".join(rules[3:6]))), fill="black")
    return cell


def main() -> None:
    """Print tables, and draw sheets if they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="directory with the files of keypoints")
    parser.add_argument("--sheets", type=Path, metavar="OUT", help="also draw poses over crops (DATA/images), into OUT")
    parser.add_argument("--count", type=int, default=48, help="poses of a sheet (%(default)s)")
    args = parser.parse_args()
    tables(args.data)
    if args.sheets is not None:
        sheets(args.data, args.sheets, args.count)


if __name__ == "__main__":
    main()
