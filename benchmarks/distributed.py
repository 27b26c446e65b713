"""What Ray costs: `pose2id generate` by one worker, against the plain path in this process, in turns.

    python benchmarks/distributed.py [--images 48] [--steps 10] [--rounds 5]

The tiny weights on the CPU, drawn people, 2 poses, one thread each. The worker is started, and has its weights, before
the clock runs, as the plain path's generator has; everything else counts: reading, checking what is there, tasks of
about --task-seconds, pictures on their way back, files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from pose2id import IdentityGenerator, Sampling, poses
from pose2id.demo import SyntheticPedestrians
from pose2id.distributed import generation
from pose2id.distributed.cluster import connected
from pose2id.distributed.workers import Workers
from pose2id.ipg import generate_files


def load() -> IdentityGenerator:
    torch.set_num_threads(1)
    return IdentityGenerator.from_pretrained("tiny", device="cpu")


def processors_time(worker: object) -> float:
    return time.process_time()


def seconds(work: Callable[[Path], object], folder: Path, workers: Workers | None = None) -> tuple[float, float]:
    """By the clock, and in the processors' time of this process and of the worker."""

    def spent() -> float:
        others = sum(spent for _, spent in workers.results([processors_time])) if workers else 0.0
        return time.process_time() + others

    shutil.rmtree(folder, ignore_errors=True)
    before, start = spent(), time.perf_counter()
    work(folder)
    took = time.perf_counter() - start
    return took, spent() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--task-seconds", type=float, default=1.0)
    args = parser.parse_args()
    generation._TASK_SECONDS = args.task_seconds
    options = {
        "poses": poses.standard()[:2],
        "sampling": Sampling(steps=args.steps, size=(128, 64)),
        "batch_size": 8,
        "progress": False,
    }
    # Ray's workers are polite (nice 15): beside other work on this machine that alone would be measured.
    os.environ.update(OMP_NUM_THREADS="1", RAY_worker_niceness="0")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "people").mkdir()
        drawn = SyntheticPedestrians(args.images, num_cameras=1, images_per_camera=1)[:]
        for i, sample in enumerate(drawn):
            Image.fromarray(sample.image).save(folder / "people" / f"{i}.jpg")
        generator = load()
        with connected(None, 1) as cluster, generation.generation_workers(cluster, partial(load)) as workers:
            plain = partial(generate_files, generator, [folder / "people"], **options)
            by_worker = partial(generation.generate_on, workers, [folder / "people"], **options)
            seconds(plain, folder / "plain")
            seconds(by_worker, folder / "ray", workers)
            for path in (folder / "plain").rglob("*.png"):
                other = folder / "ray" / path.relative_to(folder / "plain")
                assert path.read_bytes() == other.read_bytes(), path
            rounds = range(args.rounds)
            found = [(*seconds(plain, folder / "plain"), *seconds(by_worker, folder / "ray", workers)) for _ in rounds]
    columns = list(zip(*found, strict=True))
    for what, plain_column, worker_column in (("clock", 0, 2), ("processors", 1, 3)):
        medians = [statistics.median(columns[column]) for column in (plain_column, worker_column)]
        ratio = medians[1] / medians[0]
        print(f"{what}: plain {medians[0]:.2f} s, one worker {medians[1]:.2f} s, ratio {ratio:.3f}")
    print("equal files")


if __name__ == "__main__":
    main()
