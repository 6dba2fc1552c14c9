"""Every packed image through every backend: what is fetched and decoded is what the same image gives from local files.

(That local files give the right contents is what `tests/storage/test_decode_images.py` is about.) All blobs are stored once
in each place. Of each blob the chunk information, all chunks in runs of neighbours and, where the bootstrap is inside of
the blob, that are read from there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from nydusd.formats.blob_id import blob_id_from_path
from nydusd.formats.model import ChunkRecord
from nydusd.storage.backend import make_backend
from nydusd.storage.cache.load import extract_bootstrap, load_ci
from nydusd.storage.cache.stored import fetch_range
from tests.support import blobs, oracle
from tests.support.blobs import OpenedBlob
from tests.support.places import IMAGES
from tests.support.places import place as place_of

PLACES = ["s3", "oss", "http-proxy tcp", "http-proxy unix", "localdisk image", "localdisk 512", "localdisk 4096"]
RUN = 256 << 10
"""Stored bytes that are fetched by one read, as far as chunks are not longer."""


@functools.cache
def expected(name: str) -> list[list[bytes]]:
    """For each blob of an image the digests of its chunks' plain contents, from local files."""
    _, opened = blobs.open_image(name)
    return [[sha256(plain).digest() for _, plain in blob.decode(0, len(blob.records) - 1)] for blob in opened]


def local(path: Path) -> Callable[[int, int], bytes]:
    return lambda offset, size: path.read_bytes()[offset : offset + size]


def runs(records: list[ChunkRecord], contexts: bytes) -> Iterator[tuple[int, int]]:
    """First and last chunk of what is fetched at once."""
    first = 0
    for chunk in range(len(records)):
        this = fetch_range(records, contexts, first, chunk)
        last = chunk + 1 == len(records)
        longer = this if last else fetch_range(records, contexts, first, chunk + 1)
        # Chunks of one context are never apart: each of them needs all of it.
        if last or (longer != this and longer[1] > RUN):
            yield first, chunk
            first = chunk + 1


@pytest.fixture(scope="module", params=PLACES)
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, object]]]:
    with place_of(
        request.param,
        tmp_path_factory.mktemp("place"),
        request.getfixturevalue("s3") if request.param == "s3" else None,
    ) as found:
        yield found


@pytest.mark.parametrize("name", IMAGES)
def test_all_chunks_of_an_image(place: tuple[str, dict[str, object]], name: str) -> None:
    kind, config = place
    image = oracle.image(name)
    bootstrap, opened = blobs.open_image(name)
    backend = make_backend(kind, config)
    try:
        if image.bootstrap.parent == image.blobs and kind != "localdisk":
            # A partition ends after the blob does, so that the bootstrap cannot be found from its end.
            path_id = blob_id_from_path(str(image.bootstrap))
            reader = backend.get_reader(path_id)
            assert reader.blob_size() == image.bootstrap.stat().st_size
            raw = extract_bootstrap(reader.read, reader.blob_size(), path_id)
            assert raw == extract_bootstrap(local(image.bootstrap), image.bootstrap.stat().st_size, path_id)
        for blob, digests in zip(opened, expected(name), strict=True):
            if blob.header is not None:
                assert load_ci(blob.info, backend.get_reader(blob.info.meta_blob_id).read) == (blob.header, blob.ci)
            reader = backend.get_reader(blob.info.blob_id)
            found = []
            for first, last in runs(blob.records, blob.table.contexts):
                offset, length = fetch_range(blob.records, blob.table.contexts, first, last)
                found += [
                    sha256(plain).digest() for _, plain in _decode(blob, first, last, reader.read(offset, length))
                ]
            assert found == digests
        assert len(bootstrap.blobs) == len(opened) > 0
        assert (backend.metrics.read_errors, backend.metrics.retries.total()) == (0, 0)
    finally:
        backend.close()


def _decode(blob: OpenedBlob, first: int, last: int, data: bytearray) -> Iterator[tuple[int, bytes]]:
    offset, _ = fetch_range(blob.records, blob.table.contexts, first, last)
    records = blob.records[first : last + 1]
    with memoryview(data) as view:
        for chunk, plain in blob.decoder().decode_range(records, first, offset, view, blob.digest, blob.table.contexts):
            yield chunk, bytes(plain)
