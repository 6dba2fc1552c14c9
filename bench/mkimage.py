"""A small builder of RAFS v6 images, so that the benchmark (and tests) can make one from any folder.

`python -m bench.mkimage TREE OUT` writes OUT/bootstrap and OUT/blobs/ID; with `--plain FOLDER` also FOLDER/ID.blob.data,
the uncompressed blob: the complete cache file, which the kernel's EROFS takes as its device. One blob, zstd chunks,
blake3 digests, equal chunks stored once, extended attributes inline. Not a replacement for the real builder: no other codec, no
table of contents, no chunk dictionary.

Layout of the bootstrap: superblocks at 1024, one device slot, blob table at 4096, then the metadata area, which
begins one block before the root's inode so that the root's number is 128; inodes; whole blocks of folders; chunk table.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import blake3
import zstandard

BLOCK = 4096
SLOT = 32  # bytes an inode number counts in
META_START = 2 * BLOCK  # superblocks and device slot in block 0, blob table in block 1
ROOT_NID = BLOCK // SLOT
DEFAULT_CHUNK = 1 << 20
MAX_CHUNKS = 0xFFFFFE
NAME_MAX = 255

FLAT_PLAIN, FLAT_INLINE, CHUNK_BASED = 0, 2, 4
ZSTD, UNCOMPRESSED = 3, 0
BLOB_FEATURES = 0x1 | 0x4000_0000  # chunks aligned to 4 KiB; sizes as builders since 2.2 write them
FLAGS = 0x80 | 0x4 | 0x10 | 0x0100_0000  # zstd, blake3, explicit owners, not encrypted
FLAG_XATTR = 0x20
FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
XATTR_PREFIXES = {
    b"user.": 1,
    b"system.posix_acl_access": 2,
    b"system.posix_acl_default": 3,
    b"trusted.": 4,
    b"security.": 6,
}


class Chunk(NamedTuple):
    """A stored chunk; `coff`, `csize` in the blob, `uoff`, `usize` in the uncompressed blob, all in bytes."""

    digest: bytes
    coff: int
    csize: int
    uoff: int
    usize: int
    file_offset: int


class ChunkInfo(NamedTuple):
    """Where the array of chunk information is in the blob, and how it is stored."""

    compressor: int
    offset: int
    size: int
    plain_size: int


class Blob(NamedTuple):
    """A finished blob; `size` is that of the file."""

    blob_id: str
    size: int
    chunks: list[Chunk]
    info: ChunkInfo


@dataclass(eq=False)
class Node:
    """One inode. `data` is a folder's entries or a symlink's target, `chunks` are indexes into the blob's chunks."""

    path: bytes
    info: os.stat_result
    children: dict[bytes, Node] = field(default_factory=dict)
    xattrs: bytes = b""
    nlink: int = 1
    chunks: list[int] = field(default_factory=list)
    data_size: int = 0
    data: bytes = b""
    offset: int = 0
    blocks_at: int = 0
    inline: bool = False

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.info.st_mode)

    @property
    def head_size(self) -> int:
        return 64 + len(self.xattrs)

    @property
    def nid(self) -> int:
        return (self.offset - META_START) // SLOT

    @property
    def whole_blocks(self) -> int:
        """Blocks of `data` that are not stored behind the inode."""
        return self.data_size // BLOCK if self.inline else align(self.data_size, BLOCK) // BLOCK


class Built(NamedTuple):
    """What was made: paths, and the size of the tree."""

    bootstrap: Path
    blob: Path
    names: int
    data_bytes: int


def align(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def build(tree: Path, out: Path, chunk_size: int = DEFAULT_CHUNK, plain: Path | None = None) -> Built:
    """Make an image of `tree` below `out`. ValueError for a tree that this builder cannot express."""
    if chunk_size & (chunk_size - 1) or not BLOCK <= chunk_size <= 16 << 20:
        raise ValueError(f"chunk size {chunk_size}: must be a power of two from 4096 to 16 MiB")
    seen: dict[tuple[int, int], Node] = {}
    root = scan(os.fsencode(tree), seen)
    nodes = list(in_order(root))
    (out / "blobs").mkdir(parents=True, exist_ok=True)
    blob = write_blob(nodes, out / "blobs", chunk_size, plain)
    names = count_names(root)
    image = layout(root, nodes, blob.chunks, chunk_size)
    flags = FLAGS | (FLAG_XATTR if any(node.xattrs for node in nodes) else 0)
    write_superblocks(image, flags, names, blob, chunk_size)
    image[BLOCK : BLOCK + 256] = blob_entry(blob, chunk_size)
    bootstrap = out / "bootstrap"
    bootstrap.write_bytes(image)
    return Built(bootstrap, out / "blobs" / blob.blob_id, names, sum(chunk.usize for chunk in blob.chunks))


def scan(path: bytes, seen: dict[tuple[int, int], Node]) -> Node:
    """The nodes of a tree; names of one inode (hard links) share a node."""
    info = os.lstat(path)
    node = Node(path, info, xattrs=xattr_area(path))
    if node.kind == stat.S_IFDIR:
        node.nlink = 2
        for name in sorted(os.listdir(path)):
            if len(name) > NAME_MAX:
                raise ValueError(f"{path!r}: name of {len(name)} bytes, at most {NAME_MAX}")
            child_info = os.lstat(os.path.join(path, name))
            key = (child_info.st_dev, child_info.st_ino)
            known = seen.get(key)
            if known is not None and known.kind != stat.S_IFDIR:
                known.nlink += 1
                node.children[name] = known
                continue
            child = scan(os.path.join(path, name), seen)
            seen[key] = node.children[name] = child
            node.nlink += child.kind == stat.S_IFDIR
        node.data_size = sum(used for used, _ in directory_blocks(node))
    elif node.kind == stat.S_IFLNK:
        node.data = os.readlink(path)
        node.data_size = len(node.data)
        if node.data_size > BLOCK:
            raise ValueError(f"{path!r}: symlink of {node.data_size} bytes, at most {BLOCK}")
    return node


def in_order(root: Node) -> Iterator[Node]:
    """Every node once: a folder, what is in it, then the folders in it."""
    done: set[int] = set()
    todo = [root]
    yield root
    while todo:
        folder = todo.pop()
        for child in folder.children.values():
            if id(child) not in done:
                done.add(id(child))
                yield child
        todo += [child for child in reversed(folder.children.values()) if child.kind == stat.S_IFDIR]


def count_names(root: Node) -> int:
    total = 1
    todo = [root]
    while todo:
        folder = todo.pop()
        total += len(folder.children)
        todo += [child for child in folder.children.values() if child.kind == stat.S_IFDIR]
    return total


def xattr_area(path: bytes) -> bytes:
    """The inline attributes: a 12-byte header, then entries padded to 4 bytes. Empty if there are none."""
    entries = bytearray()
    for name in sorted(os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)):
        prefix = next((prefix for prefix in XATTR_PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"{path!r}: attribute {name!r} is in no name space that the format has")
        suffix, value = name[len(prefix) :], os.getxattr(path, name, follow_symlinks=False)
        entries += struct.pack("<BBH", len(suffix), XATTR_PREFIXES[prefix], len(value)) + suffix + value
        entries += bytes(-len(entries) % 4)
    return bytes(12) + bytes(entries) if entries else b""


def directory_blocks(node: Node) -> list[tuple[int, list[bytes]]]:
    """How the entries fall into blocks: bytes that count for the size (whole blocks but the last), and the names."""
    blocks: list[tuple[int, list[bytes]]] = []
    names: list[bytes] = []
    used = 0
    for name in sorted([*node.children, b".", b".."]):
        if used + 12 + len(name) > BLOCK:
            blocks.append((BLOCK, names))
            names, used = [], 0
        names.append(name)
        used += 12 + len(name)
    return [*blocks, (used, names)]


def directory_data(node: Node, parent: Node) -> bytes:
    """The stored entries of a folder, once all inodes have their place."""
    data = bytearray()
    for used, names in directory_blocks(node):
        position = 12 * len(names)
        table, text = bytearray(), bytearray()
        for name in names:
            target = {b".": node, b"..": parent}.get(name) or node.children[name]
            table += struct.pack("<QHBx", target.nid, position, FILE_TYPES[target.kind])
            text += name
            position += len(name)
        data += (table + text).ljust(used, b"\0")
    return bytes(data)


def write_blob(nodes: list[Node], folder: Path, chunk_size: int, plain: Path | None) -> Blob:
    """Write the blob, named by its id: chunks, their information, its header. With `plain` the uncompressed one too."""
    temporary = folder / ".building"
    plain_temporary = plain / ".building" if plain else None
    if plain:
        plain.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as blob, open(plain_temporary or os.devnull, "wb") as plain_file:
        chunks = store_chunks(nodes, chunk_size, blob, plain_file)
        if not chunks:
            raise ValueError("the tree has no file with content: an image without data is of no use here")
        ci_offset = blob.tell()
        records = b"".join(ci_record(chunk) for chunk in chunks)
        packed = zstandard.compress(records)
        compressor = ZSTD if len(packed) < len(records) else UNCOMPRESSED
        stored = packed if compressor == ZSTD else records
        info = ChunkInfo(compressor, ci_offset, len(stored), len(records))
        blob.write(stored + ci_header(len(chunks), info))
        size = blob.tell()
        if plain:
            plain_file.truncate(uncompressed_size(chunks))
    with open(temporary, "rb") as finished:
        blob_id = hashlib.file_digest(finished, "sha256").hexdigest()
    temporary.rename(folder / blob_id)
    if plain_temporary:
        plain_temporary.rename(plain_temporary.with_name(f"{blob_id}.blob.data"))
    return Blob(blob_id, size, chunks, info)


def store_chunks(nodes: list[Node], chunk_size: int, blob: BinaryIO, plain: BinaryIO) -> list[Chunk]:
    """Cut the regular files, store what is new, and give each file its chunk indexes."""
    pack = zstandard.ZstdCompressor(level=3)
    known: dict[bytes, int] = {}
    chunks: list[Chunk] = []
    for node in nodes:
        if node.kind != stat.S_IFREG:
            continue
        with open(node.path, "rb") as file:
            for file_offset in range(0, node.info.st_size, chunk_size):
                data = file.read(min(chunk_size, node.info.st_size - file_offset))
                digest = blake3.blake3(data).digest()
                index = known.setdefault(digest, len(chunks))
                node.chunks.append(index)
                if index < len(chunks):
                    continue
                if index >= MAX_CHUNKS:
                    raise ValueError(f"more than {MAX_CHUNKS} chunks: take a larger chunk size")
                packed = pack.compress(data)
                stored = packed if len(packed) < len(data) else data
                chunks.append(
                    Chunk(digest, blob.tell(), len(stored), uncompressed_size(chunks), len(data), file_offset)
                )
                blob.write(stored)
                plain.seek(chunks[-1].uoff)
                plain.write(data)
    return chunks


def uncompressed_size(chunks: list[Chunk]) -> int:
    return align(chunks[-1].uoff + chunks[-1].usize, BLOCK) if chunks else 0


def ci_record(chunk: Chunk) -> bytes:
    """16 bytes of chunk information: sizes minus one, split into their low 20 and high 4 bits."""
    usize, csize = chunk.usize - 1, chunk.csize - 1
    return struct.pack(
        "<QQ",
        chunk.uoff | (usize & 0xFFFFF) << 44 | (usize >> 20) << 8,
        chunk.coff | (csize & 0xFFFFF) << 44 | (csize >> 20) << 40,
    )


def ci_header(count: int, info: ChunkInfo) -> bytes:
    """The 4,096 bytes behind the chunk information."""
    magic = 0xB10BB10B
    head = struct.pack("<IIII", magic, BLOB_FEATURES, info.compressor, count)
    head += struct.pack("<QQQ", info.offset, info.size, info.plain_size)
    return head.ljust(BLOCK - 4, b"\0") + struct.pack("<I", magic)


def blob_entry(blob: Blob, chunk_size: int) -> bytes:
    """The blob table's 256 bytes of our one blob."""
    head = struct.pack("<64sIIIIII", blob.blob_id.encode(), 0, chunk_size, len(blob.chunks), ZSTD, 0, BLOB_FEATURES)
    sizes = struct.pack("<QQII", blob.size, uncompressed_size(blob.chunks), 0, blob.info.compressor)
    return (head + sizes + struct.pack("<QQQ", *blob.info[1:])).ljust(256, b"\0")


def layout(root: Node, nodes: list[Node], chunks: list[Chunk], chunk_size: int) -> bytearray:
    """Give every inode and folder block its place, and write all of the bootstrap but the first two blocks."""
    position = META_START + BLOCK
    for node in nodes:
        tail = node.data_size % BLOCK
        node.inline = 0 < tail <= BLOCK - node.head_size
        size = node.head_size + (tail if node.inline else 0)
        if node.chunks:
            size = align(size, 8) + 8 * len(node.chunks)
        if node.inline and position % BLOCK + size > BLOCK:
            position = align(position, BLOCK)  # the kernel wants the tail in the inode's block
        node.offset = position
        position = align(position + size, SLOT)
    position = align(position, BLOCK)
    for node in nodes:
        node.blocks_at = position // BLOCK
        position += node.whole_blocks * BLOCK
    image = bytearray(position)
    parents = {id(child): node for node in nodes for child in node.children.values()}
    for number, node in enumerate(nodes, 1):
        if node.kind == stat.S_IFDIR:
            node.data = directory_data(node, parents.get(id(node), root))
        write_inode(image, node, number, chunks, chunk_size)
    for index, chunk in sorted(enumerate(chunks), key=lambda item: item[1].digest):
        image += chunk_table_record(index, chunk)
    image += bytes(-len(image) % BLOCK)
    return image


def write_inode(image: bytearray, node: Node, number: int, chunks: list[Chunk], chunk_size: int) -> None:
    """One extended inode with what follows it, and its whole blocks."""
    data_layout = FLAT_INLINE if node.inline else FLAT_PLAIN
    size, union = node.data_size, node.blocks_at
    if node.kind == stat.S_IFREG:
        data_layout, size = CHUNK_BASED, node.info.st_size
        union = 0x20 | (chunk_size // BLOCK).bit_length() - 1
    elif node.kind in (stat.S_IFCHR, stat.S_IFBLK):
        union = node.info.st_rdev
    xattr_count = (len(node.xattrs) - 12) // 4 + 1 if node.xattrs else 0
    seconds, nanoseconds = divmod(node.info.st_mtime_ns, 1_000_000_000)
    head = struct.pack("<HHHxxQII", 1 | data_layout << 1, xattr_count, node.info.st_mode, size, union, number)
    head += struct.pack("<IIQII", node.info.st_uid, node.info.st_gid, seconds, nanoseconds, node.nlink)
    at = node.offset
    image[at : at + node.head_size] = head.ljust(64, b"\0") + node.xattrs
    at = align(at + node.head_size, 8) if node.chunks else at + node.head_size
    for index in node.chunks:
        address = struct.pack("<HHI", index & 0xFFFF, 1 | index >> 16 << 8, chunks[index].uoff // BLOCK)
        image[at : at + 8] = address
        at += 8
    whole = min(node.whole_blocks * BLOCK, len(node.data))
    image[node.blocks_at * BLOCK : node.blocks_at * BLOCK + whole] = node.data[:whole]
    image[at : at + len(node.data) - whole] = node.data[whole:]


def chunk_table_record(index: int, chunk: Chunk) -> bytes:
    """80 bytes: everything about a chunk in one place."""
    compressed = int(chunk.csize != chunk.usize)
    head = struct.pack("<32sIIII", chunk.digest, 0, compressed, chunk.csize, chunk.usize)
    return head + struct.pack("<QQQII", chunk.coff, chunk.uoff, chunk.file_offset, index, 0)


def write_superblocks(image: bytearray, flags: int, names: int, blob: Blob, chunk_size: int) -> None:
    """Block 0: the EROFS superblock, the RAFS one and the device slot. The chunk table is the end of `image`."""
    blocks = uncompressed_size(blob.chunks) // BLOCK
    table_size = 80 * len(blob.chunks)
    table_at = len(image) - align(table_size, BLOCK)
    erofs = struct.pack("<IIIBBHQ", 0xE0F5E1E2, 0, 0x4000_0000, 12, 0, ROOT_NID, names)
    erofs += struct.pack("<QIII", 0, 0, blocks, META_START // BLOCK)  # 0, 0: the time of the build
    erofs = erofs.ljust(80, b"\0") + struct.pack("<IHHH", 0xC, 0, 1, 1408 // 128)
    rafs = struct.pack("<QQIIQQ", flags, BLOCK, 256, chunk_size, table_at, table_size)
    device = struct.pack("<64sII", blob.blob_id.encode(), blocks, align(len(image), 0x80000) // BLOCK)
    image[1024 : 1024 + 128] = erofs.ljust(128, b"\0")
    image[1152 : 1152 + 256] = rafs.ljust(256, b"\0")
    image[1408 : 1408 + 128] = device.ljust(128, b"\0")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.mkimage", description="Make a RAFS v6 image of a folder.")
    parser.add_argument("tree", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chunk-size", type=int, default=DEFAULT_CHUNK, help="bytes, a power of two (default 1 MiB)")
    parser.add_argument("--plain", type=Path, help="folder for the uncompressed blob")
    options = parser.parse_args(arguments)
    built = build(options.tree, options.out, options.chunk_size, options.plain)
    print(f"{built.bootstrap}: {built.names} names, {built.data_bytes:,} bytes of data in {built.blob}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
