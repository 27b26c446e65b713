"""`pose2id table` and `pose2id draw-people`: images to train with, and their table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from pose2id.cli.options import command

_TABLE = """The table has a line for each image: path (from the table's folder), identity, camera, keypoints.
  --identity name    names are identity, _c and camera: 0002_c1s1_000451_03.jpg
  --identity folder  every person has one folder, with images right in it
Identities -1 (junk) and 0000 (distractors) are left out; a folder 0 is a person's.
"""


def add_commands(commands: Any) -> None:
    """Both commands with their options."""
    table = command(commands, "table", "list the people of a folder of images, to train with", _table, _TABLE)
    table.add_argument("folder", metavar="FOLDER", help="directory with images at any depth")
    table.add_argument("output", metavar="OUT.csv", help="table to write")
    table.add_argument("--identity", choices=("name", "folder"), default="name", help="who is it? (%(default)s)")
    poses = table.add_mutually_exclusive_group()
    poses.add_argument("--keypoints", metavar="DIR", help="NAME.json for each image NAME: OpenPose, COCO, ControlNet")
    poses.add_argument("--detect", action="store_true", help='find keypoints with rtmlib (extra "pose")')
    table.add_argument(
        "--poses", choices=("all", "valid"), default="all", help="valid: leave keypoints out that make no body (all)"
    )
    table.add_argument("--overwrite", action="store_true", help="replace OUT.csv if it exists")

    draw = command(commands, "draw-people", "write drawn pedestrians and their table, to try training", _draw_people)
    draw.add_argument("folder", metavar="DIR", help="directory to write: new or empty")
    draw.add_argument("--people", type=int, default=60, help="(%(default)s)")
    draw.add_argument("--cameras", type=int, default=4, help="(%(default)s)")
    draw.add_argument("--images", type=int, default=3, help="of each person from each camera (%(default)s)")
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
