"""`nydusd blobfs`: a FUSE file system of the blobs of an image; and EROFS mounted over one (`nydusd erofs --driver blobfs`).

Runs in the supervisor. Everything but the front ends' module is as for an image over FUSE: lanes, journals, workers.

What holds after SIGKILL: as for FUSE; the next daemon takes over the front ends, and EROFS with them. If all are gone, the
kernel has nobody to read from: what is not in its page cache fails with EIO, and a hole is never read. The next daemon
detaches such a mount and makes a new one.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nydusd.errors import MountError, NydusError
from nydusd.frontends.erofs import table
from nydusd.frontends.erofs.session import detach, mount_erofs, top_is_erofs, unmount_erofs
from nydusd.frontends.fuse.session import clear_stale_mount
from nydusd.ipc.messages import Json
from nydusd.supervisor import left_by_erofs
from nydusd.supervisor.children import Child
from nydusd.supervisor.fuse import FuseDaemon
from nydusd.supervisor.kernel_images import check

if TYPE_CHECKING:
    from nydusd.cli.options import Options
    from nydusd.config import Config
    from nydusd.forkserver.client import ForkServer

log = logging.getLogger(__name__)

_AROUND_LATER = 0.5
"""Seconds after READY until `around` is started: whoever waits comes first."""
_END_SECONDS = 0.5
"""How long its end is waited for. It may have to wait for a front end, which is gone; that does not concern a stop."""


class BlobfsDaemon(FuseDaemon):
    """A daemon that shows blobs."""

    mounts_by_api = False
    fuse_module = "nydusd.frontends.blobfs"
    front_end = ("FUSE", "`nydusd blobfs` shows the blobs themselves")


class ErofsOnBlobfs(BlobfsDaemon):
    """EROFS, the blobs of which are files of a FUSE file system of ours that nobody else sees.

    `nydusd: around` reads what surrounds small reads of them (`frontends/blobfs/around.py`).
    """

    own_note = left_by_erofs.BLOBFS

    def __init__(self, options: Options, config: Config, fork_server: ForkServer, why: str) -> None:
        super().__init__(options, config, fork_server)
        self.front_end = ("EROFS over blobfs", why)
        self._blobs = Path(self.run_dir).with_suffix(left_by_erofs.BLOBFS)
        self._mounted = self._kept = False
        self._notes = str(self._runtime.folder / "notes")
        """The pipe from front ends to `around`, found by its name by those of any supervisor here."""
        self._around = Child("around", 0, "nydusd.frontends.blobfs.around")
        self._family.to_front_ends = {"notes": self._notes}
        self._family.own_spec = self._own_spec

    def fuse_mountpoint(self) -> str:
        return str(self._blobs)

    def start(self) -> None:
        """Everything up to RUNNING. Raises NydusError."""
        place = self.options.serves
        if top_is_erofs(place) and not self._blobs.exists():
            raise MountError(f"{place}: an EROFS is mounted here already: unmount it first")
        try:
            self._blobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise MountError(f"{self._blobs}: {e.strerror}") from e
        super().start()

    def _begin(self, rows: int) -> None:
        super()._begin(rows)
        with contextlib.suppress(OSError):  # it is there already, or reads are slower
            os.mkfifo(self._notes, 0o600)
        clear_stale_mount(self.options.serves)

    def _take(self, record: Json) -> list[int] | None:
        """With the session of a killed supervisor, what is mounted over it is taken over."""
        front_ends = super()._take(record)
        self._kept = front_ends is not None
        return front_ends

    def _ready(self, what: str) -> None:
        """Before it is said: the blobs opened, so that their files have their sizes, and EROFS mounted."""
        place = self.options.serves
        (image,) = self.images.values()
        check(image)
        self._mounted = self._kept and top_is_erofs(place)  # from now on a stop unmounts it first
        self._wait_for_blobs(image)
        if self.stopping:
            return
        if os.path.exists(self._notes):
            self._family.add_later(self._around, _AROUND_LATER)
        if self._mounted:
            super()._ready(what)
            return
        if top_is_erofs(place):
            log.warning("%s: the mount of a daemon that was killed is detached", place)
            detach(place)
        before = table.instances()
        files = [str(self._blobs / cache.spec.info.blob_id) for cache in image.caches]
        mount_erofs(place, image.metadata.bootstrap, files)
        self._mounted = True
        table.set_read_ahead(name for name in table.instances() if name not in before)
        super()._ready(what)

    def _own_spec(self, child: Child) -> tuple[list[int], Json] | None:
        if child.role != "around":
            return None
        (image,) = self.images.values()
        names = [cache.spec.info.blob_id for cache in image.caches]
        more = {"notes": self._notes, "folder": str(self._blobs), "names": names, "supervisor": self.pid}
        return [self._family.lifeline], more

    def stop(self) -> None:
        """Unmount EROFS before what it reads from, and end before that who may have it open."""
        self._family.drop(self._around, _END_SECONDS)
        if self._mounted and self.ending.unmounts:
            try:
                unmount_erofs(self.options.serves)
            except NydusError as e:
                log.error("%s", e)
        super().stop()
        with contextlib.suppress(OSError):
            os.rmdir(self._blobs)
