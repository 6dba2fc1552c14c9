"""Writes a RAFS v6 bootstrap: gives every inode and every block of a folder its place, then the bytes.

Runs in the process of the command, in memory. The places are those of the reference's builder (best fit of inodes and
tails into what folders left over of their blocks), so that both make the same bytes from the same tree.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

from nydusd.formats.blob_meta import align_page
from nydusd.formats.chunk_info import CHUNK_INFO, CHUNK_INFO_SIZE
from nydusd.formats.model import BlobFeature, BlobInfo, RawChunk
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
    pack_inode,
    pack_slot,
    pack_super,
    pack_xattrs,
)
from nydusd.image.errors import ImageError, SourceError, show
from nydusd.image.node import Folder, Node, count_links, folders

_SLOT = 32
_PAGE = 4096
_ADDRESS = Struct("<HHI")
_U32 = Struct("<I")
_INDEXED = 0x20
_MAX_BLOCK = 0xFFFFFFFF


@dataclass(eq=False, slots=True)
class _Place:
    """Where an inode is, relative to the metadata area: its own bytes, its whole blocks of data, its layout."""

    node: Node
    parent: Node
    number: int
    xattrs: bytes
    size: int = 0
    offset: int = 0
    data_at: int = 0
    layout: int = FLAT_PLAIN

    @property
    def head(self) -> int:
        return EXTENDED_SIZE + len(self.xattrs)


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
    """One bootstrap. `flags` are those of the superblock besides xattr, tarfs and digests, which are found here."""

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
        count_links(root)
        self._places: dict[int, _Place] = {}
        self._order: list[_Place] = []
        self.names = 0
        self._lay_out()

    def _lay_out(self) -> None:
        space = _Space(self._block)
        number = 1
        self._add(self._root, self._root, number)
        for folder in folders(self._root):
            for name, child in folder.entries:
                number += 1
                if len(name) > MAX_NAME:
                    raise SourceError(child.path, f"a name of {len(name)} bytes; at most {MAX_NAME} fit")
                if id(child) not in self._places:
                    self._add(child, folder.node, number)
            self._place_folder(folder, space)
            for _, child in folder.entries:
                place = self._places[id(child)]
                if not child.is_folder and not place.offset:
                    self._place(place, space)
        self.names = number
        self._end = space.end

    def _add(self, node: Node, parent: Node, number: int) -> None:
        if node.is_symlink and not 0 < len(node.target) <= MAX_SYMLINK:
            raise SourceError(node.path, f"a symlink's target of {len(node.target)} bytes; 1 to {MAX_SYMLINK} fit")
        place = _Place(node, parent, number, pack_xattrs(node.xattrs, show(node.path)))
        self._places[id(node)] = place
        self._order.append(place)

    def _place_folder(self, folder: Folder, space: _Space) -> None:
        place = self._places[id(folder.node)]
        place.size = directory_size(sorted([b".", b"..", *folder.node.children]), self._block)
        self._place_with_tail(place, space)

    def _place(self, place: _Place, space: _Space) -> None:
        node = place.node
        if node.is_symlink:
            place.size = len(node.target)
            self._place_with_tail(place, space)
            return
        size = place.head
        if node.is_file:
            place.size = node.size
            place.layout = CHUNK_BASED
            size = align8(size) + _ADDRESS.size * len(node.chunks)
            place.offset = space.take(size) or space.append(size)
        else:
            place.offset = space.append(size)
        space.align(_SLOT)

    def _place_with_tail(self, place: _Place, space: _Space) -> None:
        """An inode with data of its own: the part behind the last whole block stands behind the inode if both fit
        into one block, which the kernel demands."""
        tail = place.size % self._block
        # A symlink's target is not split: readers expect it in one place.
        whole = place.node.is_symlink and place.size > self._block
        if tail and place.head + tail <= self._block and not whole:
            place.layout = FLAT_INLINE
            size = place.head + tail
            place.offset = space.take(size)
            if not place.offset:
                if self._block - space.end % self._block < size:
                    space.next_block()
                place.offset = space.append(size)
            if place.size != tail:
                space.next_block()
            place.data_at = space.append(place.size - tail)
        else:
            place.layout = FLAT_PLAIN
            place.offset = space.take(place.head) or space.append(place.head)
            space.next_block()
            place.data_at = space.append(place.size)
            space.align(self._block)
        space.align(_SLOT)

    def pack(self) -> bytes:
        """The bytes of the file. Raises `ImageError` when the image is too large for the format."""
        blob_table = align_page(SLOTS_OFFSET + SLOT_SIZE * len(self._blobs))
        prefetch_at = blob_table + BLOB_ENTRY_SIZE * len(self._blobs)
        prefetch_size = _U32.size * len(self._prefetch)
        meta = align_page(prefetch_at + prefetch_size) if self._blobs else 0
        image = bytearray(align_page(meta + self._end))
        table: dict[tuple[bytes, int], RawChunk] = {}
        for place in self._order:
            self._write(image, place, meta, table)
        nids = [self._places[id(node)].offset // _SLOT for node in self._prefetch]
        image[prefetch_at : prefetch_at + prefetch_size] = b"".join(_U32.pack(nid) for nid in nids)
        chunk_table = len(image)
        for _, chunk in sorted(table.items()):
            image += CHUNK_INFO.pack(*chunk)
        image += bytes(-len(image) % _PAGE)
        tables = Tables(blob_table, prefetch_at, prefetch_size, meta, chunk_table, CHUNK_INFO_SIZE * len(table))
        self._write_front(image, tables)
        return bytes(image)

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
        root = self._places[id(self._root)]
        image[1024:1152] = pack_super(
            block=self._block,
            root_nid=root.offset // _SLOT,
            names=self.names,
            blocks=blocks,
            meta=tables.meta,
            devices=len(self._blobs),
        )
        flags = self._flags
        if any(place.xattrs for place in self._order):
            flags |= SuperFlag.HAS_XATTR
        # The reference sets this for an image without blobs, too: no blob is without digests.
        if all(blob.features & BlobFeature.INLINED_CHUNK_DIGEST for blob in self._blobs):
            flags |= SuperFlag.INLINED_CHUNK_DIGEST
        if self._tarfs:
            flags |= SuperFlag.TARFS
        image[1152:1408] = pack_ext(flags, self._chunk_size, len(self._blobs), tables)

    def _write(self, image: bytearray, place: _Place, meta: int, table: dict[tuple[bytes, int], RawChunk]) -> None:
        node = place.node
        union, data = 0, b""
        if node.is_file:
            union, data = self._chunk_header(node), self._addresses(node, table)
        elif node.is_folder:
            union = (meta + place.data_at) // self._block
            data = self._folder_data(place)
        elif node.is_symlink:
            union, data = (meta + place.data_at) // self._block, node.target
        else:
            union = node.rdev
        head = pack_inode(
            layout=place.layout,
            xattr_size=len(place.xattrs),
            mode=node.mode,
            size=place.size,
            union=union,
            number=place.number,
            uid=node.uid,
            gid=node.gid,
            mtime=node.mtime,
            mtime_ns=node.mtime_ns,
            nlink=node.nlink,
        )
        at = meta + place.offset
        _put(image, at, head + place.xattrs)
        if place.layout == CHUNK_BASED:
            _put(image, at + align8(place.head), data)
            return
        whole = len(data) - (len(data) % self._block if place.layout == FLAT_INLINE else 0)
        _put(image, meta + place.data_at, data[:whole])
        _put(image, at + place.head, data[whole:])

    def _folder_data(self, place: _Place) -> bytes:
        entries = [(name, self._places[id(child)], child.mode) for name, child in place.node.children.items()]
        entries += [(b".", place, place.node.mode), (b"..", self._places[id(place.parent)], place.parent.mode)]
        entries.sort(key=lambda entry: entry[0])
        return pack_directory([(name, child.offset // _SLOT, mode) for name, child, mode in entries], self._block)

    def _chunk_header(self, node: Node) -> int:
        """The exponent of the chunk size. Chunks that are neighbours in one blob are shown to the kernel as one large
        chunk, so that files share its page cache."""
        size = self._chunk_size
        steps = zip(node.chunks, node.chunks[1:], strict=False)
        if node.size > size and all(a.blob_index == b.blob_index and a.uoff + size == b.uoff for a, b in steps):
            size = 1 << (node.size - 1).bit_length()
        return _INDEXED | min((size // self._block).bit_length() - 1, 31)

    def _addresses(self, node: Node, table: dict[tuple[bytes, int], RawChunk]) -> bytes:
        data = bytearray()
        for position, chunk in enumerate(node.chunks):
            block = chunk.uoff // self._block
            if block > _MAX_BLOCK:
                raise SourceError(node.path, f"block {block} of the blob; the format ends at {_MAX_BLOCK}")
            device = chunk.blob_index + 1 | chunk.index >> 16 << 8
            data += _ADDRESS.pack(chunk.index & 0xFFFF, device, block)
            table[chunk.digest, chunk.blob_index] = chunk._replace(file_offset=position * self._chunk_size)
        return bytes(data)


def align8(size: int) -> int:
    return size + 7 & ~7


def _put(image: bytearray, at: int, data: bytes) -> None:
    image[at : at + len(data)] = data
