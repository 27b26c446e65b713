"""`pose2id enhance`: a feature file in, a feature file out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pose2id.cli.options import FILES, feature_command

_DISTRIBUTED = ("address", "workers", "approximate", "nprobe", "exact")


def add_command(commands: Any) -> None:
    """The command with its options."""
    told = ("pose2id.centralizer", "pose2id.distributed.searching")  # which method ran, and on what evidence
    enhance = feature_command(commands, "enhance", "centralize the features of a file", _enhance, told)
    enhance.set_defaults(method=None)
    enhance.epilog = (
        f"{FILES}  .npy       features (N, D) of one set, for NFC, the default there; OUT is an .npy file too\n"
    )
    enhance.add_argument("input", metavar="IN", help="feature file")
    enhance.add_argument("output", metavar="OUT", nargs="?", help="feature file to write; the rest of IN is copied")
    enhance.add_argument("--out", metavar="OUT", help="the same, by name")
    enhance.add_argument("--array", metavar="NAME", help="which array of features, where IN has several")
    enhance.add_argument("--joint", action="store_true", help="NFC: neighbours in the union of query and gallery")
    enhance.add_argument("--without-cameras", action="store_true", help="as if IN had no cameras")
    enhance.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    many = enhance.add_argument_group('an .npy file, by many processes and machines (extra "distributed")')
    many.add_argument("--workers", type=int, metavar="N", help="so many workers; without --ray on this machine")
    many.add_argument(
        "--ray", dest="address", metavar="ADDRESS", help="a Ray cluster: auto, HOST:PORT, ray://HOST:PORT"
    )
    many.add_argument("--approximate", action="store_true", help="inverted lists; the recall is measured and printed")
    many.add_argument("--nprobe", type=int, metavar="P", help="lists that a row looks at (chosen on a sample)")
    many.add_argument("--exact", action="store_true", help="exact even if it takes more than 24 hours")


def _enhance(args: argparse.Namespace) -> None:
    if (args.output is None) == (args.out is None):
        raise ValueError("OUT must be given once, as the second argument or by --out.")
    args.output = args.output or args.out
    if Path(args.input).suffix.lower() == ".npy":
        return _enhance_npy(args)
    given = [name for name in _DISTRIBUTED if getattr(args, name) not in (None, False)]
    if given:
        kind = "an .npy file (N, D) of one set: query and gallery of other files are small enough for one process"
        raise ValueError(f"input must be {kind}, with {given[0]}; got {args.input}.")
    return _enhance_sides(args)


def _enhance_npy(args: argparse.Namespace) -> None:
    """NFC of one set."""
    if args.method not in (None, "nfc"):
        from pose2id.centralization.enhancement import METHODS  # noqa: PLC0415 - torch takes seconds to import
        from pose2id.io.checks import checked_choice  # noqa: PLC0415

        checked_choice(args.method, "method", METHODS)
        why = "the others compare queries with a gallery, and look up neighbours camera by camera in one process"
        raise ValueError(f"method must be 'nfc' for an .npy file, got {args.method!r}: {why}. Take an .npz file.")
    for name in ("array", "joint", "without_cameras"):
        if getattr(args, name):
            raise ValueError(f"{name} must be left out for an .npy file, which holds one array without cameras.")
    k1, k2 = (2 if k is None else k for k in (args.k1, args.k2))
    if args.workers is None and args.address is None:
        _enhance_alone(args, k1, k2)
        return
    from pose2id.distributed.enhancement import nfc_file  # noqa: PLC0415

    options = {name: getattr(args, name) for name in _DISTRIBUTED}
    done = nfc_file(args.input, args.output, k1, k2, overwrite=args.overwrite, **options)
    print(f"enhance: nfc, k1 {k1}, k2 {k2}, whatever the evidence. {done}.")
    print(f"wrote {args.output}")


def _enhance_alone(args: argparse.Namespace, k1: int, k2: int) -> None:
    from pose2id.centralization.nfc import nfc  # noqa: PLC0415
    from pose2id.io.array_files import read_array  # noqa: PLC0415

    for name in ("approximate", "nprobe", "exact"):
        if getattr(args, name):
            raise ValueError(f"{name} must come with --workers or --ray.")
    if args.overwrite:
        raise ValueError("overwrite must come with --workers or --ray for an .npy file.")
    if not Path(args.input).is_file():
        raise FileNotFoundError(f"There is no feature file {args.input}.")
    nfc(read_array(Path(args.input)), k1, k2, out=args.output)
    print(f"enhance: nfc, k1 {k1}, k2 {k2}, whatever the evidence.")
    print(f"wrote {args.output}")


def _enhance_sides(args: argparse.Namespace) -> None:
    """Query and gallery."""
    from pose2id.centralizer import Centralizer  # noqa: PLC0415 - torch takes seconds to import
    from pose2id.io.feature_files import load_features, new_feature_file, save_features  # noqa: PLC0415

    new_feature_file(args.output, overwrite=args.overwrite)
    features = load_features(args.input, name=args.array)
    centralizer = Centralizer(method=args.method or "auto", k1=args.k1, k2=args.k2)
    enhanced = centralizer.enhance(
        features.query_feats,
        features.gallery_feats,
        query_camids=None if args.without_cameras else features.q_camids,
        gallery_camids=None if args.without_cameras else features.g_camids,
        joint=args.joint,
    )
    save_features(features.with_features(*enhanced), args.output, overwrite=args.overwrite)
    print(f"wrote {args.output}")
