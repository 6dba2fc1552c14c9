"""Raising the limit of open files at start. Never fatal: unlike the reference daemon, ours goes on with what it may have."""

from __future__ import annotations

import resource
from typing import Final

_RESERVED: Final = 16384
"""Open files of the whole machine that are left to others."""
_USUAL: Final = 1_000_000


def raise_nofile_limit(wanted: int) -> str | None:
    """Set the limit to `wanted` or what the machine allows, 0 leaves it. Gives a warning to log, or None.

    The target is min(wanted, max(current soft limit, min(file-max - 16384, 1000000))).
    """
    if wanted == 0:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = min(wanted, max(soft, min(_file_max() - _RESERVED, _USUAL)))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, max(hard, target)))
        return None
    except (OSError, ValueError):
        target = min(target, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        return f"limit of open files is {target}: no right to raise it further (CAP_SYS_RESOURCE)"


def _file_max() -> int:
    try:
        with open("/proc/sys/fs/file-max") as file:
            return int(file.read(64))
    except (OSError, ValueError):
        return _USUAL + _RESERVED
