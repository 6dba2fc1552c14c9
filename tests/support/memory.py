"""What a process has in its memory: what a core file of it would hold."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def found_in_memory(pid: int, secrets: list[bytes]) -> list[bytes]:
    """Which of these byte strings a process has in memory that it can write to: what a core file of it would hold."""
    found: set[bytes] = set()
    os.kill(pid, signal.SIGSTOP)
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                place, rights, *_ = line.split()
                if not rights.startswith("rw") or "[vvar" in line:
                    continue
                first, end = (int(part, 16) for part in place.split("-"))
                memory.seek(first)
                try:
                    content = memory.read(end - first)
                except OSError:
                    continue  # a part of a mapping behind the end of its file
                found.update(secret for secret in secrets if secret in content)
    finally:
        os.kill(pid, signal.SIGCONT)
    return sorted(found)
