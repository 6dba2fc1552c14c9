"""The tail of a native blob: table of contents (TOC) and where the inlined bootstrap is. Pure parsing, any process.

All functions take `tail`, the last bytes of the stored blob, and `blob_size`, so that offsets can be checked.
A blob built with a TOC ends in `entries (128 bytes each) | tar header "rafs.blob.toc"`; one with an inlined bootstrap
but no TOC ends in `bootstrap, stored raw | tar header "image.boot"`.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

from nydusd.errors import FormatError, UnsupportedError
from nydusd.formats.model import Compressor
from nydusd.formats.tar_header import TAR_HEADER_SIZE, TarHeader, is_tar_header, parse_tar_header

TAIL_SIZE = 4096
"""Length of tail to read when the TOC's size is unknown. (A TOC has at most a handful of entries.)"""

TOC_ENTRY_SIZE = 128
MIN_TOC_SIZE = TAR_HEADER_SIZE
MAX_TOC_SIZE = 0x10000
MAX_BOOTSTRAP_SIZE = 1 << 30
"""Ours: an inlined bootstrap is unpacked in memory, so its length is bounded (2**22 files need about 1 GiB)."""

ENTRY_BLOB = "image.blob"
ENTRY_META = "blob.meta"
ENTRY_META_HEADER = "blob.meta.header"
ENTRY_DIGEST = "blob.digest"
ENTRY_BOOTSTRAP = "image.boot"
_TOC_NAME = "rafs.blob.toc"

_ENTRY = struct.Struct("<II16s32sQQQ48x")
_COMPRESSORS = {0x1: Compressor.NONE, 0x2: Compressor.ZSTD, 0x4: Compressor.LZ4_BLOCK}
_FLAG_MASK = 0xF
_NO_DIGEST = bytes(32)

Buffer = bytes | bytearray | memoryview


class TocEntry(NamedTuple):
    """One region: where it is stored, and the sha256 of its uncompressed bytes (None if the builder gave none)."""

    name: str
    compressor: Compressor
    digest: bytes | None
    offset: int
    stored_size: int
    uncompressed_size: int


class BootstrapLocation(NamedTuple):
    """Where the inlined bootstrap is in the blob, and how to unpack and check it. Sizes and offsets in bytes."""

    offset: int
    stored_size: int
    uncompressed_size: int
    compressor: Compressor
    digest: bytes | None


def tail_size(blob_size: int) -> int:
    """How much tail to read when nothing is known: at most 4096 bytes, a multiple of 128."""
    return min(TAIL_SIZE, blob_size - blob_size % TOC_ENTRY_SIZE)


def parse_toc(
    tail: Buffer, blob_size: int, where: str, *, toc_size: int = 0, toc_digest: bytes = b""
) -> dict[str, TocEntry]:
    """The entries of the TOC by name. Names this version does not know are kept, they are never followed.

    `toc_size` and `toc_digest` are what the blob table says; 0, empty or all zero mean unknown. Raises `FormatError`
    if there is no TOC, it breaks a rule, does not have the digest, or a region lies outside the blob.
    """
    header = _last_header(tail, blob_size, where)
    if header.name != _TOC_NAME:
        raise FormatError(where, "toc", f"the blob ends in tar header {header.name!r}, not {_TOC_NAME!r}")
    size = header.size
    if size % TOC_ENTRY_SIZE or not size + TAR_HEADER_SIZE <= MAX_TOC_SIZE:
        raise FormatError(where, "toc", f"entries of {size} bytes; a multiple of 128 below {MAX_TOC_SIZE} is allowed")
    if size + TAR_HEADER_SIZE > len(tail):
        raise FormatError(where, "toc", f"entries of {size} bytes do not fit into the {len(tail)} bytes of tail")
    if toc_size and toc_size != size + TAR_HEADER_SIZE:
        raise FormatError(where, "toc", f"{size + TAR_HEADER_SIZE} bytes; the blob table says {toc_size}")
    raw = bytes(tail[len(tail) - TAR_HEADER_SIZE - size :])
    if toc_digest.strip(b"\0") and hashlib.sha256(raw).digest() != toc_digest:
        raise FormatError(where, "toc", f"its sha256 is not {toc_digest.hex()}, which the blob table says")
    entries: dict[str, TocEntry] = {}
    for index in range(size // TOC_ENTRY_SIZE):
        entry = _parse_entry(raw, index, blob_size, where)
        if entry.name in entries:
            raise FormatError(where, f"toc entry {index}", f"second entry named {entry.name!r}")
        entries[entry.name] = entry
    return entries


def locate_bootstrap(tail: Buffer, blob_size: int, where: str) -> BootstrapLocation:
    """Find the inlined bootstrap of a blob, with or without TOC.

    Raises `FormatError` if the blob ends in neither form, or says sizes that cannot be; `UnsupportedError` if it is
    larger than 1 GiB.
    """
    header = _last_header(tail, blob_size, where)
    if header.name == ENTRY_BOOTSTRAP:
        offset = blob_size - TAR_HEADER_SIZE - header.size
        if offset < 0:
            raise FormatError(where, ENTRY_BOOTSTRAP, f"{header.size} bytes do not fit into a blob of {blob_size}")
        found = BootstrapLocation(offset, header.size, header.size, Compressor.NONE, None)
    else:
        entry = parse_toc(tail, blob_size, where).get(ENTRY_BOOTSTRAP)
        if entry is None:
            raise FormatError(where, "toc", f"no entry {ENTRY_BOOTSTRAP!r}: this blob has no bootstrap inside")
        if entry.compressor == Compressor.LZ4_BLOCK:
            raise FormatError(where, f"toc entry {entry.name}", "compressed with lz4_block, which is never extractable")
        found = BootstrapLocation(*entry[3:], entry.compressor, entry.digest)
    if not found.stored_size or not found.uncompressed_size:
        raise FormatError(where, ENTRY_BOOTSTRAP, "the bootstrap inside the blob is empty")
    if max(found.uncompressed_size, found.stored_size) > MAX_BOOTSTRAP_SIZE:
        raise UnsupportedError(
            f"{where}: inlined bootstrap of {found.uncompressed_size} bytes; at most {MAX_BOOTSTRAP_SIZE} are supported. "
            "Use the bootstrap as a file of its own"
        )
    return found


def _last_header(tail: Buffer, blob_size: int, where: str) -> TarHeader:
    if not TAR_HEADER_SIZE <= len(tail) <= blob_size:
        raise FormatError(
            where, "tail", f"{len(tail)} bytes of a blob of {blob_size}; a tar header of 512 bytes must end the blob"
        )
    last = tail[len(tail) - TAR_HEADER_SIZE :]
    if not is_tar_header(last):
        raise FormatError(where, "tail", "no tar header ends the blob: it has neither a TOC nor an inlined bootstrap")
    return parse_tar_header(last, where)


def _parse_entry(raw: bytes, index: int, blob_size: int, where: str) -> TocEntry:
    flags, _, raw_name, digest, offset, stored, plain = _ENTRY.unpack_from(raw, index * TOC_ENTRY_SIZE)
    field = f"toc entry {index}"
    compressor = _COMPRESSORS.get(flags & _FLAG_MASK)
    if compressor is None:
        raise FormatError(
            where, field, f"flags {flags:#x}; exactly one of 1 (none), 2 (zstd), 4 (lz4_block) is allowed"
        )
    name = raw_name.rstrip(b"\0")
    if not name or not name.isascii() or b"\0" in name:
        raise FormatError(where, field, f"name {name!r}; it must be ASCII, padded with NUL")
    # image.blob is a description only: its offset may be the data's length (builders 2.1, 2.2) and its flag is "none"
    # whatever the chunks are compressed with. Nobody reads chunks through it, so its numbers are not held to the rules.
    if name != ENTRY_BLOB.encode():
        if offset + stored > blob_size:
            raise FormatError(where, field, f"{stored} bytes at {offset} are not inside the blob of {blob_size} bytes")
        if compressor == Compressor.NONE and stored != plain:
            raise FormatError(where, field, f"stored raw in {stored} bytes but {plain} bytes long; both must be equal")
    return TocEntry(name.decode("ascii"), compressor, None if digest == _NO_DIGEST else digest, offset, stored, plain)
