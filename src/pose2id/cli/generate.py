"""`pose2id generate` and `pose2id convert`: generation weights at work, and in other formats."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from pose2id.cli import train
from pose2id.cli.options import DTYPES, add_cluster, add_download, command, download

logger = logging.getLogger(__name__)

_TOKEN = "Private repositories: set HF_TOKEN, or log in with `hf auth login`."
_ABLATION = "measure what is lost: pose-alone, appearance-alone, no-bank, no-tokens (%(default)s)"
_GENERATE = f"""Writes OUT/pose1/NAME.png to OUT/poseM/NAME.png. NAME is the path below a directory, or a file's name;
for a table the path below its folder, or below the one that all its images have in common if some lie elsewhere.
Run again after an interruption: pictures that are there are kept, the others come out as they would have, up to
the last digits that another batch costs (1 or 2 of 255 in single values).
OUT may be a URL, such as s3://bucket/folder (extra "distributed"): pictures go into WebDataset shards there.
With --workers or --ray, images that cannot be read are left out and listed in OUT/broken.csv; the exit status is 1.
`accelerate launch -m pose2id generate ...` uses all GPUs of a machine.
{_TOKEN}
"""

TOLD = ("pose2id.distributed.cluster",)


def add_commands(commands: Any) -> None:
    """Both commands with their options."""
    generate = command(commands, "generate", "generate people of images in other poses", _generate, _GENERATE, TOLD)
    generate.add_argument(
        "images", metavar="IMAGES", nargs="+", help="image files, tables of them (.csv), or directories at any depth"
    )
    generate.add_argument("--out", metavar="OUT", required=True, help="directory, made if it isn't there, or URL")
    kinds = "JSON of poses, or random: the standard ones with their joints exchanged by --seed (default: standard)"
    generate.add_argument("--poses", metavar="FILE|random", default="standard", help=kinds)
    generate.add_argument(
        "--weights", metavar="REPO|DIR", default="yuanc3/Pose2ID", help="directory or repository (%(default)s)"
    )
    generate.add_argument("--steps", type=int, default=20, help="of the sampler (%(default)s)")
    generate.add_argument("--guidance", type=float, default=3.5, help="scale; 1 is none (%(default)s)")
    generate.add_argument("--seed", type=int, default=42, help="(%(default)s)")
    generate.add_argument("--ablation", default="none", help=_ABLATION)
    generate.add_argument("--dtype", choices=DTYPES, help="(default: float16 on CUDA, else float32)")
    generate.add_argument("--device", help="(default: cuda where there is one, else cpu)")
    generate.add_argument("--size", default="256x128", help="HEIGHTxWIDTH of the pictures (%(default)s)")
    generate.add_argument("--batch-size", type=int, help="pictures at a time (default: what fits)")
    generate.add_argument("--grid", action="store_true", help="also contact sheets, in the directory OUT/sheets")
    generate.add_argument("--offload", action="store_true", help="for small GPUs: hold one network at a time there")
    generate.add_argument("--compile", action="store_true", help="slow to begin with, pays for thousands of pictures")
    generate.add_argument(
        "--overwrite", action="store_true", help="replace other pictures in OUT, or in shards add to them"
    )
    add_cluster(generate)
    add_download(generate, "the weights")
    generate.add_argument("--dry-run", action="store_true", help="write nothing: count the pictures, estimate the time")

    epilog = f"{_TOKEN} A VAE is pinned as user/name@commit.\n"
    convert = command(commands, "convert", "rewrite generation weights as safetensors", _convert, epilog)
    convert.add_argument("source", metavar="SRC", help="directory or Hugging Face repository, in either layout")
    convert.add_argument("target", metavar="DST", help="directory to write: new or empty")
    convert.add_argument("--dtype", choices=DTYPES, help="of DST (default: as in SRC)")
    add_download(convert, "SRC")


def _generate(args: argparse.Namespace) -> int:
    # Before gigabytes are downloaded.
    from pose2id.io.checks import checked_count, duration  # noqa: PLC0415
    from pose2id.ipg.sampling import Sampling  # noqa: PLC0415

    by = _checked_together(args)
    size = train.size(args.size, "--size")
    sampling = Sampling(args.steps, args.guidance, args.seed, size, args.ablation)
    batch_size = "auto" if args.batch_size is None else checked_count(args.batch_size, "--batch-size")
    from pose2id import poses  # noqa: PLC0415
    from pose2id.ipg import batch as files  # noqa: PLC0415

    files.check_place(args.out, args.grid)
    images = files.collect_images(args.images, args.out, missing=by == "workers")
    chosen: Any = poses.standard() if args.poses == "standard" else None
    if args.poses == "random":
        chosen = poses.scrambled(seed=args.seed)
    chosen = chosen or poses.read(args.poses)
    for i, pose in enumerate(chosen, 1):
        verdict = poses.check_pose(pose, size=size)
        if not verdict and args.poses != "random":
            named = f"pose{i}" + (f" ({pose.name})" if pose.name else "")
            logger.warning("%s of %s may not be a person's: %s", named, args.poses, "; ".join(verdict.reasons))
    job: Any = {"poses": chosen, "overwrite": args.overwrite, "sampling": sampling}
    if by != "alone":
        run = _on_workers if by == "workers" else _among_several
        return run(args, {**job, "grid": args.grid, "batch_size": batch_size})
    generator = _loader(args)()
    if args.dry_run:
        count = files.missing_pictures(generator, args.images, args.out, **job)
        print(
            f"{count} pictures to generate, of {len(images)} images in {len(chosen)} poses; {args.out} is not touched"
        )
        if count:
            image = next(iter(images.values()))
            seconds = files.seconds_per_picture(generator, image, chosen, sampling=sampling, batch_size=batch_size)
            print(f"about {duration(count * seconds)} on {generator.device}: {1 / seconds:.3g} pictures/s")
        return 0
    done = files.generate_files(generator, args.images, args.out, grid=args.grid, batch_size=batch_size, **job)
    print(_written(args, done.written, done.kept))
    return 0


def _checked_together(args: argparse.Namespace) -> str:
    """Who generates: "workers", "several" processes of a launcher, or this process "alone"."""
    from pose2id.distributed.processes import are_several  # noqa: PLC0415

    if args.offload and str(args.device).startswith("cpu"):
        raise ValueError("--offload must not be given with --device cpu: the networks rest there. Leave one out.")
    option = "--ray" if args.ray is not None else "--workers" if args.workers is not None else None
    if option is None:
        return "several" if are_several() and not args.dry_run else "alone"
    if args.dry_run:
        raise ValueError(f"--dry-run must not be given with {option}: it works in this process. Leave one out.")
    if are_several():
        raise ValueError(
            f"{option} must not be given to each of several processes of a launcher. Leave one of them out."
        )
    return "workers"


def _on_workers(args: argparse.Namespace, job: dict[str, Any]) -> int:
    """Generate on workers of a cluster; 1 if images were left out."""
    from pose2id.distributed.cluster import connected  # noqa: PLC0415
    from pose2id.distributed.generation import BROKEN, generate_on, generation_workers  # noqa: PLC0415

    with connected(args.ray, args.workers) as cluster, generation_workers(cluster, _loader(args)) as workers:
        done = generate_on(workers, args.images, args.out, **job)
        rate = f" ({done.written / done.seconds:.3g} pictures/s of {workers.count} workers)" if done.written else ""
    print(_written(args, done.written, done.kept) + rate)
    if done.broken:
        from pose2id.io.checks import first_few  # noqa: PLC0415

        reasons = first_few(done.broken.values(), separator="\n")
        told = f"images left out: {len(done.broken)}, all in {os.path.join(args.out, BROKEN)}"
        print(f"pose2id: {told}:\n{reasons}", file=sys.stderr)
    return 1 if done.broken else 0


def _among_several(args: argparse.Namespace, job: dict[str, Any]) -> int:
    """Generate the images of this process, of several that accelerate started; the first one says what all did."""
    from pose2id.distributed.processes import several  # noqa: PLC0415
    from pose2id.ipg.batch import generate_files  # noqa: PLC0415

    with several(args.device) as processes:
        args.device, first = str(processes.device), processes.index == 0
        share = (processes.index, processes.count)
        done = generate_files(_loader(args)(), args.images, args.out, share=share, progress=first, **job)
        written, kept = processes.total(done.written, done.kept)
    if first:
        print(_written(args, written, kept))
    return 0


def _written(args: argparse.Namespace, written: int, kept: int) -> str:
    return f"wrote {written} pictures to {args.out}" + (f"; {kept} were there already" if kept else "")


def _loader(args: argparse.Namespace) -> Callable[[], Any]:
    """What loads the generator, here or in a worker."""
    weights = os.path.abspath(args.weights) if os.path.isdir(args.weights) and args.weights != "tiny" else args.weights
    options = {"compile": args.compile, **download(args)}
    return partial(_load, weights, args.device, args.dtype, args.offload, options)


def _load(weights: str, device: str | None, dtype: str | None, offload: bool, options: dict[str, Any]) -> Any:
    import torch  # noqa: PLC0415

    from pose2id import IdentityGenerator  # noqa: PLC0415

    options = {"dtype": getattr(torch, dtype) if dtype else None, **options}
    if not offload:
        return IdentityGenerator.from_pretrained(weights, device=device, **options)
    options["dtype"] = options["dtype"] or torch.float16
    generator = IdentityGenerator.from_pretrained(weights, device="cpu", **options)
    generator.enable_model_cpu_offload(device or "cuda")
    return generator


def _convert(args: argparse.Namespace) -> None:
    import torch  # noqa: PLC0415

    from pose2id.ipg import convert  # noqa: PLC0415

    dtype = getattr(torch, args.dtype) if args.dtype else None
    convert(args.source, args.target, dtype=dtype, **download(args))
    print(f"wrote {args.target}")
