"""Answers questions about an image's metadata: the commands of `nydus-image inspect`. Runs in the process of the command.

A session has a current folder. In request mode `stats`, `blobs` and `prefetch` answer with JSON, as scripts expect.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from nydusd.errors import NydusError
from nydusd.formats.model import BlobFeature, Bootstrap, RawChunk
from nydusd.formats.rafs_v5 import RafsV5
from nydusd.formats.rafs_v6 import RafsV6
from nydusd.image.errors import ImageError, show
from nydusd.image.unpack import paths

USAGE = """\
stats           what the superblock says
ls              list the current folder
cd DIR          change the current folder
stat FILE       attributes and chunks of a file in it
blobs           the blob table
prefetch        the files of the prefetch table
chunk OFFSET    the files that have the chunk at this offset of the stored blob
icheck INODE    paths and attributes of an inode
exit            leave"""

_KINDS = {stat.S_IFREG: "-", stat.S_IFDIR: "d", stat.S_IFLNK: "l"}
_FLAGS = ("COMPRESSED", "HOLE", "ENCRYPTED", "BATCH", "CRC32")


class Leave(Exception):
    """`exit` was said."""


class _Command(NamedTuple):
    run: Callable[[Session, bytes], Iterator[str]]
    takes: bool


class Session:
    """One user's questions about one image."""

    def __init__(self, bootstrap: Bootstrap, *, request: bool = False) -> None:
        self._bootstrap = bootstrap
        self._request = request
        self._way: list[tuple[bytes, int]] = [(b"", bootstrap.root_ino)]

    def execute(self, line: bytes) -> list[str]:
        """The lines of an answer. Raises `Leave`, `ImageError` for a question that is none, and what the parser raises."""
        word, _, argument = line.strip().partition(b" ")
        name, argument = word.decode("utf-8", "replace"), argument.strip()
        if name in ("exit", "q"):
            raise Leave
        if not name:
            return []
        if name == "help":
            return USAGE.splitlines()
        command = _COMMANDS.get(name)
        if command is None or command.takes != bool(argument):
            raise ImageError(f"unknown command, or one without its argument: {show(line.strip())}\n{USAGE}")
        return list(command.run(self, argument))

    @property
    def place(self) -> str:
        return "/" + "/".join(show(name) for name, _ in self._way[1:])

    def _stats(self, _: bytes) -> Iterator[str]:
        facts = self._bootstrap.superblock_facts()
        if self._request:
            yield json.dumps({"inodes_count": self._bootstrap.inode_count})
            return
        yield _row("Version", self._bootstrap.version)
        yield _row("Inodes Count", self._bootstrap.inode_count)
        yield _row("Chunk Size", f"{self._bootstrap.chunk_size // 1024}KB")
        yield _row("Root Inode", self._bootstrap.root_ino)
        yield _row("Flags", f"{self._bootstrap.flags:#x}")
        for key in ("blob_table_offset", "blob_table_size", "prefetch_table_offset", "prefetch_table_entries"):
            yield _row(key.replace("_", " ").capitalize(), f"{facts[key]:#x}")
        for key in ("chunk_table_offset", "chunk_table_size"):
            yield _row(key.replace("_", " ").capitalize(), f"{facts[key]:#x}")

    def _ls(self, _: bytes) -> Iterator[str]:
        for entry in self._bootstrap.readdir(self._way[-1][1], 0):
            if entry.name not in (b".", b".."):
                kind = _KINDS.get(stat.S_IFMT(self._bootstrap.inode(entry.ino).mode), " ")
                yield f"{kind}    {entry.ino:<8} {show(entry.name)}"

    def _cd(self, name: bytes) -> Iterator[str]:
        for part in name.split(b"/"):
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(self._way) > 1:
                    self._way.pop()
                continue
            ino = self._bootstrap.lookup(self._way[-1][1], part)
            if ino is None or not stat.S_ISDIR(self._bootstrap.inode(ino).mode):
                raise ImageError(f"{show(part)}: no folder of this name")
            self._way.append((part, ino))
        yield from ()

    def _stat(self, name: bytes) -> Iterator[str]:
        parent = self._way[-1][1]
        ino = parent if name == b"." else self._bootstrap.lookup(parent, name)
        if ino is None:
            raise ImageError(f"{show(name)}: no file of this name")
        yield from self._attributes(ino, name)
        if stat.S_ISREG(self._bootstrap.inode(ino).mode):
            yield "Chunk list:"
            for number, chunk in enumerate(self._chunks(ino)):
                yield f"  {number} -> file offset {number * self._bootstrap.chunk_size}"
                yield from ("    " + line for line in self._chunk_lines(chunk))

    def _attributes(self, ino: int, name: bytes) -> Iterator[str]:
        inode = self._bootstrap.inode(ino)
        yield _row("Inode Number", ino)
        yield _row("Name", show(name))
        yield _row("Size", inode.size)
        yield _row("Mode", f"{inode.mode:#x}")
        yield _row("Permissions", f"{stat.S_IMODE(inode.mode):o}")
        for key, value in (("Nlink", inode.nlink), ("UID", inode.uid), ("GID", inode.gid), ("Blocks", inode.blocks)):
            yield _row(key, value)
        yield _row("Mtime", inode.mtime)
        yield _row("MtimeNsec", inode.mtime_ns)
        if stat.S_ISLNK(inode.mode):
            yield _row("Target", show(self._bootstrap.readlink(ino)))
        for name, content in sorted(self._bootstrap.xattrs(ino).items()):
            yield _row("Attribute", f"{show(name)} = {content!r}")

    def _chunks(self, ino: int) -> list[RawChunk]:
        if isinstance(self._bootstrap, RafsV5):
            return self._bootstrap.file_chunks(ino)
        assert isinstance(self._bootstrap, RafsV6)
        table = {(chunk.blob_index, chunk.index): chunk for chunk in self._bootstrap.raw_chunks()}
        empty = bytes(32)
        return [
            table.get((blob, index)) or RawChunk(empty, blob, 0, 0, 0, uoff, uoff, 0, index, 0)
            for blob, index, uoff in self._bootstrap.chunk_addresses(ino)
        ]

    def _chunk_lines(self, chunk: RawChunk) -> Iterator[str]:
        flags = [name for bit, name in enumerate(_FLAGS) if chunk.flags >> bit & 1]
        yield f"chunk index {chunk.index}, flags {'|'.join(flags) or 'none'}, crc32 {chunk.crc:#010x}"
        yield f"compressed size {chunk.csize}, offset {chunk.coff}; decompressed size {chunk.usize}, offset {chunk.uoff}"
        yield f"blob id: {self._bootstrap.blobs[chunk.blob_index].blob_id}"
        yield f"chunk id: {chunk.digest.hex()}"

    def _blobs(self, _: bytes) -> Iterator[str]:
        if self._request:
            yield json.dumps(
                [
                    {
                        "blob_id": blob.blob_id,
                        "readahead_offset": blob.prefetch_offset,
                        "readahead_size": blob.prefetch_size,
                        "decompressed_size": blob.uncompressed_size,
                        "compressed_size": blob.compressed_size,
                    }
                    for blob in self._bootstrap.blobs
                ]
            )
            return
        for blob in self._bootstrap.blobs:
            features = [feature.name or "" for feature in BlobFeature if blob.features & feature]
            yield _row("Blob Index", blob.index)
            yield _row("Blob ID", blob.blob_id)
            yield _row("Meta Blob ID", blob.meta_blob_id)
            yield _row("Blob Size", blob.compressed_size)
            yield _row("Compressed Data Size", blob.compressed_data_size)
            yield _row("Uncompressed Data Size", blob.uncompressed_size)
            yield _row("Features", " ".join(features))
            yield _row("Compressor", blob.compressor.name.lower())
            yield _row("Digester", blob.digester.name.lower())
            yield _row("Cipher", blob.cipher.name.lower())
            yield _row("Chunk Size", f"{blob.chunk_size:#x}")
            yield _row("Chunk Count", blob.chunk_count)
            yield _row("Prefetch Size", blob.prefetch_size)
            yield _row("Meta Compressor", blob.ci_compressor.name.lower())
            yield _row("Meta Offset", blob.ci_offset)
            yield _row("Meta Compressed Size", blob.ci_compressed_size)
            yield _row("Meta Uncompressed Size", blob.ci_uncompressed_size)
            yield _row("ToC Digest", blob.toc_digest.hex())
            yield _row("ToC Size", blob.toc_size)
            yield _row("RAFS Blob Digest", blob.meta_digest.hex())
            yield _row("RAFS Blob Size", blob.meta_size)
            yield ""

    def _prefetch(self, _: bytes) -> Iterator[str]:
        inos = self._bootstrap.prefetch_inodes()
        found = self._paths_of(set(inos))
        if self._request:
            yield json.dumps([{"inode": ino, "path": found[ino]} for ino in inos])
            return
        yield f"Total Prefetching Files: {len(inos)}"
        for ino in inos:
            yield f"Inode Number:{ino:10} | Path: {' '.join(found[ino])}"

    def _paths_of(self, inos: set[int]) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {ino: [] for ino in inos}
        for path, ino in paths(self._bootstrap):
            if ino in inos:
                found[ino].append("/" + show(path).removeprefix("./").rstrip("/"))
        return found

    def _chunk(self, text: bytes) -> Iterator[str]:
        offset = _number(text)
        for path, ino in paths(self._bootstrap):
            if not stat.S_ISREG(self._bootstrap.inode(ino).mode):
                continue
            for chunk in self._chunks(ino):
                if chunk.coff == offset:
                    yield f"File: /{show(path)}"
                    yield from ("  " + line for line in self._chunk_lines(chunk))

    def _icheck(self, text: bytes) -> Iterator[str]:
        ino = _number(text)
        found = self._paths_of({ino})[ino]
        if not found:
            raise ImageError(f"{ino}: no inode of this number is in the tree")
        yield from found
        yield from self._attributes(ino, found[0].rsplit("/", 1)[-1].encode())


_COMMANDS = {
    "stats": _Command(Session._stats, takes=False),
    "ls": _Command(Session._ls, takes=False),
    "cd": _Command(Session._cd, takes=True),
    "stat": _Command(Session._stat, takes=True),
    "blobs": _Command(Session._blobs, takes=False),
    "prefetch": _Command(Session._prefetch, takes=False),
    "chunk": _Command(Session._chunk, takes=True),
    "icheck": _Command(Session._icheck, takes=True),
}


def _row(key: str, value: object) -> str:
    return f"{key + ':':<24}{value}"


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ImageError(f"{show(text)} is no number")
    return int(text)


def answer(session: Session, line: bytes) -> list[str]:
    """As `Session.execute`, but an error is the answer: a user may go on asking."""
    try:
        return session.execute(line)
    except NydusError as error:
        return [f"Error: {error}"]
