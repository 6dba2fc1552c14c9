"""Random-access contexts of a gzip layer: which pieces of it a reader must inflate for each chunk. Pure but for the tar.

A context begins at a block border at or before its first chunk and ends at one at or behind its last chunk's end. Chunks are
given in the order of the tar; a context is closed when it has grown to about a megabyte of the layer, or two of the tar.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from struct import Struct

from nydusd.codec.gzip_index import Border
from nydusd.codec.zran import MAX_DICTIONARY
from nydusd.image.errors import CannotReferError, ImageError

_CONTEXT = Struct("<QQQIIIBB2x")
_MAX_IN = 1 << 20
_MAX_OUT = 2 << 20
_READABLE_OUT = 1 << 24
_READABLE_IN = 2 << 24


class ZranContexts:
    """Contexts of one layer; `place` chunks in order, then `pack`. `tar` is a descriptor of the plain tar."""

    def __init__(self, borders: Sequence[Border], tar: int) -> None:
        self._borders = borders
        self._outs = [border.out_offset for border in borders]
        self._tar = tar
        self._dictionaries = bytearray()
        self._packed = bytearray()
        self._begin: Border | None = None
        self._end_in = self._end_out = 0

    @property
    def count(self) -> int:
        return len(self._packed) // _CONTEXT.size

    def place(self, position: int, size: int) -> tuple[int, int, int, int]:
        """Where the chunk at `position` of the tar comes from: context, offset in it, and the range of the layer that
        surely holds it (offset, length). Raises `CannotReferError` if no context that readers accept can hold it, `ImageError`
        if the layer does not."""
        first = self._borders[bisect_right(self._outs, position) - 1]
        end = position + size
        last_at = bisect_left(self._outs, end)
        if last_at >= len(self._borders):
            raise ImageError(f"the layer ends before byte {end} of its tar")
        last = self._borders[last_at]
        begin = self._begin
        if begin is None or last.in_offset - begin.in_offset > _MAX_IN or end - begin.out_offset > _MAX_OUT:
            self._close()
            begin = self._begin = first
        self._end_in, self._end_out = max(self._end_in, last.in_offset), max(self._end_out, end)
        if self._end_out - begin.out_offset > _READABLE_OUT or self._end_in - begin.in_offset > _READABLE_IN:
            raise CannotReferError(
                f"a deflate block of the layer gives more than {_READABLE_OUT} bytes, which no reader takes: use targz-rafs"
            )
        return self.count, position - begin.out_offset, first.in_offset, last.in_offset - first.in_offset

    def _close(self) -> None:
        begin = self._begin
        if begin is None:
            return
        window = min(MAX_DICTIONARY, begin.out_offset - begin.member)
        dictionary = os.pread(self._tar, window, begin.out_offset - window) if window else b""
        self._packed += _CONTEXT.pack(
            begin.in_offset,
            begin.out_offset,
            len(self._dictionaries),
            self._end_in - begin.in_offset,
            self._end_out - begin.out_offset,
            len(dictionary),
            begin.byte,
            begin.bits,
        )
        self._dictionaries += dictionary
        self._begin, self._end_in, self._end_out = None, 0, 0

    def pack(self) -> bytes:
        """All contexts, then their dictionaries, as the chunk information has them."""
        self._close()
        return bytes(self._packed + self._dictionaries)
