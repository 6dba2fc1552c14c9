"""Blobs that are files: one folder with a file a blob, alternatives to it, or one file for every blob.

Run by fetch workers. A file stays open and is opened anew, once per read, when it fails or ends too early: it may
have been replaced since. Nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping

from nydusd.errors import BackendError, ConfigError, NoSuchBlobError, comes_of_want
from nydusd.storage.backend.base import BlobBackend, BlobReader, ReadHow

MAX_OPEN = 128
"""Files kept open at most: a process may have to serve more blobs than it may have descriptors."""


class LocalFs(BlobBackend):
    """`blob_file` serves every blob. Else blob `<id>` is `dir/<id>` if that is a file with content, else the first
    of `alt_dirs` that has one."""

    def __init__(self, blob_file: str = "", folder: str = "", alt_dirs: tuple[str, ...] = ()) -> None:
        super().__init__()
        if not blob_file and not folder:
            raise ConfigError("backend localfs: neither 'blob_file' nor 'dir' is set; one of them is needed")
        self._blob_file = blob_file
        self._folders = (folder, *alt_dirs)
        self._open_readers: dict[LocalReader, None] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> LocalFs:
        """Take the keys blob_file, dir and alt_dirs; others (readahead, readahead_sec) had a meaning once."""
        alt_dirs = config.get("alt_dirs") or ()
        if not isinstance(alt_dirs, list | tuple) or not all(
            isinstance(name, str) and name and "\0" not in name for name in alt_dirs
        ):
            raise ConfigError(f"backend localfs: 'alt_dirs' is {alt_dirs!r}; it must be a list of folder names")
        return cls(_text(config, "blob_file"), _text(config, "dir"), tuple(alt_dirs))

    def opened(self, reader: LocalReader) -> None:
        """A reader has opened its file: close the one that did so longest ago if there are too many."""
        self._open_readers[reader] = None
        if len(self._open_readers) > MAX_OPEN:
            next(iter(self._open_readers)).close()

    def closed(self, reader: LocalReader) -> None:
        self._open_readers.pop(reader, None)

    def _new_reader(self, blob_id: str) -> BlobReader:
        in_folders = [os.path.join(folder, blob_id) for folder in self._folders]
        return LocalReader(blob_id, [self._blob_file] if self._blob_file else in_folders, self)


def _text(config: Mapping[str, object], key: str) -> str:
    value = config.get(key) or ""
    if not isinstance(value, str) or "\0" in value:
        raise ConfigError(f"backend localfs: {key!r} is {value!r}; it must be a path")
    return value


class LocalReader(BlobReader):
    """One blob file. `paths` are tried in order; the first with content is taken."""

    def __init__(self, blob_id: str, paths: list[str], backend: LocalFs) -> None:
        super().__init__(blob_id, backend.metrics)
        self._backend = backend
        self._paths = paths
        self._fd = -1
        self._path = ""

    def blob_size(self) -> int:
        try:
            return os.fstat(self._open()).st_size
        except OSError as error:
            raise BackendError(f"blob {self.blob_id}: {self._path}: {error.strerror}") from error

    def will_need(self, offset: int, size: int) -> None:
        # A hint: whatever is wrong with the file is said when it is read.
        with contextlib.suppress(BackendError, OSError, OverflowError):
            os.posix_fadvise(self._open(), offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._backend.closed(self)

    def _read_into(self, buf: memoryview, offset: int, how: ReadHow) -> None:
        try:
            done = self._fill(buf, offset)
        except (OSError, NoSuchBlobError):
            done = 0
        if done == len(buf):
            return
        self.close()
        try:
            done = self._fill(buf, offset)
        except OSError as error:
            path = error.filename or self._path
            raise BackendError(f"blob {self.blob_id}: {path}: {error.strerror}") from error
        if done < len(buf):
            raise BackendError(
                f"blob {self.blob_id}: {self._path} is shorter than the image says: "
                f"{len(buf)} bytes at {offset} are needed, {done} are there"
            )

    def _fill(self, buf: memoryview, offset: int) -> int:
        """Read until `buf` is full or the file ends; how many bytes that were."""
        fd = self._open()
        done = 0
        while done < len(buf):
            count = os.preadv(fd, [buf[done:]], offset + done)
            if not count:
                break
            done += count
        return done

    def _open(self) -> int:
        """The file, opened if it is not: the first with content, else the first empty one."""
        if self._fd >= 0:
            return self._fd
        empty = ("", -1)
        wrong = []
        for path in self._paths:
            try:
                fd = _open_regular(path)
            except OSError as error:
                if comes_of_want(error):  # that says nothing of the file
                    if empty[1] >= 0:
                        os.close(empty[1])
                    raise
                wrong.append(f"{path}: {error.strerror or error}")
                continue
            if os.fstat(fd).st_size:
                if empty[1] >= 0:
                    os.close(empty[1])
                return self._keep(path, fd)
            if empty[1] >= 0:
                os.close(fd)
            else:
                empty = (path, fd)
        if empty[1] < 0:
            raise NoSuchBlobError(f"blob {self.blob_id}: no file has it ({'; '.join(wrong)})")
        return self._keep(*empty)

    def _keep(self, path: str, fd: int) -> int:
        self._path, self._fd = path, fd
        self._backend.opened(self)
        return fd


def _open_regular(path: str) -> int:
    """Open a file for reading. Raises `OSError` for folders, devices, pipes and sockets. Symlinks are followed."""
    # O_NONBLOCK: opening a named pipe would wait for its writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError("not a regular file")
    return fd
