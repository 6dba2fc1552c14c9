"""Images as input of the builder: a bootstrap read back into a tree of nodes, with blobs that stand for themselves.

Runs in the process of the command (parent bootstraps, merge, compact, optimize). The bytes are untrusted: the parsers
check them, and a folder that is reached twice is refused here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nydusd.errors import FormatError
from nydusd.formats import toc
from nydusd.formats.chunk_info import CHUNK_INFO_SIZE
from nydusd.formats.model import NAME_LEAST, BlobFeature, BlobInfo, Bootstrap, RawChunk
from nydusd.formats.rafs_v5 import RafsV5
from nydusd.formats.rafs_v6 import RafsV6
from nydusd.image.errors import ImageError
from nydusd.image.node import Node

_MAX_DEPTH = 2048
_NO_DIGEST = bytes(32)
_ADDRESS_SIZE = 8
_LONGEST_PREFIX = len("system.posix_acl_default")
"""Of the names of attributes v6 stores what follows a prefix."""


def tree_of(bootstrap: Bootstrap, where: str) -> Node:
    """The tree of an image. Names of one inode share a node; files have their chunks, with the image's blob indexes.

    Raises `FormatError`.
    """
    loader = _Loader(bootstrap, where)
    return loader.load()


class _Loader:
    def __init__(self, bootstrap: Bootstrap, where: str) -> None:
        self._bootstrap = bootstrap
        self._where = where
        self._nodes: dict[int, Node] = {}
        self._left = bootstrap.length
        self._table: dict[tuple[int, int], RawChunk] = {}
        if isinstance(bootstrap, RafsV6):
            self._table = {(chunk.blob_index, chunk.index): chunk for chunk in bootstrap.raw_chunks()}

    def load(self) -> Node:
        bootstrap = self._bootstrap
        root = self._node(bootstrap.root_ino, b"", None)
        todo = [(bootstrap.root_ino, root, 0)]
        while todo:
            ino, folder, depth = todo.pop()
            if depth > _MAX_DEPTH:
                raise FormatError(self._where, "tree", f"folder {ino} is more than {_MAX_DEPTH} levels deep")
            for entry in bootstrap.readdir(ino, 0):
                if entry.name in (b".", b".."):
                    continue
                self._take(NAME_LEAST, entry.ino)
                node = self._nodes.get(entry.ino)
                if node is None:
                    node = self._node(entry.ino, entry.name, folder)
                    if node.is_folder:
                        todo.append((entry.ino, node, depth + 1))
                elif node.is_folder:
                    raise FormatError(self._where, "tree", f"folder {entry.ino} ({entry.name!r}) is reached twice")
                folder.children[entry.name] = node
        return root

    def _take(self, size: int, ino: int) -> None:
        """Count what is kept of the metadata: nothing in it is for two, but a hostile image may say so of all that it has."""
        self._left -= size
        if self._left < 0:
            raise FormatError(
                self._where, "tree", f"inode {ino}: up to here more than {self._bootstrap.length} bytes have room for"
            )

    def _node(self, ino: int, name: bytes, folder: Node | None) -> Node:
        bootstrap = self._bootstrap
        inode = bootstrap.inode(ino)
        xattrs = bootstrap.xattrs(ino)
        self._take(sum(4 + max(0, len(key) - _LONGEST_PREFIX) + len(value) for key, value in xattrs.items()), ino)
        node = Node(
            name,
            folder,
            inode.mode,
            uid=inode.uid,
            gid=inode.gid,
            mtime=inode.mtime - (1 << 64) if inode.mtime >> 63 else inode.mtime,
            mtime_ns=inode.mtime_ns,
            rdev=inode.rdev,
            xattrs=xattrs,
        )
        if node.is_file:
            node.size = inode.size
            node.set_chunks(self._chunks(ino, inode.size))
        elif node.is_symlink:
            node.target = bootstrap.readlink(ino)
            self._take(len(node.target), ino)
        self._nodes[ino] = node
        return node

    def _chunks(self, ino: int, size: int) -> list[RawChunk]:
        bootstrap = self._bootstrap
        if isinstance(bootstrap, RafsV5):
            self._take(CHUNK_INFO_SIZE * bootstrap.chunk_infos(ino), ino)
            chunks = bootstrap.file_chunks(ino)
            step = bootstrap.chunk_size
            if any(chunk.file_offset != index * step for index, chunk in enumerate(chunks)):
                raise FormatError(
                    self._where, "chunk.file_offset", f"inode {ino} has holes, which builders do not make"
                )
            return chunks
        assert isinstance(bootstrap, RafsV6)
        self._take(_ADDRESS_SIZE * -(-size // bootstrap.chunk_size), ino)
        return [
            self._chunk(ino, address, size, position) for position, address in enumerate(bootstrap.chunk_addresses(ino))
        ]

    def _chunk(self, ino: int, address: tuple[int, int, int], size: int, position: int) -> RawChunk:
        blob, index, uoff = address
        usize = min(self._bootstrap.chunk_size, size - position * self._bootstrap.chunk_size)
        if self._bootstrap.blobs[blob].is_tarfs:
            return RawChunk(_NO_DIGEST, blob, 0, usize, usize, uoff, uoff, 0, index, 0)
        chunk = self._table.get((blob, index))
        if chunk is None or chunk.uoff != uoff or chunk.usize != usize:
            raise FormatError(self._where, "chunk_table", f"inode {ino}: chunk {index} of blob {blob} is not in it so")
        return chunk


def standalone(info: BlobInfo, blobs: Path | None) -> BlobInfo:
    """A blob of another image, for the blob table of a bootstrap outside of it.

    A blob that holds its own bootstrap was written into that one before it was complete; if it is in the folder `blobs`, its
    size and table of contents are taken from there.
    """
    if not info.features & BlobFeature.INLINED_FS_META:
        return info
    info = replace(info, features=info.features & ~BlobFeature.INLINED_FS_META)
    path = blobs / info.meta_blob_id if blobs is not None else None
    if path is None or not path.is_file():
        return info
    size = path.stat().st_size
    if info.features & BlobFeature.SEPARATE:
        return replace(info, meta_digest=_digest_of(info.meta_blob_id, info.meta_digest), meta_size=size)
    info = replace(info, compressed_size=size)
    if not info.features & BlobFeature.HAS_TOC:
        return info
    try:
        with open(path, "rb") as file:
            file.seek(size - toc.tail_size(size))
            tail = file.read(toc.TAIL_SIZE)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    digest, length = toc_summary(tail, size, str(path))
    return replace(info, toc_size=length, toc_digest=digest)


def _digest_of(blob_id: str, default: bytes) -> bytes:
    try:
        digest = bytes.fromhex(blob_id)
    except ValueError:
        return default
    return digest if len(digest) == 32 else default


def toc_summary(tail: bytes, size: int, where: str) -> tuple[bytes, int]:
    """sha256 and length of the table of contents that ends `tail`, as the blob table has them."""
    import hashlib

    entries = toc.parse_toc(tail, size, where)
    length = toc.TOC_ENTRY_SIZE * len(entries) + 512
    return hashlib.sha256(tail[-length:]).digest(), length
