"""Data cleansing and valid poses, as training uses them: which bad crops do they find? Each kind is planted by itself.

    OMP_NUM_THREADS=1 python benchmarks/planted_crops.py [--people 120]          # drawn people, the tiny encoder
    OMP_NUM_THREADS=1 python benchmarks/planted_crops.py --data DATA_DIR         # CUHK03's val100, OSNet

A share of the crops, chosen anew for each seed among those with a pose that can be drawn, is replaced:

    wrong person    the crop of somebody else: their image and pose under this name
    truncated       the box is moved by half of its height or width, so that half of the body is cut off; what comes
                    into the box repeats the edge, and joints outside are not visible
    two people      the middle of the crop beside the middle of somebody else's; the pose keeps the joints that are seen
    upside down     image and pose are turned over
    upside down, upright pose   the image alone is: what a detector returns that knows no such people

Figures are precision and recall in %, over all seeds together: of images farther than the 1 - p quantile at p = 0.005,
as training has it, and at p = the planted share; of poses that are refused; and of everything that is no target in
training: far or near at p = 0.005, or refused. At p = 0.005 recall can be 0.5 % / share at the most. The last row has
the first four kinds together, each with that share.
"""

from __future__ import annotations

import argparse
import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import poses as pose_files
from numpy.typing import NDArray
from PIL import Image

from pose2id import models
from pose2id.demo.people import SyntheticPedestrians
from pose2id.extractor import Extractor
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.pixels import pixels
from pose2id.poses import Pose, check_pose
from pose2id.training import clean
from pose2id.training.cleansing import FAR, NEAR
from pose2id.training.pairs import is_drawable

REAL = "cuhk03_p1_det_val100"
PAPER = 0.005

Picture = NDArray[np.uint8]
Joints = NDArray[np.float64]


@dataclass(frozen=True)
class Crop:
    """A crop under a name: (H, W, 3), and (18, 2) in fractions of it, NaN where not visible."""

    image: Picture
    joints: Joints
    name: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DATA_DIR", help="with the real crops, their poses and the model")
    parser.add_argument("--people", type=int, default=120, help="drawn, by 4 cameras twice each (%(default)s)")
    parser.add_argument("--share", type=float, default=0.02, help="of crops that are replaced (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="(%(default)s)")
    args = parser.parse_args()
    crops, extractor = drawn(args.people) if args.data is None else real(args.data)
    features = extracted(extractor, crops)
    usable = [i for i, crop in enumerate(crops) if can_be_drawn(crop)]
    refused = sum(not is_valid(crops[i]) for i in usable)
    print(f"{len(crops)} crops of {len({crop.name for crop in crops})} people, {len(usable)} with a pose;", end=" ")
    print(f"{100 * refused / len(usable):.1f} % of these are refused with nothing planted")
    print(f"{round(args.share * len(crops))} planted, {args.seeds} seeds; precision / recall in %\n")
    print(f"| planted | far, p = {PAPER:g} | far, p = {args.share:g} | refused poses | no targets | AUC of distances |")
    print("|---|--:|--:|--:|--:|--:|")
    for what, kinds in {**{kind: [kind] for kind in KINDS}, "the first four": list(KINDS)[:4]}.items():
        trials = [trial(crops, features, extractor, kinds, args.share, seed) for seed in range(args.seeds)]
        cells = [np.concatenate([one[i] for one in trials]) for i in range(6)]
        planted, *found = cells[:5]
        shown = " | ".join(figures(planted, mask) for mask in found)
        print(f"| {what} | {shown} | {100 * float(np.mean([auc(one[0], one[5]) for one in trials])):.1f} |", flush=True)


def trial(
    crops: list[Crop], features: NDArray[Any], extractor: Extractor, kinds: list[str], share: float, seed: int
) -> list[NDArray[Any]]:
    """Of crops with a pose before: planted, far, far at p = share, refused, no target; and distances."""
    draws = np.random.default_rng(seed)
    usable = np.array([i for i, crop in enumerate(crops) if can_be_drawn(crop)])
    count = round(share * len(crops))
    chosen = draws.permutation(usable)[: count * len(kinds)].tolist()
    now = list(crops)
    for place, i in enumerate(chosen):
        others = [j for j in usable.tolist() if crops[j].name != crops[i].name]
        now[i] = KINDS[kinds[place // count]](crops[i], crops[others[draws.integers(len(others))]], draws)
    features = features.copy()
    features[chosen] = extracted(extractor, [now[i] for i in chosen])
    names = np.array([crop.name for crop in now])
    by_paper, by_share = clean(features, names), clean(features, names, quantile=share)
    far, near, more = (
        np.array(found.reasons) == end for found, end in ((by_paper, FAR), (by_paper, NEAR), (by_share, FAR))
    )
    refused = np.array([not (can_be_drawn(crop) and is_valid(crop)) for crop in now])
    planted = np.isin(np.arange(len(now)), chosen)
    return [mask[usable] for mask in (planted, far, more, refused, far | near | refused, by_paper.distances)]


def figures(planted: NDArray[np.bool_], found: NDArray[np.bool_]) -> str:
    both = int((planted & found).sum())
    precision = f"{100 * both / found.sum():.1f}" if found.any() else "-"
    return f"{precision} / {100 * both / planted.sum():.1f}"


def auc(planted: NDArray[np.bool_], distances: NDArray[np.float64]) -> float:
    ranks = np.argsort(np.argsort(distances, kind="stable"))
    count = int(planted.sum())
    return float((ranks[planted].sum() - count * (count - 1) / 2) / (count * (len(planted) - count)))


def can_be_drawn(crop: Crop) -> bool:
    return not np.isnan(crop.joints).all() and is_drawable(Pose(crop.joints))


def is_valid(crop: Crop) -> bool:
    return bool(check_pose(Pose(crop.joints), size=crop.image.shape[:2]))


def _within(joints: Joints) -> Joints:
    """Joints outside the picture, or the part of it that shows the person, are not visible."""
    outside = ~((joints >= 0) & (joints <= 1)).all(axis=1)
    return np.where(outside[:, None], np.nan, joints)


def wrong_person(crop: Crop, other: Crop, draws: np.random.Generator) -> Crop:
    return Crop(other.image, other.joints, crop.name)


def truncated(crop: Crop, other: Crop, draws: np.random.Generator) -> Crop:
    height, width = crop.image.shape[:2]
    down, right = [(height // 2, 0), (-(height // 2), 0), (0, width // 2), (0, -(width // 2))][draws.integers(4)]
    rows, columns = np.clip(np.arange(height) - down, 0, height - 1), np.clip(np.arange(width) - right, 0, width - 1)
    joints = _within(crop.joints + np.array([right / width, down / height]))
    return Crop(crop.image[rows[:, None], columns], joints, crop.name)


def two_people(crop: Crop, other: Crop, draws: np.random.Generator) -> Crop:
    """Half of the width for each; on which side this person is, is drawn."""
    height, width = crop.image.shape[:2]
    quarter, middle = width // 4, slice(width // 4, width // 4 + width // 2)
    beside = np.asarray(Image.fromarray(other.image).resize((width, height)))
    left = draws.random() < 0.5
    halves = [crop.image[:, middle], beside[:, middle]]
    shift = -quarter / width if left else quarter / width
    joints = crop.joints + np.array([shift, 0.0])
    hidden = ~((joints[:, 0] <= 0.5) if left else (joints[:, 0] >= 0.5))
    joints[hidden] = np.nan
    return Crop(np.concatenate(halves if left else halves[::-1], axis=1), _within(joints), crop.name)


def upside_down(crop: Crop, other: Crop, draws: np.random.Generator) -> Crop:
    return Crop(crop.image[::-1].copy(), crop.joints * (1, -1) + (0, 1), crop.name)


def upside_down_upright_pose(crop: Crop, other: Crop, draws: np.random.Generator) -> Crop:
    return Crop(crop.image[::-1].copy(), crop.joints, crop.name)


KINDS: dict[str, Callable[[Crop, Crop, np.random.Generator], Crop]] = {
    "wrong person": wrong_person,
    "truncated": truncated,
    "two people": two_people,
    "upside down": upside_down,
    "upside down, upright pose": upside_down_upright_pose,
}


def extracted(extractor: Extractor, crops: list[Crop]) -> NDArray[Any]:
    return np.asarray(extractor([crop.image for crop in crops], normalize=False, progress=False))


def drawn(people: int) -> tuple[list[Crop], Extractor]:
    """Drawn people whom the tiny weights have not seen, and their identity encoder, as training uses it."""
    crops = [
        Crop(sample.image, np.where(sample.visible[:, None], sample.keypoints, np.nan).astype(float), sample.pid)
        for sample in SyntheticPedestrians(people, num_cameras=4, images_per_camera=2, seed=7)
    ]
    encoder = IdentityGenerator.from_pretrained("tiny", device="cpu").identity_encoder
    return crops, Extractor(encoder, transform=lambda picture: pixels(picture, encoder.image_size) * 2 - 1)


def real(data: Path) -> tuple[list[Crop], Extractor]:
    """CUHK03's val100 in the order of its labels, with MediaPipe's poses, and OSNet of MSMT17."""
    with np.load(data / f"{REAL}.npz") as file:
        pids, camids, names = file["pids"].tolist(), file["camids"].tolist(), file["names"].tolist()
    found = pose_files.load(data, "val100")
    crops = []
    with zipfile.ZipFile(data / "images" / f"{REAL}_64x128.zip") as images:
        for pid, camid, name in zip(pids, camids, names, strict=True):
            number = re.fullmatch(r".*_([0-9]+)\.jpg", name).group(1)
            content = images.read(f"{pid:04d}_c{camid + 1}_{number}.jpg")
            picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            pose = found.get(Path(name).name)
            crops.append(Crop(picture, np.full((18, 2), np.nan) if pose is None else pose.keypoints.astype(float), pid))
    model = models.load(f"onnx:{data / 'models' / 'osnet_x0_25_msmt17.onnx'}", transform="torchreid")
    return crops, model.extractor


if __name__ == "__main__":
    main()
