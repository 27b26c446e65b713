"""Options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
_FILES = """Feature files, told apart by their ending:
  .npz  query_feats (Q, D), gallery_feats (G, D); optional q_pids, g_pids, q_camids, g_camids
  .mat  query_f, gallery_f; optional query_label, gallery_label, query_cam, gallery_cam
"""


def command(
    commands: Any, name: str, help_text: str, run: Callable[[argparse.Namespace], None], epilog: str = ""
) -> argparse.ArgumentParser:
    """A command's parser, whose arguments `run` gets."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def feature_command(
    commands: Any, name: str, help_text: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """A command on feature files, with the method and NFC's options."""
    parser = command(commands, name, help_text, run, _FILES)
    methods = "auto (default), guarded, cameras, centring, or nfc (as published)"
    parser.add_argument("--method", default="auto", metavar="M", help=methods)
    parser.add_argument("--k1", type=int, help="NFC, which it selects: neighbours that a feature proposes (2)")
    parser.add_argument("--k2", type=int, help="NFC, which it selects: neighbours that the other side looks at (2)")
    return parser


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
