"""The name under which a process of the daemon is seen: `nydusd: <role>` in ps, top and /proc/PID/comm."""

from __future__ import annotations

from setproctitle import setproctitle


def set_title(role: str) -> None:
    """Name this process after its role."""
    setproctitle(f"nydusd: {role}")
