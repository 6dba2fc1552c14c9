"""`Stored`: what stands in for the fd store of systemd, at both of its ends."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

GIVING = """
import fcntl, os, sys
from nydusd.storage.state.lock import start_time
from nydusd.supervisor.orphans import Orphan
giver = Orphan(os.getppid(), start_time(os.getppid()))
names, numbers = sys.argv[1], sys.argv[2].split(",")
fds = [fcntl.fcntl(giver.get_fd(int(number)), fcntl.F_DUPFD_CLOEXEC, 100) for number in numbers]
for number, fd in enumerate(fds):
    os.dup2(fd, 3 + number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts a daemon with fds as systemd gives them: those of the process that starts this."""


class Stored:
    """The receiving end of systemd's fd store: fds by name, in no order."""

    def __init__(self, folder: Path) -> None:
        self.fds: dict[str, list[int]] = {}
        self.environment = {"NOTIFY_SOCKET": str(folder / "notify")}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.environment["NOTIFY_SOCKET"])
        self._socket.settimeout(30)

    def until_ready(self) -> None:
        text = ""
        while "READY=1" not in text:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            text = data.decode()
            message = dict(line.split("=", 1) for line in text.split("\n"))
            if "FDSTORE" in message and message["FDNAME"] not in self.fds:
                self.fds[message["FDNAME"]], fds = fds[::-1], []
            if "FDSTOREREMOVE" in message:
                fds = self.fds.pop(message["FDNAME"])
            for fd in fds:
                os.close(fd)

    def giving(self, command: list[str]) -> list[str]:
        """A command that gives these fds to another."""
        names = ":".join(name for name, fds in self.fds.items() for _ in fds)
        numbers = ",".join(str(fd) for fds in self.fds.values() for fd in fds)
        return [sys.executable, "-c", GIVING, names, numbers, *command]

    def close(self) -> None:
        self._socket.close()
        for fds in self.fds.values():
            for fd in fds:
                os.close(fd)
