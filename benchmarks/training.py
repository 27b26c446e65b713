"""Seconds a step, and memory, of training at the published size, on random weights and drawn people.

python benchmarks/training.py                                               # the defaults: 48 GB
python benchmarks/training.py --optimizer adamw8bit --gradient-checkpointing --gradient-accumulation 4   # 24 GB
python benchmarks/training.py --tiny --device cpu                           # the tiny weights, anywhere
python benchmarks/training.py --count-memory                                # in GB, counted without a GPU

Needs the extra "train". Each step is timed with its loading; the first ones, which warm up, are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import live_memory
import torch
from diffusers import AutoencoderKL

from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.ipg import IdentityGenerator, TransReID, weights
from pose2id.training import log as metrics
from pose2id.training import run as training
from pose2id.training import start as starting
from pose2id.training.objective import TrainedParts
from pose2id.training.table import read_table

_VAE = {
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 0.18215,
}
_WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--ema", type=float)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="the tiny weights in place of the published size")
    parser.add_argument("--device", help="cpu, to run there even if there is a GPU")
    parser.add_argument("--count-memory", action="store_true", help="what float32 needs, on tensors without content")
    args = parser.parse_args()
    if args.count_memory:
        print("\n".join(f"{what:<56}{number / 1e9:6.2f} GB" for what, number in counted(args.batch_size).items()))
        return
    settings = {name: value for name, value in vars(args).items() if name not in ("tiny", "device", "count_memory")}
    generator = starting.start("tiny", device="cpu") if args.tiny else _full_size()
    times: list[float] = []

    class Timed(metrics.Metrics):
        """A record that knows when."""

        def add(self, step: int, **values: float) -> None:
            times.append(time.perf_counter())
            super().add(step, **values)

    training.Metrics = Timed  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as scratch:
        table = write_people(SyntheticPedestrians(8, num_cameras=2, images_per_camera=2), Path(scratch) / "people")
        began = time.perf_counter()
        training.train(
            generator,
            read_table(table),
            Path(scratch) / "run",
            device=args.device,
            validation_images=0,
            checkpoint_every=args.steps + 1,
            reference_variants=2,
            **settings,
        )
        took = time.perf_counter() - began
    seconds = statistics.median(later - earlier for earlier, later in pairwise(times[_WARM_UP:]))
    name = torch.cuda.get_device_name() if generator.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}: {json.dumps(settings)}")
    print(
        f"{seconds:.3f} s a step, {args.batch_size / seconds:.2f} samples/s; {took:.0f} s in all, checkpoint included"
    )
    if generator.device.type == "cuda":
        print(f"largest memory of tensors: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB (10^9 bytes)")


def counted(batch_size: int) -> dict[str, int]:
    """Bytes of everything that training at the published size holds, in float32."""
    with torch.device("meta"):
        generator = _full_size()
        trained = TrainedParts(generator.networks).train()
        latents, images = (torch.empty(batch_size, *shape) for shape in (generator.latent_shape, (3, 512, 256)))
        timesteps = torch.empty(batch_size, dtype=torch.int64)
        features = torch.empty(batch_size, generator.identity_encoder.feature_dim)

    def loss() -> torch.Tensor:
        unconditional = torch.zeros(batch_size, dtype=torch.bool)  # a sample without a reference keeps less
        return trained(latents, timesteps, images, latents, features, unconditional).square().mean()

    def of_a_step() -> list[int]:
        """The most that a step's gradients and activations take; and with gradients that stay from part to part."""
        trained.zero_grad()
        return [live_memory.step_peak(loss), learnt + live_memory.step_peak(loss)]

    every = sum(parameter.nbytes for parameter in trained.parameters())
    learnt = sum(parameter.nbytes for parameter in trained.parameters() if parameter.requires_grad)
    frozen = sum(
        parameter.nbytes for part in (generator.vae, generator.identity_encoder) for parameter in part.parameters()
    )
    plain = of_a_step()
    trained.reference_unet.enable_gradient_checkpointing()
    trained.denoising_unet.enable_gradient_checkpointing()
    checkpointed = of_a_step()
    return {
        "weights": every,
        "Adam's two numbers a weight": 2 * learnt,
        "the same of adamw8bit": learnt // 2,
        "VAE and identity encoder": frozen,
        "gradients alone": learnt,
        f"gradients and activations of {batch_size} samples": plain[0],
        "with --gradient-checkpointing": checkpointed[0],
        "where gradients stay (accumulation, several GPUs)": plain[1],
        "where they stay, with --gradient-checkpointing": checkpointed[1],
        "--ema": every,
    }


def _full_size() -> IdentityGenerator:
    return starting.fresh(
        identity_encoder=TransReID(),
        vae=AutoencoderKL(**_VAE),
        unet=weights.SD15_UNET,
        image_size=(512, 256),
    )


if __name__ == "__main__":
    main()
