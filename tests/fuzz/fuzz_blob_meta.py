"""Mutations of blob metadata and stored chunks: every one must decode to the true bytes or raise our own errors.

`run(seed, iterations)` is the whole interface; it needs the packed images in tests/data. Inputs: `<id>.blob.meta`
files, stored chunk information, headers, TOC tails, digest arrays, inlined bootstraps, tables built from mutated
records, and stored chunks of every kind (compressed, encrypted, batch, zran, plain).
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from nydusd.codec.compress import decompress
from nydusd.codec.errors import CodecError
from nydusd.errors import CorruptChunkError, FormatError, InternalError, NydusError, UnsupportedError
from nydusd.formats import toc
from nydusd.formats.blob_meta import pack_header
from nydusd.formats.model import BlobInfo, Bootstrap, Compressor, RawChunk
from nydusd.storage.cache.chunk_table import ChunkTable, build_from_ci, build_from_raw
from nydusd.storage.cache.load import extract_bootstrap, load_ci, load_digest_array, meta_file_bytes, parse_meta_file
from nydusd.storage.cache.stored import fetch_range
from tests.support import oracle
from tests.support.blobs import OpenedBlob, open_image, records_of

ALLOWED = (FormatError, CodecError, CorruptChunkError, UnsupportedError)
"""What hostile bytes may raise. `InternalError` (our bug) and whatever is not ours must not come out."""

_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1, 4096, 1 << 24)
_IMAGES = (
    "v6-zstd-blake3",
    "v6-lz4-sha256",
    "v6-batch",
    "v6-encrypt",
    "v6-toc",
    "v6-inline",
    "v6-targz-ref",
    "v5-lz4-sha256",
)

_INFO_FIELDS = (
    "features",
    "chunk_count",
    "compressed_size",
    "uncompressed_size",
    "ci_offset",
    "ci_compressed_size",
    "ci_uncompressed_size",
    "toc_size",
)


@functools.cache
def _opened(name: str) -> tuple[Bootstrap, OpenedBlob]:
    bootstrap, (blob,) = open_image(name)
    return bootstrap, blob


@functools.cache
def _raw_chunks(name: str) -> list[RawChunk]:
    return list(_opened(name)[0].raw_chunks())


def mutate(rng: random.Random, data: bytes) -> bytes:
    """One to four changes: bits, bytes, numbers at aligned places, pieces moved, cut or made longer."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(7)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.randrange(256)
        elif kind == 2:
            width = rng.choice((2, 4, 8))
            at -= at % width
            number = rng.choice(_INTERESTING) & ((1 << width * 8) - 1)
            out[at : at + width] = number.to_bytes(width, "little")[: max(len(out) - at, 0)]
        elif kind == 3:
            size = rng.randrange(64)
            piece = out[at : at + size]
            to = rng.randrange(len(out) + 1)
            out[to : to + len(piece)] = piece[: max(len(out) - to, 0)]
        elif kind == 4:
            del out[rng.randrange(len(out) + 1) :]
        elif kind == 5:
            out += rng.randbytes(rng.randrange(40))
        else:
            out[at : at + 8] = rng.randbytes(min(8, len(out) - at))
    return bytes(out)


def _mutate_info(rng: random.Random, info: BlobInfo) -> BlobInfo:
    """Change a number of the blob table entry, as a hostile bootstrap could."""
    field = rng.choice(_INFO_FIELDS)
    old: int = getattr(info, field)
    new = rng.choice((old ^ 1 << rng.randrange(32), old + rng.randint(-3, 3), rng.choice(_INTERESTING)))
    if field == "features":
        new &= 0x70000FFF
    elif field in ("chunk_count", "toc_size"):
        new &= 0xFFFFFFFF
    return dataclasses.replace(info, **{field: max(new, 0)})  # type: ignore[arg-type]


def _check_table(table: ChunkTable) -> None:
    """What every table promises, whatever it was built from."""
    end = 0
    for record in records_of(table):
        assert record.uoff >= end and record.usize <= 1 << 24, f"{record} overlaps what ends at {end}"
        end = record.uoff + record.usize
    assert end <= table.uncompressed_size
    assert len(table.digests) == 32 * table.count and len(table.records) == 40 * table.count


def _reader(data: bytes) -> Callable[[int, int], bytes]:
    def read(offset: int, size: int) -> bytes:
        if offset < 0 or offset + size > len(data):
            raise FormatError("fuzz", "read", "a backend would refuse this range")
        return data[offset : offset + size]

    return read


def _meta_file(rng: random.Random, name: str) -> None:
    _, blob = _opened(name)
    if blob.header is None:
        return _raw(rng, name)
    header, ci = parse_meta_file(mutate(rng, meta_file_bytes(blob.header, blob.ci)), blob.info, "fuzz")
    return _check_table(build_from_ci(blob.info, ci, header, _raw_chunks(name)))


def _records(rng: random.Random, name: str) -> None:
    """Mutations that keep the length, so that they reach the records and contexts."""
    _, blob = _opened(name)
    if blob.header is None:
        return _raw(rng, name)
    size = len(blob.ci)
    ci = mutate(rng, blob.ci)[:size].ljust(size, b"\0")
    info = blob.info if rng.random() < 0.8 else _mutate_info(rng, blob.info)
    return _check_table(build_from_ci(info, ci, blob.header, _raw_chunks(name)))


def _raw(rng: random.Random, name: str) -> None:
    """Chunk infos of the bootstrap with changed numbers."""
    _, blob = _opened(name)
    chunks = list(_raw_chunks(name))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(chunks))
        field = rng.choice(("flags", "csize", "usize", "coff", "uoff", "index"))
        bits = 64 if field in ("coff", "uoff") else 32
        value = rng.choice((rng.choice(_INTERESTING), getattr(chunks[at], field) ^ 1 << rng.randrange(bits)))
        changed: dict[str, Any] = {field: value & ((1 << bits) - 1)}
        chunks[at] = chunks[at]._replace(**changed)
    info = blob.info if rng.random() < 0.5 else _mutate_info(rng, blob.info)
    # A count near the allowed maximum is legal and only slow; the limit itself has a test of its own.
    if info.chunk_count > 1 << 16 or any(1 << 16 < chunk.index < 1 << 25 for chunk in chunks):
        return
    _check_table(build_from_raw(info, chunks))


def _stored_ci(rng: random.Random, name: str) -> None:
    _, blob = _opened(name)
    if blob.header is None:
        return
    info = blob.info
    where = oracle.image(name).blobs / info.meta_blob_id
    with open(where, "rb") as file:
        file.seek(info.ci_offset)
        stored = file.read(info.ci_compressed_size + 4096)
    header_only = rng.random() < 0.3
    stored = stored[:-4096] + mutate(rng, pack_header(blob.header)) if header_only else mutate(rng, stored)
    info = dataclasses.replace(info, ci_offset=0) if rng.random() < 0.1 else info
    header, ci = load_ci(info, lambda offset, size: _reader(stored)(offset - info.ci_offset, size))
    _check_table(build_from_ci(info, ci, header, ()))


def _tail(rng: random.Random, name: str) -> None:
    _, blob = _opened(rng.choice(("v6-toc", "v6-inline")))
    whole = blob.stored
    tail = mutate(rng, whole[-toc.tail_size(len(whole)) :])
    data = whole[: -toc.tail_size(len(whole))] + tail
    choice = rng.randrange(3)
    if choice == 0:
        toc.parse_toc(tail, len(data), "fuzz", toc_size=rng.choice((0, 640, 1024, 1152)))
    elif choice == 1:
        extract_bootstrap(_reader(data), len(data), "fuzz")
    else:
        info = dataclasses.replace(blob.info, toc_size=rng.choice((0, blob.info.toc_size)), toc_digest=b"")
        array = load_digest_array(info, _reader(data), len(data))
        assert len(array) == 32 * info.chunk_count


def _chunk(rng: random.Random, name: str) -> None:
    """A mutated stored range: what is given must be the true bytes, because all these images have digests."""
    _, blob = _opened(name)
    first = rng.randrange(blob.table.count)
    last = min(first + rng.randrange(4), blob.table.count - 1)
    offset, length = fetch_range(blob.records, blob.table.contexts, first, last)
    stored = mutate(rng, blob.stored[offset : offset + length])[:length].ljust(length, b"\0")
    data = memoryview(stored)
    records = blob.records[first : last + 1]
    good = dict(blob.decode(first, last))
    for chunk, plain in blob.decoder().decode_range(records, first, offset, data, blob.digest, blob.table.contexts):
        assert plain == good[chunk], f"chunk {chunk}: wrong bytes were given"


def _codec(rng: random.Random, name: str) -> None:
    """Mutated streams without any digest: the length must be right."""
    _, blob = _opened(name)
    record = rng.choice(blob.records)
    usize = rng.choice((record.usize, record.usize + rng.randint(-2, 2), rng.choice(_INTERESTING[:6])))
    stored = mutate(rng, blob.stored[record.coff : record.coff + record.csize])
    assert len(decompress(rng.choice(list(Compressor)), stored, max(usize, 0))) == max(usize, 0)


TARGETS: dict[str, Callable[[random.Random, str], None]] = {
    "meta_file": _meta_file,
    "records": _records,
    "raw_chunks": _raw,
    "stored_ci": _stored_ci,
    "tail": _tail,
    "chunk": _chunk,
    "codec": _codec,
}


def run(seed: int, iterations: int) -> dict[str, int]:
    """Try `iterations` mutations; how many of each target were accepted and refused, by name.

    Raises what must not be raised, with a note that says how to repeat it.
    """
    outcome: Counter[str] = Counter()
    for iteration in range(iterations):
        rng = random.Random(f"{seed}:{iteration}")
        target = rng.choice(list(TARGETS))
        image = rng.choice(_IMAGES)
        try:
            TARGETS[target](rng, image)
            outcome[f"{target}: accepted"] += 1
        except ALLOWED as error:
            assert isinstance(error, NydusError) and not isinstance(error, InternalError)
            outcome[f"{target}: {type(error).__name__}"] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, iteration {iteration}, target {target}, image {image}")
            raise
    return dict(outcome)
