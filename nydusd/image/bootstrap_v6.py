"""Writes a RAFS v6 bootstrap: gives every inode and every block of a folder its place, then the bytes.

Runs in the process of the command, in memory. The places are those of the reference's builder (best fit of inodes and
tails into what folders left over of their blocks), so that both make the same bytes from the same tree.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import deque
from collections.abc import Sequence
from itertools import chain, islice, pairwise
from operator import itemgetter
from struct import Struct

from nydusd.formats.blob_meta import align_page
from nydusd.formats.chunk_info import CHUNK_INFO_SIZE
from nydusd.formats.model import BlobFeature, BlobInfo
from nydusd.formats.rafs_v6_super import BLOB_ENTRY_SIZE, MAX_BLOBS, SLOT_SIZE, SLOTS_OFFSET
from nydusd.formats.superblock import MAX_NAME, MAX_SYMLINK, SuperFlag
from nydusd.formats.write.rafs_v6 import (
    CHUNK_BASED,
    DEVICE_ALIGNMENT,
    EXTENDED_SIZE,
    FLAT_INLINE,
    FLAT_PLAIN,
    Tables,
    directory_size,
    pack_blob,
    pack_directory,
    pack_ext,
    pack_slot,
    pack_super,
    pack_xattrs,
    put_inode,
)
from nydusd.image.errors import ImageError, SourceError, show
from nydusd.image.node import Folder, Node, folders, number_all, with_file_offset

_SLOT = 32
_PAGE = 4096
_ADDRESS = Struct("<HHI")
_U32 = Struct("<I")
_PLACE = Struct("<32xI20xQQI4x")  # of a chunk's record: blob index, uncompressed offset, file offset, index
_CHUNK_KEY = itemgetter(slice(36))  # digest and blob index, which begin the record; the index is below 256
_INDEXED = 0x20
_MAX_BLOCK = 0xFFFFFFFF


class _Space:
    """The growing metadata area, and the blocks in it that have room left, by that room in slots of 32 bytes."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.end = _PAGE  # one page before the first inode, so that no inode has number 0
        self._left: list[deque[int]] = [deque() for _ in range(block // _SLOT)]
        self._rooms = 0  # a bit for each of them that is not empty

    def align(self, unit: int) -> None:
        self.end = -(-self.end // unit) * unit

    def take(self, size: int) -> int:
        """Room for `size` bytes inside a block that was left over; 0 if there is none."""
        if size >= self.block:
            return 0
        slots = -(-size // _SLOT)
        fitting = self._rooms >> slots
        if not fitting:
            return 0
        room = slots + (fitting & -fitting).bit_length() - 1
        blocks = self._left[room]
        at = blocks.popleft() + self.block - room * _SLOT
        if not blocks:
            self._rooms ^= 1 << room
        self.leave(at + slots * _SLOT)
        return at

    def append(self, size: int) -> int:
        at = self.end
        self.end += size
        return at

    def leave(self, at: int) -> None:
        """The rest of the block from `at` on may be used by others."""
        if at % self.block:
            room = (self.block - at % self.block) // _SLOT
            self._left[room].append(at - at % self.block)
            self._rooms |= 1 << room

    def next_block(self) -> None:
        self.leave(self.end)
        self.align(self.block)


class BootstrapV6:
    """One bootstrap. `flags` are those of the superblock besides xattr, tarfs and digests, which are found here.

    What is known of an inode's place is kept in arrays by its number: where it is and where its whole blocks of data are,
    relative to the metadata area (0: not placed), and its layout.
    """

    def __init__(
        self,
        root: Node,
        blobs: Sequence[BlobInfo],
        *,
        flags: int,
        chunk_size: int,
        prefetch: Sequence[Node] = (),
        tarfs: bool = False,
    ) -> None:
        """Lays the tree out. Raises `SourceError` or `FormatError` for what the format cannot express."""
        if len(blobs) >= MAX_BLOBS:
            raise ImageError(f"{len(blobs)} blobs; an image has at most {MAX_BLOBS - 1}")
        self._blobs = blobs
        self._flags = flags
        self._chunk_size = chunk_size
        self._tarfs = tarfs
        self._block = 512 if tarfs else _PAGE
        self._prefetch = prefetch if blobs else ()
        self._root = root
        self.names = number_all(root)
        self._offsets = array("Q", bytes(8 * (self.names + 1)))
        self._data_at = array("Q", bytes(8 * (self.names + 1)))
        self._layouts = bytearray(self.names + 1)
        self._sizes: dict[int, int] = {}  # of folders
        self._xattrs: dict[int, bytes] = {}  # of those that have any
        self._lay_out()

    def _lay_out(self) -> None:
        space = _Space(self._block)
        self._check(self._root)
        number = 1
        for folder in folders(self._root):
            entries = folder.entries
            for name, child in entries:
                number += 1
                if len(name) > MAX_NAME:
                    raise SourceError(child.path, f"a name of {len(name)} bytes; at most {MAX_NAME} fit")
                if child.number == number:
                    self._check(child)
            self._place_folder(folder, space)
            for _, child in entries:
                if not self._offsets[child.number] and not child.is_folder:
                    self._place(child, space)
        self._end = space.end

    def _check(self, node: Node) -> None:
        if node.is_symlink and not 0 < len(node.target) <= MAX_SYMLINK:
            raise SourceError(node.path, f"a symlink's target of {len(node.target)} bytes; 1 to {MAX_SYMLINK} fit")
        if node.xattrs:
            self._xattrs[node.number] = pack_xattrs(node.xattrs, show(node.path))

    def _head(self, node: Node) -> int:
        """Bytes of an inode with its attributes."""
        return EXTENDED_SIZE + len(self._xattrs.get(node.number, b""))

    def _place_folder(self, folder: Folder, space: _Space) -> None:
        size = directory_size(_with_dots(folder.entries), self._block)
        self._sizes[folder.node.number] = size
        self._place_with_tail(folder.node, size, space)

    def _place(self, node: Node, space: _Space) -> None:
        if node.is_symlink:
            self._place_with_tail(node, len(node.target), space)
            return
        size = self._head(node)
        if node.is_file:
            self._layouts[node.number] = CHUNK_BASED
            size = align8(size) + _ADDRESS.size * (len(node.packed) // CHUNK_INFO_SIZE)
            self._offsets[node.number] = space.take(size) or space.append(size)
        else:
            self._offsets[node.number] = space.append(size)
        space.align(_SLOT)

    def _place_with_tail(self, node: Node, data: int, space: _Space) -> None:
        """An inode with data of its own: the part behind the last whole block stands behind the inode if both fit
        into one block, which the kernel demands."""
        number, head = node.number, self._head(node)
        tail = data % self._block
        # A symlink's target is not split: readers expect it in one place.
        whole = node.is_symlink and data > self._block
        if tail and head + tail <= self._block and not whole:
            self._layouts[number] = FLAT_INLINE
            size = head + tail
            offset = space.take(size)
            if not offset:
                if self._block - space.end % self._block < size:
                    space.next_block()
                offset = space.append(size)
            self._offsets[number] = offset
            if data != tail:
                space.next_block()
            self._data_at[number] = space.append(data - tail)
        else:
            self._layouts[number] = FLAT_PLAIN
            self._offsets[number] = space.take(head) or space.append(head)
            space.next_block()
            self._data_at[number] = space.append(data)
            space.align(self._block)
        space.align(_SLOT)

    def pack(self) -> bytearray:
        """The bytes of the file. Raises `ImageError` when the image is too large for the format."""
        blob_table = align_page(SLOTS_OFFSET + SLOT_SIZE * len(self._blobs))
        prefetch_at = blob_table + BLOB_ENTRY_SIZE * len(self._blobs)
        prefetch_size = _U32.size * len(self._prefetch)
        meta = align_page(prefetch_at + prefetch_size) if self._blobs else 0
        image = bytearray(align_page(meta + self._end))
        table: list[bytes] = []
        number = 1
        for folder in folders(self._root):
            self._write_folder(image, folder, meta)
            for _, child in folder.entries:
                number += 1
                if child.number == number and not child.is_folder:
                    self._write(image, child, meta, table)
        nids = [self._nid(node) for node in self._prefetch]
        image[prefetch_at : prefetch_at + prefetch_size] = b"".join(_U32.pack(nid) for nid in nids)
        chunk_table = len(image)
        table.sort(key=_CHUNK_KEY)
        for record, follower in zip(table, chain(islice(table, 1, None), (b"",)), strict=False):
            # Of the files that share a chunk the last one says where in the file it is.
            if _CHUNK_KEY(record) != _CHUNK_KEY(follower):
                image += record
        tables = Tables(blob_table, prefetch_at, prefetch_size, meta, chunk_table, len(image) - chunk_table)
        image += bytes(-len(image) % _PAGE)
        self._write_front(image, tables)
        return image

    def _nid(self, node: Node) -> int:
        return self._offsets[node.number] // _SLOT

    def _write_front(self, image: bytearray, tables: Tables) -> None:
        position, blocks = len(image), 0
        for blob in self._blobs:
            position = -(-position // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
            if position // self._block > _MAX_BLOCK or blob.uncompressed_size // self._block > _MAX_BLOCK:
                raise ImageError(
                    f"blob {blob.blob_id}: {blob.uncompressed_size} bytes are more than the format has blocks"
                )
            at = SLOTS_OFFSET + SLOT_SIZE * blob.index
            image[at : at + SLOT_SIZE] = pack_slot(blob, self._block, position)
            at = tables.blob_table + BLOB_ENTRY_SIZE * blob.index
            image[at : at + BLOB_ENTRY_SIZE] = pack_blob(blob)
            blocks += blob.uncompressed_size // self._block
            position += blob.uncompressed_size // self._block * self._block
        if blocks > _MAX_BLOCK:
            raise ImageError(f"{blocks} blocks of data; the format ends at {_MAX_BLOCK}")
        image[1024:1152] = pack_super(
            block=self._block,
            root_nid=self._nid(self._root),
            names=self.names,
            blocks=blocks,
            meta=tables.meta,
            devices=len(self._blobs),
        )
        flags = self._flags
        if self._xattrs:
            flags |= SuperFlag.HAS_XATTR
        # The reference sets this for an image without blobs, too: no blob is without digests.
        if all(blob.features & BlobFeature.INLINED_CHUNK_DIGEST for blob in self._blobs):
            flags |= SuperFlag.INLINED_CHUNK_DIGEST
        if self._tarfs:
            flags |= SuperFlag.TARFS
        image[1152:1408] = pack_ext(flags, self._chunk_size, len(self._blobs), tables)

    def _write_inode(self, image: bytearray, node: Node, meta: int, size: int, union: int) -> int:
        """The inode and its attributes; where what follows them begins."""
        at = meta + self._offsets[node.number]
        xattrs = self._xattrs.get(node.number, b"")
        put_inode(
            image,
            at,
            layout=self._layouts[node.number],
            xattr_size=len(xattrs),
            mode=node.mode,
            size=size,
            union=union,
            number=node.number,
            uid=node.uid,
            gid=node.gid,
            mtime=node.mtime,
            mtime_ns=node.mtime_ns,
            nlink=node.nlink,
        )
        at += EXTENDED_SIZE
        if xattrs:
            image[at : at + len(xattrs)] = xattrs
        return at + len(xattrs)

    def _write(self, image: bytearray, node: Node, meta: int, table: list[bytes]) -> None:
        if node.is_file:
            at = self._write_inode(image, node, meta, node.size, self._chunk_header(node))
            self._write_addresses(image, align8(at), node, table)
        elif node.is_symlink:
            self._write_with_tail(image, node, meta, node.target)
        else:
            self._write_inode(image, node, meta, 0, node.rdev)

    def _write_with_tail(self, image: bytearray, node: Node, meta: int, data: bytes) -> None:
        data_at = meta + self._data_at[node.number]
        at = self._write_inode(image, node, meta, len(data), data_at // self._block)
        whole = len(data) - (len(data) % self._block if self._layouts[node.number] == FLAT_INLINE else 0)
        image[data_at : data_at + whole] = data[:whole]
        image[at : at + len(data) - whole] = data[whole:]

    def _write_folder(self, image: bytearray, folder: Folder, meta: int) -> None:
        offsets = self._offsets
        entries = [(name, offsets[child.number] // _SLOT, child.mode) for name, child in folder.entries]
        for name, node in ((b".", folder.node), (b"..", folder.parent)):
            insort(entries, (name, self._nid(node), node.mode))
        self._write_with_tail(image, folder.node, meta, pack_directory(entries, self._block))

    def _chunk_header(self, node: Node) -> int:
        """The exponent of the chunk size. Chunks that are neighbours in one blob are shown to the kernel as one large
        chunk, so that files share its page cache."""
        size = self._chunk_size
        if node.size > size:
            chunks = node.chunks
            if all(a.blob_index == b.blob_index and a.uoff + size == b.uoff for a, b in pairwise(chunks)):
                size = 1 << (node.size - 1).bit_length()
        return _INDEXED | min((size // self._block).bit_length() - 1, 31)

    def _write_addresses(self, image: bytearray, at: int, node: Node, table: list[bytes]) -> None:
        packed = node.packed
        for position in range(0, len(packed), CHUNK_INFO_SIZE):
            record = packed[position : position + CHUNK_INFO_SIZE]
            blob_index, uoff, file_offset, index = _PLACE.unpack(record)
            block = uoff // self._block
            if block > _MAX_BLOCK:
                raise SourceError(node.path, f"block {block} of the blob; the format ends at {_MAX_BLOCK}")
            _ADDRESS.pack_into(image, at, index & 0xFFFF, blob_index + 1 | index >> 16 << 8, block)
            at += _ADDRESS.size
            begin = position // CHUNK_INFO_SIZE * self._chunk_size
            table.append(record if file_offset == begin else with_file_offset(record, begin))


def align8(size: int) -> int:
    return size + 7 & ~7


def _with_dots(entries: Sequence[tuple[bytes, Node]]) -> list[bytes]:
    names = [name for name, _ in entries]
    insort(names, b".")
    insort(names, b"..")
    return names
