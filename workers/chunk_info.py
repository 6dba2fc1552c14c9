"""Get a blob's chunk information from its backend. Run by fetch workers in the job `prepare`; nothing here writes files."""

from __future__ import annotations

from functools import partial

from nydusd.formats.blob_meta import CiHeader
from nydusd.storage.backend.base import BlobReader, ReadHow
from nydusd.storage.cache.load import load_ci
from workers.blobs import OpenBlob

_PIECE = 4 << 20
"""Bytes that are asked for at once."""


def fetch_ci(blob: OpenBlob) -> tuple[CiHeader, bytes]:
    """Header and unpacked chunk information. Raises BackendError, FormatError.

    A backend that is down is not waited for: the supervisor has it done again when it is there again.
    """
    return load_ci(blob.spec.info, partial(_read_in_pieces, blob.reader(meta=True), ReadHow(waits=False)))


def _read_in_pieces(reader: BlobReader, how: ReadHow, offset: int, size: int) -> bytearray:
    """Exactly `size` bytes at `offset`, each piece in a time of its own: there may be hundreds of MiB behind a slow link."""
    buf = bytearray(size)
    with memoryview(buf) as view:
        for start in range(0, size, _PIECE):
            reader.read_into(view[start : start + _PIECE], offset + start, how)
    return buf
