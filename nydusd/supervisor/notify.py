"""Telling systemd how the daemon is: READY, STATUS, STOPPING and the watchdog's signs of life (sd_notify).

Runs in the supervisor. A datagram that systemd does not take is lost, and nothing depends on it.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
import subprocess
from collections.abc import Sequence

log = logging.getLogger(__name__)

_PATIENCE = 1.0
"""Seconds that systemd may take to take file descriptors: many messages at once may be more than wait there."""
_ANSWER_PATIENCE = 5.0
"""Seconds that systemd may take to answer; readers are served meanwhile."""
_NOT_SAID = "systemd does not say whether this is a restart, so it is taken for a stop"


class Notifier:
    """Sends to `$NOTIFY_SOCKET`, which it takes out of the environment: children must not speak for the daemon."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        watched = os.environ.pop("WATCHDOG_USEC", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        ours = bool(self._address) and watched.isdecimal() and pid in ("", str(os.getpid()))
        self.interval: float | None = int(watched) / 2_000_000 if ours and int(watched) > 0 else None
        """Seconds between signs of life; None if nobody watches."""
        self._unit = os.environ.pop("NYDUSD_UNIT", "")
        """The name of our unit, which that says."""
        self._due = 0.0
        self._asked: subprocess.Popen[str] | None = None

    @property
    def active(self) -> bool:
        """Whether somebody is told."""
        return bool(self._address)

    def ask_for_restart(self) -> int | None:
        """Have systemd asked whether it has us stop only to start us again (`systemctl restart`): it tells nobody.

        Gives the fd that is readable when `restarts` can say it, some seconds later at the latest; None: nobody can be asked.
        """
        if self._asked is None and self._address and self._unit:
            command = ["timeout", str(_ANSWER_PATIENCE), "systemctl", "list-jobs", "--no-legend", "--plain", self._unit]
            try:
                self._asked = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
            except OSError as e:
                log.warning("%s: %s", _NOT_SAID, e)
        return None if self._asked is None or self._asked.stdout is None else self._asked.stdout.fileno()

    def restarts(self) -> bool:
        """What systemd has said."""
        asked, self._asked = self._asked, None
        assert asked is not None
        jobs = asked.communicate()[0]
        if asked.returncode:
            log.warning("%s: systemctl ended with status %d", _NOT_SAID, asked.returncode)
        return any(line.split()[1:3] == [self._unit, "restart"] for line in jobs.splitlines())

    def send(self, *lines: str, fds: Sequence[int] = ()) -> None:
        """Send assignments, such as `READY=1` and `STATUS=text`, with fds that go with them."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as wire,
        ):
            wire.settimeout(_PATIENCE if fds else 0)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            wire.sendmsg(["\n".join(lines).encode()], ancillary, 0, address)

    def alive(self, now: float) -> None:
        """Called in each turn of the loop: gives a sign of life when one is due."""
        if self.interval is not None and now >= self._due:
            self._due = now + self.interval
            self.send("WATCHDOG=1")

    def wait(self, now: float) -> float | None:
        """Seconds until the next sign of life is due, None for never."""
        return None if self.interval is None else max(0.0, self._due - now)
