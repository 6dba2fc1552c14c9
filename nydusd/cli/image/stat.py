"""`nydus-image stat -B BOOTSTRAP | -D DIR [-T TARGET]`: count files, chunks and what images have in common."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nydusd.cli.image.verb import Verb, add_output_json
from nydusd.errors import ConfigError
from nydusd.image.output import folder_of, write_file
from nydusd.image.statistics import Statistics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-B", "--bootstrap", type=Path, metavar="PATH", help="the image")
    parser.add_argument("-D", "--blob-dir", type=Path, metavar="DIR", help="all images in this folder")
    parser.add_argument("-T", "--target", type=Path, metavar="PATH", help="an image to compare with them")
    for names in (("-C", "--config"), ("--digester",)):
        parser.add_argument(*names, metavar="VALUE", help=argparse.SUPPRESS)
    add_output_json(parser)


def run(args: argparse.Namespace) -> None:
    if (args.bootstrap is None) == (args.blob_dir is None):
        raise ConfigError("one of --bootstrap and --blob-dir is needed")
    statistics = Statistics()
    sources = [args.bootstrap] if args.bootstrap else sorted(folder_of(args.blob_dir).iterdir())
    for source in sources:
        statistics.add_base(source)
    if args.target is not None:
        statistics.add_target(args.target)
    if args.output_json is not None:
        write_file(args.output_json, json.dumps(statistics.as_json(), indent=2).encode())
        return
    for line in statistics.lines():
        print(line)


VERB = Verb("stat", "count what is in images", add_arguments, run)
