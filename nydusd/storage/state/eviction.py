"""Taking chunks out of a cache file, so that no reader ever sees the hole: the protocol, and the steps that touch files.

1. The supervisor claims the chunks (READY to PENDING), as for a fill: until the eviction is over, nobody can fill them anew.
2. It adds 1 to the segment's `epoch`.
3. A worker, holding the lock of the data file, clears their bits in the stored map and syncs it (`map_file.clear`).
4. It punches the holes. When it has reported, the supervisor ends the claims (PENDING to EMPTY).

A reader loads the epoch, then the state bytes, reads the file, and loads the epoch again; if it differs, what was read does not
count. Why that suffices: a reader that sees bytes of step 4 ends its read after step 2. If both of its epochs are equal, step 2
came before the first of them, so step 1 before its look at the state bytes. There it saw READY, so the chunk had been
filled anew, which begins after step 4: then it has read the new bytes. `tests/state/test_eviction_model.py` walks through
all orders of these steps.

The cache folder may be shared with other daemons of this implementation. Each has a segment that names the inode of the
data file, published under the data file's lock (`workers/prepare.py`), so whoever holds the lock sees in /dev/shm
whether another daemon uses the file: then nothing is taken out. A reference daemon has no segment, but has the file open.

What holds after SIGKILL: between 3 and 4 the map knows fewer chunks than the file has; before that nothing has changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from nydusd import points
from nydusd.errors import CacheError, FormatError
from nydusd.storage.state.segment import Segment

_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_SHM = Path("/dev/shm")


def punch(fd: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Give the disk space of these ranges (offset, length) back. Raises CacheError."""
    libc = ctypes.CDLL(None, use_errno=True)
    for offset, length in ranges:
        if length and libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length)):
            code = ctypes.get_errno()
            raise CacheError(f"no hole can be punched at {offset}: {os.strerror(code)}", code)
        points.reach("evict: one hole punched")


def used_by_others(path: str, instance: str, own: Collection[int]) -> str:
    """Who else uses a data file: a segment's name or a pid, "" if nobody does. `own` are the pids of our own daemon; those that
    it has started since are told by their parent, which is also this worker's.

    The caller holds the data file's lock: no daemon of this implementation begins to use the file meanwhile.
    """
    facts = os.stat(path)
    for segment in _segments(instance):
        if (segment.identity.dev, segment.identity.ino) == (facts.st_dev, facts.st_ino):
            return segment.name
    wanted = os.path.realpath(path)
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) in own or wanted not in _open_files(entry):
            continue
        if _parent(entry) != os.getppid():
            return f"process {entry}"
    return ""


def _segments(instance: str) -> Iterator[Segment]:
    """The segments of other daemons."""
    for path in _SHM.glob("nydusd.*.*"):
        if path.name.startswith(f"nydusd.{instance}.") or path.name.endswith((".arena", ".stage")):
            continue
        try:
            segment = Segment.open(f"/{path.name}")
        except (CacheError, FormatError):
            continue  # no segment, or one of another version, whose daemon has the file open
        if segment is not None:
            yield segment
            segment.close()


def _parent(pid: str) -> int:
    """0 when the process has ended."""
    try:
        return int((Path("/proc") / pid / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _open_files(pid: str) -> set[str]:
    found: set[str] = set()
    with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
        for fd in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(fd.path))
    return found
