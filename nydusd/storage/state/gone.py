"""Segments of daemons that are gone for good: told from those that somebody reads by still, and removed.

A daemon that was killed leaves its segments to the next one on its mount point. Where none comes, they would count as users of
their data files until the next boot. Runs in workers, which hold the data file's lock meanwhile.

A segment is removed only if all of this is so, seen while nobody can start on that mount point:
- `<instance>.lock` is here in the run-time root, and no supervisor holds it. A daemon with another root, or in a container with
  its own, counts for ever.
- No process that its record (`state.json`) names is alive: no front end, no holder of its mount's file descriptors.
- The kernel reads no cache file for it by itself: it had no EROFS mounts (`<instance>.erofs.json`), or there is no EROFS
  without a block device on this machine.
- Nobody maps the segment, in whatever namespace: the kernel gives a read lease only on a file that none has open for writing.

What holds then: a mount of such a daemon may be there still (systemd keeps its file descriptors), but nobody answers it. The
daemon that takes it over finds no segment, and has its blob prepared anew, from the map and the file.
What holds after SIGKILL: the segment is there or not; the kernel ends lock and lease.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
from pathlib import Path

from nydusd import points
from nydusd.nursery import place
from nydusd.storage.state.lock import start_time
from nydusd.storage.state.names import SHM, inode_of, remove

log = logging.getLogger(__name__)

_BDI = Path("/sys/class/bdi")


def remove_if_gone(name: str, inode: int) -> bool:
    """Remove this very segment if its daemon is gone for good and nobody uses it; whether that is so."""
    root, instance = Path(place.root()), name[1:].split(".")[1]
    lock = root / f"{instance}.lock"
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        # Shared, so that several may look. Who starts there waits for us (`Runtime`).
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), lock.lstat()):
            return False
        points.reach("gone: lock taken")
        if _lives(root / instance) or _is_read_by_kernel(root / f"{instance}.erofs.json"):
            return False
        if inode_of(name) != inode or not _is_alone(SHM / name[1:]):
            return False
        log.info("segment %s is removed: nothing is left of its daemon", name)
        remove(name)
        points.reach("gone: removed")
        return True
    except OSError:  # it is held, or cannot be told
        return False
    finally:
        os.close(fd)


def _lives(folder: Path) -> bool:
    """Whether one of the recorded processes of a daemon is alive, or that cannot be told. Raises OSError."""
    try:
        record = json.loads((folder / "state.json").read_bytes())
        processes = [(int(pid), int(start)) for pid, start in record["processes"]]
        processes += [(int(row["pid"]), int(row["start"])) for row in record.get("holders", ())]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return True
    return any(_may_live(pid, start) for pid, start in processes)


def _may_live(pid: int, start: int) -> bool:
    now = start_time(pid)
    return start != 0 and now != 0 and (now == start or -1 in (now, start))


def _is_read_by_kernel(note: Path) -> bool:
    """Whether there may be EROFS mounts of a daemon, by the note that it has left. Raises OSError."""
    if not note.exists():
        return False
    return any(entry.name.startswith("erofs-") for entry in _BDI.iterdir())


def _is_alone(path: Path) -> bool:
    """Whether nobody has this file open for writing, or mapped. Raises OSError when that cannot be told."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    # Who opens it while we have the lease waits until it is given back, and we are sent a signal that would end us.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGIO,))
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
        with contextlib.suppress(InterruptedError):
            signal.sigtimedwait((signal.SIGIO,), 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return True
