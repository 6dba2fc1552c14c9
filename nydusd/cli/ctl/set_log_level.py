"""`nydusctl set log-level LEVEL`: change how much a running daemon logs (PUT /api/v1/daemon)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nydusd.cli.ctl.connection import Api
from nydusd.cli.ctl.verb import Verb

LEVELS = ("off", "error", "warn", "info", "debug", "trace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("level", choices=LEVELS, type=str.lower, metavar="LEVEL", help=", ".join(LEVELS))


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    api.put("/api/v1/daemon", {"log_level": args.level})
    yield from ()


VERB = Verb(("set", "log-level"), "change how much the daemon logs", run, add_arguments)
