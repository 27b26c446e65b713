"""`pose2id enhance`: a feature file in, a feature file out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pose2id.cli.options import FILES, add_cluster, feature_command

_OF_SIDES = ("array", "joint", "without_cameras")
_DISTRIBUTED = ("ray", "workers", "approximate", "nprobe", "exact")


def add_command(commands: Any) -> None:
    """The command with its options."""
    told = (
        "pose2id.centralizer",
        "pose2id.distributed.enhancement",
        "pose2id.distributed.searching",
        "pose2id.distributed.cluster",
    )  # which method ran, and on what evidence
    enhance = feature_command(commands, "enhance", "centralize the features of a file", _enhance, told)
    enhance.set_defaults(method=None)
    enhance.epilog = (
        f"{FILES}  .npy       features (N, D) of one set, to another .npy: --method nfc, others with --workers\n"
    )
    enhance.add_argument("input", metavar="IN", help="feature file")
    enhance.add_argument("output", metavar="OUT", nargs="?", help="feature file to write; the rest of IN is copied")
    enhance.add_argument("--out", metavar="OUT", help="the same, by name")
    enhance.add_argument("--array", metavar="NAME", help="which array of features, where IN has several")
    enhance.add_argument("--joint", action="store_true", help="NFC: neighbours in the union of query and gallery")
    enhance.add_argument("--without-cameras", action="store_true", help="as if IN had no cameras")
    enhance.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    many = enhance.add_argument_group('an .npy file, by many processes and machines (extra "distributed")')
    add_cluster(many)
    many.add_argument("--cameras", metavar="FILE", help=".npy of (N,) cameras, for methods other than nfc")
    many.add_argument(
        "--approximate", action="store_true", help="NFC: inverted lists; the recall is measured and printed"
    )
    many.add_argument("--nprobe", type=int, metavar="P", help="lists that a row looks at (chosen on a sample)")
    many.add_argument("--exact", action="store_true", help="exact even if it takes more than 24 hours")


def _enhance(args: argparse.Namespace) -> None:
    if (args.output is None) == (args.out is None):
        raise ValueError("OUT must be given once, as the second argument or by --out.")
    args.output = args.output or args.out
    if Path(args.input).suffix.lower() == ".npy":
        return _enhance_npy(args)
    given = [name for name in (*_DISTRIBUTED, "cameras") if getattr(args, name) not in (None, False)]
    if given:
        raise ValueError(
            f"{given[0]} must be left out for {args.input}: it is for .npy files, of one set of features (N, D)."
        )
    return _enhance_sides(args)


def _enhance_npy(args: argparse.Namespace) -> None:
    """One set."""
    from pose2id.centralization.enhancement import METHODS  # noqa: PLC0415 - torch takes seconds to import
    from pose2id.io.checks import checked_choice  # noqa: PLC0415

    method = checked_choice(args.method or "auto", "method", METHODS)
    given = {name: getattr(args, name) for name in (*_OF_SIDES, *_DISTRIBUTED, "cameras", "k1", "k2")}
    given = {
        name: value for name, value in given.items() if value is not None and value is not False
    }  # 0 is an error of its own
    alone = args.workers is None and args.ray is None
    for names, wrong, where in (
        (_OF_SIDES, True, "be left out for an .npy file, which holds one array of one set"),
        (("approximate", "nprobe", "exact", "cameras"), alone, "come with --workers or --ray"),
        (("approximate", "nprobe", "exact", "k1", "k2"), method != "nfc", f"come with --method nfc, not {method}"),
        (("cameras",), method == "nfc", "come with another method than nfc, which knows none"),
    ):
        for name in names if wrong else ():
            if name in given:
                raise ValueError(f"{name} must {where}.")
    if "nprobe" in given and not args.approximate:
        raise ValueError("nprobe must come with --approximate: an exact search has no lists.")
    if method != "nfc" and alone:
        raise ValueError(f"method must be 'nfc' for an .npy file without --workers or --ray, got {method!r}.")
    k1, k2 = (2 if k is None else k for k in (args.k1, args.k2))
    if alone:
        _enhance_alone(args, k1, k2)
        return
    from pose2id.distributed.enhancement import enhance_file, nfc_file  # noqa: PLC0415

    options = {"address" if name == "ray" else name: given[name] for name in _DISTRIBUTED if name in given} | {
        "overwrite": args.overwrite
    }
    if method == "nfc":
        done = nfc_file(args.input, args.output, k1, k2, **options)
    else:
        done = enhance_file(args.input, args.output, _cameras(args.cameras), method=method, **options)
    print(f"enhance: {done}")
    print(f"wrote {args.output}")


def _cameras(path: str | None) -> Any:
    from pose2id.io.array_files import read_array  # noqa: PLC0415

    if path is None:
        return None
    if Path(path).suffix.lower() != ".npy" or not Path(path).is_file():
        raise ValueError(f"cameras must be an .npy file of one camera for each row, which is there, got {path}.")
    return read_array(Path(path))[:]


def _enhance_alone(args: argparse.Namespace, k1: int, k2: int) -> None:
    from pose2id.centralization.nfc import nfc  # noqa: PLC0415
    from pose2id.io.array_files import read_array  # noqa: PLC0415

    if not Path(args.input).is_file():
        raise FileNotFoundError(f"There is no feature file {args.input}.")
    nfc(read_array(Path(args.input)), k1, k2, out=args.output, overwrite=args.overwrite)
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
