"""Blobs that are partitions of a disk, or of the image of one. Run by fetch workers; nothing is written.

The disk stays open. It is opened anew, and its partition table read again, once per read when something fails: it may
have been replaced since.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Mapping, Sequence

from nydusd.config.model import LocalDisk as LocalDiskConfig
from nydusd.errors import BackendError, ConfigError, FormatError, NoSuchBlobError
from nydusd.storage.backend.base import BlobBackend, BlobReader, ReadHow
from nydusd.storage.backend.gpt import BASIC_DATA, SECTOR_SIZES, Partition, read_partitions
from nydusd.storage.backend.table import read_table

_BLKSSZGET = 0x1268
_BLKGETSIZE64 = 0x80081272
_NAME_LENGTH = 32
"""How much of a blob id fits into the name of a partition; the rest is in the partition's GUID."""


class LocalDisk(BlobBackend):
    """The blobs on the disk `device_path`: one a partition, by what name and GUID of the partition say.

    With `disable_gpt` there is no partition table: the disk as a whole is the blob, whatever its id.
    """

    def __init__(self, device_path: str, disable_gpt: bool = False) -> None:
        super().__init__()
        if not device_path or "\0" in device_path:
            raise ConfigError(f"backend localdisk: 'device_path' is {device_path!r}; it must name a disk or its image")
        self._path = device_path
        self._whole = disable_gpt
        self._fd = -1
        self._capacity = 0
        self._blobs: dict[str, tuple[int, int]] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> LocalDisk:
        """Take the keys device_path and disable_gpt. Raises `ConfigError`."""
        table = read_table("localdisk", config, LocalDiskConfig)
        return cls(table.device_path, table.disable_gpt)

    def extent(self, blob_id: str) -> tuple[int, int]:
        """Offset and size in bytes of a blob on the disk, which is opened if it is not. Raises `BackendError`."""
        self._open()
        if self._whole:
            return 0, self._capacity
        # Old images have the id in the partition's name alone, which cuts it.
        found = self._blobs.get(blob_id) or self._blobs.get(blob_id[:_NAME_LENGTH])
        if found is None:
            raise NoSuchBlobError(f"blob {blob_id}: none of the {len(self._blobs)} partitions of {self._path} has it")
        return found

    def fill(self, buf: memoryview, offset: int) -> int:
        """Read at an offset of the disk until `buf` is full or the disk ends; how many bytes that were."""
        done = 0
        while done < len(buf):
            count = os.preadv(self._fd, [buf[done:]], offset + done)
            if not count:
                break
            done += count
        return done

    def close_disk(self) -> None:
        """Close the disk; the next use opens it and reads its partition table anew."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._blobs = {}

    def close(self) -> None:
        super().close()
        self.close_disk()

    def _new_reader(self, blob_id: str) -> BlobReader:
        return DiskReader(blob_id, self, self._path)

    def _open(self) -> None:
        if self._fd >= 0:
            return
        try:
            # O_NONBLOCK: opening a named pipe would wait for its writer.
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            self._capacity, sector_sizes = _measure(self._fd)
            if not self._whole:
                partitions = read_partitions(self._path, self._read_at, self._capacity, sector_sizes)
                self._blobs = _by_blob_id(self._path, partitions)
        except OSError as error:
            self.close_disk()
            raise BackendError(f"{self._path}: {error.strerror or error}") from error
        except FormatError as error:
            self.close_disk()
            raise BackendError(str(error)) from error

    def _read_at(self, offset: int, size: int) -> bytes:
        buf = bytearray(size)
        with memoryview(buf) as view:
            return bytes(buf[: self.fill(view, offset)])


def _measure(fd: int) -> tuple[int, Sequence[int]]:
    """Capacity in bytes, and the sector sizes to look for a partition table with, the likeliest first."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fstat(fd).st_size, SECTOR_SIZES
    if not stat.S_ISBLK(mode):
        raise OSError("neither a disk nor a regular file")
    (capacity,) = struct.unpack("@Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))
    (sector,) = struct.unpack("@i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))
    # An image that was written for one sector size may have been copied onto a disk of another.
    return capacity, (sector, *(size for size in SECTOR_SIZES if size != sector))


def _by_blob_id(where: str, partitions: list[Partition]) -> dict[str, tuple[int, int]]:
    """Where each blob is. Raises `FormatError` for a partition without a name, or with that of another.

    A name that cannot be a blob's id does no harm: nobody can ask for it.
    """
    found: dict[str, tuple[int, int]] = {}
    for partition in partitions:
        field = f"partition {partition.number}"
        if not partition.name:
            raise FormatError(where, field, "has no name; the name is the blob's id, or its first 32 characters")
        blob_id = partition.name[:_NAME_LENGTH]
        if partition.kind != BASIC_DATA:
            blob_id += partition.guid.hex
        if blob_id in found:
            raise FormatError(where, field, f"has the blob id {blob_id}, as another partition has")
        found[blob_id] = (partition.offset, partition.size)
    return found


class DiskReader(BlobReader):
    """One blob on a disk."""

    def __init__(self, blob_id: str, backend: LocalDisk, path: str) -> None:
        super().__init__(blob_id, backend.metrics)
        self._disk = backend
        self._path = path

    def blob_size(self) -> int:
        """Length of the partition: that of the blob, rounded up to whole sectors."""
        return self._disk.extent(self.blob_id)[1]

    def _read_into(self, buf: memoryview, offset: int, how: ReadHow) -> None:
        try:
            if self._fill(buf, offset) == len(buf):
                return
        except (OSError, BackendError):
            pass  # once more, with the disk opened anew
        self._disk.close_disk()
        try:
            done = self._fill(buf, offset)
        except OSError as error:
            raise BackendError(f"blob {self.blob_id}: {self._path}: {error.strerror}") from error
        if done < len(buf):
            raise BackendError(
                f"blob {self.blob_id}: its partition of {self._path} is shorter than the image says: "
                f"{len(buf)} bytes at {offset} are needed, {done} are there"
            )

    def _fill(self, buf: memoryview, offset: int) -> int:
        """Read until `buf` is full or the partition ends; how many bytes that were."""
        start, size = self._disk.extent(self.blob_id)
        return self._disk.fill(buf[: max(size - offset, 0)], start + offset)
