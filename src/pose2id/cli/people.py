"""`pose2id table`, `clean`, `poses`, `draw-people`: images to train with, their table, poses to generate them in."""

from __future__ import annotations

import argparse
import io
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pose2id.cli.extract import loaded_model
from pose2id.cli.options import add_model, command

logger = logging.getLogger(__name__)
_TABLE = """The table has a line for each image: path (from the table's folder), identity, camera, keypoints.
  --identity name    names are identity, _c and camera: 0002_c1s1_000451_03.jpg
  --identity folder  every person has one folder, with images right in it
Identities -1 (junk) and 0000 (distractors) are left out; a folder 0 is a person's.
"""
_CLEAN = """Dropped are images whose feature is farther from the mean of their person's than 1 - P of all distances are,
or nearer than P of them are. NEWTABLE.csv has the other lines' path, identity, camera and keypoints; what was dropped
is in NEWTABLE.dropped.csv, with distance and reason. Distances have no unit: their root mean square over all images
is sqrt(D) for features of D values, less with pooled, and 1 over each person with ledoit-wolf.
  --covariance spherical    Euclidean distance: it found most wrong labels
  --covariance pooled       one covariance of all people, shrunk (extra "train")
  --covariance ledoit-wolf  each person's own, shrunk (extra "train")
"""
_POSES = """Each person's pose is that of the image, of those with a valid pose, whose feature is nearest to the mean
of all images of the person (eq. 7-8). N of these are chosen so that the others are near one of them, in limbs and in
where the body faces: 0 degrees the camera, 90 the right of the picture. Percentages are of the people nearest to a
pose. Poses are as on a picture twice as high as wide. pose2id generate --poses POSES.json draws people in them.
"""


def add_commands(commands: Any) -> None:
    """The commands with their options."""
    table = command(commands, "table", "list the people of a folder of images, to train with", _table, _TABLE)
    table.add_argument("folder", metavar="FOLDER", help="directory with images at any depth")
    table.add_argument("output", metavar="OUT.csv", help="table to write")
    table.add_argument("--identity", choices=("name", "folder"), default="name", help="who is it? (%(default)s)")
    source = table.add_mutually_exclusive_group()
    source.add_argument("--keypoints", metavar="DIR", help="NAME.json for each image NAME: OpenPose, COCO, ControlNet")
    source.add_argument("--detect", action="store_true", help='find keypoints with rtmlib (extra "pose")')
    table.add_argument(
        "--poses", choices=("all", "valid"), default="all", help="valid: leave keypoints out that make no body (all)"
    )
    table.add_argument("--overwrite", action="store_true", help="replace OUT.csv if it exists")

    cleaned = command(commands, "clean", "leave images out of a table that may show somebody else", _clean, _CLEAN)
    cleaned.add_argument("table", metavar="TABLE", help="table of images, as pose2id table writes it")
    add_model(cleaned)
    cleaned.add_argument("--out", metavar="NEWTABLE.csv", required=True, help="table to write")
    cleaned.add_argument("--quantile", type=float, default=0.005, metavar="P", help="(%(default)s)")
    kinds = ("spherical", "pooled", "ledoit-wolf")
    cleaned.add_argument("--covariance", choices=kinds, default=kinds[0], help="(%(default)s)")
    whose = "of the distances of all people, or of each person's (%(default)s)"
    cleaned.add_argument("--quantiles", choices=("pooled", "identity"), default="pooled", help=whose)
    cleaned.add_argument("--keep-near", action="store_true", help="drop no images for being near")
    cleaned.add_argument("--sheet", metavar="FILE.png", help="the dropped crops, each beside a kept one")
    cleaned.add_argument("--overwrite", action="store_true", help="replace files that exist")

    poses = command(commands, "poses", "choose poses from a table, to generate people in", _poses, _POSES)
    poses.add_argument("table", metavar="TABLE", help="table of images with keypoints, as pose2id table writes it")
    add_model(poses)
    poses.add_argument("-n", dest="count", metavar="N", type=int, default=8, help="poses to choose (%(default)s)")
    poses.add_argument("--out", metavar="POSES.json", required=True, help="file to write")
    poses.add_argument("--mirrored", action="store_true", help="mirror images count too: left and right alike")
    poses.add_argument("--sheet", metavar="FILE.png", help="the chosen poses, each beside the crop that it comes from")
    poses.add_argument("--overwrite", action="store_true", help="replace files that exist")

    draw = command(commands, "draw-people", "write drawn pedestrians and their table, to try training", _draw_people)
    draw.add_argument("folder", metavar="DIR", help="directory to write: new or empty")
    draw.add_argument("--people", type=int, default=60, help="(%(default)s)")
    draw.add_argument("--cameras", type=int, default=4, help="(%(default)s)")
    draw.add_argument("--images", type=int, default=3, help="of each person from each camera (%(default)s)")
    draw.add_argument(
        "--infrared", type=int, nargs="+", default=(), metavar="CAMERA", help="cameras that see no colour"
    )
    draw.add_argument("--seed", type=int, default=0, help="chooses people and cameras (%(default)s)")


def _table(args: argparse.Namespace) -> None:
    from pose2id.io.whole_files import new_file  # noqa: PLC0415
    from pose2id.poses import detect  # noqa: PLC0415
    from pose2id.training import table  # noqa: PLC0415

    new_file(args.output, overwrite=args.overwrite, suffixes=(".csv",))
    if args.poses == "valid" and not (args.detect or args.keypoints):
        raise ValueError("--poses valid must come with keypoints, got none. Add --keypoints DIR or --detect.")
    images = table.table_of_folder(args.folder, identity=args.identity, keypoints=args.keypoints)
    if args.detect:
        images = table.with_poses(images, detect([image.path for image in images]))
    if args.poses == "valid":
        images = table.with_valid_poses(images)
    table.write_table(images, args.output, overwrite=args.overwrite)
    print(f"wrote {args.output}: {_counted(images)}")
    if not any(image.pose for image in images):
        print("To train on them, some need keypoints: --keypoints DIR or --detect.")


def _clean(args: argparse.Namespace) -> None:
    from pose2id.training.cleansed_table import CleansedTable  # noqa: PLC0415
    from pose2id.training.cleansing import check_rule, clean  # noqa: PLC0415
    from pose2id.training.table import read_table  # noqa: PLC0415

    if args.model is None:
        raise ValueError("--model must be given.")
    # Images below the old table's folder are found from the new one's: what moves with one moves with the other.
    table = CleansedTable(args.out, args.sheet, overwrite=args.overwrite, root=Path(args.table).parent)
    images = read_table(args.table)
    options = {name: getattr(args, name) for name in ("quantile", "covariance", "quantiles")}
    check_rule(**options)
    features = _features(args, [image.path for image in images])
    cleansing = clean(features, [image.identity for image in images], lower=not args.keep_near, **options)
    table.write(images, cleansing)
    ends = "the farthest is" if args.keep_near else "the farthest and the nearest are"
    remedy = f"{ends} left out, good or bad (--quantile 0 leaves out none)"
    if args.quantiles == "pooled" and 0 < args.quantile * len(images) < 1:
        logger.warning("%d images are few: %s", len(images), remedy)
    if args.quantiles == "identity":
        counts = Counter(image.identity for image in images).values()
        # Of two images, which are equally far, none is left out.
        if few := sum(count > 2 and 0 < args.quantile * count < 1 for count in counts):
            logger.warning("%d of %d people have few images: of each %s", few, len(counts), remedy)
    whose = "all people together" if args.quantiles == "pooled" else "each person"
    by = f"{args.covariance} distances, p = {args.quantile:g} of {whose}"
    print(f"wrote {args.out}: {cleansing} ({by})")


def _poses(args: argparse.Namespace) -> None:
    from pose2id.io.checks import checked_count  # noqa: PLC0415
    from pose2id.io.whole_files import new_file, write_files  # noqa: PLC0415
    from pose2id.poses import check_pose, choose_poses, nearest_to_mean  # noqa: PLC0415
    from pose2id.poses.files import file_content  # noqa: PLC0415
    from pose2id.poses.sheet import contact_sheet  # noqa: PLC0415
    from pose2id.training.table import read_table  # noqa: PLC0415

    if args.model is None:
        raise ValueError("--model must be given.")
    checked_count(args.count, "count")
    out = new_file(args.out, overwrite=args.overwrite, suffixes=(".json",))
    sheet = None if args.sheet is None else new_file(args.sheet, overwrite=args.overwrite, suffixes=(".png",))
    images = read_table(args.table)
    valid = [image.pose if image.pose is not None and check_pose(image.pose) else None for image in images]
    names = {image.identity for image, pose in zip(images, valid, strict=True) if pose is not None}
    if not names:
        raise ValueError("TABLE must hold valid poses, got none. Find keypoints with pose2id table --detect.")
    most = len(names) * (2 if args.mirrored else 1)
    if args.count > most:
        of = f"the number of people with a valid pose in TABLE{', twice with --mirrored' if args.mirrored else ''}"
        raise ValueError(f"count must be at most {most}, {of}, got {args.count}.")
    features = _features(args, [image.path for image in images])
    nearest = nearest_to_mean(features, [image.identity for image in images], valid).tolist()
    chosen = choose_poses([valid[i] for i in nearest], args.count, mirrored=args.mirrored)
    contents = {}
    if sheet is not None:
        picture = io.BytesIO()
        contact_sheet(chosen, [images[nearest[each.index]].path for each in chosen]).save(picture, "PNG")
        contents[sheet] = picture.getvalue()
    # Last: where the poses are, their sheet is, too.
    contents[out] = file_content([each.pose for each in chosen])
    write_files(contents, replace=args.overwrite)
    listed = "; ".join(f"{each.pose.name} {each.facing:.0f} degrees, {each.share:.0%}" for each in chosen)
    print(f"wrote {args.out}: {len(chosen)} poses, of {len(nearest)} people: {listed}")


def _features(args: argparse.Namespace, paths: Sequence[Path]) -> Any:
    """Of images by the model of the options, in memory."""
    import numpy as np  # noqa: PLC0415

    from pose2id.extraction import extract  # noqa: PLC0415

    model = loaded_model(args)
    with tempfile.TemporaryDirectory() as folder:
        given = extract(model.extractor, paths, Path(folder) / "features.npy", workers=args.workers, amp=args.amp)
        return np.array(given)  # in memory: the file goes


def _draw_people(args: argparse.Namespace) -> None:
    from pose2id.demo.people import SyntheticPedestrians, write_people  # noqa: PLC0415
    from pose2id.io.checks import checked_count  # noqa: PLC0415
    from pose2id.training.table import read_table  # noqa: PLC0415

    people = SyntheticPedestrians(
        checked_count(args.people, "--people"),
        num_cameras=checked_count(args.cameras, "--cameras"),
        images_per_camera=checked_count(args.images, "--images"),
        seed=args.seed,
        infrared_cameras=args.infrared,
    )
    path = write_people(people, args.folder)
    print(f"wrote {path}: {_counted(read_table(path))}, drawn by code")


def _counted(images: Sequence[Any]) -> str:
    people = len({image.identity for image in images})
    with_keypoints = sum(image.pose is not None for image in images)
    return f"{len(images)} images of {people} people, {with_keypoints} with keypoints"
