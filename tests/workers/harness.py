"""`Jobs`: the jobs of workers called in this process, for one packed image, without a supervisor."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from nydusd.formats import open_bootstrap
from nydusd.formats.blob_id import blob_id_from_path
from nydusd.formats.model import BlobFeature, Bootstrap, Extent
from nydusd.ipc.arena import PAGE, Arena
from nydusd.ipc.messages import Json, decode, encode
from nydusd.storage.api.device import BlobDevice
from nydusd.storage.backend import make_backend
from nydusd.storage.cache.load import extract_bootstrap
from nydusd.storage.cache.meta_info import BlobMetaInfo
from nydusd.storage.cache.spec import BlobSpec
from nydusd.storage.state.names import names, remove
from nydusd.storage.state.segment import Segment
from tests.support import oracle
from tests.support.segments import segment_name
from workers.blobs import OpenBlobs
from workers.checkpoint import checkpoint
from workers.fill import fill
from workers.prepare import prepare

PLAIN = "v6-lz4-sha256"
UNPADDED = "v5-lz4-sha256"
"""Its last chunk ends where the cache file does."""


class Jobs:
    """One image with one blob. `blobs` is a copy of its blob folder, for tests to damage; `work_dir` the cache folder."""

    def __init__(self, name: str, folder: Path, prefix: str, *, verify: bool = False, cached: bool = True) -> None:
        self.image = oracle.image(name)
        self.folder = folder
        self.blobs = folder / "blobs"
        shutil.copytree(self.image.blobs, self.blobs)
        self.work_dir = folder / "cache"
        self.meta_dir = folder / "run"
        self.work_dir.mkdir()
        self.meta_dir.mkdir()
        self.prefix = prefix
        self.extracted = self.image.bootstrap.parent == self.image.blobs
        self.path_id = blob_id_from_path(str(self.image.bootstrap))
        self.bootstrap_file = folder / "bootstrap"
        self.bootstrap_file.write_bytes(self._metadata())
        self.bootstrap: Bootstrap = open_bootstrap(
            memoryview(self.bootstrap_file.read_bytes()), name, self.path_id, extracted=self.extracted
        )
        (self.info,) = self.bootstrap.blobs
        self.generation = 1
        self.verify = verify
        self.cached = cached
        self.open = OpenBlobs()

    def _metadata(self) -> bytes:
        if not self.extracted:
            return self.image.bootstrap.read_bytes()
        backend = make_backend("localfs", {"dir": str(self.image.blobs)})
        reader = backend.get_reader(self.path_id)
        content = extract_bootstrap(reader.read, reader.blob_size(), self.path_id)
        backend.close()
        return content

    @property
    def spec(self) -> BlobSpec:
        return BlobSpec(
            handle=7,
            generation=self.generation,
            info=self.info,
            segment=self.prefix,
            work_dir=str(self.work_dir) if self.cached else None,
            meta_dir=str(self.meta_dir),
            bootstrap=str(self.bootstrap_file),
            path_id=self.path_id,
            extracted=self.extracted,
            backend="localfs",
            backend_config={"dir": str(self.blobs)},
            always_verify=self.verify,
        )

    @property
    def data(self) -> Path:
        assert self.spec.data_path is not None
        return self.spec.data_path

    @property
    def blob(self) -> Path:
        """The stored blob."""
        return self.blobs / self.info.blob_id

    def job(self, **fields: object) -> Json:
        """A job as it arrives: through JSON, with the spec."""
        return decode(encode({"handle": 7, "spec": self.spec.to_json(), **fields}))

    def _take(self, **fields: object) -> Json:
        """A job of which this worker has the spec already, unless it has not."""
        job = self.job(**fields)
        known = self.open._blobs.get(7)
        if known is None or known.spec != self.spec:
            self.open.learn(job)
        return job

    def prepare(self) -> Json:
        return prepare(self.open, self._take())

    def fill(
        self,
        chunks: Sequence[int],
        verify: Sequence[int] = (),
        slot: Json | None = None,
        source: Json | None = None,
    ) -> Json:
        return fill(self.open, self._take(chunks=list(chunks), verify=list(verify), slot=slot, source=source))

    def checkpoint(self) -> Json:
        return checkpoint(self.open, self._take())

    def fill_all(self) -> list[Json]:
        """Every chunk, in jobs as the supervisor cuts them."""
        with self.segment() as segment:
            parts = BlobMetaInfo(segment).split(range(segment.count), 512 << 10)
        return [self.fill(part) for part in parts]

    @contextlib.contextmanager
    def segment(self) -> Iterator[Segment]:
        opened = Segment.open(self.prefix)
        assert opened is not None
        yield opened
        opened.close()

    def states(self) -> list[int]:
        with self.segment() as segment:
            return list(segment.state)

    def new_daemon(self, *, same_boot: bool = False) -> None:
        """All processes are gone, and the shared memory too unless they were killed in `same_boot`."""
        self.close()
        self.open = OpenBlobs()
        self.generation = 1
        if not same_boot:
            for name in names(self.prefix[1:]):
                remove(name)

    def device(self) -> BlobDevice:
        data = str(self.data) if self.cached else None
        return BlobDevice.from_spec(
            [{"blob_id": self.info.blob_id, "handle": 7, "segment": self.prefix, "data": data}], 0
        )

    def files(self) -> dict[bytes, int]:
        """Inodes of all regular files by path."""
        found: dict[bytes, int] = {}
        todo = [(self.bootstrap.root_ino, b"")]
        while todo:
            directory, path = todo.pop()
            for entry in self.bootstrap.readdir(directory, 0):
                if entry.name in (b".", b".."):
                    continue
                kind = self.bootstrap.inode(entry.ino).mode & 0o170000
                if kind == 0o040000:
                    todo.append((entry.ino, path + entry.name + b"/"))
                elif kind == 0o100000:
                    found[path + entry.name] = entry.ino
        return found

    def wrong_files(self) -> list[bytes]:
        """Files that a front end cannot read completely, or reads otherwise than they were packed."""
        wrong = []
        truth = oracle.truth(self.image.name)
        device = self.device()
        for path, ino in self.files().items():
            vec = self.bootstrap.extents(ino, 0, self.bootstrap.inode(ino).size)
            buf = bytearray(sum(extent.length for extent in vec))
            if device.missing(vec):
                wrong.append(path)
                continue
            with memoryview(buf) as view:
                device.read_into(vec, view)
            if buf != truth[path]:
                wrong.append(path)
        device.close()
        return wrong

    def is_checkable(self) -> bool:
        return not self.info.features & BlobFeature.TARFS

    def close(self) -> None:
        self.open.close()


def flip(path: Path, at: int) -> None:
    """Damage the byte there."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x55]))


def stored_at(image: Jobs, chunk: int) -> tuple[int, int]:
    """Where the blob has the chunk: offset and size."""
    with image.segment() as segment:
        record = segment.record(chunk)
    return record.coff, record.csize


def an_extent(image: Jobs, chunk: int) -> Extent:
    """All of the chunk."""
    with image.segment() as segment:
        record = segment.record(chunk)
    return Extent(0, chunk, record.uoff, 0, record.usize, record.usize)


@contextlib.contextmanager
def jobs(name: str, folder: Path, *, verify: bool = False, cached: bool = True) -> Iterator[Jobs]:
    """The jobs of an image; leaves no shared memory and no descriptor."""
    with segment_name() as prefix:
        made = Jobs(name, folder, prefix, verify=verify, cached=cached)
        try:
            yield made
        finally:
            made.close()


@contextlib.contextmanager
def slot_of(length: int) -> Iterator[tuple[Arena, Json]]:
    """An arena whose second page on is a job's slot of `length` bytes."""
    with segment_name() as name:
        arena = Arena.create(name, PAGE + length)
        yield arena, {"arena": name, "offset": PAGE, "length": length}
        arena.close()


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes mounted at `folder`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "nydusd-test", str(folder)], check=True)
    try:
        yield folder
    finally:
        assert ctypes.CDLL(None).umount2(os.fsencode(folder), 2) == 0
