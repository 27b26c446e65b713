"""The whole method with the tiny weights, on drawn people whom they have never seen: docs/results.md has the outcome.

    python benchmarks/tiny.py                                               # the test: 7,680 pictures
    python benchmarks/tiny.py --seeds 0 --guidances 1 2 3 --etas 0.5 1 2    # how settings are chosen
    python benchmarks/tiny.py --seeds 0 --weights DIR --people 10           # other weights of that kind

For each seed, guidance and eta, with two embedders: the rows of the demo's table, mAP by number of generated images,
and the label-free diagnostics. At the end the means over the seeds, as Markdown; the last table has a line for each
combination. Pictures are generated once per seed and guidance, and embedded once per embedder; the etas share features.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pose2id import Centralizer, IdentityGenerator, generation_diagnostics
from pose2id.demo.demo import TINY, colour_stripe_extractor, split
from pose2id.demo.people import SyntheticPedestrians
from pose2id.ipg.pixels import pixels
from pose2id.report import Row, by_number, compare, number_table, records, table

COLUMNS = ("mAP", "rank1", "rank5", "rank10", "mINP")

# Raw features of originals (N, D) and of generated images (N, M, D).
Features = tuple[np.ndarray, np.ndarray]
# Rows of the table, and mAP by number of generated images.
Outcome = tuple[list[Row], dict[str, list[float]]]
# Embedder, guidance, eta.
Key = tuple[str, float, float]


def embedders(generator: IdentityGenerator) -> dict[str, Centralizer]:
    """A hand-made descriptor, and the generator's own identity encoder."""
    encoder = generator.identity_encoder
    return {
        "colour_stripes": colour_stripe_extractor(),
        "tiny identity encoder": Centralizer(
            encoder, transform=lambda picture: pixels(picture, encoder.image_size) * 2 - 1
        ),
    }


def described(extractor: Centralizer, images: Sequence[Any], pictures: Sequence[Sequence[Any]]) -> Features:
    everything = [*images, *(picture for of_image in pictures for picture in of_image)]
    features = torch.as_tensor(extractor.extract(everything, normalize=False)).cpu().numpy()
    own, generated = np.split(features, [len(images)])
    return own, generated.reshape(len(images), -1, own.shape[1])


def outcome(people: SyntheticPedestrians, features: Features, eta: float) -> Outcome:
    own, generated = features
    q, g = people.query_gallery()
    content, pair, centralizer = split(people, own), (generated[q], generated[g]), Centralizer(eta=eta)
    return (
        compare(content, centralizer=centralizer, generated=pair, control=True),
        by_number(content, pair, centralizer=centralizer),
    )


def measured(generator: IdentityGenerator, seed: int, args: argparse.Namespace) -> Iterator[tuple[Key, Outcome]]:
    """The outcome of each combination, printed on the way."""
    people = SyntheticPedestrians(args.people, num_cameras=4, images_per_camera=2, seed=seed)
    images = [sample.image for sample in people]
    for guidance in args.guidances:
        start = time.perf_counter()
        pictures = generator.generate(images, num_inference_steps=args.steps, guidance_scale=guidance, size=None)
        seconds = time.perf_counter() - start
        print(f"\nseed {seed}, {len(images)} images, 8 pictures of each in {seconds:.0f} s", flush=True)
        for name, extractor in embedders(generator).items():
            features = described(extractor, images, pictures)
            for eta in args.etas:
                rows, curves = outcome(people, features, eta)
                print(f"\nseed {seed}, {setting(args.steps, name, guidance, eta)}\n\n{table(rows)}")
                print(f"\nby number of generated images:\n{number_table(curves)}")
                yield (name, guidance, eta), (rows, curves)
            print(
                f"\nseed {seed}, {name}, guidance {guidance:g}: {generation_diagnostics(*features).summary}", flush=True
            )


def setting(steps: int, name: str, guidance: float, eta: float) -> str:
    return f"{name}, {steps} steps, guidance {guidance:g}, eta {eta:g}"


def means(outcomes: Sequence[Outcome]) -> str:
    """Markdown of means over the seeds, with the mAP of each."""
    lines = ["| | mAP | Rank-1 | Rank-5 | Rank-10 | mINP | ID² | mAP of each seed |", "|---" * 8 + "|"]
    for of_seeds in zip(*(records(rows) for rows, _ in outcomes), strict=True):
        cells = [f"{100 * np.mean([row[column] for row in of_seeds]):.2f}" for column in COLUMNS]
        id2 = "-" if of_seeds[0]["id2"] is None else f"{np.mean([row['id2'] for row in of_seeds]):.4f}"
        each = " / ".join(f"{100 * row['mAP']:.2f}" for row in of_seeds)
        lines.append("| " + " | ".join([of_seeds[0]["name"], *cells, id2, each]) + " |")
    curves = [curves for _, curves in outcomes]
    numbers = range(len(curves[0]["IPG"]))
    lines += ["", f"| mAP by number of generated images | {' | '.join(map(str, numbers))} |"]
    lines.append("|---" * (1 + len(numbers)) + "|")
    for name in curves[0]:
        values = np.mean([of_seed[name] for of_seed in curves], axis=0)
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.2f}' for value in values)} |")
    return "\n".join(lines)


def overview(outcomes: dict[Key, list[Outcome]]) -> str:
    """Markdown of the mean mAP of every row, one line for each embedder, guidance and eta."""
    names = [row.name for row in next(iter(outcomes.values()))[0][0]]
    lines = [f"| mAP | guidance | eta | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for (name, guidance, eta), found in outcomes.items():
        values = np.mean([[row.result.mAP for row in rows] for rows, _ in found], axis=0)
        lines.append(f"| {name} | {guidance:g} | {eta:g} | {' | '.join(f'{100 * value:.2f}' for value in values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the drawing (1 2 3)")
    parser.add_argument("--people", type=int, default=40, help="of each seed, by 4 cameras twice (%(default)s)")
    parser.add_argument("--weights", default="tiny", help="directory, or the shipped ones (%(default)s)")
    parser.add_argument("--steps", type=int, default=TINY.num_inference_steps, help="of the sampler (%(default)s)")
    parser.add_argument("--guidances", type=float, nargs="+", default=[TINY.guidance_scale])
    parser.add_argument("--etas", type=float, nargs="+", default=[TINY.eta])
    args = parser.parse_args()

    generator = IdentityGenerator.from_pretrained(args.weights)
    outcomes: dict[Key, list[Outcome]] = {}
    for seed in args.seeds:
        for key, found in measured(generator, seed, args):
            outcomes.setdefault(key, []).append(found)
    seeds = ", ".join(map(str, args.seeds))
    for key, found in outcomes.items():
        print(f"\nMean over seeds {seeds}: {setting(args.steps, *key)}\n\n{means(found)}")
    print(f"\nMean over seeds {seeds}, {args.steps} steps\n\n{overview(outcomes)}")


if __name__ == "__main__":
    main()
