"""Syncs of a cache file, and doubts: what is done when its disk did not take what is said to be ready.

The kernel drops such bytes and says so once to each open file; to one that is opened later only if nobody was told yet. What
was ready may then be read as zeros. So nothing is ready any more in any segment of the file before it was looked for on the
disk: it is VERIFY, or EMPTY where it cannot be checked.

Those who sync a file take turns (`alone`), from before they look what is ready until its bits are stored or all of it is
doubted: else one who opens the file when another was told, and has not doubted yet, would store bits for what is lost. A sync
is of the file, so of all that is ready in whichever segment: `syncing` is set in all of them, and `dirty` taken back.

Runs in workers, `tell_lost` in front ends. What holds after SIGKILL: `syncing` is set where it was, and whoever has his turn
next doubts all of it. The turn ends with its holder. It is flock(2) on the data file, which nobody else uses: those who keep
that file as it is for a moment have another lock of it (`map_file.lock`), and are not to wait for a disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import time
from collections.abc import Collection, Iterator

from nydusd import points
from nydusd.errors import CacheError
from nydusd.storage.state.segment import READY, SYNCING, Segment
from nydusd.storage.state.sharing import segments_of

_START_WRITING = 2
"""SYNC_FILE_RANGE_WRITE."""
_CACHESTAT = 451
"""The system call, on every architecture."""
_FLUSH_SECONDS = 5.0
_PATIENCE = 3.0
"""Seconds to wait for the sync of another image or daemon."""

_libc = ctypes.CDLL(None, use_errno=True)


def flush(fd: int) -> None:
    """Have what is written of a data file brought to its disk, and wait for that, 5 s at most; what became of it is not asked.

    So the sync that asks, and in which others may be in doubt (`Segment.syncing`), is a short one. This waits by looking at the
    page cache: whatever else waits takes a lock that writers need, or takes the answer away from those who open the file
    later. Before Linux 6.5 it cannot be looked at, and the sync is longer.
    """
    _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_START_WRITING))
    deadline = time.monotonic() + _FLUSH_SECONDS
    found = (ctypes.c_uint64 * 5)()  # struct cachestat: pages in the cache, dirty, under writeback, …
    everything = (ctypes.c_uint64 * 2)(0, 0)
    while not _libc.syscall(ctypes.c_long(_CACHESTAT), fd, everything, found, 0):
        if not found[2] or time.monotonic() > deadline:
            break
        time.sleep(0.005)


@contextlib.contextmanager
def alone(fd: int, what: str) -> Iterator[None]:
    """Nobody else syncs the data file meanwhile. Raises CacheError when another does so for too long."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as e:
            if time.monotonic() > deadline:
                raise CacheError(f"{what}: another process is syncing it", errno.EAGAIN) from e
            time.sleep(0.02)
        except OSError as e:
            raise CacheError(f"{what}: {e.strerror}", e.errno) from e
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def is_any_doubtful(segment: Segment) -> bool:
    """Whether somebody who uses the file has heard of a loss, or may have and was killed. Raises CacheError."""
    doubted = segment.doubts[0] % 2 and not segment.syncing[0]  # by one who was killed: odd, and stays so
    return bool(
        doubted or segment.is_doubtful or any(other.lost[0] or other.syncing[0] == SYNCING for other in _users(segment))
    )


def begin_sync(segment: Segment) -> set[int]:
    """To be called before it is looked what is ready. Gives in which segments it is said, by inode. Raises CacheError.

    What is written from here on says so again, and until it is known of the rest, `syncing` says so: so in this order.
    """
    _begin_sync(segment)
    begun = {segment.inode}
    for other in _users(segment):
        if other.syncing[0] in (0, SYNCING):
            _begin_sync(other)
            begun.add(other.inode)  # not by name: it may get that just now
    return begun


def _begin_sync(segment: Segment) -> None:
    segment.syncing[0], segment.dirty[0] = SYNCING, 0
    segment.syncs[0] = (segment.syncs[0] + 1) & 0xFFFFFFFF  # last: who sees another number has opened the file before


def end_sync(segment: Segment, begun: Collection[int]) -> None:
    """All that was ready is on its disk. Who cannot be told that now is doubted by the next one."""
    segment.syncing[0] = 0
    with contextlib.suppress(CacheError):
        for other in _users(segment):
            if other.inode in begun:
                other.syncing[0] = 0


def tell_lost(segment: Segment) -> None:
    """A front end has heard of a loss: others, who open the file later, are not told by the kernel."""
    segment.lost[0] = 1
    with contextlib.suppress(CacheError):  # then only those of this image know
        for other in _users(segment):
            other.lost[0] = 1


def after(doubts: int) -> int:
    """What `Segment.doubts` is when all was doubted once more. Odd: a doubt is under way, and may have passed what matters."""
    return doubts + 2 + doubts % 2


def is_over(doubts: int, until: int) -> bool:
    """Whether all was doubted as `after` has said, and nobody is at it, or was killed at it."""
    return doubts >= until and not doubts % 2


def doubt(segment: Segment) -> None:
    """Nothing of one segment is certain any more. Who relies on a sync of before looks at `doubts`.

    For who is `alone`: of two at once the first one's end would pass for the other's, and the count stay odd.
    """
    segment.doubts[0] += 1 + segment.doubts[0] % 2  # odd meanwhile, also where one was killed in it
    points.reach("doubts: begun")
    for chunk, state in enumerate(bytes(segment.state)):
        if state == READY:
            segment.state[chunk] = segment.doubted(chunk)
    points.reach("doubts: states changed")
    segment.dirty[0] = 1  # who writes just now may have said so before it was taken back, and not marked the chunk yet
    segment.doubts[0] += 1


def doubt_all(segment: Segment) -> None:
    """Nothing of its data file is certain any more, for all who use it.

    Raises CacheError when not all of them can be told now: `syncing` is set still.
    """
    # In this order, also below: killed here, the next one does all of it.
    segment.syncing[0], segment.lost[0] = SYNCING, 0
    doubt(segment)
    for other in _users(segment):
        if other.syncing[0] in (0, SYNCING):
            other.syncing[0] = SYNCING
        other.lost[0] = 0  # before: what is lost from here on is doubted again
        doubt(other)
        if other.syncing[0] == SYNCING:
            other.syncing[0] = 0
    segment.syncing[0] = 0


def _users(segment: Segment) -> Iterator[Segment]:
    """The other segments of the same file."""
    for other in segments_of(segment.identity.dev, segment.identity.ino):
        if other.inode != segment.inode and other.identity.file == segment.identity.file:
            yield other
