"""`nydus-image merge -B PATH LAYER...`: put layers, the lowest first, over one another to one image."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nydusd.cli.image.verb import Verb, add_output_json, write_summary
from nydusd.errors import ConfigError
from nydusd.image.merge import MergeOptions, merge
from nydusd.image.prefetch import PrefetchPolicy, parse_list


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _sizes(text: str) -> list[int]:
    items = _list(text)
    for item in items:
        if not item.isdecimal() or not item.isascii() or len(item) > 19:
            raise argparse.ArgumentTypeError(f"must be numbers of bytes with commas between, but has {item[:32]!r}")
    return [int(item) for item in items]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sources", metavar="LAYER", nargs="+", type=Path, help="metadata of the layers, the lowest first")
    add("-B", "--bootstrap", type=Path, metavar="PATH", help="file for the merged metadata")
    add("-D", "--blob-dir", type=Path, metavar="DIR", help="folder in which blobs that hold their metadata are found")
    add("--parent-bootstrap", type=Path, metavar="PATH", help="an image below all layers")
    add("--chunk-dict", metavar="[bootstrap=]PATH", help="the dictionary that the layers were made with")
    policies = [policy.value for policy in PrefetchPolicy]
    add(
        "--prefetch-policy",
        choices=policies,
        default="none",
        metavar="NAME",
        help="fs reads a list from standard input",
    )
    for name, kind, text in (
        ("--blob-digests", _list, "digests of the layers' blobs"),
        ("--original-blob-ids", _list, "ids of the layers' blobs"),
        ("--blob-sizes", _sizes, "sizes of the layers' blobs"),
        ("--blob-toc-digests", _list, "digests of their tables of contents"),
        ("--blob-toc-sizes", _sizes, "sizes of their tables of contents"),
    ):
        add(name, type=kind, default=[], metavar="LIST", help=f"{text}, with commas between")
    parser.add_argument("-C", "--config", metavar="PATH", help=argparse.SUPPRESS)
    add_output_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.bootstrap is None:
        raise ConfigError("--bootstrap is needed: where the merged metadata goes")
    dictionary = args.chunk_dict.removeprefix("bootstrap=") if args.chunk_dict else None
    fs = PrefetchPolicy(args.prefetch_policy) is PrefetchPolicy.FS
    merged = merge(
        MergeOptions(
            sources=args.sources,
            target=args.bootstrap,
            parent=args.parent_bootstrap,
            chunk_dict=Path(dictionary) if dictionary else None,
            blob_dir=args.blob_dir,
            blob_digests=args.blob_digests,
            original_blob_ids=args.original_blob_ids,
            blob_sizes=args.blob_sizes,
            toc_digests=args.blob_toc_digests,
            toc_sizes=args.blob_toc_sizes,
            prefetch_list=parse_list(sys.stdin.buffer) if fs else [],
        )
    )
    write_summary(
        args.output_json,
        bootstrap=args.bootstrap,
        blobs=merged.blobs,
        version=merged.version,
        compressor=merged.compressor,
    )
    print(f"bootstrap: {args.bootstrap}")
    for blob in merged.blobs:
        print(f"blob: {blob}")


VERB = Verb("merge", "put layers over one another to one image", add_arguments, run)
