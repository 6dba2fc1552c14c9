"""`nydusd singleton --fscache DIR`: images that the kernel mounts by itself, and whose files in its cache we fill.

Runs in the supervisor, which is the front end here: what the kernel says on /dev/cachefiles are misses only, see
`kernel_files.py`.

What holds after SIGKILL of the supervisor: the guard has the device, so what is cached is read on and other readers wait. The
next daemon on this folder takes the device from the guard, or from systemd's fd store, and has the kernel say again what was
not answered. A stop with images mounted leaves the guard, too. If all are killed and whoever keeps the session (`--supervisor`)
has the device, it comes from there (`take_sent`). If nobody has it, reads of what is not in the page cache fail until the next
mount.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import zmq

from nydusd.config.blob_entry import BlobEntry
from nydusd.errors import CacheError, NydusError, ScarceError
from nydusd.frontends.fscache.device import PATH, BusyError, CacheDevice
from nydusd.frontends.fscache.left import Files, Held, Taken
from nydusd.ipc.inflight import open_row
from nydusd.ipc.messages import Json, SlotRef
from nydusd.storage.api.image import ImageFacts, inspect
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.storage.state.lock import start_time
from nydusd.supervisor import control_ops
from nydusd.supervisor.blobs import BlobError, check_folder
from nydusd.supervisor.children import Child
from nydusd.supervisor.fscache_images import (
    Bound,
    BoundImages,
    Told,
    backend_of,
    domain_of,
    images_in,
    noted,
    patiently,
    place_of,
    read_noted,
    tables_of,
)
from nydusd.supervisor.images import Image
from nydusd.supervisor.kernel_files import KERNEL, KernelFiles
from nydusd.supervisor.kernel_images import check_places
from nydusd.supervisor.runtime import end
from nydusd.supervisor.singleton import Singleton

if TYPE_CHECKING:
    from collections.abc import Callable

    from nydusd.cli.options import SingletonOptions
    from nydusd.forkserver.client import ForkServer
    from nydusd.supervisor.handover import Sent

log = logging.getLogger(__name__)

_RETRY = 0.1
"""Seconds between looks at what waits for something that makes no event."""
_NOTE_AGAIN = 1.0
"""Seconds until what could not be noted is tried again."""


class FscacheDaemon(Singleton):
    """A singleton that serves its images to the kernel."""

    def __init__(self, options: SingletonOptions, entries: list[BlobEntry], fork_server: ForkServer) -> None:
        super().__init__(options, entries, fork_server)
        assert options.fscache is not None
        self._folder = os.path.abspath(options.fscache)
        self._tag, self._writers = options.fscache_tag, options.fscache_threads
        self.front_end = ("EROFS over fscache", "`nydusd singleton --fscache` serves the kernel's cache")
        self._files = Files.beside(self.run_dir)
        self._stored = f"nydusd-fscache-{self._runtime.instance}-"
        """What the name of the device in systemd's store begins with."""
        self._device: CacheDevice | None = None
        self._bound = BoundImages()
        self._recalled: set[str] = set()
        """Texts of images that a predecessor was told of, which may be told once more."""
        self._kernel: KernelFiles | None = None
        """Who answers the kernel, once there are sockets."""
        self._guard = Child("guard", 0, "nydusd.frontends.fscache.guard")
        self._kept = False
        """Whether what there is of the cache is left to the next daemon, mounted or not."""
        self._note_at = math.inf
        """When to note again what could not be noted (`time.monotonic()`)."""
        self._family.own_spec, self._family.started = self._own_spec, self._started

    # --- start ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything up to RUNNING. Raises NydusError."""
        if self.options.upgrade and not self._runtime.is_free():
            self.handover.wait_for_predecessor(self)
        self._begin(rows=1)
        self._table.bound, self._table.dropped, self._table.sharing = self._add, self._drop, self._bound.sharing
        self._table.repeated, self._table.cull = self._repeated, self._cull
        found = self._take_left()
        if found is not None:
            self._device, self._family.inherited = CacheDevice(found.device), True
            log.warning("%s: the cache of a daemon that has ended is taken over", self._folder)
            if self.options.supervisor is not None and not self.handover.waited:
                # We serve, but whoever started us after a crash waits for this, to tell us to take over and to start.
                self._first_state = "INIT"
        else:
            self._begin_cache()
        self._bind()
        self._recall([] if found is None or found.images is None else found.images)
        told = []
        for entry in self._entries:
            check_folder(entry)
            if not self._repeated(entry):
                told.append(Told(entry, inspect(entry.metadata, [self.run_dir])))
        self._bind_told(told)
        if self._device is not None:
            self._serve(self._device, None if found is None else found.guard)
        for role, count in (("fetch", self.config.fetch_worker_count), ("decompress", self._writers)):
            for index in range(count):
                self._family.add(Child(role, index, "workers"))
        self.open_api()
        self._ready(f"{len(self._bound)} images for the kernel's cache in {self._folder}")

    def _take_left(self) -> Taken | None:
        """What a daemon before us has left: its guard has the device, else systemd, or whoever has sent it to us."""
        sent, stored = self.handover.sent, self._store.given(self._stored).get("device")
        if sent is None:
            return self._files.take(stored)
        found = self._files.take(os.dup(sent.fd) if stored is None else stored)
        self.handover.forget()
        return found if found is None or found.images is not None else found._replace(images=images_in(sent.state))

    def _begin_cache(self) -> None:
        try:
            self._device = CacheDevice.begin(self._folder, self._tag)
        except BusyError:
            if self.options.supervisor is None:
                raise
            self._first_state = "INIT"  # who started us has the device, and will tell us to take it
            log.warning("the device is held by another process; waiting to be told to take it over")

    def _serve(self, device: CacheDevice, former: tuple[int, int] | None = None) -> None:
        """From now on this device is ours: a guard for it, and what was not answered once more.

        `former`: the guard that had it, which may answer by now. It ends before anything is said once more: what it took
        would be answered without data, or by nobody.
        """
        try:
            with self.fork_server.waited_for():  # for nobody else may hold the device
                self._family.add(self._guard)
        except NydusError as e:
            if former is not None:
                raise
            log.error("%s; trying again", e)
        if former is not None:
            end(former, self.told)
            self._note()  # as its last act it may have removed what was noted, where nothing was mounted any more
        self._store.hold(self._stored, {"device": device.fd})
        self._poller.register(device.fd, zmq.POLLIN)
        self._sources[device.fd] = self._take_messages
        # Also where no image could be had: who waits for one of these is told so.
        if not device.restore() and self._bound:
            log.warning(
                "this kernel cannot say again what a killed daemon has not answered: such readers wait for a kill"
            )

    def take_sent(self, sent: Sent) -> None:
        """Whoever kept the device for us gives it back. What was noted here of images is newer than what was sent with it."""
        if self._device is not None or self.handover.waiting:
            super().take_sent(sent)
            return
        try:
            images = self._files.images()
            self._recall(images_in(sent.state) if images is None else images)
        except ScarceError:  # who sends it may do so again
            os.close(sent.fd)
            raise
        self._device, self._family.inherited = CacheDevice(sent.fd), True
        self._serve(self._device)

    def session_device(self) -> int:
        return os.stat(PATH).st_rdev

    def session_fd(self) -> int:
        return -1 if self._device is None else self._device.fd

    def session_state(self) -> Json:
        return {"images": [noted(bound) for bound in self._bound.values()]}

    def _recall(self, images: Sequence[Json]) -> None:
        """Know again what a predecessor was told of."""
        present = {bound.entry.text for bound in self._bound.values()}
        found = read_noted(images, self.run_dir)
        if not present <= {told.entry.text for told in found}:  # with these nobody has compared them
            found = [told._replace(adds=None) for told in found]
        self._bind_told([told for told in found if told.entry.text not in present])
        recalled = control_ops.recall(self)
        for bound in self._bound.values():
            recalled(bound.image)

    # --- images -----------------------------------------------------------------------------------------------

    def _bind_told(self, images: Sequence[Told]) -> None:
        """Bind images without asking workers. Raises NydusError for one that cannot be, unless a predecessor was told of it.

        ScarceError for that one, too, if it cannot be now.
        """
        tables, trusted = tables_of(self._bound.values(), images), True
        for told in images:
            self._notifier.alive(time.monotonic())  # one table after the other: so long nobody else is served
            entry, facts, domain = told.entry, told.facts, tables[domain_of(told.entry)]
            try:
                adds = told.adds if trusted else None
                if adds is None:
                    adds = patiently(partial(domain.additions, facts))
                if told.dropped:
                    patiently(partial(self._add, entry, facts, adds))
                    self._bound[place_of(entry)].dropped = True
                else:
                    patiently(partial(self._table.bind, entry, facts, adds))
            except NydusError as e:
                if not told.kept or isinstance(e, ScarceError):
                    raise
                trusted = False  # what the others add may be said without it
                log.warning("an image of the daemon before is lost: %s", e)
                continue
            domain.know(place_of(entry), facts)
            if told.kept and not told.dropped:
                self._recalled.add(entry.text)

    def _repeated(self, entry: BlobEntry) -> bool:
        known = entry.text in self._recalled
        self._recalled.discard(entry.text)
        return known

    def _add(self, entry: BlobEntry, facts: ImageFacts, adds: Collection[str] = ()) -> None:
        """An image is bound."""
        place = place_of(entry)
        present = self._bound.get(place)
        if present is not None and not present.dropped:
            raise BlobError(f"{place}: an image of this name is bound in this domain")
        if present is not None:
            self._forget(place)
        kind = backend_of(entry)
        for other in self._bound.values():
            if other.domain == domain_of(entry) and backend_of(other.entry) != kind:
                raise BlobError(
                    f"{place}: its blobs are in a backend of type {kind}, those of {place_of(other.entry)} in one of type"
                    f" {backend_of(other.entry)}: give it a domain of its own"
                )
        if any(cache.is_tarfs for cache in facts.blobs):
            raise BlobError(f"{entry.metadata}: fscache has blocks of 4096 bytes, this image those of a tar")
        if facts.version == 6:
            check_places(facts)
        image = Image(place, entry.metadata, entry.config, facts, self.factory, domain=domain_of(entry))
        image.use(entry.config)  # blobs that others share get the newest credentials
        self.mounts.bind(image)
        self._bound[place] = Bound(entry, facts, image, adds=set(adds))
        for cache in image.caches:
            self._bound.tell_tables(cache, anew=present is not None)
            if cache.spec.info.blob_id in adds and self._kernel is not None:
                self._kernel.renew(cache)
        self._note()

    def _drop(self, entry: BlobEntry) -> None:
        """An image is bound no more. While it is mounted it is served on."""
        bound = self._bound[place_of(entry)]
        if bound.is_mounted:
            bound.dropped = True
            self._note()
        else:
            self._forget(place_of(entry))

    def _forget(self, place: str) -> None:
        gone = self._bound.pop(place)
        self.mounts.unbind(place)
        for cache in gone.image.caches:
            self._bound.tell_tables(cache, anew=True)
        self._note()

    def _cull(self, name: str, done: Callable[[NydusError | None], None]) -> None:
        """Have the kernel remove what it keeps under a name."""
        if self._device is None:
            done(None)
            return

        def culled(_job: Job, answer: Answer) -> None:
            if "error" in answer:
                done(BlobError(answer["error"]))
            elif answer["busy"]:
                done(BlobError(f"{name}: the kernel uses it still"))
            else:
                done(None)

        payload = {"folder": self._folder, "name": name, "device": [self.pid, self._device.fd]}
        self.engine.fetch.submit(Job("cull", None, Priority.USER, payload, culled))

    # --- what a successor needs -------------------------------------------------------------------------------

    def _note(self) -> None:
        """Write down what the guard and a successor need; a full disk costs that, no more, and is tried again.

        Not before our guard is there: until then the record names the former one, which ends when it is named no more.
        """
        if not self._guard.pid or self._device is None:
            self._note_at = math.inf  # it is done when the guard is there
            return
        names = [bound.name for bound in self._bound.values()]
        held = Held((self._guard.pid, start_time(self._guard.pid)), self._device.fd, self._bound.sizes(), names)
        try:
            self._files.write(held, [noted(bound) for bound in self._bound.values()])
        except CacheError as e:
            if self._note_at == math.inf:
                log.warning("%s; until it can be written, a successor will not know the images", e)
            self._note_at = time.monotonic() + _NOTE_AGAIN
        else:
            self._note_at = math.inf

    def _own_spec(self, child: Child) -> tuple[list[int], Json] | None:
        if child is not self._guard or self._device is None:
            return None
        spec: Json = {"device": self._device.fd, "folder": self.run_dir, "supervisor": self.pid}
        return [self._device.fd], spec | {"patience": self.config.nydusd.read_deadline}

    def _started(self, child: Child) -> None:
        if child is self._guard:
            self._note()

    # --- files ------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        super()._bind()
        self._kernel = KernelFiles(
            self.engine.router,
            self.mounts,
            self.prefetch,
            self.engine.fetch,
            self.engine.decompress,
            self._bound.find,
            self._prune,
            self.config.nydusd.read_deadline,
            open_row(self.mounts.memory.board_name, 0),
        )

    def _take_messages(self) -> None:
        assert self._device is not None
        assert self._kernel is not None
        self._kernel.take_messages(self._device)

    def _prune(self) -> None:
        """Forget images that were dropped and are not mounted any more."""
        for place, bound in list(self._bound.items()):
            if bound.dropped and not bound.is_mounted:
                self._forget(place)

    def _reply(self, client: bytes, number: int, errno: int, slot: SlotRef | None) -> None:
        if client == KERNEL and self._kernel is not None:
            self._kernel.reply(number, errno, slot)
        else:
            super()._reply(client, number, errno, slot)

    def _turn(self, timeout: float) -> None:
        super()._turn(timeout)
        if self._kernel is not None:
            self._kernel.turn()
        if time.monotonic() >= self._note_at:
            self._note()

    def _timeout(self) -> float:
        waits = self._kernel is not None and self._kernel.waits
        sooner = min(super()._timeout(), max(0.0, self._note_at - time.monotonic()))
        return min(sooner, _RETRY) if waits else sooner

    # --- stop -------------------------------------------------------------------------------------------------

    def fail(self) -> None:
        """Nothing is removed of what the next daemon needs, and the guard, ours or a former one's, goes on."""
        self._kept = self._family.inherited or self.state != "INIT"

    def stop(self) -> None:
        """Images that are mounted are left to the guard, for the next daemon."""
        mounted = any(bound.is_mounted for bound in self._bound.values())
        used = self._device is not None and (self._kept or mounted or self.ending.leaves_all)
        if used:
            log.warning(
                "the guard keeps the cache for the next daemon%s", "; images are mounted still" if mounted else ""
            )
            self.children[:] = [child for child in self.children if child is not self._guard]
        super().stop()
        if self._device is not None:
            self._device.close()
            if not used:
                self._store.drop()
                self._files.remove()

    def _workers_have_ended(self) -> None:
        """No descriptor of the kernel's files may be left when the next daemon has it say once more what nobody answered."""
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None
