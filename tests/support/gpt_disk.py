"""Disk images with a GUID partition table, and loop devices over them. Written from UEFI 2.10, section 5.3."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

BASIC_DATA = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
DISK_GUID = uuid.UUID("11111111-2222-3333-4444-555555555555")


@dataclass
class Part:
    """One partition to write. `sectors` is by default what `data` needs; `first` is by default behind the last one."""

    name: str
    data: bytes = b""
    kind: uuid.UUID = LINUX
    guid: uuid.UUID = DISK_GUID
    first: int = 0
    sectors: int = 0


def blob_part(blob_id: str, data: bytes) -> Part:
    """The partition of a blob with a 64-digit id: half of the id is the name, half the GUID."""
    assert len(blob_id) == 64
    return Part(blob_id[:32], data, LINUX, uuid.UUID(blob_id[32:]))


def old_blob_part(blob_id: str, data: bytes, number: int = 7) -> Part:
    """The partition of a blob as old images have it: what fits of the id is the name, the GUID means nothing."""
    return Part(blob_id[:32], data, BASIC_DATA, uuid.UUID(int=number))


def entry(part: Part, first: int, last: int) -> bytes:
    name = part.name.encode("utf-16-le")
    return struct.pack("<16s16sQQQ72s", part.kind.bytes_le, part.guid.bytes_le, first, last, 0, name)


def header(table: bytes, my_lba: int, other_lba: int, table_lba: int, first: int, last: int, count: int) -> bytes:
    """A header whose checksums are right. `count` entries; their size follows from the table's."""
    size = len(table) // count if count else 128
    fields = (my_lba, other_lba, first, last, DISK_GUID.bytes_le, table_lba, count, size, crc32(table))
    raw = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *fields)
    return raw[:16] + struct.pack("<I", crc32(raw)) + raw[20:]


def write_disk(path: Path, parts: list[Part], sector: int = 512, count: int = 128, entry_size: int = 128) -> Path:
    """A disk image with `parts`, each starting at a sector of its own, and both tables."""
    table_sectors = -(-count * entry_size // sector)
    first_usable = 2 + table_sectors
    at = first_usable
    table = bytearray(count * entry_size)
    content: list[tuple[int, bytes]] = []
    for number, part in enumerate(parts):
        first = part.first or at
        sectors = part.sectors or max(-(-len(part.data) // sector), 1)
        at = max(at, first + sectors)
        table[number * entry_size : number * entry_size + 128] = entry(part, first, first + sectors - 1)
        content.append((first * sector, part.data))
    assert len(table) == count * entry_size
    sectors = at + 8 + table_sectors + 1
    last_usable = sectors - table_sectors - 2
    backup_lba = sectors - 1
    with path.open("wb") as file:
        file.truncate(sectors * sector)
        file.seek(446)
        file.write(struct.pack("<8sII", b"\0\0\2\0\xee\xff\xff\xff", 1, min(sectors - 1, 0xFFFFFFFF)))
        file.seek(510)
        file.write(b"\x55\xaa")
        for lba, other, table_lba in ((1, backup_lba, 2), (backup_lba, 1, sectors - 1 - table_sectors)):
            file.seek(table_lba * sector)
            file.write(table)
            file.seek(lba * sector)
            file.write(header(bytes(table), lba, other, table_lba, first_usable, last_usable, count))
        for offset, data in content:
            file.seek(offset)
            file.write(data)
    return path


@contextlib.contextmanager
def loop_device(image: Path, sector: int = 512) -> Iterator[str]:
    """A read-only block device over `image`, gone afterwards."""
    command = ["losetup", "--find", "--show", "--read-only", "--sector-size", str(sector), str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=30)
