"""Mounting, remounting and unmounting images in a running daemon: all images of the session, and what is done for each.

Runs in the supervisor. What reads a disk or parses an image is a job of a fetch worker, so the answer comes later, by a
callback; between a question and its answer the mount point is taken. Blobs that no image uses any more go when their last
job is done and their chunk map is stored.

After SIGKILL in the middle of a mount there is either no image, or a whole one: the table is published last.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nydusd import points
from nydusd.errors import CacheError, NydusError, ScarceError
from nydusd.ipc.messages import Json
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.api.image import ImageFacts, inspect, make_folder
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.storage.state.names import remove
from nydusd.supervisor.image_memory import ImageMemory
from nydusd.supervisor.images import Image, metadata_folders
from nydusd.supervisor.mount_records import Recorded, record_of
from nydusd.supervisor.mount_request import Done, Request, WorkFailedError
from nydusd.supervisor.mount_table import MountTable, PlaceError, parse_place
from nydusd.supervisor.planner import plan_prefetch
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.router import Router
from nydusd.supervisor.strays import remove_strays
from nydusd.supervisor.unused import Unused

if TYPE_CHECKING:
    from nydusd.supervisor.kernel_mounts import KernelMounts

log = logging.getLogger(__name__)


class Mounts:
    """The images of a session. `prefix` begins the names of shared memory, `first` is the first number in such names.

    `changed(place)` is called after each change of the table. `place` is where the kernel may have another memory of what
    is there now, None if that cannot be. `table` is that of a supervisor that was killed: `Restore` knows its images again.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        factory: BlobFactory,
        prefetch: PrefetchWorker,
        changed: Callable[[str | None], None],
        rows: int,
        first: int = 1,
        table: MountTable | None = None,
    ) -> None:
        self.table = table or MountTable(folder / "mounts", f"{prefix}mounts")
        self.rows = rows
        """Front ends: each has a row in the shared memory in which they count."""
        self.memory = ImageMemory(folder, prefix, rows, first, anew=table is None)
        self._prefix = prefix
        self.images: dict[str, Image] = {}
        self.coming: dict[str, Recorded] = {}
        """What a supervisor that was killed had mounted, and is not among the images yet (`restore.py`)."""
        self._folder = folder
        self._factory = factory
        self._prefetch = prefetch
        self._changed = changed
        self.kernel: KernelMounts | None = None
        """Who shows the images, if no front end of ours does: an image is mounted when the kernel has it."""
        self._under_way: set[str] = set()
        self.unused = Unused(factory, prefetch)
        """Blobs that no image uses any more."""

    def start(self, fetch: WorkerPool, router: Router) -> None:
        """Give what is needed once the daemon has workers."""
        self._fetch = fetch
        self._router = router

    def mount_first(self, request: Request) -> Image:
        """Mount the image of the command line, before there are workers. Raises NydusError."""
        folders = metadata_folders(request.config, str(self._folder))
        for folder in folders[:-1]:
            make_folder(folder)
        return self._add(request, inspect(request.source, folders))

    def know(self, recorded: Recorded) -> Image | None:
        """Know an image again that a supervisor that was killed had mounted; one that cannot be had is unmounted: None.

        Raises NydusError when it is the image of the command line; ScarceError when too little is left for it now.
        """
        try:
            image = recorded.image(self._factory, self.rows)
            if image.given:
                image.use(image.config)
        except ScarceError:
            raise  # nothing is wrong with it
        except NydusError as e:
            if recorded.given:
                raise
            del self.coming[recorded.place]
            self._lose(recorded.place, e)
            return None
        del self.coming[recorded.place]
        self.images[recorded.place] = image
        log.info("%s is still mounted at %s", image.source, image.place)
        return image

    def _lose(self, place: str, why: NydusError) -> None:
        """An image that the table names cannot be had."""
        log.error("the image at %s cannot be taken over: %s; it is unmounted", place, why)
        names = parse_place(place)[1]
        try:
            self.table.lose(names)
        except (CacheError, OSError) as e:  # readers get EIO instead of ESTALE, until the table can be written
            log.error("%s", e)
        self._changed(self._stale(place, names))

    def remove_strays(self, kept: Collection[str]) -> None:
        """Remove what no image has, once all are known again, and is none of the segments that are `kept`."""
        segments = {cache.spec.segment for cache in self._factory.blobs()}.union(kept)
        remove_strays(self._prefix, self._folder, self.images.values(), segments)

    def serve(self, image: Image, files: Sequence[bytes] | None) -> None:
        """Have the blobs of an image opened, and fetch ahead what is to be fetched ahead."""
        for cache in image.caches:
            self._router.open_blob(cache)
        plan_prefetch(image, files, self._prefetch, self._fetch)

    # --- mount ------------------------------------------------------------------------------------------------

    def mount(self, request: Request, done: Done) -> None:
        """Mount an image. The same image at the same place once more is no error: whoever lost an answer may repeat."""
        present = self.images.get(request.place)
        if present is not None:
            same = (present.source, present.config) == (request.source, request.config)
            if same and self.kernel is not None and self.kernel.join(present, done):
                return
            if self.kernel is not None and request.place in self._under_way:
                raise PlaceError("another mount or remount of it is under way")
            if same:
                if self.kernel is None or self.kernel.shows(present):
                    done(None)
                else:  # it was to be removed from the table, which could not be written
                    for cache in present.caches:
                        self._router.open_blob(cache)
                    self.show_again(present, done)
                return

        def inspected(facts: ImageFacts) -> None:
            inside = self.table.under(request.names)
            if inside is None:
                self._mount(request, facts, done)
                return
            index, depth = inside
            outer = next(image for image in self.images.values() if image.index == index)
            self._check_settled(outer)
            self._under_way.add(request.place)

            def found(answer: Answer) -> None:
                if not answer["found"]:
                    raise PlaceError(f"the image at {outer.place} has no such folder to mount upon")
                if outer.released:
                    raise PlaceError(f"the image at {outer.place} was unmounted meanwhile")
                self._check_settled(outer)
                self._mount(request, facts, done)

            path = [name.hex() for name in request.names[depth:]]
            job: Json = {"image": outer.metadata.to_json(), "path": path}
            self._ask("find_folder", request.place, job, found, done)

        self._inspect(request, inspected, done)

    def _check_settled(self, outer: Image) -> None:
        """Raises PlaceError for an image to mount upon that the kernel does not have yet, or is to have another for."""
        if self.kernel is not None and outer.place in self._under_way:
            raise PlaceError(f"a mount or remount of the image at {outer.place} is under way")

    def show_again(self, image: Image, done: Done) -> None:
        """Have the kernel show an image that is known: that of the command line, or what a supervisor that was killed knew."""
        assert self.kernel is not None
        self._under_way.add(image.place)

        def shown(error: NydusError | None) -> None:
            self._under_way.discard(image.place)
            done(error)

        try:
            self.kernel.show(image, shown)
        except NydusError as e:
            shown(e)

    def _mount(self, request: Request, facts: ImageFacts, done: Done) -> None:
        image = self._add(request, facts)

        def shown(error: NydusError | None) -> None:
            self._under_way.discard(image.place)
            if error is None:
                log.info("%s is mounted at %s", image.source, image.place)
            elif not image.released:
                try:
                    self._remove(image, request.names)
                except NydusError as e:  # it is mounted nowhere: to be unmounted, or mounted again
                    log.error("the image at %s stays in the table: %s", image.place, e)
            done(error)

        if self.kernel is None:
            self.serve(image, request.files)
            shown(None)
            return
        self._under_way.add(image.place)
        try:
            self.kernel.show(image, shown)
        except NydusError as e:
            shown(e)
            return
        self.serve(image, request.files)

    def _add(self, request: Request, facts: ImageFacts) -> Image:
        self.table.check_free(request.names)
        image = Image(request.place, request.source, request.config, facts, self._factory)
        try:
            self.memory.give(image)
            points.reach("mounts: counters made")
            image.index = self.table.add(request.names, image.spec(), record_of(image, request))
        except NydusError:
            self._release(image)
            raise
        self.images[image.place] = image
        points.reach("mounts: image added")
        self._changed(image.place if self.table.under(request.names) else None)
        return image

    def bind(self, image: Image) -> None:
        """Know an image that the kernel mounts by itself. Raises NydusError, and then it is not known."""
        try:
            self.memory.give(image)
        except NydusError:
            self._release(image)
            raise
        self.images[image.place] = image
        self._changed(None)

    def unbind(self, place: str) -> None:
        """The kernel is not given this image any more; blobs of it that are open stay until they are closed."""
        self._release(self.images.pop(place))

    def forget_segments(self, segments: Collection[str]) -> None:
        """Remove those that no blob of ours has: a former supervisor's, of what was used still and is not any more."""
        known = {cache.spec.segment for cache in self._factory.blobs()}
        for name in segments:
            if name not in known:
                remove(name)

    # --- remount ----------------------------------------------------------------------------------------------

    def remount(self, request: Request, done: Done) -> None:
        """Take another source and configuration for a mounted image.

        If the metadata is the same, open files go on with it; else they are of an image that is gone.
        """

        def discard(new: Image) -> None:
            new.counters = new.files = None  # the old one's
            self._release(new)

        def inspected(facts: ImageFacts) -> None:
            old = self._mounted(request.place)
            if facts.identity != old.metadata.identity:
                self.table.check_unused(request.names)
            new = Image(request.place, request.source, request.config, facts, self._factory)
            try:
                self.memory.pass_on(old, new)
            except CacheError:
                discard(new)
                raise

            def shown(error: NydusError | None) -> None:
                self._under_way.discard(request.place)
                try:
                    if error is not None:
                        raise error
                    self._replace(request, old, new)
                except NydusError as e:
                    if self.images.get(request.place) is not new:
                        discard(new)
                    done(e)
                else:
                    done(None)

            if self.kernel is None:
                shown(None)
                return
            self._under_way.add(request.place)
            try:
                self.kernel.show(new, shown, old)
            except NydusError as e:
                shown(e)
                return
            self.serve(new, request.files)

        self._mounted(request.place)
        self._inspect(request, inspected, done)

    def _replace(self, request: Request, old: Image, new: Image) -> None:
        """Have the new image in the place of the old one. Raises CacheError when the table cannot be written.

        Then the old one is there. But what the kernel shows is the new one already, and so that is there, and shown until
        the next supervisor shows again what the table says: whoever is told of the error may ask once more.
        """
        same = new.metadata.identity == old.metadata.identity
        failure = None
        try:
            new.index = self.table.replace(request.names, new.spec(), record_of(new, request), same=same)
        except CacheError as e:
            if self.kernel is None:
                raise
            new.index, failure = old.index, e
        old.counters = old.files = None
        self._release(old)
        self.images[new.place] = new
        self._changed(self._stale(new.place, request.names))
        if self.kernel is None:
            self.serve(new, request.files)
        log.info("%s is remounted at %s", new.source, new.place)
        if failure is not None:
            raise failure

    # --- umount -----------------------------------------------------------------------------------------------

    def umount(self, place: str) -> None:
        """Unmount an image. Raises PlaceError when there is none, or when others are mounted inside it."""
        place, names = parse_place(place)
        image = self._mounted(place)
        if self.kernel is not None:
            if place in self._under_way:
                raise PlaceError("another mount or remount of it is under way")
            self.table.check_unused(names)
            self.kernel.hide(image)
        self._remove(image, names)
        log.info("%s is unmounted from %s", image.source, place)

    def _remove(self, image: Image, names: Sequence[bytes]) -> None:
        """Raises PlaceError when others are mounted inside it, CacheError when the table cannot be written."""
        self.table.remove(names)
        points.reach("mounts: image removed")
        del self.images[image.place]
        self._release(image)
        points.reach("mounts: image released")
        self._changed(self._stale(image.place, names))

    def _stale(self, place: str, names: Sequence[bytes]) -> str | None:
        """The place, if the kernel keeps what it knows of it: the root, or a folder of an image."""
        return place if not names or self.table.under(names) else None

    def _mounted(self, place: str) -> Image:
        if place not in self.images:
            raise PlaceError("object or filesystem doesn't exist")
        return self.images[place]

    def _release(self, image: Image) -> None:
        image.release()
        self.memory.take(image)
        for cache in image.caches:
            self.unused.look_at(cache)

    # --- jobs -------------------------------------------------------------------------------------------------

    def _inspect(self, request: Request, then: Callable[[ImageFacts], None], done: Done) -> None:
        payload: Json = {
            "source": os.path.abspath(request.source),
            "folders": metadata_folders(request.config, str(self._folder)),
        }
        self._ask("inspect", request.place, payload, lambda answer: then(ImageFacts.from_json(answer["image"])), done)

    def _ask(self, kind: str, place: str, payload: Json, then: Callable[[Answer], None], done: Done) -> None:
        """Have a worker do something for a mount at `place`, which is taken until then."""
        if kind == "inspect" and place in self._under_way:
            raise PlaceError("another mount or remount of it is under way")
        self._under_way.add(place)

        def ended(_job: Job, answer: Answer) -> None:
            self._under_way.discard(place)
            try:
                if "error" in answer:
                    raise WorkFailedError(answer["error"])
                then(answer)
            except NydusError as e:
                done(e)

        self._fetch.submit(Job(kind, None, Priority.USER, payload, ended))

    def close(self) -> None:
        self.table.close()
