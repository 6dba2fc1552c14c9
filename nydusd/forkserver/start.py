"""The start of a fork server: a fresh interpreter, whose environment holds no credential, and what it is to load.

Runs in the supervisor. What holds after SIGKILL of that: see `nydusd.forkserver.__main__`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from nydusd.forkserver.environment import environment
from nydusd.forkserver.line import Server
from nydusd.version import commit_on_disk

FOR_DAEMON = (
    "nydusd.frontends.fuse.__main__",
    "nydusd.formats.rafs_v6",
    "nydusd.ipc.client",
    "workers.__main__",
    "workers.fill",
    "workers.prepare",
    "workers.fetch",
)
"""What the children of any daemon need: loaded while the supervisor loads its own."""


def start() -> Server:
    """One that loads the code that is on disk now. Raises OSError when there is no room for it."""
    commit = commit_on_disk()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        os.set_inheritable(theirs.fileno(), True)
        try:
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-P", "-m", "nydusd.forkserver", str(theirs.fileno()), *FOR_DAEMON],
                environment(secrets=False),
                file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )
        except OSError:
            ours.close()
            raise
    return Server(ours, pid, commit, ready=False)
