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
from typing import TYPE_CHECKING

from nydusd import points
from nydusd.errors import MountError, NydusError
from nydusd.frontends.erofs import mount_api, table
from nydusd.frontends.erofs.session import Fds, is_seen, make, top_mount, unmount_erofs
from nydusd.frontends.erofs.table import Mounted, Table
from nydusd.ipc.messages import Json
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.supervisor.kernel_images import check, files_of, is_of, ranges_of
from nydusd.supervisor.kernel_places import is_inside, open_folder, path_of, remove_unused

if TYPE_CHECKING:
    from nydusd.storage.cache.blob_cache import BlobCache
    from nydusd.supervisor.images import Image
    from nydusd.supervisor.mount_request import Done
    from nydusd.supervisor.pool import WorkerPool

log = logging.getLogger(__name__)

_LEAST, _MOST = 4 << 20, 512
"""Bytes of a range of a blob, and ranges of an image."""
_LOOK = 2.0
"""Seconds between looks whether mounts are there still."""


@dataclass(eq=False, slots=True)
class _Coming:
    """An image that is to be shown in the place of `old`, if that is given. `asked`: a worker is at it.

    `done`: all who are to be told how it ended.
    """

    image: Image
    done: list[Done]
    old: Image | None
    asked: bool = False


@dataclass(slots=True)
class _Shown:
    """What is mounted. `image` is None for what was unmounted and is used still; `caches` are its own as long as it is
    there.
    """

    index: int
    image: Image | None
    caches: list[BlobCache] = field(default_factory=list)


class KernelMounts:
    """`base` is the folder below which all is mounted. `let_go(cache)` ends a use of a blob; `lost(place)` says what is not
    there any more.

    `changed()` is called after each change of what is mounted.
    """

    def __init__(
        self,
        base: str,
        fds: Fds,
        fetch: WorkerPool,
        let_go: Callable[[BlobCache], None],
        lost: Callable[[str], None],
        changed: Callable[[], None],
    ) -> None:
        self.fds = fds
        self._base = base
        self._fetch = fetch
        self._let_go = let_go
        self._lost = lost
        self._changed = changed
        self._coming: list[_Coming] = []
        self._shown: list[_Shown] = []
        self._next_look = 0.0
        self._submitted = False
        """Whether there is a job since that goes out with the next turn of the loop."""
        self.table = table.read(fds.table)

    # --- show -------------------------------------------------------------------------------------------------

    def show(self, image: Image, done: Done, old: Image | None = None) -> None:
        """Mount an image; `done` is told how that ended. With `old`, in its place, in one step for whoever looks.

        Raises UnsupportedError for one that the kernel cannot mount.
        """
        check(image)
        for cache in image.caches:
            cache.pinned = True
        self._coming.append(_Coming(image, [done], old))

    def join(self, image: Image, done: Done) -> bool:
        """Whether this image is about to be shown; then `done` is told, too, how that ended."""
        coming = next((coming for coming in self._coming if coming.image is image), None)
        if coming is not None:
            coming.done.append(done)
        return coming is not None

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
        coming.asked = True
        image = coming.image
        if coming.old is not None and self._is_same(coming.old, image):
            self._describe(coming)
            return
        for cache in image.caches:
            if not os.path.exists(str(cache.spec.data_path)):
                why = f"EROFS reads cache files: cache folder {cache.spec.work_dir}: {cache.no_room_why}"
                self._end(coming, MountError(why))
                return
        if not image.caches:
            self._mount(coming, image.metadata.bootstrap, [])
            return
        try:
            file = os.open(str(image.caches[0].spec.work_dir), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as e:
            log.warning("%s: no copy of the metadata can be made: %s", image.source, e.strerror)
            self._mount(coming, image.metadata.bootstrap, None)
            return

        def split(_job: Job, answer: Answer) -> None:
            try:
                if "error" in answer:
                    log.warning("%s: its blobs are watched as a whole: %s", image.source, answer["error"])
                cuts = answer.get("cuts")
                self._mount(coming, image.metadata.bootstrap if cuts is None else f"/proc/self/fd/{file}", cuts)
            finally:
                os.close(file)

        payload: Json = {"image": image.metadata.to_json(), "file": [os.getpid(), file], "least": _LEAST, "most": _MOST}
        self._submitted = True
        self._fetch.submit(Job("split_image", None, Priority.USER, payload, split))

    def _mount(self, coming: _Coming, bootstrap: str, cuts: list[list[int]] | None) -> None:
        if coming not in self._coming:  # the daemon stops
            return
        image = coming.image
        try:
            if image.released:
                raise MountError("it was unmounted meanwhile")
            self._make(image, bootstrap, cuts or [[0]] * len(image.caches), coming.old)
        except NydusError as e:
            self._end(coming, e)
        except OSError as e:
            self._end(coming, MountError(f"{path_of(self._base, image.place)}: {e.filename or ''} {e.strerror}"))
        else:
            log.info("%s is mounted at %s by the kernel", image.source, path_of(self._base, image.place))
            self._end(coming, None)

    def _make(self, image: Image, bootstrap: str, cuts: Sequence[Sequence[int]], old: Image | None) -> None:
        """Raises NydusError, OSError; nothing is mounted then."""
        path = path_of(self._base, image.place)
        place = open_folder(self._base, image.place, self._note_folder)
        try:
            former = -1 if old is None else self._index_of(old)
            beneath = former >= 0 and _is_seen(self._mounted(former))
            index = max((each.index for each in self.table.mounts), default=0) + 1
            files = files_of(image, index, cuts)
            known = Mounted(index, image.place, path, image.metadata.identity, files, table.instances())
            self._write(*self.table.mounts, known)
            points.reach("erofs: written down")
            try:
                mount = make(self.fds.group, bootstrap, ranges_of(image.caches, cuts), path)
                try:
                    device = os.fstat(mount).st_dev
                    known = replace(known.settled(), device=f"{os.major(device)}:{os.minor(device)}")
                    self._note(known)
                    points.reach("erofs: noted")
                    mount_api.attach(mount, place, path, beneath=beneath)
                    points.reach("erofs: mounted")
                finally:
                    os.close(mount)
            except NydusError:
                self._forget(index)
                raise
        except (NydusError, OSError):
            self._remove_folders()
            raise
        finally:
            os.close(place)
        known.set_read_ahead(incomplete=True)
        self._shown.append(_Shown(index, image, self._hold(image)))
        if former >= 0:
            self._hide_index(former, seen=beneath)
        self._changed()

    @staticmethod
    def _hold(image: Image) -> list[BlobCache]:
        """The caches are used by the mount, too, from now on."""
        for cache in image.caches:
            cache.users += 1
        return list(image.caches)

    def _is_same(self, old: Image, new: Image) -> bool:
        """Whether the kernel need not be told of another image: metadata and cache files are the same."""
        files = [[str(cache.spec.data_path) for cache in image.caches] for image in (old, new)]
        return old.metadata.identity == new.metadata.identity and files[0] == files[1] and self._index_of(old) >= 0

    def _describe(self, coming: _Coming) -> None:
        """The image is another, and what is mounted the same: front ends must know how its blobs are called now."""
        assert coming.old is not None
        shown = next(shown for shown in self._shown if shown.image is coming.old)
        mounted = self._mounted(shown.index)
        files = zip(mounted.files, coming.image.caches, strict=True)
        self._note(
            replace(
                mounted,
                files=tuple(replace(f, handle=c.handle, segment=c.spec.segment) for f, c in files),
            )
        )
        former, shown.image, shown.caches = shown.caches, coming.image, self._hold(coming.image)
        for cache in former:
            self._let_go(cache)
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
            self._hide_index(index, seen=_is_seen(self._mounted(index)))

    def _hide_index(self, index: int, *, seen: bool) -> None:
        mounted = self._mounted(index)
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
            self._note(replace(mounted, gone=True))
        else:
            self._drop(shown)
        self._remove_folders()
        self._changed()

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
        if not self.table.alive():
            return True
        self.table = replace(self.table, ended=True)
        self._write(*self.table.mounts)
        return False

    def _look(self) -> None:
        """Forget what was unmounted and is not used any more."""
        for shown in list(self._shown):
            mounted = self._mounted(shown.index)
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
        self._forget(shown.index)
        self._unpin(shown.caches)
        for cache in shown.caches:
            self._let_go(cache)

    def _unpin(self, caches: Sequence[BlobCache]) -> None:
        """Things may be taken out of the files that the kernel reads no more."""
        used = [cache for shown in self._shown for cache in shown.caches]
        used += [cache for coming in self._coming for cache in coming.image.caches]
        # Also by what a former supervisor has unmounted, of which only the files are known.
        paths = {file.data for mounted in self.table.mounts for file in mounted.files}
        for cache in caches:
            cache.pinned = cache in used or str(cache.spec.data_path) in paths

    # --- a takeover -------------------------------------------------------------------------------------------

    def go_on(self, images: Sequence[Image]) -> list[Image]:
        """Take over what a killed supervisor has mounted; gives the images that are to be shown again. Raises MountError."""
        lacking = list(images)
        for mounted in self.table.mounts:
            if mounted.names is None:  # it was killed before it could look
                mounted = mounted.settled()
                device = top_mount(mounted.mountpoint) if mounted.names else None
                mounted = replace(mounted, device=device or "")
                self._note(mounted)
            image = next((image for image in lacking if is_of(mounted, image)), None)
            seen = not mounted.gone and _is_seen(mounted)
            if seen and image is None:
                unmount_erofs(mounted.mountpoint)
            if not seen or image is None:
                if mounted.is_alive():
                    self._note(replace(mounted, gone=True))
                    self._shown.append(_Shown(mounted.index, None))
                else:
                    self._forget(mounted.index)
                continue
            lacking.remove(image)
            self._note(replace(mounted, files=files_of(image, mounted.index, [file.cuts for file in mounted.files])))
            for cache in image.caches:
                cache.pinned = True
            self._shown.append(_Shown(mounted.index, image, self._hold(image)))
            log.warning("%s: the mount of a daemon that was killed is taken over", mounted.mountpoint)
        self._remove_folders()
        return lacking

    # --- the table --------------------------------------------------------------------------------------------

    def _index_of(self, image: Image) -> int:
        return next((shown.index for shown in self._shown if shown.image is image), -1)

    def _mounted(self, index: int) -> Mounted:
        return next(mounted for mounted in self.table.mounts if mounted.index == index)

    def _note(self, mounted: Mounted) -> None:
        self._write(*(mounted if each.index == mounted.index else each for each in self.table.mounts))

    def _forget(self, index: int) -> None:
        self._write(*(each for each in self.table.mounts if each.index != index))

    def _note_folder(self, folder: str) -> None:
        """It is made for a mount: noted first, since one that nobody knows of would stay for ever."""
        self.table = replace(self.table, folders=(*self.table.folders, folder))
        self._write(*self.table.mounts)

    def _remove_folders(self) -> None:
        """Those that were made and nobody needs any more."""
        used = [mounted.mountpoint for mounted in self.table.mounts if not mounted.gone]
        left = remove_unused(self.table.folders, used)
        if len(left) != len(self.table.folders):
            self.table = replace(self.table, folders=left)
            self._write(*self.table.mounts)

    def _write(self, *mounts: Mounted) -> None:
        self.table = Table(mounts, self.table.folders, self.table.ended)
        table.write(self.fds.table, self.table)


def _is_seen(mounted: Mounted) -> bool:
    """Whether it is this file system that is seen at its place."""
    return is_seen(mounted.mountpoint, mounted.device)
