"""`nydus-image export --block -B BOOTSTRAP -D DIR [-O PATH] [--verity]`: one disk image that the kernel's EROFS mounts."""

from __future__ import annotations

import argparse
from pathlib import Path

from nydusd.cli.image.blobs import open_backend
from nydusd.cli.image.verb import Verb
from nydusd.errors import ConfigError
from nydusd.image.export import export_block
from nydusd.image.reader import ImageReader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--block", action="store_true", required=True, help="a disk image (there is no other form)")
    add("-B", "--bootstrap", type=Path, required=True, metavar="PATH", help="the metadata")
    add("-D", "--localfs-dir", dest="blob_dir", type=Path, metavar="DIR", help="folder with the blobs")
    add("-C", "--config", metavar="PATH", help="a daemon's configuration, whose backend has the blobs")
    add("-O", "--output", type=Path, metavar="PATH", help="the disk image (DIR/BOOTSTRAP.disk)")
    add("--verity", action="store_true", help="add dm-verity data, and print the options that open it")
    add("--threads", type=int, metavar="N", help="taken, as older callers give it, and of no effect")


def run(args: argparse.Namespace) -> None:
    target = args.output
    if target is None:
        if args.blob_dir is None:
            raise ConfigError("--output is needed")
        target = args.blob_dir / f"{args.bootstrap.name}.disk"
    with ImageReader(args.bootstrap, open_backend(args)) as reader:
        done = export_block(reader, target, verity=args.verity)
    print(f"{target}: {done.size} bytes")
    if done.verity is not None:
        print(f"dm-verity options: {done.verity.options()}")


VERB = Verb("export", "write an image as a disk image", add_arguments, run)
