"""Blobs for tests: invented blob table entries and chunk information, and the blobs of the packed images, opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nydusd.formats import open_bootstrap
from nydusd.formats.blob_id import blob_id_from_path
from nydusd.formats.blob_meta import CiHeader
from nydusd.formats.model import (
    BlobFeature,
    BlobInfo,
    Bootstrap,
    ChunkRecord,
    Cipher,
    Compressor,
    Digester,
)
from nydusd.storage.backend import make_backend
from nydusd.storage.backend.base import BlobBackend
from nydusd.storage.cache.chunk_table import ChunkTable, build_from_ci, build_from_raw, build_tarfs
from nydusd.storage.cache.decode import ChunkDecoder
from nydusd.storage.cache.load import extract_bootstrap, load_ci
from nydusd.storage.cache.stored import fetch_range
from nydusd.storage.state.segment import RECORD
from tests.support import oracle

V2 = int(BlobFeature.CHUNK_INFO_V2)


def blob_info(
    *,
    features: int = int(BlobFeature.ALIGNED),
    chunk_count: int = 0,
    compressor: Compressor = Compressor.NONE,
    digester: Digester = Digester.SHA256,
    compressed_size: int = 0,
    uncompressed_size: int = 0,
    ci: bytes = b"",
    ci_offset: int = 0,
    ci_compressor: Compressor = Compressor.NONE,
    ci_compressed_size: int | None = None,
    key: bytes = b"",
    iv: bytes = b"",
) -> BlobInfo:
    """A blob table entry; sizes of the chunk information follow from `ci` unless it is stored compressed."""
    return BlobInfo(
        index=0,
        blob_id="b10b",
        features=features,
        chunk_size=1 << 20,
        chunk_count=chunk_count,
        compressor=compressor,
        digester=digester,
        cipher=Cipher.AES_128_XTS if key else Cipher.NONE,
        compressed_size=compressed_size,
        uncompressed_size=uncompressed_size,
        ci_compressor=ci_compressor,
        ci_offset=ci_offset,
        ci_compressed_size=len(ci) if ci_compressed_size is None else ci_compressed_size,
        ci_uncompressed_size=len(ci),
        toc_size=0,
        toc_digest=bytes(32),
        meta_digest=bytes(32),
        meta_size=0,
        prefetch_offset=0,
        prefetch_size=0,
        cipher_key=key,
        cipher_iv=iv,
        meta_blob_id="b10b",
    )


def header_for(info: BlobInfo, *, ctx_count: int = 0, ctx_size: int = 0) -> CiHeader:
    """The header that belongs to a blob table entry; contexts follow the 24-byte records."""
    return CiHeader(
        features=info.features,
        ci_compressor=info.ci_compressor,
        entries=info.chunk_count,
        ci_offset=info.ci_offset,
        ci_compressed_size=info.ci_compressed_size,
        ci_uncompressed_size=info.ci_uncompressed_size,
        ctx_offset=24 * info.chunk_count if ctx_count else 0,
        ctx_size=ctx_size or 40 * ctx_count,
        ctx_count=ctx_count,
    )


def records_of(table: ChunkTable) -> list[ChunkRecord]:
    return [ChunkRecord._make(fields) for fields in RECORD.iter_unpack(table.records)]


class OpenedBlob(NamedTuple):
    """One blob of a packed image with all that decoding it takes. `ci` is empty where the blob has none."""

    info: BlobInfo
    header: CiHeader | None
    ci: bytes
    table: ChunkTable
    records: list[ChunkRecord]
    stored: bytes

    def decoder(self) -> ChunkDecoder:
        def read_dict(offset: int, size: int) -> bytes:
            assert offset + size <= self.table.dict_size
            return self.ci[self.table.dict_offset + offset :][:size]

        return ChunkDecoder(self.info, read_dict)

    def digest(self, chunk: int) -> bytes:
        return bytes(self.table.digests[32 * chunk : 32 * chunk + 32])

    def decode(self, first: int, last: int, stored: bytes | None = None) -> list[tuple[int, bytes]]:
        """Decode chunks `first` to `last` from exactly the range that `fetch_range` names."""
        offset, length = fetch_range(self.records, self.table.contexts, first, last)
        data = memoryview(self.stored if stored is None else stored)[offset : offset + length]
        records: Sequence[ChunkRecord] = self.records[first : last + 1]
        decoded = self.decoder().decode_range(records, first, offset, data, self.digest, self.table.contexts)
        return [(chunk, bytes(plain)) for chunk, plain in decoded]


def open_image(name: str) -> tuple[Bootstrap, list[OpenedBlob]]:
    """The bootstrap and the blobs of a packed image, by the same steps that a daemon takes."""
    image = oracle.image(name)
    backend = make_backend("localfs", {"dir": str(image.blobs)})
    try:
        inlined = image.bootstrap.parent == image.blobs
        path_id = blob_id_from_path(str(image.bootstrap))
        if inlined:
            reader = backend.get_reader(path_id)
            raw = extract_bootstrap(reader.read, reader.blob_size(), path_id)
        else:
            raw = image.bootstrap.read_bytes()
        bootstrap = open_bootstrap(memoryview(raw), str(image.bootstrap), path_id, extracted=inlined)
        return bootstrap, [_open_blob(bootstrap, info, backend) for info in bootstrap.blobs]
    finally:
        backend.close()


def _open_blob(bootstrap: Bootstrap, info: BlobInfo, backend: BlobBackend) -> OpenedBlob:
    header, ci = None, b""
    if info.is_tarfs:
        table = build_tarfs(info)
    elif info.has_ci:
        header, ci = load_ci(info, backend.get_reader(info.meta_blob_id).read)
        table = build_from_ci(info, ci, header, bootstrap.raw_chunks())
    else:
        table = build_from_raw(info, bootstrap.raw_chunks())
    reader = backend.get_reader(info.blob_id)
    return OpenedBlob(info, header, ci, table, records_of(table), bytes(reader.read(0, reader.blob_size())))
