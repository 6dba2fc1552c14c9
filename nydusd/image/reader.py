"""An image opened for reading: its metadata, and the plain content of its files, straight from the blobs.

Runs in the process of the command (check, unpack, export, compact) and needs no daemon and no cache. Everything that is
read is verified by the digest or checksum that the image has for it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from nydusd.formats import BootstrapKind, detect, open_bootstrap
from nydusd.formats.blob_id import blob_id_from_path
from nydusd.formats.chunk_info import CHUNK_INFO
from nydusd.formats.model import BlobFeature, BlobInfo, Bootstrap, ChunkFlag, ChunkRecord, RawChunk
from nydusd.image.errors import ImageError
from nydusd.storage.backend.base import BlobBackend
from nydusd.storage.cache.chunk_table import ChunkTable, build_from_ci, build_from_raw, build_tarfs
from nydusd.storage.cache.decode import ChunkDecoder
from nydusd.storage.cache.load import extract_bootstrap, load_ci, load_digest_array
from nydusd.storage.cache.stored import fetch_range
from nydusd.storage.state.segment import RECORD

_GROUPED = ChunkFlag.BATCH | ChunkFlag.ZRAN
_KEPT_BYTES = 32 << 20
_RUN_BYTES = 1 << 20
_RUN_CHUNKS = 4096
"""Chunks that nothing describes have no bytes, and a blob may have any number of them."""


_HEAD = 4096
_MAX_METADATA = 4 << 30
"""It is read into memory. 4 million files need about 1 GiB."""


def load_metadata(path: Path) -> tuple[bytes, Bootstrap]:
    """The bytes of the metadata in the file, which may be a blob with the metadata inside, and its parser.

    Raises `ImageError` for a file that cannot be read, `FormatError` for one that holds no image.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HEAD)
            inlined = detect(memoryview(head)) is BootstrapKind.BLOB
            if not inlined and size > _MAX_METADATA:
                raise ImageError(f"{path}: metadata of {size} bytes; at most {_MAX_METADATA} are read")
            if not inlined:
                data = head + file.read()
            else:
                data = extract_bootstrap(
                    lambda offset, length: os.pread(file.fileno(), length, offset), size, str(path)
                )
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    return data, open_bootstrap(memoryview(data), str(path), blob_id_from_path(str(path)), extracted=inlined)


class BlobReader:
    """The chunks of one blob. Plain chunks that were just read are kept, up to 32 MiB."""

    def __init__(self, raw_chunks: Iterable[RawChunk], info: BlobInfo, backend: BlobBackend) -> None:
        """Reads and checks the chunk information. `raw_chunks` are what the metadata says of the blob's chunks.

        Raises `FormatError` and `BackendError`."""
        self.info = info
        self._reader = backend.get_reader(info.blob_id)
        ci = b""
        if info.is_tarfs:
            self.table: ChunkTable = build_tarfs(info)
        elif info.has_ci:
            meta = backend.get_reader(info.meta_blob_id)
            header, ci = load_ci(info, meta.read)
            digests = None
            if info.features & BlobFeature.INLINED_CHUNK_DIGEST:
                digests = load_digest_array(info, meta.read, meta.blob_size())
            self.table = build_from_ci(info, ci, header, raw_chunks, digests)
        else:
            self.table = build_from_raw(info, raw_chunks)
        dictionaries = self.table.dict_offset
        self._decoder = ChunkDecoder(info, lambda offset, size: ci[dictionaries + offset :][:size])
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._kept_bytes = 0

    def record(self, chunk: int) -> ChunkRecord:
        return ChunkRecord._make(RECORD.unpack_from(self.table.records, chunk * RECORD.size))

    def digest(self, chunk: int) -> bytes:
        return bytes(self.table.digests[32 * chunk : 32 * chunk + 32])

    def described(self) -> Iterator[int]:
        """The chunks that have bytes, in order."""
        for chunk, (_, _, _, usize, *_) in enumerate(RECORD.iter_unpack(self.table.records)):
            if usize:
                yield chunk

    def plain(self, chunk: int) -> bytes:
        """The bytes of a chunk. Raises `CorruptChunkError` for what is not what the image promises."""
        found = self._kept.get(chunk)
        if found is None:
            self._load(chunk)
            found = self._kept[chunk]
        return found

    def stored_and_plain(self, chunk: int) -> tuple[bytes, bytes]:
        """A chunk as it is stored, and its bytes. Of no use for chunks of batches and contexts."""
        record = self.record(chunk)
        stored = bytes(self._reader.read(record.coff, record.csize))
        ((_, plain),) = self._decoder.decode_range([record], chunk, record.coff, memoryview(stored), self.digest, b"")
        return stored, bytes(plain)

    def size(self) -> int:
        """Length of the stored blob. Raises `BackendError`."""
        return self._reader.blob_size()

    def _load(self, first: int) -> None:
        """Decode a chunk and those behind it that come with it: of its batch or context, or stored next to it."""
        begin = self.record(first)
        records = [begin]
        low, high, plain_bytes = begin.coff, begin.coff + begin.csize, begin.usize
        while first + len(records) < self.table.count and len(records) < _RUN_CHUNKS:
            follower = self.record(first + len(records))
            # Neighbours may be far apart in a hostile blob, and a few stored bytes may be much.
            low, high = min(low, follower.coff), max(high, follower.coff + follower.csize)
            plain_bytes += follower.usize
            if plain_bytes > _KEPT_BYTES:
                break
            if begin.flags & _GROUPED:
                if not follower.flags & _GROUPED or follower.ctx != begin.ctx:
                    break
            elif follower.flags & _GROUPED or high - low > _RUN_BYTES:
                break
            records.append(follower)
        offset, length = fetch_range(records, self.table.contexts, 0, len(records) - 1)
        data = memoryview(self._reader.read(offset, length)) if length else memoryview(b"")
        decoded = self._decoder.decode_range(records, first, offset, data, self.digest, self.table.contexts)
        while self._kept_bytes > _KEPT_BYTES:
            _, old = self._kept.popitem(last=False)
            self._kept_bytes -= len(old)
        for chunk, plain in decoded:
            if chunk not in self._kept:
                self._kept[chunk] = bytes(plain)
                self._kept_bytes += len(plain)


class ImageReader:
    """An image and its blobs, opened as they are needed. `with ImageReader(...) as reader:` closes the backend."""

    def __init__(self, path: Path, backend: BlobBackend | None) -> None:
        """Raises `ImageError` or `FormatError`. Without a backend only the metadata can be read."""
        self.data, self.bootstrap = load_metadata(path)
        self._backend = backend
        self._blobs: dict[int, BlobReader] = {}
        self._chunks: dict[int, bytearray] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._backend is not None:
            self._backend.close()

    def blob(self, index: int) -> BlobReader:
        """A blob by its place in the blob table."""
        found = self._blobs.get(index)
        if found is None:
            if self._backend is None:
                raise ImageError("the data of the image is needed: name its blobs (--blob-dir or a backend)")
            info = self.bootstrap.blobs[index]
            found = self._blobs[index] = BlobReader(self._chunks_of(info), info, self._backend)
        return found

    def _chunks_of(self, info: BlobInfo) -> Iterator[RawChunk]:
        """What the metadata says of a blob's chunks: it is gone through once for all blobs."""
        if self._chunks is None:
            self._chunks = {}
            for chunk in self.bootstrap.raw_chunks():
                self._chunks.setdefault(chunk.blob_index, bytearray()).extend(CHUNK_INFO.pack(*chunk))
        return map(RawChunk._make, CHUNK_INFO.iter_unpack(self._chunks.get(info.index, b"")))

    def let_go(self, index: int) -> None:
        """What is known of a blob is not needed any more: it may be much, for each of them."""
        self._blobs.pop(index, None)

    def content(self, ino: int) -> Iterator[bytes]:
        """The bytes of a regular file, in pieces."""
        size = self.bootstrap.inode(ino).size
        step = self.bootstrap.chunk_size
        for offset in range(0, size, step):
            for extent in self.bootstrap.extents(ino, offset, min(step, size - offset)):
                plain = self.blob(extent.blob).plain(extent.chunk)
                yield plain[extent.offset : extent.offset + extent.length]
