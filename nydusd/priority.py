"""Priority of a daemon that takes over: until it serves, readers wait for it, and for what it starts.

Loading what a supervisor and a fork server need takes 0.3 s of a processor; on a busy machine that would be seconds. So a start
at which something is mounted already runs at a higher priority (nice -10), and so does what it starts, until it serves: then
the supervisor sets all of them to the usual one. Without the right to that (CAP_SYS_NICE) it takes as long as it takes.

What holds after SIGKILL in between: front ends may keep the higher priority until the next supervisor serves.
Imports nothing that costs time: it comes first in the command.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # known to type checkers by its name: `typing` takes 10 ms
if TYPE_CHECKING:
    from collections.abc import Iterable

_HURRIED = -10
_usual: list[int] = []
"""The nice value to go back to, if there was a hurry."""


def hurry(*started: int) -> None:
    """Called first: take a higher priority if one of the arguments is a mount point of a kind that we serve.

    `started`: processes of one thread that there are already, which take it, too.
    """
    try:
        if not _takes_over(sys.argv):
            return
        before = os.getpriority(os.PRIO_PROCESS, 0)
        if before > _HURRIED:
            os.setpriority(os.PRIO_PROCESS, 0, _HURRIED)
            _usual.append(before)
            for pid in started:
                os.setpriority(os.PRIO_PROCESS, pid, _HURRIED)
    except OSError:
        return


def calm(pids: Iterable[int]) -> None:
    """We serve: back to the usual priority, and so these processes, with all their threads."""
    if not _usual:
        return
    usual = _usual.pop()
    for pid in ("self", *pids):
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:  # it has ended
            continue
        for thread in threads:
            try:
                os.setpriority(os.PRIO_PROCESS, int(thread), usual)
            except OSError:  # this one has
                continue


def _takes_over(arguments: list[str]) -> bool:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            if after.startswith(("fuse ", "erofs ")) and before.split(" ")[4] in arguments:
                return True
    return False
