"""The job `prepare`: make a blob ready to be used. Runs in a fetch worker, because it does I/O and parses hostile bytes.

Gets the chunk information (from the cache folder, else from the backend), builds the normalised chunk table, opens
or makes the cache file, judges the stored chunk map, and publishes all that as the blob's segment. Killed at any
point it leaves nothing that a reader could see: files are renamed into place, the segment appears whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nydusd import points
from nydusd.errors import BackendError, CacheError, FormatError
from nydusd.formats import open_bootstrap
from nydusd.formats.blob_meta import check_ci_sizes
from nydusd.formats.model import RawChunk
from nydusd.ipc.messages import Json
from nydusd.storage.cache.chunk_table import ChunkTable, build_from_ci, build_from_raw, build_tarfs
from nydusd.storage.cache.load import meta_file_bytes, parse_meta_file
from nydusd.storage.cache.spec import BlobSpec
from nydusd.storage.state import map_file
from nydusd.storage.state.gone import remove_if_gone
from nydusd.storage.state.segment import CHECKABLE, EMPTY, READY, RECORD, VERIFY, Identity, Segment
from nydusd.storage.state.sharing import contradiction, ready_in, segments_of
from nydusd.storage.state.temporary import is_still, temporary_of
from workers.blobs import NO_ROOM, OpenBlob, OpenBlobs, map_bootstrap
from workers.chunk_info import fetch_ci

log = logging.getLogger(__name__)

_TRIES = 5
_NO_FILE = (0, 0, 0)
_Taken = dict[tuple[str, int], int]
"""Segments, by name and inode, and how often all was doubted in each before it was looked at."""
_OF_DICTIONARIES = 4
"""How many bytes of a layout tell the dictionaries of a blob that has any."""


def prepare(blobs: OpenBlobs, job: Json) -> Json:
    """Build and publish the segment. Answer: chunk count, bytes of cache file, chunks ready; why there is no file, if so."""
    blob = blobs.get(job)
    spec = blob.spec
    table, layout = _chunk_table(blob)
    if spec.cookie is not None:
        count = _cookie(spec, spec.cookie, table)
    elif spec.data_path is None:
        count = _publish(spec, table, Identity(0, 0, table.uncompressed_size), bytearray(table.count))
    else:
        try:
            count = _cache_file(spec, spec.data_path, table, layout)
        except CacheError as e:
            if e.cause_errno not in NO_ROOM:
                raise
            # Without a file: whoever is to store something there finds it stale, so the blob is opened again.
            count = _without_file(spec, spec.data_path, table)
            return {"count": table.count, "size": table.uncompressed_size, "ready": count, "uncached": str(e)}
    return {"count": table.count, "size": table.uncompressed_size, "ready": count}


def _publish(
    spec: BlobSpec,
    table: ChunkTable,
    identity: Identity,
    state: bytearray,
    old_view: Segment | None = None,
    taken: _Taken | None = None,
) -> int:
    """Make the segment known, in place of `old_view`; gives how many chunks are ready.

    Of what others have, it is looked again whether it was doubted: who doubts may not have seen this segment yet. Killed before
    that it counts as being synced, and the next one doubts. If it was, another segment takes its place, in which nothing is
    ready: whoever syncs the file may be doubting this one just now, which is not for two at once (`doubt`).
    """
    create = partial(
        Segment.create,
        spec.segment,
        generation=spec.generation,
        identity=identity,
        records=bytes(table.records),
        digests=bytes(table.digests),
        contexts=bytes(table.contexts),
        dict_offset=table.dict_offset,
        dict_size=table.dict_size,
    )
    with contextlib.closing(create(state=bytes(state), old_view=old_view, taken_over=bool(taken))) as segment:
        if not taken:
            return state.count(READY)
        points.reach("prepare: taken over")
        if _is_certain(segment, taken, old_view):
            segment.syncing[0] = 0
            return bytes(segment.state).count(READY)
        doubted = bytes(segment.doubted(c) if value == READY else value for c, value in enumerate(state))
        create(state=doubted, old_view=segment).close()
        return 0


def _is_certain(segment: Segment, taken: _Taken, old_view: Segment | None) -> bool:
    """Whether nobody doubts, or has doubted, those from which something was taken over; they are there still."""
    left = dict(taken)
    try:
        if (
            old_view is not None
            and old_view.key in left
            and (old_view.is_doubtful or left.pop(old_view.key) != old_view.doubts[0])
        ):
            return False
        for other in segments_of(segment.identity.dev, segment.identity.ino):
            if other.inode != segment.inode and other.identity.file == segment.identity.file and other.is_doubtful:
                return False
            if left.pop(other.key, other.doubts[0]) != other.doubts[0]:
                return False
    except CacheError:
        return False
    return not left


def _raw_chunks(spec: BlobSpec) -> Iterator[RawChunk]:
    """This blob's records of the bootstrap's chunk table, and of those of other images that it is served to."""
    index = spec.info.index
    images = [(spec.bootstrap, spec.path_id, spec.extracted, index), *spec.more]
    for path, path_id, extracted, place in images:
        try:
            image = open_bootstrap(map_bootstrap(path), path, path_id, extracted=extracted)
        except FormatError as e:
            if len(images) == 1:
                raise
            log.warning("%s; chunks that only this image lists are not known", e)
            continue
        yield from (c._replace(blob_index=index) for c in image.raw_chunks() if c.blob_index == place)


def _chunk_table(blob: OpenBlob) -> tuple[ChunkTable, bytes]:
    """From the bootstrap and, if the blob has it, its chunk information: `<id>.blob.meta` if sound, else the backend's.

    And its layout, a hash.
    """
    spec, info = blob.spec, blob.spec.info
    if info.is_tarfs:
        return with_layout(build_tarfs(info))
    if not info.has_ci:
        return with_layout(build_from_raw(info, _raw_chunks(spec)))
    check_ci_sizes(info, f"blob {info.blob_id}")
    doubtful: tuple[ChunkTable, bytes] | None = None
    for path in blob.meta_paths():
        try:
            with open(path, "rb") as f:
                content = f.read(info.ci_uncompressed_size + 3 * 4096)
            header, ci = parse_meta_file(content, info, str(path))
            known = with_layout(build_from_ci(info, ci, header, _raw_chunks(spec), mark=True), ci)
        except FileNotFoundError:
            continue
        except (OSError, FormatError) as e:
            log.warning("blob metadata: %s; fetching it again", str(e))
            continue
        if map_file.recorded_layout(spec.map_path) in ("", known[1].hex()) or _is_vouched_for(spec, *known):
            return known
        # Sound in itself, and another one than that which was used: a bit may have been flipped.
        log.warning("blob metadata %s: it is not what the chunk map was stored for; fetching it again", path)
        doubtful = doubtful or known
    try:
        header, ci, table = fetch_ci(
            blob, lambda header, ci: build_from_ci(info, ci, header, _raw_chunks(spec), mark=True)
        )
    except BackendError:
        if doubtful is None:
            raise
        return doubtful
    points.reach("prepare: metadata fetched")
    stored = _store_meta(blob, meta_file_bytes(header, ci))
    if not stored and table.dict_size:
        raise CacheError(f"blob metadata of {info.blob_id} could not be stored, and its dictionaries are needed")
    return with_layout(table, ci)


def _is_vouched_for(spec: BlobSpec, table: ChunkTable, layout: bytes) -> bool:
    """Whether a segment of the same data file has this table, but for what its image lists: then no bit was flipped."""
    try:
        facts = os.stat(spec.data_path or "")
    except OSError:
        return False
    own = layout[-_OF_DICTIONARIES:] if table.dict_size else b""
    try:
        return any(
            segment.identity.layout.endswith(own) and not contradiction(segment, table)
            for segment in segments_of(facts.st_dev, facts.st_ino)
        )
    except CacheError:
        return False


def with_layout(table: ChunkTable, ci: bytes = b"") -> tuple[ChunkTable, bytes]:
    """The table, and what tells it from others.

    Where it has dictionaries, which are in the chunk information `ci`, the end of that tells those, by themselves: images with
    a blob in common list different chunks of it, and have the dictionaries from one file.
    """
    layout = hashlib.sha256(b"".join((table.records, table.digests, table.contexts))).digest()
    if table.dict_size:
        dictionaries = memoryview(ci)[table.dict_offset : table.dict_offset + table.dict_size]
        layout = layout[:-_OF_DICTIONARIES] + zlib.crc32(dictionaries).to_bytes(_OF_DICTIONARIES, "little")
    return table, layout


def _store_meta(blob: OpenBlob, content: bytes) -> bool:
    """Store `<id>.blob.meta` at the first place that has room. False if none has; others are rid of what is wrong there."""
    for path in blob.meta_paths():
        try:
            _write_whole(path, content)
            return True
        except OSError as e:
            log.warning("blob metadata %s cannot be written: %s", path, e.strerror)
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            log.warning("blob metadata %s cannot be removed: %s", path, e.strerror)
    return False


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is either absent or complete, also after a power cut. Raises OSError."""
    with temporary_of(path) as (file, temporary):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        points.reach("prepare: metadata written")
        os.replace(temporary, path)
        points.reach("prepare: metadata named")
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _cache_file(spec: BlobSpec, path: Path, table: ChunkTable, layout: bytes) -> int:
    """Open or make the cache file, tell what is in it, and publish that, while nobody takes anything out of it."""
    with contextlib.ExitStack() as opened:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd, whole, earlier = _open_data(spec, path, table, layout, opened)
            identity, state, taken = _judge(spec, fd, whole, table, layout)
            points.reach("prepare: map judged")
            # A front end may go on with an old file, but not with an old view of this one: chunks are taken out by the new.
            file = identity.file
            old_view = earlier if earlier is not None and earlier.identity.file in (file, _NO_FILE) else None
            ready = _publish(spec, table, identity, state, old_view, taken)
            points.reach("prepare: published")
            return ready
        except OSError as e:
            raise CacheError(f"cache file {path}: {e.strerror}", e.errno) from e


def _without_file(spec: BlobSpec, path: Path, table: ChunkTable) -> int:
    """Publish that there is no cache file now. Front ends may go on with one that is deleted: nobody takes chunks out of it."""
    earlier = _earlier_segment(spec)
    try:
        old_view = earlier if earlier is not None and _is_there(path, earlier.identity) else None
        none = Identity(0, 0, table.uncompressed_size)
        return _publish(spec, table, none, bytearray(table.count), old_view)
    finally:
        if earlier is not None:
            earlier.close()


def _is_there(path: Path, identity: Identity) -> bool:
    """Whether the file that a segment speaks of may be at this path still."""
    try:
        st = os.stat(path)
    except FileNotFoundError:
        return not identity.ino
    except OSError:
        return True
    return not identity.ino or (st.st_dev, st.st_ino) == (identity.dev, identity.ino)


def _lock(fd: int, path: Path) -> None:
    """Wait for a data file's lock. Raises CacheError when somebody keeps it: the blob goes on without the file meanwhile."""
    try:
        map_file.lock(fd)
    except BlockingIOError as e:
        raise CacheError(f"cache file {path}: another process keeps its lock", errno.ENOBUFS) from e


def _check_others(spec: BlobSpec, fd: int, table: ChunkTable) -> None:
    """Raises CacheError when somebody uses the file with a table that contradicts ours: one would overwrite the other's."""
    facts = os.fstat(fd)
    found = [
        (segment.name, segment.inode, why)
        for segment in segments_of(facts.st_dev, facts.st_ino)
        if segment.name != spec.segment and (why := contradiction(segment, table))
    ]
    for name, inode, why in found:
        if not remove_if_gone(name, inode):
            raise CacheError(f"the metadata of another image, which uses it, differs: {why}", errno.ENOBUFS)


def _cookie(spec: BlobSpec, cookie: tuple[int, int], table: ChunkTable) -> int:
    """See what the kernel's file of the blob has, and publish that. Nothing else is believed: the kernel may empty it.

    What is there was checked, by the digest of an image that is bound or was: what none lists (UNLISTED) is never stored.
    """
    from workers.cookie import lent, survey

    where = f"blob {spec.info.blob_id}"
    if table.uncompressed_size > -(-spec.info.uncompressed_size // 4096) * 4096:
        raise FormatError(
            where, "uncompressed_size", f"{spec.info.uncompressed_size}, chunks end at {table.uncompressed_size}"
        )
    try:
        with lent(cookie) as fd:
            state = survey(fd, table, where)
    except OSError as e:
        raise CacheError(f"{where}: the kernel's cache file: {e.strerror}", e.errno) from e
    return _publish(spec, table, Identity(0, 0, table.uncompressed_size), state)


def _open_data(
    spec: BlobSpec, path: Path, table: ChunkTable, layout: bytes, opened: contextlib.ExitStack
) -> tuple[int, bool, Segment | None]:
    """The cache file, locked, of the right size now, and whether it was before: else nothing is in it. And our earlier segment.

    A file that was used and has another size is put aside, never made longer: front ends may still read it, believing the
    segment that spoke of it, and a hole there would give them zeros where a short file gives an error. All is closed with
    `opened`. Raises OSError, and CacheError when the file cannot be used now.
    """
    for _ in range(_TRIES):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        opened.callback(os.close, fd)
        _lock(fd, path)
        points.reach("prepare: data file locked")
        if not is_still(path, fd):
            continue
        earlier = _earlier_segment(spec)
        if earlier is not None:
            opened.callback(earlier.close)
        _check_others(spec, fd, table)
        # Before a byte can be written by this table: what the record says must stay true, whatever is killed when.
        if map_file.recorded_layout(spec.map_path) not in ("", layout.hex()):
            map_file.forget_layout(spec.map_path)
        st = os.fstat(fd)
        if st.st_size == table.uncompressed_size:
            return fd, True, earlier
        if not st.st_size and not any(True for _ in segments_of(st.st_dev, st.st_ino)):
            points.reach("prepare: data file made")
            os.ftruncate(fd, table.uncompressed_size)
            return fd, False, earlier
        bad = path.with_name(path.name + ".bad")
        expected = table.uncompressed_size
        log.warning("cache file %s has %d bytes, %d expected; renamed to %s", path, st.st_size, expected, bad.name)
        os.replace(path, bad)
    raise OSError(errno.EBUSY, "others keep replacing it")


def _judge(
    spec: BlobSpec, fd: int, whole: bool, table: ChunkTable, layout: bytes
) -> tuple[Identity, bytearray, _Taken]:
    """The cache file's identity, and the state of each chunk: what the stored map and other segments may be believed.

    And from which segments some of it was taken over.
    """
    identity = Identity.of(fd, table.uncompressed_size, layout)
    state = map_file.load(spec.map_path, table.count, identity)
    if not whole:
        if any(state):
            map_file.set_aside(spec.map_path, "the cache file that it speaks of is gone")
        return identity, bytearray(table.count), {}
    taken = _inherit(identity, state, table)
    if spec.always_verify:
        state = state.replace(bytes([READY]), bytes([VERIFY]))
    if any(state):
        records = list(RECORD.iter_unpack(table.records))
        dropped = map_file.drop_holes(fd, state, ((r[1], r[3]) for r in records), table.uncompressed_size)
        if dropped:
            map_file.set_aside(spec.map_path, f"the cache file lacks {dropped} chunks that it claims")
        for chunk, record in enumerate(records):
            if state[chunk] == VERIFY and not record[4] & CHECKABLE:
                state[chunk] = EMPTY
    return identity, state, taken


def _earlier_segment(spec: BlobSpec) -> Segment | None:
    """The blob's segment of a daemon that was killed before its last checkpoint, or of this one before it reopened."""
    try:
        return Segment.open(spec.segment)
    except FormatError as e:
        log.warning("%s; ignored", e)
        return None


def _inherit(identity: Identity, state: bytearray, table: ChunkTable) -> _Taken:
    """What segments of this same file know as ready: ours from before, and those of other images and daemons.

    Gives from which of them it is ready here, too; none if some of it may be lost: then it is looked for on the disk.
    """
    found: set[int] = set()
    taken: _Taken = {}
    value = READY
    for segment in segments_of(identity.dev, identity.ino):
        if segment.identity.file == identity.file:
            doubts = segment.doubts[0]  # first: what is doubted later is looked at once more
            if segment.is_doubtful:
                value = VERIFY  # who was killed over that may have heard that some of it was lost
            if ready := set(ready_in(segment, table)):
                found |= ready
                taken[segment.key] = doubts
    for chunk in found:
        state[chunk] = value
    return taken if value == READY else {}
