"""Inflate one random-access context of a gzip layer, starting in the middle of its deflate stream.

Run by decompress workers. Pure functions, no I/O. A context may start at any bit; inflate libraries for Python take
whole bytes only. So the bits of the first, partial byte are put behind *empty deflate blocks* whose total length in
bits makes the sum a whole number of bytes: the stream then goes on byte-aligned exactly as it was, which matters
because stored blocks realign to byte boundaries (shifting the whole input instead would break them).
"""

from __future__ import annotations

import functools
from types import ModuleType

from nydusd.codec.compress import MAX_CHUNK_SIZE, Buffer
from nydusd.codec.errors import CodecError

MAX_DICTIONARY = 32768
MAX_CONTEXT_INPUT = 2 * MAX_CHUNK_SIZE
"""Bound of the compressed length of a context. Builders stop near 1 MiB; deflate itself never doubles its input."""

_GZIP_TRAILER = 8
_RAW = -15
_GZIP = 31
_PIECE = 1 << 16
"""Input is fed in pieces: at the end of a gzip member the library copies the unused rest of what it was given, so a
layer of thousands of tiny members would cost their number times the whole input."""


def _pack_bits(bits: str) -> int:
    """The integer whose bit i is character i of `bits` (deflate fills bytes from the lowest bit)."""
    return int(bits[::-1], 2)


_EMPTY_FIXED = "0" + "10" + "0" * 7
"""Not final, type 1 (fixed codes; written low bit first), end-of-block: 10 bits."""


def _empty_dynamic() -> str:
    """An empty block with dynamic codes, 93 bits: the fixed one is even, so odd shifts need one of odd length.

    Code length alphabet: symbols 0, 1 and 18 (run of zeros) have codes of 2, 1 and 2 bits: canonical codes are
    1 -> 0, 0 -> 10, 18 -> 11. The literal table is 256 zeros (138 + 118) and length 1 for end-of-block; the distance
    table is one zero.
    """
    header = "0" + "01" + "00000" + "00000" + "0111"  # not final, type 2, HLIT 0, HDIST 0, HCLEN 14 (18 lengths)
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)
    lengths = {1: "100", 0: "010", 18: "010"}
    table = "".join(lengths.get(symbol, "000") for symbol in order)
    zeros = "".join("11" + f"{run - 11:07b}"[::-1] for run in (138, 118))
    return header + table + zeros + "0" + "10" + "0"


@functools.cache
def _prefix(ctx_bits: int) -> tuple[int, int]:
    """Empty blocks as (value, bits) with bits + ctx_bits a multiple of 8."""
    bits = "" if ctx_bits % 2 == 0 else _empty_dynamic()
    while (len(bits) + ctx_bits) % 8:
        bits += _EMPTY_FIXED
    return (_pack_bits(bits) if bits else 0), len(bits)


def _lead_in(ctx_byte: int, ctx_bits: int) -> bytes:
    """The bytes to feed before the context's own: empty blocks, then the high `ctx_bits` bits of `ctx_byte`."""
    if not ctx_bits:
        return b""
    value, length = _prefix(ctx_bits)
    value |= (ctx_byte >> (8 - ctx_bits)) << length
    return value.to_bytes((length + ctx_bits) // 8, "little")


@functools.cache
def _isal_zlib() -> ModuleType:
    from isal import isal_zlib

    return isal_zlib


def inflate_context(
    data: Buffer, ctx_byte: int, ctx_bits: int, dictionary: Buffer, out_len: int, *, max_out: int = MAX_CHUNK_SIZE
) -> bytes:
    """The first `out_len` bytes that the context's compressed bytes `data` inflate to.

    `ctx_byte` is the byte before `data`; its `ctx_bits` high bits (0 to 7) still belong to the stream. `dictionary` is
    the window before the context, at most 32 KiB. A member that ends inside the context is followed by its 8-byte
    trailer and the next gzip member. Raises `CodecError` for a stream that is damaged or ends before `out_len`.
    """
    if not 0 <= ctx_bits <= 7 or not 0 <= ctx_byte <= 255:
        raise CodecError(f"zran context: {ctx_bits} bits of byte {ctx_byte}; at most 7 bits of one byte can be left")
    if not 0 < out_len <= max_out:
        raise CodecError(f"zran context: output of {out_len} bytes; it must be 1 to {max_out}")
    if len(data) > MAX_CONTEXT_INPUT or len(dictionary) > MAX_DICTIONARY:
        raise CodecError(
            f"zran context: {len(data)} compressed bytes and a dictionary of {len(dictionary)}; "
            f"at most {MAX_CONTEXT_INPUT} and {MAX_DICTIONARY} are allowed"
        )
    library = _isal_zlib()
    view = memoryview(data)
    out: list[bytes] = []
    missing = out_len
    position = 0
    try:
        inflater = library.decompressobj(_RAW, zdict=bytes(dictionary))
        raw = True
        lead_in = _lead_in(ctx_byte, ctx_bits)
        if lead_in:
            out.append(inflater.decompress(lead_in, missing))
            missing -= len(out[-1])
        while missing and position < len(view):
            piece = view[position : position + _PIECE]
            out.append(inflater.decompress(piece, missing))
            missing -= len(out[-1])
            position += len(piece)
            if inflater.eof and missing:
                position -= len(inflater.unused_data)
                if raw:
                    position += _GZIP_TRAILER
                raw = False
                inflater = library.decompressobj(_GZIP)
    except library.error as error:
        raise CodecError(f"zran context: damaged deflate stream: {error}") from error
    if missing:
        raise CodecError(f"zran context: {len(data)} compressed bytes give {out_len - missing} of {out_len} bytes")
    return out[0] if len(out) == 1 else b"".join(out)
