"""A fork server whose supervisor was killed starts the supervisor's command again, if nobody else has.

For daemons that neither systemd nor a snapshotter looks after (`nydusd.guardian`). The one that is started takes over what is
there, and ends this process when it has. Two that are started at once are no harm: the run-time folder's lock lets one through.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from typing import Any

_MOST = 60.0
"""Seconds between tries at most."""


def guard(session: int, task: dict[str, Any]) -> None:
    """Try until we are ended, or until the mount is over.

    `task`: delay, command, the fd of its environment, and its nice value (a supervisor of an earlier release does not say):
    ours may be that of a hurry, of a takeover that was killed or of our own start.
    """
    if "nice" in task:
        with contextlib.suppress(OSError):  # no right to it
            os.setpriority(os.PRIO_PROCESS, 0, task["nice"])
    poll = select.poll()
    poll.register(session, 0)
    delay = float(task["delay"])
    while not poll.poll(delay * 1000):
        rows = os.pread(task["environment"], os.fstat(task["environment"]).st_size, 0).split(b"\0")
        environ = dict(row.split(b"=", 1) for row in rows if b"=" in row)
        default = [signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ]
        try:
            pid = os.posix_spawn(task["command"][0], task["command"], environ, setsigdef=default)
            os.waitpid(pid, 0)  # it could not start: if it can, it ends us
        except OSError as e:  # no room for it now; and what we hold may be held by nobody else
            print(f"{task['command'][0]}: {e.strerror}; trying again", file=sys.stderr)
        delay = min(delay * 2, _MOST)
