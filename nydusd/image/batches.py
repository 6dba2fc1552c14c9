"""Packs batches of small chunks, several at a time. Threads of the command's process, which only run the compressor.

Which chunks are new, and so what is in a batch, is known to the command alone; so its workers cannot pack them. Results
come in the order of the batches, whatever the number of threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from nydusd.codec.pack import Packer, new_packer
from nydusd.formats.model import Compressor

_AHEAD = 4
"""Batches that are being packed at most, whatever the number of threads: what is written must not depend on it."""

T = TypeVar("T")


class BatchPacker(Generic[T]):
    """`pack` batches, each with what is to be said to `store` when its turn has come; `drain` waits for all."""

    def __init__(self, compressor: Compressor, threads: int, store: Callable[[bytes, T], None]) -> None:
        self._compressor = compressor
        self._store = store
        self._own = threading.local()
        self._waiting: deque[tuple[Future[bytes], T]] = deque()
        new_packer(compressor)  # imports its library here, not in a thread: workers may be forked meanwhile
        self._threads = ThreadPoolExecutor(max(1, min(threads, _AHEAD)))

    def pack(self, data: bytes, note: T) -> None:
        self._waiting.append((self._threads.submit(self._packed, data), note))
        if len(self._waiting) > _AHEAD:
            self._next()

    def _packed(self, data: bytes) -> bytes:
        packer: Packer | None = getattr(self._own, "packer", None)
        if packer is None:
            packer = self._own.packer = new_packer(self._compressor)
        return packer(data)[0]

    def _next(self) -> None:
        future, note = self._waiting.popleft()
        self._store(future.result(), note)

    def drain(self) -> None:
        """Store all that was given."""
        while self._waiting:
            self._next()

    def close(self) -> None:
        """End the threads; what was not stored is dropped."""
        self._waiting.clear()
        self._threads.shutdown(cancel_futures=True)
