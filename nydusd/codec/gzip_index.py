"""Inflates a gzip stream and notes where its deflate blocks begin, so that readers can start there later.

Run by the image builder, in the process of the command. Of the inflate libraries only zlib itself stops at the borders of
blocks, and Python's `zlib` does not pass that on: so this calls the system's libz (the one that Python uses) by ctypes.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from typing import NamedTuple

from nydusd.codec.errors import CodecError

_GZIP = 31
_Z_BLOCK = 5
_OK, _STREAM_END, _BUFFER_ERROR = 0, 1, -5
_AT_BORDER, _LAST_BLOCK = 0x80, 0x40
_OUT = 1 << 18
_NEAR_IN, _NEAR_OUT = 256, 16 << 10
"""Bytes of the stream, and of output, within which two borders are as good as more. A block may have 10 bits and no output."""


class Border(NamedTuple):
    """The begin of a deflate block: bytes of the stream that were read, bytes of output before it, the last byte read and
    how many of its high bits belong to the block; and where the output of its gzip member begins."""

    in_offset: int
    out_offset: int
    byte: int
    bits: int
    member: int


class _Stream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


class GzipIndex:
    """`for plain in GzipIndex().inflate(pieces): ...`; afterwards `borders` has the begins of blocks, and ends of
    members, in order: all but those that stand closely between others. The first and the last are among them."""

    def __init__(self) -> None:
        name = ctypes.util.find_library("z") or "libz.so.1"
        try:
            self._libz = ctypes.CDLL(name)
        except OSError as error:
            raise CodecError(f"gzip: the library libz is needed and cannot be loaded: {error}") from error
        self._libz.zlibVersion.restype = ctypes.c_char_p
        self.borders: list[Border] = []
        self._in = 0
        self._out = 0
        self._member = 0

    def inflate(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The plain bytes. Members follow one another; zeros behind the last one are padding.

        Raises `CodecError` for a stream that is damaged or cut.
        """
        stream = _Stream()
        version = self._libz.zlibVersion()
        if self._libz.inflateInit2_(ctypes.byref(stream), _GZIP, version, ctypes.sizeof(stream)) != _OK:
            raise CodecError(f"gzip: {version!r} of libz cannot be used")
        out = ctypes.create_string_buffer(_OUT)
        started = False
        try:
            for piece in pieces:
                at = 0
                while at < len(piece):
                    if not started:
                        rest = piece[at:].lstrip(b"\0")
                        self._in += len(piece) - at - len(rest)
                        at = len(piece) - len(rest)
                        if not rest:
                            break
                        started = True
                        self._member = self._out
                    for plain, used, ended in self._feed(stream, piece, at, out):
                        if plain:
                            yield plain
                        at += used
                        if ended:
                            started = False
                            self._libz.inflateReset(ctypes.byref(stream))
                            break
            if started:
                raise CodecError("gzip: the stream ends too early: it is cut")
        finally:
            self._libz.inflateEnd(ctypes.byref(stream))

    def _feed(
        self, stream: _Stream, piece: bytes, at: int, out: ctypes.Array[ctypes.c_char]
    ) -> Iterator[tuple[bytes, int, bool]]:
        """Inflate `piece` from `at` on: output, how much was read for it, whether the member ended there."""
        base = ctypes.cast(ctypes.c_char_p(piece), ctypes.c_void_p).value or 0
        inflate = self._libz.inflate
        position = at
        while True:
            stream.next_in, stream.avail_in = base + position, len(piece) - position
            stream.next_out, stream.avail_out = ctypes.addressof(out), _OUT
            status = inflate(ctypes.byref(stream), _Z_BLOCK)
            used = len(piece) - position - stream.avail_in
            plain = ctypes.string_at(out, _OUT - stream.avail_out)
            if status not in (_OK, _STREAM_END, _BUFFER_ERROR):
                message = (stream.msg or b"").decode("ascii", "replace")
                raise CodecError(f"gzip: damaged stream at byte {self._in + used}: {message or status}")
            position += used
            self._in += used
            self._out += len(plain)
            ended = status == _STREAM_END
            kind = stream.data_type
            # The header's end is a border, too: its first block begins there. Behind the last block only the trailer is.
            if ended or (kind & _AT_BORDER and not kind & _LAST_BLOCK):
                self._note(piece, position, 0 if ended else kind & 7)
            yield plain, used, ended
            if ended or (status == _BUFFER_ERROR and not used and not plain):
                return
            if position == len(piece) and stream.avail_out:
                return

    def _note(self, piece: bytes, position: int, bits: int) -> None:
        border = Border(self._in, self._out, piece[position - 1] if position else 0, bits, self._member)
        if self.borders and self.borders[-1].in_offset == border.in_offset and self.borders[-1].bits == bits:
            return
        before = self.borders[-2] if len(self.borders) > 1 else None
        if (
            before is not None
            and border.in_offset - before.in_offset < _NEAR_IN
            and border.out_offset - before.out_offset < _NEAR_OUT
        ):
            self.borders[-1] = border
        else:
            self.borders.append(border)
