"""Journal: the requests that a front end has taken and not answered, in memory that outlives it.

One memfd a lane, made and held by the supervisor, mapped by the lane's front end. The kernel places each request straight
into it (it is the buffer of read(2)), so that the one in service is journaled at no cost; only a read that is parked is
copied. FUSE_NOTIFY_RESEND could bring requests back as well, but only from kernel 6.9 on, and from living front ends too.

What holds after SIGKILL between any two instructions: every request that is taken and not answered is in here, complete.
One that was answered may be in here too: the successor answers it again, and the kernel refuses that (ENOENT), because
it never uses a `unique` twice.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from struct import Struct

from . import protocol as p

_MAGIC = 0x31_4C_4E_52_4A_59_4E  # NYJRNL1: another layout, another number
_HEADER = Struct("=QQQ")
"""magic; the request that a successor is serving again, by `unique` (0: none); how many have crashed at it."""

NAME = "nydusd-journal"
"""What the name of a journal's memfd begins with."""
REQUEST_SIZE = 64 * 1024
"""Bytes of the request buffer. A request without payload is small; a BATCH_FORGET fills whatever there is."""
_REQUEST = p.PAGE
READS = 1 << 16
"""Reads that can be parked: what the kernel sends in the background at most, and some."""
_READ_SIZE = p.IN_HEADER.size + p.READ_IN.size
_STATES = _REQUEST + REQUEST_SIZE
_BODIES = _STATES + READS
_SIZE = _BODIES + READS * _READ_SIZE
"""7 MB, of which memory is only used for what was touched."""

FREE, TAKEN, INTERRUPTED = range(3)
"""State of a parked read, one byte: set after its body was copied, cleared after it was answered."""
_LIVES = 3
"""Front ends that may crash while they serve the same request again. It is failed then, and the others are served."""


def create() -> int:
    """A new, empty journal: its fd, not inheritable. The caller closes it. Raises OSError."""
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _SIZE)
        os.pwrite(fd, _HEADER.pack(_MAGIC, 0, 0), 0)
    except OSError:
        os.close(fd)
        raise
    return fd


class Journal:
    """A lane's journal as its front end uses it. Raises OSError when `fd` cannot be mapped.

    `crashed`: the predecessor died by itself. One that was killed is no witness against a request.
    """

    def __init__(self, fd: int, *, crashed: bool = False) -> None:
        self._crashed = crashed
        self.intact = os.fstat(fd).st_size == _SIZE and _HEADER.unpack(os.pread(fd, _HEADER.size, 0))[0] == _MAGIC
        """False for a journal of another version of this code: nothing is known then of what was taken."""
        if not self.intact:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, _SIZE)
            os.pwrite(fd, _HEADER.pack(_MAGIC, 0, 0), 0)
        view = memoryview(mmap.mmap(fd, _SIZE))
        self._header = view[: _HEADER.size]
        self.request = view[_REQUEST:_STATES]
        """The buffer to read requests into."""
        self._states = view[_STATES:_BODIES]
        self._bodies = view[_BODIES:]
        self._free: list[int] = []
        self._unused = READS
        # The kernel fails a request with EIO if it cannot place it. A page that is there when we are killed is no obstacle.
        for offset in range(0, REQUEST_SIZE, p.PAGE):
            self.request[offset] = self.request[offset]

    @property
    def full(self) -> bool:
        """Whether no further read can be parked: then none may be taken from the kernel."""
        return not self._free and not self._unused

    def keep(self) -> int:
        """Copy the READ in the request buffer; gives the place, for the other methods."""
        if self._free:
            place = self._free.pop()
        else:
            self._unused -= 1
            place = self._unused
        offset = place * _READ_SIZE
        self._bodies[offset : offset + _READ_SIZE] = self.request[:_READ_SIZE]
        self._states[place] = TAKEN
        return place

    def interrupted(self, place: int) -> None:
        """Note that the kernel has reported an interrupt of this read: it does so once."""
        self._states[place] = INTERRUPTED

    def drop(self, place: int) -> None:
        """A read is answered. Twice is once: a place that two reads believed to be theirs would lose one of them."""
        if self._states[place] != FREE:
            self._states[place] = FREE
            self._free.append(place)

    def left(self) -> Iterator[tuple[int, memoryview, bool]]:
        """What a predecessor had parked: place, READ request, whether it was interrupted. They stay until dropped."""
        states = bytes(self._states)
        found = [place for place in range(READS) if states[place]] if any(states) else []
        if found:
            self._unused = found[0]
            self._free = [place for place in range(self._unused, READS) if not states[place]]
        for place in found:
            offset = place * _READ_SIZE
            yield place, self._bodies[offset : offset + _READ_SIZE], states[place] == INTERRUPTED

    def serve_again(self, unique: int) -> bool:
        """Note that a request is being served once more. False when too many have crashed at that: fail it instead."""
        _, before, deaths = _HEADER.unpack(self._header)
        deaths = deaths + self._crashed if before == unique else 0
        _HEADER.pack_into(self._header, 0, _MAGIC, unique, deaths)
        return bool(deaths < _LIVES)

    def served_again(self) -> None:
        """It did not kill us."""
        _HEADER.pack_into(self._header, 0, _MAGIC, 0, 0)
