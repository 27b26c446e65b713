"""The paper's ablations of generation on drawn people, with the tiny weights: docs/results.md has the outcome.

    python benchmarks/ablations.py                       # 10 people of seed 1: 3,840 pictures
    python benchmarks/ablations.py --people 20 --seeds 1 2 3
    python benchmarks/ablations.py --infrared 3 4        # cameras 3 and 4 take infrared pictures

Each row centralizes the same features with pictures that were generated without something (`Sampling.ablation`), or in
poses whose joints have changed places (`poses.scrambled`). Two embedders, as in benchmarks/tiny.py. On data of your own
`pose2id generate --ablation WHICH --out DIR` and `pose2id evaluate ... --generated DIR` give such a row.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from tiny import described, embedders

from pose2id import Centralizer, IdentityGenerator
from pose2id.demo.demo import TINY, split
from pose2id.demo.people import SyntheticPedestrians
from pose2id.ipg.sampling import ABLATIONS
from pose2id.poses import scrambled
from pose2id.report import compare, records

WAYS: dict[str, dict[str, Any]] = {
    "IPG": {},
    **{name: {"ablation": name} for name in ABLATIONS[1:]},
    "random poses": {"poses": scrambled()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the drawing (1)")
    parser.add_argument("--people", type=int, default=10, help="of each seed, by 4 cameras twice (%(default)s)")
    parser.add_argument("--infrared", type=int, nargs="*", default=[], help="cameras of 1 to 4 (none)")
    parser.add_argument("--weights", default="tiny", help="directory, or the shipped ones (%(default)s)")
    parser.add_argument("--steps", type=int, default=TINY.num_inference_steps, help="of the sampler (%(default)s)")
    parser.add_argument("--guidance", type=float, default=TINY.guidance_scale, help="(%(default)s)")
    parser.add_argument("--eta", type=float, default=TINY.eta, help="(%(default)s)")
    args = parser.parse_args()

    generator = IdentityGenerator.from_pretrained(args.weights)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in args.seeds:
        people = SyntheticPedestrians(args.people, images_per_camera=2, seed=seed, infrared_cameras=args.infrared)
        images = [sample.image for sample in people]
        q, g = people.query_gallery()
        for name, options in WAYS.items():
            start = time.perf_counter()
            pictures = generator.generate(
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
