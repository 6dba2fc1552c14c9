"""The tar headers between the regions of a native blob, and its table of contents. Pure, any process."""

from __future__ import annotations

from struct import Struct

from nydusd.formats.model import Compressor
from nydusd.formats.toc import TocEntry

_ENTRY = Struct("<II16s32sQQQ48x")
_FLAGS = {Compressor.NONE: 0x1, Compressor.ZSTD: 0x2, Compressor.LZ4_BLOCK: 0x4}
_MTIME = b"00000000000\0"
_OCTAL_LIMIT = 8**11


def pack_tar_header(name: str, size: int) -> bytes:
    """The 512 bytes that follow a region of `size` bytes: a GNU header of a regular file without owner or mode."""
    block = bytearray(512)
    block[: len(name)] = name.encode("ascii")
    # Twelve bytes hold eleven octal digits; beyond that GNU tar sets the top bit and writes a binary number.
    block[124:136] = b"%011o\0" % size if size < _OCTAL_LIMIT else (1 << 95 | size).to_bytes(12, "big")
    block[136:148] = _MTIME
    block[156:157] = b"0"
    block[257:265] = b"ustar  \0"
    block[148:156] = b" " * 8
    block[148:156] = b"%07o\0" % sum(block)
    return bytes(block)


def pack_toc_entry(entry: TocEntry) -> bytes:
    """128 bytes. gzip cannot be expressed: KeyError is then our bug."""
    digest = entry.digest or bytes(32)
    sizes = (entry.offset, entry.stored_size, entry.uncompressed_size)
    return _ENTRY.pack(_FLAGS[entry.compressor], 0, entry.name.encode("ascii"), digest, *sizes)
