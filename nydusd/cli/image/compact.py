"""`nydus-image compact BOOTSTRAP -D DIR`: fewer blobs, without what the image does not use."""

from __future__ import annotations

import argparse
from pathlib import Path

from nydusd.cli.image.blobs import FolderFirst, add_bootstrap, add_remote, bootstrap_path, open_backend
from nydusd.cli.image.verb import Verb, add_output_json, size, write_summary
from nydusd.image.compact import CompactOptions, compact
from nydusd.image.known import open_dictionary
from nydusd.image.output import folder_of
from nydusd.image.reader import ImageReader


def _percent(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:3]) > 99 or len(text) > 2:
        raise argparse.ArgumentTypeError(f"must be from 0 to 99, but is {text[:32]!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"must be a number, but is {text[:32]!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bootstrap(parser)
    add = parser.add_argument
    add(
        "-D",
        "--blob-dir",
        dest="folder",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the new blobs; blobs of the image that are in it are taken from it",
    )
    add_remote(parser)
    add(
        "--min-used-ratio",
        type=_percent,
        default=0,
        metavar="PERCENT",
        help="write a blob anew if less of it than this is used, 0 to 99 (0: never)",
    )
    add(
        "--compact-blob-size",
        type=size,
        default=10 << 20,
        metavar="SIZE",
        help="put blobs below this many bytes together (10 MiB)",
    )
    add(
        "--max-compact-size",
        type=size,
        default=100 << 20,
        metavar="SIZE",
        help="longest blob that is put together so, in bytes (100 MiB)",
    )
    add(
        "--layers-to-compact",
        type=_count,
        default=0,
        metavar="N",
        help="do nothing for an image of fewer blobs (0: always compact)",
    )
    add("--chunk-dict", metavar="[bootstrap=]PATH", help="refer to this image's chunks where they are the same")
    add("-O", "--output-bootstrap", type=Path, metavar="PATH", help="file for the new metadata (BOOTSTRAP.compact)")
    add_output_json(parser)


def run(args: argparse.Namespace) -> None:
    path: Path = bootstrap_path(args)
    target = args.output_bootstrap or path.with_name(f"{path.name}.compact")
    with ImageReader(path, FolderFirst(folder_of(args.folder), open_backend(args))) as reader:
        image = reader.bootstrap
        dictionary = open_dictionary(args.chunk_dict, image.version, image.chunk_size) if args.chunk_dict else None
        done = compact(
            reader,
            str(path),
            CompactOptions(
                target=target,
                folder=args.folder,
                min_used_ratio=args.min_used_ratio,
                compact_blob_size=args.compact_blob_size,
                max_compact_size=args.max_compact_size,
                layers_to_compact=args.layers_to_compact,
                dictionary=dictionary,
            ),
        )
    if done is None:
        print(f"{len(image.blobs)} blobs, fewer than {args.layers_to_compact}: nothing is done")
        return
    write_summary(
        args.output_json, bootstrap=target, blobs=done.blobs, version=done.version, compressor=done.compressor
    )
    print(f"bootstrap: {target}")
    for blob in done.blobs:
        print(f"blob: {blob}{' (new)' if blob in done.new else ''}")
    for blob in done.gone:
        print(f"not needed any more: {blob}")


VERB = Verb("compact", "put an image's small blobs together, and drop what it does not use", add_arguments, run)
