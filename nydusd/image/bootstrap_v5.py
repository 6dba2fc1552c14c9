"""Writes a RAFS v5 bootstrap: superblock, tables, and a record for every name, with its digest over the tree.

Runs in the process of the command, in memory. A hard link has a record a name; they have the number of the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct

from nydusd.codec.digest import hasher_for
from nydusd.formats.chunk_info import CHUNK_INFO_SIZE
from nydusd.formats.detect import V5_MAGIC, V5_VERSION
from nydusd.formats.model import BlobInfo, Digester
from nydusd.formats.rafs_v5_super import MAX_SIZE, SUPERBLOCK_SIZE
from nydusd.formats.superblock import MAX_NAME, MAX_SYMLINK, SuperFlag
from nydusd.image.errors import ImageError, SourceError
from nydusd.image.node import Node, folders, number_all, with_file_offset

_SUPER = Struct("<IIIIQQQQQIIIIQ")
_RECORD = Struct("<32sQQIIIIQQQIIIHHIIQ8x")
_EXT = Struct("<IIQQ40x")
_PREFETCH = Struct("<II")
_U32 = Struct("<I")
_DIGEST = Struct("<32s")
_FLAG_SYMLINK, _FLAG_XATTR = 1, 4
_MAX_XATTRS = 1 << 24


class _Name:
    """A name: its inode, its own number, and the number of the folder that it is in."""

    __slots__ = ("child_index", "name", "node", "number", "offset", "parent")

    def __init__(self, name: bytes, node: Node, number: int, parent: int) -> None:
        self.name = name
        self.node = node
        self.number = number
        self.parent = parent
        self.child_index = 0
        self.offset = 0


class BootstrapV5:
    """One bootstrap. `flags` are those of the superblock besides xattr, which is found here."""

    def __init__(
        self,
        root: Node,
        blobs: Sequence[BlobInfo],
        *,
        flags: int,
        chunk_size: int,
        digester: Digester,
        prefetch: Sequence[Node] = (),
    ) -> None:
        """Numbers the tree. Raises `SourceError` for what the format cannot express."""
        self._root = root
        self._blobs = blobs
        self._flags = flags
        self._chunk_size = chunk_size
        self._prefetch = prefetch
        self._hash: Callable[[bytes], bytes] = hasher_for(digester)
        number_all(root)
        self._names: list[_Name] = [_Name(b"/", root, 1, 0)]
        self._entries: dict[int, tuple[_Name, list[_Name]]] = {}
        self._number_all()
        self.names = len(self._names)

    def _number_all(self) -> None:
        own = {1: self._names[0]}
        for folder in folders(self._root):
            holder = own.pop(folder.node.number)
            holder.child_index = len(self._names) + 1
            entries = []
            for text, child in folder.entries:
                self._check(text, child)
                number = len(self._names) + 1
                name = _Name(text, child, number, folder.node.number)
                self._names.append(name)
                entries.append(name)
                if child.is_folder:
                    own[number] = name
            self._entries[folder.node.number] = (holder, entries)

    @staticmethod
    def _check(name: bytes, node: Node) -> None:
        if len(name) > MAX_NAME:
            raise SourceError(node.path, f"a name of {len(name)} bytes; at most {MAX_NAME} fit")
        if node.is_symlink and not 0 < len(node.target) <= MAX_SYMLINK:
            raise SourceError(node.path, f"a symlink's target of {len(node.target)} bytes; 1 to {MAX_SYMLINK} fit")

    def pack(self) -> bytearray:
        """The bytes of the file. Raises `ImageError` when there are more than the format allows."""
        digests = self._digests()
        prefetch = _padded(b"".join(_U32.pack(node.number) for node in self._prefetch))
        inode_table = _padded(bytes(4 * len(self._names)))
        blob_table, ext_table = self._blob_tables()
        prefetch_at = SUPERBLOCK_SIZE + len(inode_table)
        blob_at = prefetch_at + len(prefetch)
        ext_at = blob_at + len(blob_table)
        records = bytearray()
        begin = ext_at + len(ext_table)
        flags = self._flags
        for name in self._depth_first():
            name.offset = begin + len(records)
            if name.node.xattrs:
                flags |= SuperFlag.HAS_XATTR
            records += self._record(name, digests[name.node.number])
            if begin + len(records) > MAX_SIZE:
                raise ImageError(f"the metadata is larger than the {MAX_SIZE} bytes that RAFS v5 allows: take v6")
        inodes = _padded(b"".join(_U32.pack(name.offset >> 3) for name in self._names))
        head = _SUPER.pack(
            V5_MAGIC,
            V5_VERSION,
            SUPERBLOCK_SIZE,
            self._chunk_size,
            flags,
            len(digests),
            SUPERBLOCK_SIZE,
            prefetch_at,
            blob_at,
            len(self._names),
            len(self._prefetch),
            len(blob_table),
            len(self._blobs),
            ext_at,
        )
        records[:0] = b"".join((head.ljust(SUPERBLOCK_SIZE, b"\0"), inodes, prefetch, blob_table, ext_table))
        return records

    def _blob_tables(self) -> tuple[bytes, bytes]:
        entries = [
            _PREFETCH.pack(blob.prefetch_offset, blob.prefetch_size) + blob.blob_id.encode("ascii")
            for blob in self._blobs
        ]
        table = _padded(b"\0".join(entries))
        sizes = [
            _EXT.pack(blob.chunk_count, blob.features, blob.uncompressed_size, blob.compressed_size)
            for blob in self._blobs
        ]
        return table, b"".join(sizes)

    def _depth_first(self) -> list[_Name]:
        """The names in the order of the records: each folder's entries where the folder is."""
        order = []
        todo = [self._names[0]]
        while todo:
            name = todo.pop()
            order.append(name)
            if name.node.is_folder:
                todo += reversed(self._entries[name.node.number][1])
        return order

    def _digests(self) -> dict[int, bytes]:
        """The digest of every inode: over its chunks' digests, its target, or the digests of what is in it."""
        found: dict[int, bytes] = {}
        for name in self._names:
            node = name.node
            if node.number in found or node.is_folder:
                continue
            digests = b"".join(
                _DIGEST.unpack_from(node.packed, at)[0] for at in range(0, len(node.packed), CHUNK_INFO_SIZE)
            )
            found[node.number] = self._hash(digests if node.is_file else node.target)
        for key, (_, entries) in reversed(self._entries.items()):  # below first
            found[key] = self._hash(b"".join(found[name.node.number] for name in entries))
        return found

    def _record(self, name: _Name, digest: bytes) -> bytes:
        node = name.node
        xattrs = _pack_xattrs(node)
        size, count, index = node.size, len(node.packed) // CHUNK_INFO_SIZE, 0
        if node.is_folder:
            _, entries = self._entries[node.number]
            size = max(4096, -(-sum(len(entry.name) + 8 for entry in entries) // 4096) * 4096)
            count, index = len(entries), name.child_index
        elif node.is_symlink:
            size = len(node.target)
        flags = (_FLAG_SYMLINK if node.is_symlink else 0) | (_FLAG_XATTR if xattrs else 0)
        head = _RECORD.pack(
            digest,
            name.parent,
            node.number,
            node.uid,
            node.gid,
            0,
            node.mode,
            size,
            -(-(size + max(len(xattrs) - 8, 0)) // 512),
            flags,
            node.nlink,
            index,
            count,
            len(name.name),
            len(node.target),
            node.rdev,
            node.mtime_ns,
            node.mtime & 0xFFFFFFFFFFFFFFFF,
        )
        parts = [head, _padded(name.name), _padded(node.target), xattrs]
        for position in range(count if node.is_file else 0):
            record = node.packed[position * CHUNK_INFO_SIZE : (position + 1) * CHUNK_INFO_SIZE]
            parts.append(with_file_offset(record, position * self._chunk_size))
        record = b"".join(parts)
        assert len(record) % 8 == 0 and CHUNK_INFO_SIZE % 8 == 0
        return record


def _pack_xattrs(node: Node) -> bytes:
    """u64 size, then length, name, NUL and value of each; padded to 8. Empty for none."""
    pairs = bytearray()
    for name in sorted(node.xattrs):
        value = node.xattrs[name]
        if len(name) > MAX_NAME or b"\0" in name:
            raise SourceError(node.path, f"attribute {name!r}: a name of 1 to {MAX_NAME} bytes without NUL fits")
        pairs += _U32.pack(len(name) + 1 + len(value)) + name + b"\0" + value
    if len(pairs) > _MAX_XATTRS:
        raise SourceError(node.path, f"{len(pairs)} bytes of attributes; at most {_MAX_XATTRS} fit")
    return len(pairs).to_bytes(8, "little") + _padded(bytes(pairs)) if pairs else b""


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)
