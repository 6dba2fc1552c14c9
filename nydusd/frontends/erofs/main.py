"""`python -m nydusd.frontends.erofs --spec-fd N`: start the front end of an EROFS mount from the supervisor's spec and serve.

It outlives the supervisor: what is cached is served on, and a miss waits for the supervisor's successor until its deadline.
It ends when the file system is gone (exit 0). A guard that is left alone becomes one (`guard.py`), and then refuses what is
not cached.

The spec: `index`, `identity` (its ZeroMQ name, optional), `group`, `journal`, `record`, `trees` (fds, see `session.Fds`),
`crashed` (its predecessor died by itself; optional), `front` (the supervisor's endpoint), `read_deadline` (seconds), `blobs`
(as in `Image.spec`), `alone` (there is no supervisor; optional), `log` {`level`, `file`}.
"""

from __future__ import annotations

import gc
import logging
import signal

from nydusd import logs
from nydusd.frontends.fuse.parking import Client
from nydusd.ipc.spec import read_spec
from nydusd.proctitle import set_title

from . import record
from .device import blobs_from_spec
from .journal import Journal, reserve
from .loop import FrontEnd

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Serve until the file system is gone. Raises NydusError when the spec cannot be used."""
    spec = read_spec(argv)
    journal = Journal(int(spec["journal"]), crashed=bool(spec.get("crashed")))
    inherited = reserve(journal.left)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_title("erofs 0")
    logs.setup_child(spec["log"], "erofs 0")
    memory = int(spec["record"])
    known = record.read(memory)
    front, identity = str(spec["front"]), str(spec.get("identity") or "erofs").encode()

    def connect() -> Client:
        from nydusd.ipc.client import ChunkClient

        return ChunkClient(front, identity)

    blobs = blobs_from_spec(spec["blobs"], known.files, [int(fd) for fd in spec["trees"]], int(spec["index"]))
    front_end = FrontEnd(
        int(spec["group"]),
        journal,
        blobs,
        connect,
        lambda: record.read(memory),
        inherited=inherited,
        patience=float(spec["read_deadline"]),
        alone=bool(spec.get("alone")),
    )
    front_end.completed = lambda: record.read(memory).set_read_ahead(incomplete=False)
    # Events make no reference cycles: what is alive now stays, and looking for garbage would only cost.
    gc.collect()
    gc.freeze()
    front_end.run()
    return 0
