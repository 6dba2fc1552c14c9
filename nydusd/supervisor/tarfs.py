"""`nydusd erofs --driver tarfs`: the kernel's EROFS straight over the tars that an image refers to, in blocks of 512 bytes.

Runs in the supervisor. All data is there, so nothing is fetched, copied or asked for: there is an API process and no other.
What holds after SIGKILL of all of them: the mount goes on as it is, for the kernel alone reads. The next daemon on this mount
point goes on with it if it is the same image over the same files, else it detaches it and mounts anew.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nydusd.cli.options import FuseOptions
from nydusd.errors import CacheError, MountError, NydusError, UnsupportedError
from nydusd.frontends.erofs.session import detach, mount_erofs, top_is_erofs, unmount_erofs
from nydusd.ipc.messages import Json
from nydusd.supervisor import left_by_erofs
from nydusd.supervisor.checked import read_checked, write_checked
from nydusd.supervisor.daemon import Supervisor
from nydusd.supervisor.kernel_images import check_places

if TYPE_CHECKING:
    from nydusd.cli.options import Options
    from nydusd.config import Config
    from nydusd.forkserver.client import ForkServer
    from nydusd.supervisor.images import Image

log = logging.getLogger(__name__)


class TarfsDaemon(Supervisor):
    """A daemon whose image is made of tars that are on this machine. `why` is what made it this one, for whoever asks."""

    mounts_by_api = False

    def __init__(self, options: Options, config: Config, fork_server: ForkServer, why: str) -> None:
        super().__init__(options, config, fork_server)
        self.front_end = ("EROFS over tars", why)
        self._left = Path(self.run_dir).with_suffix(left_by_erofs.TARFS)
        self._mounted = False

    def start(self) -> None:
        """Everything up to RUNNING. Raises NydusError."""
        options = self.options
        assert isinstance(options, FuseOptions)
        left_by_erofs.refuse(self.run_dir, options.mountpoint, left_by_erofs.TARFS)
        image, _first = self._begin_with_image()
        self._bind()
        self._mount(options.mountpoint, image)
        self.open_api()
        self._ready(f"{image.source} is mounted at {options.mountpoint}")

    def _mount(self, mountpoint: str, image: Image) -> None:
        files = tars_of(image, self.config)
        facts: Json = {"identity": image.metadata.identity, "files": [_identity(path) for path in files]}
        if top_is_erofs(mountpoint):
            left: Json | None = None
            with suppress(CacheError):
                left = read_checked(self._left)
            if left is None:
                raise MountError(f"{mountpoint}: an EROFS is mounted here already: unmount it first")
            if left == facts:
                log.warning("%s: the mount of a daemon that was killed is taken over", mountpoint)
                self._mounted = self._family.inherited = True
                return
            log.warning("%s: a daemon that was killed has left another image mounted; it is detached", mountpoint)
            detach(mountpoint)
        write_checked(self._left, facts)  # before the mount: one that nobody knows of could not be taken over
        mount_erofs(mountpoint, image.metadata.bootstrap, files)
        self._mounted = True

    def _can_leave(self) -> bool:
        return self._mounted

    def stop(self) -> None:
        """Unmount, but not in a restart; lazily if somebody uses it, which needs none of us."""
        if self._mounted and self.ending.unmounts:
            try:
                unmount_erofs(self.options.serves)
                self._left.unlink(missing_ok=True)
            except NydusError as e:
                log.error("%s", e)
        super().stop()


def tars_of(image: Image, config: Config) -> list[str]:
    """The file of each blob. Raises UnsupportedError when the image is not made of tars, MountError for one that lacks, and as
    `check_places`.
    """
    settings = config.backend.localfs if config.backend is not None and config.backend.type == "localfs" else None
    if settings is None or not image.metadata.blobs or not all(blob.is_tarfs for blob in image.metadata.blobs):
        raise UnsupportedError(
            f"{image.source}: not a tarfs image with its tars in a local folder: use another --driver"
        )
    check_places(image.metadata)
    found = []
    for blob in image.metadata.blobs:
        paths = [settings.blob_file] if settings.blob_file else []
        paths += [os.path.join(folder, blob.blob_id) for folder in (settings.dir, *settings.alt_dirs) if folder]
        path = next((os.path.abspath(path) for path in paths if os.path.isfile(path)), None)
        if path is None:
            raise MountError(f"blob {blob.blob_id}: its tar is not in {' or '.join(paths)}")
        if os.path.getsize(path) < blob.uncompressed_size:
            raise MountError(f"{path}: {os.path.getsize(path)} bytes, the image needs {blob.uncompressed_size}")
        found.append(path)
    return found


def _identity(path: str) -> list[int]:
    st = os.stat(path)
    return [st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns]
