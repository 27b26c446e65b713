"""`pose2id generate` and `pose2id convert`: generation weights at work, and in other formats."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from pose2id.cli import train
from pose2id.cli.options import DTYPES, add_download, command, download

logger = logging.getLogger(__name__)

_TOKEN = "Private repositories: set HF_TOKEN, or log in with `hf auth login`."
_ABLATION = "measure what is lost: pose-alone, appearance-alone, no-bank, no-tokens (%(default)s)"
_GENERATE = f"""Writes OUT/pose1/NAME.png to OUT/poseM/NAME.png. NAME is the path below a directory, or a file's name.
Run again after an interruption: pictures that are there are kept, the others come out as they would have, up to
the last digits that another batch costs (1 or 2 of 255 in single values).
OUT may be a URL, such as s3://bucket/folder (extra "distributed"): pictures go into WebDataset shards there.
{_TOKEN}
"""


def add_commands(commands: Any) -> None:
    """Both commands with their options."""
    generate = command(commands, "generate", "generate people of images in other poses", _generate, _GENERATE)
    generate.add_argument(
        "images", metavar="IMAGES", nargs="+", help="image files, or directories of them at any depth"
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
    add_download(generate, "the weights")
    generate.add_argument("--dry-run", action="store_true", help="write nothing: count the pictures, estimate the time")

    epilog = f"{_TOKEN} A VAE is pinned as user/name@commit.\n"
    convert = command(commands, "convert", "rewrite generation weights as safetensors", _convert, epilog)
    convert.add_argument("source", metavar="SRC", help="directory or Hugging Face repository, in either layout")
    convert.add_argument("target", metavar="DST", help="directory to write: new or empty")
    convert.add_argument("--dtype", choices=DTYPES, help="of DST (default: as in SRC)")
    add_download(convert, "SRC")


def _generate(args: argparse.Namespace) -> None:
    # Before gigabytes are downloaded.
    from pose2id.io.checks import checked_count  # noqa: PLC0415
    from pose2id.ipg.sampling import Sampling  # noqa: PLC0415

    if args.offload and str(args.device).startswith("cpu"):
        raise ValueError("--offload must not be given with --device cpu: the networks rest there. Leave one out.")
    size = train.size(args.size, "--size")
    sampling = Sampling(args.steps, args.guidance, args.seed, size, args.ablation)
    batch_size = "auto" if args.batch_size is None else checked_count(args.batch_size, "--batch-size")
    from pose2id import poses  # noqa: PLC0415
    from pose2id.ipg import batch as files  # noqa: PLC0415

    images = files.collect_images(args.images, args.out)
    chosen: Any = poses.standard() if args.poses == "standard" else None
    if args.poses == "random":
        chosen = poses.scrambled(seed=args.seed)
    chosen = chosen or poses.read(args.poses)
    for i, pose in enumerate(chosen, 1):
        verdict = poses.check_pose(pose, size=size)
        if not verdict and args.poses != "random":
            named = f"pose{i}" + (f" ({pose.name})" if pose.name else "")
            logger.warning("%s of %s may not be a person's: %s", named, args.poses, "; ".join(verdict.reasons))
    generator = _generator(args)
    job: Any = {"poses": chosen, "overwrite": args.overwrite, "sampling": sampling}
    if args.dry_run:
        count = files.missing_pictures(generator, args.images, args.out, **job)
        print(
            f"{count} pictures to generate, of {len(images)} images in {len(chosen)} poses; {args.out} is not touched"
        )
        if count:
            image = next(iter(images.values()))
            seconds = files.seconds_per_picture(generator, image, chosen, sampling=sampling, batch_size=batch_size)
            print(f"about {_duration(count * seconds)} on {generator.device}: {1 / seconds:.3g} pictures/s")
        return
    done = files.generate_files(generator, args.images, args.out, grid=args.grid, batch_size=batch_size, **job)
    print(f"wrote {done.written} pictures to {args.out}" + (f"; {done.kept} were there already" if done.kept else ""))


def _generator(args: argparse.Namespace) -> Any:
    import torch  # noqa: PLC0415

    from pose2id import IdentityGenerator  # noqa: PLC0415

    options = {"dtype": getattr(torch, args.dtype) if args.dtype else None, "compile": args.compile, **download(args)}
    if not args.offload:
        return IdentityGenerator.from_pretrained(args.weights, device=args.device, **options)
    options["dtype"] = options["dtype"] or torch.float16
    generator = IdentityGenerator.from_pretrained(args.weights, device="cpu", **options)
    generator.enable_model_cpu_offload(args.device or "cuda")
    return generator


def _duration(seconds: float) -> str:
    """In the unit that shows one or two digits."""
    unit, name = next(((u, n) for u, n in ((3600, "hours"), (60, "minutes")) if seconds >= 2 * u), (1, "seconds"))
    return f"{seconds / unit:.2g} {name}"


def _convert(args: argparse.Namespace) -> None:
    import torch  # noqa: PLC0415

    from pose2id.ipg import convert  # noqa: PLC0415

    dtype = getattr(torch, args.dtype) if args.dtype else None
    convert(args.source, args.target, dtype=dtype, **download(args))
    print(f"wrote {args.target}")
