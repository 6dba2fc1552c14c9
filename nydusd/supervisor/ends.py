"""Ending processes that another supervisor has left, each known by its pid and its start time, however long that takes.

Runs in the supervisor, before anything is served. What holds after SIGKILL in between: those that were not killed yet are ended
by the next supervisor, whose record of them is the same.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from nydusd import priority
from nydusd.errors import is_scarce
from nydusd.storage.state.lock import start_time
from nydusd.waits import DEAF, Told

log = logging.getLogger(__name__)

_END_SECONDS = 5.0
"""How long a killed process may take to vanish."""
_TAKER = b"nydusd: fetch"
"""What processes are called that may take something out of a cache."""


def end_together(processes: Iterable[tuple[int, int]], told: Told = DEAF) -> None:
    """SIGKILL these very processes, and wait until they are gone, with all their fds: 5 s, for fetch workers for ever.

    Such a one may be about to punch a hole into a cache file on a disk that does not answer: the kernel does that when it can,
    killed or not, and it must not be done to what was fetched since.

    All are killed before one is waited for, and in a takeover come before whoever else is busy, for others wait: each needs a
    turn on a processor to end.

    Raises OSError when there is no file descriptor to see with whether one is this one; those before it have ended then. Raises
    EndedError when `told` to end meanwhile: they are killed then, and may be there still.
    """
    todo: Sequence[tuple[int, int]] = list(processes)
    while todo:
        with contextlib.ExitStack() as held:
            todo = _kill(todo, held, told)


def _kill(processes: Sequence[tuple[int, int]], held: contextlib.ExitStack, told: Told) -> Sequence[tuple[int, int]]:
    """Kill as many as there are fds for, and wait for their end; gives the others. Raises OSError when it is for none."""
    ended = held.enter_context(select.epoll())
    fds: dict[int, int] = {}
    rest: Sequence[tuple[int, int]] = ()
    for number, process in enumerate(processes):
        try:
            fd = _hold(process)
        except OSError:
            if not fds:
                raise
            rest = processes[number:]
            break
        if fd >= 0:
            held.callback(os.close, fd)
            fds[fd] = process[0]
    priority.hasten_all(fds.values())
    for fd in fds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    _wait_for(fds, ended, told)
    return rest


def _hold(process: tuple[int, int]) -> int:
    """A pidfd of this very process, -1 if it has ended. Raises OSError when that cannot be told."""
    pid, start = process
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    now = start_time(pid)  # if it is the same still, the number cannot become another's from now on
    if start > 0 and now == start:
        return fd
    os.close(fd)
    if now < 0:
        raise OSError(errno.EMFILE, f"whether pid {pid} has ended cannot be told")
    return -1


def _wait_for(fds: dict[int, int], ended: select.epoll, told: Told) -> None:
    """Until these have ended, pids by pidfd, all of them killed."""
    for fd in fds:
        ended.register(fd, select.EPOLLIN)
    since = time.monotonic()
    until = since + _END_SECONDS
    while fds:
        if told.wait(since, until - time.monotonic(), ended.fileno()):
            for fd, _ in ended.poll(0):
                ended.unregister(fd)
                del fds[fd]
        if fds and time.monotonic() >= until:
            until = time.monotonic() + _END_SECONDS
            for fd, pid in list(fds.items()):
                if _may_take(pid):
                    log.warning("waiting for the end of pid %d: it was killed in the middle of work on a cache", pid)
                else:
                    ended.unregister(fd)
                    del fds[fd]


def _may_take(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_bytes().startswith(_TAKER)
    except OSError as e:
        return is_scarce(e)  # that it ended is seen with its pidfd
