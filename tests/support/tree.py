"""Images of the fixtures, opened in this process: their bootstraps, and the manifest rows that a walk of one gives."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from nydusd.formats import BootstrapKind, detect, open_bootstrap
from nydusd.formats.blob_id import blob_id_from_path
from nydusd.formats.model import Bootstrap, Compressor, Inode
from nydusd.formats.toc import locate_bootstrap, tail_size
from tests.support.manifest import Row, escape

SMALL = Path(__file__).parents[1] / "data" / "small"
TAR_IMAGES = ("v6-tar-rafs", "v6-targz-ref", "v6-tarfs")
"""Images made from a tar: whole seconds, and no socket."""


def image_names(images: Path = SMALL / "images") -> list[str]:
    return sorted(path.name for path in images.iterdir())


def manifest_path(image: str, fixtures: Path = SMALL) -> Path:
    """The manifest of an image, in the small set or in the large one."""
    stem = "manifest" if (fixtures / "manifest.jsonl").exists() else "edge.manifest"
    tar = "manifest-tar" if stem == "manifest" else "edge-tar.manifest"
    return fixtures / f"{tar if image in TAR_IMAGES else stem}.jsonl"


def bootstrap_bytes(image: Path) -> tuple[bytes, str | None, bool]:
    """The metadata of an image folder, the id in the name of the file it is in, and whether it was in a data blob."""
    file = image / "bootstrap"
    if file.exists():
        return file.read_bytes(), None, False
    (blob,) = (image / "blobs").iterdir()
    data = blob.read_bytes()
    assert detect(memoryview(data)) is BootstrapKind.BLOB
    place = locate_bootstrap(data[len(data) - tail_size(len(data)) :], len(data), blob.name)
    stored = data[place.offset : place.offset + place.stored_size]
    if place.compressor is Compressor.ZSTD:
        stored = zstandard.decompress(stored, max_output_size=place.uncompressed_size)
    return stored, blob_id_from_path(str(blob)), True


def load(image: Path) -> Bootstrap:
    """The bootstrap of an image folder, parsed."""
    data, path_id, extracted = bootstrap_bytes(image)
    return open_bootstrap(memoryview(data), str(image), path_id, extracted=extracted)


def paths(bootstrap: Bootstrap) -> Iterator[tuple[bytes, int]]:
    """Path and ino of every entry, in the order of os.walk: a directory's entries, then each of its directories'."""
    yield b".", bootstrap.root_ino
    pending = [(b"", bootstrap.root_ino)]
    while pending:
        prefix, directory = pending.pop()
        entries = [e for e in bootstrap.readdir(directory, 0) if e.name not in (b".", b"..")]
        for entry in entries:
            yield prefix + entry.name, entry.ino
        folders = [e for e in entries if stat.S_ISDIR(bootstrap.inode(e.ino).mode)]
        pending += [(prefix + e.name + b"/", e.ino) for e in reversed(folders)]


def manifest_rows(bootstrap: Bootstrap, read_file: Callable[[int], bytes] | None = None) -> Iterator[Row]:
    """The rows of the manifest, as a reader of a mount would see them. With `read_file` (by ino) also contents."""
    first_path: dict[int, str] = {}
    for path, ino in paths(bootstrap):
        inode = bootstrap.inode(ino)
        row = _row(bootstrap, escape(path), inode, first_path)
        if read_file is not None and stat.S_ISREG(inode.mode):
            row["sha256"] = hashlib.sha256(read_file(ino)).hexdigest()
        yield row


def _row(bootstrap: Bootstrap, path: str, inode: Inode, first_path: dict[int, str]) -> Row:
    mode = inode.mode
    row: Row = {
        "path": path,
        "mode": oct(mode),
        "uid": inode.uid,
        "gid": inode.gid,
        "mtime_ns": inode.mtime * 10**9 + inode.mtime_ns,
    }
    if not stat.S_ISDIR(mode):
        row["nlink"] = inode.nlink
        if inode.nlink > 1:
            row["same_inode_as"] = first_path.setdefault(inode.ino, path)
    if stat.S_ISREG(mode):
        row["size"] = inode.size
    elif stat.S_ISLNK(mode):
        row["target"] = escape(bootstrap.readlink(inode.ino))
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        row["rdev"] = [os.major(inode.rdev), os.minor(inode.rdev)]
    if xattrs := bootstrap.xattrs(inode.ino):
        row["xattrs"] = {name.decode(): xattrs[name].hex() for name in sorted(xattrs)}
    return row
