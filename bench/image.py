"""Makes the images that the benchmark and tests need, by the product's own builder.

`python -m bench.image TREE OUT` writes OUT/bootstrap and OUT/blobs/ID; with `--plain FOLDER` also FOLDER/ID.blob.data, the
complete cache file of that blob, which the kernel's EROFS takes as its device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from nydusd.image.create import create
from nydusd.image.options import DEFAULT_CHUNK_SIZE, BuildOptions


class Built(NamedTuple):
    """What was made: paths, and the size of the tree."""

    bootstrap: Path
    blob: Path
    names: int
    data_bytes: int


def configuration(built: Built, cache: Path) -> str:
    """A version 1 configuration: the image's blobs from their folder, a file cache in `cache`."""
    backend = {"type": "localfs", "config": {"dir": str(built.blob.parent)}}
    device = {"backend": backend, "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}}}
    return json.dumps({"device": device, "mode": "direct"})


def build(tree: Path, out: Path, chunk_size: int = DEFAULT_CHUNK_SIZE, plain: Path | None = None) -> Built:
    """Make an image of `tree` below `out`, with zstd and blake3. Raises `NydusError`."""
    blobs = out / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    options = BuildOptions(tree, bootstrap=out / "bootstrap", blob_dir=blobs, chunk_size=chunk_size, quiet=True)
    made = create(options)
    assert made.blob is not None, f"{tree} has no file with content"
    if plain is not None:
        plain.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as name:
            work = Path(name)
            cache = BuildOptions(tree, bootstrap=work / "boot", cache_dir=work, chunk_size=chunk_size, quiet=True)
            create(cache)
            (data,) = work.glob("*.blob.data")
            data.replace(plain / f"{made.blob.name}.blob.data")
    return Built(out / "bootstrap", made.blob, made.names, made.data_bytes)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.image", description="Make a RAFS v6 image of a folder.")
    parser.add_argument("tree", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chunk-size", type=int, default=DEFAULT_CHUNK_SIZE, help="bytes (default 1 MiB)")
    parser.add_argument("--plain", type=Path, help="folder for the uncompressed blob")
    options = parser.parse_args(arguments)
    built = build(options.tree, options.out, options.chunk_size, options.plain)
    print(f"{built.bootstrap}: {built.names} names, {built.data_bytes:,} bytes of data in {built.blob}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
