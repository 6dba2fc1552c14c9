"""Images that the kernel's EROFS reads by itself: mounted over their cache files, unmounted, taken over. Part of the
supervisor.

To show an image: its blobs are opened, so that their cache files have their sizes; a worker writes a copy of its metadata in
which each range of a blob is a device (`formats/write/rafs_v6_split.py`); then the mount is written down for front end and
guard, made, and attached. What reads a disk for long is a job; mount(2) itself reads one block.

What holds after SIGKILL between any two steps: what is attached is in the table of mounts, and so is what may have been made
and is attached nowhere, which is gone. The next supervisor goes on with the former, and shows again what lacks.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from nydusd import points
from nydusd.errors import MountError, NydusError
from nydusd.frontends.erofs import mount_api
from nydusd.frontends.erofs.session import Fds, is_mounted, is_seen, make, unmount_erofs
from nydusd.frontends.erofs.table import Mounted
from nydusd.supervisor.kernel_copy import make_copy
from nydusd.supervisor.kernel_images import check, files_of, is_fillable, is_of, ranges_of
from nydusd.supervisor.kernel_listed import Listing
from nydusd.supervisor.kernel_places import is_inside, open_folder, path_of
from nydusd.supervisor.kernel_table import KernelTable

if TYPE_CHECKING:
    from nydusd.storage.cache.blob_cache import BlobCache
    from nydusd.supervisor.images import Image
    from nydusd.supervisor.mount_request import Done
    from nydusd.supervisor.mounts import Mounts
    from nydusd.supervisor.pool import WorkerPool

log = logging.getLogger(__name__)

_LOOK = 2.0
"""Seconds between looks whether mounts are there still."""


@dataclass(eq=False, slots=True)
class _Coming:
    """An image that is to be shown in the place of `old`, if that is given. `asked`: a worker is at it; `renewed`: blobs of it
    were opened again, since their cache files were not what had been opened.

    `done`: all who are to be told how it ended.
    """

    image: Image
    done: list[Done]
    old: Image | None
    asked: bool = False
    renewed: bool = False


@dataclass(slots=True)
class _Shown:
    """What is mounted. `image` is None for what was unmounted and is used still; `caches` are its own as long as it is
    there.
    """

    index: int
    image: Image | None
    caches: list[BlobCache] = field(default_factory=list)


class KernelMounts:
    """`base` is the folder below which all is mounted. `renew(cache)` has a blob opened again; `lost(place)` says what is not
    there any more.

    `changed()` is called before each mount is seen and after it is not; it raises MountError when that cannot be noted.
    """

    def __init__(
        self,
        base: str,
        fds: Fds,
        fetch: WorkerPool,
        mounts: Mounts,
        renew: Callable[[BlobCache], None],
        lost: Callable[[str], None],
        changed: Callable[[], None],
    ) -> None:
        self.fds = fds
        self._base = base
        self._fetch = fetch
        self._mounts = mounts
        self._renew = renew
        self._lost = lost
        self._changed = changed
        self._coming: list[_Coming] = []
        self._shown: list[_Shown] = []
        self._next_look = 0.0
        self._submitted = False
        """Whether there is a job since that goes out with the next turn of the loop."""
        self.table = KernelTable(fds.table)
        self._listing = Listing(fetch, self.table)

    # --- show -------------------------------------------------------------------------------------------------

    def show(self, image: Image, done: Done, old: Image | None = None) -> None:
        """Mount an image; `done` is told how that ended. With `old`, in its place, in one step for whoever looks.

        Raises UnsupportedError for one that the kernel cannot mount.
        """
        check(image)
        if (index := self._index_of(image)) >= 0:  # somebody else has unmounted it
            self._hide_index(index, seen=False)
        for cache in image.caches:
            cache.pinned = True
        self._coming.append(_Coming(image, [done], old))

    def join(self, image: Image, done: Done) -> bool:
        """Whether this image is about to be shown; then `done` is told, too, how that ended."""
        coming = next((coming for coming in self._coming if coming.image is image), None)
        if coming is not None:
            coming.done.append(done)
        return coming is not None

    def shows(self, image: Image) -> bool:
        """Whether this image is mounted, and nobody else has unmounted it. Raises CacheError when that cannot be told."""
        return (index := self._index_of(image)) >= 0 and _is_there(self.table.mounted(index))

    def tick(self) -> None:
        """Called in each turn of the loop: go on with what waits; look now and then whether what is mounted is there still."""
        for coming in [coming for coming in self._coming if not coming.asked]:
            caches = coming.image.caches
            failed = next((cache for cache in caches if cache.state == "failed"), None)
            if failed is not None:
                self._end(coming, MountError(f"blob {failed.spec.info.blob_id} cannot be opened: {failed.reason}"))
            elif all(cache.state == "ready" for cache in caches) and not self._has_outer(coming):
                self._split(coming)
        if (now := time.monotonic()) >= self._next_look:
            self._next_look = now + _LOOK
            self._look()

    def sooner(self, timeout: float) -> float:
        """So many seconds, or fewer if `tick` must be called again before."""
        if self._submitted:
            self._submitted = False
            return 0.0
        return timeout if not self._shown else max(0.0, min(timeout, self._next_look - time.monotonic()))

    def _has_outer(self, coming: _Coming) -> bool:
        """Whether an image is to come in which this one is mounted: it would hide this one."""
        place = coming.image.place
        return any(is_inside(place, other.image.place) for other in self._coming if other is not coming)

    def _split(self, coming: _Coming) -> None:
        """Have the copy of the metadata made that the kernel is to mount."""
        image = coming.image
        lacking = [cache for cache in image.caches if not is_fillable(cache)]
        if lacking and not coming.renewed:
            coming.renewed = True
            for cache in lacking:
                self._renew(cache)
            self._submitted = True
            return
        coming.asked = True
        try:
            if lacking:
                why = lacking[0].no_room_why or "its file was replaced"
                raise MountError(f"EROFS reads cache files: cache folder {lacking[0].spec.work_dir}: {why}")
            if coming.old is not None and self.shows(coming.old):
                index = self._index_of(coming.old)
                if is_of(self.table.mounted(index), image):
                    self._describe(coming)
                    return
                self.table.check_unused(self.table.mounted(index))
        except NydusError as e:
            self._end(coming, e)
            return
        except OSError as e:
            self._end(coming, MountError(f"{e.filename or ''}: {e.strerror}"))
            return
        if not image.caches:
            self._mount(coming, image.metadata.bootstrap, [])
            return
        try:
            make_copy(self._fetch, image, partial(self._mount, coming))
        except OSError as e:
            log.warning("%s: no copy of the metadata can be made: %s", image.source, e.strerror)
            self._mount(coming, image.metadata.bootstrap, None)
        else:
            self._submitted = True

    def _mount(
        self, coming: _Coming, bootstrap: str, cuts: list[list[int]] | None, listed: Sequence[bool] = ()
    ) -> None:
        if coming not in self._coming:  # the daemon stops
            return
        image = coming.image
        try:
            if image.released:
                raise MountError("it was unmounted meanwhile")
            self._make(image, bootstrap, cuts or [[0]] * len(image.caches), listed, coming.old)
        except NydusError as e:
            self._end(coming, e)
        except OSError as e:
            self._end(coming, MountError(f"{path_of(self._base, image.place)}: {e.filename or ''} {e.strerror}"))
        else:
            log.info("%s is mounted at %s by the kernel", image.source, path_of(self._base, image.place))
            self._end(coming, None)

    def _make(
        self,
        image: Image,
        bootstrap: str,
        cuts: Sequence[Sequence[int]],
        listed: Sequence[bool],
        old: Image | None,
    ) -> None:
        """Raises NydusError, OSError; nothing is mounted then."""
        path = path_of(self._base, image.place)
        place = open_folder(self._base, image.place, self.table.note_folder)
        try:
            former = -1 if old is None else self._index_of(old)
            beneath = former >= 0 and _is_seen(self.table.mounted(former))
            index = self.table.next_index()
            known = Mounted(index, image.place, path, image.metadata.identity, files_of(image, index, cuts, listed))
            self.table.add(known)
            points.reach("erofs: written down")
            try:
                mount, names = make(self.fds.group, bootstrap, ranges_of(image.caches, cuts), path)
                try:
                    device = os.fstat(mount).st_dev
                    known = replace(known, names=names, device=f"{os.major(device)}:{os.minor(device)}")
                    self.table.note(known)
                    self._changed()
                    points.reach("erofs: noted")
                    mount_api.attach(mount, place, path, beneath=beneath)
                    points.reach("erofs: mounted")
                finally:
                    os.close(mount)
            except (NydusError, OSError):
                self.table.forget(index)
                raise
        except (NydusError, OSError):
            self.table.remove_folders()
            raise
        finally:
            os.close(place)
        known.set_read_ahead(incomplete=True)
        self._shown.append(_Shown(index, image, self._hold(image)))
        if not listed:
            self._listing.ask(index, image)
        if former >= 0:
            self._hide_index(former, seen=beneath)

    @staticmethod
    def _hold(image: Image) -> list[BlobCache]:
        """The caches are used by the mount, too, from now on."""
        for cache in image.caches:
            cache.users += 1
        return list(image.caches)

    def _describe(self, coming: _Coming) -> None:
        """The image is another, and what is mounted the same: front ends must know how its blobs are called now."""
        assert coming.old is not None
        shown = next(shown for shown in self._shown if shown.image is coming.old)
        mounted = self.table.mounted(shown.index)
        cuts = [file.cuts for file in mounted.files]
        self.table.note(replace(mounted, files=files_of(coming.image, mounted.index, cuts, former=mounted.files)))
        former, shown.image, shown.caches = shown.caches, coming.image, self._hold(coming.image)
        for cache in former:
            self._mounts.unused.let_go(cache)
        self._end(coming, None)

    def _end(self, coming: _Coming, error: NydusError | None) -> None:
        self._coming.remove(coming)
        if error is not None:
            self._unpin(coming.image.caches)
        for done in coming.done:
            done(error)

    # --- hide -------------------------------------------------------------------------------------------------

    def hide(self, image: Image) -> None:
        """Unmount an image, lazily when somebody uses it. Raises MountError."""
        for coming in [coming for coming in self._coming if coming.image is image]:
            self._end(coming, MountError("it was unmounted meanwhile"))
        if (index := self._index_of(image)) >= 0:
            self._hide_index(index, seen=_is_seen(self.table.mounted(index)))

    def _hide_index(self, index: int, *, seen: bool) -> None:
        mounted = self.table.mounted(index)
        if seen:
            unmount_erofs(mounted.mountpoint)
            for beneath in self.table.mounts:  # of a remount in the middle of which a supervisor was killed
                if beneath.gone and beneath.mountpoint == mounted.mountpoint and _is_seen(beneath):
                    unmount_erofs(beneath.mountpoint)
            points.reach("erofs: unmounted")
        shown = next(shown for shown in self._shown if shown.index == index)
        shown.image = None
        if mounted.is_alive():
            log.info("%s is used still: what is cached can be read until it is not", mounted.mountpoint)
            self.table.note(replace(mounted, gone=True))
        else:
            self._drop(shown)
        self.table.remove_folders()
        try:
            self._changed()
        except MountError as e:  # a place too many in the note costs nothing
            log.warning("%s", e)

    def hide_all(self) -> bool:
        """Unmount everything; whether all of it is gone. Failures are logged."""
        for coming in list(self._coming):
            self._end(coming, MountError("the daemon stops"))
        for mounted in sorted(self.table.mounts, key=lambda each: len(each.mountpoint), reverse=True):
            if mounted.gone:
                continue
            try:
                self._hide_index(mounted.index, seen=_is_seen(mounted))
            except NydusError as e:
                log.error("%s", e)
        return self.table.end()

    def _look(self) -> None:
        """Forget what was unmounted and is not used any more."""
        for shown in list(self._shown):
            mounted = self.table.mounted(shown.index)
            if mounted.is_alive():
                continue
            if shown.image is None:
                self._drop(shown)
                continue
            log.warning("%s was unmounted from outside", mounted.mountpoint)
            self._lost(shown.image.place)

    def _drop(self, shown: _Shown) -> None:
        """It is used no more."""
        self._shown.remove(shown)
        self._forget(self.table.mounted(shown.index))
        self._unpin(shown.caches)
        for cache in shown.caches:
            self._mounts.unused.let_go(cache)

    def _forget(self, mounted: Mounted) -> None:
        """It is not there. What says which chunks there are goes with it where only the table knows of that."""
        self.table.forget(mounted.index)
        self._mounts.forget_segments({file.segment for file in mounted.files} - self.table.segments())

    def _unpin(self, caches: Sequence[BlobCache]) -> None:
        """Things may be taken out of the files that the kernel reads no more."""
        used = [cache for shown in self._shown for cache in shown.caches]
        used += [cache for coming in self._coming for cache in coming.image.caches]
        # Also by what a former supervisor has unmounted, of which only the files are known.
        paths = self.table.files()
        for cache in caches:
            cache.pinned = cache in used or str(cache.spec.data_path) in paths

    # --- a takeover -------------------------------------------------------------------------------------------

    def go_on(self, images: Sequence[Image]) -> list[Image]:
        """Take over what a killed supervisor has mounted; gives the images that are to be shown again. Raises MountError."""
        lacking = list(images)
        for mounted in self.table.mounts:
            image = next((image for image in lacking if is_of(mounted, image)), None)
            seen = not mounted.gone and _is_seen(mounted)
            if seen and image is None:
                unmount_erofs(mounted.mountpoint)
            if not seen or image is None:
                if mounted.is_alive():
                    self.table.note(replace(mounted, gone=True))
                    self._shown.append(_Shown(mounted.index, None))
                else:
                    self._forget(mounted)
                continue
            lacking.remove(image)
            cuts = [file.cuts for file in mounted.files]
            self.table.note(replace(mounted, files=files_of(image, mounted.index, cuts, former=mounted.files)))
            for cache in image.caches:
                cache.pinned = True
            self._shown.append(_Shown(mounted.index, image, self._hold(image)))
            self._listing.ask(mounted.index, image)
            log.warning("%s: the mount of a daemon that was killed is taken over", mounted.mountpoint)
        self.table.remove_folders()
        return lacking

    def _index_of(self, image: Image) -> int:
        return next((shown.index for shown in self._shown if shown.image is image), -1)


def _is_there(mounted: Mounted) -> bool:
    """Whether this file system is mounted at its place still. It may live without that: who has files open reads on."""
    return is_mounted(mounted.mountpoint, mounted.device)


def _is_seen(mounted: Mounted) -> bool:
    """Whether it is this file system that is seen at its place."""
    return is_seen(mounted.mountpoint, mounted.device)
