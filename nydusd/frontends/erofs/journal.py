"""Journal: the events that a front end has taken and not answered, in memory that outlives it.

One memfd, made and held by the supervisor, held by the guard, mapped by the front end. The kernel gives an event once and
knows it by the number of an fd alone, which it opened in the process that took the event; any process that has the group
may answer it by that number. So the number, and the range, are in here before anything is done for it: read(2) of the
group goes straight into the journal, and what must wait is copied. Which blob it is of is noted as soon as that is found out.

What holds after SIGKILL between any two instructions: every event that was taken and not answered is in here. One that was
answered may be in here too; no event was given the same number since, because an event is taken off the journal before
its fd is closed. A successor must not let the kernel give it one of these numbers again: see `reserve`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable
from struct import Struct
from typing import NamedTuple

from nydusd.errors import FormatError

from .fanotify import EVENT_SIZE, READ_SIZE, Event, events, key_of

_MAGIC = 0x31_4A_46_44_59_4E  # NYDFJ1: another layout, another number
_HEADER = Struct("=Q")
_ENTRY = Struct("=iIqQQ")
"""number, front ends that crashed at it, blob, offset, count."""
EVENTS = 1 << 14
"""Readers that can wait at once."""
_BUFFER = mmap.PAGESIZE
_STATES = _BUFFER + READ_SIZE
_ENTRIES = _STATES + EVENTS
_SIZE = _ENTRIES + EVENTS * _ENTRY.size
_NOTHING = bytes(READ_SIZE)
_FREE, _TAKEN = 0, 1
LIVES = 3
"""Front ends that may crash while they serve the same event again. Its reader is refused then."""
UNKNOWN = -1
"""Instead of a blob: only the fd said which one, and the process that had it died before it asked, while it answered those that
came with this event. All are not asked about first: that costs the usual case, one event, more than it gives."""


class Kept(NamedTuple):
    """An event that a predecessor has left. `blob` is `table.File.key` or UNKNOWN; `hopeless`: too many have crashed at it."""

    place: int
    event: Event
    blob: int
    hopeless: bool


def create() -> int:
    """A new, empty journal: its fd, not inheritable. The caller closes it. Raises OSError."""
    fd = os.memfd_create("nydusd-journal", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _SIZE)
        os.pwrite(fd, _HEADER.pack(_MAGIC), 0)
    except OSError:
        os.close(fd)
        raise
    return fd


class Journal:
    """The journal as the one process uses it that reads the group. Waits until no other does. Raises FormatError, OSError.

    `crashed`: the predecessor died by itself. One that was killed is no witness against an event.
    """

    def __init__(self, fd: int, *, crashed: bool = False) -> None:
        if os.fstat(fd).st_size != _SIZE or _HEADER.unpack(os.pread(fd, _HEADER.size, 0))[0] != _MAGIC:
            raise FormatError("journal", "header", "it is of another version of this program")
        fcntl.lockf(fd, fcntl.LOCK_EX)  # ends with the process; a second reader of the group would confuse the numbers
        view = memoryview(mmap.mmap(fd, _SIZE))
        self.buffer = view[_BUFFER:_STATES]
        """To read the group into."""
        self.words = self.buffer.cast("q")
        """The same, to note keys of events in (`fanotify.Event.word`)."""
        self._states = view[_STATES:_ENTRIES]
        self._entries = view[_ENTRIES:]
        self.left = self._recover(crashed)
        """What a predecessor had taken and not answered. Each stays until it is dropped."""
        self._free = [place for place in range(EVENTS - 1, -1, -1) if self._states[place] == _FREE]
        # The kernel refuses an event that it cannot place. A page that is there is no obstacle.
        self.buffer[0] = self.buffer[0]

    @property
    def full(self) -> bool:
        """Whether no further event can be kept: then none may be taken."""
        return len(self._free) < READ_SIZE // EVENT_SIZE

    def keep(self, event: Event, blob: int) -> int:
        """Note an event that must wait; gives the place."""
        place = self._free.pop()
        _ENTRY.pack_into(self._entries, place * _ENTRY.size, event.fd, 0, blob, event.offset, event.length)
        self._states[place] = _TAKEN
        return place

    def drop(self, place: int) -> None:
        """An event was answered. Its fd may be closed from now on."""
        self._states[place] = _FREE
        self._free.append(place)

    def settled(self, length: int = READ_SIZE) -> None:
        """All that is in the first `length` bytes of the buffer was answered or kept, and nothing is behind them."""
        self.buffer[:length] = _NOTHING[:length]

    def _recover(self, crashed: bool) -> list[Kept]:
        """Move what is in the buffer to places, and list all that is kept."""
        taken = [place for place in range(EVENTS) if self._states[place] == _TAKEN]
        known = {_ENTRY.unpack_from(self._entries, place * _ENTRY.size)[0] for place in taken}
        free = (place for place in range(EVENTS) if self._states[place] == _FREE)
        for event in events(self.buffer):
            if event.fd not in known:
                place = next(free)
                blob = key_of(self.buffer, event)
                entry = (event.fd, 0, UNKNOWN if blob is None else blob, event.offset, event.length)
                _ENTRY.pack_into(self._entries, place * _ENTRY.size, *entry)
                self._states[place] = _TAKEN
                taken.append(place)
        self.settled()
        found = []
        for place in taken:
            at = place * _ENTRY.size
            number, deaths, blob, offset, count = _ENTRY.unpack_from(self._entries, at)
            deaths += crashed
            _ENTRY.pack_into(self._entries, at, number, deaths, blob, offset, count)
            found.append(Kept(place, Event(number, offset, count), blob, deaths >= LIVES))
        return found


def reserve(left: Iterable[Kept]) -> set[int]:
    """Occupy the numbers of a predecessor's events, so that the kernel gives no new event one of them.

    To be called first of all, before fds are opened that are closed again some day. Gives the numbers that are to be closed
    when their event is answered; one that is not among them is an fd of ours that stays.
    """
    ours = set()
    nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    for number in sorted({kept.event.fd for kept in left}):
        if number == nothing:
            nothing = os.dup(nothing)
            ours.add(number)
            continue
        try:
            fcntl.fcntl(number, fcntl.F_GETFD)
        except OSError:
            os.dup2(nothing, number, inheritable=False)
            ours.add(number)
    os.close(nothing)
    return ours
