"""Chunk and file digests: BLAKE3 (unkeyed, 32 bytes) and SHA-256. Run by workers.

blake3 is a native extension and is imported when the first blob with it is met.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from nydusd.codec.compress import Buffer
from nydusd.formats.model import Digester

DIGEST_SIZE = 32

Hasher = Callable[[Buffer], bytes]

_hashers: dict[Digester, Hasher] = {}


def sha256(data: Buffer) -> bytes:
    return hashlib.sha256(data).digest()


def hasher_for(digester: Digester) -> Hasher:
    """The function that gives the 32-byte digest of a buffer, to be kept by hot loops."""
    hasher = _hashers.get(digester)
    if hasher is None:
        hasher = _hashers[digester] = _load_blake3() if digester == Digester.BLAKE3 else sha256
    return hasher


def digest(digester: Digester, data: Buffer) -> bytes:
    """The 32-byte digest of `data`."""
    return hasher_for(digester)(data)


def _load_blake3() -> Hasher:
    from blake3 import blake3 as new

    def blake3(data: Buffer) -> bytes:
        return new(data).digest()

    return blake3
