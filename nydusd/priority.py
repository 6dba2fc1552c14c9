"""Priority of what readers wait for: a daemon that takes over, until it serves, and a fork server that has none beside it.

Loading what a supervisor and a fork server need takes 0.3 s of a processor each; on a busy machine that would be seconds. So a
start at which something is mounted already runs at the highest priority (nice -20: beside eight others that are busy it has
nine tenths of a processor; with -10 it would have half of one), and so do those whose end it waits for, and what it starts,
until that has had a moment to answer who waits: then the supervisor sets all of them to the usual one. Without the right to
that (CAP_SYS_NICE) it takes as long as it takes.

What holds after SIGKILL in between: front ends may keep the higher priority until the next supervisor serves.
Imports nothing that costs time: it comes first in the command.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # known to type checkers by its name: `typing` takes 10 ms
if TYPE_CHECKING:
    from collections.abc import Iterable

_HURRIED = -20
_usual: list[int] = []
"""The nice value to go back to, if there was a hurry."""


def hurry(*started: int) -> None:
    """Called first: take a higher priority if one of the arguments is a mount point of a kind that we serve.

    `started`: processes of one thread that there are already, which take it, too.
    """
    try:
        if not takes_over(sys.argv):
            return
        before = os.getpriority(os.PRIO_PROCESS, 0)
        if before > _HURRIED:
            os.setpriority(os.PRIO_PROCESS, 0, _HURRIED)
            _usual.append(before)
            for pid in started:
                os.setpriority(os.PRIO_PROCESS, pid, _HURRIED)
    except OSError:
        return


def is_hurried() -> bool:
    """Whether there is a usual priority to go back to."""
    return bool(_usual)


def hasten(pid: int) -> None:
    """A process of one thread that we have started, for which others wait: until `settle`."""
    _set(pid, _HURRIED)


def haste(pid: int) -> int | None:
    """Somebody else's process of one thread, for which readers wait, until `give`. Gives the nice value to be given it then."""
    try:
        before = os.getpriority(os.PRIO_PROCESS, pid)
        os.setpriority(os.PRIO_PROCESS, pid, _HURRIED)
    except OSError:
        return None
    return before if before > _HURRIED else usual()  # whoever hastened it before us was killed, or is about to end that


def give(pid: int, nice: int) -> None:
    """End of `haste`."""
    _set(pid, nice)


def usual() -> int:
    """The nice value that we have when there is no hurry."""
    return _usual[0] if _usual else os.getpriority(os.PRIO_PROCESS, 0)


def release(pid: int) -> None:
    """At the usual priority from now on: a process of one thread that we have started and do not look after any more."""
    _set(pid, usual())


def settle(pid: int) -> None:
    """At our own priority from now on: a process of one thread, perhaps made in a hurry."""
    _set(pid, os.getpriority(os.PRIO_PROCESS, 0))


def calm(pids: Iterable[int]) -> None:
    """We serve: back to the usual priority, and so these processes, with all their threads."""
    if not _usual:
        return
    _set_all(("self", *pids), _usual.pop())


def leave(pids: Iterable[int]) -> None:
    """Somebody waits for our end, and for that of these processes: at the highest priority, with all their threads."""
    _set_all(("self", *pids), _HURRIED)


def hasten_all(pids: Iterable[int]) -> None:
    """We are in a hurry, if we are, and wait for these processes: with all their threads. Who lives on has it until `calm`."""
    if _usual:
        _set_all(pids, _HURRIED)


def _set_all(pids: Iterable[int | str], nice: int) -> None:
    for pid in pids:
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:  # it has ended
            continue
        for thread in threads:
            _set(int(thread), nice)


def _set(thread: int, nice: int) -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, thread, nice)
    except OSError:  # it has ended, or we have no right to it
        return


def takes_over(arguments: list[str]) -> bool:
    """Whether one of these is a mount point of a kind that we serve. Raises OSError."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            if after.startswith(("fuse ", "erofs ")) and before.split(" ")[4] in arguments:
                return True
    return False
