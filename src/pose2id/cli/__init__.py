"""The command line, `pose2id`: generate, enhance, evaluate, demo, convert, table, draw-people and train."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from pose2id.cli import train as train_command

_FILES = """Feature files, told apart by their ending:
  .npz  query_feats (Q, D), gallery_feats (G, D); optional q_pids, g_pids, q_camids, g_camids
  .mat  query_f, gallery_f; optional query_label, gallery_label, query_cam, gallery_cam
"""


_GENERATED = """Writes OUT/pose1/NAME.png to OUT/poseM/NAME.png. NAME is the path below a directory, or a file's name.
Run again after an interruption: pictures that are there are kept, the others come out as they would have, but
for the last digits that another batch costs (1 or 2 of 255 in single values).
Private repositories: set HF_TOKEN, or log in with `hf auth login`.
"""
_TABLE = """The table has a line for each image: path (from the table's folder), identity, camera, keypoints.
  --identity name    names are identity, _c and camera: 0002_c1s1_000451_03.jpg; -1 and 0 are left out
  --identity folder  every person has one folder, with images right in it
"""
_DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 after an error that was printed, 130 if interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # not every console can print ID²
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        args.run(args)
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"pose2id: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pose2id: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    from pose2id import __version__  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="pose2id", description="Training-free feature centralization for person re-identification."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    enhance = _feature_command(commands, "enhance", "centralize the features of a file with NFC", _enhance)
    enhance.add_argument("input", metavar="IN", help="feature file")
    enhance.add_argument("output", metavar="OUT", help="feature file to write; everything else in IN is copied")
    enhance.add_argument("--joint", action="store_true", help="neighbours in the union of query and gallery")
    enhance.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")

    evaluate = _feature_command(commands, "evaluate", "mAP, Rank-k, mINP and ID² of a feature file", _evaluate)
    evaluate.add_argument("features", metavar="FEATS", help="feature file with identity labels")
    evaluate.add_argument("--nfc", action="store_true", help="also with NFC")
    evaluate.add_argument("--rerank", action="store_true", help="also with k-reciprocal re-ranking (20, 6, 0.3)")
    evaluate.add_argument("--json", action="store_true", help="print JSON (fractions) instead of a table (percent)")

    demo = _feature_command(commands, "demo", "table and picture for a sample, or for a feature file", _demo)
    demo.add_argument("features", metavar="FEATS", nargs="?", help="feature file (default: drawn pedestrians)")
    demo.add_argument("--people", type=int, help="drawn (default: 20; 60 with --no-generation)")
    demo.add_argument("--no-generation", action="store_true", help="show NFC alone: takes seconds instead of minutes")
    demo.add_argument("--picture", metavar="PATH", default="pose2id-demo.png", help="default: %(default)s")
    demo.add_argument("--no-picture", action="store_true", help="print the table only")
    demo.add_argument("--overwrite", action="store_true", help="replace the picture if it exists")

    _add_generate(commands)

    convert = _command(
        commands,
        "convert",
        "rewrite generation weights as safetensors",
        _convert,
        "Private repositories: set HF_TOKEN, or log in with `hf auth login`. A VAE is pinned as user/name@commit.\n",
    )
    convert.add_argument("source", metavar="SRC", help="directory or Hugging Face repository, in either layout")
    convert.add_argument("target", metavar="DST", help="directory to write: new or empty")
    convert.add_argument("--dtype", choices=_DTYPES, help="of DST (default: as in SRC)")
    _add_download(convert, "SRC")

    _add_table(commands)
    train = _command(
        commands, "train", "train generation weights on a table of images", train_command.run, train_command.EPILOG
    )
    train_command.add_options(train)
    return parser


def _add_generate(commands: Any) -> None:
    generate = _command(commands, "generate", "generate people of images in other poses", _generate, _GENERATED)
    generate.add_argument(
        "images", metavar="IMAGES", nargs="+", help="image files, or directories of them at any depth"
    )
    generate.add_argument("--out", metavar="OUT", required=True, help="directory to write; made if it isn't there")
    generate.add_argument("--poses", metavar="FILE", default="standard", help="JSON of poses (default: the 8 standard)")
    generate.add_argument(
        "--weights", metavar="REPO|DIR", default="yuanc3/Pose2ID", help="directory or repository (%(default)s)"
    )
    generate.add_argument("--steps", type=int, default=20, help="of the sampler (%(default)s)")
    generate.add_argument("--guidance", type=float, default=3.5, help="scale; 1 is none (%(default)s)")
    generate.add_argument("--seed", type=int, default=42, help="(%(default)s)")
    generate.add_argument("--dtype", choices=_DTYPES, help="(default: float16 on CUDA, else float32)")
    generate.add_argument("--device", help="(default: cuda where there is one, else cpu)")
    generate.add_argument("--size", default="256x128", help="HEIGHTxWIDTH of the pictures (%(default)s)")
    generate.add_argument("--batch-size", type=int, help="pictures at a time (default: what fits)")
    generate.add_argument("--grid", action="store_true", help="also contact sheets, in OUT/sheets")
    generate.add_argument("--offload", action="store_true", help="for small GPUs: hold one network at a time there")
    generate.add_argument("--compile", action="store_true", help="slow to begin with, pays for thousands of pictures")
    generate.add_argument("--overwrite", action="store_true", help="replace other pictures in OUT")
    _add_download(generate, "the weights")
    generate.add_argument(
        "--dry-run", action="store_true", help="write nothing: count the pictures, estimate the hours"
    )


def _add_table(commands: Any) -> None:
    table = _command(commands, "table", "list the people of a folder of images, to train with", _table, _TABLE)
    table.add_argument("folder", metavar="FOLDER", help="directory with images at any depth")
    table.add_argument("output", metavar="OUT.csv", help="table to write")
    table.add_argument("--identity", choices=("name", "folder"), default="name", help="who is it? (%(default)s)")
    poses = table.add_mutually_exclusive_group()
    poses.add_argument("--keypoints", metavar="DIR", help="NAME.json for each image NAME: OpenPose, COCO, ControlNet")
    poses.add_argument("--detect", action="store_true", help='find keypoints with rtmlib (extra "pose")')
    table.add_argument("--overwrite", action="store_true", help="replace OUT.csv if it exists")

    draw = _command(commands, "draw-people", "write drawn pedestrians and their table, to try training", _draw_people)
    draw.add_argument("folder", metavar="DIR", help="directory to write: new or empty")
    draw.add_argument("--people", type=int, default=60, help="(%(default)s)")
    draw.add_argument("--cameras", type=int, default=4, help="(%(default)s)")
    draw.add_argument("--images", type=int, default=3, help="of each person from each camera (%(default)s)")
    draw.add_argument("--seed", type=int, default=0, help="chooses people and cameras (%(default)s)")


def _add_download(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--revision", default="main", help=f"branch, tag or commit of {what}, not of the VAE (%(default)s)"
    )
    parser.add_argument("--vae", help="directory or repository of the VAE (default: stabilityai/sd-vae-ft-mse)")
    parser.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept (default: the Hub client's)")
    parser.add_argument("--local-files-only", action="store_true", help="download nothing")


def _download(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(args, name) for name in ("revision", "cache_dir", "local_files_only")}
    return {**options, "vae": args.vae} if args.vae else options


def _command(commands: Any, name: str, help_text: str, run: Any, epilog: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _feature_command(commands: Any, name: str, help_text: str, run: Any) -> argparse.ArgumentParser:
    parser = _command(commands, name, help_text, run, _FILES)
    parser.add_argument("--k1", type=int, default=2, help="NFC: neighbours that a feature proposes (%(default)s)")
    parser.add_argument("--k2", type=int, default=2, help="NFC: neighbours that the other side looks at (%(default)s)")
    return parser


def _enhance(args: argparse.Namespace) -> None:
    from pose2id.centralizer import Centralizer  # noqa: PLC0415 - torch takes seconds to import
    from pose2id.io.feature_files import load_features, new_feature_file, save_features  # noqa: PLC0415

    new_feature_file(args.output, overwrite=args.overwrite)
    features = load_features(args.input)
    centralizer = Centralizer(k1=args.k1, k2=args.k2)
    enhanced = centralizer.enhance(features.query_feats, features.gallery_feats, joint=args.joint)
    save_features(features.with_features(*enhanced), args.output, overwrite=args.overwrite)
    print(f"wrote {args.output}")


def _evaluate(args: argparse.Namespace) -> None:
    from pose2id.centralizer import Centralizer  # noqa: PLC0415
    from pose2id.io.feature_files import load_features  # noqa: PLC0415
    from pose2id.report import compare, records, table  # noqa: PLC0415

    centralizer = Centralizer(k1=args.k1, k2=args.k2)
    content = load_features(args.features)
    rows = compare(content, nfc=args.nfc, rerank=args.rerank, centralizer=centralizer)
    if args.json:
        print(json.dumps(records(rows), indent=2))
        return
    valid = rows[0].result.num_valid_queries
    print(f"{len(content.query_feats)} queries ({valid} with a match), {len(content.gallery_feats)} gallery images\n")
    print(table(rows))


def _generate(args: argparse.Namespace) -> None:
    # Before gigabytes are downloaded.
    from pose2id.io.checks import checked_count, checked_number  # noqa: PLC0415

    settings: dict[str, Any] = {
        "num_inference_steps": checked_count(args.steps, "--steps"),
        "guidance_scale": checked_number(args.guidance, "--guidance", 0, 1000),
        "seed": checked_count(args.seed, "--seed", least=0),
        "size": train_command.size(args.size, "--size"),
    }
    batch_size = "auto" if args.batch_size is None else checked_count(args.batch_size, "--batch-size")
    from pose2id import poses  # noqa: PLC0415
    from pose2id.ipg import batch as files  # noqa: PLC0415

    images = files.collect_images(args.images, args.out)
    chosen = poses.standard() if args.poses == "standard" else poses.read(args.poses)
    generator = _generator(args)
    job: Any = {"poses": chosen, "overwrite": args.overwrite, **settings}
    if args.dry_run:
        count = files.missing_pictures(generator, args.images, args.out, **job)
        print(
            f"{count} pictures to generate, of {len(images)} images in {len(chosen)} poses; {args.out} is not touched"
        )
        if count:
            image = next(iter(images.values()))
            seconds = files.seconds_per_picture(generator, image, chosen, batch_size=batch_size, **settings)
            print(f"about {_duration(count * seconds)} on {generator.device}: {1 / seconds:.3g} pictures/s")
        return
    done = files.generate_files(generator, args.images, args.out, grid=args.grid, batch_size=batch_size, **job)
    print(f"wrote {done.written} pictures to {args.out}" + (f"; {done.kept} were there already" if done.kept else ""))


def _generator(args: argparse.Namespace) -> Any:
    import torch  # noqa: PLC0415

    from pose2id import IdentityGenerator  # noqa: PLC0415

    options = {"dtype": getattr(torch, args.dtype) if args.dtype else None, "compile": args.compile, **_download(args)}
    if not args.offload:
        return IdentityGenerator.from_pretrained(args.weights, device=args.device, **options)
    options["dtype"] = options["dtype"] or torch.float16
    generator = IdentityGenerator.from_pretrained(args.weights, device="cpu", **options)
    generator.enable_model_cpu_offload(args.device or "cuda")
    return generator


def _duration(seconds: float) -> str:
    """In hours, and in minutes too where these are few."""
    hours = f"{seconds / 3600:.2g} hours"
    return hours if seconds > 5 * 3600 else f"{hours} ({seconds / 60:.2g} minutes)"


def _convert(args: argparse.Namespace) -> None:
    import torch  # noqa: PLC0415

    from pose2id.ipg import convert  # noqa: PLC0415

    dtype = getattr(torch, args.dtype) if args.dtype else None
    convert(args.source, args.target, dtype=dtype, **_download(args))
    print(f"wrote {args.target}")


def _table(args: argparse.Namespace) -> None:
    from pose2id.io.whole_files import new_file  # noqa: PLC0415
    from pose2id.poses import detect  # noqa: PLC0415
    from pose2id.training import table  # noqa: PLC0415

    new_file(args.output, overwrite=args.overwrite, suffixes=(".csv",))
    images = table.table_of_folder(args.folder, identity=args.identity, keypoints=args.keypoints)
    if args.detect:
        images = table.with_poses(images, detect([image.path for image in images]))
    table.write_table(images, args.output, overwrite=args.overwrite)
    print(f"wrote {args.output}: {_counted(images)}")
    if not any(image.pose for image in images):
        print("To train on them, some need keypoints: --keypoints DIR or --detect.")


def _draw_people(args: argparse.Namespace) -> None:
    from pose2id.demo.people import SyntheticPedestrians, write_people  # noqa: PLC0415
    from pose2id.io.checks import checked_count  # noqa: PLC0415
    from pose2id.training.table import read_table  # noqa: PLC0415

    people = SyntheticPedestrians(
        checked_count(args.people, "--people"),
        num_cameras=checked_count(args.cameras, "--cameras"),
        images_per_camera=checked_count(args.images, "--images"),
        seed=args.seed,
    )
    path = write_people(people, args.folder)
    print(f"wrote {path}: {_counted(read_table(path))}, drawn by code")


def _counted(images: Sequence[Any]) -> str:
    people = len({image.identity for image in images})
    with_keypoints = sum(image.pose is not None for image in images)
    return f"{len(images)} images of {people} people, {with_keypoints} with keypoints"


def _demo(args: argparse.Namespace) -> None:
    from pose2id.centralizer import Centralizer  # noqa: PLC0415
    from pose2id.demo import demo  # noqa: PLC0415
    from pose2id.io.checks import checked_count  # noqa: PLC0415
    from pose2id.io.feature_files import load_features  # noqa: PLC0415
    from pose2id.io.whole_files import new_file  # noqa: PLC0415

    if not args.no_picture:
        new_file(args.picture, overwrite=args.overwrite, suffixes=(".png", ".svg", ".pdf"))
        from pose2id.plots import require_plots  # noqa: PLC0415

        require_plots()
    people: Any = {} if args.people is None else {"num_identities": checked_count(args.people, "--people")}
    if args.features and people:
        raise ValueError("--people must not be given with FEATS: it says how many people to draw. Leave one out.")
    centralizer = Centralizer(k1=args.k1, k2=args.k2, eta=demo.TINY.eta)
    if args.features:
        shown = demo.Demo(args.features, load_features(args.features))
    elif args.no_generation:
        shown = demo.synthetic_demo(**people)
    else:
        shown = demo.generation_demo(**people)
    print(demo.report(shown, centralizer))
    if not args.no_picture:
        demo.draw(shown, centralizer, args.picture)
        print(f"\npicture: {args.picture}")


if __name__ == "__main__":
    sys.exit(main())
