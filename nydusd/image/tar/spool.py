"""A tar as a file that can be read at any place, whatever it comes as: plain, gzip or zstd, from a file or a pipe.

What is compressed or comes through a pipe is written to a file without a name in `folder`, with holes where there are
zeros: it is gone when the command ends, however it ends. Runs in the process of the command.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

from nydusd.image.errors import ImageError
from nydusd.image.output import os_failure

_PIECE = 1 << 20
_HOLE = 4096
_GZIP_BITE = 16 << 10
"""How much of a gzip stream is inflated at once: the end of each member copies what is left of it, and a member may be tiny."""
_ZSTD_BITE = 1024
"""How much of a zstd stream is inflated at once: the library gives all that comes of it in one piece, at most 32 MiB."""
_MAX_SIZE = 1 << 44
"""What the data of an image can be at most; a stream that inflates to more is a bomb."""

GZIP_MAGIC = b"\x1f\x8b\x08"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class OpenTar:
    """`with ... as tar:` an open descriptor `fd` of a plain tar, `size` bytes long; `path` is what it comes from.

    Raises `ImageError` for what cannot be read.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115 (closed in __exit__)
            try:
                self.size = self._prepare(folder)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise _unreadable(path, error) from error
        self.fd = self._file.fileno()

    def _prepare(self, folder: Path) -> int:
        """Look at the file, and put another one into its place if it is no plain one that can be read at any place: bytes."""
        raise NotImplementedError

    def _begin(self) -> bytes:
        """As much as there is, up to `_PIECE`: a pipe gives pieces."""
        data = b""
        while len(data) < _PIECE and (more := self._file.read(_PIECE - len(data))):
            data += more
        if not data:
            raise ImageError(f"{self.path}: it is empty: no tar, not even one without members")
        return data

    def _spool(self, pieces: Iterator[bytes], folder: Path) -> int:
        source = self._file
        self._file, size = spool(pieces, folder, str(self.path))
        source.close()
        return size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class TarFile(OpenTar):
    """A tar in whatever form, as one that can be read at any place."""

    def _prepare(self, folder: Path) -> int:
        begin = self._begin()
        inflate = _inflater(begin, str(self.path))
        if inflate is None and self._file.seekable():
            return os.fstat(self._file.fileno()).st_size
        pieces = pieces_of(begin, self._file, self.path)
        return self._spool(pieces if inflate is None else inflate(pieces), folder)


def pieces_of(begin: bytes, file: BinaryIO, path: Path) -> Iterator[bytes]:
    """All of a file of which `begin` was read. Raises `ImageError`: whoever takes the pieces has files of its own."""
    yield begin
    try:
        while piece := file.read(_PIECE):
            yield piece
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ImageError:
    return ImageError(f"{path}: cannot be read: {error.strerror}")


Inflate = Callable[[Iterator[bytes]], Iterator[bytes]]


def _inflater(begin: bytes, where: str) -> Inflate | None:
    if begin.startswith(GZIP_MAGIC):
        return lambda pieces: _gunzip(pieces, where)
    if begin.startswith(ZSTD_MAGIC):
        return lambda pieces: _unzstd(pieces, where)
    return None


def _bites(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    for piece in pieces:
        for at in range(0, len(piece), size):
            yield piece[at : at + size]


def _gunzip(pieces: Iterator[bytes], where: str) -> Iterator[bytes]:
    """The plain bytes of any number of gzip members, a piece at a time. Zeros behind the last one are padding."""
    from isal import isal_zlib

    damaged = cast(type[Exception], isal_zlib.error)
    stream = isal_zlib.decompressobj(31)
    started = False
    try:
        for piece in _bites(pieces, _GZIP_BITE):
            while piece:
                if not started:
                    piece = piece.lstrip(b"\0")
                    if not piece:
                        break
                    if not GZIP_MAGIC.startswith(piece[:3]):
                        raise ImageError(f"{where}: bytes behind the gzip stream that belong to no gzip member")
                    started = True
                yield stream.decompress(piece, _PIECE)
                piece = stream.unused_data if stream.eof else stream.unconsumed_tail
                if stream.eof:
                    stream, started = isal_zlib.decompressobj(31), False
            while started and (more := stream.decompress(b"", _PIECE)):  # what the last piece still holds
                yield more
    except damaged as error:
        raise ImageError(f"{where}: the gzip stream is damaged: {error}") from error
    if started:
        raise ImageError(f"{where}: the gzip stream ends too early: it is cut")


def _unzstd(pieces: Iterator[bytes], where: str) -> Iterator[bytes]:
    """The plain bytes of any number of zstd frames."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    frame = None
    try:
        for rest in _bites(pieces, _ZSTD_BITE):
            while rest:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(rest)
                rest = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise ImageError(f"{where}: the zstd stream is damaged: {error}") from error
    if frame is not None:
        raise ImageError(f"{where}: the zstd stream ends too early: it is cut")


def spool(pieces: Iterator[bytes], folder: Path, where: str) -> tuple[BinaryIO, int]:
    """Write pieces to a file without a name in `folder`: the file and its length. Raises `ImageError`."""
    try:
        file = tempfile.TemporaryFile(dir=folder, buffering=_PIECE)  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise os_failure(folder, "cannot be written", error) from error
    size = 0
    try:
        for piece in pieces:
            if size + len(piece) > _MAX_SIZE:
                raise ImageError(f"{where}: it inflates to more than {_MAX_SIZE} bytes")
            if len(piece) >= _HOLE and not piece.strip(b"\0"):
                file.seek(len(piece), os.SEEK_CUR)
            else:
                file.write(piece)
            size += len(piece)
        file.flush()
        file.truncate(size)
    except OSError as error:
        with contextlib.suppress(OSError):  # it tries once more to write what could not be written
            file.close()
        raise os_failure(folder, f"no place for the plain form of {where}", error) from error
    except BaseException:
        file.close()
        raise
    return file, size  # type: ignore[return-value]
