"""What may have become of bytes that were torn."""

from __future__ import annotations

from collections.abc import Iterator


def damages(good: bytes, at: int) -> Iterator[bytes]:
    """Cut off before this byte, and each of its bits flipped."""
    yield good[:at]
    for bit in range(8):
        yield good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :]
