"""What extraction costs beside a model: over a bare loop, and with workers that read images.

    python benchmarks/extraction.py [FOLDER] [--images 2000] [--rounds 5]

FOLDER has image files (default: drawn people, as JPEG). Two figures, each against a baseline of the same run, in turns:

* overhead: `extract` with an identity model and tensors' means as features, against a plain loop that opens, resizes,
  stacks and averages the same images; in ms an image, the hashing of the files included;
* workers: `extract` with 2 workers against none, with a model that costs about as much as reading an image.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pose2id import Extractor
from pose2id.extraction import extract
from pose2id.extractor import Preprocess

TRANSFORM = Preprocess((256, 128), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BATCH = 64


def drawn(folder: Path, count: int) -> list[Path]:
    """Drawn people of 64 x 128 pixels, as JPEG."""
    from pose2id.demo import SyntheticPedestrians  # noqa: PLC0415

    people = SyntheticPedestrians(12, num_cameras=2, images_per_camera=2)
    images = [Image.fromarray(sample.image) for sample in people[:]]
    paths = []
    for i in range(count):
        paths.append(folder / f"{i}.jpg")
        images[i % len(images)].save(paths[-1], quality=90)
    return paths


def bare_loop(paths: list[Path]) -> np.ndarray:
    """The same features without the library."""
    features = []
    mean, std = (torch.tensor(values)[:, None, None] for values in (TRANSFORM.mean, TRANSFORM.std))
    for start in range(0, len(paths), BATCH):
        batch = []
        for path in paths[start : start + BATCH]:
            with Image.open(path) as picture:
                resized = picture.convert("RGB").resize((128, 256), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 255
            batch.append((pixels - mean) / std)
        with torch.no_grad():
            features.append(torch.stack(batch).mean((2, 3)))
    return torch.cat(features).numpy()


class Means(torch.nn.Module):
    """The mean of each channel: no work beside reading the images."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return batch.mean((2, 3))


class Small(torch.nn.Module):
    """A few convolutions, about as long as reading an image takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.ReLU()
        )

    def forward(self, batch: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.layers(batch).mean((2, 3))


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of image files")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        paths = sorted(args.folder.rglob("*.jpg"))[: args.images] if args.folder else drawn(root, args.images)

        def extracted(model: torch.nn.Module, workers: int) -> np.ndarray:
            extractor = Extractor(model, transform=TRANSFORM, batch_size=BATCH)
            return extract(extractor, paths, root / "f.npy", key=None, workers=workers, progress=False, overwrite=True)

        np.testing.assert_allclose(extracted(Means(), 0), bare_loop(paths), atol=1e-5)
        small = Small().eval()
        bare, own, none, two = [], [], [], []
        for _ in range(args.rounds):
            bare.append(seconds(lambda: bare_loop(paths)))
            own.append(seconds(lambda: extracted(Means(), 0)))
            none.append(seconds(lambda: extracted(small, 0)))
            two.append(seconds(lambda: extracted(small, 2)))
    n = len(paths)
    overheads = [1000 * (a - b) / n for a, b in zip(own, bare, strict=True)]
    ratios = [a / b for a, b in zip(none, two, strict=True)]
    print(f"{n} images, {args.rounds} rounds, {torch.get_num_threads()} threads")
    print(
        f"bare loop {1000 * min(bare) / n:.2f} ms an image; extract adds {statistics.median(overheads):.3f} ms (median)"
    )
    print(
        f"two workers: {statistics.median(ratios):.2f} times as fast as none ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
