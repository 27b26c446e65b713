"""`pose2id demo`: the method on a sample drawn by code, or on a feature file."""

from __future__ import annotations

import argparse
from typing import Any

from pose2id.cli.options import feature_command


def add_commands(commands: Any) -> None:
    """The command with its options."""
    demo = feature_command(commands, "demo", "table and picture for a sample, or for a feature file", _demo)
    demo.add_argument("features", metavar="FEATS", nargs="?", help="feature file (default: drawn pedestrians)")
    demo.add_argument("--people", type=int, help="drawn (default: 20; 60 with --no-generation)")
    demo.add_argument(
        "--no-generation", action="store_true", help="no generated images: takes seconds instead of minutes"
    )
    demo.add_argument("--picture", metavar="PATH", default="pose2id-demo.png", help="default: %(default)s")
    demo.add_argument("--no-picture", action="store_true", help="print the table only")
    demo.add_argument("--overwrite", action="store_true", help="replace the picture if it exists")


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
    centralizer = Centralizer(method=args.method, k1=args.k1, k2=args.k2, eta=demo.TINY.eta)
    if args.features:
        shown = demo.Demo(args.features, load_features(args.features))
    elif args.no_generation:
        shown = demo.synthetic_demo(**people)
    else:
        shown = demo.generation_demo(**people)
    print(demo.report(shown, centralizer))
    if not args.features:
        repeated = shown if args.no_generation else demo.synthetic_demo(num_identities=demo.FEW)
        for other in [demo.once(repeated)] if args.no_generation else [repeated, demo.once(repeated)]:
            print("", demo.report(other, centralizer), sep="\n")
    if not args.no_picture:
        demo.draw(shown, centralizer, args.picture)
        print(f"\npicture: {args.picture}")
