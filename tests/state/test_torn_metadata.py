"""Blob metadata that was torn at any byte: each field of its header, a record of each kind, a context of each kind, a TOC.

What is read of it is refused by name, is the same as before, or is another table than the one that the chunk map was stored
for, which has it fetched anew. What another table still gives is right: never a wrong byte. A v5 blob has no metadata of its
own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from nydusd.errors import CorruptChunkError, FormatError, UnsupportedError
from nydusd.formats import open_bootstrap, toc
from nydusd.formats.blob_meta import CI_HEADER_SIZE, CONTEXT_SIZE, align_page, record_size, zran_context
from nydusd.formats.model import BlobFeature, ChunkFlag, RawChunk
from nydusd.formats.tar_header import TAR_HEADER_SIZE
from nydusd.storage.cache.chunk_table import ChunkTable, build_from_ci
from nydusd.storage.cache.load import extract_bootstrap, load_ci, load_digest_array, meta_file_bytes, parse_meta_file
from nydusd.storage.cache.stored import fetch_range
from tests.support import oracle
from tests.support.blobs import OpenedBlob, open_image, records_of
from tests.support.damages import damages
from tests.workers.harness import Jobs, jobs
from workers.prepare import with_layout

IMAGES = ("v6-zstd-blake3", "v6-none-sha256", "v6-batch", "v6-targz-ref", "v6-encrypt", "v6-inline", "v6-toc")
HEADER_FIELDS = 60
"""Bytes of the header that say something, but for the magic at its end."""
_KINDS = int(ChunkFlag.COMPRESSED | ChunkFlag.ENCRYPTED | ChunkFlag.BATCH | ChunkFlag.ZRAN)
FILE = "x.blob.meta"


@cache
def opened(name: str) -> tuple[OpenedBlob, list[RawChunk]]:
    bootstrap, (blob,) = open_image(name)
    return blob, list(bootstrap.raw_chunks())


def table_of(name: str, content: bytes) -> tuple[ChunkTable, bytes, OpenedBlob]:
    """The chunk table of a metadata file, its layout, and the blob as it is by that. Raises FormatError."""
    blob, raw = opened(name)
    header, ci = parse_meta_file(content, blob.info, FILE)
    table, layout = with_layout(build_from_ci(blob.info, ci, header, raw, mark=True), ci)
    return table, layout, blob._replace(header=header, ci=ci, table=table, records=records_of(table))


class Place:
    """Bytes of a metadata file, and a chunk that is decoded by them."""

    def __init__(self, what: str, start: int, size: int, chunk: int) -> None:
        self.what = what
        self.bytes = range(start, start + size)
        self.chunk = chunk


def places(blob: OpenedBlob) -> list[Place]:
    """The header; of each kind of chunk a record and its context; the ends of a dictionary."""
    assert blob.header is not None
    info, size = blob.info, record_size(blob.info)
    head = align_page(info.ci_uncompressed_size)
    found = [Place("header", head, HEADER_FIELDS, 0), Place("last magic", head + CI_HEADER_SIZE - 4, 4, 0)]
    kinds: set[int] = set()
    for chunk, record in enumerate(blob.records):
        kind = record.flags & _KINDS
        # Of compressed streams one that needs a dictionary, if there is any.
        zran = zran_context(blob.table.contexts, record.ctx) if kind & ChunkFlag.ZRAN else None
        if kind in kinds or (zran is not None and blob.table.dict_size and not zran.dict_size):
            continue
        kinds.add(kind)
        found.append(Place(f"record of kind {kind:#x}", chunk * size, size, chunk))
        if kind & (ChunkFlag.ZRAN | ChunkFlag.BATCH):
            at = blob.header.ctx_offset + record.ctx * CONTEXT_SIZE
            found.append(Place(f"context of kind {kind:#x}", at, CONTEXT_SIZE, chunk))
        if zran is not None and zran.dict_size:
            at = blob.table.dict_offset + zran.dict_offset
            found += [Place("dictionary", at, 1, chunk), Place("dictionary", at + zran.dict_size - 1, 1, chunk)]
    return found


def gives_a_wrong_byte(name: str, by: OpenedBlob, chunk: int) -> bool:
    """Whether a chunk decodes by a table, from the whole blob, and to other bytes than it should."""
    offset, length = fetch_range(by.records, by.table.contexts, chunk, chunk)
    if offset + length > len(by.stored):
        return False  # the backend says so
    try:
        decoded = by.decode(chunk, chunk)
    except CorruptChunkError:
        return False
    good, _ = opened(name)
    return decoded != good.decode(chunk, chunk)


@pytest.mark.parametrize("name", IMAGES)
def test_each_field_of_a_metadata_file_torn_is_refused_or_noticed_or_of_no_account(name: str) -> None:
    blob, _ = opened(name)
    assert blob.header is not None
    content = meta_file_bytes(blob.header, blob.ci)
    table, layout, _ = table_of(name, content)
    refused = noticed = 0
    for place in places(blob):
        for at in place.bytes:
            for number, bad in enumerate(damages(content, at)):
                try:
                    torn, found, by = table_of(name, bad)
                except FormatError as e:
                    assert e.where in (FILE, f"blob {blob.info.blob_id}") and e.field and e.message
                    refused += 1
                    continue
                where = f"{place.what}: byte {at - place.bytes.start}, damage {number}"
                assert number > 0, f"{where}: a file that was cut off was believed"
                if found == layout:
                    assert torn == table, where
                    continue
                noticed += 1
                assert not gives_a_wrong_byte(name, by, place.chunk), where
    assert refused > 9 * 8 * 4
    assert noticed or not blob.info.features & BlobFeature.CHUNK_INFO_V2


def test_images_of_these_tests_have_records_and_contexts_of_each_kind() -> None:
    found = {place.what for name in IMAGES for place in places(opened(name)[0])}
    single = ChunkFlag.COMPRESSED | ChunkFlag.ENCRYPTED
    kinds = [ChunkFlag(0), ChunkFlag.COMPRESSED, single, ChunkFlag.BATCH | ChunkFlag.COMPRESSED]
    assert {"dictionary"} | {f"record of kind {int(kind):#x}" for kind in kinds} <= found
    assert {
        f"context of kind {int(ChunkFlag.COMPRESSED | kind):#x}" for kind in (ChunkFlag.ZRAN, ChunkFlag.BATCH)
    } <= found
    assert {record_size(opened(name)[0].info) for name in IMAGES} == {16, 24}


@pytest.mark.parametrize("name", IMAGES)
def test_each_field_of_the_header_that_a_backend_gives_torn_is_refused_or_of_no_account(name: str) -> None:
    blob, _ = opened(name)
    info = blob.info
    stored = (oracle.image(name).blobs / info.meta_blob_id).read_bytes()
    stored = stored[info.ci_offset :][: info.ci_compressed_size + CI_HEADER_SIZE]
    good = load_ci(info, lambda _offset, size: stored[:size])
    for at in range(info.ci_compressed_size, info.ci_compressed_size + HEADER_FIELDS):
        for bad in list(damages(stored, at))[1:]:
            try:
                header, ci = load_ci(info, lambda _offset, size, bad=bad: bad[:size])  # type: ignore[misc]
            except FormatError as e:
                assert e.where == f"blob {info.meta_blob_id}" and e.field and e.message
                continue
            assert ci == good[1]
            # Old builders left features clear, so nobody looks at them; where no contexts are, nobody looks for any.
            changed = [field for field in header.__slots__ if getattr(header, field) != getattr(good[0], field)]
            assert set(changed) <= {"features", "ctx_offset", "ctx_size", "ctx_count"}
            with_contexts = info.features & (BlobFeature.ZRAN | BlobFeature.BATCH)
            assert not with_contexts or set(changed) <= {"features", "ctx_size", "ctx_count"}


class TestContents:
    """The table of contents at the end of a blob."""

    def test_torn_anywhere_gives_no_digests(self) -> None:
        blob, _ = opened("v6-toc")
        assert blob.info.toc_size
        for at in contents(blob):
            for bad in damages(blob.stored, at):
                with pytest.raises(FormatError, match=blob.info.meta_blob_id):
                    load_digest_array(blob.info, reader(bad), len(bad))

    def test_torn_anywhere_it_gives_the_bootstrap_that_is_there_or_none(self) -> None:
        blob, _ = opened("v6-inline")
        stored, where = blob.stored, "x.blob"
        good = extract(stored, where)
        located = toc.locate_bootstrap(stored[-toc.tail_size(len(stored)) :], len(stored), where)
        for at in contents(blob):
            for bad in damages(stored, at):
                try:
                    found = toc.locate_bootstrap(bad[-toc.tail_size(len(bad)) :], len(bad), where)
                    if found == located and len(bad) == len(stored):
                        continue
                    content = extract(bad, where)
                    # Cut off at the end of one that is compressed it looks like one that is not.
                    open_bootstrap(memoryview(content), where, extracted=True)
                    assert content == good, f"byte {at - len(stored)}"
                except (FormatError, UnsupportedError) as e:
                    assert str(e).startswith(where)


def contents(blob: OpenedBlob) -> list[int]:
    """Where bytes of a TOC are in its blob: all of the entries, and of the tar header behind them those that are not zero."""
    size = len(blob.stored)
    end = size - TAR_HEADER_SIZE
    entries = toc.parse_toc(blob.stored[-toc.tail_size(size) :], size, "blob")
    start = end - len(entries) * toc.TOC_ENTRY_SIZE
    return [*range(start, end), *(at for at in range(end, size) if blob.stored[at])]


def reader(stored: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: stored[offset : offset + size]


def extract(stored: bytes, where: str) -> bytes:
    return extract_bootstrap(reader(stored), len(stored), where)


@pytest.fixture(params=["v6-batch", "v6-targz-ref", "v6-encrypt"])
def used(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Jobs]:
    """A blob that is in the cache, and its map stored."""
    with jobs(request.param, tmp_path) as image:
        image.prepare()
        image.fill_all()
        image.checkpoint()
        yield image


def test_what_is_noticed_is_had_again_from_the_backend(used: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    """Also of contexts and dictionaries: nothing of the cache is lost, and what is read by them later is right."""
    caplog.set_level(logging.CRITICAL)
    meta = used.spec.meta_path
    good = meta.read_bytes()
    for place in places(opened(used.image.name)[0]):
        for at in (place.bytes[0], place.bytes[len(place.bytes) // 3], place.bytes[-1]):
            meta.write_bytes(list(damages(good, at))[1 + at % 8])
            used.new_daemon()
            assert used.prepare()["ready"] == len(used.states()), place.what
            if place.what.startswith(("context", "dictionary")):
                assert meta.read_bytes() == good, place.what
    assert used.wrong_files() == []


def test_that_was_used_by_nobody_yet_gives_no_wrong_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a stored map there is nothing to tell by that a dictionary was torn: its chunks are refused by name."""
    caplog.set_level(logging.CRITICAL)
    with jobs("v6-targz-ref", tmp_path) as image:
        image.prepare()
        meta = image.spec.meta_path
        good = meta.read_bytes()
        table = opened("v6-targz-ref")[0].table
        end = table.dict_offset + table.dict_size
        meta.write_bytes(good[: table.dict_offset] + bytes(table.dict_size) + good[end:])
        image.new_daemon()
        image.prepare()
        failed = [row for answer in image.fill_all() for row in answer["failed"]]
        assert failed and all(f"chunk {chunk}" in why for chunk, _, why in failed)
        torn_files = image.wrong_files()
        assert torn_files
        truth = oracle.truth(image.image.name)
        device = image.device()
        for path in torn_files:  # they lack chunks, and have no wrong one
            ino = image.files()[path]
            assert device.missing(image.bootstrap.extents(ino, 0, len(truth[path])))
        device.close()
