"""A socket that stands in for systemd, where a daemon says how it is."""

from __future__ import annotations

import socket
from pathlib import Path


class Systemd:
    """The receiving end."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(30)

    def message(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().split("\n"))

    def until(self, key: str) -> dict[str, str]:
        """The first message that says something of `key`."""
        while key not in (message := self.message()):
            pass
        return message
