"""Generation: pictures a second and memory, with the published schedule in the same process. Random weights.

    python benchmarks/generation.py --throughput --compile --baseline    # without --baseline the default on CUDA
    python benchmarks/generation.py --step                               # one step of 2 poses: the default elsewhere
    python benchmarks/generation.py --count-memory                       # counted on shapes, for CUDA, without one
    python benchmarks/generation.py --count-operators                    # likewise: a denoising step's, and its copies
    python benchmarks/generation.py --throughput --baseline --size tiny  # only to see that it runs

Speed: both sides in turn, medians, after their float32 pictures of the same noise were compared. A picture's time is
its share of `IdentityGenerator.generate`, everything included but files; the published schedule's is without reading
and resizing images. Memory includes the weights: on CUDA torch's peak, without what the published schedule holds; on a
CPU the peak of resident memory in a process of its own (Linux). psnr_db: against our float32 pictures.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

# Threads that spin between small operations steal the cores from the next one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from pose2id import IdentityGenerator
from pose2id.ipg import reference, sampler, weights

sys.path.insert(0, str(Path(__file__).parent))
import core
import live_memory
from published_generation import PublishedSchedule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GIB = 2**30
COPIES = ("clone", "_to_copy", "copy_")
GUIDANCE = 3.5
VAE = {
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 0.18215,
}
TINY_UNET = {
    "block_out_channels": [32, 64, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "full": {
        **{name: part.config for name, part in weights.PARTS.items()},
        # That of stabilityai/sd-vae-ft-mse.
        "vae": {**VAE, "layers_per_block": 2, "block_out_channels": [128, 256, 512, 512]},
    },
    "tiny": {
        "identity_encoder": {"image_size": [64, 32], "dim": 32, "depth": 3, "heads": 4},
        "identity_tokens": {"feature_dim": 160, "dim": 32},
        "reference_unet": TINY_UNET,
        "denoising_unet": TINY_UNET,
        "pose_encoder": {"out_channels": 32},
        "vae": {**VAE, "layers_per_block": 1, "norm_num_groups": 8, "block_out_channels": [16, 16, 32, 32]},
    },
}
IMAGE_SIZES = {"full": (512, 256), "tiny": (128, 64)}


def empty_parts(size: str) -> dict[str, Any]:
    """The networks of a generator in shapes only."""
    with torch.device("meta"):
        return {name: part.build(CONFIGS[size][name]) for name, part in weights.PARTS.items()}


def random_parts(size: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Networks whose layers keep the spread of their input: the same in every dtype, up to rounding."""
    parts = empty_parts(size)
    for seed, part in enumerate(parts.values()):
        nn.Module.to(part, dtype=dtype).to_empty(device=device)
        drawn = torch.Generator(device).manual_seed(seed)
        for name, tensor in part.requires_grad_(False).named_parameters():
            values = torch.randn(tensor.shape, generator=drawn, device=device)
            if tensor.ndim > 1:
                values /= math.sqrt(tensor[0].numel())
            else:
                values = name.endswith("weight") + 0.05 * values
            tensor.copy_(values)
    return parts


def sharing(parts: Mapping[str, nn.Module], size: str) -> dict[str, Any]:
    """Other modules with the same weights, in the same memory."""
    others = empty_parts(size)
    for name, other in others.items():
        other.load_state_dict(parts[name].state_dict(), assign=True)
    return others


def generator_of(parts: Mapping[str, Any], size: str) -> IdentityGenerator:
    generator = IdentityGenerator(**parts, scheduler=weights.published_scheduler(), image_size=IMAGE_SIZES[size])
    return generator.to(generator.device)  # which lays out convolutions for the device


class Inputs:
    """Random pictures of persons and poses: nothing that is computed depends on what they show."""

    def __init__(self, images: int, poses: int) -> None:
        rng = np.random.default_rng(0)
        self.images = list(rng.integers(0, 256, (images, 128, 64, 3), dtype=np.uint8))
        self.poses = list(rng.integers(0, 256, (poses, 128, 64, 3), dtype=np.uint8))

    def generate(self, generator: IdentityGenerator, images: int, batch: int, steps: int) -> Tensor:
        """8-bit pictures of the first images, as they leave the generator; whatever their batch, of the same noise."""
        options = {"num_inference_steps": steps, "batch_size": batch, "guidance_scale": GUIDANCE}
        pictures: Tensor = generator.generate(
            self.images[:images], self.poses, **options, output="tensor", size=None, progress=False
        )
        return pictures

    def tensors(self, generator: IdentityGenerator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Identity image, reference, drawn poses and noise for one image, for the doors behind `generate`."""
        drawn = torch.Generator().manual_seed(0)
        poses = len(self.poses)
        identity_image = torch.rand(1, 3, *generator.identity_encoder.image_size, generator=drawn)
        image = torch.rand(1, 3, *generator.image_size, generator=drawn)
        drawings = torch.rand(poses, 3, *generator.image_size, generator=drawn)
        noise = torch.randn(poses, *generator.latent_shape, generator=drawn)
        return tuple(tensor.to(generator.device) for tensor in (identity_image, image, drawings, noise))


def sample(generator: IdentityGenerator, inputs: tuple[Tensor, ...], steps: int) -> Tensor:
    """Ours, of the tensors that the published schedule gets."""
    identity_image, image, drawings, noise = inputs
    return generator.sample(
        identity_image,
        image,
        generator.encode_poses(drawings),
        noise[None],
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
    )[0]


def check_agreement(ours: Callable[[], Tensor], published: Callable[[], Tensor], what: str) -> None:
    """Stop where the two float32 results differ by more than the order of sums and the bank's rounding explain."""
    # TensorFloat-32 keeps 10 bits, and other algorithms for other batches: it would hide what is looked for.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        first, second = ours(), published()
    error = float((first - second).square().mean().sqrt() / second.std())
    print(f"# {what}: ours and published differ by {error:.1e} of their spread", file=sys.stderr)
    if not error < 3e-3:
        raise SystemExit(f"{what}: the outputs differ")


def throughput(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of dtype, mode and batch."""
    counts = {batch: args.images or max(1, batch // args.poses) for batch in args.batch}
    inputs = Inputs(max(counts.values()), args.poses)
    exact, published = in_full_precision(args, inputs)
    for dtype in args.dtype:
        for mode in args.modes:
            held = memory_held(args.device)
            generator = generator_of(random_parts(args.size, args.device, DTYPES[dtype]), args.size)
            if mode == "compiled":
                generator.compile()
            elif mode == "offload":
                generator.enable_model_cpu_offload(args.device)
            for batch, images in counts.items():
                # Else a second shape would be compiled for all shapes, which is slower.
                torch.compiler.reset()
                ours = partial(inputs.generate, generator, images, batch, args.steps)
                row = {"dtype": dtype, "mode": mode, "batch": batch, "pictures": images * args.poses}
                row |= measured(args, ours, published, exact[:images])
                if args.device.type == "cuda":
                    row |= cuda_peak(args.device, held, ours)
                else:
                    row["peak_gib"] = resident_peak(args, dtype, mode, batch, images)
                yield row
            del ours, generator


def in_full_precision(args: argparse.Namespace, inputs: Inputs) -> tuple[Tensor, Callable[[], Tensor] | None]:
    """Our pictures in float32, and the published schedule for one image, if asked for."""
    parts = random_parts(args.size, args.device, torch.float32)
    generator = generator_of(sharing(parts, args.size), args.size)
    exact = inputs.generate(generator, len(inputs.images), min(args.batch), args.steps)
    if not args.baseline:
        return exact, None
    schedule, tensors = PublishedSchedule(parts, weights.published_scheduler()), inputs.tensors(generator)

    def published() -> Tensor:
        return schedule(*tensors, num_inference_steps=args.steps, guidance_scale=GUIDANCE).cpu()

    check_agreement(lambda: sample(generator, tensors, args.steps).cpu(), published, "pictures")
    return exact, published


def measured(
    args: argparse.Namespace, ours: Callable[[], Tensor], published: Callable[[], Tensor] | None, exact: Tensor
) -> dict[str, Any]:
    """Times of both sides in turn, and how near our pictures are to those in full precision."""
    start = time.perf_counter()
    pictures = ours()  # on the CPU: nothing is still being computed
    first = time.perf_counter() - start
    own: list[float] = []
    theirs: list[float] = []
    for _ in range(args.runs):
        own.append(seconds(ours, args.device) / pictures.shape[:2].numel())
        if published is not None:
            theirs.append(seconds(published, args.device) / args.poses)
    row = {
        "first_s": round(first, 1),
        "pictures_per_s": round(1 / statistics.median(own), 3),
        "ms": round(statistics.median(own) * 1e3, 1),
        "psnr_db": round(psnr(pictures, exact), 1),
    }
    if theirs:
        row["published_ms"] = round(statistics.median(theirs) * 1e3, 1)
        row["speedup"] = round(statistics.median(b / a for a, b in zip(own, theirs, strict=True)), 2)
    return row


def psnr(pictures: Tensor, exact: Tensor) -> float:
    """Decibel between pictures in [0, 1]; 99: equal."""
    error = float((pictures - exact).square().mean())
    return min(99.0, -10 * math.log10(error)) if error else 99.0


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_held(device: torch.device) -> tuple[int, int]:
    """Bytes that torch holds on CUDA for tensors, and in all."""
    gc.collect()
    if device.type != "cuda":
        return 0, 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


def cuda_peak(device: torch.device, held: tuple[int, int], call: Callable[[], Any]) -> dict[str, Any]:
    """GiB at the peak of the call: of tensors, and what torch reserved for them."""
    memory_held(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {
        name: round((peak - before) / GIB, 2)
        for name, peak, before in zip(("peak_gib", "reserved_gib"), peaks, held, strict=True)
    }


def resident_peak(args: argparse.Namespace, dtype: str, mode: str, batch: int, images: int) -> float | None:
    """GiB at the peak in a process of its own."""
    if sys.platform != "linux" or mode != "eager":
        return None
    options = {"dtype": dtype, "batch": batch, "images": images}
    options |= {name: getattr(args, name) for name in ("poses", "steps", "size", "device")}
    command = [sys.executable, __file__, "--peak-only", "--throughput"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout), 2)


def peak_only(args: argparse.Namespace) -> float:
    """GiB of resident memory at the peak of generation, above what was there before the weights."""
    before = core.resident("VmRSS")
    generator = generator_of(random_parts(args.size, args.device, DTYPES[args.dtype[0]]), args.size)
    Path("/proc/self/clear_refs").write_text("5")
    Inputs(args.images, args.poses).generate(generator, args.images, args.batch[0], args.steps)
    return (core.resident("VmHWM") - before) * 1e6 / GIB


def step(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One denoising step of one image, and pictures of one step with all that comes before and after it; float32."""
    parts = random_parts(args.size, args.device, torch.float32)
    generator = generator_of(sharing(parts, args.size), args.size)
    schedule = PublishedSchedule(parts, weights.published_scheduler())
    inputs = identity_image, image, drawings, noise = Inputs(1, args.poses).tensors(generator)
    tokens = generator.encode_identity(identity_image)
    bank = reference.write(generator.reference_unet, generator.encode_images(image), tokens, round_to=torch.float16)
    with torch.no_grad():
        condition = reference.project(
            generator.denoising_unet,
            bank,
            tokens,
            poses=args.poses,
            unconditional=generator.unconditional_tokens(),
        )
    features = generator.encode_poses(drawings)
    all_tokens = schedule.prepare(identity_image, image, drawings)

    @torch.no_grad()
    def ours() -> Tensor:
        return sampler.denoise(
            generator.denoising_unet,
            generator.scheduler,
            noise[None],
            features,
            condition,
            num_inference_steps=1,
            guidance_scale=GUIDANCE,
        )[0]

    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "one step": (ours, lambda: schedule.denoise(noise, all_tokens, 1, GUIDANCE)),
        "pictures in one step": (
            lambda: sample(generator, inputs, 1),
            lambda: schedule(*inputs, num_inference_steps=1, guidance_scale=GUIDANCE),
        ),
    }
    for name, (own, theirs) in cases.items():
        check_agreement(own, theirs, name)
        times: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        for _ in range(args.runs):
            for call, taken in zip((own, theirs), times, strict=True):
                worked = time.process_time()
                taken.append((seconds(call, args.device), time.process_time() - worked))
        row: dict[str, Any] = {"case": name, "poses": args.poses}
        # Of a machine that others use too, the processor's time says more than the clock.
        for index, clock in enumerate(("",) if args.device.type == "cuda" else ("", "_cpu")):
            both = [[taken[index] for taken in side] for side in times]
            row[f"ours{clock}_s"], row[f"published{clock}_s"] = (round(statistics.median(side), 2) for side in both)
            row[f"speedup{clock}"] = round(statistics.median(b / a for a, b in zip(*both, strict=True)), 2)
        yield row


def count_memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """GiB in all, and MiB above the weights from one network's turn to the next one's."""
    for dtype in args.dtype:
        generator = generator_of(empty_parts(args.size), args.size).to(dtype=DTYPES[dtype])
        weigh = {name: sum(tensor.nbytes for tensor in part.parameters()) for name, part in generator.parts.items()}
        lay_out_as_on_cuda(generator)
        networks = {**generator.parts, "vae encoder": generator.vae.encoder, "vae decoder": generator.vae.decoder}
        del networks["vae"]
        for batch in args.batch:
            images = args.images or max(1, batch // args.poses)
            peaks = live_memory.peaks(partial(in_shapes, generator, images, args.poses, batch), networks)
            # With offload, only the weights of the network at work are there.
            offload = max(peak + weigh.get(name.split(" ")[0], 0) for name, peak in peaks.items())
            yield {
                "dtype": dtype,
                "batch": batch,
                "images": images,
                "all_gib": round((sum(weigh.values()) + max(peaks.values())) / GIB, 2),
                "offload_gib": round(offload / GIB, 2),
                **{f"{name} MiB": round(peaks[name] / 2**20) for name in networks},
            }


def lay_out_as_on_cuda(generator: IdentityGenerator) -> None:
    for part in generator.parts.values():
        nn.Module.to(part, memory_format=torch.channels_last)


def count_operators(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A denoising step's operators: all, the copies among them by what asks for one, and divisions by 1."""
    for dtype in args.dtype:
        generator = generator_of(empty_parts(args.size), args.size).to(dtype=DTYPES[dtype])
        lay_out_as_on_cuda(generator)
        for guidance in (1.0, GUIDANCE):

            def steps(number: int, generator: IdentityGenerator = generator, guidance: float = guidance) -> Counter:
                options = {"num_inference_steps": number, "guidance_scale": guidance}
                return live_memory.operators(partial(in_shapes, generator, 1, args.poses, args.poses, **options))

            step = steps(2) - steps(1)
            copies = {module: count for (name, module), count in step.items() if name in COPIES}
            yield {
                "dtype": dtype,
                "guidance": guidance,
                "operators": step.total(),
                "copies": sum(copies.values()),
                "for group norms": copies.pop("GroupNorm", 0),
                "after transformers": copies.pop("Transformer2DModel", 0),
                "of dtype": sum(copies.values()),
                "divisions by 1": step["div", "ResnetBlock2D"],
            }


@torch.no_grad()
def in_shapes(
    generator: IdentityGenerator, images: int, poses: int, batch: int, num_inference_steps: int = 1, **options: Any
) -> Tensor:
    """Steps of a generator on the meta device, one by default, and all that comes before and after them."""
    zeros = partial(torch.zeros, device=generator.device, dtype=generator.dtype)
    return generator.sample(
        zeros(images, 3, *generator.identity_encoder.image_size),
        zeros(images, 3, *generator.image_size),
        generator.encode_poses(zeros(poses, 3, *generator.image_size)),
        zeros(images, poses, *generator.latent_shape),
        num_inference_steps=num_inference_steps,
        batch_size=batch,
        **options,
    )


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    for name in ("throughput", "step", "count-memory", "count-operators"):
        what.add_argument(f"--{name}", dest="what", action="store_const", const=name)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bf16 and fp16 on CUDA, else fp32")
    parser.add_argument("--batch", nargs="+", type=int, help="pictures per forward (default: 8 to 64 on CUDA, else 8)")
    parser.add_argument("--compile", action="store_true", help="compiled as well")
    parser.add_argument("--offload", action="store_true", help="with offload as well")
    parser.add_argument("--baseline", action="store_true", help="the published schedule in turn")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, help="reference images of a run (default: as many as make the batch)")
    parser.add_argument("--poses", type=int, help="of each image (default: 8; for --step 2)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", choices=CONFIGS, default="full")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the rows and what they were measured on")
    parser.add_argument("--peak-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cuda = args.device.type == "cuda"
    args.what = args.what or ("throughput" if cuda else "step")
    as_on_cuda = cuda or args.what.startswith("count")
    args.dtype = args.dtype or (["bf16", "fp16"] if cuda else ["bf16"] if as_on_cuda else ["fp32"])
    args.batch = args.batch or ([8, 16, 32, 64] if as_on_cuda else [8])
    args.poses = args.poses or (2 if args.what == "step" else 8)
    args.modes = ["eager"] + ["compiled"] * args.compile + ["offload"] * args.offload
    return args


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    if args.peak_only:
        print(peak_only(args))
        return
    device = (
        torch.cuda.get_device_name(args.device)
        if args.device.type == "cuda"
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    header = {
        "device": device,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "what": args.what,
        "size": args.size,
        "steps": args.steps,
        "poses": args.poses,
        "runs": args.runs,
    }
    print("# " + ", ".join(f"{name} {value}" for name, value in header.items()), file=sys.stderr)
    rows = []
    tables = {
        "throughput": throughput,
        "step": step,
        "count-memory": count_memory,
        "count-operators": count_operators,
    }
    for row in tables[args.what](args):
        if not rows:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        print(f"| {' | '.join('-' if value is None else str(value) for value in row.values())} |", flush=True)
        rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({**header, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
