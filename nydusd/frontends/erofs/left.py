"""What a killed supervisor has left of its EROFS mounts: where the next one finds it, and how it gets its fds.

A file beside the run-time folder names who holds its fds, guard and front end, by pid and start time, and the numbers of the
fds. Written by the supervisor before a mount is seen and whenever it started one of them, removed once no file system is left.
While one supervisor takes over from another, it names the holders of both: whoever is killed, the next one finds all.

It names the journal, too. Where none of those lives who are noted, the copy of a guard may, which serves alone: it is found as
a process of ours that holds this journal. The guard notes nothing of it: so only supervisors write the file, one at a time,
and it is found also if it was started a moment ago, or the disk is full.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nydusd import priority
from nydusd.errors import CacheError, MountError, cache_error, is_scarce
from nydusd.frontends.fuse.session import resolve_mountpoint
from nydusd.ipc.borrow import copy_of, memories_of
from nydusd.storage.state.lock import is_there, start_time
from nydusd.storage.state.segment import boot_id
from nydusd.waits import Told

from .session import Fds, top_mount

log = logging.getLogger(__name__)

_END_SECONDS = 5.0
_MOMENT = 1.0
"""Seconds in which a killed process has closed what it held, and has ended."""
_NAMES = ("anon_inode:[fanotify]", "/memfd:nydusd-journal", "/memfd:nydusd-mounts")
"""What links of /proc/PID/fd to `Fds` begin with."""
_OURS = (b"nydusd: ",)
_ALONE = (b"nydusd: guard", b"nydusd: erofs")
"""Titles of those who may hold what is mounted when nobody lives who is noted. A supervisor that ends has let it go."""
_PROCESS_GROUP = 4
"""PIDFD_SIGNAL_PROCESS_GROUP (Linux 6.9): to all of the group of processes that bears the number of this one."""


class Holder(NamedTuple):
    """A process that holds the fds, as it is noted: pid, start time, the numbers of the fds in it."""

    pid: int
    start: int
    numbers: list[int]


class Left(NamedTuple):
    """`holders` are pidfds of processes that hold `fds`, copies of which are ours; `noted` are the first ones of them: those
    that were noted, or one that is to be from now on.

    `generation`: of the next front end, one that no front end of theirs had.
    """

    holders: list[int]
    fds: Fds
    generation: int
    noted: list[Holder]


def write(
    path: Path,
    holders: Sequence[int],
    fds: Fds,
    generation: int,
    seen: Sequence[tuple[str, str]] = (),
    former: Sequence[Holder] = (),
) -> None:
    """Note who holds what, the generation of the front end, and what is mounted: place and device (`major:minor`).

    `former`: holders that another supervisor has left, and that are not ended yet. Raises MountError: without the note a kill
    of the supervisor could not be made good.
    """
    started = [[pid, start_time(pid)] for pid in holders]
    if untold := [pid for pid, start in started if start < 0]:
        raise MountError(f"{path}: the start time of pid {untold[0]} cannot be read now: no file descriptor is left")
    content: dict[str, Any] = {
        "version": 2,
        "generation": generation,
        "holders": started,
        "fds": list(fds),
        "mounts": [list(each) for each in seen],
    }
    if former:
        content["others"] = [list(holder) for holder in former]
    temporary = path.with_name(path.name + ".tmp")
    try:
        content["journal"] = [boot_id().hex(), *_number(os.fstat(fds.journal))]
        temporary.write_text(json.dumps(content | {"check": _check(content)}))
        os.replace(temporary, path)
    except OSError as e:
        raise MountError(f"{path}: {e.strerror}") from e


def _check(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def forget(path: Path, holder: int) -> None:
    """Remove the note if it names this process (its pid): the file system is gone."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        if holder in [pid for pid, _ in json.loads(path.read_text())["holders"]]:
            path.unlink()


def mounted(path: Path) -> list[tuple[str, str]]:
    """Place and device of what was mounted."""
    try:
        return [(str(place), str(device)) for place, device in json.loads(path.read_text())["mounts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def seen(path: Path) -> str | None:
    """A place at which what was mounted is on top still. The kind is looked at, too: its number may be another's by now."""
    return next((place for place, device in mounted(path) if top_mount(resolve_mountpoint(place)) == device), None)


def take(path: Path) -> Left | None:
    """What is held, None when nobody holds anything. The holders go on: `end` them when all is taken over.

    Raises MountError when there are holders and their fds cannot be had, CacheError when it cannot be told whether there are.
    """
    try:
        raw = json.loads(path.read_text())
        if raw.pop("check", None) not in (_check(raw), None):  # None: of a release that wrote none
            raise ValueError("its checksum is wrong: it was damaged")
        if raw["version"] != 2:
            raise ValueError(f"it is of version {raw['version']}")
        rows = [(pid, start, raw["fds"]) for pid, start in raw["holders"]] + list(raw.get("others", ()))
        noted = [Holder(int(pid), int(start), list(map(int, Fds(*numbers)))) for pid, start, numbers in rows]
        generation = int(raw["generation"])
        journal = None
        if "journal" in raw:  # a release of before 2026-11-27 does not name it
            boot, device, inode = raw["journal"]
            journal = (int(device), int(inode)) if boot == boot_id().hex() else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        if is_scarce(e):
            raise cache_error(str(path), e) from e
        log.warning("%s cannot be read: %s", path, e)
        return None
    living: dict[int, Holder] = {}
    try:
        for holder in noted:
            if (pidfd := _living(holder.pid, holder.start)) >= 0:
                living[pidfd] = holder
    except CacheError:
        let_be(list(living))
        raise
    why = ""
    for pidfd, holder in living.items():
        try:
            fds = _copied(pidfd, holder.numbers)
        except OSError as e:
            why = str(e.strerror)
            continue
        try:
            unnoted = _unnoted(_number(os.fstat(fds.journal)), [holder.pid for holder in living.values()], _OURS)
        except CacheError:
            fds.close()
            let_be(list(living))
            raise
        return Left([*living, *unnoted.values()], fds, generation + 1, list(living.values()))
    ended = _have_ended(list(living))
    let_be(list(living))
    if why and not ended:
        raise MountError(f"{path}: what a killed daemon has mounted cannot be taken over: {why}")
    return None if journal is None else _take_unnoted(path, journal, generation + 1)


def _take_unnoted(path: Path, journal: tuple[int, int], generation: int) -> Left | None:
    """The same from who holds this journal and is not noted. Raises MountError, CacheError."""
    found = _unnoted(journal, (), _ALONE)
    noted: dict[int, Holder] = {}
    taken: Fds | None = None
    why = ""
    for pid, pidfd in found.items():
        try:
            start, numbers = start_time(pid), _numbers(pid)
            fds = _copied(pidfd, numbers)
        except (OSError, KeyError) as e:
            why = str(e)
            continue
        if start <= 0 or _number(os.fstat(fds.journal)) != journal:
            why = "it cannot be told who holds it"
            fds.close()
            continue
        noted[pidfd] = Holder(pid, start, numbers)
        if taken is None:
            taken = fds
        else:
            fds.close()
    if taken is not None:
        others = [other for other in found.values() if other not in noted]
        return Left([*noted, *others], taken, generation, list(noted.values()))
    ended = _have_ended(list(found.values()))
    let_be(list(found.values()))
    if not ended:
        raise MountError(f"{path}: what a killed daemon has mounted cannot be taken over: {why}")
    return None


def _copied(pidfd: int, numbers: Sequence[int]) -> Fds:
    """Copies of what a process has under these numbers. Raises OSError, and then there are none."""
    copies: list[int] = []
    try:
        for number in numbers:
            copies.append(copy_of(pidfd, number))
    except OSError:
        for fd in copies:
            os.close(fd)
        raise
    return Fds(*copies)


def _have_ended(pidfds: Sequence[int]) -> bool:
    """Whether these are gone, or are so in a moment: they hold nothing. Whoever is not is not to be taken for nobody."""
    until = time.monotonic() + _MOMENT
    return all(select.select([pidfd], [], [], max(0.0, until - time.monotonic()))[0] for pidfd in pidfds)


def _numbers(pid: int) -> list[int]:
    """The numbers of `Fds` in a process. Raises OSError, KeyError when it does not have them all."""
    found: dict[str, int] = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            link = os.readlink(f"/proc/{pid}/fd/{number}")
            found |= {name: int(number) for name in _NAMES if link.startswith(name)}
    return [found[name] for name in _NAMES]


def stored(path: Path, fds: dict[str, int]) -> Left | None:
    """The same of a daemon of which nothing lives, from what somebody else has kept for us, by the names of `Fds`.

    None, and all of it closed, when it is not whole, or nothing was noted.
    """
    try:
        raw = json.loads(path.read_text())
        return Left([], Fds(*(fds[name] for name in Fds._fields)), int(raw["generation"]) + 1, [])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        for fd in fds.values():
            os.close(fd)
        return None


def let_be(holders: Sequence[int]) -> None:
    """Leave the holders as they are."""
    for holder in holders:
        os.close(holder)


def end(found: Left, told: Told) -> None:
    """SIGKILL those whose fds were taken over, and wait until they are gone. Raises EndedError when `told` to end meanwhile.

    A guard with what it has started, or starts at this moment: that would read the group beside our front end.
    """
    priority.hasten_all(holder.pid for holder in found.noted)  # readers wait for their end
    for holder in found.holders:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(holder, signal.SIGKILL)
    for holder in found.holders[: len(found.noted)]:
        with contextlib.suppress(OSError):  # no group bears its number: it is a front end, or was one guard alone
            signal.pidfd_send_signal(holder, signal.SIGKILL, None, _PROCESS_GROUP)
    try:
        for holder in found.holders:
            told.wait(time.monotonic(), _END_SECONDS, holder)
    finally:
        let_be(found.holders)


def _unnoted(journal: tuple[int, int], known: Sequence[int], titles: tuple[bytes, ...]) -> dict[int, int]:
    """By pid, pidfds of those that hold this journal (device, inode), too, and are not noted: copies of guards, and what was
    started in a supervisor's last moment. Raises CacheError when it cannot be told, ScarceError when it cannot now.

    Only processes of ours are looked at: who keeps fds for us, as systemd does, is none of them.
    """
    found: dict[int, int] = {}
    try:
        for name in os.listdir("/proc"):
            if not name.isdecimal() or int(name) in known or int(name) == os.getpid():
                continue
            try:
                pidfd = os.pidfd_open(int(name))  # before the look: from now on the number is no other's
            except OSError as e:
                if is_scarce(e):
                    raise
                continue  # it has ended
            found[int(name)] = pidfd
            if not (_is_ours(name, titles) and _holds(int(name), journal)):
                os.close(found.pop(int(name)))
    except OSError as e:
        let_be(list(found.values()))
        raise cache_error("/proc", e) from e
    return found


def _is_ours(pid: str, titles: tuple[bytes, ...]) -> bool:
    """Whether a process is of a daemon: by its title, or what a guard of before 2026-11-27 has become and has none yet.

    Raises OSError when it cannot be told now.
    """
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError as e:
        if is_scarce(e):
            raise
        return False  # it has ended
    return command.startswith(titles) or b"\0nydusd.frontends.erofs\0" in command


def _holds(pid: int, journal: tuple[int, int]) -> bool:
    """Whether a process has this journal open, under whatever number. Raises OSError when it cannot be told now."""
    try:
        return any(_number(memory) == journal for memory in memories_of(pid))
    except OSError as e:
        if is_scarce(e):
            raise
        return False  # it has ended


def _number(memory: os.stat_result) -> tuple[int, int]:
    """What a memfd is told by from all others since the machine was started: device and inode."""
    return memory.st_dev, memory.st_ino


def _living(pid: int, start: int) -> int:
    """The pidfd of this very process, -1 if it has ended. Raises CacheError when that cannot be told."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    except OSError as e:
        raise cache_error(f"pid {pid}", e) from e
    there = False
    try:
        there = is_there(pid, start)
    finally:
        if not there:
            os.close(pidfd)
    return pidfd if there else -1
