"""Which kind of metadata a file holds, by its magic numbers.

Pure; used by whoever is given a bootstrap path by an operator, before anything else looks at the bytes.
"""

from __future__ import annotations

from enum import Enum

V5_MAGIC = 0x52414653
V5_VERSION = 0x500
V6_MAGIC = 0xE0F5E1E2
V6_SUPERBLOCK_OFFSET = 1024


class BootstrapKind(Enum):
    """The answer of `detect`."""

    V5 = "v5"
    V6 = "v6"
    BLOB = "blob"
    """Neither: it may be a data blob with the bootstrap inside, to be found through the table of contents at its end."""


def detect(buf: memoryview) -> BootstrapKind:
    """The kind of `buf`, the bytes of a whole file. Never fails: BLOB is the answer for anything unknown."""
    if _u32(buf, 0) == V5_MAGIC and _u32(buf, 4) == V5_VERSION:
        return BootstrapKind.V5
    if _u32(buf, V6_SUPERBLOCK_OFFSET) == V6_MAGIC:
        return BootstrapKind.V6
    return BootstrapKind.BLOB


def describe_magic(buf: memoryview) -> str:
    """For the message about a file that is no bootstrap: what stands where the magic numbers should."""
    if _u32(buf, 0) == V5_MAGIC:
        return f"RAFS version {_u32(buf, 4):#x} is not supported, only 0x500 and 0x600"
    return f"no RAFS magic: {_u32(buf, 0):#x} at 0, {_u32(buf, V6_SUPERBLOCK_OFFSET):#x} at {V6_SUPERBLOCK_OFFSET}"


def _u32(buf: memoryview, at: int) -> int:
    """The u32 at `at`; what is beyond the end counts as zero bytes."""
    return int.from_bytes(buf[at : at + 4], "little")
