"""Decompression: exact lengths, bounded output, damaged streams, and what importing a codec costs."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from lz4 import block  # type: ignore[import-untyped]

from nydusd.codec.compress import decompress, gunzip_prefix
from nydusd.codec.errors import CodecError
from nydusd.formats.model import Compressor


def _lz4(data: bytes) -> bytes:
    packed: bytes = block.compress(data, store_size=False)
    return packed


def _zstd_unsized(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


PACKERS: dict[str, tuple[Compressor, Callable[[bytes], bytes]]] = {
    "lz4": (Compressor.LZ4_BLOCK, _lz4),
    "gzip": (Compressor.GZIP, gzip.compress),
    "zstd": (Compressor.ZSTD, zstandard.ZstdCompressor().compress),
    "zstd without content size": (Compressor.ZSTD, _zstd_unsized),
}
TEXT = b"the quick brown fox jumps over the lazy dog; " * 300


@pytest.fixture(params=PACKERS)
def packer(request: pytest.FixtureRequest) -> tuple[Compressor, Callable[[bytes], bytes]]:
    return PACKERS[request.param]


@given(data=st.binary(min_size=1, max_size=5000), name=st.sampled_from(sorted(PACKERS)))
def test_what_was_compressed_comes_back(data: bytes, name: str) -> None:
    compressor, pack = PACKERS[name]
    assert decompress(compressor, memoryview(pack(data)), len(data)) == data


@pytest.mark.parametrize("wrong", [1, -1, 5000, -5000])
def test_another_length_than_promised_is_refused(
    packer: tuple[Compressor, Callable[[bytes], bytes]], wrong: int
) -> None:
    compressor, pack = packer
    with pytest.raises(CodecError, match=r"bytes|insufficient|full frame"):
        decompress(compressor, pack(TEXT), len(TEXT) + wrong)


def test_cut_streams_are_refused(packer: tuple[Compressor, Callable[[bytes], bytes]]) -> None:
    compressor, pack = packer
    packed = pack(TEXT)
    for length in range(len(packed)):
        with pytest.raises(CodecError):
            decompress(compressor, packed[:length], len(TEXT))


@given(data=st.binary(max_size=300), usize=st.integers(1, 4096), name=st.sampled_from(sorted(PACKERS)))
def test_garbage_gives_the_promised_length_or_codec_error(data: bytes, usize: int, name: str) -> None:
    try:
        plain = decompress(PACKERS[name][0], data, usize)
    except CodecError:
        return
    assert len(plain) == usize


def test_bombs_do_not_allocate_what_they_claim(packer: tuple[Compressor, Callable[[bytes], bytes]]) -> None:
    compressor, pack = packer
    bomb = pack(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decompress(compressor, bomb, 4096)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_lz4_is_not_given_memory_that_its_input_cannot_fill() -> None:
    with pytest.raises(CodecError, match="factor of 255"):
        decompress(Compressor.LZ4_BLOCK, b"abc", 1 << 40)


def test_zstd_frames_with_huge_windows_are_refused() -> None:
    # magic, descriptor without content size, window descriptor of 1 GiB, one empty last block
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes((20 << 3,)) + b"\x01\x00\x00"
    with pytest.raises(CodecError, match="zstd"):
        decompress(Compressor.ZSTD, frame, 10)


def test_large_sized_zstd_frames_are_read() -> None:
    plain = bytes(80 << 20)  # larger than the window that frames without a size may have
    assert decompress(Compressor.ZSTD, zstandard.ZstdCompressor().compress(plain), len(plain)) == plain


def test_none_gives_the_input_itself() -> None:
    data = memoryview(b"abc")
    assert decompress(Compressor.NONE, data, 3) is data
    with pytest.raises(CodecError, match="3 bytes instead of 4"):
        decompress(Compressor.NONE, data, 4)


def test_gzip_reads_one_member_and_ignores_what_follows() -> None:
    packed = gzip.compress(TEXT)
    assert decompress(Compressor.GZIP, packed + gzip.compress(b"more"), len(TEXT)) == TEXT
    assert decompress(Compressor.GZIP, packed + b"\0garbage", len(TEXT)) == TEXT


def test_gzip_checksum_is_checked() -> None:
    packed = bytearray(gzip.compress(TEXT))
    packed[-6] ^= 1
    with pytest.raises(CodecError, match="gzip"):
        decompress(Compressor.GZIP, packed, len(TEXT))


def test_gunzip_prefix_stops_inside_a_member() -> None:
    packed = gzip.compress(TEXT)
    assert gunzip_prefix(packed, 100) == TEXT[:100]
    assert gunzip_prefix(packed + b"next member", len(TEXT)) == TEXT
    with pytest.raises(CodecError, match=f"holds {len(TEXT)} bytes"):
        gunzip_prefix(packed, len(TEXT) + 1)


@pytest.mark.parametrize(
    ("compressor", "loaded"), [("NONE", ""), ("ZSTD", "zstandard"), ("LZ4_BLOCK", "lz4"), ("GZIP", "isal")]
)
def test_only_the_library_in_use_is_imported(compressor: str, loaded: str) -> None:
    script = f"""
import sys
from nydusd.codec import cipher, compress, crc, digest, zran
from nydusd.formats.model import Compressor
compress.decoder_for(Compressor.{compressor})
if {compressor!r} == "GZIP":
    compress.gunzip_prefix(__import__("gzip").compress(b"x"), 1)
names = ("zstandard", "lz4", "isal", "blake3", "google_crc32c", "cryptography", "zlib")
print(*(name for name in names[:-1] if name in sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == loaded
