"""`python -m nydusd.frontends.fuse --spec-fd N`: start one FUSE front-end process from the supervisor's spec and serve.

It outlives the supervisor: what is cached is served on, and a miss waits for the supervisor's successor until its deadline.
It ends when the file system is unmounted (exit 0) or by SIGTERM's default action; SIGINT is the supervisor's business.

The spec: `index` (of this front end), `identity` (its ZeroMQ name, optional), `session_fd` (its lane's clone), `journal_fd`
(its lane's journal), `crashed` (its predecessor died by itself; optional), `init_flags` (`Session.negotiated.flags`),
`interrupt_in` and `interrupt_out` (its lane's pipe, and the siblings'; optional), `front` (the supervisor's endpoint),
`read_deadline` (seconds), `log` {`level`, `file`}, `mounts` {`folder`, `shared`}: where the supervisor publishes the table
of mounts, see `nydusd.supervisor.mount_table`. The spec of a mount there: {`id`, `bootstrap`, `bootstrap_size` (optional),
`path_id`, `extracted` (both for `open_bootstrap`), `xattr`, `blobs` (for `BlobDevice.from_spec`), `counters` and `files`
(optional, for `Stats.from_spec`)}. `inflight` (optional): the board of reads that wait. `failover_policy` and `device` (both
optional): see `failover.py`.
"""

from __future__ import annotations

import gc
import mmap
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from nydusd import logs
from nydusd.errors import FormatError, cache_error, is_scarce
from nydusd.formats import open_bootstrap
from nydusd.ipc.inflight import open_row
from nydusd.ipc.line import open_line
from nydusd.ipc.shared_number import map_number
from nydusd.ipc.spec import read_spec
from nydusd.ipc.trace import Trace
from nydusd.proctitle import set_title
from nydusd.storage.api.device import BlobDevice

from .failover import Failover
from .journal import Journal
from .loop import FrontEnd
from .mount import Mount
from .namespace import Namespace
from .parking import Client
from .stats import Stats

Opener = Callable[[Mapping[str, Any], int, int], Mount]


def main(argv: list[str], prepare: Callable[[Mapping[str, Any]], Opener] | None = None) -> int:
    """Serve until unmounted, what is made of the spec of a mount: by default the image, else by what `prepare` makes of ours.

    Raises NydusError when the spec or the image cannot be used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = read_spec(argv)
    index = int(spec["index"])
    set_title(f"fuse {index}")
    logs.setup_child(spec["log"], f"fuse {index}")
    identity = str(spec.get("identity") or f"fuse-{index}-{os.getpid()}").encode()
    front = str(spec["front"])

    def connect() -> Client:
        return open_line(front, identity)

    opener = open_mount if prepare is None else prepare(spec)

    def open_one(mount: Mapping[str, Any], number: int) -> Mount:
        return opener(mount, index, number)

    mounts = spec["mounts"]
    shared = map_number(str(mounts["shared"]))
    namespace = Namespace(str(mounts["folder"]), shared, int(spec["init_flags"]), open_one)
    namespace.reload()
    wake, wake_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
    front_end = FrontEnd(
        int(spec["session_fd"]),
        Journal(int(spec["journal_fd"]), crashed=bool(spec.get("crashed"))),
        namespace,
        connect,
        read_deadline=float(spec["read_deadline"]),
        interrupt_in=int(spec.get("interrupt_in", -1)),
        interrupt_out=[int(fd) for fd in spec.get("interrupt_out", [])],
        wake=wake,
        board=open_row(spec.get("inflight"), index),
        failover=Failover(str(spec.get("failover_policy", "resend")), str(spec.get("device", ""))),
    )
    # Before this handler is there, SIGURG is ignored, as is every process's default.
    signal.signal(signal.SIGURG, lambda *_: front_end.changes.look())
    # Requests make no reference cycles: what is alive now stays, and looking for garbage would only cost.
    gc.collect()
    gc.freeze()
    front_end.run()
    return 0


def open_mount(spec: Mapping[str, Any], row: int, index: int = 0) -> Mount:
    """The mount that a spec describes; `row`: our counters.

    Raises FormatError for a bad bootstrap, or CacheError; ScarceError if it can be opened when a file descriptor is free.
    """
    path = str(spec["bootstrap"])
    view = map_bootstrap(path, spec.get("bootstrap_size"))
    bootstrap = open_bootstrap(view, path, spec["path_id"], extracted=bool(spec["extracted"]))
    device = BlobDevice.from_spec(spec["blobs"], row)
    trace = Trace(str(spec["trace"])) if spec.get("trace") else None
    mapping = view.obj if isinstance(view.obj, mmap.mmap) else None
    stats = Stats.from_spec(spec, row)
    return Mount(str(spec["id"]), bootstrap, device, bool(spec["xattr"]), index, stats, trace, mapping)


def map_bootstrap(path: str, size: int | None) -> memoryview:
    """The file's bytes, mapped read-only.

    Raises FormatError when it is empty or its size is not the recorded one, ScarceError when it cannot be mapped now.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        if is_scarce(e):
            raise cache_error(f"bootstrap {path}", e) from e
        raise FormatError(path, "bootstrap", f"cannot be opened: {e.strerror}") from e
    try:
        found = os.fstat(fd).st_size
        if size is not None and found != size:
            raise FormatError(path, "size", f"{found} bytes, {size} when it was mounted: it must not change meanwhile")
        if found == 0:
            raise FormatError(path, "size", "0 bytes: this is no bootstrap")
        return memoryview(mmap.mmap(fd, found, prot=mmap.PROT_READ))
    except OSError as e:
        raise cache_error(f"bootstrap {path}", e) from e
    finally:
        os.close(fd)
