"""Files that are being made: under a hidden temporary name in their folder until they are complete, then renamed.

An error removes the temporary file; after SIGKILL it stays (`.nydus-image-….part`), and nothing ever has the final name
that is not complete. Not flushed to the disk: after a power cut a file may be short, and its digest tells.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from nydusd.image.errors import ImageError

_BUFFER = 256 << 10
_LARGE = 64 << 10

Buffer = bytes | bytearray | memoryview


class Output:
    """A file to be appended to, with the sha256 of what was `write`n. `with Output(folder) as out: ... out.publish(path)`.

    An existing FIFO or device at `stream` is written to directly: some converters read the blob so while it is made.
    Raises `ImageError` for every error of the file system, with the path.
    """

    def __init__(self, folder: Path, stream: Path | None = None) -> None:
        self._hash = hashlib.sha256()
        self._waiting = bytearray()  # hashed and written together: most chunks are small
        self._file = -1
        self._part: Path | None = None
        self.position = 0
        self.shown = stream or folder
        try:
            if stream is not None and _is_stream(stream):
                self._file = os.open(stream, os.O_WRONLY | os.O_CLOEXEC)
                return
            self._file, name = tempfile.mkstemp(prefix=".nydus-image-", suffix=".part", dir=folder)
            self._part = Path(name)
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(self._file, 0o666 & ~mask)
        except OSError as error:
            if self._part is not None:
                self.__exit__(OSError, error, None)
            raise os_failure(self.shown, "cannot be written", error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            os.close(self._file)
        except OSError as failure:
            if error is None:
                raise os_failure(self.shown, "cannot be written", failure) from failure
        finally:
            if self._part is not None:
                self._part.unlink(missing_ok=True)

    def write(self, data: Buffer, *, hashed: bool = True) -> int:
        """Append; the position at which the data begins."""
        begin = self.position
        if not hashed:
            self._flush()
            self._append(data)
        elif len(data) < _LARGE:
            self._waiting += data
            if len(self._waiting) >= _BUFFER:
                self._flush()
        else:
            self._flush()
            self._hash.update(data)
            self._append(data)
        self.position += len(data)
        return begin

    def _flush(self) -> None:
        if self._waiting:
            data, self._waiting = self._waiting, bytearray()
            self._hash.update(data)
            self._append(data)

    def _append(self, data: Buffer) -> None:
        try:
            done = os.write(self._file, data)
            while done < len(data):
                done += os.write(self._file, memoryview(data)[done:])
        except OSError as error:
            raise os_failure(self.shown, "cannot be written", error) from error

    def put(self, at: int, data: Buffer) -> None:
        """Write at a place of a file that is not hashed. Holes stay holes."""
        try:
            done = os.pwrite(self._file, data, at)
            while done < len(data):
                done += os.pwrite(self._file, memoryview(data)[done:], at + done)
        except OSError as error:
            raise os_failure(self.shown, "cannot be written", error) from error
        self.position = max(self.position, at + len(data))

    def read(self, at: int, size: int) -> bytes:
        """What was put at a place of the file."""
        try:
            data = os.pread(self._file, size, at)
            while len(data) < size and (more := os.pread(self._file, size - len(data), at + len(data))):
                data += more
        except OSError as error:
            raise os_failure(self.shown, "cannot be read", error) from error
        return data

    def extend(self, size: int) -> None:
        """Make a file that is not hashed `size` bytes long."""
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            raise os_failure(self.shown, "cannot be written", error) from error
        self.position = size

    def digest(self) -> bytes:
        """sha256 of all hashed bytes so far."""
        self._flush()
        return self._hash.digest()

    def publish(self, path: Path) -> None:
        """All is written: give the file its name, replacing what had it. A stream is only flushed."""
        self._flush()
        try:
            if self._part is not None:
                self._part.replace(path)
                self._part = None
        except OSError as error:
            raise os_failure(path, "cannot be written", error) from error


def write_file(path: Path, data: Buffer) -> None:
    """A whole file at once, in the same way."""
    with Output(path.parent, path) as out:
        out.write(data, hashed=False)
        out.publish(path)


def save(path: Path, pieces: Iterable[bytes]) -> str:
    """Write what comes to a file of a folder that goes away with the command, so under its own name: its sha256."""
    digest = hashlib.sha256()
    try:
        with open(path, "wb", buffering=0) as out:
            for piece in pieces:
                digest.update(piece)
                rest = memoryview(piece)
                while rest:
                    rest = rest[out.write(rest) :]
    except OSError as error:
        raise os_failure(path, "cannot be written", error) from error
    return digest.hexdigest()


def folder_of(path: Path) -> Path:
    """The folder, checked. Raises `ImageError` if it is none."""
    if not path.is_dir():
        raise ImageError(f"{path}: must be an existing folder")
    return path


def _is_stream(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def os_failure(path: Path, what: str, error: OSError) -> ImageError:
    """What to raise for an error of the file system."""
    hint = " (the disk is full)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return ImageError(f"{path}: {what}: {error.strerror}{hint}")
