"""`nydus-image convert SOURCE TARGET`: an OCI image in a layout or a registry becomes a nydus image there."""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path

from nydusd.cli.image.verb import Verb, processes, size
from nydusd.formats.model import Compressor
from nydusd.image.oci.convert import ConvertOptions, convert
from nydusd.image.oci.layout import Layout
from nydusd.image.oci.model import Store
from nydusd.image.oci.registry import Registry

_COMPRESSORS = {"none": Compressor.NONE, "lz4_block": Compressor.LZ4_BLOCK, "zstd": Compressor.ZSTD}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="the OCI image: [HOST/]REPOSITORY:TAG, or FOLDER or FOLDER:NAME of an OCI layout",
    )
    add("target", metavar="TARGET", help="where the nydus image goes, in the same words")
    add("--oci-ref", action="store_true", help="leave the data in the layers; make only metadata")
    add("-v", "--fs-version", choices=("5", "6"), default="6", metavar="N", help="RAFS version: 5 or 6 (6)")
    add("--compressor", choices=_COMPRESSORS, default="zstd", metavar="NAME", help="none, lz4_block or zstd (zstd)")
    add("--chunk-size", type=size, default=1 << 20, metavar="SIZE", help="0x1000 to 0x1000000 (0x100000)")
    add("--platform", default="", metavar="OS/ARCH", help="which image of an index (this machine's)")
    add("--cache", type=Path, metavar="DIR", help="keep converted layers here, and take them from here")
    add("--plain-http", action="store_true", help="registries without TLS")
    add("--insecure", action="store_true", help="do not check the certificates of registries")
    add("--processes", type=processes, default=0, metavar="N", help="worker processes (one a CPU)")


def run(args: argparse.Namespace) -> None:
    logging.getLogger("urllib3").setLevel(
        logging.ERROR
    )  # what it tries again is no news; what fails is told by our error
    with contextlib.ExitStack() as stack:
        source = _store(args.source, args, stack)
        target = _store(args.target, args, stack, push=True)
        digest = convert(
            source,
            target,
            ConvertOptions(
                reference=args.oci_ref,
                version=int(args.fs_version),
                compressor=_COMPRESSORS[args.compressor],
                chunk_size=args.chunk_size,
                cache=args.cache,
                platform=args.platform,
                processes=args.processes,
            ),
        )
    print(f"manifest: {digest}")


def _store(name: str, args: argparse.Namespace, stack: contextlib.ExitStack, *, push: bool = False) -> Store:
    """A path (with a slash or a dot in front) or an existing folder is a layout, anything else a registry's."""
    if name.startswith(("/", "./", "../")) or Path(name.partition(":")[0]).is_dir():
        folder, _, tag = name.partition(":")
        return Layout(Path(folder), tag)
    registry = Registry(name, plain_http=args.plain_http, insecure=args.insecure, push=push)
    stack.callback(registry.close)
    return registry


VERB = Verb("convert", "make a nydus image of an OCI image", add_arguments, run)
