"""`pose2id enhance` and `pose2id evaluate`: feature files in, feature files and figures out."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pose2id.cli.options import feature_command


def add_commands(commands: Any) -> None:
    """Both commands with their options."""
    told = ("pose2id.centralizer",)  # which method ran, and on what evidence
    enhance = feature_command(commands, "enhance", "centralize the features of a file", _enhance, told)
    enhance.add_argument("input", metavar="IN", help="feature file")
    enhance.add_argument("output", metavar="OUT", help="feature file to write; everything else in IN is copied")
    enhance.add_argument("--joint", action="store_true", help="NFC: neighbours in the union of query and gallery")
    enhance.add_argument("--without-cameras", action="store_true", help="as if IN had no cameras")
    enhance.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")

    evaluate = feature_command(commands, "evaluate", "mAP, Rank-k, mINP and ID² of a feature file", _evaluate)
    evaluate.add_argument("features", metavar="FEATS", help="feature file with identity labels")
    evaluate.add_argument("--nfc", action="store_true", help="also with the published NFC")
    evaluate.add_argument(
        "--rerank", action="store_true", help="also re-ranked: published (20, 6, 0.3), and as Centralizer.rerank does"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON (fractions) instead of a table (percent)")


def _enhance(args: argparse.Namespace) -> None:
    from pose2id.centralizer import Centralizer  # noqa: PLC0415 - torch takes seconds to import
    from pose2id.io.feature_files import load_features, new_feature_file, save_features  # noqa: PLC0415

    new_feature_file(args.output, overwrite=args.overwrite)
    features = load_features(args.input)
    centralizer = Centralizer(method=args.method, k1=args.k1, k2=args.k2)
    enhanced = centralizer.enhance(
        features.query_feats,
        features.gallery_feats,
        query_camids=None if args.without_cameras else features.q_camids,
        gallery_camids=None if args.without_cameras else features.g_camids,
        joint=args.joint,
    )
    save_features(features.with_features(*enhanced), args.output, overwrite=args.overwrite)
    print(f"wrote {args.output}")


def _evaluate(args: argparse.Namespace) -> None:
    from pose2id.centralization.cameras import centre_cameras  # noqa: PLC0415
    from pose2id.centralization.guard import evidence  # noqa: PLC0415
    from pose2id.centralizer import Centralizer  # noqa: PLC0415
    from pose2id.io.feature_files import load_features  # noqa: PLC0415
    from pose2id.report import compare, records, table  # noqa: PLC0415

    centralizer = Centralizer(method=args.method, k1=args.k1, k2=args.k2)
    content = load_features(args.features)
    rows = compare(content, nfc=args.nfc or centralizer.method == "nfc", rerank=args.rerank, centralizer=centralizer)
    found = {"evidence": evidence(content.gallery_feats)}
    cameras = content.q_camids, content.g_camids
    if cameras[0] is not None and cameras[1] is not None:
        centred = centre_cameras(content.query_feats, content.gallery_feats, *cameras)[1]
        found["evidence_with_cameras"] = evidence(centred, cameras[1])
    if args.json:
        figures = {name: vars(of_gallery) for name, of_gallery in found.items()}
        print(json.dumps({"rows": records(rows), **figures}, indent=2))
        return
    valid = rows[0].result.num_valid_queries
    print(f"{len(content.query_feats)} queries ({valid} with a match), {len(content.gallery_feats)} gallery images\n")
    print(table(rows), found["evidence"], sep="\n\n")
    if "evidence_with_cameras" in found:
        print(f"With cameras: {found['evidence_with_cameras']}")
