"""Checks an image: all of its metadata, and with its blobs at hand all of its data. Runs in the process of the command."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass

from nydusd.codec.digest import hasher_for
from nydusd.errors import FormatError
from nydusd.formats.rafs_v5 import RafsV5
from nydusd.formats.superblock import flags_digester
from nydusd.image.load import tree_of
from nydusd.image.node import number_all
from nydusd.image.reader import ImageReader
from nydusd.image.unpack import paths


@dataclass(frozen=True)
class Checked:
    """How much was looked at. `chunks` were read and had their digests; 0 without blobs."""

    names: int
    chunks: int


def check(reader: ImageReader, where: str, say: Callable[[str], None] | None = None, *, data: bool) -> Checked:
    """Read everything. Raises `FormatError`, `CorruptChunkError` or `BackendError` for the first thing that is wrong.

    `say` gets a line for every inode; with `data` every chunk of every blob is read and compared with its digest.
    """
    bootstrap = reader.bootstrap
    tree = tree_of(bootstrap, where)
    count = number_all(tree)
    for path, ino in paths(bootstrap):
        inode = bootstrap.inode(ino)
        if say is not None:
            say(f"inode {ino}: mode {inode.mode:#o}, nlink {inode.nlink}, size {inode.size}: {path!r}")
    bootstrap.prefetch_inodes()
    if isinstance(bootstrap, RafsV5):
        _check_digests(bootstrap, where)
    chunks = 0
    if data:
        for index in range(len(bootstrap.blobs)):
            blob = reader.blob(index)
            for chunk in blob.described():
                blob.plain(chunk)
                chunks += 1
            reader.let_go(index)
    return Checked(count, chunks)


def _check_digests(bootstrap: RafsV5, where: str) -> None:
    """v5: the digest of every inode is that of what it holds."""
    hasher = hasher_for(flags_digester(bootstrap.flags))
    found: dict[int, bytes] = {}
    order = [bootstrap.root_ino]
    for ino in order:
        if stat.S_ISDIR(bootstrap.inode(ino).mode):
            order += [entry.ino for entry in bootstrap.readdir(ino, 0) if entry.name not in (b".", b"..")]
    for ino in reversed(order):
        if ino in found:
            continue
        mode = bootstrap.inode(ino).mode
        if stat.S_ISDIR(mode):
            entries = [entry.ino for entry in bootstrap.readdir(ino, 0) if entry.name not in (b".", b"..")]
            content = b"".join(found[entry] for entry in entries)
        elif stat.S_ISREG(mode):
            content = b"".join(chunk.digest for chunk in bootstrap.file_chunks(ino))
        else:
            content = bootstrap.readlink(ino) if stat.S_ISLNK(mode) else b""
        found[ino] = hasher(content)
        if found[ino] != bootstrap.inode_digest(ino):
            raise FormatError(
                where, "inode.digest", f"inode {ino}: {bootstrap.inode_digest(ino).hex()} is not its content's"
            )
