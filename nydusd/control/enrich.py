"""What the API process adds to the supervisor's answers by looking for itself: the memory of processes, the state of chunks.

It takes milliseconds that the supervisor's loop does not have. What vanishes meanwhile is left out.
"""

from __future__ import annotations

import base64
import os
import zlib

from nydusd.errors import NydusError

Json = dict[str, object]


def memory_of(pid: int) -> Json:
    """Resident and proportional bytes of a process, and the kernel's letter for its state; None for what cannot be read."""
    found: Json = {"rss_bytes": None, "pss_bytes": None, "kernel_state": None}
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
        found["kernel_state"] = fields[0].decode()
        found["rss_bytes"] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        with open(f"/proc/{pid}/smaps_rollup", "rb") as f:
            for line in f:
                if line.startswith(b"Pss:"):
                    found["pss_bytes"] = int(line.split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        pass  # it has ended, or is another user's
    return found


def with_memory(answer: Json) -> Json:
    """Add the memory of each process to the answer of `workers`."""
    processes = answer.get("processes")
    for row in processes if isinstance(processes, list) else []:
        if isinstance(row, dict) and isinstance(row.get("pid"), int) and row["pid"] > 0:
            row.update(memory_of(row["pid"]))
    return answer


def with_states(answer: Json) -> Json:
    """Put the state bytes of each blob's chunks (base64 of zlib) in the place of its segment's name."""
    blobs = answer.get("blobs")
    for row in blobs if isinstance(blobs, list) else []:
        if isinstance(row, dict):
            row.update(_states(str(row.pop("segment", ""))))
    return answer


def _states(name: str) -> Json:
    # Only here: most API processes are never asked for it.
    from nydusd.storage.state.segment import Segment

    try:
        segment = Segment.open(name)
    except (NydusError, ValueError):
        segment = None
    if segment is None:
        return {"chunks": 0, "states": ""}
    try:
        states = bytes(segment.state)
    finally:
        segment.close()
    return {"chunks": len(states), "states": base64.b64encode(zlib.compress(states, 1)).decode()}
