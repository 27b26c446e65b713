"""The paper's ablations of generation on drawn people, with the tiny weights: docs/results.md has the outcome.

    python benchmarks/ablations.py                       # 10 people of seed 1: 3,840 pictures
    python benchmarks/ablations.py --people 20 --seeds 1 2 3
    python benchmarks/ablations.py --infrared 3 4        # cameras 3 and 4 take infrared pictures
    python benchmarks/ablations.py --ifr 6500            # and IFR on and off, each trained in so many steps

Each row centralizes the same features with pictures that were generated without something (`Sampling.ablation`), or in
poses whose joints have changed places (`poses.scrambled`). Two embedders, as in benchmarks/tiny.py. IFR is left out in
training: `--ifr` trains UNets, tokens and pose encoder anew, with and without it, from the same random weights on the
same drawn people, in the sizes of the weights, but tokens are as wide as a fifth of the encoder's feature. 6,500 steps
are those of the tiny weights, an hour each on one core; started again, they go on in `--runs`. On data of your own
`pose2id generate --ablation WHICH --out DIR` and `pose2id evaluate ... --generated DIR` give such a row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tiny import described, embedders

from pose2id import Centralizer, IdentityGenerator
from pose2id.demo.demo import TINY, split
from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.ipg.sampling import ABLATIONS
from pose2id.poses import scrambled
from pose2id.report import compare, records
from pose2id.training import read_table, train
from pose2id.training.start import fresh

WAYS: dict[str, dict[str, Any]] = {
    "IPG": {},
    **{name: {"ablation": name} for name in ABLATIONS[1:]},
    "random poses": {"poses": scrambled()},
}
# As the tiny weights were trained (examples/make_tiny_weights.py).
TRAINING: dict[str, Any] = {
    "batch_size": 16,
    "learning_rate": 5e-4,
    "schedule": "cosine",
    "optimizer": "adamw",
    "snr_gamma": 5.0,
    "ema": 0.998,
    "cache": True,
    "reference_variants": 2,
    "clean": False,
    "poses": "all",
    "validation_images": 0,
}


def trained(generator: IdentityGenerator, ifr: bool, steps: int, people: int, run: Path) -> IdentityGenerator:
    """A generator with the identity encoder and VAE of another one, and all else from random weights."""
    new = fresh(
        identity_encoder=generator.identity_encoder,
        vae=generator.vae,
        unet={**generator.denoising_unet.config, "cross_attention_dim": generator.identity_tokens.feature_dim // 5},
        ifr=ifr,
        pose_channels=generator.pose_encoder.config["channels"],
        image_size=generator.image_size,
        round_bank=generator.round_bank,
    )
    drawn = SyntheticPedestrians(people, num_cameras=12, images_per_camera=1, seed=1000)
    with tempfile.TemporaryDirectory() as folder:
        images = read_table(write_people(drawn, Path(folder) / "people"))
        result = train(new, images, run, steps=steps, warmup_steps=steps // 30, **TRAINING)
    print(f"{run}: loss {result.loss:.4f} after {steps} steps", flush=True)
    return IdentityGenerator.from_pretrained(result.weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the drawing (1)")
    parser.add_argument("--people", type=int, default=10, help="of each seed, by 4 cameras twice (%(default)s)")
    parser.add_argument("--infrared", type=int, nargs="*", default=[], help="cameras of 1 to 4 (none)")
    parser.add_argument("--weights", default="tiny", help="directory, or the shipped ones (%(default)s)")
    parser.add_argument("--steps", type=int, default=TINY.num_inference_steps, help="of the sampler (%(default)s)")
    parser.add_argument("--guidance", type=float, default=TINY.guidance_scale, help="(%(default)s)")
    parser.add_argument("--eta", type=float, default=TINY.eta, help="(%(default)s)")
    parser.add_argument("--ifr", type=int, metavar="STEPS", help="train with and without IFR, and measure both")
    parser.add_argument("--train-people", type=int, default=1000, help="drawn for that (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("out/ablations"), help="where it is trained (%(default)s)")
    args = parser.parse_args()

    generator = IdentityGenerator.from_pretrained(args.weights)
    ways = {name: (generator, options) for name, options in WAYS.items()}
    if args.ifr:
        for ifr in (True, False):
            name = f"IFR {'on' if ifr else 'off'}"
            new = trained(generator, ifr, args.ifr, args.train_people, args.runs / name.replace(" ", "-"))
            ways[f"{name}, {args.ifr} steps"] = (new, {})
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in args.seeds:
        people = SyntheticPedestrians(args.people, images_per_camera=2, seed=seed, infrared_cameras=args.infrared)
        images = [sample.image for sample in people]
        q, g = people.query_gallery()
        for name, (drawing, options) in ways.items():
            start = time.perf_counter()
            pictures = drawing.generate(
                images, num_inference_steps=args.steps, guidance_scale=args.guidance, size=None, **options
            )
            print(f"seed {seed}, {name}: {time.perf_counter() - start:.0f} s", flush=True)
            for embedder, extractor in embedders(generator).items():
                own, generated = described(extractor, images, pictures)
                pair = generated[q], generated[g]
                rows = records(compare(split(people, own), centralizer=Centralizer(eta=args.eta), generated=pair))
                of_row = {row["name"]: row for row in rows}
                found.setdefault((embedder, "without pictures"), [])
                if name == "IPG":
                    found[embedder, "without pictures"].append(of_row["baseline"])
                found.setdefault((embedder, name), []).append(of_row["IPG"])
        print_means(found, f"{args.people} people of each of {len(next(iter(found.values())))} seeds")


def print_means(found: dict[tuple[str, str], list[dict[str, Any]]], title: str) -> None:
    """Markdown, of the seeds so far."""
    print(f"\n{title}, means in %\n")
    print("| embedder | pictures | mAP | Rank-1 | ID² | mAP of each seed |\n|---|---|--:|--:|--:|---|")
    for (embedder, name), rows in sorted(found.items(), key=lambda item: item[0][0]):
        m_ap, rank1, id2 = (np.mean([row[column] for row in rows]) for column in ("mAP", "rank1", "id2"))
        each = " / ".join(f"{100 * row['mAP']:.2f}" for row in rows)
        print(f"| {embedder} | {name} | {100 * m_ap:.2f} | {100 * rank1:.2f} | {id2:.4f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
