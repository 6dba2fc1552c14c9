"""Every chunk and every file of every packed image, decoded by the same steps that a daemon takes."""

from __future__ import annotations

import functools
import stat
from collections.abc import Iterator

import pytest

from nydusd.codec.digest import digest
from nydusd.errors import CorruptChunkError
from nydusd.formats.model import BlobFeature, Bootstrap, ChunkFlag, ChunkRecord
from nydusd.storage.backend import make_backend
from nydusd.storage.cache import decode
from nydusd.storage.cache.chunk_table import build_from_ci
from nydusd.storage.cache.decode import verify_chunk
from nydusd.storage.cache.load import load_digest_array, meta_file_bytes, parse_meta_file
from nydusd.storage.cache.stored import fetch_range
from tests.support import oracle
from tests.support.blobs import OpenedBlob, open_image

NAMES = [image.name for image in oracle.images()]


@pytest.fixture(scope="module", autouse=True)
def _are_forgotten() -> Iterator[None]:
    """They are large, and what runs after these tests in their process forks it."""
    yield
    opened.cache_clear()


@functools.cache
def opened(name: str) -> tuple[Bootstrap, list[OpenedBlob]]:
    return open_image(name)


def _files(bootstrap: Bootstrap) -> dict[bytes, int]:
    """Inode numbers of all regular files by path."""
    found: dict[bytes, int] = {}
    todo = [(bootstrap.root_ino, b"")]
    while todo:
        folder, prefix = todo.pop()
        for entry in bootstrap.readdir(folder, 0):
            if entry.name not in (b".", b".."):
                mode = bootstrap.inode(entry.ino).mode
                if stat.S_ISDIR(mode):
                    todo.append((entry.ino, prefix + entry.name + b"/"))
                elif stat.S_ISREG(mode):
                    found[prefix + entry.name] = entry.ino
    return found


@pytest.mark.parametrize("name", NAMES)
def test_files_have_the_contents_that_were_packed(name: str) -> None:
    bootstrap, blobs = opened(name)
    caches = []
    for blob in blobs:
        cache = bytearray(blob.table.uncompressed_size)
        for first in range(0, blob.table.count, 37):
            for chunk, plain in blob.decode(first, min(first + 36, blob.table.count - 1)):
                uoff = blob.records[chunk].uoff
                cache[uoff : uoff + len(plain)] = plain
        assert len(cache) == blob.table.uncompressed_size
        caches.append(cache)
    expected = oracle.truth(name)
    files = _files(bootstrap)
    assert files.keys() == expected.keys()
    for path, ino in files.items():
        extents = bootstrap.extents(ino, 0, bootstrap.inode(ino).size)
        content = b"".join(caches[e.blob][e.uoff + e.offset : e.uoff + e.offset + e.length] for e in extents)
        assert content == expected[path], path


@pytest.mark.parametrize("name", NAMES)
def test_each_chunk_decodes_alone_and_has_its_digest(name: str) -> None:
    _, blobs = opened(name)
    for blob in blobs:
        for chunk, record in enumerate(blob.records):
            ((got, plain),) = blob.decode(chunk, chunk)
            assert got == chunk and len(plain) == record.usize
            if blob.info.is_tarfs:
                assert record.flags == 0
            else:
                assert record.flags & ChunkFlag.DIGEST
                assert digest(blob.info.digester, plain) == blob.digest(chunk)


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_in_the_blob_never_gives_wrong_bytes(name: str) -> None:
    _, blobs = opened(name)
    for blob in blobs:
        if blob.info.is_tarfs:
            continue  # nothing in such an image could tell
        for chunk in range(0, blob.table.count, 29):
            ((_, good),) = blob.decode(chunk, chunk)
            offset, length = fetch_range(blob.records, blob.table.contexts, chunk, chunk)
            damaged = bytearray(blob.stored)
            damaged[offset + length // 2] ^= 0x10
            try:
                ((_, plain),) = blob.decode(chunk, chunk, bytes(damaged))
            except CorruptChunkError as error:
                assert error.chunk == chunk and error.blob_id == blob.info.blob_id
            else:
                assert plain == good  # the bit belongs to a neighbour in the same batch or context, or to padding


@pytest.mark.parametrize("name", NAMES)
def test_meta_file_round_trip(name: str) -> None:
    _, blobs = opened(name)
    for blob in blobs:
        if blob.header is not None:
            content = meta_file_bytes(blob.header, blob.ci)
            assert parse_meta_file(content, blob.info, "meta") == (blob.header, blob.ci)


def test_images_cover_every_kind_of_chunk() -> None:
    flags = {record.flags for name in NAMES for blob in opened(name)[1] for record in blob.records}
    seen = functools.reduce(lambda a, b: a | b, flags)
    assert seen == functools.reduce(lambda a, b: a | b, ChunkFlag) & ~ChunkFlag.UNLISTED


def test_batches_and_contexts_are_decoded_once_for_their_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (("v6-batch", "decoder_for"), ("v6-targz-ref", "inflate_context")):
        (blob,) = opened(name)[1]
        real = getattr(decode, function)
        calls: list[object] = []

        def counted(*args: object, real: object = real, calls: list[object] = calls) -> object:
            calls.append(args)
            assert callable(real)
            return real(*args)

        monkeypatch.setattr(decode, function, counted)
        grouped = ChunkFlag.BATCH | ChunkFlag.ZRAN
        units = {record.ctx for record in blob.records if record.flags & grouped}
        alone = sum(not record.flags & grouped for record in blob.records)
        blob.decode(0, blob.table.count - 1)
        assert 0 < len(calls) <= len(units) + alone < blob.table.count


@pytest.mark.parametrize("name", ["v6-toc", "v6-inline"])
def test_digest_array_of_the_blob_agrees_with_the_bootstrap(name: str) -> None:
    bootstrap, (blob,) = opened(name)
    assert blob.info.features & BlobFeature.INLINED_CHUNK_DIGEST
    backend = make_backend("localfs", {"dir": str(oracle.image(name).blobs)})
    reader = backend.get_reader(blob.info.meta_blob_id)
    array = load_digest_array(blob.info, reader.read, reader.blob_size())
    backend.close()
    assert array == blob.table.digests
    assert blob.header is not None
    alone = build_from_ci(blob.info, blob.ci, blob.header, (), array)
    both = build_from_ci(blob.info, blob.ci, blob.header, bootstrap.raw_chunks(), array)
    assert alone.digests == both.digests == blob.table.digests and both.records == blob.table.records


def test_cached_bytes_are_verified_by_digest_or_crc() -> None:
    (blob,) = opened("v6-zstd-blake3")[1]
    record, known = blob.records[0], blob.digest(0)
    ((_, plain),) = blob.decode(0, 0)
    wrong = bytes([plain[0] ^ 1]) + plain[1:]
    assert verify_chunk(blob.info, record, known, plain)
    assert not verify_chunk(blob.info, record, known, wrong)
    assert not verify_chunk(blob.info, record, known, plain[:-1])
    crc_only = ChunkRecord(*record[:4], record.flags & ~ChunkFlag.DIGEST, *record[5:])
    assert crc_only.flags & ChunkFlag.CRC
    assert verify_chunk(blob.info, crc_only, None, plain)
    assert not verify_chunk(blob.info, crc_only, None, wrong)
    nothing = record._replace(flags=0)
    assert not verify_chunk(blob.info, nothing, None, plain)
