"""The fds of a mount in systemd's fd store: they outlive every process of the daemon, and come back with its next start.

Runs in the supervisor. Those of a FUSE lane are stored under one name, which says of which mount and lane they are, those of an
EROFS each under its own: what is there of a mount that is gone is given back. Without systemd, or where the unit's
FileDescriptorStoreMax is too small, nothing is stored, and nothing depends on it as long as a front end or the fork server
lives.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nydusd.frontends.fuse.session import Session
    from nydusd.supervisor.notify import Notifier

_KINDS = ("fuse", "journal", "in", "out")
"""A lane's fds, in their order."""
_FIRST = 3
"""SD_LISTEN_FDS_START."""


class FdStore:
    """Takes what systemd gave us out of the environment. `pid`: as a holder of fds."""

    pid = 0

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._given: dict[str, dict[str, int]] = {}
        """By name, then by what they are."""
        self._own: set[str] = set()
        """Names under which `hold` has stored something."""
        names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
        count = os.environ.pop("LISTEN_FDS", "")
        if os.environ.pop("LISTEN_PID", "") == str(os.getpid()) and count.isdecimal():
            for fd, name in zip(range(_FIRST, _FIRST + int(count)), names, strict=False):
                os.set_inheritable(fd, False)
                self._given.setdefault(name, {})[_kind(fd)] = fd

    def numbers(self, device: str, lanes: int) -> list[list[int]]:
        """The fds of each lane of the mount with this device; -1 for one that is not there. To be copied by `get_fd`."""
        given = [self._given.get(_name(device, lane), {}) for lane in range(lanes)]
        return [[fds.get(kind, -1) for kind in _KINDS] for fds in given]

    def get_fd(self, number: int) -> int:
        """A copy of what was given to us. Raises OSError."""
        if number < 0:
            raise OSError(errno.EBADF, "not in the fd store")
        return os.dup(number)

    def given(self, prefix: str) -> dict[str, int]:
        """Copies of what was given to us one by one under names with this prefix; by the rest of the names."""
        found = {name.removeprefix(prefix): fds for name, fds in self._given.items() if name.startswith(prefix)}
        return {name: os.dup(fd) for name, fds in found.items() for fd in list(fds.values())[:1]}

    def hold(self, prefix: str, fds: Mapping[str, int]) -> None:
        """Have these stored, each under a name of its own, in the place of what has these names there."""
        for name, fd in fds.items():
            self._own.add(prefix + name)
            if prefix + name in self._given:
                self._notifier.send("FDSTOREREMOVE=1", f"FDNAME={prefix}{name}")
            self._notifier.send("FDSTORE=1", "FDPOLL=0", f"FDNAME={prefix}{name}", fds=[fd])

    def drop(self) -> None:
        """What `hold` has stored is not needed any more."""
        for name in self._own:
            self._notifier.send("FDSTOREREMOVE=1", f"FDNAME={name}")
        self._own.clear()

    def keep(self, session: Session | None) -> None:
        """Give back what was given to us, but for the present session's; have those stored. What is there stays there."""
        lanes = {} if session is None else {_name(session.device, i): lane for i, lane in enumerate(session.lanes)}
        for name, fds in self._given.items():
            for fd in fds.values():
                os.close(fd)
            if name not in lanes and name not in self._own:
                self._notifier.send("FDSTOREREMOVE=1", f"FDNAME={name}")
        self._given.clear()
        for name, lane in lanes.items():
            self._notifier.send("FDSTORE=1", f"FDNAME={name}", fds=lane)


def _name(device: str, lane: int) -> str:
    return f"nydusd-{device.replace(':', '.')}-{lane}"


def _kind(fd: int) -> str:
    """What an fd of a lane is: systemd gives them back in no order."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode):
        return "in" if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY else "out"
    return "fuse" if stat.S_ISCHR(mode) else "journal"
