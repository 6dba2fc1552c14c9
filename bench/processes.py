"""What processes cost: CPU and memory of one and of all below it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process and its descendants that live."""
    pids = [pid]
    for each in pids:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{each}/task"):
                pids += map(int, Path(f"/proc/{each}/task/{thread}/children").read_text().split())
    return pids


def title(pid: int) -> str:
    """What a process calls itself; empty for one that is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def cpu(pid: int) -> float:
    """Seconds of CPU of a process and its descendants that live."""
    fields = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in family(pid)]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> float:
    """Sum of PSS over a process and its descendants, MB."""
    return sum(map(pss, family(pid))) / 1024


def pss(pid: int) -> int:
    """Proportional set size, KiB; 0 for a process that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0
