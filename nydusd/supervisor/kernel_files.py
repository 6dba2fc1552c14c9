"""The files of the kernel's cache that are open, and who reads them: what the kernel says, and how it is answered.

Part of the supervisor of `nydusd singleton --fscache`. OPEN is answered at once, READ becomes a request to the router, or a
copy of a metadata file by a worker, and is answered when the workers have written what is missing. They borrow a file's
descriptor for each job, so it is closed only when no job of it is under way.

What holds after SIGKILL: all descriptors of files are closed, and the kernel opens them anew with its next reads. One that a
worker has still, which is stuck in a disk, is not: of it the kernel has READs said that we cannot answer. They are asked for
again until it is closed, and an OPEN comes before them.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from nydusd.errors import CacheError, FormatError, StaleCacheError
from nydusd.frontends.fscache import messages
from nydusd.frontends.fscache.device import CacheDevice, completed, lacks
from nydusd.frontends.fuse.complaints import Complaints
from nydusd.ipc.inflight import InflightRow
from nydusd.ipc.messages import LOST, SlotRef
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.storage.cache.spec import NO_COOKIE
from nydusd.storage.state.range_map import RangeMap
from nydusd.supervisor.mounts import Mounts
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.router import Router

KERNEL = b"kernel"
"""The name of the kernel among those who ask the router."""
_MESSAGES = 64
"""Messages taken from the device before others get their turn."""
_COPY = 1 << 20
"""Bytes of a metadata file that are copied at once."""
_SAY_AGAIN = 1.0
"""Seconds until the kernel is asked to say again what could not be answered."""
_NOT_FOUND, _EIO = -2, -5


@dataclass(eq=False, slots=True)
class Object:
    """A file of the kernel's cache, open: of a blob, or of the metadata file `source`. `copied`: READs that
    workers are at.
    """

    fd: int
    size: int
    cache: BlobCache | None
    source: str
    copied: set[messages.Read] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class Reader:
    """The kernel waits for a range of a blob. `shown`: where that is shown."""

    read: messages.Read
    object: Object
    cache: BlobCache
    until: float
    shown: int
    again: bool = False


@dataclass(slots=True)
class Wanted:
    """What a file of the kernel's is to hold: `size` bytes, of a blob, which may be prefetched, or of a metadata file."""

    size: int
    cache: BlobCache | None
    source: str
    prefetch: bool = False


class KernelFiles:
    """`find(domain, key)` says what a file is to hold, None for one that is unknown; `closed()` is called after each CLOSE.

    A reader waits `patience` seconds for a blob that cannot be opened. `board`: where it is shown that the kernel waits.
    """

    def __init__(
        self,
        router: Router,
        mounts: Mounts,
        prefetch: PrefetchWorker,
        fetch: WorkerPool,
        decompress: WorkerPool,
        find: Callable[[str, str], Wanted | None],
        closed: Callable[[], None],
        patience: float,
        board: InflightRow | None = None,
    ) -> None:
        self._router = router
        self._mounts = mounts
        self._prefetch = prefetch
        self._fetch = fetch
        self._decompress = decompress
        self._find = find
        self._closed = closed
        self._patience = patience
        self._board = board
        self._pid = os.getpid()
        self._objects: dict[int, Object] = {}
        self._closing: list[Object] = []
        self._readers: dict[int, Reader] = {}
        self._unopened: dict[int, Reader] = {}
        self._again: CacheDevice | None = None
        """What is to say again, when it is `_again_at` (`time.monotonic()`), what was not answered."""
        self._again_at = math.inf
        self._complaints = Complaints("fscache")

    # --- messages ---------------------------------------------------------------------------------------------

    def take_messages(self, device: CacheDevice) -> None:
        """Answer what the kernel says, or have it wait."""
        for _ in range(_MESSAGES):
            try:
                raw = device.read()
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
                    self._answer_open(device, refused[0], _EIO)
                    os.close(refused[1])
                continue
            if isinstance(message, messages.Open):
                self._open(device, message)
            elif isinstance(message, messages.Close):
                self._close(message.object_id)
            else:
                self._read(device, message)

    def _answer_open(self, device: CacheDevice, number: int, size: int) -> bool:
        """Say how long a file is, or why there is none. Where the kernel does not take it, somebody may wait for it still."""
        answered = device.opened(number, size)
        if not answered:
            self._say_again(device)
        return answered

    def _say_again(self, device: CacheDevice) -> None:
        """Have the kernel say once more what was not answered, in a moment: what it says now may not be answered then, too."""
        if self._again is None:
            self._again, self._again_at = device, time.monotonic() + _SAY_AGAIN

    def _open(self, device: CacheDevice, message: messages.Open) -> None:
        """The kernel wants a file: say how long it is."""
        fd = message.fd
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        wanted = self._find(message.domain, message.key)
        if wanted is None:
            self._complaints.log("the kernel asks for %s in %s, which is not bound", message.key, message.domain)
            self._answer_open(device, message.number, _NOT_FOUND)
            os.close(fd)
            return
        if not self._answer_open(device, message.number, wanted.size):
            os.close(fd)
            return
        self._objects[message.object_id] = Object(fd, wanted.size, wanted.cache, wanted.source)
        if wanted.cache is not None:
            wanted.cache.users += 1
            self._restart(wanted.cache, fd, wanted.prefetch)

    def _restart(self, cache: BlobCache, fd: int, prefetch: bool) -> None:
        """A blob's file is this one now: see what it has, and fetch ahead if that is wanted."""
        self._router.forget(cache)
        cache.give((self._pid, fd))
        self._router.open_blob(cache)
        if prefetch:
            self._prefetch.cancel(cache)
            self._prefetch.want(cache, 0, -1)

    def renew(self, cache: BlobCache) -> None:
        """More is known of a blob's chunks: whoever waits, or will, is served by that."""
        if cache.spec.cookie not in (None, NO_COOKIE):
            assert cache.spec.cookie is not None
            self._restart(cache, cache.spec.cookie[1], prefetch=False)

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
        if cache is not None and cache.spec.cookie == (self._pid, closed.fd):
            self._prefetch.cancel(cache)
            self._router.forget(cache)
        self._closed()

    def _end(self, number: int) -> None:
        """Nobody waits for this any more."""
        self._unopened.pop(number, None)
        if (reader := self._readers.pop(number, None)) is not None:
            self._hide(reader.shown)
            self._router.cancel(KERNEL, number)

    def _read(self, device: CacheDevice, read: messages.Read) -> None:
        wanted = self._objects.get(read.object_id)
        if wanted is None:
            self._complaints.log("the kernel reads a file that somebody else has open still (%d)", read.object_id)
            self._say_again(device)
        elif wanted.cache is None:
            if read not in wanted.copied:  # else the kernel says it once more
                self._copy(wanted, read)
        else:
            former = self._readers.get(read.number)
            if former is not None and (former.read, former.object) == (read, wanted):
                return
            self._end(read.number)  # another has the number now
            until = time.monotonic() + self._patience
            reader = Reader(read, wanted, wanted.cache, until, self._show(wanted, read))
            self._readers[read.number] = self._unopened[read.number] = reader
            self._try_opened()

    def _copy(self, wanted: Object, read: messages.Read) -> None:
        """A part of a metadata file is read: a worker copies it."""
        shown = self._show(wanted, read)

        def copied(_job: Job, answer: Answer) -> None:
            wanted.copied.remove(read)
            self._hide(shown)
            if "error" in answer:
                self._complaints.log("a read failed: %s", answer["error"])
            completed(wanted.fd, read.number)

        start = read.offset // _COPY * _COPY
        length = -(-(read.offset + read.length) // _COPY) * _COPY - start
        payload = {"path": wanted.source, "size": wanted.size, "offset": start, "length": length}
        wanted.copied.add(read)
        job = Job("copy_bootstrap", None, Priority.USER, payload | {"cookie": [self._pid, wanted.fd]}, copied)
        self._fetch.submit(job)

    def _show(self, wanted: Object, read: messages.Read) -> int:
        """The kernel begins to wait: the place where that is shown."""
        return -1 if self._board is None else self._board.begin(read.number, os.fstat(wanted.fd).st_ino)

    def _hide(self, shown: int) -> None:
        if self._board is not None:
            self._board.end(shown)

    # --- readers ----------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether `turn` must be called again before long, whatever happens."""
        return bool(self._unopened or self._closing or self._again)

    def turn(self) -> None:
        """Called in each turn of the loop."""
        if self._unopened:
            self._try_opened()
        if self._closing:
            self._close_idle()
        if self._again is not None and time.monotonic() >= self._again_at:
            device, self._again, self._again_at = self._again, None, math.inf
            device.restore()

    def close(self) -> None:
        """Close all files."""
        for each in (*self._objects.values(), *self._closing):
            os.close(each.fd)

    def _close_idle(self) -> None:
        for closed in list(self._closing):
            cache = closed.cache
            if closed.copied or (cache is not None and (self._fetch.has(cache) or self._decompress.has(cache))):
                continue
            self._closing.remove(closed)
            os.close(closed.fd)
            if cache is not None:
                self._mounts.unused.let_go(cache)

    def _try_opened(self) -> None:
        """Ask for what readers wait for whose blobs are open now; have the others opened."""
        for number, reader in list(self._unopened.items()):
            cache = reader.cache
            if cache.state == "ready":
                del self._unopened[number]
                self._ask(reader)
            elif cache.state == "failed" and (
                time.monotonic() >= reader.until or not (cache.unreachable or cache.may_open())
            ):
                self._finish(reader, f"blob {cache.spec.info.blob_id} cannot be opened: {cache.reason}")
            else:
                self._router.open_blob(cache)

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
        self._router.request(KERNEL, read.number, cache.handle, first, max(count, 1), flags)

    def reply(self, number: int, errno: int, slot: SlotRef | None) -> None:
        """The router answers what was asked in the name of the kernel."""
        if slot is not None:
            self._router.release(slot.lease)
        reader = self._readers.get(number)
        if reader is None:
            return
        try:
            if errno:
                self._finish(reader, os.strerror(errno))
            elif slot is not None:
                self._finish(reader, "the kernel's cache has no room for it, or no image lists it")
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
        if self._readers.pop(reader.read.number, None) is not None:
            self._hide(reader.shown)
        if why:
            self._complaints.log("a read failed: blob %s: %s", reader.cache.spec.info.blob_id, why)
        completed(reader.object.fd, reader.read.number)
