"""Taking chunks out of a cache file, so that no reader ever sees the hole: the protocol, and the steps that touch files.

1. The supervisor claims the chunks, as for a fill, in each of its segments that speak of the data file (READY to PENDING; in
   its tables alone where a chunk is not ready): until the eviction is over, nobody can fill them anew, for any image.
2. It adds 1 to the `epoch` of each of these segments.
3. A worker, holding the lock of the data file, clears their bits in the stored map and syncs it (`map_file.clear`).
4. It punches the holes. When it has reported, the supervisor ends the claims (PENDING to EMPTY).

A reader loads the epoch, then the state bytes, reads the file, and loads the epoch again; if it differs, what was read does not
count. Why that suffices: a reader that sees bytes of step 4 ends its read after step 2. If both of its epochs are equal, step 2
came before the first of them, so step 1 before its look at the state bytes. There it saw READY, so the chunk had been
filled anew, which begins after step 4: then it has read the new bytes. `tests/state/test_eviction_model.py` walks through
all orders of these steps.

Whoever uses the data file has a segment that names its inode, published under the data file's lock (`workers/prepare.py`):
other daemons in the cache folder, and other images and configurations of our own. So whoever holds the lock sees in /dev/shm
whether there is one in which the chunks were not claimed, be it only a moment old: then nothing is taken out. A reference
daemon has no segment, but has the file open.

What holds after SIGKILL: between 3 and 4 the map knows fewer chunks than the file has; before that nothing has changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from nydusd import points
from nydusd.errors import CacheError, cache_error, is_scarce
from nydusd.storage.state.gone import remove_if_gone
from nydusd.storage.state.names import is_unfinished, remove, remove_unfinished
from nydusd.storage.state.sharing import segments_of

_PUNCH_HOLE, _KEEP_SIZE = 2, 1


def punch(fd: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Give the disk space of these ranges (offset, length) back. Raises CacheError."""
    libc = ctypes.CDLL(None, use_errno=True)
    for offset, length in ranges:
        if length and libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length)):
            code = ctypes.get_errno()
            raise CacheError(f"no hole can be punched at {offset}: {os.strerror(code)}", code)
        points.reach("evict: one hole punched")


def used_by_others(fd: int, own: Collection[int], strays: Mapping[str, int], covered: Mapping[str, int] = {}) -> str:
    """Who uses an open data file, beside the segments that are `covered`: a segment's name or a pid, "" if nobody does.

    Segments are told by name and inode: one that was opened anew meanwhile is another. `strays` were left by an earlier life of
    our own daemon, and no image of it uses them now: they end here, lest somebody believe them later. So do those of daemons
    that are gone for good (`gone.py`), and what a worker has left that was killed before it could publish it. `own` are the
    pids of our own daemon; those that it has started since are told by their parent, which is also this worker's. Raises
    CacheError, ScarceError when somebody may use it who cannot be seen now.

    The caller holds that file's lock: no daemon of this implementation begins to use the file meanwhile.
    """
    facts = os.fstat(fd)
    # None of them is open while it is asked whether anybody has it open.
    for name, inode in [(segment.name, segment.inode) for segment in segments_of(facts.st_dev, facts.st_ino)]:
        if covered.get(name) == inode:
            continue
        if strays.get(name) == inode:
            remove(name)
        elif is_unfinished(name):  # whoever is at one has the lock that our caller has
            remove_unfinished(name, ended=True)
        elif not remove_if_gone(name, inode):
            return name
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) in own or not _has_open(entry, facts):
            continue
        if _parent(entry) != os.getppid():
            return f"process {entry}"
    return ""


def _parent(pid: str) -> int:
    """0 when the process has ended."""
    try:
        return int((Path("/proc") / pid / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _has_open(pid: str, facts: os.stat_result) -> bool:
    """Whether a process has this very file open, by whatever path it came to it."""
    with _unless_scarce(pid), os.scandir(f"/proc/{pid}/fd") as fds:  # it has ended, or is not ours to look at
        for fd in fds:
            with _unless_scarce(pid):
                if os.path.samestat(os.stat(fd.path), facts):
                    return True
    return False


@contextlib.contextmanager
def _unless_scarce(pid: str) -> Iterator[None]:
    """Suppress OSError; but raise ScarceError when that says nothing of the process."""
    try:
        yield
    except OSError as e:
        if is_scarce(e):
            raise cache_error(f"process {pid}", e) from e
