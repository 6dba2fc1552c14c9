"""Who has a FUSE session open: as long as somebody has, the kernel keeps a mount that nobody serves, and its readers wait.

Runs in the supervisor before it mounts. Of which session a file descriptor of /dev/fuse is, /proc/PID/fdinfo says from Linux
6.16 on; before that it is only known who has any. What holds after SIGKILL: nothing is changed here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nydusd.storage.state.lock import start_time

_TITLE = "nydusd: "
_LEFT = ("fork server", "fuse ")
"""Processes of a daemon that hold its session and outlive it, by their titles."""
_FIELD = "fuse_connection:"


class Holder(NamedTuple):
    """`title`: what it calls itself if it is a daemon's, else the name of its command. `is_sure`: it has this very session."""

    pid: int
    start: int
    title: str
    is_sure: bool

    @property
    def is_left(self) -> bool:
        """Whether it is of a daemon, and no supervisor: if all holders are that, their supervisor is gone."""
        return self.is_sure and self.title.startswith(tuple(_TITLE + role for role in _LEFT))


def holders_of(device: str) -> list[Holder]:
    """Who but us has the session open of the mount with this device (`major:minor`); or who may, if nobody is sure to."""
    number = int(device.partition(":")[2])
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended
            start = start_time(int(name))
            sessions = set(_sessions(name))
            if not sessions.isdisjoint((number, None)):
                found.append(Holder(int(name), start, _title(name), number in sessions))
    return [holder for holder in found if holder.is_sure] or found


def told(holders: Sequence[Holder]) -> str:
    """Who they are, and how to end those of a daemon."""
    if not holders:
        return "a process that cannot be seen from here"
    who = ", ".join(f"pid {holder.pid} ({holder.title})" for holder in holders)
    ours = [str(holder.pid) for holder in holders if holder.title.startswith(_TITLE)]
    how = f"; to end what a nydusd has left of it: `kill -9 {' '.join(ours)}`" if ours and holders[0].is_sure else ""
    return (who if holders[0].is_sure else f"one of those that have /dev/fuse open: {who}") + how


def _sessions(pid: str) -> Iterator[int | None]:
    """Of each file descriptor of /dev/fuse the number of its session, None if that is not told. Raises OSError."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # that one was closed meanwhile
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith("/dev/fuse"):
                lines = Path(f"/proc/{pid}/fdinfo/{name}").read_text().splitlines()
                numbers = [line.removeprefix(_FIELD).strip() for line in lines if line.startswith(_FIELD)]
                yield int(numbers[0]) if numbers else None


def _title(pid: str) -> str:
    """Not the command line of somebody else: it may hold what is not for a log. Raises OSError."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
    return command if command.startswith(_TITLE) else Path(f"/proc/{pid}/comm").read_text().strip()
