"""The tail of a blob: tar headers, table of contents, and where the inlined bootstrap is."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.errors import FormatError, UnsupportedError
from nydusd.formats.model import Compressor
from nydusd.formats.tar_header import TarHeader, parse_tar_header
from nydusd.formats.toc import MAX_BOOTSTRAP_SIZE, BootstrapLocation, locate_bootstrap, parse_toc, tail_size


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def entry(name: bytes, offset: int, stored: int, plain: int, flags: int = 1, digest: bytes = bytes(32)) -> bytes:
    return struct.pack("<II16s32sQQQ", flags, 0xDEAD, name, digest, offset, stored, plain) + b"\xaa" * 48


def toc(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return body + tar_header("rafs.blob.toc", len(body))


BOOT = entry(b"image.boot", 100, 50, 80, flags=2, digest=b"d" * 32)


def test_entries_are_read_and_garbage_in_reserved_fields_is_ignored() -> None:
    tail = toc(entry(b"image.blob", 99999, 99999, 7), entry(b"blob.meta.header", 0, 4096, 4096), BOOT)
    entries = parse_toc(tail, 10000, "blob")
    assert list(entries) == ["image.blob", "blob.meta.header", "image.boot"]
    assert entries["image.boot"] == ("image.boot", Compressor.ZSTD, b"d" * 32, 100, 50, 80)
    assert entries["blob.meta.header"].digest is None


def test_the_tail_may_be_longer_than_the_toc() -> None:
    assert parse_toc(b"z" * 300 + toc(BOOT), 10000, "blob")["image.boot"].offset == 100


def test_size_and_digest_of_the_blob_table_are_checked() -> None:
    tail = toc(BOOT)
    digest = hashlib.sha256(tail).digest()
    assert parse_toc(tail, 10000, "blob", toc_size=640, toc_digest=digest)
    assert parse_toc(b"x" + tail, 10000, "blob", toc_size=640, toc_digest=digest)
    assert parse_toc(tail, 10000, "blob", toc_digest=bytes(32))
    with pytest.raises(FormatError, match="its sha256 is not"):
        parse_toc(tail, 10000, "blob", toc_digest=b"e" * 32)
    with pytest.raises(FormatError, match="640 bytes; the blob table says 768"):
        parse_toc(tail, 10000, "blob", toc_size=768)


@pytest.mark.parametrize(
    ("tail", "rule"),
    [
        (b"", "0 bytes of a blob"),
        (bytes(511), "511 bytes of a blob"),
        (bytes(1024), "no tar header ends the blob"),
        (tar_header("rafs.blob.toc", 128), "do not fit into the 512 bytes"),
        (bytes(100) + tar_header("rafs.blob.toc", 100), "multiple of 128"),
        (tar_header("rafs.blob.toc", 0x10000), "multiple of 128"),
        (tar_header("image.blob", 0), "ends in tar header 'image.blob'"),
        (bytes(128) + tar_header("rafs.blob.toc", 128), "flags 0x0"),
        (toc(entry(b"blob.meta", 0, 1, 1, flags=3)), "flags 0x3"),
        (toc(entry(b"blob.meta", 0, 1, 1, flags=8)), "flags 0x8"),
        (toc(entry(b"", 0, 1, 1)), "name b''"),
        (toc(entry(b"a\0b", 0, 1, 1)), "name"),
        (toc(entry(b"\xff", 0, 1, 1)), "name"),
        (toc(entry(b"blob.meta", 9999, 2, 2)), "not inside the blob of 10000"),
        (toc(entry(b"blob.meta", (1 << 64) - 1, 2, 2)), "not inside"),
        (toc(entry(b"blob.meta", 0, 2, 3)), "both must be equal"),
        (toc(BOOT, BOOT), "second entry named 'image.boot'"),
    ],
)
def test_tables_that_break_a_rule_are_refused(tail: bytes, rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        parse_toc(tail, 10000, "blob")


def test_bootstrap_is_located_by_the_toc() -> None:
    assert locate_bootstrap(toc(BOOT), 10000, "blob") == BootstrapLocation(100, 50, 80, Compressor.ZSTD, b"d" * 32)


def test_bootstrap_without_toc_lies_before_the_last_header() -> None:
    tail = tar_header("image.boot", 2000)
    assert locate_bootstrap(tail, 10000, "blob") == BootstrapLocation(7488, 2000, 2000, Compressor.NONE, None)


@pytest.mark.parametrize(
    ("tail", "rule"),
    [
        (toc(entry(b"blob.meta", 0, 1, 1)), "no entry 'image.boot'"),
        (toc(entry(b"image.boot", 0, 1, 9, flags=4)), "never extractable"),
        (toc(entry(b"image.boot", 0, 0, 0)), "is empty"),
        (tar_header("image.boot", 0), "is empty"),
        (tar_header("image.boot", 9489), "do not fit into a blob of 10000"),
        (tar_header("other", 1), "ends in tar header 'other'"),
    ],
)
def test_blobs_without_a_usable_bootstrap_are_refused(tail: bytes, rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        locate_bootstrap(tail, 10000, "blob")


def test_a_bootstrap_too_large_for_memory_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="at most 1073741824"):
        locate_bootstrap(toc(entry(b"image.boot", 0, 9, MAX_BOOTSTRAP_SIZE + 1, flags=2)), 10000, "blob")


@pytest.mark.parametrize(("blob_size", "expected"), [(100, 0), (512, 512), (1000, 896), (4095, 3968), (1 << 40, 4096)])
def test_tail_sizes(blob_size: int, expected: int) -> None:
    assert tail_size(blob_size) == expected


# --- tar headers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 7, 0o77777777777, 0o100000000000, 1 << 40])
def test_sizes_are_octal_or_binary(size: int) -> None:
    assert parse_tar_header(tar_header("image.blob", size), "blob") == TarHeader("image.blob", size)


def test_headers_are_those_that_tarfile_reads() -> None:
    block = tar_header("blob.meta", 12)
    with tarfile.open(fileobj=io.BytesIO(block + bytes(1536))) as archive:
        assert archive.getnames() == ["blob.meta"]
    assert parse_tar_header(block, "blob").name == "blob.meta"


@pytest.mark.parametrize(
    ("block", "rule"),
    [
        (bytes(512), "no GNU tar header"),
        (tar_header("a", 0)[:511], "no GNU tar header"),
        (tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT), "no GNU tar header"),
        (tar_header("a", 0, tarfile.DIRTYPE), "entry type"),
        (tar_header("a", 0).replace(b"a", b"b", 1), "checksum"),
    ],
)
def test_other_blocks_are_refused(block: bytes, rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        parse_tar_header(block, "blob")


@given(position=st.integers(0, 639), value=st.integers(0, 255))
def test_any_changed_byte_is_an_error_or_ignored(position: int, value: int) -> None:
    tail = bytearray(toc(BOOT))
    tail[position] = value
    try:
        parse_toc(tail, 10000, "blob")
        locate_bootstrap(tail, 10000, "blob")
    except (FormatError, UnsupportedError):
        return
