"""File descriptors that come over a socket."""

from __future__ import annotations

import os
import socket

from nydusd.ipc import passed


def test_what_was_sent_is_not_inherited_by_what_we_start() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull) as null:
        socket.send_fds(theirs, [b"x"], [null.fileno(), null.fileno()])
        data, fds = passed.receive(ours, 16, 3)
        try:
            assert data == b"x" and len(fds) == 2
            assert not any(map(os.get_inheritable, fds))
        finally:
            for fd in fds:
                os.close(fd)
        theirs.send(b"no fds")
        assert passed.receive(ours, 16, 3) == (b"no fds", [])
