"""The segment of a blob: POSIX shared memory with the live state of every chunk and the normalised chunk table.

Built by a worker (`workers/prepare.py`), mapped by the supervisor, the front ends and the decompress workers. A segment is
made under a temporary name and renamed when complete, so a reader sees none or all of it. It is allocated in full
when it is made: a full shared-memory file system is an error then, never a SIGBUS later. Only the supervisor unlinks.

A segment that replaces another (the cache file was changed by somebody) is another object under the same name: whoever
maps the old one goes on with the old file, of which it tells the truth, until it asks for more and opens the new one.

What holds after SIGKILL of anybody: the state bytes stay. *Ready* was stored after the data was written, so it is true as
long as the kernel lives; *pending* of a dead claimer is reset by the supervisor, or by whoever builds the next
segment from this one (`inherit`).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import posix_ipc

from nydusd import points
from nydusd.errors import FormatError, InternalError, cache_error, shared_memory_error
from nydusd.formats.blob_meta import CONTEXT_SIZE
from nydusd.formats.model import ChunkFlag, ChunkRecord
from nydusd.storage.state.lock import BlobLock
from nydusd.storage.state.names import SHM, inode_of, remove_left, unlink, unlink_lock

MAGIC = b"NYDSEG01"
HEADER_SIZE = 4096
COUNTERS_OFFSET = 1024
COUNTER_ROWS = 64
COUNTER_FIELDS = 6
CHECK_OFFSET = 256
LOCK_OFFSET = 512
EPOCH_OFFSET = 640
CLOCK_OFFSET = 648
SYNC_OFFSET = 656
DOUBTS_OFFSET = 660
LOST_OFFSET = 664
DIRTY_OFFSET = 668
SYNCS_OFFSET = 672

SYNCING, TAKEN_OVER = 1, 2
"""Values of `syncing`."""

DOUBTS = int.from_bytes(bytes(4) + b"\xff" * 4, sys.byteorder)
"""What of the first item of `marks` is `doubts`; the rest is `syncing`."""

RETIRED = 1 << 63
"""Value of `epoch` when another segment has taken this one's place."""

EMPTY, PENDING, READY, FAILED, VERIFY = range(5)
"""Values of a state byte. VERIFY: bytes are in the cache file but not ours; check their digest before use."""

CHECKABLE = int(ChunkFlag.DIGEST | ChunkFlag.CRC)
"""Of a record's flags: if none of them is set, it cannot be told whether bytes are the chunk's, and it is never VERIFY."""

RECORD = struct.Struct("<QQIIIIII")
"""`model.ChunkRecord`: coff, uoff, csize, usize, flags, ctx, ctx_off, crc."""
DIGEST_SIZE = 32

_HEADER = struct.Struct("<8sIIQQQQQ16sQQQQQQQQQ32sQ")
_HEAD = struct.Struct("<8sIIQQQQ")
"""The beginning of it: up to device and inode of the data file."""
_CHECK = struct.Struct("<II")
"""1, and the checksum of the header in front of it; zeros in a segment of a release that had none."""
_GETVERSION = 0x80087601  # FS_IOC_GETVERSION


def boot_id() -> bytes:
    """16 bytes that differ from boot to boot."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))


@dataclass(frozen=True, slots=True)
class Identity:
    """The cache file that a segment speaks of, and what is where in it.

    Device, inode, the size it must have in bytes; `birth`: the inode's generation where the file system has one, for a
    deleted file's inode number is soon another's; `layout`: a hash of the chunk table (32 bytes, or none).
    """

    dev: int
    ino: int
    size: int
    birth: int = 0
    layout: bytes = b""

    @classmethod
    def of(cls, fd: int, size: int, layout: bytes = b"") -> Identity:
        st = os.fstat(fd)
        birth = 0
        with contextlib.suppress(OSError):  # ENOTTY: tmpfs and others have none
            birth = int.from_bytes(fcntl.ioctl(fd, _GETVERSION, bytes(8)), "little")
        return cls(st.st_dev, st.st_ino, size, birth, layout)

    @property
    def file(self) -> tuple[int, int, int]:
        """What tells the file from others: device, inode (0: there is none), birth."""
        return self.dev, self.ino, self.birth

    def is_of(self, fd: int) -> bool:
        """Whether this is the identity of the open file."""
        return Identity.of(fd, self.size, self.layout) == self


def _align(n: int) -> int:
    return -(-n // 64) * 64


class Segment:
    """One mapped segment. `state` is writable: one byte a chunk."""

    def __init__(self, name: str, mapping: mmap.mmap, inode: int) -> None:
        self.name = name
        self._map = mapping
        self._inode = inode
        view = memoryview(mapping)
        if len(view) < HEADER_SIZE:
            raise FormatError(name, "size", f"{len(view)} bytes, at least {HEADER_SIZE} expected")
        (
            magic,
            version,
            self.flags,
            self.count,
            self.generation,
            dev,
            ino,
            size,
            self.boot_id,
            state,
            records,
            digests,
            contexts,
            self.context_count,
            self.dict_offset,
            self.dict_size,
            total,
            birth,
            layout,
            touched,
        ) = _HEADER.unpack_from(view)
        if magic != MAGIC or version != 2 or total != len(view):
            raise FormatError(name, "header", f"magic {magic!r}, version {version}, size {total} of {len(view)}")
        if _CHECK.unpack_from(view, CHECK_OFFSET) not in ((0, 0), (1, zlib.crc32(view[: _HEADER.size]))):
            raise FormatError(name, "header", "its checksum is wrong: it was damaged")
        self.identity = Identity(dev, ino, size, birth, layout if any(layout) else b"")
        self._view = view
        self.state = view[state : state + self.count]
        self.records = view[records : records + self.count * RECORD.size]
        self.digests = view[digests : digests + self.count * DIGEST_SIZE]
        self.contexts = view[contexts : contexts + self.context_count * CONTEXT_SIZE]
        touched_view = view[touched : touched + self.count * 4]
        lengths = [len(area) for area in (self.state, self.records, self.digests, touched_view, self.contexts)]
        if lengths != [self.count * n for n in (1, RECORD.size, DIGEST_SIZE, 4)] + [self.context_count * CONTEXT_SIZE]:
            raise FormatError(name, "header", f"areas of {lengths} bytes for {self.count} chunks")
        self.touched = touched_view.cast("I")
        """When each chunk was last asked for, by `clock`: written by front ends, for whoever makes room."""
        self.clock = view[CLOCK_OFFSET : CLOCK_OFFSET + 4].cast("I")
        """Seconds, in one item, set by the supervisor now and then; 0 if nobody needs it."""
        self.epoch = view[EPOCH_OFFSET : EPOCH_OFFSET + 8].cast("Q")
        """How often chunks were taken away, in one item (see `storage/state/eviction.py`)."""
        self.syncing = view[SYNC_OFFSET : SYNC_OFFSET + 4].cast("I")
        """In one item: SYNCING while a worker has the data file synced: killed there, it may have been told of lost data.

        TAKEN_OVER, see `create`. Else 0.
        """
        self.doubts = view[DOUBTS_OFFSET : DOUBTS_OFFSET + 4].cast("I")
        """How often all that was ready was doubted, in one item: raised before that and again after it."""
        self.lost = view[LOST_OFFSET : LOST_OFFSET + 4].cast("I")
        """1, in one item, if a front end was told that written data is lost: the next who has the file synced doubts first."""
        self.dirty = view[DIRTY_OFFSET : DIRTY_OFFSET + 4].cast("I")
        """1, in one item, if a chunk may be ready whose data is not on its disk: set before the chunk is ready."""
        self.syncs = view[SYNCS_OFFSET : SYNCS_OFFSET + 4].cast("I")
        """In one item: how many syncs have begun."""
        self.marks = view[SYNC_OFFSET : DIRTY_OFFSET + 4].cast("Q")
        """These four, in two items, for whoever looks at each read: `syncing` and `doubts`, `lost` and `dirty`."""
        self._lock: BlobLock | None = None

    @classmethod
    def create(
        cls,
        name: str,
        *,
        generation: int,
        identity: Identity,
        records: bytes,
        digests: bytes,
        contexts: bytes,
        dict_offset: int,
        dict_size: int,
        state: bytes,
        old_view: Segment | None = None,
        taken_over: bool = False,
    ) -> Segment:
        """Build a segment and give it its name. Raises ScarceError when shared memory is full, CacheError for all else.

        `taken_over`: what is ready is so by another segment. So its disk may not have it, and it may be doubted there just now:
        that is said as if it was being synced, until its maker has looked.
        `old_view`, which has the name now and speaks of the same file, is retired before: killed between the two, there is none
        to be used, and the next worker makes another.
        """
        count = len(state)
        if len(records) != count * RECORD.size or len(digests) != count * DIGEST_SIZE or len(contexts) % CONTEXT_SIZE:
            raise InternalError(f"{name}: areas do not fit {count} chunks")
        state_at = HEADER_SIZE
        records_at = state_at + _align(count)
        digests_at = records_at + _align(len(records))
        contexts_at = digests_at + _align(len(digests))
        touched_at = contexts_at + _align(len(contexts))
        total = touched_at + _align(4 * count)
        remove_left(name)
        temporary = f"{name}.{os.getpid()}"
        try:
            shm = posix_ipc.SharedMemory(temporary, posix_ipc.O_CREX, 0o600)
        except (OSError, posix_ipc.Error) as e:
            raise shared_memory_error(f"shared memory {name}", e) from e
        try:
            os.posix_fallocate(shm.fd, 0, total)
            points.reach("segment: allocated")
            mapping = mmap.mmap(shm.fd, total)
            inode = os.fstat(shm.fd).st_ino
        except OSError as e:
            unlink(temporary)
            raise shared_memory_error(f"shared memory {name}: {total} bytes", e) from e
        finally:
            shm.close_fd()
        _HEADER.pack_into(
            mapping,
            0,
            MAGIC,
            2,
            0,
            count,
            generation,
            identity.dev,
            identity.ino,
            identity.size,
            boot_id(),
            state_at,
            records_at,
            digests_at,
            contexts_at,
            len(contexts) // CONTEXT_SIZE,
            dict_offset,
            dict_size,
            total,
            identity.birth,
            identity.layout,
            touched_at,
        )
        _CHECK.pack_into(mapping, CHECK_OFFSET, 1, zlib.crc32(mapping[: _HEADER.size]))
        for at, part in ((state_at, state), (records_at, records), (digests_at, digests), (contexts_at, contexts)):
            mapping[at : at + len(part)] = part
        for at, value in ((SYNC_OFFSET, TAKEN_OVER), (DIRTY_OFFSET, 1)):
            mapping[at : at + 4] = (value if taken_over else 0).to_bytes(4, sys.byteorder)
        points.reach("segment: written")
        if old_view is not None:
            old_view.retire()
            points.reach("segment: former retired")
        unlink_lock(name)
        points.reach("segment: lock of the former removed")
        os.rename(SHM / temporary[1:], SHM / name[1:])
        points.reach("segment: named")
        return cls(name, mapping, inode)

    @classmethod
    def open(cls, name: str) -> Segment | None:
        """Map an existing segment; None when there is none.

        Raises FormatError for what is not a segment, CacheError when it cannot be mapped, ScarceError when it cannot now.
        """
        try:
            shm = posix_ipc.SharedMemory(name)
        except posix_ipc.ExistentialError:
            return None
        except (OSError, posix_ipc.Error) as e:
            raise cache_error(f"shared memory {name}", e) from e
        try:
            st = os.fstat(shm.fd)
            if st.st_size < HEADER_SIZE:
                raise FormatError(name, "size", f"{st.st_size} bytes, at least {HEADER_SIZE} expected")
            mapping = mmap.mmap(shm.fd, st.st_size)
        except OSError as e:
            raise cache_error(f"shared memory {name}", e) from e
        finally:
            shm.close_fd()
        return cls(name, mapping, st.st_ino)

    def lock(self) -> BlobLock:
        """The segment's lock, to be used in a `with`. Another segment of the same name has another lock."""
        if self._lock is None:
            record = self._view[LOCK_OFFSET : LOCK_OFFSET + 16]
            self._lock = BlobLock(f"{self.name}.{self._inode}", record, create=True)
        return self._lock

    def record(self, chunk: int) -> ChunkRecord:
        return ChunkRecord._make(RECORD.unpack_from(self.records, chunk * RECORD.size))

    def digest(self, chunk: int) -> bytes:
        """32 bytes; meaningful only if the record has the DIGEST flag."""
        return bytes(self.digests[chunk * DIGEST_SIZE : (chunk + 1) * DIGEST_SIZE])

    def doubted(self, chunk: int) -> int:
        """The state of a chunk of which it is not certain any more that its bytes are in the cache file."""
        return VERIFY if self.record(chunk).flags & CHECKABLE else EMPTY

    def counters(self, row: int) -> memoryview:
        """A row of 6 u64 counters: hits, hit bytes, misses, miss bytes, errors, spare. One process writes a row.

        Processes beyond the 64th share rows, and may lose counts there.
        """
        at = COUNTERS_OFFSET + row % COUNTER_ROWS * COUNTER_FIELDS * 8
        return self._view[at : at + COUNTER_FIELDS * 8].cast("Q")

    def totals(self) -> list[int]:
        """The sum of all rows, field by field."""
        rows = self._view[COUNTERS_OFFSET : COUNTERS_OFFSET + COUNTER_ROWS * COUNTER_FIELDS * 8].cast("Q")
        return [sum(rows[field::COUNTER_FIELDS]) for field in range(COUNTER_FIELDS)]

    def retire(self) -> None:
        """Another segment takes the place of this one: front ends that map this one look for the other."""
        self.epoch[0] = RETIRED

    @property
    def is_doubtful(self) -> bool:
        """Whether what is ready may be lost, for what is known now: who has the data file synced next doubts it, but for a sync
        that is under way and ends well.
        """
        return bool(self.syncing[0] or self.lost[0])

    @property
    def retired(self) -> bool:
        return bool(self.epoch[0] == RETIRED)

    @property
    def inode(self) -> int:
        """Tells this very segment from others that have or had its name."""
        return self._inode

    @property
    def key(self) -> tuple[str, int]:
        """Name and inode: tells this very segment from all others."""
        return self.name, self._inode

    def is_current(self) -> bool:
        """Whether the segment of this name is this very one."""
        return inode_of(self.name) == self._inode

    def close(self) -> None:
        """Give the mapping back; views handed out by `counters` must be gone."""
        if self._lock is not None:
            self._lock.close()
        mapped = (
            self.state,
            self.records,
            self.digests,
            self.contexts,
            self.touched,
            self.clock,
            self.epoch,
            self.syncing,
            self.doubts,
            self.lost,
            self.dirty,
            self.syncs,
            self.marks,
        )
        for view in (*mapped, self._view):
            view.release()
        self._map.close()


def file_of(path: Path) -> tuple[int, int] | None:
    """Device and inode of the data file of which the segment at this path speaks, None if it is none. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        head = os.pread(fd, _HEAD.size, 0)
    finally:
        os.close(fd)
    if len(head) < _HEAD.size:
        return None
    magic, _version, _flags, _count, _generation, dev, ino = _HEAD.unpack(head)
    return (dev, ino) if magic == MAGIC else None
