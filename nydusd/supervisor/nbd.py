"""`nydusd nbd`: an image as one read-only block device on a unix socket, by the NBD protocol.

Runs in the supervisor. One front end serves all clients; the supervisor lets them in and holds their sockets
(`nbd_clients.py`).

What holds after SIGKILL of the front end: its successor goes on with each client where it was. Of the supervisor: the front end
serves on what is cached, and the next supervisor goes on with all clients (`nbd_left.py`); who connects meanwhile waits. Of
both: the fork server holds the clients for the next supervisor for a minute.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import time
from typing import TYPE_CHECKING

from nydusd import points
from nydusd.cli.options import NbdOptions
from nydusd.errors import MountError, NydusError, UnsupportedError
from nydusd.frontends.nbd.kept import LAYOUT
from nydusd.frontends.nbd.layout import places_of
from nydusd.ipc.messages import Json
from nydusd.storage.api.image import ImageFacts, identity_of
from nydusd.supervisor import control_ops, nbd_left
from nydusd.supervisor.adoption import parameters
from nydusd.supervisor.children import Child
from nydusd.supervisor.daemon import Supervisor
from nydusd.supervisor.listener import Listener
from nydusd.supervisor.mount_records import Recorded, readable
from nydusd.supervisor.mount_request import first_request
from nydusd.supervisor.mount_table import MountTable
from nydusd.supervisor.nbd_clients import Clients
from nydusd.supervisor.restore import Restore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nydusd.cli.options import Options
    from nydusd.config import Config
    from nydusd.forkserver.client import ForkServer
    from nydusd.supervisor.images import Image

log = logging.getLogger(__name__)

_HELD_SECONDS = 60.0
"""How long a fork server may take to hold the clients of a daemon that was killed: one that hangs is replaced meanwhile."""
_LOOK_SECONDS = 0.01


class NbdDaemon(Supervisor):
    """A daemon that exports one image."""

    mounts_by_api = False
    front_end = ("NBD", "`nydusd nbd` exports a block device")

    def __init__(self, options: Options, config: Config, fork_server: ForkServer) -> None:
        super().__init__(options, config, fork_server)
        assert isinstance(options, NbdOptions)
        self._socket = options.socket
        self._parameters = parameters(options, config)
        self._export: Listener | None = None
        self._server = Child("nbd", 0, "nydusd.frontends.nbd")
        self._clients: Clients | None = None
        self._found: nbd_left.Left | None = None
        """What a killed supervisor has left, until its holders have ended."""
        self._noted: nbd_left.Note | None = None
        """By what a successor finds our clients, or those of a killed supervisor."""
        self._former: tuple[MountTable, Recorded] | None = None
        """Its table of images, until that is served again."""
        self._family.own_spec, self._family.started, self._family.left = self._own_spec, self._started, self._note

    def start(self) -> None:
        """Everything up to RUNNING. Raises NydusError."""
        options = self.options
        assert isinstance(options, NbdOptions)
        self._begin(1)
        first = first_request(options, self.config)
        assert first is not None
        if self._former is None:
            image, files = self.mounts.mount_first(first), first.files
            if image.metadata.version != 6:
                raise UnsupportedError(
                    f"{image.source}: only v6 images are block devices, this is v{image.metadata.version}: use `nydusd fuse`"
                )
            _check(image.metadata)
            self._bind()
        else:
            image, files = self._go_on(*self._former)
            self._former = None
        self._image = image
        found = self._found
        if found is not None:
            self._export = Listener.adopt(found.listener, self._socket, found.note.path)
        if self._export is None:
            self._export = Listener(self._socket, "--socket")
        self._clients = Clients(self._export, self, found)
        listener = os.fstat(self._export.fileno()).st_ino
        self._noted = nbd_left.Note(self._parameters, self._clients.inode, listener, self._export.inode)
        # A fork server of ours holds it all; noted before the former ones end, so that whoever comes after us looks there.
        if found is not None:
            self._wait_until_held(found)
        self._family.remember()
        points.reach("clients: noted")
        if found is not None:
            found.end_holders(self.fork_server.pids, self.told)
            self._found = None
        points.reach("clients: before a front end")
        self._family.add(self._server)
        for role in ("fetch", "decompress"):
            for index in range(self._family.count(role)):
                self._family.add(Child(role, index, "workers"))
        self.open_api()
        self.mounts.serve(image, files)
        self._ready(f"{image.source} is exported at {self._socket}")

    # --- a takeover -------------------------------------------------------------------------------------------

    def _take(self, record: Json) -> list[int] | None:
        """The pids of those who hold the clients of a killed supervisor, if all can be gone on with."""
        assert isinstance(self.options, NbdOptions)
        note = nbd_left.noted(record)
        found = None if note is None else nbd_left.take(note, record, self.told)
        if note is None or found is None:
            return None
        try:
            if (note.parameters, note.layout) != (self._parameters, LAYOUT):
                raise MountError("it was started with other parameters, or is of another release")
            table = MountTable.take_over(self._runtime.folder / "mounts", f"{self._runtime.prefix}mounts")
            (image,) = readable(table, self.config, self.options.virtual_mountpoint)
            if identity_of(os.stat(image.source)) != image.facts.identity:
                raise MountError(f"{image.source} is another image now")
        except (NydusError, OSError, ValueError) as e:
            log.warning("the clients of a daemon that was killed are disconnected: %s", e)
            found.close()
            return None
        log.warning("%d clients of a daemon that was killed are taken over", len(found.clients))
        self._found, self._noted, self._former = found, note, (table, image)
        self._family.inherited = True
        self._runtime.term = table.next_term(int(record.get("term", 0)))
        return [pid for pid, _ in found.holders]

    def _know_mounts(self, rows: int, table: MountTable | None = None) -> None:
        super()._know_mounts(rows, None if self._former is None else self._former[0])

    def _go_on(self, table: MountTable, recorded: Recorded) -> tuple[Image, Sequence[bytes] | None]:
        """Know the image again under the names by which the front end, which still serves, reads it."""
        self._bind()
        restore = Restore(self.mounts, self.engine.router, [recorded], control_ops.recall(self))
        restore.begin()
        restore.end()
        table.begin_term(self._runtime.term)
        return self.images[recorded.place], recorded.files

    def _wait_until_held(self, found: nbd_left.Left) -> None:
        """Until a fork server of ours has taken the clients. Raises MountError if none does: they are the next one's then.

        So they are when we are told to end meanwhile (EndedError). It costs nobody anything: the former front end serves on,
        and without a fork server that is ready there is no other.
        """
        since = time.monotonic()
        until = since + _HELD_SECONDS
        said = False
        while not any(map(found.is_held_by, self.fork_server.pids)):
            now = time.monotonic()
            if now >= until:
                raise MountError(f"{self.options.serves}: no fork server takes the clients of the daemon before")
            if not said:
                said = True
                log.info("waiting for a fork server to hold the clients, %g s at most", _HELD_SECONDS)
            self.told.wait(since, _LOOK_SECONDS)
            self._family.tend(dict(self._poller.poll(0)), now)
            self._notifier.alive(now)

    def _note(self) -> Json:
        """What a successor must know."""
        pids = [*self.fork_server.pids, self._server.pid]
        if self._found is not None:
            pids += [pid for pid, _ in self._found.holders]
        note = self._noted
        if note is None:
            return {}
        return {"nbd": nbd_left.to_json(note), "holders": nbd_left.who([pid for pid in pids if pid])}

    # --- what the clients need --------------------------------------------------------------------------------

    def watch(self, fd: int, take: Callable[[], None]) -> None:
        """Call `take` when there is something to read."""
        self._sources[fd] = take
        self._family.watch(fd)

    def forget(self, fd: int) -> None:
        """End of `watch`."""
        del self._sources[fd]
        self._family.forget(fd)

    def hold(self, fds: Sequence[int]) -> None:
        """Have the fork server hold these, too."""
        self._family.hold(fds)

    def release(self, fds: Sequence[int]) -> None:
        """End of `hold`: they are about to be closed."""
        self.fork_server.release(fds)

    def renew(self) -> None:
        """End the front end, which does not take a client: the next one is given all."""
        self._server.send(signal.SIGKILL)

    def _own_spec(self, child: Child) -> tuple[list[int], Json] | None:
        if child is not self._server or self._clients is None:
            return None
        fds, more = self._clients.spec()
        return [*fds, self._family.lifeline], more | {
            "front": self._runtime.front,
            "read_deadline": self.config.nydusd.read_deadline,
            "image": self._image.spec(),
            "inflight": self.mounts.memory.board_name,
        }

    def _started(self, child: Child) -> None:
        if child is self._server and self._clients is not None:
            self._clients.started()

    def _turn(self, timeout: float) -> None:
        super()._turn(timeout)
        if self._clients is not None:
            self._clients.tick(time.monotonic())

    def _timeout(self) -> float:
        due = self._clients.due() if self._clients is not None else float("inf")
        return max(0.0, min(super()._timeout(), due - time.monotonic()))

    # --- stop -------------------------------------------------------------------------------------------------

    def _can_leave(self) -> bool:
        return self._clients is not None or self._found is not None

    def stop(self) -> None:
        """Stop listening, end everything, disconnect everybody; or leave all that to the next one."""
        clients, export = self._clients, self._export
        if self.ending.leaves_all:
            self.children[:] = [child for child in self.children if child is not self._server]
            super().stop()
            return
        if clients is not None and export is not None:
            clients.shut()
            self.release([export.fileno()])
            export.remove()
        super().stop()
        if clients is not None:
            clients.close()


def _check(facts: ImageFacts) -> None:
    """Raises FormatError for a v6 image that cannot be laid out on a disk: the front end would die of it at its start."""
    with open(facts.bootstrap, "rb") as f:
        view = memoryview(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ))
    places_of(view, [blob.uncompressed_size for blob in facts.blobs], facts.bootstrap)
