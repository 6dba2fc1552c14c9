"""The command `nydus-image`: make images and look into them. Its verbs are in `nydusd.cli.image`, one file each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from nydusd import logs
from nydusd.cli.exit_status import exit_status
from nydusd.cli.image.verb import Verb
from nydusd.version import version_text

VERBS = (
    "create",
    "convert",
    "merge",
    "optimize",
    "compact",
    "chunkdict",
    "export",
    "check",
    "inspect",
    "stat",
    "unpack",
)
"""Each is a module of `nydusd.cli.image`."""
_LEVELS = ("trace", "debug", "info", "warn", "error")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. The exit status: 0, 1 for an error, 2 for wrong arguments (and layers that do not fit together)."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(argv[0] if argv else "").parse_args(argv)

    def work() -> None:
        logs.setup(args.log_level, args.log_file, "image")
        args.run(args)
        sys.stdout.flush()

    return exit_status(work, lambda text: " ".join(logs.clean(text).split()))


def build_parser(first: str = "") -> argparse.ArgumentParser:
    """The grammar of the command line: `parse_args(argv)` gives a namespace whose `run` does it.

    If the `first` argument is a verb, the others are not loaded: that would take longer than a small image does.
    """
    parser = argparse.ArgumentParser(
        "nydus-image", description="Make images, check them and look into them.", allow_abbrev=False
    )
    _add_globals(parser, "warn", None)
    parser.add_argument("-V", "--version", action="version", version=version_text("nydus-image").rstrip())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in (first,) if first in VERBS else VERBS:
        verb: Verb = import_module(f"nydusd.cli.image.{name}").VERB
        one = commands.add_parser(verb.name, help=verb.help, description=verb.help, allow_abbrev=False)
        # Given after the verb they win; not given, they must not undo what stood before it.
        _add_globals(one, argparse.SUPPRESS, argparse.SUPPRESS)
        verb.add_arguments(one)
        one.set_defaults(run=verb.run)
    return parser


def _add_globals(parser: argparse.ArgumentParser, level: str, file: str | None) -> None:
    parser.add_argument(
        "-l",
        "--log-level",
        choices=_LEVELS,
        default=level,
        metavar="LEVEL",
        help="trace, debug, info, warn or error (warn)",
    )
    parser.add_argument("-L", "--log-file", default=file, metavar="PATH", help="log to this file (stderr)")


if __name__ == "__main__":
    sys.exit(main())
