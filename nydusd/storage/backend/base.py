"""What every backend is: something that gives byte ranges of stored blobs. Run by workers, one instance a process.

A backend keeps no state that matters after a kill. Its readers are cheap to get and are shared by all who ask for
the same blob.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from nydusd.errors import BackendError, FormatError

_BLOB_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,255}", re.ASCII)
MAX_OFFSET = (1 << 63) - 1


def validate_blob_id(blob_id: str) -> str:
    """Give `blob_id` back if it may become a file name or a part of an URL, else raise `FormatError`.

    Ids come from images: 1 to 256 of A-Z a-z 0-9 _ . - and no dot in front, so they cannot name another folder.
    """
    if not _BLOB_ID.fullmatch(blob_id):
        raise FormatError(
            "bootstrap", "blob id", f"{blob_id[:300]!r}; 1 to 256 of A-Z a-z 0-9 _ . - are allowed, and no dot in front"
        )
    return blob_id


@dataclass(slots=True)
class BackendMetrics:
    """Counters of one backend since its process started. `read_amount` is bytes that were really given."""

    read_count: int = 0
    read_errors: int = 0
    read_amount: int = 0


class BlobReader(ABC):
    """Byte ranges of one stored blob."""

    def __init__(self, blob_id: str, metrics: BackendMetrics) -> None:
        self.blob_id = blob_id
        self._metrics = metrics

    @abstractmethod
    def blob_size(self) -> int:
        """Length of the stored blob in bytes. Raises `BackendError`."""

    @abstractmethod
    def _read_into(self, buf: memoryview, offset: int) -> None:
        """Fill `buf` (not empty) or raise `BackendError`."""

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill all of `buf` with the bytes at `offset`. Raises `BackendError` if even one is not to be had."""
        if not 0 <= offset <= MAX_OFFSET - len(buf):
            raise BackendError(f"blob {self.blob_id}: {len(buf)} bytes at {offset} are outside of any blob")
        if not len(buf):
            return
        self._metrics.read_count += 1
        try:
            self._read_into(buf, offset)
        except BackendError:
            self._metrics.read_errors += 1
            raise
        self._metrics.read_amount += len(buf)

    def read(self, offset: int, size: int) -> bytearray:
        """Exactly `size` bytes at `offset`. Raises `BackendError`."""
        buf = bytearray(max(size, 0))
        with memoryview(buf) as view:
            self.read_into(view, offset)
        return buf

    def will_need(self, offset: int, size: int) -> None:
        """Hint that this range is going to be read soon. Never fails; does nothing where there is nothing to do."""
        return

    def close(self) -> None:
        """Give resources back. The reader may be used again: it opens what it needs."""
        return


class BlobBackend(ABC):
    """A place where blobs are stored."""

    def __init__(self) -> None:
        self.metrics = BackendMetrics()
        self._readers: dict[str, BlobReader] = {}

    @abstractmethod
    def _new_reader(self, blob_id: str) -> BlobReader:
        """A reader for a valid blob id; no I/O."""

    def get_reader(self, blob_id: str) -> BlobReader:
        """The reader of a blob, the same for each call. No I/O: a blob that is not there is noticed when it is read.

        Raises `FormatError` for an id that is none.
        """
        reader = self._readers.get(blob_id)
        if reader is None:
            reader = self._readers[blob_id] = self._new_reader(validate_blob_id(blob_id))
        return reader

    def close(self) -> None:
        """Close all readers."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
