"""Cuts files into chunks, hashes and packs them: what a worker process of the builder does.

A task is a run of pieces (a chunk each) of at most a megabyte or so. The worker reads them, computes digest and
checksum, and puts the stored form into its slot of shared memory. A chunk whose digest it has met before in this run is
not packed again: workers get tasks in the order of the blob, so the first one is stored earlier than this one.
"""

from __future__ import annotations

import errno
import marshal
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from struct import Struct
from typing import NamedTuple, Self

from nydusd.codec.cipher import XtsCipher
from nydusd.codec.crc import crc32c
from nydusd.codec.digest import hasher_for
from nydusd.codec.pack import packer_for
from nydusd.formats.model import Compressor, Digester
from nydusd.image.errors import SourceError
from nydusd.image.node import Node, Segment

TASK_BYTES = 1 << 20
TASK_PIECES = 256
_PADDING = 18  # bytes that encryption may add to a tiny chunk
_KNOWN_LIMIT = 1 << 16
_ZEROS_LIMIT = 256
_PACKED = Struct("<32sIIB")


class Piece(NamedTuple):
    """A chunk to be read: `size` bytes at `offset` of a file. `member` is its path below the folder that is packed; in a tar
    its data is in `segments`.

    `file_size` and `changed` are what the scan saw; a file that is not so any more is an error. `small` chunks are
    given back as they are: they will be packed together with others.
    """

    member: bytes
    segments: tuple[Segment, ...] | None
    offset: int
    size: int
    file_size: int
    changed: int
    small: bool


class Packed(NamedTuple):
    """What became of a piece: `stored` bytes in the slot (none if the chunk is known), packed or as they were."""

    digest: bytes
    crc: int
    stored: int
    compressed: bool


class Task:
    """A run of pieces. Between processes it is one string of bytes, which is made and read in a tenth of the time."""

    __slots__ = ("pieces",)

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces

    def __reduce__(self) -> tuple[Callable[[bytes], Task], tuple[bytes]]:
        return Task.from_bytes, (marshal.dumps([tuple(piece) for piece in self.pieces]),)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        return cls([Piece._make(fields) for fields in marshal.loads(data)])

    def __str__(self) -> str:
        return f"{self.pieces[0].member!r} and what follows"


def unpack_results(results: bytes) -> Iterator[Packed]:
    """What the worker says of the pieces of a task, in their order."""
    return map(Packed._make, _PACKED.iter_unpack(results))


def slot_size(chunk_size: int) -> int:
    """Bytes of a slot that any task fits into."""
    return max(chunk_size, TASK_BYTES) + chunk_size + _PADDING * TASK_PIECES


def pieces_of(node: Node, chunk_size: int, small: int, path: bytes = b"") -> Iterator[Piece]:
    """The pieces of a file in order; `path` is the node's, if it is known. Files of one chunk that is below `small` bytes
    are marked so."""
    path = path or node.path
    size, segments = node.size, node.segments
    changed = node.mtime * 1_000_000_000 + node.mtime_ns
    if size <= chunk_size and (segments is None or len(segments) == 1):
        if size:
            yield Piece(path, segments, 0, size, size, changed, size < small)
        return
    first = 0
    for offset in range(0, size, chunk_size):
        length = min(chunk_size, size - offset)
        part = None
        if segments is not None:
            # They are in order: those before this piece are not looked at again.
            while first < len(segments) and segments[first][0] + segments[first][1] <= offset:
                first += 1
            part = tuple(_cut(segments, first, offset, length))
        yield Piece(path, part, offset, length, size, changed, size <= chunk_size and size < small)


def _cut(segments: Sequence[Segment], first: int, offset: int, size: int) -> Iterator[Segment]:
    for index in range(first, len(segments)):
        start, length, at = segments[index]
        begin, end = max(start, offset), min(start + length, offset + size)
        if begin >= end:
            return
        yield begin, end - begin, at + begin - start


def tasks_of(pieces: Iterable[Piece]) -> Iterator[Task]:
    """The same pieces in runs."""
    run: list[Piece] = []
    total = 0
    for piece in pieces:
        run.append(piece)
        total += piece.size
        if total >= TASK_BYTES or len(run) == TASK_PIECES:
            yield Task(run)
            run, total = [], 0
    if run:
        yield Task(run)


@dataclass
class Chunker:
    """The work of the pool. `top` is the folder that is packed, or `tar` a descriptor of the tar; `known` are digests that
    another image's blobs have already; `summary_only`: digests and checksums are wanted, no stored form."""

    compressor: Compressor
    digester: Digester
    cipher: XtsCipher | None = None
    top: bytes = b""
    tar: int = -1
    known: frozenset[bytes] = frozenset()
    summary_only: bool = False
    _met: set[bytes] = field(default_factory=set)
    _member: bytes | None = None
    _file: int = -1
    _sparse: bool = False
    _zeros: dict[int, tuple[bytes, int]] = field(default_factory=dict)

    def __call__(self, task: Task, slot: memoryview) -> bytes:
        """For each piece what `unpack_results` makes of it."""
        hasher = hasher_for(self.digester)
        packer = packer_for(Compressor.NONE if self.summary_only else self.compressor)
        done = []
        at = 0
        for piece in task.pieces:
            data = self._read(piece)
            digest, crc = self._summary(data, piece, hasher)
            if self.summary_only or digest in self._met or digest in self.known:
                done.append(_PACKED.pack(digest, crc, 0, False))
                continue
            if len(self._met) >= _KNOWN_LIMIT:
                self._met = set()
            self._met.add(digest)
            if data is None:
                data = bytes(piece.size)
            stored, compressed = (data, False) if piece.small else packer(data)
            if self.cipher is not None and not piece.small:
                stored = self.cipher.encrypt(stored)
            size = len(stored)
            slot[at : at + size] = stored
            at += size
            done.append(_PACKED.pack(digest, crc, size, compressed))
        return b"".join(done)

    def _summary(self, data: bytes | None, piece: Piece, hasher: Callable[[bytes], bytes]) -> tuple[bytes, int]:
        """Digest and checksum; those of zeros are computed once a length."""
        if data is not None:
            return hasher(data), crc32c(data)
        found = self._zeros.get(piece.size)
        if found is None:
            if len(self._zeros) >= _ZEROS_LIMIT:
                self._zeros.clear()
            zeros = bytes(piece.size)
            found = self._zeros[piece.size] = hasher(zeros), crc32c(zeros)
        return found

    def _read(self, piece: Piece) -> bytes | None:
        """The bytes of a piece; None for nothing but zeros in a hole. Raises `SourceError`."""
        if piece.segments is not None:
            return self._read_tar(piece, piece.segments)
        try:
            if self._member != piece.member:
                self._open(piece)
            if self._sparse and self._hole(piece):
                return None
            data = os.pread(self._file, piece.size, piece.offset)
            while len(data) < piece.size:
                more = os.pread(self._file, piece.size - len(data), piece.offset + len(data))
                if not more:
                    raise SourceError(piece.member, f"it became shorter than {piece.file_size} bytes while it was read")
                data += more
        except OSError as error:
            raise SourceError(piece.member, f"cannot be read: {error.strerror}") from error
        return data

    def _open(self, piece: Piece) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file, self._member = -1, None
        path = self.top + b"/" + piece.member
        self._file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        info = os.fstat(self._file)
        if info.st_size != piece.file_size or info.st_mtime_ns != piece.changed:
            raise SourceError(
                piece.member,
                f"it changed while the image was made ({piece.file_size} bytes before, {info.st_size} now)",
            )
        self._sparse = info.st_blocks * 512 < info.st_size
        self._member = piece.member

    def _hole(self, piece: Piece) -> bool:
        try:
            return os.lseek(self._file, piece.offset, os.SEEK_DATA) >= piece.offset + piece.size
        except OSError as error:
            if error.errno == errno.ENXIO:
                return True
            raise

    def _read_tar(self, piece: Piece, segments: tuple[Segment, ...]) -> bytes | None:
        if not segments:
            return None
        if len(segments) == 1 and segments[0][:2] == (piece.offset, piece.size):
            return self._pread(piece, segments[0][2], piece.size)
        data = bytearray(piece.size)
        for start, length, at in segments:
            data[start - piece.offset : start - piece.offset + length] = self._pread(piece, at, length)
        return bytes(data)

    def _pread(self, piece: Piece, at: int, length: int) -> bytes:
        try:
            data = os.pread(self.tar, length, at)
        except OSError as error:
            raise SourceError(piece.member, f"cannot be read: {error.strerror}") from error
        if len(data) != length:
            raise SourceError(piece.member, f"the tar ends inside it ({len(data)} of {length} bytes at {at})")
        return data
