"""`nydusd nbd`: an image as one read-only block device on a unix socket, by the NBD protocol.

Runs in the supervisor. One front end serves all clients; the supervisor lets them in and holds their sockets
(`nbd_clients.py`). What holds after SIGKILL of the front end: its successor goes on with each client where it was. Of the
supervisor: everything ends, and the next daemon binds the same path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nydusd.cli.options import NbdOptions
from nydusd.errors import UnsupportedError
from nydusd.ipc.messages import Json
from nydusd.supervisor.children import Child
from nydusd.supervisor.daemon import Supervisor
from nydusd.supervisor.listener import Listener
from nydusd.supervisor.nbd_clients import Clients

if TYPE_CHECKING:
    from collections.abc import Callable

    from nydusd.cli.options import Options
    from nydusd.config import Config
    from nydusd.forkserver.client import ForkServer


class NbdDaemon(Supervisor):
    """A daemon that exports one image."""

    mounts_by_api = False
    front_end = ("NBD", "`nydusd nbd` exports a block device")

    def __init__(self, options: Options, config: Config, fork_server: ForkServer) -> None:
        super().__init__(options, config, fork_server)
        self._export: Listener | None = None
        self._server = Child("nbd", 0, "nydusd.frontends.nbd")
        self._clients: Clients | None = None
        self._family.own_spec, self._family.started = self._own_spec, self._started

    def start(self) -> None:
        """Everything up to RUNNING. Raises NydusError."""
        options = self.options
        assert isinstance(options, NbdOptions)
        image, first = self._begin_with_image()
        self._image = image
        if image.metadata.version != 6:
            raise UnsupportedError(
                f"{image.source}: only v6 images are block devices, this is v{image.metadata.version}: use `nydusd fuse`"
            )
        self._bind()
        self._export = Listener(options.socket, "--socket")
        self._clients = Clients(self._export, self._watch, self._forget)
        self._family.add(self._server)
        for role, count in (
            ("fetch", self.config.fetch_worker_count),
            ("decompress", self.config.decompress_worker_count),
        ):
            for index in range(count):
                self._family.add(Child(role, index, "workers"))
        self.open_api()
        self.mounts.serve(image, first.files)
        self._ready(f"{image.source} is exported at {options.socket}")

    def _own_spec(self, child: Child) -> tuple[list[int], Json] | None:
        if child is not self._server or self._clients is None:
            return None
        fds, more = self._clients.spec()
        return [*fds, self._family.lifeline], more | {
            "front": self._runtime.front,
            "read_deadline": self.config.nydusd.read_deadline,
            "image": self._image.spec(),
        }

    def _started(self, child: Child) -> None:
        if child is self._server and self._clients is not None:
            self._clients.started()

    def _watch(self, fd: int, take: Callable[[], None]) -> None:
        self._sources[fd] = take
        self._family.watch(fd)

    def _forget(self, fd: int) -> None:
        del self._sources[fd]
        self._family.forget(fd)

    def stop(self) -> None:
        """Stop listening, then end everything."""
        if self._export is not None:
            self._forget(self._export.fileno())
            self._export.remove()
        super().stop()
        if self._clients is not None:
            self._clients.close()
