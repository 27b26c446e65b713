"""The 8 standard poses, 8 chosen ones and 8 random ones: what they cover, and what features gain by each.

    python benchmarks/standard_poses.py                         # drawn people, tiny weights: some minutes
    python benchmarks/standard_poses.py --seeds 1 2 3           # other people
    python benchmarks/standard_poses.py --data DATA --sheet OUT.png   # real keypoints: coverage alone, and a sheet

Chosen and random poses are of drawn people of seed 0, who are then not drawn in them: chosen are 8 of the poses nearest
to each person's mean (colour stripes), random 8 of all valid ones. DATA has cuhk03_p1_det_train743_poses.npz and
cuhk03_p1_det_843.npz, and for the sheet, which shows real people, images/; look at it, and leave it where it is.
"""

from __future__ import annotations

import argparse
import re
import time
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from poses import load

from pose2id import Centralizer, IdentityGenerator, evaluate, id2_score
from pose2id.demo.demo import TINY, colour_stripe_extractor
from pose2id.demo.people import SyntheticPedestrians
from pose2id.ipg.pixels import pixels
from pose2id.poses import Pose, check_pose, choose_poses, facing, nearest_to_mean, pose_distances, standard
from pose2id.poses.representative import DIRECTIONS, direction
from pose2id.poses.sheet import contact_sheet

COUNT = 8
_DRAWS = 100  # random sets, where nothing is generated


def random_sets(valid: Sequence[Pose], draws: int) -> list[list[Pose]]:
    rng = np.random.default_rng(0)
    return [[valid[i] for i in rng.choice(len(valid), COUNT, replace=False)] for _ in range(draws)]


def coverage(valid: Sequence[Pose], chosen: Sequence[Pose]) -> float:
    """Mean distance of valid poses to the nearest of the chosen."""
    return float(pose_distances(valid, chosen).min(1).mean())


def covered(sets: Mapping[str, Sequence[Pose]], valid: Sequence[Pose]) -> None:
    """Print where the poses of each set face, and how far all valid poses are from them."""
    print(f"| {len(valid)} valid poses | {' | '.join(DIRECTIONS)} | mean distance to the nearest of 8 |")
    print("|---" * 6 + "|")
    for name, poses in {"all valid": valid, **sets}.items():
        counts = Counter(direction(facing(pose)) for pose in poses)
        cells = [
            f"{100 * counts[way] / len(poses):.1f} %" if poses is valid else str(counts[way]) for way in DIRECTIONS
        ]
        print(f"| {name} | {' | '.join(cells)} | {'' if poses is valid else f'{coverage(valid, poses):.3f}'} |")
    some = [pose for poses in random_sets(valid, _DRAWS) for pose in poses]
    drawn = pose_distances(valid, some).reshape(len(valid), _DRAWS, COUNT).min(2).mean(0)
    middle = f"{np.mean(drawn):.3f} ± {np.std(drawn):.3f}, least {drawn.min():.3f}"
    print(f"| random, {_DRAWS} draws | | | | | {middle} |\n", flush=True)


def real(data: Path, sheet: Path | None) -> None:
    """The choice from CUHK03's training people."""
    found = load(data, "train743")
    with np.load(data / "cuhk03_p1_det_843.npz") as file:
        rows = [i for i, name in enumerate(file["names"]) if name.startswith("detected_train/")]
        names = [str(file["names"][i]).split("/")[1] for i in rows]
        features, pids = file["feat_osnet_msmt17"][rows], file["pids"][rows]
    poses = [found.get(name) for name in names]
    nearest = nearest_to_mean(features, pids, poses)
    typical = [poses[i] for i in nearest]
    chosen = choose_poses(typical, COUNT)
    mirrored = choose_poses(typical, COUNT, mirrored=True)
    sets = {
        "standard": standard(),
        "chosen": [each.pose for each in chosen],
        "chosen, mirrored": [each.pose for each in mirrored],
    }
    covered(sets, [pose for pose in poses if pose is not None and check_pose(pose)])
    if sheet is not None:
        shown = [*chosen, *mirrored]
        with zipfile.ZipFile(data / "images" / "cuhk03_p1_det_train743_64x128.zip") as crops:
            files = {re.sub(r"_c\d+_", "_", name): name for name in crops.namelist()}
            pictures = [Image.open(crops.open(files[names[nearest[each.index]]])).convert("RGB") for each in shown]
        contact_sheet(shown, pictures).save(sheet)


def embedders(generator: IdentityGenerator) -> dict[str, Centralizer]:
    """A hand-made descriptor, and the generator's own identity encoder."""
    encoder = generator.identity_encoder
    look = Centralizer(encoder, transform=lambda picture: pixels(picture, encoder.image_size) * 2 - 1, eta=TINY.eta)
    return {"colour stripes": colour_stripe_extractor(eta=TINY.eta), "tiny identity encoder": look}


def features_of(extractor: Centralizer, images: Sequence[Any]) -> NDArray[Any]:
    return torch.as_tensor(extractor.extract(images, normalize=False, progress=False)).cpu().numpy()


def measured(people: SyntheticPedestrians, features: NDArray[Any]) -> tuple[float, float]:
    """ID² of all features, mAP in %."""
    q, g = people.query_gallery()
    labels = people.pids[q], people.pids[g], people.camids[q], people.camids[g]
    return id2_score(features, people.pids), 100 * evaluate(features[q], features[g], *labels).mAP


def drawn_sets(draws: int) -> dict[str, list[Pose]]:
    """The sets of poses, from drawn people of seed 0."""
    people = SyntheticPedestrians(60, seed=0)
    samples = list(people)
    keypoints = [np.where(sample.visible[:, None], sample.keypoints, np.nan) for sample in samples]
    poses = [None if np.isnan(points).all() else Pose(points) for points in keypoints]
    features = features_of(colour_stripe_extractor(), [sample.image for sample in samples])
    nearest = nearest_to_mean(features, people.pids, poses)
    valid = [pose for pose in poses if pose is not None and check_pose(pose)]
    typical = [poses[i] for i in nearest]
    sets = {
        "standard": list(standard()),
        "chosen": [each.pose for each in choose_poses(typical, COUNT)],
        "chosen, mirrored": [each.pose for each in choose_poses(typical, COUNT, mirrored=True)],
    }
    covered(sets, valid)
    del sets["chosen, mirrored"]
    return sets | {f"random {i}": some for i, some in enumerate(random_sets(valid, draws), 1)}


def drawn(args: argparse.Namespace) -> None:
    """Print what each set of poses does to features, for each seed."""
    sets, generator = drawn_sets(args.draws), IdentityGenerator.from_pretrained("tiny")
    options = {"num_inference_steps": args.steps, "guidance_scale": TINY.guidance_scale, "size": None}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in args.seeds:
        people, start = SyntheticPedestrians(args.people, images_per_camera=2, seed=seed), time.perf_counter()
        images = [sample.image for sample in people]
        looks = embedders(generator)
        own = {name: features_of(look, images) for name, look in looks.items()}
        for name, features in own.items():
            found.setdefault((name, "no generated images"), []).append(measured(people, features))
        for title, poses in sets.items():
            made = generator.generate(images, poses, progress=False, **options)
            flat = [picture for pictures in made for picture in pictures]
            for name, look in looks.items():
                generated = features_of(look, flat).reshape(len(images), len(poses), -1)
                found.setdefault((name, title), []).append(measured(people, look.fuse(own[name], generated)))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    print(
        f"\n| {args.people} people, seeds {args.seeds} | poses | ID² | mAP | mAP of each seed |\n|---|---|--:|--:|---|"
    )
    for (name, title), values in found.items():
        id2, mean = np.mean(values, axis=0)
        print(f"| {name} | {title} | {id2:.4f} | {mean:.2f} | {' / '.join(f'{value:.2f}' for _, value in values)} |")
    for name in looks:
        draws = np.array([np.mean(found[name, title], axis=0) for title in sets if title.startswith("random")])
        shown = [f"{draws[:, i].mean():.4g} [{draws[:, i].min():.4g}, {draws[:, i].max():.4g}]" for i in range(2)]
        print(f"| {name} | {len(draws)} random, mean [least, most] | {' | '.join(shown)} | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with CUHK03's keypoints and features")
    parser.add_argument(
        "--sheet", type=Path, help="with --data: the chosen poses beside their crops, mirrored ones below"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of drawn people (1)")
    parser.add_argument("--people", type=int, default=12, help="of each seed, by 4 cameras twice (%(default)s)")
    parser.add_argument("--draws", type=int, default=4, help="of 8 random poses (%(default)s)")
    parser.add_argument("--steps", type=int, default=TINY.num_inference_steps, help="of the sampler (%(default)s)")
    args = parser.parse_args()
    if args.data is None:
        drawn(args)
    else:
        real(args.data, args.sheet)


if __name__ == "__main__":
    main()
