"""`nydusd erofs`: one image, mounted by the kernel's EROFS over the cache files, which are filled when the kernel asks.

Runs in the supervisor. Beside the processes that any daemon has there are one front end, which answers the kernel, and a
guard, which holds what must not be closed while anybody reads (`frontends/erofs/guard.py`). The blobs are opened first: their
cache files, still empty but of their full size, are what is mounted.

What holds after SIGKILL: readers of what is cached go on, others wait. The next daemon on this mount point takes the mount
over as it is; under systemd also if nothing of ours was left alive, for systemd's fd store holds what the guard holds.
A stop unmounts first; if somebody uses the file system still, front end and guard stay until nobody does.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nydusd.cli.options import FuseOptions
from nydusd.errors import MountError, NydusError, UnsupportedError
from nydusd.frontends.erofs import left
from nydusd.frontends.erofs.session import ErofsSession, detach, top_is_erofs
from nydusd.ipc.messages import Json
from nydusd.supervisor.children import Child
from nydusd.supervisor.daemon import Supervisor

if TYPE_CHECKING:
    from nydusd.cli.options import Options
    from nydusd.config import Config
    from nydusd.forkserver.client import ForkServer
    from nydusd.supervisor.images import Image

log = logging.getLogger(__name__)


class ErofsDaemon(Supervisor):
    """A daemon whose image the kernel reads by itself. `why` is what made it this one, for whoever asks."""

    mounts_by_api = False

    def __init__(self, options: Options, config: Config, fork_server: ForkServer, why: str) -> None:
        super().__init__(options, config, fork_server)
        self.front_end = ("EROFS with fanotify", why)
        self._erofs: ErofsSession | None = None
        self._front_end = Child("erofs", 0, "nydusd.frontends.erofs")
        self._left = Path(self.run_dir).with_suffix(".erofs.json")
        self._stored = f"nydusd-erofs-{self._runtime.instance}-"
        """What the names of our fds in systemd's store begin with."""
        self._family.own_spec, self._family.started = self._own_spec, self._started

    def start(self) -> None:
        """Everything up to RUNNING: the blobs are opened before the mount is there. Raises NydusError."""
        options = self.options
        assert isinstance(options, FuseOptions)
        image, first = self._begin_with_image()
        check(image)
        if len(image.caches) > _BLOBS_MOST:
            raise UnsupportedError(
                f"{image.source}: {len(image.caches)} blobs, with fanotify {_BLOBS_MOST} at most: use blobfs"
            )
        for cache in image.caches:
            cache.pinned = True
        self._bind()
        self.open_api()
        counts = {role: self._family.count(role) for role in ("fetch", "decompress")}
        for turn in range(max(counts.values())):
            for role, count in counts.items():
                if turn < count:
                    self._family.add(Child(role, turn, "workers"))
        self.mounts.serve(image, first.files)
        self._wait_for_blobs(image)
        if self.stopping:
            return
        for cache in image.caches:
            if not os.path.exists(str(cache.spec.data_path)):
                raise MountError(f"EROFS reads cache files: cache folder {cache.spec.work_dir}: {cache.no_room_why}")
        self._mount(options.mountpoint, image)
        self._ready(f"{image.source} is mounted at {options.mountpoint}")

    def _mount(self, mountpoint: str, image: Image) -> None:
        self._image = image
        self._files = [str(cache.spec.data_path) for cache in image.caches]
        found = left.take(self._left)
        if found is None:
            found = left.stored(self._left, self._store.given(self._stored))
        adopted = found is not None and self._adopt(mountpoint, image, found)
        if not adopted:
            found = None
            self._clear_dead_mount(mountpoint)
            complete = [cache.chunk_map.is_all_ready() for cache in image.caches]
            facts = image.metadata
            self._erofs = ErofsSession.prepare(mountpoint, facts.bootstrap, facts.identity, self._files, complete)
        assert self._erofs is not None
        fds = self._erofs.fds
        self._store.hold(self._stored, dict(zip(left.names(len(fds.trees)), fds.all(), strict=True)))
        if found is not None:
            # Its ZeroMQ identity must be no former one's: what that asked for may be under way still.
            self._front_end.generation = found.generation
        self._family.add(Child("guard", 0, "nydusd.frontends.erofs.guard", ("nydusd.frontends.erofs.main",)))
        if found is not None:
            left.end(found.holders)
        else:
            self._erofs.mount()
        self._family.add(self._front_end)

    def _adopt(self, mountpoint: str, image: Image, found: left.Left) -> bool:
        """Go on with what a killed daemon has left, if it is mounted. Raises MountError when it is another image."""
        session = ErofsSession.adopt(found.fds)
        if session.mounted and _is_of(session, image):
            self._erofs = session
            log.warning("%s: the mount of a daemon that was killed is taken over", mountpoint)
            return True
        found.fds.close()
        if session.mounted:
            left.let_be(found.holders)
            raise MountError(
                f"{mountpoint}: a killed daemon has left another image mounted here, or this one with other cache files:"
                " unmount it first"
            )
        if session.record.is_alive():  # used without being seen here: its guard and front end go on
            left.let_be(found.holders)
        else:
            left.end(found.holders)
        return False

    def _clear_dead_mount(self, mountpoint: str) -> None:
        """Detach what a daemon has mounted all of whose processes were killed: it reads holes. Raises MountError for others."""
        if not top_is_erofs(mountpoint):
            return
        if not self._left.exists():
            raise MountError(f"{mountpoint}: an EROFS is mounted here already: unmount it first")
        log.warning("%s: all processes of a daemon were killed; its mount, which reads holes, is detached", mountpoint)
        detach(mountpoint)

    # --- children ---------------------------------------------------------------------------------------------

    def _own_spec(self, child: Child) -> tuple[list[int], Json] | None:
        """The fds and the spec of the front end and of the guard."""
        session = self._erofs
        if child.role not in ("erofs", "guard") or session is None:
            return None
        fds = session.fds
        spec: Json = {
            "group": fds.group,
            "journal": fds.journal,
            "record": fds.record,
            "trees": fds.trees,
            "front": self._runtime.front,
            "read_deadline": self.config.nydusd.read_deadline,
            "blobs": self._image.spec()["blobs"],
            "crashed": child.crashed,
        }
        if child.role == "guard":
            spec = {
                **{name: spec[name] for name in ("group", "journal", "record", "trees")},
                "files": self._files,
                "left": str(self._left),
                "patience": self.config.nydusd.read_deadline,
                "supervisor": self.pid,
                "successor": spec | {"crashed": False, "log": self._family.log_spec(), "index": 0},
            }
        return fds.all(), spec

    def _started(self, child: Child) -> None:
        """A guard or a front end is there: note it for a successor."""
        if child.role in ("erofs", "guard") and self._erofs is not None:
            holders = [each.pid for each in self.children if each.role in ("erofs", "guard") and each.pid]
            left.write(self._left, holders, self._erofs.fds, self._front_end.generation)

    def _is_over(self, child: Child, status: int) -> bool:
        return child.role in ("erofs", "guard") and status == 0

    # --- stop -------------------------------------------------------------------------------------------------

    def _can_leave(self) -> bool:
        return self._erofs is not None

    def stop(self) -> None:
        """Unmount before anything is closed; what somebody uses still, or all in a restart, is left to front end and guard."""
        session = self._erofs
        gone = True
        if session is not None:
            gone = self._unmount and self._is_gone(session)
            if not gone:
                if not self.handover.leaving:
                    log.warning("%s is used still; front end and guard stay until it is not", self.options.serves)
                self.children[:] = [child for child in self.children if child.role not in ("erofs", "guard")]
        super().stop()
        if session is not None:
            session.fds.close()
        if gone:
            self._store.drop()
            self._left.unlink(missing_ok=True)

    @staticmethod
    def _is_gone(session: ErofsSession) -> bool:
        try:
            return session.unmount()
        except NydusError as e:
            log.error("%s", e)
            return False


_BLOBS_MOST = 240
"""Each has a file descriptor that is handed to front end and guard, and no more can be at once."""


def check(image: Image) -> None:
    """Raises UnsupportedError for an image that the kernel cannot mount from cache files."""
    if image.metadata.version != 6:
        raise UnsupportedError(
            f"{image.source}: the kernel mounts images of RAFS v6 only, this is v{image.metadata.version}: use `nydusd fuse`"
        )
    if any(not cache.caches for cache in image.caches):
        raise UnsupportedError("EROFS reads cache files: configure a cache of type blobcache with a work_dir")


def _is_of(session: ErofsSession, image: Image) -> bool:
    """Whether what is mounted is this image, with the cache files that are there now."""
    files = []
    for cache in image.caches:
        with suppress(OSError):
            st = os.stat(str(cache.spec.data_path))
            files.append((st.st_dev, st.st_ino))
    return session.record.identity == image.metadata.identity and list(session.record.files) == files
