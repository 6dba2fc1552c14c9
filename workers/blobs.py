"""What a worker keeps open from job to job: for each blob its spec, segment, backend reader and cache file.

A spec comes with the first job of a blob, and again when the supervisor has opened the blob anew (a higher generation).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from nydusd.errors import CacheError, FormatError, InternalError, ScarceError, StaleCacheError, comes_of_want
from nydusd.ipc.arena import Arena
from nydusd.ipc.messages import Json
from nydusd.storage.backend import make_backend
from nydusd.storage.backend.base import BlobBackend, BlobReader
from nydusd.storage.cache.spec import BlobSpec
from nydusd.storage.state.segment import Segment

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILING = (errno.EIO, errno.EROFS, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA, errno.EREMOTEIO, errno.ETIMEDOUT)
_AWAY = (errno.ENODEV, errno.ENXIO, errno.ENOLINK, errno.ESTALE, errno.ENOTCONN, errno.ECONNABORTED, errno.EHOSTDOWN)
NO_ROOM = (*_FULL, *_FAILING, *_AWAY, errno.ENOBUFS)
"""Why a disk takes nothing: then reads go on without it. ENOBUFS is ours: another process keeps the file to itself."""
_LIMIT = 256
"""Blobs kept open at most; one unused for longer is closed, and opened again when needed."""


def map_bootstrap(path: str) -> memoryview:
    """The bytes of a metadata file; unmapped when the last view on them is gone. Raises FormatError.

    A worker looks at a part of it once, so it is mapped and not read. If somebody makes the file shorter meanwhile, SIGBUS
    ends the worker: its job goes to another, and is given up with an error after a few, as for any job that kills workers.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
        finally:
            os.close(fd)
    except (OSError, ValueError) as e:  # ValueError: the file is empty
        raise FormatError(path, "bootstrap", f"cannot be mapped: {e}") from e


class OpenBlob:
    """One blob as a worker uses it; everything but the spec is opened when first needed."""

    def __init__(self, spec: BlobSpec, backend: Callable[[BlobSpec], BlobBackend]) -> None:
        self.spec = spec
        self._backend = backend
        self._segment: Segment | None = None
        self._fd = -1
        self.scratch: dict[str, object] = {}

    def reader(self, meta: bool = False) -> BlobReader:
        """Reader of the data blob, or of the object that holds the metadata."""
        return self._backend(self.spec).get_reader(self.spec.info.meta_blob_id if meta else self.spec.info.blob_id)

    @property
    def segment(self) -> Segment:
        if self._segment is None:
            segment = Segment.open(self.spec.segment)
            if segment is None:
                raise InternalError(f"segment {self.spec.segment} of blob {self.spec.info.blob_id} is not there")
            if segment.generation != self.spec.generation:
                segment.close()
                raise StaleCacheError(f"segment {self.spec.segment} is not of generation {self.spec.generation}")
            self._segment = segment
        return self._segment

    def meta_paths(self) -> list[Path]:
        """Where the chunk information may lie: the cache folder, else the run-time folder (cache folder full)."""
        name = self.spec.meta_path.name
        return list(dict.fromkeys([self.spec.meta_path, Path(self.spec.meta_dir) / name]))

    def read_ci(self, offset: int, size: int) -> bytes:
        """Bytes of the uncompressed chunk information: the dictionaries of zran contexts."""
        for path in self.meta_paths():
            try:
                with open(path, "rb") as f:
                    f.seek(offset)
                    data = f.read(size)
            except OSError as e:
                if comes_of_want(e):
                    raise ScarceError(f"blob metadata {path}: {e.strerror}", e.errno) from e
                continue
            if len(data) == size:
                return data
        raise StaleCacheError(f"blob metadata {self.spec.meta_path} is gone or was truncated")

    def data_fd(self) -> int:
        """The cache file, open for writing. Raises StaleCacheError when it is not what the segment speaks of."""
        path = self.spec.data_path
        if path is None:
            raise InternalError(f"blob {self.spec.info.blob_id} has no cache file")
        identity = self.segment.identity
        try:
            if self._fd < 0:
                self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                if not identity.is_of(self._fd):
                    raise FileNotFoundError
            st = os.stat(path)
        except FileNotFoundError:
            wrong = "was replaced or deleted"
        except OSError as e:
            self.close()  # it may be open and not have been compared
            raise CacheError(f"cache file {path}: {e.strerror}", e.errno) from e
        else:
            if (st.st_dev, st.st_ino) == (identity.dev, identity.ino) and st.st_size >= identity.size:
                return self._fd
            wrong = "was replaced" if st.st_ino != identity.ino else f"was cut off at {st.st_size} bytes"
        self.close()
        raise StaleCacheError(f"cache file {path} {wrong}")

    def close(self) -> None:
        self.scratch.clear()
        if self._segment is not None:
            self._segment.close()
            self._segment = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class OpenBlobs:
    """All blobs that this worker has met, by handle. `shared_fd`: what fetch workers share, see `make_backend`."""

    def __init__(self, shared_fd: int = -1) -> None:
        self._shared_fd = shared_fd
        self._arenas: dict[str, Arena] = {}
        self._blobs: dict[int, OpenBlob] = {}
        self._backends: dict[str, BlobBackend] = {}

    def learn(self, job: Json) -> None:
        """Let go of blobs that no image uses any more, as a job tells; take over the spec that it brings, if it brings one."""
        for handle in job.get("forget", ()):
            if (gone := self._blobs.pop(handle, None)) is not None:
                gone.close()
                self._leave_backend(gone.spec)
        raw = job.get("spec")
        if raw is None:
            return
        spec = BlobSpec.from_json(raw)
        old = self._blobs.pop(spec.handle, None)
        self._blobs[spec.handle] = OpenBlob(spec, self._backend)
        if old is not None:
            old.close()
            self._leave_backend(old.spec)

    def _leave_backend(self, spec: BlobSpec) -> None:
        """Close the backend of a blob that is gone if no blob has its settings any more; else what it keeps open for it."""
        key = _settings(spec)
        if key not in self._backends:
            return
        if all(_settings(blob.spec) != key for blob in self._blobs.values()):
            self._backends.pop(key).close()
            return
        names = {spec.info.blob_id, spec.info.meta_blob_id}
        for blob in self._blobs.values():
            names -= {blob.spec.info.blob_id, blob.spec.info.meta_blob_id}
        for name in names:
            self._backends[key].let_go(name)

    def _backend(self, spec: BlobSpec) -> BlobBackend:
        """Made when it is first read from: a decompress worker needs none for a remote blob, and could not log in."""
        key = _settings(spec)
        if key not in self._backends:
            self._backends[key] = make_backend(spec.backend, spec.backend_config, self._shared_fd)
        return self._backends[key]

    def arena(self, name: str) -> Arena:
        """An arena of the supervisor's, which makes each of them once. Raises CacheError."""
        arena = self._arenas.get(name)
        if arena is None:
            arena = self._arenas[name] = Arena.open(name)
        return arena

    def take_routes(self) -> dict[str, int]:
        """Bytes that came from backends since the last call, by the way on which they came."""
        found: Counter[str] = Counter()
        for backend in self._backends.values():
            found.update(backend.metrics.route_bytes)
            backend.metrics.route_bytes.clear()
        return dict(found)

    def connections(self) -> dict[str, int]:
        """Connections that are open now, by host."""
        found: dict[str, int] = {}
        for backend in self._backends.values():
            for host, number in backend.connections().items():
                found[host] = found.get(host, 0) + number
        return found

    def let_go(self) -> None:
        """Close what is kept open to be at hand; it is opened again when it is needed."""
        for blob in self._blobs.values():
            blob.close()
        for backend in self._backends.values():
            backend.close_readers()
        for arena in self._arenas.values():
            arena.close()
        self._arenas.clear()

    def close(self) -> None:
        """Give everything back; nothing of it may be used afterwards."""
        for blob in self._blobs.values():
            blob.close()
        for backend in self._backends.values():
            backend.close()
        for arena in self._arenas.values():
            arena.close()
        self._blobs.clear()
        self._backends.clear()
        self._arenas.clear()

    def get(self, job: Json) -> OpenBlob:
        blob = self._blobs.pop(job["handle"], None)
        if blob is None:
            raise InternalError(f"job for blob {job['handle']}, whose spec this worker was not given")
        self._blobs[job["handle"]] = blob
        if len(self._blobs) > _LIMIT:
            list(self._blobs.values())[-_LIMIT - 1].close()
        return blob


def _settings(spec: BlobSpec) -> str:
    """What tells backends apart."""
    return repr((spec.backend, sorted(spec.backend_config.items(), key=lambda item: item[0])))
