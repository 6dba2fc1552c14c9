"""Get a blob's chunk information from its backend. Run by fetch workers in the job `prepare`; nothing here writes files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from nydusd.errors import FormatError
from nydusd.formats.blob_meta import CiHeader
from nydusd.storage.backend.base import BlobReader, ReadHow
from nydusd.storage.cache.chunk_table import ChunkTable
from nydusd.storage.cache.load import load_ci
from workers.blobs import OpenBlob

log = logging.getLogger(__name__)

_PIECE = 4 << 20
"""Bytes that are asked for at once."""


def fetch_ci(blob: OpenBlob, build: Callable[[CiHeader, bytes], ChunkTable]) -> tuple[CiHeader, bytes, ChunkTable]:
    """Header, unpacked chunk information, and what `build` makes of them. Raises BackendError, FormatError.

    What is wrong as it came by a proxy, a mirror or a remembered redirect is asked for once more past them. A backend that
    is down is not waited for: the supervisor has it done again when it is there again.
    """
    try:
        return _fetch(blob, build, ReadHow(waits=False))
    except FormatError as e:
        if not blob.spec.remote:
            raise
        log.warning("blob metadata: %s; asking the backend itself for it", e)
    return _fetch(blob, build, ReadHow(waits=False, bypass=True))


def _fetch(
    blob: OpenBlob, build: Callable[[CiHeader, bytes], ChunkTable], how: ReadHow
) -> tuple[CiHeader, bytes, ChunkTable]:
    header, ci = load_ci(blob.spec.info, partial(_read_in_pieces, blob.reader(meta=True), how))
    return header, ci, build(header, ci)


def _read_in_pieces(reader: BlobReader, how: ReadHow, offset: int, size: int) -> bytearray:
    """Exactly `size` bytes at `offset`, each piece in a time of its own: there may be hundreds of MiB behind a slow link."""
    buf = bytearray(size)
    with memoryview(buf) as view:
        for start in range(0, size, _PIECE):
            reader.read_into(view[start : start + _PIECE], offset + start, how)
    return buf
