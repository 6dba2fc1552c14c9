"""`nydus-image optimize BOOTSTRAP --prefetch-files LIST --output-blob-dir DIR -D DIR`: what is needed first, in one blob."""

from __future__ import annotations

import argparse
from pathlib import Path

from nydusd.cli.image.blobs import add_backend, add_bootstrap, bootstrap_path, open_reader
from nydusd.cli.image.verb import Verb, add_output_json, write_summary
from nydusd.errors import ConfigError
from nydusd.image.optimize import optimize, parse_wanted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bootstrap(parser)
    add_backend(parser)
    add = parser.add_argument
    add(
        "-p",
        "--prefetch-files",
        type=Path,
        required=True,
        metavar="LIST",
        help="what is needed first, in this order: paths one a line, or JSON with parts of files; nydusctl trace writes both",
    )
    add(
        "-O",
        "--output-bootstrap",
        type=Path,
        default=Path("optimized_bootstrap"),
        metavar="PATH",
        help="file for the new metadata (optimized_bootstrap)",
    )
    add("--output-blob-dir", type=Path, required=True, metavar="DIR", help="folder for the new blob")
    add_output_json(parser)


def run(args: argparse.Namespace) -> None:
    try:
        wanted = parse_wanted(args.prefetch_files.read_bytes(), f"--prefetch-files {args.prefetch_files}")
    except OSError as error:
        raise ConfigError(f"--prefetch-files {args.prefetch_files}: {error.strerror}") from error
    path, target = bootstrap_path(args), args.output_bootstrap
    with open_reader(args) as reader:
        done = optimize(reader, str(path), wanted, target, args.output_blob_dir, args.blob_dir)
    write_summary(
        args.output_json, bootstrap=target, blobs=done.blobs, version=done.version, compressor=done.compressor
    )
    print(f"{done.chunks} chunks, {done.stored} bytes in blob {done.blob}")
    print(f"bootstrap: {target}")


VERB = Verb("optimize", "put what an image needs first into a blob that is read ahead", add_arguments, run)
