"""The command line, `pose2id`: one file for each family of commands."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pose2id.cli import demo, evaluate, extract, features, generate, people, train
from pose2id.cli.options import command, in_words_of

# diffusers imports bitsandbytes where that is installed; it warns of 4-bit kernels for CPUs, which nothing here uses.
_NOT_OURS = "bitsandbytes.backends.cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0; 1 if something was left out, as was printed; 2 after an error that was printed; 130 if interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # not every console can print ID²
    args = argparse.Namespace()
    try:
        args = _parser().parse_args(argv)
        with _console(args.told):
            return args.run(args) or 0
    except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"pose2id: {in_words_of(args, error) or 'out of memory'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pose2id: interrupted", file=sys.stderr)
        return 130


@contextmanager
def _console(told: Sequence[str]) -> Iterator[None]:
    """Within, log records and warnings are lines of their text, of these loggers from level INFO on."""
    root, form = logging.getLogger(), warnings.formatwarning
    loggers = [root, *map(logging.getLogger, (*told, _NOT_OURS))]
    levels, handlers = [logger.level for logger in loggers], list(root.handlers)
    try:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        for logger in loggers[1:-1]:
            logger.setLevel(logging.INFO)
        loggers[-1].setLevel(logging.ERROR)
        warnings.formatwarning = lambda message, category, *given, **options: (
            f"{message}\n" if category is UserWarning else form(message, category, *given, **options)
        )
        yield
    finally:
        warnings.formatwarning = form
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        root.handlers[:] = handlers


def _parser() -> argparse.ArgumentParser:
    from pose2id import __version__  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="pose2id", description="Training-free feature centralization for person re-identification."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    features.add_command(commands)
    evaluate.add_command(commands)
    extract.add_command(commands)
    demo.add_commands(commands)
    generate.add_commands(commands)
    people.add_commands(commands)
    train.add_options(
        command(commands, "train", "train generation weights on a table of images", train.run, train.EPILOG, train.TOLD)
    )
    return parser
