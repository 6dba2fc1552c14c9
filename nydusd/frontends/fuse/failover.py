"""Requests that a dead front end had taken where no journal of ours tells of them: what `--failover-policy` says is done then.

Runs in a front end. There is a journal unless the predecessor was of a release that kept another, so this is the exception.
After SIGKILL in here the successor does the same: nothing of what is asked of the kernel does harm twice.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from . import protocol as p

_FOLDERS = ("/sys/fs/fuse/connections", "/proc/sys/fs/fuse/connections")


class Failover(NamedTuple):
    """`policy`: none, resend or flush; `device`: `major:minor` of the mount."""

    policy: str
    device: str

    def ask(self, fd: int) -> str | None:
        """Have the kernel send again, or fail, what any front end has taken; gives why that cannot be.

        A living front end's first answer to what is sent again is refused: no harm. `flush` is not in the mainline kernel, and
        without it requests would wait for ever; then they are sent again.
        """
        if self.policy == "none":
            return "the policy is none"
        if self.policy == "flush" and self._write("flush") is None:
            return None
        try:
            os.write(fd, p.OUT_HEADER.pack(p.OUT_HEADER.size, p.NOTIFY_RESEND, 0))
        except OSError as e:
            return f"FUSE_NOTIFY_RESEND: {e.strerror}" if self._write("resend") is not None else None
        return None

    def _write(self, name: str) -> str | None:
        """Write to the connection's file of this name, which kernels of some vendors have; gives why that cannot be."""
        why = None
        for folder in _FOLDERS:
            try:
                with open(f"{folder}/{self.device.rpartition(':')[2]}/{name}", "w") as file:
                    file.write("1")
            except OSError as e:
                why = e.strerror
            else:
                return None
        return why
