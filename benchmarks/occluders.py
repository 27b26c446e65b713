"""Do occluders on references help training? Two short runs on drawn people, with and without: docs/results.md.

    python benchmarks/occluders.py                             # 300 steps each, and 3,840 pictures
    python benchmarks/occluders.py --steps 60 --people 5       # a look

Both runs start from the tiny weights (which have seen occluders: something stands before a quarter of the drawn people)
and see the same samples but for a covered part of the body (`occlude`). Then pictures are generated from images of
other people, by other cameras, on each of which something stands before the person. Printed for the tiny weights and
both runs: mAP and Rank-1 with IPG by colour stripes, and retention by the identity encoder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tiny import described, embedders

from pose2id import Centralizer, IdentityGenerator, generation_diagnostics
from pose2id.demo.demo import TINY, split
from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.poses import standard
from pose2id.report import compare, records
from pose2id.training import read_table, train
from pose2id.training.start import start


def measured(name: str, generator: IdentityGenerator, people: SyntheticPedestrians, poses: int) -> None:
    """Print a line for each embedder."""
    images = [sample.image for sample in people]
    q, g = people.query_gallery()
    settings = {"num_inference_steps": TINY.num_inference_steps, "guidance_scale": TINY.guidance_scale}
    pictures = generator.generate(images, standard()[:poses], size=None, **settings)
    for embedder, extractor in embedders(generator).items():
        own, generated = described(extractor, images, pictures)
        pair = generated[q], generated[g]
        rows = records(compare(split(people, own), centralizer=Centralizer(eta=TINY.eta), generated=pair))
        found = {row["name"]: f"{100 * row['mAP']:.2f} / {100 * row['rank1']:.2f}" for row in rows}
        retention = generation_diagnostics(own, generated).retention
        print(f"| {name} | {embedder} | {found['baseline']} | {found['IPG']} | {retention:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each run (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--train-people", type=int, default=40, help="by 4 cameras twice (%(default)s)")
    parser.add_argument("--people", type=int, default=20, help="generated, by 4 cameras twice (%(default)s)")
    parser.add_argument("--poses", type=int, default=8, help="of each image (%(default)s)")
    parser.add_argument("--share", type=float, default=0.5, help="of references with an occluder (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the training people and samples (%(default)s)")
    args = parser.parse_args()

    people = SyntheticPedestrians(args.people, images_per_camera=2, seed=1, occlusion=1.0)
    drawn = SyntheticPedestrians(args.train_people, images_per_camera=2, seed=args.seed)
    print("| weights | embedder | mAP / Rank-1 without pictures | with IPG | retention |\n|---|---|--:|--:|--:|")
    measured("tiny", IdentityGenerator.from_pretrained("tiny"), people, args.poses)
    with tempfile.TemporaryDirectory() as folder:
        images = read_table(write_people(drawn, Path(folder) / "people", progress=False))
        for share in (0.0, args.share):
            result = train(
                start("tiny"),
                images,
                Path(folder) / f"run-{share:g}",
                steps=args.steps,
                batch_size=args.batch_size,
                learning_rate=1e-4,
                optimizer="adamw",
                occlude=share,
                seed=args.seed,
                validation_images=0,
                checkpoint_every=args.steps,
                progress=False,
            )
            name = f"{args.steps} steps, occlude {share:g}, loss {result.loss:.4f}"
            measured(name, IdentityGenerator.from_pretrained(result.weights), people, args.poses)


if __name__ == "__main__":
    main()
