"""File descriptors that another process has sent over a unix socket.

`socket.recv_fds` of Python 3.11 takes flags and does not use them: what it gives is inherited by every program that we start,
and a connection that such a one has stays open when we are killed.
"""

from __future__ import annotations

import array
import socket


def receive(wire: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """At most `size` bytes and `most` fds, which are the caller's to close, and are not inherited. Raises OSError."""
    data, ancillary, _, _ = wire.recvmsg(size, socket.CMSG_SPACE(4 * most), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, part in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(part[: len(part) // fds.itemsize * fds.itemsize])
    return data, list(fds)
