"""`nydus-image chunkdict generate -B PATH BOOTSTRAP...`: make a chunk dictionary of images that have much in common."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from nydusd.cli.image.verb import Verb, add_output_json, write_summary
from nydusd.errors import ConfigError
from nydusd.image.chunkdict import generate

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=("generate",), metavar="generate", help="what is to be done with dictionaries: make one")
    add("sources", metavar="BOOTSTRAP", nargs="+", type=Path, help="metadata of the images")
    add("-B", "--bootstrap", type=Path, metavar="PATH", help="file for the dictionary")
    add("-D", "--blob-dir", type=Path, metavar="DIR", help="folder in which blobs that hold their metadata are found")
    add("--database", metavar="URL", help="not used: all images are named in each run")
    add_output_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.bootstrap is None:
        raise ConfigError("--bootstrap is needed: where the dictionary goes")
    if args.database is not None:
        log.warning(
            "--database is not used: the dictionary is made of the images that are named here, and of no others"
        )
    made = generate(args.sources, args.bootstrap, args.blob_dir)
    write_summary(
        args.output_json,
        bootstrap=args.bootstrap,
        blobs=made.blobs,
        version=made.version,
        compressor=made.compressor,
    )
    print(f"{made.chunks} chunks of {len(made.blobs)} blobs")
    print(f"bootstrap: {args.bootstrap}")


VERB = Verb("chunkdict", "make a chunk dictionary of several images", add_arguments, run)
