"""The job `prepare`: make a blob ready to be used. Runs in a fetch worker, because it does I/O and parses hostile bytes.

Gets the chunk information (from the cache folder, else from the backend), builds the normalised chunk table, opens
or makes the cache file, judges the stored chunk map, and publishes all that as the blob's segment. Killed at any
point it leaves nothing that a reader could see: files are renamed into place, the segment appears whole.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from nydusd.errors import CacheError, FormatError
from nydusd.formats import open_bootstrap
from nydusd.formats.blob_meta import CiHeader
from nydusd.formats.model import ChunkFlag, RawChunk
from nydusd.ipc.messages import Json
from nydusd.storage.cache.chunk_table import ChunkTable, build_from_ci, build_from_raw, build_tarfs
from nydusd.storage.cache.load import load_ci, meta_file_bytes, parse_meta_file
from nydusd.storage.cache.spec import BlobSpec
from nydusd.storage.state import map_file
from nydusd.storage.state.segment import EMPTY, READY, RECORD, VERIFY, Identity, Segment, boot_id
from workers.blobs import OpenBlob, OpenBlobs

log = logging.getLogger(__name__)

_CHECKABLE = int(ChunkFlag.DIGEST | ChunkFlag.CRC)


def prepare(blobs: OpenBlobs, job: Json) -> Json:
    """Build and publish the segment. Answer: chunk count, bytes of cache file, chunks ready."""
    blob = blobs.get(job)
    spec = blob.spec
    table = _chunk_table(blob)
    if spec.data_path is None:
        identity, state = Identity(0, 0, table.uncompressed_size), bytearray(table.count)
    else:
        identity, state = _cache_file(spec, spec.data_path, table)
    segment = Segment.create(
        spec.segment,
        generation=spec.generation,
        identity=identity,
        records=bytes(table.records),
        digests=bytes(table.digests),
        contexts=bytes(table.contexts),
        dict_offset=table.dict_offset,
        dict_size=table.dict_size,
        state=bytes(state),
    )
    segment.close()
    return {"count": table.count, "size": table.uncompressed_size, "ready": state.count(READY)}


def _raw_chunks(spec: BlobSpec) -> Iterator[RawChunk]:
    """This blob's records of the bootstrap's chunk table."""
    with open(spec.bootstrap, "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        view = memoryview(mapping)
        try:
            image = open_bootstrap(view, spec.bootstrap, spec.path_id, extracted=spec.extracted)
            yield from (c for c in image.raw_chunks() if c.blob_index == spec.info.index)
        finally:
            # Cells of the parser may still hold slices; the mapping goes with them.
            view.release()


def _chunk_table(blob: OpenBlob) -> ChunkTable:
    info = blob.spec.info
    if info.is_tarfs:
        return build_tarfs(info)
    raw: Iterable[RawChunk] = list(_raw_chunks(blob.spec))
    if info.has_ci:
        header, ci = _chunk_information(blob)
        return build_from_ci(info, ci, header, raw)
    return build_from_raw(info, raw)


def _chunk_information(blob: OpenBlob) -> tuple[CiHeader, bytes]:
    """The chunk information, from `<id>.blob.meta` if that is whole, else from the backend."""
    spec = blob.spec
    limit = spec.info.ci_uncompressed_size + 3 * 4096
    for path in blob.meta_paths():
        try:
            with open(path, "rb") as f:
                return parse_meta_file(f.read(limit), spec.info, str(path))
        except FileNotFoundError:
            continue
        except FormatError as e:
            log.warning("%s; fetching it again", e)
    header, ci = load_ci(spec.info, blob.reader(meta=True).read)
    content = meta_file_bytes(header, ci)
    error: OSError | None = None
    for path in blob.meta_paths():
        try:
            _write_whole(path, content)
            return header, ci
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                raise CacheError(f"{path}: {e.strerror}", e.errno) from e
            log.warning("%s: %s", path, e.strerror)
            error = e
    raise CacheError(f"blob metadata of {spec.info.blob_id} could not be stored: {error}")


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is either absent or complete, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _cache_file(spec: BlobSpec, path: Path, table: ChunkTable) -> tuple[Identity, bytearray]:
    """Open or make the cache file and tell what is in it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise CacheError(f"cache file {path}: {e.strerror}", e.errno) from e
    try:
        size = table.uncompressed_size
        present = os.fstat(fd).st_size
        if present > size:
            os.close(fd)
            bad = path.with_name(path.name + ".bad")
            log.warning("cache file %s has %d bytes, %d expected; renamed to %s", path, present, size, bad.name)
            os.replace(path, bad)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        identity = Identity.of(fd, size)
        state = map_file.load(spec.map_path, table.count, identity)
        if spec.always_verify:
            state = state.replace(bytes([READY]), bytes([VERIFY]))
        _inherit(spec, identity, state)
        if any(state):
            records = list(RECORD.iter_unpack(table.records))
            dropped = map_file.drop_holes(fd, state, ((r[1], r[3]) for r in records), size)
            if dropped:
                log.warning("cache file %s lacks %d chunks that its map claims; they are fetched again", path, dropped)
            for chunk, record in enumerate(records):
                if state[chunk] == VERIFY and not record[4] & _CHECKABLE:
                    state[chunk] = EMPTY
        return identity, state
    except OSError as e:
        raise CacheError(f"cache file {path}: {e.strerror}", e.errno) from e
    finally:
        os.close(fd)


def _inherit(spec: BlobSpec, identity: Identity, state: bytearray) -> None:
    """Chunks that an earlier segment of this same file knows as ready are ready: it saw their writes return.

    That segment is the one of a daemon that was killed before its last checkpoint, or of this one before it reopened.
    """
    try:
        old = Segment.open(spec.segment)
    except FormatError as e:
        log.warning("%s; ignored", e)
        return
    if old is None:
        return
    if old.identity == identity and old.count == len(state) and old.boot_id == boot_id():
        for chunk, value in enumerate(bytes(old.state)):
            if value == READY:
                state[chunk] = READY
    old.close()
