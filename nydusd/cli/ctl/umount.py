"""`nydusctl umount`: unmount an image of a running daemon (DELETE /api/v1/mount)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nydusd.cli.ctl.connection import MOUNT_PATIENCE, Api
from nydusd.cli.ctl.verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--mountpoint", required=True, metavar="PATH", help="place in the daemon's file system")


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    api.with_patience(MOUNT_PATIENCE).delete("/api/v1/mount", {"mountpoint": args.mountpoint})
    yield from ()


VERB = Verb(("umount",), "unmount an image", run, add_arguments)
