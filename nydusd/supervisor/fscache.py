"""`nydusd singleton --fscache DIR`: images that the kernel mounts by itself, and whose files in its cache we fill.

Runs in the supervisor, which is the front end here: what the kernel says on /dev/cachefiles are misses only. OPEN is answered
at once, READ becomes a request to the router like any other, and is answered when the workers have written what is missing
into the kernel's file. They borrow its descriptor for each job, so it is closed only when no job of it is under way.

What holds after SIGKILL of the supervisor: the guard has the device, so what is cached is read on and other readers wait. The
next daemon on this folder takes the device from the guard, or from systemd's fd store, and has the kernel say again what was
not answered. A stop with images mounted leaves the guard, too. If nobody has it, reads of what is not in the page cache fail
until the next mount.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import zmq

from nydusd.config.blob_entry import BlobEntry, parse_blob_entry
from nydusd.errors import CacheError, FormatError, NydusError, StaleCacheError
from nydusd.frontends.fscache import messages
from nydusd.frontends.fscache.device import PATH, BusyError, CacheDevice, completed, lacks
from nydusd.frontends.fscache.left import Files, Held
from nydusd.frontends.fuse.complaints import Complaints
from nydusd.ipc.messages import LOST, Json, SlotRef
from nydusd.storage.api.image import ImageFacts, inspect
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.storage.state.lock import start_time
from nydusd.storage.state.range_map import RangeMap
from nydusd.supervisor.blobs import BlobError, check_folder
from nydusd.supervisor.children import Child
from nydusd.supervisor.images import Image
from nydusd.supervisor.runtime import end
from nydusd.supervisor.singleton import Singleton

if TYPE_CHECKING:
    from collections.abc import Callable

    from nydusd.cli.options import SingletonOptions
    from nydusd.forkserver.client import ForkServer
    from nydusd.supervisor.handover import Sent

log = logging.getLogger(__name__)

KERNEL = b"kernel"
"""The name of the kernel among those who ask the router."""
_MESSAGES = 64
"""Messages taken from the device before others get their turn."""
_COPY = 1 << 20
"""Bytes of a metadata file that are copied at once."""
_RETRY = 0.1
"""Seconds between tries to open a blob that readers wait for."""
_NOT_FOUND, _EIO = -2, -5


@dataclass(eq=False, slots=True)
class Object:
    """A file of the kernel's cache, open: of a blob, or of the metadata file `source`. `jobs`: copies under way."""

    fd: int
    size: int
    cache: BlobCache | None
    source: str
    jobs: int = 0


@dataclass(eq=False, slots=True)
class Reader:
    """The kernel waits for a range of a blob."""

    read: messages.Read
    object: Object
    cache: BlobCache
    until: float
    again: bool = False


@dataclass(eq=False, slots=True)
class Bound:
    """An image: its entry, and its file system's name in the kernel. `dropped`: still mounted, and gone for the API."""

    entry: BlobEntry
    facts: ImageFacts
    image: Image
    dropped: bool = field(default=False)

    @property
    def domain(self) -> str:
        return domain_of(self.entry)

    @property
    def is_mounted(self) -> bool:
        return os.path.isdir(f"/sys/fs/erofs/{self.name}")

    @property
    def name(self) -> str:
        """What the kernel calls it under /sys/fs/erofs."""
        return self.entry.id if self.domain == self.entry.id else f"{self.domain},{self.entry.id}"


def domain_of(entry: BlobEntry) -> str:
    """An image that is mounted without a domain has one of its own."""
    return entry.domain_id or entry.id


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
        self._bound: dict[str, Bound] = {}
        """By place."""
        self._recalled: set[str] = set()
        """Texts of images that a predecessor was told of, which may be told once more."""
        self._objects: dict[int, Object] = {}
        self._closing: list[Object] = []
        self._readers: dict[int, Reader] = {}
        self._unopened: dict[int, Reader] = {}
        self._opened_at = 0.0
        self._complaints = Complaints("fscache")
        self._guard = Child("guard", 0, "nydusd.frontends.fscache.guard")
        self._family.own_spec, self._family.started = self._own_spec, self._started

    # --- start ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything up to RUNNING. Raises NydusError."""
        self._begin(rows=1)
        self._table.bound, self._table.dropped = self._add, self._drop
        self._table.repeated, self._table.cull = self._repeated, self._cull
        found = self._files.take(self._store.given(self._stored).get("device"))
        if found is not None:
            self._device = CacheDevice(found[0])
            log.warning("%s: the cache of a daemon that has ended is taken over", self._folder)
        else:
            self._begin_cache()
        self._bind()
        self._recall([] if found is None else found[2])
        for entry in self._entries:
            check_folder(entry)
            if not self._repeated(entry):
                self._table.bind(entry, inspect(entry.metadata, [self.run_dir]))
        if self._device is not None:
            self._serve(self._device)
        if found is not None and found[1] is not None:
            end(found[1])
        for role, count in (("fetch", self.config.fetch_worker_count), ("decompress", self._writers)):
            for index in range(count):
                self._family.add(Child(role, index, "workers"))
        self._open_api()
        self._ready(f"{len(self._bound)} images for the kernel's cache in {self._folder}")

    def _begin_cache(self) -> None:
        try:
            self._device = CacheDevice.begin(self._folder, self._tag)
        except BusyError:
            if self.options.supervisor is None:
                raise
            self._first_state = "INIT"  # who started us has the device, and will tell us to take it
            log.warning("the device is held by another process; waiting to be told to take it over")

    def _serve(self, device: CacheDevice) -> None:
        """From now on this device is ours: a guard for it, and what was not answered once more."""
        self._family.add(self._guard)
        self._store.hold(self._stored, {"device": device.fd})
        self._poller.register(device.fd, zmq.POLLIN)
        self._sources[device.fd] = self._take_messages
        if self._bound and not device.restore():
            log.warning(
                "this kernel cannot say again what a killed daemon has not answered: such readers wait for a kill"
            )

    def take_sent(self, sent: Sent) -> None:
        """Whoever kept the device for us gives it back."""
        if self._device is not None:
            super().take_sent(sent)
            return
        os.set_blocking(sent.fd, False)
        self._device = CacheDevice(sent.fd)
        self._recall(list(sent.state.get("images", ())))
        self._serve(self._device)

    def session_device(self) -> int:
        return os.stat(PATH).st_rdev

    def session_fd(self) -> int:
        return -1 if self._device is None else self._device.fd

    def session_state(self) -> Json:
        return {"images": self._noted_images()}

    def _recall(self, images: list[Json]) -> None:
        """Know again what a predecessor was told of. An image that is not there any more is left out."""
        from nydusd.config import secret_values
        from nydusd.logs import register_secret

        for raw in images:
            try:
                entry = parse_blob_entry(raw["entry"], "kept blob entry")
                for secret in secret_values(entry.config):
                    register_secret(secret)
                facts = inspect(entry.metadata, [self.run_dir])
                if raw.get("dropped"):
                    self._add(entry, facts)
                    self._bound[_place(entry)].dropped = True
                else:
                    self._table.bind(entry, facts)
                    self._recalled.add(entry.text)
            except (NydusError, KeyError, TypeError) as e:
                log.warning("an image of the daemon before is lost: %s", e)

    # --- images -----------------------------------------------------------------------------------------------

    def _repeated(self, entry: BlobEntry) -> bool:
        known = entry.text in self._recalled
        self._recalled.discard(entry.text)
        return known

    def _add(self, entry: BlobEntry, facts: ImageFacts) -> None:
        """An image is bound."""
        place = _place(entry)
        present = self._bound.get(place)
        if present is not None and not present.dropped:
            raise BlobError(f"{place}: an image of this name is bound in this domain")
        if present is not None:
            self._forget(place)
        if any(cache.is_tarfs for cache in facts.blobs):
            raise BlobError(f"{entry.metadata}: fscache has blocks of 4096 bytes, this image those of a tar")
        image = Image(place, entry.metadata, entry.config, facts, self.factory, domain=domain_of(entry))
        image.use(entry.config)  # blobs that others share get the newest credentials
        self.mounts.bind(image)
        self._bound[place] = Bound(entry, facts, image)
        self._note()

    def _drop(self, entry: BlobEntry) -> None:
        """An image is bound no more. While it is mounted it is served on."""
        bound = self._bound[_place(entry)]
        if bound.is_mounted:
            bound.dropped = True
            self._note()
        else:
            self._forget(_place(entry))

    def _forget(self, place: str) -> None:
        del self._bound[place]
        self.mounts.unbind(place)
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
        self.fetch.submit(Job("cull", None, Priority.USER, payload, culled))

    # --- what a successor needs -------------------------------------------------------------------------------

    def _noted_images(self) -> list[Json]:
        return [{"entry": json.loads(bound.entry.text), "dropped": bound.dropped} for bound in self._bound.values()]

    def _note(self) -> None:
        """Write down what the guard and a successor need; a full disk costs that, no more."""
        if self._guard.pid is None or self._device is None:
            return
        sizes = {}
        for bound in self._bound.values():
            sizes[f"{bound.domain}/{bound.entry.id}"] = bound.facts.size
            for blob in bound.facts.blobs:
                sizes.setdefault(f"{bound.domain}/{blob.blob_id}", blob.uncompressed_size)
        names = [bound.name for bound in self._bound.values()]
        held = Held((self._guard.pid, start_time(self._guard.pid)), self._device.fd, sizes, names)
        try:
            self._files.write(held, self._noted_images())
        except CacheError as e:
            log.warning("%s; a successor will not know the images", e)

    def _own_spec(self, child: Child) -> tuple[list[int], Json] | None:
        if child is not self._guard or self._device is None:
            return None
        spec: Json = {"device": self._device.fd, "folder": self.run_dir, "supervisor": self.pid}
        return [self._device.fd], spec | {"patience": self.config.nydusd.read_deadline}

    def _started(self, child: Child) -> None:
        if child is self._guard:
            self._note()

    # --- messages ---------------------------------------------------------------------------------------------

    def _take_messages(self) -> None:
        assert self._device is not None
        for _ in range(_MESSAGES):
            try:
                raw = self._device.read()
            except OSError as e:
                self._complaints.log("the kernel's next message cannot be read: %s", e.strerror)
                return
            if not raw:
                return
            try:
                message = messages.parse(raw)
            except FormatError as e:
                self._complaints.log("%s", e)
                if (refused := messages.refused(raw)) is not None:
                    self._device.opened(refused[0], _EIO)
                    os.close(refused[1])
                continue
            if isinstance(message, messages.Open):
                self._open(self._device, message)
            elif isinstance(message, messages.Close):
                self._close(message.object_id)
            else:
                self._read(message)

    def _open(self, device: CacheDevice, message: messages.Open) -> None:
        """The kernel wants a file: say how long it is."""
        fd = message.fd
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        made = self._find(message.domain, message.key, fd)
        if made is None:
            self._complaints.log("the kernel asks for %s in %s, which is not bound", message.key, message.domain)
            device.opened(message.number, _NOT_FOUND)
            os.close(fd)
            return
        if not device.opened(message.number, made.size):
            os.close(fd)
            return
        self._objects[message.object_id] = made
        cache = made.cache
        if cache is not None:
            cache.users += 1
            self._restart(cache, fd)

    def _find(self, domain: str, key: str, fd: int) -> Object | None:
        for bound in self._bound.values():
            if bound.domain != domain:
                continue
            if bound.entry.id == key:
                return Object(fd, bound.facts.size, None, bound.facts.bootstrap)
            for cache in bound.image.caches:
                if cache.spec.info.blob_id == key:
                    return Object(fd, cache.spec.info.uncompressed_size, cache, "")
        return None

    def _restart(self, cache: BlobCache, fd: int) -> None:
        """A blob's file is this one now: see what it has, and fetch ahead if that is wanted."""
        self.router.forget(cache)
        cache.give((self.pid, fd))
        self.router.open_blob(cache)
        if any(cache in bound.image.caches and _prefetches(bound.entry) for bound in self._bound.values()):
            self.prefetch.cancel(cache)
            self.prefetch.want(cache, 0, -1)

    def _close(self, object_id: int) -> None:
        """The kernel needs a file no more. Its descriptor is closed when no worker has borrowed it."""
        closed = self._objects.pop(object_id, None)
        if closed is None:
            return
        for number, reader in list(self._readers.items()):
            if reader.object is closed:
                self._end(number)
        self._closing.append(closed)
        cache = closed.cache
        if cache is not None and cache.spec.cookie == (self.pid, closed.fd):
            self.prefetch.cancel(cache)
            self.router.forget(cache)
        for place, bound in list(self._bound.items()):
            if bound.dropped and not bound.is_mounted:
                self._forget(place)

    def _end(self, number: int) -> None:
        """Nobody waits for this any more."""
        self._unopened.pop(number, None)
        if self._readers.pop(number, None) is not None:
            self.router.cancel(KERNEL, number)

    def _read(self, read: messages.Read) -> None:
        wanted = self._objects.get(read.object_id)
        if wanted is None:
            self._complaints.log("the kernel reads a file that was never opened (%d)", read.object_id)
        elif wanted.cache is None:
            self._copy(wanted, read)
        else:
            until = time.monotonic() + self.config.nydusd.read_deadline
            reader = Reader(read, wanted, wanted.cache, until)
            self._readers[read.number] = self._unopened[read.number] = reader
            self._try_opened()

    def _copy(self, wanted: Object, read: messages.Read) -> None:
        """A part of a metadata file is read: a worker copies it."""

        def copied(_job: Job, answer: Answer) -> None:
            wanted.jobs -= 1
            if "error" in answer:
                self._complaints.log("a read failed: %s", answer["error"])
            completed(wanted.fd, read.number)

        start = read.offset // _COPY * _COPY
        length = -(-(read.offset + read.length) // _COPY) * _COPY - start
        payload = {"path": wanted.source, "size": wanted.size, "offset": start, "length": length}
        wanted.jobs += 1
        job = Job("copy_bootstrap", None, Priority.USER, payload | {"cookie": [self.pid, wanted.fd]}, copied)
        self.fetch.submit(job)

    # --- readers ----------------------------------------------------------------------------------------------

    def _turn(self, timeout: float) -> None:
        super()._turn(timeout)
        if self._unopened:
            self._try_opened()
        if self._closing:
            self._close_idle()

    def _timeout(self) -> float:
        return min(super()._timeout(), _RETRY) if self._unopened or self._closing else super()._timeout()

    def _close_idle(self) -> None:
        for closed in list(self._closing):
            cache = closed.cache
            if closed.jobs or (cache is not None and (self.fetch.has(cache) or self.decompress.has(cache))):
                continue
            self._closing.remove(closed)
            os.close(closed.fd)
            if cache is not None:
                self.mounts.let_go(cache)

    def _try_opened(self) -> None:
        """Ask for what readers wait for whose blobs are open now; have the others opened."""
        for number, reader in list(self._unopened.items()):
            cache = reader.cache
            if cache.state == "ready":
                del self._unopened[number]
                self._ask(reader)
            elif cache.state == "failed" and (not cache.unreachable or time.monotonic() >= reader.until):
                self._finish(reader, f"blob {cache.spec.info.blob_id} cannot be opened: {cache.reason}")
            else:
                self.router.open_blob(cache)

    def _ask(self, reader: Reader, flags: int = 0) -> None:
        read, cache = reader.read, reader.cache
        assert cache.segment is not None
        try:
            if not flags and not self._lacks(reader):
                self._finish(reader)
                return
            limit = -(-cache.segment.identity.size // 4096) * 4096
            length = min(read.length, limit - read.offset)
            first, count = RangeMap(cache.segment).chunks_of(read.offset, length)
        except CacheError as e:
            self._finish(reader, str(e))
            return
        self.router.request(KERNEL, read.number, cache.handle, first, max(count, 1), flags)

    def _reply(self, client: bytes, number: int, errno: int, slot: SlotRef | None) -> None:
        if client != KERNEL:
            super()._reply(client, number, errno, slot)
            return
        if slot is not None:
            self.router.release(slot.lease)
        reader = self._readers.get(number)
        if reader is None:
            return
        try:
            if errno:
                self._finish(reader, os.strerror(errno))
            elif slot is not None:
                self._finish(reader, "the kernel's cache has no room for it")
            elif not self._lacks(reader):
                self._finish(reader)
            elif reader.again:
                self._finish(reader, "what was written into the kernel's cache is not there")
            else:
                reader.again = True
                self._ask(reader, LOST)
        except CacheError as e:
            self._finish(reader, str(e))

    def _lacks(self, reader: Reader) -> bool:
        """Whether something of a range is not in the kernel's file."""
        end = min(reader.read.offset + reader.read.length, -(-reader.object.size // 4096) * 4096)
        try:
            return lacks(reader.object.fd, reader.read.offset, end)
        except OSError as e:
            raise StaleCacheError(f"the kernel's cache file: {e.strerror}", e.errno) from e

    def _finish(self, reader: Reader, why: str = "") -> None:
        """Answer the kernel. Where something is missing it looks itself, and fails the read with EIO."""
        self._unopened.pop(reader.read.number, None)
        self._readers.pop(reader.read.number, None)
        if why:
            self._complaints.log("a read failed: blob %s: %s", reader.cache.spec.info.blob_id, why)
        completed(reader.object.fd, reader.read.number)

    # --- stop -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Images that are mounted are left to the guard, for the next daemon."""
        used = self._device is not None and any(bound.is_mounted for bound in self._bound.values())
        if used:
            log.warning("images are mounted still; the guard keeps the cache for the next daemon")
            self.children[:] = [child for child in self.children if child is not self._guard]
        super().stop()
        for each in (*self._objects.values(), *self._closing):
            os.close(each.fd)
        if self._device is not None:
            self._device.close()
            if not used:
                self._store.drop()
                self._files.remove()


def _place(entry: BlobEntry) -> str:
    domain = domain_of(entry)
    return f"/{entry.id}" if domain == entry.id else f"/{domain}/{entry.id}"


def _prefetches(entry: BlobEntry) -> bool:
    settings = entry.config.rafs.prefetch if entry.config.rafs is not None else None
    return bool(
        (settings is not None and settings.enable) or (entry.config.cache and entry.config.cache.prefetch.enable)
    )
