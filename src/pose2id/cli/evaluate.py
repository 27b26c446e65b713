"""`pose2id evaluate`: from a data set or features to the table, the paper's tables, and a page to look at."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pose2id.cli.options import add_method, add_model, command

if TYPE_CHECKING:
    from pose2id.centralization.diagnostics import GenerationDiagnostics
    from pose2id.centralizer import Centralizer
    from pose2id.cli.material import Material
    from pose2id.report import Comparison

_EPILOG = """PLACE is one of
  a data set's folder   Market1501, MSMT17, CUHK03, MARS, Occluded-REID, SYSU-MM01, RegDB, VeRi-776, VehicleID, or
                        root/identity/*.jpg; with --model, or --features
  a .csv of images      columns path, identity, and optionally camera and split; likewise
  a feature file        .npz, .mat, .pt, with labels; or the queries' .npy or .pt, with --gallery and --labels

The rows: the features as they are, the safe default, the paper's NFC, with cameras where they are known, re-ranked, and
with generated images. Features of a data set are kept in --cache, and used again as long as model, images and transform
are the same.
"""
_WITH_CAMERAS = "At most 1: no neighbours are added, and cameras of enough images are centred all the same."
_SHEETS = 8  # of generated images on the page
_BY_NUMBER = re.compile(r"(?:(.+), )?(M|eta|k2) = ([\d.]+)")
_TABLES = "1 to 10: the rows of the paper's table; eta, k (Figures 8, 9); same-pose (Figure 7)"


def add_command(commands: Any) -> None:
    """The command with its options."""
    told = ("pose2id.extraction",)
    parser = command(commands, "evaluate", "measure what the method does for a data set", _evaluate, _EPILOG, told)
    parser.add_argument("place", metavar="PLACE", help="data set, .csv of images, or feature file")
    add_method(parser)
    parser.add_argument("--no-rerank", action="store_true", help="leave the re-ranked rows out")
    parser.add_argument("--table", dest="paper_table", metavar="T", help=_TABLES)
    parser.add_argument("--published", metavar="MODEL", help="set the paper's figures of this model beside ours")

    files = parser.add_argument_group("feature files")
    files.add_argument("--array", metavar="NAME", help="which array of features, where a file has several")
    files.add_argument("--gallery", metavar="FILE", help="PLACE holds the queries' features, and this the gallery's")
    files.add_argument("--labels", metavar="FILE", help="with --gallery: q_pids, g_pids, q_camids, g_camids")

    images = parser.add_argument_group("data sets")
    add_model(images)
    images.add_argument("--features", metavar="FILE", help=".npy of the images' features, queries first, not --model")
    images.add_argument("--cache", metavar="DIR", help="where features are kept (default: ~/.cache/pose2id)")
    images.add_argument("--name", metavar="SET", help="which data set PLACE is, where its layout doesn't tell")
    images.add_argument("--boxes", help="CUHK03: detected (default) or labeled")
    images.add_argument("--size", help="VehicleID: small (default), medium or large")
    images.add_argument("--direction", help="RegDB: visible-to-thermal (default) or thermal-to-visible")

    trials = parser.add_argument_group("protocol")
    trials.add_argument("--protocol", metavar="P", help="another than the data set's own; market1501 for feature files")
    trials.add_argument("--mode", help="SYSU-MM01: all (default) or indoor")
    trials.add_argument("--shots", type=int, help="SYSU-MM01: images of a person and camera in the gallery, 1 or 10")
    trials.add_argument("--sampler", help="SYSU-MM01: official, where PLACE has it, else seeded")

    pictures = parser.add_argument_group("generated images")
    pictures.add_argument("--generated", metavar="DIR|URL", help="what `pose2id generate` made of the images")
    pictures.add_argument("--weights", metavar="REPO|DIR", help="make those that --generated lacks with these weights")
    pictures.add_argument("--eta", type=float, help="their weight in eq. 9 (default: the paper's for the data set)")
    pictures.add_argument("--subsets", type=int, default=5, help="--table 6: sets of M pictures a row (%(default)s)")

    out = parser.add_argument_group("output")
    forms = ("text", "json", "csv", "markdown", "latex")
    out.add_argument("--format", choices=forms, default="text", help="of the table (%(default)s); json has all else")
    out.add_argument("--json", action="store_const", dest="format", const="json", help="--format json")
    out.add_argument("--report", metavar="DIR", help='also write a page to look at, DIR/index.html (extra "report")')
    out.add_argument("--overwrite", action="store_true", help="replace DIR, and features made from something else")
    out.add_argument("--seed", type=int, default=0, help="of what is drawn at random (%(default)s)")


def _evaluate(args: argparse.Namespace) -> None:
    from pose2id.cli.material import material  # noqa: PLC0415
    from pose2id.report import check_study, compare, published, study  # noqa: PLC0415 - torch takes seconds to import
    from pose2id.report.page import check_folder  # noqa: PLC0415

    if args.report:
        check_folder(args.report, overwrite=args.overwrite)
    _centralizer(args, "")  # its errors now, not after hours of extraction
    if args.paper_table:
        check_study(args.paper_table, generated=bool(args.generated or args.weights))
    found = material(args)
    centralizer = _centralizer(args, found.name)
    options: dict[str, Any] = {name: getattr(found, name) for name in ("protocol", "paths", "generated")}
    if args.published:
        options["published"] = published.figures(found.name, args.published)
    if args.paper_table:
        options |= {"subsets": args.subsets, "seed": args.seed}
        comparison = study(args.paper_table, found.features, centralizer=centralizer, **options)
    else:
        comparison = compare(found.features, rerank=not args.no_rerank, centralizer=centralizer, **options)
    pictures = _diagnostics(found)
    _print(args, found, comparison, pictures)
    if args.report:
        print(f"wrote {_write_page(args, found, comparison, centralizer, pictures)}", file=sys.stderr)


def _centralizer(args: argparse.Namespace, data_set: str) -> Centralizer:
    """Of the paper's parameters for the data set, unless others are given."""
    from pose2id.centralizer import Centralizer  # noqa: PLC0415
    from pose2id.report import published  # noqa: PLC0415

    settings = published.settings(data_set)
    eta = settings.eta if args.eta is None else args.eta
    if args.method not in ("auto", "nfc"):
        centralizer = Centralizer(method=args.method, k1=args.k1, k2=args.k2, eta=eta)
        centralizer.k1, centralizer.k2 = settings.k1, settings.k2  # of the rows with NFC
        return centralizer
    k1, k2 = settings.k1 if args.k1 is None else args.k1, settings.k2 if args.k2 is None else args.k2
    return Centralizer(k1=k1, k2=k2, eta=eta)


def _print(
    args: argparse.Namespace, found: Material, comparison: Comparison, pictures: GenerationDiagnostics | None
) -> None:
    from pose2id.report import labels_of, records  # noqa: PLC0415

    told = _evidence(found)
    if args.format == "json":
        figures = {name: vars(of_gallery) for name, of_gallery in told.items()}
        if pictures is not None:
            figures["generated"] = {**vars(pictures), "reading": pictures.reading}
        about = {"about": found.facts, "protocol": found.protocol.name}
        print(json.dumps({**about, "rows": records(comparison), **figures}, indent=2))
    elif args.format != "text":
        print(
            {"csv": comparison.to_csv, "markdown": comparison.to_markdown, "latex": comparison.to_latex}[args.format]()
        )
    else:
        valid = comparison[0].result.num_valid_queries
        names = None if found.paths is None else found.paths[1]
        trial = found.protocol.trials(*labels_of(found.features), g_names=names)[0]
        sizes = f"{len(trial.query)} queries ({valid} with a match), {len(trial.gallery)} gallery images"
        if found.protocol.num_trials > 1:
            sizes += f" in the first of {found.protocol.num_trials} trials"
        print(*found.facts, sizes, "", comparison, sep="\n")
        if told:
            print("", told["evidence"], sep="\n")
        if "evidence_with_cameras" in told:
            of_cameras = told["evidence_with_cameras"]
            small = "" if of_cameras.k == 0 else f" {_WITH_CAMERAS}"
            print(f"With cameras: {of_cameras.numbers}{small}")
        if pictures is not None:
            print("", "One image of each person in the gallery:", pictures, sep="\n")


def _evidence(found: Material) -> dict[str, Any]:
    """Whether people repeat in the gallery, without labels; not where trials show parts of it only."""
    from pose2id.centralization.cameras import centre_cameras  # noqa: PLC0415
    from pose2id.centralization.guard import evidence  # noqa: PLC0415

    features = found.features
    if found.protocol.num_trials > 1:
        return {}
    told = {"evidence": evidence(features.gallery_feats)}
    cameras = features.q_camids, features.g_camids
    if cameras[0] is not None and cameras[1] is not None:
        centred = centre_cameras(features.query_feats, features.gallery_feats, *cameras)[1]
        told["evidence_with_cameras"] = evidence(centred, cameras[1])
    return told


def _diagnostics(found: Material) -> GenerationDiagnostics | None:
    """What generated images keep of a person: of the first gallery image of each, since others are other people's."""
    import numpy as np  # noqa: PLC0415

    from pose2id.centralization.diagnostics import generation_diagnostics  # noqa: PLC0415

    if found.generated is None:
        return None
    first = np.unique(np.asarray(found.features.g_pids), return_index=True)[1]
    if len(first) < 2:
        return None
    return generation_diagnostics(found.features.gallery_feats[first], found.generated[1][first])


def _write_page(
    args: argparse.Namespace,
    found: Material,
    comparison: Comparison,
    centralizer: Centralizer,
    pictures: GenerationDiagnostics | None,
) -> Path:
    """The page of the safe default, with cameras where they are known, beside the features as they are."""
    from pose2id.report import labels_of, pair_of, safely, unpublished  # noqa: PLC0415
    from pose2id.report.page import write_page  # noqa: PLC0415

    features, paths = found.features, found.paths or (None, None)
    labels = labels_of(features)
    trial = found.protocol.trials(*labels, g_names=paths[1])[0]
    before, camids = trial.of(pair_of(features)), trial.of(labels[2:])
    known = camids[0] is not None and camids[1] is not None
    after = safely(before, camids if known else (None, None), centralizer, alone=found.protocol.leave_one_out)
    sheets: list[Any] = []
    if found.paths is not None and found.pictures is not None:
        sheets = list(itertools.islice(zip(found.paths[0], found.pictures[0], strict=True), _SHEETS))
    return write_page(
        args.report,
        comparison,
        before=before,
        after=after,
        labels=labels,
        names=("as they are", unpublished(centralizer).method + (", cameras" if known else "")),
        query_paths=paths[0],
        gallery_paths=paths[1],
        protocol=found.protocol,
        sheets=sheets,
        diagnostics=pictures,
        curves=_curves(comparison),
        title=f"pose2id on {found.name or Path(args.place).name}",
        facts=found.facts,
        seed=args.seed,
        overwrite=args.overwrite,
    )


def _curves(comparison: Comparison) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Rows of a table that go by a number, such as "IPG of both, M = 3", as lines."""
    lines: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in comparison:
        found = _BY_NUMBER.fullmatch(row.name)
        if found:
            line = lines.setdefault(f"mAP by {found[2]}", {}).setdefault(found[1] or "IPG", ([], []))
            line[0].append(float(found[3]))
            line[1].append(row.result.mAP)
    return lines
