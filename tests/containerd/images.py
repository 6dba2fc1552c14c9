"""The nydus images that the containers run: `python -m tests.containerd.images TREE OUT` makes them from a Debian tree.

Once on a machine. `OUT/NAME/bootstrap` and `OUT/NAME/blobs/ID`, by `bench.image`. `full` is the whole tree
in chunks of 1 MiB; `small` has no documentation and no locales, a file of its own, and chunks of 64 KiB, so that no blob is
common to both. A folder under its final name is complete: it is made beside and renamed, so a killed run leaves nothing half
made. An image that the builder or this module would make differently now is made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import bench.image as builder
import nydusd.image

FULL, SMALL = "full", "small"
MARK = "etc/nydusd-test-image"
"""A file that only the small image has; it holds that image's name."""
_LEFT_OUT = ("usr/share/doc", "usr/share/locale", "usr/share/man", "usr/share/zoneinfo")


class Image(NamedTuple):
    """A built image."""

    name: str
    bootstrap: Path
    blob: Path


def cache_folder() -> Path:
    """Where `scripts/need-containerd` puts what it makes."""
    return Path(os.environ.get("NYDUSD_TEST_CACHE", "/var/cache/nydusd-tests"))


def find_image(name: str) -> Image:
    """A built image; AssertionError if `scripts/need-containerd` has not run."""
    folder = cache_folder() / "images" / name
    assert folder.is_dir(), f"there is no {folder}: run scripts/need-containerd"
    (blob,) = (folder / "blobs").iterdir()
    return Image(name, folder / "bootstrap", blob)


def _make_full(tree: Path, out: Path) -> None:
    builder.build(tree, out)


def _make_small(tree: Path, out: Path) -> None:
    smaller = out / "tree"
    left_out = {tree / name for name in _LEFT_OUT}

    def ignored(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(folder, name) in left_out or not _is_plain(Path(folder, name))}

    shutil.copytree(tree, smaller, symlinks=True, ignore=ignored, copy_function=os.link)
    (smaller / MARK).write_text(f"{SMALL}\n")
    builder.build(smaller, out, chunk_size=64 << 10)
    shutil.rmtree(smaller)


def _is_plain(path: Path) -> bool:
    """Files, folders and links: a device cannot be given by copytree."""
    return path.is_symlink() or path.is_dir() or path.is_file()


_MAKERS: dict[str, Callable[[Path, Path], None]] = {FULL: _make_full, SMALL: _make_small}


def _builder_sources() -> bytes:
    """All that decides what the builder makes."""
    package = Path(nydusd.image.__path__[0])
    return b"".join(path.read_bytes() for path in [Path(builder.__file__), *sorted(package.rglob("*.py"))])


def make_images(tree: Path, out: Path) -> None:
    """Make what is missing or of another recipe."""
    recipe = hashlib.sha256(_builder_sources() + Path(__file__).read_bytes()).hexdigest()
    for name, make in _MAKERS.items():
        folder, unfinished = out / name, out / f"{name}.new"
        if (folder / "recipe").is_file() and (folder / "recipe").read_text() == recipe:
            continue
        print(f"making the image {name!r} of {tree}", file=sys.stderr, flush=True)
        for old in (folder, unfinished):
            shutil.rmtree(old, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(tree, unfinished)
        (unfinished / "recipe").write_text(recipe)
        unfinished.rename(folder)


if __name__ == "__main__":
    make_images(Path(sys.argv[1]), Path(sys.argv[2]))
