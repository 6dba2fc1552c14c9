"""The command `nydusctl`: ask a running daemon over its API socket. Its verbs are in `nydusd.cli.ctl`, one file each."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

from nydusd.cli.ctl import (
    bugreport,
    cache,
    daemons,
    info,
    metrics_backend,
    metrics_cache,
    metrics_fsstats,
    mount,
    set_log_level,
    top,
    trace,
    umount,
    workers,
)
from nydusd.cli.ctl.connection import Api
from nydusd.cli.ctl.text import printable
from nydusd.cli.exit_status import exit_status, writing
from nydusd.version import version_text

_MODULES = (
    *(daemons, info, set_log_level, metrics_backend, metrics_cache, metrics_fsstats, mount, umount),
    *(cache, workers, top, trace, bugreport),
)
VERBS = tuple(verb.VERB for verb in _MODULES)
GROUPS = {"set": "change a setting of the daemon", "metrics": "what the daemon counts"}


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        sys.stdout.write(version_text("nydusctl"))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. The exit status: 0, 1 for an error, 2 for wrong arguments."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a mount point may have letters that a locale has not

    def work() -> None:
        grammar = parser()
        with writing():  # --help, --version
            args = grammar.parse_args(argv)
        if args.sock is None and args.needs_socket:
            grammar.error(
                "the following arguments are required: -S/--sock (`nydusctl list` names those of all daemons)"
            )
        for text in args.run(Api(args.sock or ""), args):
            with writing():
                print(text)

    return exit_status(work, printable)


def parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    root = argparse.ArgumentParser(
        "nydusctl", description="Ask a running nydusd over its API socket.", allow_abbrev=False
    )
    root.add_argument("-S", "--sock", metavar="PATH", help="the daemon's API socket (its --apisock)")
    root.add_argument("-V", "--version", action=_Version, nargs=0, help="print which build this is")
    _add_raw(root, False)
    top = root.add_subparsers(required=True, metavar="COMMAND")
    groups = {}
    for name, text in GROUPS.items():
        group = top.add_parser(name, help=text)
        _add_raw(group, argparse.SUPPRESS)
        groups[name] = group.add_subparsers(required=True, metavar="COMMAND")
    for verb in VERBS:
        place = groups[verb.words[0]] if len(verb.words) > 1 else top
        one = place.add_parser(verb.words[-1], help=verb.help)
        _add_raw(one, argparse.SUPPRESS)
        verb.add_arguments(one)
        one.set_defaults(run=verb.run, needs_socket=verb.needs_socket)
    return root


def _add_raw(parser: argparse.ArgumentParser, default: object) -> None:
    """It may stand anywhere; not given after the command, it must not undo what stood before it."""
    parser.add_argument(
        "-r", "--raw", action="store_true", default=default, help="print the answer as JSON on one line"
    )


if __name__ == "__main__":
    sys.exit(main())
