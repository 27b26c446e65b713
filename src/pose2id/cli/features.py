"""`pose2id enhance`: a feature file in, a feature file out."""

from __future__ import annotations

import argparse
from typing import Any

from pose2id.cli.options import feature_command


def add_command(commands: Any) -> None:
    """The command with its options."""
    told = ("pose2id.centralizer",)  # which method ran, and on what evidence
    enhance = feature_command(commands, "enhance", "centralize the features of a file", _enhance, told)
    enhance.add_argument("input", metavar="IN", help="feature file")
    enhance.add_argument("output", metavar="OUT", help="feature file to write; everything else in IN is copied")
    enhance.add_argument("--array", metavar="NAME", help="which array of features, where IN has several")
    enhance.add_argument("--joint", action="store_true", help="NFC: neighbours in the union of query and gallery")
    enhance.add_argument("--without-cameras", action="store_true", help="as if IN had no cameras")
    enhance.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _enhance(args: argparse.Namespace) -> None:
    from pose2id.centralizer import Centralizer  # noqa: PLC0415 - torch takes seconds to import
    from pose2id.io.feature_files import load_features, new_feature_file, save_features  # noqa: PLC0415

    new_feature_file(args.output, overwrite=args.overwrite)
    features = load_features(args.input, name=args.array)
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
