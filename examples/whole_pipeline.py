"""The whole method around your own model: generation and eq. 9, centralization, re-ranking, on drawn people.

python examples/whole_pipeline.py --people 10

The published weights need a GPU: a CPU takes minutes for each of the 8 pictures of an image. This shows how the parts
fit together, not how good the method is: published weights were trained on photographs, and the model here only knows
mean colours.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from pose2id import (
    Centralizer,
    Extractor,
    GeneratedPictures,
    IdentityGenerator,
    evaluate,
    evaluate_rank,
)
from pose2id.demo.people import SyntheticPedestrians
from pose2id.extractor import Preprocess


def model(images: Tensor, cam_label: Tensor) -> Tensor:
    """Stands for your ReID model, one that takes camera labels: mean colours of 8 stripes, (B, 24)."""
    stripes = torch.nn.functional.adaptive_avg_pool2d(images, (8, 1)).flatten(1)
    return stripes + 0.001 * cam_label[:, None]


def main() -> None:
    """Measure the model's own features, with generated images, centralized with neighbours, and re-ranked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="yuanc3/Pose2ID", help="directory or repository (%(default)s)")
    parser.add_argument("--people", type=int, default=10, help="identities (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="fewer are faster and worse (%(default)s)")
    parser.add_argument("--poses", type=int, default=8, help="generated pictures of an image (%(default)s)")
    args = parser.parse_args()

    people = SyntheticPedestrians(args.people)
    cameras = torch.tensor(people.camids)
    q, g = people.query_gallery()
    labels = [people.pids[q], people.pids[g], people.camids[q], people.camids[g]]

    transform = Preprocess(size=(128, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    generator = IdentityGenerator.from_pretrained(args.weights)
    pictures = GeneratedPictures(generator, num_poses=args.poses, num_inference_steps=args.steps)
    centralizer = Centralizer(Extractor(model, transform=transform), pictures, eta=2.0)

    def features(call: object, index: object) -> object:
        """Of the images with these indices, with their camera labels."""
        return call([people[int(i)].image for i in index], cam_label=cameras[index])

    plain = [features(centralizer.extract, index) for index in (q, g)]
    fused = [features(centralizer, index) for index in (q, g)]  # eq. 9
    # And neighbours: the safe default. Centralizer(..., method="nfc") is NFC, as published.
    by_camera = {"query_camids": labels[2], "gallery_camids": labels[3]}
    both = centralizer.enhance(*fused, **by_camera)

    for name, (qf, gf) in {"model": plain, "+ generated": fused, "+ generated + neighbours": both}.items():
        print(f"{name:<24} {evaluate(qf, gf, *labels)}")
    print(f"{'+ generated, re-ranked':<24} {evaluate_rank(centralizer.rerank(*fused, **by_camera), *labels)}")
    print(features(centralizer.diagnose, g[:8]))


if __name__ == "__main__":
    main()
