"""What a killed supervisor has left of its EROFS mounts: where the next one finds it, and how it gets its fds.

A file beside the run-time folder names who holds its fds, guard and front end, by pid and start time, and the numbers of the
fds. Written by the supervisor before mount(2) and whenever it started one of them, removed once no file
system is left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nydusd.errors import MountError
from nydusd.ipc.borrow import copy_of
from nydusd.storage.state.lock import start_time

from .session import Fds

log = logging.getLogger(__name__)

_END_SECONDS = 5.0


class Left(NamedTuple):
    """`holders` are pidfds of processes that hold `fds`, copies of which are ours.

    `generation`: of the next front end, one that no front end of theirs had.
    """

    holders: list[int]
    fds: Fds
    generation: int


def write(path: Path, holders: Sequence[int], fds: Fds, generation: int, seen: Sequence[tuple[str, str]] = ()) -> None:
    """Note who holds what, the generation of the front end, and what is mounted: place and device (`major:minor`).

    Raises MountError: without it a kill of the supervisor could not be made good.
    """
    content = {
        "version": 2,
        "generation": generation,
        "holders": [[pid, start_time(pid)] for pid in holders],
        "fds": list(fds),
        "mounts": [list(each) for each in seen],
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content | {"check": _check(content)}))
        os.replace(temporary, path)
    except OSError as e:
        raise MountError(f"{path}: {e.strerror}") from e


def _check(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def forget(path: Path, holder: int) -> None:
    """Remove the note if it names this process: the file system is gone."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        if holder in [pid for pid, _ in json.loads(path.read_text())["holders"]]:
            path.unlink()


def mounted(path: Path) -> list[tuple[str, str]]:
    """Place and device of what was mounted."""
    try:
        return [(str(place), str(device)) for place, device in json.loads(path.read_text())["mounts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def take(path: Path) -> Left | None:
    """What is held, None when nobody holds anything. The holders go on: `end` them when all is taken over.

    Raises MountError when there are holders and their fds cannot be had.
    """
    try:
        raw = json.loads(path.read_text())
        if raw.pop("check", None) not in (_check(raw), None):  # None: of a release that wrote none
            raise ValueError("its checksum is wrong: it was damaged")
        processes = [(int(pid), int(start)) for pid, start in raw["holders"]]
        if raw["version"] != 2:
            raise ValueError(f"it is of version {raw['version']}")
        numbers = [int(number) for number in Fds(*raw["fds"])]
        generation = int(raw["generation"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        log.warning("%s cannot be read: %s", path, e)
        return None
    holders = [holder for pid, start in processes if (holder := _living(pid, start)) >= 0]
    why = ""
    for holder in holders:
        copies: list[int] = []
        try:
            for number in numbers:
                copies.append(copy_of(holder, number))
        except OSError as e:
            why = str(e.strerror)
            for fd in copies:
                os.close(fd)
            continue
        fds = Fds(*copies)
        known = [pid for pid, _ in processes]
        return Left([*holders, *_unnoted(fds.journal, numbers[1], known)], fds, generation + 1)
    let_be(holders)
    if why:
        raise MountError(f"{path}: what a killed daemon has mounted cannot be taken over: {why}")
    return None


def stored(path: Path, fds: dict[str, int]) -> Left | None:
    """The same of a daemon of which nothing lives, from what somebody else has kept for us, by the names of `Fds`.

    None, and all of it closed, when it is not whole, or nothing was noted.
    """
    try:
        raw = json.loads(path.read_text())
        return Left([], Fds(*(fds[name] for name in Fds._fields)), int(raw["generation"]) + 1)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        for fd in fds.values():
            os.close(fd)
        return None


def let_be(holders: Sequence[int]) -> None:
    """Leave the holders as they are."""
    for holder in holders:
        os.close(holder)


def end(holders: Sequence[int]) -> None:
    """SIGKILL those whose fds were taken over, and wait until they are gone."""
    for holder in holders:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(holder, signal.SIGKILL)
    for holder in holders:
        poll = select.poll()
        poll.register(holder, select.POLLIN)
        poll.poll(_END_SECONDS * 1000)
    let_be(holders)


def _unnoted(journal: int, number: int, known: Sequence[int]) -> Iterator[int]:
    """Pidfds of those that were started in the supervisor's last moment, before they were noted: they hold the journal, too."""
    inode = os.fstat(journal).st_ino
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) in known or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}/fd/{number}").st_ino == inode and "memfd:" in os.readlink(
                f"/proc/{name}/fd/{number}"
            ):
                yield os.pidfd_open(int(name))


def _living(pid: int, start: int) -> int:
    """The pidfd of this very process, -1 if it has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    if start != 0 and start_time(pid) == start:
        return pidfd
    os.close(pidfd)
    return -1
