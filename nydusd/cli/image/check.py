"""`nydus-image check BOOTSTRAP [-D DIR]`: is the metadata valid; with blobs also: is all data what it should be."""

from __future__ import annotations

import argparse

from nydusd.cli.image.blobs import add_bootstrap, add_config, bootstrap_path, open_reader
from nydusd.cli.image.verb import Verb, add_output_json, write_summary
from nydusd.formats.superblock import flags_compressor
from nydusd.image.check import check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bootstrap(parser)
    add_config(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for every inode")
    add_output_json(parser)


def run(args: argparse.Namespace) -> None:
    data = args.blob_dir is not None or args.config is not None
    path = bootstrap_path(args)
    with open_reader(args) as reader:
        done = check(reader, str(path), print if args.verbose else None, data=data)
    bootstrap = reader.bootstrap
    print("RAFS filesystem metadata is valid, referenced data blobs: ")
    for blob in bootstrap.blobs:
        print(
            f"\t {blob.index}: {blob.blob_id}, compressed size {blob.compressed_size}, "
            f"uncompressed size {blob.uncompressed_size}, chunk size: {blob.chunk_size:#x}, "
            f"chunk count: {blob.chunk_count}, features: {blob.features:#x}"
        )
    print(f"{done.names} names" + (f", {done.chunks} chunks read and verified" if data else ""))
    write_summary(
        args.output_json,
        bootstrap=path,
        blobs=[blob.blob_id for blob in bootstrap.blobs],
        version=bootstrap.version,
        compressor=flags_compressor(bootstrap.flags),
    )


VERB = Verb("check", "check an image", add_arguments, run)
