"""What the API process adds to the supervisor's answers by looking for itself: the memory of processes, the state of chunks.

Also what the nursery knows of the node's workers. It takes milliseconds that the supervisor's loop does not have. What
vanishes meanwhile is left out.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import zlib
from collections.abc import Mapping

from nydusd.errors import NydusError
from nydusd.nursery.place import LOOK

Json = dict[str, object]

_NURSERY_PATIENCE = 0.5
"""Seconds that the nursery may take to answer."""
_PACKET_MAX = 1 << 18


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
    """Add the memory of each process, and the node's seats, to the answer of `workers`."""
    processes = answer.get("processes")
    for row in processes if isinstance(processes, list) else []:
        if isinstance(row, dict) and isinstance(row.get("pid"), int) and row["pid"] > 0:
            row.update(memory_of(row["pid"]))
    seats = answer.get("seats")
    if isinstance(seats, dict):
        seats["node"] = node_of(seats)
        seats.pop("nursery", None)
    return answer


def node_of(seats: Mapping[str, object]) -> object:
    """What the nursery that the supervisor has named says of the node's seats; None if there is none, or it says nothing."""
    path = seats.get("nursery")
    if not path:
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as wire:
        wire.settimeout(_NURSERY_PATIENCE)
        try:
            wire.connect(str(path))
            wire.send(LOOK)
            return json.loads(wire.recv(_PACKET_MAX))
        except (OSError, ValueError):
            return None


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
