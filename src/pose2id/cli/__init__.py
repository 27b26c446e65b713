"""The command line, `pose2id`: one file for each family of commands."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from pose2id.cli import demo, features, generate, people, train
from pose2id.cli.options import command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 after an error that was printed, 130 if interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # not every console can print ID²
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        args.run(args)
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"pose2id: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pose2id: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    from pose2id import __version__  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="pose2id", description="Training-free feature centralization for person re-identification."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    features.add_commands(commands)
    demo.add_commands(commands)
    generate.add_commands(commands)
    people.add_commands(commands)
    train.add_options(
        command(commands, "train", "train generation weights on a table of images", train.run, train.EPILOG)
    )
    return parser
