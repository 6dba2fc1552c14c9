"""Directories of RAFS v6: blocks of sorted entries, as in EROFS.

Pure parsing of untrusted bytes, called by front ends for every lookup and listing.

A block is an array of 12-byte heads, then the names. Entries are sorted by the bytes of their names over the whole
directory, "." and ".." among them: names that begin with '!' or '+' come before these.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from nydusd.errors import FormatError
from nydusd.formats.model import DirEntry
from nydusd.formats.superblock import MAX_NAME, name_fault

_HEAD = Struct("<QHBx")
"""nid, offset of the name in the block, file type."""
_HEAD_SIZE = 12
_NAME_AT = 8
_U16 = Struct("<H").unpack_from
_U64 = Struct("<Q").unpack_from
_NAME_SPAN = Struct("<HBxQH").unpack_from
"""From byte 8 of a head: offset of its name, and behind the next head's nid the offset of that one's name."""
_KINDS = (0, 8, 4, 2, 6, 1, 12, 10)
"""d_type of each file type in a head."""


class Directory:
    """One directory for the time of one call. `data` is where its first block is and `tail` where the last one is
    when that is apart from the others (else 0). All `size` bytes are inside `buf`, which the maker has checked."""

    __slots__ = ("_block", "_buf", "_data", "_ino", "_last_nid", "_size", "_tail", "_where")

    def __init__(
        self, buf: memoryview, where: str, ino: int, size: int, data: int, tail: int, block: int, last_nid: int
    ) -> None:
        self._buf = buf
        self._where = where
        self._ino = ino
        self._size = size
        self._data = data
        self._tail = tail
        self._block = block
        self._last_nid = last_nid

    def find(self, name: bytes) -> int | None:
        """The nid of `name`, None when it is not there. Raises `FormatError` for entries that break the format.

        Two binary searches: over the first names of the blocks, then in the one block that can hold it.
        """
        if len(name) > MAX_NAME:
            return None
        low, high = 0, (self._size - 1) // self._block
        while low < high:
            middle = (low + high + 1) >> 1
            at, valid = self._place(middle)
            if self._name(at, valid, self._count(at, valid), 0) <= name:
                low = middle
            else:
                high = middle - 1
        at, valid = self._place(low)
        count = self._count(at, valid)
        low, high = 0, count - 1
        while low <= high:
            middle = (low + high) >> 1
            found = self._name(at, valid, count, middle)
            if found == name:
                nid: int = _U64(self._buf, at + _HEAD_SIZE * middle)[0]
                self._check_nid(name, nid)
                return nid
            if found < name:
                low = middle + 1
            else:
                high = middle - 1
        return None

    def entries(self, offset: int) -> Iterator[DirEntry]:
        """The entries whose heads are at or after byte `offset` of the directory's data (see `RafsV6.readdir`)."""
        block = self._block
        base = offset // block * block
        index = -(-(offset - base) // _HEAD_SIZE)
        previous, last_nid = b"", self._last_nid
        while base < self._size:
            at, valid = self._place(base // block)
            names_at = _HEAD_SIZE * self._count(at, valid)
            data = bytes(self._buf[at : at + valid])
            heads = list(_HEAD.iter_unpack(data[_HEAD_SIZE * index : names_at]))
            for position, (nid, begin, kind) in enumerate(heads, 1):
                stop = heads[position][1] if position < len(heads) else valid
                if not names_at <= begin < stop <= valid:
                    raise self._bad("nameoff", f"name at {begin} to {stop} must be in {names_at} to {valid}")
                name = data[begin:stop]
                if position == len(heads):
                    name = name.partition(b"\0")[0]
                if (not 0 < len(name) <= MAX_NAME or b"/" in name or b"\0" in name) and (fault := name_fault(name)):
                    raise self._bad("name", f"entry {index + position - 1} of block {base // block} {fault}")
                if name <= previous:
                    raise self._bad("name", f"{name!r} must come after {previous!r}: names are sorted, once each")
                if nid > last_nid or name == b".":
                    self._check_nid(name, nid)
                if kind > 7:
                    raise self._bad("file_type", f"{kind} of {name!r} must be 0 to 7")
                previous = name
                yield DirEntry(name, nid, _KINDS[kind], base + _HEAD_SIZE * (index + position))
            index = 0
            base += block

    def _bad(self, field: str, message: str) -> FormatError:
        return FormatError(self._where, f"dirent.{field}", f"inode {self._ino}: {message}")

    def _check_nid(self, name: bytes, nid: int) -> None:
        if nid > self._last_nid:
            raise self._bad("nid", f"{name!r} is {nid}, the file ends after {self._last_nid}")
        if name == b"." and nid != self._ino:
            raise self._bad("nid", f"'.' is {nid}, it must be the directory itself")

    def _place(self, number: int) -> tuple[int, int]:
        """Place and number of valid bytes of a block."""
        begin = number * self._block
        left = self._size - begin
        if left > self._block:
            return self._data + begin, self._block
        return self._tail or self._data + begin, left

    def _count(self, at: int, valid: int) -> int:
        """How many entries a block has: the heads end where the first one's name begins."""
        first: int = _U16(self._buf, at + _NAME_AT)[0] if valid >= _HEAD_SIZE else 0
        count, rest = divmod(first, _HEAD_SIZE)
        if rest or not count or first >= valid:
            raise self._bad("nameoff", f"{first} of a block's first entry must be 12 * n, below {valid}")
        return count

    def _name(self, at: int, valid: int, count: int, index: int) -> bytes:
        """The name of one entry of a block of `count`."""
        head = at + _HEAD_SIZE * index + _NAME_AT
        if index + 1 < count:
            begin, _, _, stop = _NAME_SPAN(self._buf, head)
        else:
            begin, stop = _U16(self._buf, head)[0], valid
        if not _HEAD_SIZE * count <= begin < stop <= valid:
            raise self._bad("nameoff", f"name at {begin} to {stop} must be in {_HEAD_SIZE * count} to {valid}")
        name = bytes(self._buf[at + begin : at + stop])
        return name if index + 1 < count else name.partition(b"\0")[0]
