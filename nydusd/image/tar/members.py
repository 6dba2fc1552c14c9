"""The members of a tar file: old, ustar, GNU and PAX forms, with sparse files of all five kinds.

Runs in the process of the command over a file that can be read at any place. Nothing of a member's data is read here
but sparse maps, so a member's claimed size costs nothing; that its data is there is checked against the file's length.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from nydusd.image.errors import ImageError, show
from nydusd.image.node import Segment
from nydusd.image.tar import pax
from nydusd.image.tar.numbers import decimal, number, timestamp

BLOCK = 512
REGULAR, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, FOLDER, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_OLD_REGULAR, _CONTIGUOUS, _GNU_SPARSE, _SOLARIS_PAX = b"\0", b"7", b"S", b"X"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _LABEL = b"L", b"K", b"x", b"g", b"V"
_WITHOUT_DATA = (HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, FOLDER, FIFO)
_KINDS = (REGULAR, *_WITHOUT_DATA)
_GNU_MAGIC, _USTAR_MAGIC = b"ustar  \0", b"ustar\0"
_MAX_LONG = 64 << 10
_MAX_SEGMENTS = 1 << 20
_MAX_SIZE = 1 << 62
_U32_MAX = 0xFFFFFFFF
_EMPTY = bytes(BLOCK)
_FOR_ALL = (b"uid", b"gid", b"mtime")
"""What a global header may say; a name, a size or an attribute can be that of one member only."""


@dataclass(slots=True)
class Member:
    """One member. `position` is where its data begins in the tar, `size` its length as a file; `segments` say which
    bytes of it are stored where (one piece unless it is sparse), the rest is zero."""

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    mtime_ns: int
    size: int
    link: bytes
    major: int
    minor: int
    position: int
    segments: tuple[Segment, ...] = ()
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


def members(fd: int, size: int, where: str) -> Iterator[Member]:
    """All members in order. Blocks of zeros are passed over, so tars that were joined are read to their end.

    `where` names the tar in messages. Raises `ImageError` for anything that is broken, with the member's name.
    """
    return _Reader(fd, size, where).members()


class _Reader:
    def __init__(self, fd: int, size: int, where: str) -> None:
        self._fd = fd
        self._size = size
        self._where = where
        self._at = 0
        self._globals: dict[bytes, bytes] = {}

    def members(self) -> Iterator[Member]:
        name = link = None
        records: pax.Records = []
        while (header := self._header()) is not None:
            kind = header[156:157]
            size = number(header[124:136], f"{self._where}: member at byte {self._at - BLOCK}: size")
            shown = f"{self._where}: {show(name or header[:100].split(bytes(1), 1)[0])}"
            if size < 0 or size > _MAX_SIZE:
                raise ImageError(f"{shown}: a size of {size} bytes")
            if kind in (_LONG_NAME, _LONG_LINK):
                text = self._take(size, _MAX_LONG, f"{shown}: long name").split(b"\0", 1)[0]
                name, link = (text, link) if kind == _LONG_NAME else (name, text)
            elif kind in (_PAX, _SOLARIS_PAX):
                records = pax.parse(self._take(size, pax.MAX_SIZE, f"{shown}: extended header"), shown)
            elif kind == _PAX_GLOBAL:
                found = pax.parse(self._take(size, pax.MAX_SIZE, f"{shown}: extended header"), shown)
                self._globals |= {key: value for key, value in found if key in _FOR_ALL}
            elif kind == _LABEL:
                self._skip(size, shown)
            else:
                yield self._member(header, kind, size, name, link, records)
                name = link = None
                records = []
        if name is not None or link is not None or records:
            raise ImageError(f"{self._where}: it ends behind a long name or an extended header, before its member")

    def _header(self) -> bytes | None:
        """The next header block that is not empty; None at the end."""
        while self._at < self._size:
            block = self._read(self._at, BLOCK)
            if len(block) < BLOCK:
                raise ImageError(f"{self._where}: it ends inside a header, after {len(block)} of {BLOCK} bytes")
            self._at += BLOCK
            if block == _EMPTY:
                continue
            place = f"{self._where}: header at byte {self._at - BLOCK}"
            claimed = number(block[148:156], f"{place}: checksum")
            bare = block[:148] + b" " * 8 + block[156:]
            # Some very old programs summed signed bytes.
            if claimed != sum(bare) and claimed != sum(byte - 256 if byte > 127 else byte for byte in bare):
                raise ImageError(f"{place}: wrong checksum {claimed:o}, not {sum(bare):o}: no tar, or damaged")
            return block
        return None

    def _member(
        self, header: bytes, kind: bytes, size: int, name: bytes | None, link: bytes | None, records: pax.Records
    ) -> Member:
        values = self._globals | dict(records)
        if name is None:
            name = header[:100].split(b"\0", 1)[0]
            if header[257:263] == _USTAR_MAGIC and header[345]:
                name = header[345:500].split(b"\0", 1)[0] + b"/" + name
        name = values.get(b"GNU.sparse.name", values.get(b"path", name))
        shown = f"{self._where}: {show(name)}"
        member = Member(
            name=name,
            kind=kind,
            mode=number(header[100:108], f"{shown}: mode") & 0o7777,
            uid=self._owner(values, b"uid", header[108:116], shown),
            gid=self._owner(values, b"gid", header[116:124], shown),
            mtime=number(header[136:148], f"{shown}: mtime"),
            mtime_ns=0,
            size=decimal(values[b"size"], f"{shown}: size") if b"size" in values else size,
            link=values.get(b"linkpath", link if link is not None else header[157:257].split(b"\0", 1)[0]),
            major=number(header[329:337], f"{shown}: device") if kind in (CHAR, BLOCK_DEVICE) else 0,
            minor=number(header[337:345], f"{shown}: device") if kind in (CHAR, BLOCK_DEVICE) else 0,
            position=self._at,
            xattrs=pax.xattrs(records, shown),
        )
        if b"mtime" in values:
            member.mtime, member.mtime_ns = timestamp(values[b"mtime"], f"{shown}: mtime")
        self._place(member, header, values, records, shown)
        return member

    @staticmethod
    def _owner(values: dict[bytes, bytes], key: bytes, raw: bytes, shown: str) -> int:
        what = f"{shown}: {key.decode()}"
        owner = decimal(values[key], what) if key in values else number(raw, what)
        if not 0 <= owner <= _U32_MAX:
            raise ImageError(f"{what}: {owner} must be 0 to {_U32_MAX}")
        return owner

    def _place(
        self, member: Member, header: bytes, values: dict[bytes, bytes], records: pax.Records, shown: str
    ) -> None:
        """Find out what kind of file it is and where its data is, and go on behind that."""
        if member.kind in (_OLD_REGULAR, _CONTIGUOUS):
            member.kind = FOLDER if member.kind == _OLD_REGULAR and member.name.endswith(b"/") else REGULAR
        stored = member.size
        if member.kind == _GNU_SPARSE:
            self._gnu_sparse(member, header, shown)
        elif member.kind == REGULAR and b"GNU.sparse.major" in values:
            if (values[b"GNU.sparse.major"], values.get(b"GNU.sparse.minor")) != (b"1", b"0"):
                raise ImageError(f"{shown}: a sparse file of version {values[b'GNU.sparse.major']!r}; 1.0 is known")
            self._pax_sparse(member, values, shown)
        elif member.kind == REGULAR and (b"GNU.sparse.size" in values or b"GNU.sparse.realsize" in values):
            pairs = [
                (decimal(offset, f"{shown}: sparse map"), decimal(length, f"{shown}: sparse map"))
                for offset, length in pax.sparse_map(records)
            ]
            self._set_segments(member, pairs, self._real_size(values, shown), stored, member.position, shown)
        elif member.kind == REGULAR:
            member.segments = ((0, member.size, member.position),) if member.size else ()
        elif member.kind in _WITHOUT_DATA:
            stored = member.size = 0  # some programs give links the size of their target, without its data
        else:
            raise ImageError(f"{shown}: a member of type {member.kind!r}, which is unknown")
        self._skip(stored, shown)

    def _skip(self, stored: int, shown: str) -> None:
        end = self._at + stored
        if end > self._size:
            raise ImageError(f"{shown}: the tar ends inside it, after {self._size - self._at} of {stored} bytes")
        self._at = end + -stored % BLOCK

    def _gnu_sparse(self, member: Member, header: bytes, shown: str) -> None:
        """The map begins in the header and goes on in blocks behind it, before the data."""
        what = f"{shown}: sparse map"
        pairs: list[tuple[int, int]] = []
        block, at, count, more_at = header, 386, 4, 482
        while True:
            for index in range(count):
                entry = block[at + 24 * index : at + 24 * index + 24]
                if entry[12:24].strip(b"\0 "):
                    pairs.append((number(entry[:12], what), number(entry[12:24], what)))
            if not block[more_at]:
                break
            if len(pairs) > _MAX_SEGMENTS:
                raise ImageError(f"{what}: more than {_MAX_SEGMENTS} pieces")
            block, at, count, more_at = self._read(self._at, BLOCK), 0, 21, 504
            if len(block) < BLOCK:
                raise ImageError(f"{what}: the tar ends inside it")
            self._at += BLOCK
        member.kind, member.position = REGULAR, self._at
        self._set_segments(member, pairs, number(header[483:495], what), member.size, self._at, shown)

    def _pax_sparse(self, member: Member, values: dict[bytes, bytes], shown: str) -> None:
        """The map is text at the beginning of the data: the number of pieces, then offsets and lengths, a line each."""
        what = f"{shown}: sparse map"
        stored, at = member.size, member.position
        text = bytearray()
        numbers: list[int] = []
        read = 0

        def next_number() -> int:
            nonlocal read
            while b"\n" not in text:
                if read >= stored or len(text) > 32:
                    raise ImageError(f"{what}: it does not end")
                text.extend(self._read(at + read, BLOCK))
                read += BLOCK
            line, _, rest = text.partition(b"\n")
            text[:] = rest
            return decimal(bytes(line), what)

        count = next_number()
        if count > min(_MAX_SEGMENTS, stored):
            raise ImageError(f"{what}: {count} pieces, which cannot be")
        for _ in range(2 * count):
            numbers.append(next_number())
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        self._set_segments(member, pairs, self._real_size(values, shown), stored - read, at + read, shown)

    @staticmethod
    def _real_size(values: dict[bytes, bytes], shown: str) -> int:
        text = values.get(b"GNU.sparse.realsize", values.get(b"GNU.sparse.size", b""))
        return decimal(text, f"{shown}: size of the sparse file")

    @staticmethod
    def _set_segments(
        member: Member, pairs: list[tuple[int, int]], size: int, stored: int, position: int, shown: str
    ) -> None:
        segments = []
        end = 0
        for offset, length in pairs:
            if offset < end or not 0 <= length <= stored or offset + length > size:
                raise ImageError(f"{shown}: sparse map: {length} bytes at {offset} of {size}, {stored} of them stored")
            if length:
                segments.append((offset, length, position))
            end = offset + length
            position += length
            stored -= length
        if not 0 <= size <= _MAX_SIZE:
            raise ImageError(f"{shown}: a size of {size} bytes")
        member.size, member.segments = size, tuple(segments)

    def _take(self, size: int, limit: int, what: str) -> bytes:
        if size > limit:
            raise ImageError(f"{what}: {size} bytes; at most {limit} are read")
        data = self._read(self._at, size)
        self._skip(size, what)
        return data

    def _read(self, at: int, size: int) -> bytes:
        try:
            data = os.pread(self._fd, size, at)
            while data and len(data) < size and (more := os.pread(self._fd, size - len(data), at + len(data))):
                data += more
        except OSError as error:
            raise ImageError(f"{self._where}: cannot be read: {error.strerror}") from error
        return data
