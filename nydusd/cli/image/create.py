"""`nydus-image create [OPTIONS] SOURCE`: make an image of a folder or a tar."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nydusd.cli.image.verb import Verb, add_output_json, processes, size, write_summary
from nydusd.errors import ConfigError
from nydusd.formats.model import Compressor, Digester
from nydusd.image.create import Built, create
from nydusd.image.options import DEFAULT_CHUNK_SIZE, BuildOptions, Source
from nydusd.image.prefetch import PrefetchPolicy, parse_list
from nydusd.image.whiteout import Whiteouts

_COMPRESSORS = {"none": Compressor.NONE, "lz4_block": Compressor.LZ4_BLOCK, "zstd": Compressor.ZSTD}
_DIGESTERS = {"blake3": Digester.BLAKE3, "sha256": Digester.SHA256}
_OLD_NAMES = {"directory": "dir-rafs"}
_TOC_KINDS = ("estargztoc-ref", "stargz_index")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="what the image is made of")
    kinds = [kind.value for kind in Source]
    add(
        "-t",
        "--type",
        "--source-type",
        dest="kind",
        default="dir-rafs",
        choices=[*kinds, *_OLD_NAMES, *_TOC_KINDS],
        metavar="TYPE",
        help=f"what SOURCE is and what becomes of it: {', '.join(kinds)} (dir-rafs)",
    )
    add("-B", "--bootstrap", type=Path, metavar="PATH", help="file for the metadata")
    add("-D", "--blob-dir", type=Path, metavar="DIR", help="folder for the data, under its digest as name")
    add("-b", "--blob", type=Path, metavar="PATH", help="file (or FIFO) for the data")
    add("--blob-cache-dir", type=Path, metavar="DIR", help="make a daemon's cache files there instead of a blob")
    add("--blob-inline-meta", "--inline-bootstrap", action="store_true", help="put the metadata into the blob")
    add("--blob-id", default="", metavar="ID", help="call the blob so, instead of by its digest")
    add("--chunk-size", type=size, default=DEFAULT_CHUNK_SIZE, metavar="SIZE", help="0x1000 to 0x1000000 (0x100000)")
    add(
        "--batch-size", type=size, default=0, metavar="SIZE", help="pack chunks of small files together up to this size"
    )
    add("--compressor", choices=_COMPRESSORS, default="zstd", metavar="NAME", help="none, lz4_block or zstd (zstd)")
    add("--digester", choices=_DIGESTERS, default="blake3", metavar="NAME", help="blake3 or sha256 (blake3)")
    add("-v", "--fs-version", choices=("5", "6"), default="6", metavar="N", help="RAFS version: 5 or 6 (6)")
    add("--features", choices=("blob-toc",), metavar="NAME", help="blob-toc: end the blob with a table of contents")
    add("-E", "--encrypt", action="store_true", help="encrypt the data; the key is in the metadata")
    add("--aligned-chunk", action="store_true", help="begin chunks at 4 KiB borders in RAFS v5, too")
    add("--chunk-dict", metavar="[bootstrap=]PATH", help="do not store chunks that this image has; refer to its blobs")
    add("--parent-bootstrap", type=Path, metavar="PATH", help="put SOURCE over this image")
    add("--repeatable", action="store_true", help="leave owners out, so that whoever builds gets the same bytes")
    specs = [spec.value for spec in Whiteouts]
    add(
        "--whiteout-spec",
        choices=specs,
        default="oci",
        metavar="NAME",
        help="marks of removed files: oci, overlayfs or none",
    )
    policies = [policy.value for policy in PrefetchPolicy]
    add(
        "--prefetch-policy",
        choices=policies,
        default="none",
        metavar="NAME",
        help="fs, blob or none (none); fs and blob read a list of paths from standard input, one a line",
    )
    add(
        "--processes",
        type=processes,
        default=0,
        metavar="N",
        help="worker processes (one a CPU); the output does not depend on it",
    )
    for name in ("--attributes", "--external-blob", "--blob-data-size"):
        add(name, metavar="VALUE", help=argparse.SUPPRESS)
    add("-C", "--config", metavar="PATH", help=argparse.SUPPRESS)
    add_output_json(parser)


def run(args: argparse.Namespace) -> None:
    _refuse_what_nobody_reads(args)
    options = _options(args)
    built = create(options)
    write_summary(
        args.output_json,
        bootstrap=built.bootstrap,
        blobs=built.blobs,
        version=options.version,
        compressor=options.compressor,
    )
    _report(built)


def _refuse_what_nobody_reads(args: argparse.Namespace) -> None:
    """Raises `ConfigError` for options that the reference has, but whose images no daemon can read, itself included."""
    if args.kind in _TOC_KINDS or args.blob_data_size is not None:
        what = f"--type {args.kind}" if args.kind in _TOC_KINDS else "--blob-data-size"
        raise ConfigError(
            f"{what}: the layer's index does not say enough: use --type estargz-ref with the layer itself"
        )
    for name in ("attributes", "external_blob"):
        if getattr(args, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}: no daemon reads data of external backends: leave the option out to store "
                "the data, or use --type targz-ref to leave it in its layer"
            )


def _options(args: argparse.Namespace) -> BuildOptions:
    policy = PrefetchPolicy(args.prefetch_policy)
    return BuildOptions(
        source=args.source,
        kind=Source(_OLD_NAMES.get(args.kind, args.kind)),
        version=int(args.fs_version),
        bootstrap=args.bootstrap,
        blob=args.blob,
        blob_dir=args.blob_dir,
        cache_dir=args.blob_cache_dir,
        blob_id=args.blob_id,
        compressor=Compressor.NONE if args.blob_cache_dir else _COMPRESSORS[args.compressor],
        digester=_DIGESTERS[args.digester],
        chunk_size=args.chunk_size,
        batch_size=args.batch_size,
        inline=args.blob_inline_meta,
        toc=args.features == "blob-toc",
        encrypt=args.encrypt,
        repeatable=args.repeatable,
        aligned_chunk=args.aligned_chunk,
        chunk_dict=args.chunk_dict,
        parent=args.parent_bootstrap,
        whiteouts=Whiteouts(args.whiteout_spec),
        prefetch=policy,
        prefetch_list=[] if policy is PrefetchPolicy.NONE else parse_list(sys.stdin.buffer),
        processes=args.processes,
    )


def _report(built: Built) -> None:
    print(f"{built.names} names, {built.data_bytes} bytes of data")
    print(f"bootstrap: {built.bootstrap or 'inside the blob'}")
    for blob in built.blobs:
        print(f"blob: {blob}")


VERB = Verb("create", "make an image", add_arguments, run)
