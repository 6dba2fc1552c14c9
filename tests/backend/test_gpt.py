"""Partition tables: what util-linux reads from the same bytes, both copies, and tables made to hurt."""

from __future__ import annotations

import contextlib
import re
import struct
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.errors import FormatError
from nydusd.storage.backend.gpt import MAX_TABLE, Partition, read_partitions
from tests.support.gpt_disk import BASIC_DATA, LINUX, Part, header, write_disk

PARTS = [
    Part("a" * 36, b"1" * 5000, LINUX, uuid.UUID("12345678-9abc-def0-1234-56789abcdef0")),
    Part("basic", b"2", BASIC_DATA, uuid.UUID(int=5)),
    Part("grüße \U0001f600", b"3" * 9000, LINUX, uuid.UUID(int=6)),
]


def parse(raw: bytes, capacity: int | None = None) -> list[Partition]:
    return read_partitions(
        "disk", lambda offset, size: raw[offset : offset + size], len(raw) if capacity is None else capacity
    )


def partx(path: Path, sector: int) -> list[tuple[int, str, str, int, int]]:
    """What util-linux finds: number, GUID, name, offset and size in bytes."""
    command = ["partx", "--pairs", "--output", "NR,UUID,NAME,START,SECTORS", "--sector-size", str(sector), str(path)]
    found = []
    for line in subprocess.run(command, check=True, capture_output=True, timeout=30).stdout.decode().splitlines():
        match = re.fullmatch(r'NR="(\d+)" UUID="(.*)" NAME="(.*)" START="(\d+)" SECTORS="(\d+)"', line)
        assert match, line
        name = re.sub(r"(?:\\x[0-9a-f]{2})+", lambda m: bytes.fromhex(m[0].replace("\\x", "")).decode(), match[3])
        found.append((int(match[1]), match[2], name, int(match[4]) * 512, int(match[5]) * 512))
    return found


def ours(partitions: list[Partition]) -> list[tuple[int, str, str, int, int]]:
    return [(p.number, str(p.guid), p.name, p.offset, p.size) for p in partitions]


def patch(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def without_header(raw: bytes, *lbas: int, sector: int = 512) -> bytes:
    for lba in lbas:
        raw = patch(raw, lba % (len(raw) // sector) * sector, bytes(8))
    return raw


@pytest.fixture
def disk(tmp_path: Path) -> bytes:
    return write_disk(tmp_path / "disk", PARTS).read_bytes()


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("count", [128, 4, 1000])
def test_reads_what_util_linux_reads(tmp_path: Path, sector: int, count: int) -> None:
    path = write_disk(tmp_path / "disk", PARTS, sector, count)
    found = parse(path.read_bytes())
    assert ours(found) == partx(path, sector)
    assert [p.kind for p in found] == [LINUX, BASIC_DATA, LINUX]


def test_entries_may_be_longer_than_is_usual(tmp_path: Path, disk: bytes) -> None:
    """util-linux refuses these, so the comparison is with the same table in usual entries: both fill 32 sectors."""
    assert parse(write_disk(tmp_path / "wide", PARTS, count=32, entry_size=512).read_bytes()) == parse(disk)


@pytest.mark.parametrize("sector", [512, 4096])
def test_backup_at_the_end_replaces_a_broken_primary(tmp_path: Path, sector: int) -> None:
    raw = write_disk(tmp_path / "disk", PARTS, sector).read_bytes()
    expected = parse(raw)
    assert parse(without_header(raw, 1, sector=sector)) == expected
    assert parse(patch(raw, 2 * sector, b"\xff")) == expected  # the table of the primary
    assert parse(patch(raw, sector + 60, b"\xff")) == expected  # the disk's GUID: the header's checksum is wrong


def test_primary_is_enough_when_the_end_is_broken(disk: bytes) -> None:
    assert parse(without_header(disk, -1)) == parse(disk)


def test_both_broken_names_what_is_wrong_with_each() -> None:
    raw = bytes(64 * 512)
    with pytest.raises(FormatError, match=r"disk: partition table: no intact GPT \(primary at 512.*backup at 4096"):
        parse(raw)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1024, 2559])
def test_a_disk_too_small_for_a_table_is_refused(disk: bytes, size: int) -> None:
    with pytest.raises(FormatError, match="are too few"):
        parse(disk[:size])


def test_a_disk_that_lost_its_end_is_refused(disk: bytes) -> None:
    with pytest.raises(FormatError, match="usable sectors"):
        parse(disk[: 36 * 512])


def rewritten(raw: bytes, change: Callable[[bytearray], None]) -> bytes:
    """The disk with its primary header changed, checksum right again; no backup."""
    head = bytearray(raw[512:1024])
    change(head)
    (size,) = struct.unpack_from("<I", head, 12)
    head[16:20] = bytes(4)
    head[16:20] = struct.pack("<I", crc32(head[:size]))
    return without_header(patch(raw, 512, bytes(head)), -1)


@pytest.mark.parametrize(
    ("layout", "at", "value", "says"),
    [
        ("<I", 12, 91, "header size: 91"),
        ("<I", 12, 513, "header size: 513"),
        ("<I", 12, 0xFFFFFFFF, "header size"),
        ("<Q", 24, 2, "header sector: 2"),
        ("<Q", 40, 0, "usable sectors"),
        ("<Q", 48, 1 << 63, "usable sectors"),
        ("<Q", 48, 33, "usable sectors"),
        ("<Q", 72, 0, "table sector"),
        ("<Q", 72, 40, "table sector"),
        ("<Q", 72, (1 << 64) - 1, "table sector"),
        ("<I", 80, 0, "table size: 0"),
        ("<I", 80, 0xFFFFFFFF, "table size"),
        ("<I", 80, MAX_TABLE // 128 + 1, "table size"),
        ("<I", 84, 0, "entry size: 0"),
        ("<I", 84, 64, "entry size: 64"),
        ("<I", 84, 384, "entry size: 384"),
        ("<I", 84, 0x80000000, "table size"),
        ("<I", 88, 1, "table CRC"),
    ],
)
def test_header_with_right_checksum_and_wrong_field(disk: bytes, layout: str, at: int, value: int, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        parse(rewritten(disk, lambda head: struct.pack_into(layout, head, at, value)))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([Part("x", first=10)], "partition 1: is sectors 10 to 10"),
        ([Part("x", b"1"), Part("y", first=1 << 40, sectors=1)], "partition 2: is sectors"),
        ([Part("x", first=40, sectors=(1 << 64) - 40)], "partition 1: is sectors"),
        ([Part("x", first=40, sectors=3), Part("y", first=42)], "partition 2: overlaps partition 1"),
        ([Part("x", first=42), Part("y", first=40, sectors=3)], "partition 1: overlaps partition 2"),
    ],
)
def test_partitions_out_of_place_are_refused(tmp_path: Path, parts: list[Part], says: str) -> None:
    sound = write_disk(tmp_path / "disk", [Part("x", bytes(20 * 512))]).read_bytes()
    table = bytearray(128 * 128)
    for number, part in enumerate(parts):
        first = part.first or 34
        fields = (part.kind.bytes_le, part.guid.bytes_le, first, first + max(part.sectors, 1) - 1, 0, b"x\0")
        struct.pack_into("<16s16sQQQ72s", table, 128 * number, *fields)
    sectors = len(sound) // 512
    raw = patch(sound, 1024, bytes(table))
    raw = patch(raw, 512, header(bytes(table), 1, sectors - 1, 2, 34, sectors - 34, 128))
    with pytest.raises(FormatError, match=says):
        parse(raw)


def test_a_name_that_is_no_text_is_refused(disk: bytes) -> None:
    table = patch(disk[1024 : 1024 + 128 * 128], 56, b"\x00\xd8")
    sectors = len(disk) // 512
    raw = patch(patch(disk, 1024, table), 512, header(table, 1, sectors - 1, 2, 34, sectors - 34, 128))
    with pytest.raises(FormatError, match="partition 1: has a name that is not UTF-16: 00d8"):
        parse(raw)


def test_reading_stays_bounded_on_a_disk_that_claims_to_be_huge() -> None:
    asked: list[tuple[int, int]] = []

    def read_at(offset: int, size: int) -> bytes:
        asked.append((offset, size))
        return b""

    with pytest.raises(FormatError):
        read_partitions("disk", read_at, (1 << 64) - 1)
    assert [size for _, size in asked] == [512, 4096, 512, 4096]


def test_any_mutation_is_the_same_table_or_an_error(disk: bytes) -> None:
    expected = parse(disk)
    places = [*range(512, 604), *range(len(disk) - 512, len(disk) - 420), *range(1024, 1424)]

    @given(st.lists(st.tuples(st.sampled_from(places), st.integers(0, 255)), max_size=4), st.integers(0, len(disk)))
    def check(changes: list[tuple[int, int]], cut: int) -> None:
        raw = bytearray(disk)
        for at, value in changes:
            raw[at] = value
        with contextlib.suppress(FormatError):
            assert parse(bytes(raw[: len(raw) - cut])) == expected

    check()


@given(st.binary(min_size=76, max_size=76), st.integers(0, 1 << 64))
def test_any_header_is_an_error_or_has_partitions_inside_of_the_disk(fields: bytes, capacity: int) -> None:
    raw = bytes(512) + b"EFI PART" + struct.pack("<II", 0x10000, 92) + bytes(4) + fields[:72]
    raw = patch(raw, 528, struct.pack("<I", crc32(raw[512:604]))).ljust(1 << 16, b"\0")
    with contextlib.suppress(FormatError):
        assert all(p.offset + p.size <= capacity for p in parse(raw, capacity))
