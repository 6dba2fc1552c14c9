"""What the disk of a cache file has, not the page cache: the kernel takes a page for clean that it could not write.

Run by workers, for chunks that are doubted, and by a front end that is alone and has no worker to look. What is not written yet
is written first; what is on the disk then stays there, since nothing is taken out of a cache file that is used. Nothing is
said of it here: after SIGKILL the next one looks again.
"""

from __future__ import annotations

import mmap
import os

from nydusd.codec.crc import crc32c
from nydusd.codec.digest import digest
from nydusd.formats.model import ChunkFlag, Digester
from nydusd.storage.state.segment import CHECKABLE, Segment

_BLOCK = 4096
"""What direct I/O is aligned to; a file system of larger blocks refuses that."""


def read_disk(fd: int, offset: int, length: int) -> bytes:
    """What is there; less than `length` bytes where the file ends before. Raises OSError, EINVAL: it has no direct I/O."""
    begin = offset - offset % _BLOCK
    size = -(-(offset + length - begin) // _BLOCK) * _BLOCK
    direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, size) as pages:
            got = os.preadv(direct, [pages], begin)
            return pages[offset - begin : min(got, offset - begin + length)]
    finally:
        os.close(direct)


def is_on_disk(fd: int, segment: Segment, chunk: int) -> bool:
    """Whether a chunk is there, by its digest or checksum; False if it has neither. Raises OSError.

    The segment does not say which kind of digest it has: it is one of two, and neither can be that of other bytes.
    """
    record = segment.record(chunk)
    if not record.flags & CHECKABLE:
        return False
    plain = read_disk(fd, record.uoff, record.usize)
    if len(plain) < record.usize:
        return False
    if record.flags & ChunkFlag.DIGEST:
        wanted = segment.digest(chunk)
        return any(digest(kind, plain) == wanted for kind in Digester)
    return crc32c(plain) == record.crc
