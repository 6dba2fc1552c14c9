"""A file of the kernel's cache (fscache) as a worker fills it: by a descriptor of the supervisor's, borrowed for one job.

The kernel takes whole pages only, from page-aligned memory, and gives no way to read. So what is there is asked by SEEK_HOLE,
and the last page of a chunk is filled up with zeros: chunks begin on pages. Also the job `copy_bootstrap`, in fetch workers.

What holds after SIGKILL: each page that was written holds verified bytes, the others are holes: the kernel asks for them again.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from nydusd.errors import CacheError, FormatError
from nydusd.formats.model import ChunkFlag
from nydusd.ipc.borrow import borrow
from nydusd.ipc.messages import Json
from nydusd.storage.cache.chunk_table import ChunkTable
from nydusd.storage.state.map_file import drop_holes
from nydusd.storage.state.segment import READY, RECORD
from workers.blobs import OpenBlobs

PAGE = 4096
_PIECE = 1 << 20
"""Bytes of one write."""
_UNLISTED = int(ChunkFlag.UNLISTED)
_PADDING_MOST = 64 << 20
"""Bytes between chunks that are filled with zeros at most; a real blob has none."""


@contextmanager
def lent(cookie: tuple[int, int]) -> Iterator[int]:
    """The descriptor of a file of the kernel's cache, for as long as the block runs. Raises CacheError."""
    try:
        fd = borrow(*cookie, lambda: os.getppid() == cookie[0])  # the supervisor that has given us the job
    except OSError as e:
        raise CacheError(f"the kernel's cache file cannot be had from pid {cookie[0]}: {e.strerror}", e.errno) from e
    try:
        yield fd
    finally:
        os.close(fd)


def write_pages(fd: int, data: memoryview, offset: int) -> None:
    """Write from a page on, zeros up to the next page behind the data. Raises OSError."""
    if offset % PAGE:
        raise OSError(
            errno.EINVAL, f"offset {offset} is not a page's"
        )  # the kernel would round it down and say nothing
    with mmap.mmap(-1, min(_PIECE, -(-len(data) // PAGE) * PAGE or PAGE)) as buffer, memoryview(buffer) as view:
        while data:
            piece = data[: len(view)]
            size = -(-len(piece) // PAGE) * PAGE
            view[: len(piece)] = piece
            view[len(piece) : size] = bytes(size - len(piece))
            done = os.pwrite(fd, view[:size], offset)
            if done != size:
                done -= done % PAGE
                if not done:
                    raise OSError(errno.EIO, "the kernel takes no part of a page")
            data, offset = data[done:], offset + done


def survey(fd: int, table: ChunkTable, where: str) -> bytearray:
    """Which chunks are in the kernel's file; what lies between chunks is filled with zeros. Raises FormatError, OSError."""
    state = bytearray([READY]) * table.count
    rows = list(RECORD.iter_unpack(bytes(table.records)))
    records = [(record[1], record[3]) for record in rows]
    for uoff, usize in records:
        if uoff % PAGE and usize:
            raise FormatError(where, "chunk table", f"a chunk begins at {uoff}, which is not a multiple of {PAGE}")
    size = -(-table.uncompressed_size // PAGE) * PAGE
    known = [(record[1], 0 if record[4] & _UNLISTED else record[3]) for record in rows]
    for start, length in _between(known, size, where):
        if os.lseek(fd, start, os.SEEK_HOLE) < start + length:
            write_pages(fd, memoryview(bytes(length)), start)
    drop_holes(fd, state, ((uoff, -(-usize // PAGE) * PAGE) for uoff, usize in records), size)
    return state


def _between(records: Iterable[tuple[int, int]], size: int, where: str) -> list[tuple[int, int]]:
    """Offset and length of the pages that belong to no chunk. Not where there are chunks of which no image says anything yet:
    one that is bound later may. Their size is 0, also where the blob itself says one, which nobody vouches for.
    """
    found: list[tuple[int, int]] = []
    end, unknown = 0, False
    for uoff, usize in [*records, (size, PAGE)]:
        if not usize:
            unknown = True
            continue
        if uoff > end and not unknown:
            found.append((end, uoff - end))
        end, unknown = max(end, -(-(uoff + usize) // PAGE) * PAGE), False
    total = sum(length for _, length in found)
    if total > _PADDING_MOST:
        raise FormatError(
            where, "chunk table", f"{total} bytes belong to no chunk; {_PADDING_MOST} at most are supported"
        )
    return found


def copy_bootstrap(_blobs: OpenBlobs, job: Json) -> Json:
    """Copy a part of a metadata file into the kernel's file of it. Job: path, size, offset, length, cookie."""
    try:
        with open(job["path"], "rb") as source, lent((int(job["cookie"][0]), int(job["cookie"][1]))) as fd:
            if os.fstat(source.fileno()).st_size != job["size"]:
                raise CacheError(f"{job['path']}: its size is not the {job['size']} bytes that it was mounted with")
            data = os.pread(source.fileno(), job["length"], job["offset"])
            if len(data) < min(job["length"], job["size"] - job["offset"]):  # the rest would be written as zeros
                raise CacheError(f"{job['path']}: gave {len(data)} of {job['length']} bytes at {job['offset']}")
            write_pages(fd, memoryview(data), job["offset"])
    except OSError as e:
        raise CacheError(f"{job['path']}: copying it into the kernel's cache: {e.strerror}", e.errno) from e
    return {}


def cull(_blobs: OpenBlobs, job: Json) -> Json:
    """Have the kernel remove files of a name from its cache that are not in use.

    Job: folder (of the cache), name, device (pid and number). Answer: culled (paths), busy (paths).
    """
    culled, busy = [], []
    with lent((int(job["device"][0]), int(job["device"][1]))) as device:
        try:
            for path in _files(os.path.join(job["folder"], "cache"), f"D{job['name']}"):
                os.chdir(os.path.dirname(path))  # the kernel looks for the name there
                try:
                    os.write(device, f"cull {os.path.basename(path)}".encode())
                    culled.append(path)
                except OSError as e:
                    if e.errno not in (errno.EBUSY, errno.ENOENT, errno.ESTALE):
                        raise
                    if e.errno == errno.EBUSY:
                        busy.append(path)
        except OSError as e:
            raise CacheError(f"the kernel does not remove {job['name']} from its cache: {e.strerror}", e.errno) from e
        finally:
            os.chdir("/")
    return {"culled": culled, "busy": busy}


def _files(folder: str, name: str) -> Iterator[str]:
    """The files of this name in all volumes: `Ierofs,DOMAIN/@XX/NAME`."""
    for volume in sorted(os.listdir(folder)):
        if not volume.startswith("Ierofs,"):
            continue
        for number in range(256):
            path = os.path.join(folder, volume, f"@{number:02x}", name)
            if os.path.lexists(path):
                yield path
