"""What `pose2id evaluate` measures: the features, labels and pictures of a place."""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pose2id.datasets import Dataset, Split
    from pose2id.io.feature_files import FeatureFile
    from pose2id.report import Pair
    from pose2id.retrieval.protocols import EvaluationProtocol

logger = logging.getLogger(__name__)
SETS = ("name", "boxes", "size", "direction")  # options of the readers
_TRIALS = ("mode", "shots", "sampler")
_OF_ONE_SET = ("leave-one-out", "vehicleid")
_OF_IMAGES = ("model", "features", "generated", "weights", *SETS)
_OF_FILES = ("array", "gallery", "labels")


@dataclass
class Material:
    """What is measured, and what is said of it.

    Attributes:
        features: with labels.
        protocol: by which.
        name: of the data set, as the paper's figures know it; "" for a feature file.
        facts: lines that say what it is.
        paths: image files of queries and gallery.
        pictures: the generated ones of each of them.
        generated: their features.
    """

    features: FeatureFile
    protocol: EvaluationProtocol
    name: str
    facts: list[str]
    paths: tuple[Sequence[str], Sequence[str]] | None = None
    pictures: tuple[list[list[Path]], list[list[Path]]] | None = None
    generated: Pair | None = None


def material(args: argparse.Namespace) -> Material:
    """Of a folder, a .csv or a feature file; images go through the model, unless their features are given or kept."""
    place = Path(args.place)
    of_images = place.is_dir() or place.suffix.lower() in (".csv", ".tsv")
    for option in _OF_FILES if of_images else _OF_IMAGES:
        if getattr(args, option) is not None:
            wanted, given = ("a feature file", "images") if of_images else ("a folder or .csv", "features")
            raise ValueError(f"--{option} must be given with {wanted}, and {place} holds {given}.")
    return _of_images(args, place) if of_images else _of_file(args, place)


def _of_file(args: argparse.Namespace, place: Path) -> Material:
    from pose2id.io.feature_files import load_features  # noqa: PLC0415 - torch takes seconds to import
    from pose2id.retrieval import protocols  # noqa: PLC0415

    features = load_features(place, args.gallery, labels=args.labels, name=args.array)
    if args.published is not None:
        raise ValueError(f"--published must be given with a data set, and {place} does not say which it is of.")
    wanted = args.protocol or "market1501"
    options = {"seed": args.seed} if wanted == "vehicleid" else {}
    protocol = protocols.by_name(wanted, **_given(args, _TRIALS), **options)
    return Material(features, protocol, "", [])


def _of_images(args: argparse.Namespace, place: Path) -> Material:
    from pose2id.datasets import open_dataset  # noqa: PLC0415
    from pose2id.io.feature_files import FeatureFile  # noqa: PLC0415
    from pose2id.report import published  # noqa: PLC0415

    if (args.model is None) == (args.features is None):
        raise ValueError(f"--model or --features must be given for the images of {place}, and not both.")
    found = open_dataset(place, **_given(args, SETS))
    splits = [found.query] if found.gallery is found.query else [found.query, found.gallery]
    # Whatever is wrong is said before hours of extraction.
    protocol, name = _protocol(args, found), _published_name(args, found)
    if args.published is not None:
        published.figures(name, args.published)
        if args.shots not in (None, 1) or args.protocol not in (None, found.protocol):
            raise ValueError("--published must be given with the paper's protocol: the data set's own, one shot.")
    in_tracklets = any(split.tracklets is not None for split in splits)
    if in_tracklets and (args.generated is not None or args.weights is not None):
        raise ValueError(
            f"--generated and --weights must be left out: features of {found.name} are pooled by tracklet."
        )
    labels = [getattr(split, name) for name in ("pids", "camids") for split in _twice(splits)]
    if not in_tracklets:
        protocol.trials(*labels, g_names=splits[-1].paths)
    if args.method in ("cameras", "centring") and splits[-1].camids is None:
        raise ValueError(f"--method must not be {args.method} for {found.name}, which has no cameras.")
    extraction = _Extraction(args, found, splits)
    feats = extraction.features()
    pictures, generated = extraction.generated()
    paths = [split.paths for split in splits]
    if in_tracklets:
        feats, labels, paths = _pooled(feats, splits)
    return Material(
        FeatureFile(*_twice(feats), *labels),
        protocol,
        name,
        [str(found)],
        paths=_twice(paths),
        pictures=None if pictures is None else _twice(pictures),
        generated=None if generated is None else _twice(generated),
    )


def _protocol(args: argparse.Namespace, found: Dataset) -> EvaluationProtocol:
    from pose2id.retrieval import protocols  # noqa: PLC0415

    wanted, options = args.protocol or found.protocol, _given(args, _TRIALS)
    if found.gallery is found.query and wanted in protocols.NAMES and wanted not in _OF_ONE_SET:
        rule = f"must be {' or '.join(_OF_ONE_SET)} for images without a split of query and gallery"
        raise ValueError(f"--protocol {rule}, got {wanted!r}: each image would be its own match.")
    if found.gallery is not found.query and wanted in _OF_ONE_SET:
        raise ValueError(f"--protocol must not be {wanted} for {found.name}, whose queries are not its gallery.")
    if wanted == "vehicleid":
        options["seed"] = args.seed
    if wanted == found.protocol and found.trials is not None:
        options["trials"] = found.trials
    if wanted == "sysu-mm01" and found.permutation is not None and options.get("sampler") != "seeded":
        options |= {"sampler": "official", "permutation": found.permutation}
    return protocols.by_name(wanted, **options)


def _published_name(args: argparse.Namespace, found: Dataset) -> str:
    return f"{found.name}, {args.mode or 'all'}" if found.protocol == "sysu-mm01" else found.name


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _twice(of_splits: Sequence[Any]) -> tuple[Any, Any]:
    """Of queries and gallery, which may be the same."""
    return of_splits[0], of_splits[-1]


def _pooled(feats: Sequence[Any], splits: Sequence[Split]) -> tuple[list[Any], list[Any], list[Any]]:
    """Features, labels and paths of tracklets: the mean, and those of each one's first image."""
    from pose2id.retrieval.protocols import pool  # noqa: PLC0415

    pooled = [
        pool(x, split.tracklets, pids=split.pids, camids=split.camids) for x, split in zip(feats, splits, strict=True)
    ]
    firsts = [first for _, first in pooled]
    labels = [
        None if getattr(split, name) is None else getattr(split, name)[first]
        for name in ("pids", "camids")
        for split, first in zip(_twice(splits), _twice(firsts), strict=True)
    ]
    paths = [[split.paths[i] for i in first] for split, first in zip(splits, firsts, strict=True)]
    return [x for x, _ in pooled], labels, paths


def _some_picture(place: Path | str, names: Iterable[str]) -> tuple[str | None, bool]:
    """A picture that a folder or URL has, and whether it has pictures of images of these names."""
    if isinstance(place, str):
        from pose2id.ipg.shards import Shards  # noqa: PLC0415

        shards = Shards(place)
        return next(iter(shards), None), any(name in shards for name in names)
    first = place / "pose1"
    made = next(first.rglob("*.png"), None) if first.is_dir() else None
    return None if made is None else str(made), any((first / f"{name}.png").is_file() for name in names)


class _Extraction:
    """The images of a data set's splits through the model, or their features from a file."""

    def __init__(self, args: argparse.Namespace, found: Dataset, splits: Sequence[Split]) -> None:
        self.args, self.found, self.splits = args, found, splits
        self.paths = [path for split in splits for path in split.paths]
        self.cache = Path(args.cache or Path.home() / ".cache" / "pose2id")
        self.model: Any = None
        if args.model is not None:
            from pose2id.cli.extract import loaded_model  # noqa: PLC0415

            self.model = loaded_model(args)

    def features(self) -> list[Any]:
        """Raw features (N, D) of each split."""
        if self.model is None:
            import numpy as np  # noqa: PLC0415

            from pose2id.io.array_files import read_array  # noqa: PLC0415

            feats = read_array(Path(self.args.features))
            self._check_order(Path(f"{self.args.features}.csv"))
            if feats.ndim != 2 or len(feats) != len(self.paths):
                wanted = f"({len(self.paths)}, D), one row an image, queries first"
                raise ValueError(f"--features must have shape {wanted}, got {np.shape(feats)}.")
        else:
            feats = self._through_the_model(self.paths)
        return self._by_split(feats)

    def _check_order(self, listed: Path) -> None:
        """Raise where `pose2id extract` noted other images, or another order."""
        if listed.is_file():
            with listed.open(newline="", encoding="utf-8") as file:
                noted = [Path(line["path"]) for line in csv.DictReader(file)]
            if noted != [Path(path) for path in self.paths]:
                raise ValueError(f"--features must be of these images in their order, and {listed} has others.")

    def generated(self) -> tuple[list[Any] | None, list[Any] | None]:
        """Each split's pictures, lists of M paths, and their raw features (N, M, D)."""
        if self.args.generated is None and self.args.weights is None:
            return None, None
        if self.model is None:
            raise ValueError("--model must be given with generated images, which have to go through it.")
        from pose2id.ipg.pictures import PictureFolder  # noqa: PLC0415

        place = self._drawn()
        # From a URL they are copied: extraction, its reuse and the page take files.
        copies = hashlib.sha256(os.fspath(place).encode()).hexdigest()[:12]
        pictures = PictureFolder(place).files(self.paths, self.cache / "pictures" / copies)
        flat = [os.fspath(path) for of_image in pictures for path in of_image]
        feats = self._through_the_model(flat)
        return self._by_split(pictures), self._by_split(feats.reshape(len(pictures), -1, feats.shape[1]))

    def _drawn(self) -> Path | str:
        """The folder or URL of pictures, after those that it lacks were made."""
        from pose2id.io.urls import is_url  # noqa: PLC0415

        args = self.args
        if args.weights is None:
            return args.generated if is_url(args.generated) else Path(args.generated)
        from pose2id import IdentityGenerator  # noqa: PLC0415
        from pose2id.ipg.batch import generate_files  # noqa: PLC0415

        key = hashlib.sha256(f"{args.weights} {self.found.root.resolve()}".encode()).hexdigest()[:12]
        place: Path | str = args.generated or ""
        if not is_url(place):
            place = Path(place or self.cache / "generated" / f"{self.found.name}-{key}")
        if self._all_there(place):
            return place
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
        generator = IdentityGenerator.from_pretrained(args.weights, device=args.device)
        generate_files(generator, self.paths, place, root=self._root())
        return place

    def _root(self) -> Path:
        """The folder below which images are named: as `pose2id generate` names those of the data set or table."""
        from pose2id.ipg.batch import common_folder  # noqa: PLC0415

        train = () if self.found.train is None else self.found.train.paths
        return common_folder(self.found.root, [*self.paths, *train])

    def _all_there(self, place: Path | str) -> bool:
        """Whether a folder or URL has all pictures, under whatever names; not where it would get two names for one."""
        from pose2id.ipg.batch import collect_images  # noqa: PLC0415
        from pose2id.ipg.pictures import PictureFolder  # noqa: PLC0415

        root = self._root()
        made, has_ours = _some_picture(place, collect_images(self.paths, place, root))
        if made is None or has_ours:
            return False  # those that are missing are drawn beside them
        try:
            PictureFolder(place)(self.paths)
        except ValueError as error:
            given = f"{made}, and not all pictures under such names ({error})"
            rule = f"be named by paths below {root}, or all be there"
            raise ValueError(
                f"pictures in --generated {place} must {rule}, got {given}. Complete them with `pose2id generate`, or "
                "choose another folder."
            ) from error
        logger.info("%s has all pictures: none is drawn", place)
        return True

    def _through_the_model(self, paths: Sequence[str]) -> Any:
        from pose2id.extraction import extract  # noqa: PLC0415

        args, model = self.args, self.model
        key = hashlib.sha256(json.dumps([model.name, model.digest, list(paths)]).encode()).hexdigest()[:12]
        out = self.cache / "features" / f"{self.found.name}-{key}.npy"
        out.parent.mkdir(parents=True, exist_ok=True)
        # What nothing is known of is never used again.
        anew = args.overwrite or model.digest is None
        return extract(
            model.extractor, paths, out, key=model.digest, workers=args.workers, amp=args.amp, overwrite=anew
        )

    def _by_split(self, rows: Any) -> list[Any]:
        ends = itertools.accumulate(map(len, self.splits), initial=0)
        return [rows[start:end] for start, end in itertools.pairwise(ends)]
