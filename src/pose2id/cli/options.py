"""Options that several commands have."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
FILES = """Feature files, told apart by their ending:
  .npz, .pt  query_feats (Q, D), gallery_feats (G, D); optional q_pids, g_pids, q_camids, g_camids
  .mat       query_f, gallery_f; optional query_label, gallery_label, query_cam, gallery_cam
  all        or features (N, D) with is_query (N) or num_query; optional pids, camids
"""
# What the functions call an argument whose option has another name.
_OPTION = {
    "repo_or_dir": ("weights", "source"),
    "num_identities": ("people",),
    "infrared_cameras": ("infrared",),
    "directory": ("out", "generated"),
    "camids": ("cameras",),
    "table": ("paper_table",),
    "address": ("ray",),
    "readers": ("workers",),
}
_NAMED = re.compile(r"\A(\w+)(?: \(\w+\))?(?: and (\w+))?(?= (?:\S+ )?(?:must|is) )")


def command(
    commands: Any,
    name: str,
    help_text: str,
    run: Callable[[argparse.Namespace], int | None],
    epilog: str = "",
    told: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """A command's parser; `run` gets the arguments and gives an exit status, None being 0.

    What the loggers of `told` say at level INFO is shown.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser, told=told)
    return parser


def feature_command(
    commands: Any, name: str, help_text: str, run: Callable[[argparse.Namespace], None], told: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """A command on feature files, with the method and NFC's options."""
    parser = command(commands, name, help_text, run, FILES, told)
    add_method(parser)
    return parser


def add_method(parser: Any) -> None:
    """Options of the method and of NFC."""
    methods = "auto (default), guarded, cameras, centring, or nfc (as published)"
    parser.add_argument("--method", default="auto", metavar="M", help=methods)
    parser.add_argument("--k1", type=int, help="NFC, which it selects: neighbours that a feature proposes (2)")
    parser.add_argument("--k2", type=int, help="NFC, which it selects: neighbours that the other side looks at (2)")


def add_model(parser: Any) -> None:
    """Options of the model that images go through."""
    forms = "module:callable, timm:NAME, hf:NAME, onnx:FILE, openvino:FILE, torchreid:NAME[:WEIGHTS]"
    parser.add_argument("--model", help=forms)
    parser.add_argument("--transform", metavar="PRESET", help="size, mean and std: transreid, torchreid, saai, ...")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="threads that read images (%(default)s)")
    parser.add_argument("--device", help="(default: cuda where there is one, else cpu)")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--flip", action="store_true", help="add the features of mirrored images")


def add_cluster(parser: Any, processes: str = "--workers") -> None:
    """Options for the work of several processes or machines."""
    parser.add_argument(
        processes, type=int, metavar="N", help="processes, on this machine unless --ray is given (needs Ray)"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster to work on: auto, HOST:PORT, ray://HOST:PORT")


def add_download(parser: argparse.ArgumentParser, what: str) -> None:
    """Options for weights from the Hub."""
    parser.add_argument(
        "--revision", default="main", help=f"branch, tag or commit of {what}, not of the VAE (%(default)s)"
    )
    parser.add_argument("--vae", help="directory or repository of the VAE (default: stabilityai/sd-vae-ft-mse)")
    parser.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept (default: the Hub client's)")
    parser.add_argument("--local-files-only", action="store_true", help="download nothing")


def download(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `add_download`'s options."""
    options = {name: getattr(args, name) for name in ("revision", "cache_dir", "local_files_only")}
    return {**options, "vae": args.vae} if args.vae else options


def in_words_of(args: argparse.Namespace, error: BaseException) -> str:
    """An error's message, with a command's options in the place of the functions' arguments.

    Settings of a YAML file keep their names. The system's errors tell which file could not be used, of which option.
    """
    given = vars(args)
    shown = [action for action in args.parser._actions if action.dest in given or not given.get("config")]
    shown = [action for action in shown if action.dest != "table"]  # --validation is one too
    typed = {action.dest: str([*action.option_strings, action.metavar][0]) for action in shown}

    def option(name: str) -> str:
        return next((typed[known] for known in (name, *_OPTION.get(name, ())) if known in typed), name)

    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        of = [typed[name] for name in typed if given.get(name) == str(error.filename)]
        return f"{' '.join([*of[:1], str(error.filename)])} cannot be used: {error.strerror}."
    return _NAMED.sub(lambda found: " and ".join(map(option, filter(None, found.groups()))), str(error))
