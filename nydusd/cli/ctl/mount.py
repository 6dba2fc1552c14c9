"""`nydusctl mount`: mount an image in a running daemon (POST /api/v1/mount)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nydusd.cli.ctl.connection import MOUNT_PATIENCE, Api
from nydusd.cli.ctl.verb import Verb
from nydusd.config.file import read_named_file

_MAX_CONFIG = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--source", required=True, metavar="PATH", help="metadata of the image")
    parser.add_argument(
        "-c", "--config", required=True, metavar="PATH", help="configuration of the image (JSON or TOML)"
    )
    parser.add_argument("-m", "--mountpoint", required=True, metavar="PATH", help="place in the daemon's file system")
    parser.add_argument(
        "-t", "--type", default="rafs", choices=("rafs", "passthrough_fs"), help="kind of file system (rafs)"
    )


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    config = read_named_file(args.config, _MAX_CONFIG, args.config).decode(errors="surrogateescape")
    command = {"source": args.source, "fs_type": args.type, "config": config}
    api.with_patience(MOUNT_PATIENCE).post("/api/v1/mount", {"mountpoint": args.mountpoint}, command)
    yield from ()


VERB = Verb(("mount",), "mount an image", run, add_arguments)
