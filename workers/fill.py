"""The job `fill`: bring chunks of a blob into the cache file, or into a slot of shared memory. Runs in a decompress worker.

For each chunk: get its stored bytes, decrypt, decompress, verify; then data into the file, then the state byte, in this
order. So a worker that is killed leaves a chunk either marked and whole, or not marked. Doing a job twice writes the same
bytes twice. A local blob is read here. The stored bytes of a remote one are in shared memory already, where a fetch worker
has put them: nothing here waits for a network or knows a credential.
A chunk that does not verify is read (here, or by the supervisor's order) and decoded once more; then it fails, alone: its
bytes are never stored.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nydusd import points
from nydusd.errors import (
    BackendError,
    CacheError,
    CorruptChunkError,
    InternalError,
    NydusError,
    ScarceError,
    StaleCacheError,
    comes_of_want,
)
from nydusd.formats.blob_meta import MAX_CONTEXT_INPUT
from nydusd.formats.model import ChunkFlag, ChunkRecord
from nydusd.ipc.arena import Arena
from nydusd.ipc.messages import Json
from nydusd.storage.cache.decode import ChunkDecoder, verify_chunk
from nydusd.storage.cache.meta_info import BlobMetaInfo
from nydusd.storage.cache.stored import fetch_range
from nydusd.storage.state.on_disk import read_disk
from nydusd.storage.state.segment import READY, Segment
from workers import cut_off
from workers.blobs import NO_ROOM, OpenBlob, OpenBlobs
from workers.cookie import lent, write_pages

log = logging.getLogger(__name__)

_CORRUPT_MOST = 32
"""Chunks of a job that may fail one by one, each after two reads. A blob with more is broken: the job ends there, or what is
left of it is fetched once more."""


@dataclass(slots=True)
class _Result:
    """What is reported: failed chunks, those to be fetched once more, those that found no room; what the backend was asked."""

    failed: list[tuple[int, int, str]] = field(default_factory=list)
    corrupt: list[int] = field(default_factory=list)
    unstored: list[int] = field(default_factory=list)
    why_unstored: str = ""
    placed: list[tuple[int, int, int]] = field(default_factory=list)
    reads: int = 0
    read_errors: int = 0
    read_bytes: int = 0
    timed: list[tuple[int, float]] = field(default_factory=list)

    def fail(self, chunks: Iterable[int], error: NydusError) -> None:
        """These chunks have failed, of one cause: one line in the log."""
        log.error("%s", error)
        self.failed += [(chunk, error.errno, str(error)) for chunk in chunks]

    def has_no_room(self, chunks: Iterable[int], error: OSError | CacheError) -> bool:
        """These chunks are to come past the cache file, if the error says that its disk takes nothing: whether it does."""
        code = error.errno if isinstance(error, OSError) else error.cause_errno
        if code not in NO_ROOM:
            return False
        self.unstored += chunks
        self.why_unstored = os.strerror(code)
        return True

    def answer(self) -> Json:
        return {
            "failed": self.failed,
            "corrupt": self.corrupt,
            "unstored": self.unstored,
            "why_unstored": self.why_unstored,
            "placed": self.placed,
            "reads": self.reads,
            "read_errors": self.read_errors,
            "read_bytes": self.read_bytes,
            "timed": self.timed,
        }


def _mark(segment: Segment, chunk: int, doubts: int) -> None:
    """The chunk's bytes are in the page cache at least, where they came after there had been so many `doubts`.

    If all was doubted meanwhile, the kernel may have dropped them, and has told whoever did so: then they are looked for on the
    disk. Killed between the mark and the second look, at the very moment at which a doubt begins, the mark stays.
    """
    # Not before the write: a sync that takes it back before this has the data, one that begins later has the mark.
    segment.dirty[0] = 1
    if segment.doubts[0] == doubts:
        segment.state[chunk] = READY
        points.reach("fill: marked")
    if segment.doubts[0] != doubts:
        segment.state[chunk] = segment.doubted(chunk)


class _CacheFile:
    """Stores chunks in the cache file and marks them."""

    def __init__(self, blob: OpenBlob, result: _Result) -> None:
        self._fd = blob.data_fd()
        self._size = blob.segment.identity.size
        self._segment, self._state = blob.segment, blob.segment.state
        self._result = result

    def wants(self, chunk: int) -> bool:
        return bool(self._state[chunk] != READY)

    def store(self, chunk: int, record: ChunkRecord, data: memoryview) -> None:
        if self._result.unstored:
            self._result.unstored.append(chunk)
            return
        doubts = self._segment.doubts[0]
        try:
            points.reach("fill: before the write")
            self._write(data, record.uoff)
        except (OSError, CacheError) as e:
            if not self._result.has_no_room([chunk], e):
                raise
            return
        points.reach("fill: written")
        _mark(self._segment, chunk, doubts)

    def _write(self, data: memoryview, at: int) -> None:
        # Writing behind the end of a file that somebody cut off would turn the part between into zeros that pass
        # for the chunks there. So it stays short, and whoever reads in it sees that. Once more after the write, for one that
        # is cut off just now.
        if os.fstat(self._fd).st_size < self._size:
            raise StaleCacheError("the cache file was cut off")
        begin = at
        try:
            while data:
                done = os.pwrite(self._fd, data, at)
                data, at = data[done:], at + done
        finally:
            cut_off.check(self._fd, self._segment, begin, at)


class _Cookie(_CacheFile):
    """Stores chunks in a file of the kernel's cache."""

    def __init__(self, fd: int, blob: OpenBlob, result: _Result) -> None:
        self._fd = fd
        self._segment, self._state = blob.segment, blob.segment.state
        self._result = result

    def _write(self, data: memoryview, at: int) -> None:
        write_pages(self._fd, data, at)


class _Slot:
    """Places chunks in a slot of the arena; for the dummy cache, and when the disk is full."""

    def __init__(self, arena: Arena, job: Json, result: _Result) -> None:
        self._arena = arena
        self._at = int(job["slot"]["offset"])
        self._end = self._at + int(job["slot"]["length"])
        self._wanted = set(job["chunks"])
        self._result = result

    def wants(self, chunk: int) -> bool:
        return chunk in self._wanted

    def store(self, chunk: int, _record: ChunkRecord, data: memoryview) -> None:
        if self._at + len(data) > self._end:
            self._result.unstored.append(chunk)
            return
        self._arena.view(self._at, len(data))[:] = data
        points.reach("fill: placed in a slot")
        self._result.placed.append((chunk, self._at, len(data)))
        self._at += len(data)


class _Backend:
    """The stored bytes of a local blob."""

    again = True
    """A chunk that is damaged may be read once more."""
    most = MAX_CONTEXT_INPUT
    """Bytes that are read at once, as much as any unit has: hostile metadata may put neighbours any distance apart."""

    def __init__(self, blob: OpenBlob, result: _Result) -> None:
        self._blob = blob
        self._result = result

    def read(self, coff: int, length: int) -> memoryview:
        """Stored bytes; raises BackendError."""
        self._result.reads += 1
        started = time.monotonic()
        try:
            data = self._blob.reader().read(coff, length)
        except BackendError:
            self._result.read_errors += 1
            raise
        self._result.read_bytes += length
        self._result.timed.append((length, round((time.monotonic() - started) * 1000, 3)))
        return memoryview(data)


class _Fetched:
    """Stored bytes that a fetch worker has put into shared memory."""

    again = False

    def __init__(self, arena: Arena, source: Json) -> None:
        self.final = bool(source["final"])
        self._view = arena.view(int(source["offset"]), int(source["length"]))
        self._coff = int(source["coff"])
        self.most = len(self._view)

    def read(self, coff: int, length: int) -> memoryview:
        start = coff - self._coff if length else 0
        if not 0 <= start <= len(self._view) - length:
            raise InternalError(f"stored bytes {coff} to {coff + length} are not among those that were fetched")
        return self._view[start : start + length]


def fill(blobs: OpenBlobs, job: Json) -> Json:
    """Fill job["chunks"] from job["source"], or else from the backend if that is local.

    Those in job["verify"] are looked for in the cache file first.
    """
    blob = blobs.get(job)
    result = _Result()
    if job["slot"] is not None:
        return _fill(blobs, blob, job, _Slot(blobs.arena(job["slot"]["arena"]), job, result), result)
    if blob.spec.cookie is not None:
        with lent(blob.spec.cookie) as fd:
            return _fill(blobs, blob, job, _Cookie(fd, blob, result), result)
    try:
        target = _CacheFile(blob, result)
    except CacheError as e:
        if not result.has_no_room(job["chunks"], e):
            raise
        return result.answer()
    for chunk in job["verify"]:
        _adopt(blob, chunk)
    return _fill(blobs, blob, job, target, result)


def _fill(blobs: OpenBlobs, blob: OpenBlob, job: Json, target: _CacheFile | _Slot, result: _Result) -> Json:
    if job["source"] is not None:
        _fetch(blob, job["chunks"], _Fetched(blobs.arena(job["source"]["arena"]), job["source"]), target, result)
    elif not blob.spec.remote:
        _fetch(blob, job["chunks"], _Backend(blob, result), target, result)
    return result.answer()


def _adopt(blob: OpenBlob, chunk: int) -> None:
    """Mark a chunk ready if the cache file holds its bytes already: another daemon has left them there, or its disk failed."""
    segment = blob.segment
    record = segment.record(chunk)
    doubts = segment.doubts[0]
    try:
        data = _on_disk(blob.data_fd(), record.uoff, record.usize)
    except OSError as e:
        if comes_of_want(e):
            raise
        log.warning("blob %s chunk %d: cache file: %s; fetched again", blob.spec.info.blob_id, chunk, e.strerror)
        return
    if verify_chunk(blob.spec.info, record, segment.digest(chunk), data):
        points.reach("fill: verified")
        _mark(segment, chunk, doubts)  # a file system without direct I/O has told what is in the page cache
    else:
        log.warning(
            "blob %s chunk %d: bytes in the cache file are not the chunk's; fetched again",
            blob.spec.info.blob_id,
            chunk,
        )


def _on_disk(fd: int, offset: int, length: int) -> bytes:
    """What the disk has there; where a file system has no direct I/O what any reader gets. Raises OSError."""
    try:
        return read_disk(fd, offset, length)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
    return os.pread(fd, length, offset)


def _decoder(blob: OpenBlob) -> ChunkDecoder:
    decoder = blob.scratch.get("decoder")
    if not isinstance(decoder, ChunkDecoder):
        segment = blob.segment

        def read_dictionary(offset: int, size: int) -> bytes:
            return blob.read_ci(segment.dict_offset + offset, size)

        decoder = blob.scratch["decoder"] = ChunkDecoder(blob.spec.info, read_dictionary)
    return decoder


def _runs(chunks: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of consecutive ids."""
    first = last = chunks[0]
    for chunk in chunks[1:]:
        if chunk != last + 1:
            yield first, last
            first = chunk
        last = chunk
    yield first, last


def _fetch(
    blob: OpenBlob, chunks: list[int], source: _Backend | _Fetched, target: _CacheFile | _Slot, result: _Result
) -> None:
    """Fill those of `chunks`, which are sorted, that are wanted."""
    wanted = [chunk for chunk in chunks if target.wants(chunk)]
    if not wanted:
        return
    corrupt = 0
    runs = deque(_runs(wanted))
    while runs:
        first, last = runs.popleft()
        again = -1  # the chunk whose second try this is
        while first <= last:
            try:
                if _fill_run(blob, first, last, source, target):
                    break
                middle = (first + last) // 2
                runs.appendleft((middle + 1, last))
                last = middle
            except CorruptChunkError as e:
                if source.again and e.chunk != again:
                    log.warning("%s; reading it once more", e)
                    first = again = e.chunk
                    continue
                corrupt += 1
                if isinstance(source, _Fetched) and not source.final:
                    log.warning("%s; fetching it once more", str(e))
                    # All of its unit is: to decode that again for each of the others could take minutes.
                    first = min(BlobMetaInfo(blob.segment).unit(e.chunk).stop, last + 1)
                    result.corrupt += range(e.chunk, first)
                    if corrupt == _CORRUPT_MOST:
                        result.corrupt += [chunk for chunk in wanted if chunk >= first]
                        return
                    continue
                first = e.chunk + 1
                result.fail([e.chunk], e)
                if corrupt == _CORRUPT_MOST:
                    rest = [chunk for chunk in wanted if chunk >= first]
                    why = CorruptChunkError(e.blob_id, first, f"not tried, as {corrupt} chunks before it are corrupt")
                    if rest:
                        result.fail(rest, why)
                    return
            except BackendError as e:
                if comes_of_want(e):  # of the whole job: it is done again
                    raise ScarceError(str(e)) from e
                result.fail(range(first, last + 1), e)
                break


def _fill_run(blob: OpenBlob, first: int, last: int, source: _Backend | _Fetched, target: _CacheFile | _Slot) -> bool:
    """One read of the source, decoded and stored chunk by chunk. False, and nothing done, if it would be too long."""
    segment = blob.segment
    decoder = _decoder(blob)
    records = [segment.record(chunk) for chunk in range(first, last + 1)]
    coff, length = fetch_range(records, segment.contexts, 0, last - first)
    if length > source.most and first < last:
        return False
    data = source.read(coff, length)
    points.reach("fill: read")

    def digest(chunk: int) -> bytes | None:
        return segment.digest(chunk) if segment.record(chunk).flags & ChunkFlag.DIGEST else None

    for chunk, plain in decoder.decode_range(records, first, coff, data, digest, segment.contexts):
        if target.wants(chunk):
            target.store(chunk, records[chunk - first], memoryview(plain))
    return True
