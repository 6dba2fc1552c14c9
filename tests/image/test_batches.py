"""Batches are packed by threads, and stored in their order."""

from __future__ import annotations

import random
import threading

import pytest

from nydusd.codec.compress import decompress
from nydusd.formats.model import Compressor
from nydusd.image.batches import BatchPacker


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD])
def test_batches_are_stored_in_their_order(compressor: Compressor) -> None:
    source = random.Random(1)
    # Large ones first: those behind them are done earlier.
    batches = [source.randbytes(10) * (size << 10) for size in (100, 50, 1, 80, 1, 1, 1, 60, 1, 2)]
    stored: list[tuple[bytes, int]] = []
    packer: BatchPacker[int] = BatchPacker(compressor, 3, lambda data, note: stored.append((data, note)))
    try:
        for number, batch in enumerate(batches):
            packer.pack(batch, number)
        packer.drain()
    finally:
        packer.close()
    assert [note for _, note in stored] == list(range(len(batches)))
    assert [bytes(decompress(compressor, data, len(batches[note]))) for data, note in stored] == batches


def test_error_in_storing_ends_the_threads() -> None:
    def full(data: bytes, note: int) -> None:
        raise OSError("no room")

    before = threading.active_count()
    packer: BatchPacker[int] = BatchPacker(Compressor.ZSTD, 2, full)
    packer.pack(bytes(1 << 20), 1)
    with pytest.raises(OSError, match="no room"):
        packer.drain()
    packer.pack(bytes(1 << 20), 2)
    packer.close()
    assert threading.active_count() == before
