"""CRC-32C (Castagnoli, as in iSCSI; check value of b"123456789" is 0xe3069283). Run by workers."""

from __future__ import annotations

import functools
from collections.abc import Callable

from nydusd.codec.compress import Buffer


@functools.cache
def _value() -> Callable[[bytes], int]:
    import google_crc32c

    value: Callable[[bytes], int] = google_crc32c.value
    return value


def crc32c(data: Buffer) -> int:
    """The checksum of `data`. The library takes bytes only, so other buffers are copied (at most one chunk)."""
    return _value()(data if type(data) is bytes else bytes(data))
