"""Who may be given a daemon: only a process for which it makes no difference whose copy the daemon is.

Runs in the nursery. A process of another user must not be served at all; one in a container, or with other rights, would get a
daemon that sees other mounts, or may more than itself.
"""

from __future__ import annotations

import os
import socket
import struct

_CREDENTIALS = struct.Struct("=iII")
_SAME = (
    *("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
    *("NoNewPrivs", "Seccomp", "Seccomp_filters", "Cpus_allowed", "Mems_allowed"),
)
"""Lines of /proc/PID/status that must be the same."""


def peer_pid(wire: socket.socket) -> int:
    """The pid of a connection's other end, 0 if it is not of our user (or of a pid namespace that we cannot see)."""
    pid, uid, _ = _CREDENTIALS.unpack(wire.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(pid) if uid == os.geteuid() else 0


def is_like_us(pid: int) -> bool:
    """Whether a process has our user, rights, namespaces and root. Not so if that cannot be known."""
    try:
        for name in os.listdir("/proc/self/ns"):
            ours, theirs = os.stat(f"/proc/self/ns/{name}"), os.stat(f"/proc/{pid}/ns/{name}")
            if not os.path.samestat(ours, theirs):
                return False
        return os.path.samestat(os.stat("/"), os.stat(f"/proc/{pid}/root")) and _facts("self") == _facts(str(pid))
    except OSError:
        return False


def _facts(pid: str) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="surrogateescape") as lines:
        pairs = [line.partition(":") for line in lines]
    facts = {name: value.strip() for name, _, value in pairs if name in _SAME}
    try:
        with open(f"/proc/{pid}/attr/current", "rb") as label:
            facts["label"] = label.read(4096).hex()
    except OSError:
        facts["label"] = ""  # no security module has labels
    return facts
