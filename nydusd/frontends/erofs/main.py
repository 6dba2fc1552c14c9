"""`python -m nydusd.frontends.erofs --spec-fd N`: start the front end of a daemon's EROFS mounts from the supervisor's spec
and serve.

It outlives the supervisor: what is cached is served on, and a miss waits for the supervisor's successor until its deadline.
It ends when the supervisor is gone and no file system is left (exit 0). A copy of a guard that is left alone becomes one
(`guard.py`): it refuses what is not cached.

The spec: `index`, `identity` (its ZeroMQ name, optional), `group`, `journal`, `table` (fds, see `session.Fds`), `supervisor`
(its pid), `crashed` (its predecessor died by itself; optional), `front` (the supervisor's endpoint), `read_deadline`
(seconds), `alone` (there is no supervisor; optional), `inflight` (the board of reads that wait; optional), `log` {`level`,
`file`}.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Callable

from nydusd import logs
from nydusd.frontends.fuse.parking import Client
from nydusd.ipc.inflight import open_row
from nydusd.ipc.line import open_line
from nydusd.ipc.messages import Json
from nydusd.ipc.spec import read_spec
from nydusd.proctitle import set_title

from .journal import Journal, reserve
from .known import Known
from .loop import FrontEnd

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Serve until nobody can ask any more. Raises NydusError when the spec cannot be used, OSError."""
    spec = read_spec(argv)
    logs.setup_child(spec["log"], "erofs 0")
    serve(spec)
    return 0


def serve(spec: Json, look: Callable[[], None] = lambda: None) -> None:
    """The same by its spec, in a process that logs already: a number of an event may be that of its log. `look` is called every
    two seconds. Raises NydusError.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_title("erofs 0")
    journal = Journal(int(spec["journal"]), crashed=bool(spec.get("crashed")))
    inherited = reserve(journal.left)
    front, identity = str(spec["front"]), str(spec.get("identity") or "erofs").encode()

    def connect() -> Client:
        return open_line(front, identity)

    def know(complain: Callable[[str], None]) -> Known:
        return Known(int(spec["table"]), int(spec["group"]), int(spec["index"]), complain)

    supervisor = int(spec["supervisor"])
    front_end = FrontEnd(
        int(spec["group"]),
        journal,
        know,
        connect,
        lambda: os.getppid() != supervisor,
        inherited=inherited,
        patience=float(spec["read_deadline"]),
        alone=bool(spec.get("alone")),
        board=open_row(spec.get("inflight"), int(spec["index"])),
        look=look,
    )
    # Events make no reference cycles: what is alive now stays, and looking for garbage would only cost.
    gc.collect()
    gc.freeze()
    front_end.run()
