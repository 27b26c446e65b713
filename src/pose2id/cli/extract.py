"""`pose2id extract`: the features of a data set or a folder of images in a file."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pose2id.cli.options import add_cluster, add_model, command

if TYPE_CHECKING:
    from pose2id.models import LoadedModel

_EPILOG = """PLACE is a data set's folder or a .csv of images (queries come first, then the gallery), or with
--all-images a folder of images at any depth. OUT.npy holds raw features, one row an image; OUT.npy.json says what they
were made from, OUT.npy.csv which image each row is of: path, identity, camera, split. A run that was killed goes on
where it was.
"""


def add_command(commands: Any) -> None:
    """The command with its options."""
    told = ("pose2id.extraction", "pose2id.distributed.cluster")
    parser = command(commands, "extract", "features of images in a file", _extract, _EPILOG, told)
    parser.add_argument("place", metavar="PLACE", help="data set, .csv, or folder of images")
    add_model(parser)
    parser.add_argument("--out", metavar="OUT.npy", required=True, help="file to write")
    parser.add_argument("--all-images", action="store_true", help="every image below PLACE, whatever it shows")
    parser.add_argument("--overwrite", action="store_true", help="replace features made from something else")
    add_cluster(parser, "--processes")


def loaded_model(args: argparse.Namespace) -> LoadedModel:
    """The model of `add_model`'s options."""
    from pose2id import models  # noqa: PLC0415 - torch takes seconds to import

    return models.load(args.model, **model_options(args))


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `models.load`."""
    return {name: getattr(args, name) for name in ("transform", "batch_size", "device", "flip")}


def _extract(args: argparse.Namespace) -> None:
    from pose2id.io.whole_files import new_file, whole_file  # noqa: PLC0415

    if args.model is None:
        raise ValueError("--model must be given.")
    new_file(args.out, overwrite=True, suffixes=(".npy",))
    listed = new_file(f"{args.out}.csv", overwrite=True)
    images = list(_images(args))
    features = _features(args, [path for path, *_ in images])
    with (
        whole_file(listed) as unfinished,
        unfinished.open("x", newline="", encoding="utf-8", errors="surrogateescape") as file,  # names are any bytes
    ):
        csv.writer(file).writerows([("path", "identity", "camera", "split"), *images])
    print(f"{args.out}: features of {features.shape[0]} images, {features.shape[1]} values each")


def _features(args: argparse.Namespace, paths: list[Any]) -> Any:
    options = {"amp": args.amp, "overwrite": args.overwrite}
    if args.processes is None and args.ray is None:
        from pose2id.extraction import extract  # noqa: PLC0415

        model = loaded_model(args)
        return extract(model.extractor, paths, args.out, key=model.digest, workers=args.workers, **options)
    from pose2id import models  # noqa: PLC0415
    from pose2id.distributed import extraction  # noqa: PLC0415
    from pose2id.distributed.cluster import connected  # noqa: PLC0415
    from pose2id.io.checks import checked_count  # noqa: PLC0415

    processes = None if args.processes is None else checked_count(args.processes, "--processes")
    models.check_name(args.model, args.transform)  # Ray takes seconds to start
    load = partial(_loaded_in, os.getcwd(), args.model, model_options(args))
    with connected(args.ray, processes) as cluster:
        return extraction.extract(cluster, load, paths, args.out, readers=args.workers, **options)


def _loaded_in(folder: str, spec: str, options: dict[str, Any]) -> LoadedModel:
    """A worker's model: names of modules and files are meant as in the folder of the command."""
    from pose2id import models  # noqa: PLC0415

    with suppress(OSError):  # it need not be on every machine
        os.chdir(folder)
    return models.load(spec, **options)


def _images(args: argparse.Namespace) -> Iterator[tuple[str, Any, Any, str]]:
    """Path, identity, camera and split of each image."""
    if args.all_images:
        from pose2id.io.images import image_files  # noqa: PLC0415

        if not Path(args.place).is_dir():
            raise ValueError(f"PLACE must be a folder with --all-images, got {args.place}.")
        yield from ((path, "", "", "") for path in sorted(path for _, path in image_files(Path(args.place))))
        return
    from pose2id.datasets import open_dataset  # noqa: PLC0415

    try:
        found = open_dataset(args.place)
    except ValueError as error:
        if not Path(args.place).is_dir():
            raise
        raise ValueError(f"{error} Or pass --all-images, for features of every image below {args.place}.") from error
    splits = (
        {"query": found.query} if found.gallery is found.query else {"query": found.query, "gallery": found.gallery}
    )
    for name, split in splits.items():
        cameras = [""] * len(split) if split.camids is None else split.camids.tolist()
        yield from zip(split.paths, split.pids.tolist(), cameras, [name] * len(split), strict=True)
