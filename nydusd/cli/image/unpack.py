"""`nydus-image unpack BOOTSTRAP --output PATH -D DIR`: turn an image back into a tar."""

from __future__ import annotations

import argparse
from pathlib import Path

from nydusd.cli.image.blobs import add_backend, add_bootstrap, open_reader
from nydusd.cli.image.verb import Verb
from nydusd.image.unpack import unpack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bootstrap(parser)
    add_backend(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="the tar to be written")


def run(args: argparse.Namespace) -> None:
    with open_reader(args) as reader:
        print(f"{unpack(reader, args.output)} members")


VERB = Verb("unpack", "turn an image back into a tar", add_arguments, run)
