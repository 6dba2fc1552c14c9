"""What every backend is: something that gives byte ranges of stored blobs. Run by workers, one instance a process.

A backend keeps no state that matters after a kill. Its readers are cheap to get and are shared by all who ask for
the same blob.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field

from nydusd.errors import BackendError
from nydusd.formats.blob_id import check_blob_id

MAX_OFFSET = (1 << 63) - 1


def validate_blob_id(blob_id: str) -> str:
    """Give `blob_id` back if it may become a file name or a part of an URL, else raise `FormatError`.

    Ids come from images, and whoever opened the image has checked them by the same rule: they cannot name another folder.
    """
    return check_blob_id("bootstrap", "blob id", blob_id.encode("ascii", "backslashreplace"))


HEADER_VARIABLE = "NYDUS_HEADER_"
"""Environment variables that begin so name headers for each request over HTTP. They may hold credentials."""
SIZE_CLASSES = (1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20)
"""Reads are counted by size: below the first, from each to the next, and the last for all that is longer."""
LATENCY_CLASSES = (0.001, 0.020, 0.050, 0.100, 0.500, 1.0, 2.0)
"""Reads are counted by how long they took, in seconds: up to each, and longer than the last."""


@dataclass(frozen=True, slots=True)
class ReadHow:
    """How to read. `prefetch`: nobody waits for it. `deadline`: `time.monotonic()` when whoever waits gives up.

    `bypass`: ask the origin itself, past proxies, mirrors and remembered redirects, because what they gave was wrong.
    `waits`: a host that is down, or that wants no requests for a while, may be waited for; if not, the read fails at once.
    """

    prefetch: bool = False
    deadline: float | None = None
    bypass: bool = False
    waits: bool = True


USER = ReadHow()


@dataclass(slots=True)
class BackendMetrics:
    """Counters of one backend since its process started.

    `read_amount` is bytes that were really given, `over_read` bytes that were received and thrown away. `retries` counts
    by class (transient, throttled, auth), `route_bytes` bytes by the way on which they came (origin, proxy, mirror).
    `latency_sum` is seconds by size class, `latency_count` reads by size class, `latency_matrix` reads by size class and
    latency class. `waited` is seconds between requests and the first bytes of their answers.
    """

    read_count: int = 0
    read_errors: int = 0
    read_amount: int = 0
    over_read: int = 0
    requests: int = 0
    token_requests: int = 0
    redirect_hits: int = 0
    waited: float = 0.0
    retries: Counter[str] = field(default_factory=Counter)
    route_bytes: Counter[str] = field(default_factory=Counter)
    latency_sum: list[float] = field(default_factory=lambda: [0.0] * (len(SIZE_CLASSES) + 1))
    latency_count: list[int] = field(default_factory=lambda: [0] * (len(SIZE_CLASSES) + 1))
    latency_matrix: list[list[int]] = field(
        default_factory=lambda: [[0] * (len(LATENCY_CLASSES) + 1) for _ in range(len(SIZE_CLASSES) + 1)]
    )

    def took(self, size: int, seconds: float) -> None:
        """Count a read of `size` bytes that succeeded."""
        row = bisect_right(SIZE_CLASSES, size)
        self.latency_sum[row] += seconds
        self.latency_count[row] += 1
        self.latency_matrix[row][bisect_left(LATENCY_CLASSES, seconds)] += 1


class BlobReader(ABC):
    """Byte ranges of one stored blob."""

    def __init__(self, blob_id: str, metrics: BackendMetrics) -> None:
        self.blob_id = blob_id
        self._metrics = metrics

    @property
    def waited(self) -> float:
        """Seconds that its backend has waited for answers to begin, so far."""
        return self._metrics.waited

    @abstractmethod
    def blob_size(self) -> int:
        """Length of the stored blob in bytes. Raises `BackendError`."""

    @abstractmethod
    def _read_into(self, buf: memoryview, offset: int, how: ReadHow) -> None:
        """Fill `buf` (not empty) or raise `BackendError`."""

    def read_into(self, buf: memoryview, offset: int, how: ReadHow = USER) -> None:
        """Fill all of `buf` with the bytes at `offset`. Raises `BackendError` if even one is not to be had.

        After an error `buf` may hold some of them.
        """
        if not 0 <= offset <= MAX_OFFSET - len(buf):
            raise BackendError(f"blob {self.blob_id}: {len(buf)} bytes at {offset} are outside of any blob")
        if not len(buf):
            return
        self._metrics.read_count += 1
        start = time.monotonic()
        try:
            self._read_into(buf, offset, how)
        except BackendError:
            self._metrics.read_errors += 1
            raise
        self._metrics.read_amount += len(buf)
        self._metrics.took(len(buf), time.monotonic() - start)

    def read(self, offset: int, size: int, how: ReadHow = USER) -> bytearray:
        """Exactly `size` bytes at `offset`. Raises `BackendError`."""
        buf = bytearray(max(size, 0))
        with memoryview(buf) as view:
            self.read_into(view, offset, how)
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

    def let_go(self, blob_id: str) -> None:
        """Nobody asks for this blob any more: close its reader, if there is one."""
        if (reader := self._readers.pop(blob_id, None)) is not None:
            reader.close()

    def close_readers(self) -> None:
        """Close what readers keep open to be at hand; they open it again when they are asked."""
        for reader in self._readers.values():
            reader.close()

    def connections(self) -> dict[str, int]:
        """Connections that are open now, by host."""
        return {}

    def state(self) -> dict[str, object]:
        """What whoever operates the daemon may want to see, JSON-able, without credentials."""
        return {}

    def close(self) -> None:
        """Close all readers."""
        self.close_readers()
        self._readers.clear()
