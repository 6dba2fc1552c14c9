"""Inflating from the middle of a gzip stream, at every bit position, over dictionaries and member borders."""

from __future__ import annotations

import ctypes
import gzip
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.codec.compress import MAX_CHUNK_SIZE
from nydusd.codec.errors import CodecError
from nydusd.codec.zran import inflate_context


class _BitWriter:
    def __init__(self) -> None:
        self.bits: list[int] = []

    def put(self, value: int, count: int) -> None:
        self.bits += [value >> i & 1 for i in range(count)]

    def align(self) -> None:
        self.bits += [0] * (-len(self.bits) % 8)

    def stored(self, data: bytes, final: bool) -> None:
        """A stored block: three bits, alignment, length, its complement, the bytes."""
        self.put(int(final), 1)
        self.put(0, 2)
        self.align()
        self.put(len(data), 16)
        self.put(len(data) ^ 0xFFFF, 16)
        for byte in data:
            self.put(byte, 8)

    def fixed(self, data: bytes, final: bool) -> None:
        """A block with the fixed codes: literals below 144 are 8 bits, 0x30 + byte, high bit first."""
        self.put(int(final), 1)
        self.put(1, 2)
        for byte in data:
            assert byte < 144
            self.bits += [0x30 + byte >> 7 - i & 1 for i in range(8)]
        self.put(0, 7)

    def to_bytes(self) -> bytes:
        self.align()
        return bytes(
            sum(bit << i for i, bit in enumerate(self.bits[at : at + 8])) for at in range(0, len(self.bits), 8)
        )


@pytest.mark.parametrize("lead", range(8))
@pytest.mark.parametrize("stored", [False, True])
def test_every_bit_position_can_be_the_start(lead: int, stored: bool) -> None:
    writer = _BitWriter()
    if lead % 2:  # empty blocks have 10 bits; one literal of 9 bits makes the position odd
        writer.put(0, 1)
        writer.put(1, 2)
        writer.bits += [0x190 >> 8 - i & 1 for i in range(9)]  # literal 144
        writer.put(0, 7)
    for _ in range((lead - 3 * (lead % 2)) % 8 // 2):
        writer.fixed(b"", final=False)
    start = len(writer.bits)
    assert start % 8 == lead
    if stored:
        writer.stored(b"stored block", final=False)
    writer.fixed(b"after the start", final=True)
    data = writer.to_bytes()
    plain = b"stored block" * stored + b"after the start"
    assert zlib.decompress(data, -15).endswith(plain), "the test's own stream is wrong"
    byte, bit = divmod(start, 8)
    in_offset = byte + (1 if bit else 0)
    got = inflate_context(data[in_offset:], data[in_offset - 1] if in_offset else 0, -bit % 8, b"", len(plain))
    assert got == plain


def _block_starts(data: bytes) -> list[tuple[int, int, int]]:
    """(offset of the next byte, bits left of the one before it, output so far) at every block border, from libz."""
    lib = ctypes.CDLL("libz.so.1")

    class Stream(ctypes.Structure):
        _fields_ = (
            ("next_in", ctypes.c_void_p),
            ("avail_in", ctypes.c_uint),
            ("total_in", ctypes.c_ulong),
            ("next_out", ctypes.c_void_p),
            ("avail_out", ctypes.c_uint),
            ("total_out", ctypes.c_ulong),
            ("msg", ctypes.c_char_p),
            ("state", ctypes.c_void_p),
            ("zalloc", ctypes.c_void_p),
            ("zfree", ctypes.c_void_p),
            ("opaque", ctypes.c_void_p),
            ("data_type", ctypes.c_int),
            ("adler", ctypes.c_ulong),
            ("reserved", ctypes.c_ulong),
        )

    stream = Stream()
    lib.zlibVersion.restype = ctypes.c_char_p
    assert lib.inflateInit2_(ctypes.byref(stream), 31, lib.zlibVersion(), ctypes.sizeof(stream)) == 0
    source = ctypes.create_string_buffer(data, len(data))
    sink = ctypes.create_string_buffer(1 << 22)
    stream.next_in, stream.avail_in = ctypes.addressof(source), len(data)
    stream.next_out, stream.avail_out = ctypes.addressof(sink), len(sink)
    starts = []
    while True:
        result = lib.inflate(ctypes.byref(stream), 5)
        if result == 1 or stream.data_type & 0x40:
            break
        assert result == 0
        if stream.data_type & 0x80:
            starts.append((stream.total_in, stream.data_type & 7, stream.total_out))
    lib.inflateEnd(ctypes.byref(stream))
    return starts


@pytest.fixture(scope="module")
def layer() -> tuple[bytes, bytes]:
    """A gzip file of many blocks, and its content."""
    generator = random.Random(5)
    words = [bytes(generator.choices(b"abcdefgh \n\x90\xf0", k=generator.randint(3, 9))) for _ in range(500)]
    plain = b"".join(generator.choices(words, k=60000)) + generator.randbytes(100_000)
    packer = zlib.compressobj(6, zlib.DEFLATED, 31, 1)
    return packer.compress(plain) + packer.flush(), plain


def test_every_block_border_of_a_real_stream_can_be_the_start(layer: tuple[bytes, bytes]) -> None:
    packed, plain = layer
    starts = _block_starts(packed)
    assert len(starts) > 50 and {bits for _, bits, _ in starts} == set(range(8))
    for offset, bits, out in starts:
        length = min(50_000, len(plain) - out)
        got = inflate_context(
            memoryview(packed)[offset:], packed[offset - 1], bits, plain[max(0, out - 32768) : out], length
        )
        assert got == plain[out : out + length]


def test_a_context_goes_on_over_member_borders() -> None:
    parts = [b"first" * 1000, b"", b"second" * 2000, b"third"]
    data = b"".join(gzip.compress(part) for part in parts)
    plain = b"".join(parts)
    for length in (1, 5000, 5001, 17000, len(plain)):
        assert inflate_context(data[10:], data[9], 0, b"", length) == plain[:length]


@pytest.mark.parametrize("cut", [0, 1, 5, 30, 41, 60])
def test_input_that_ends_early_is_refused(cut: int) -> None:
    data = gzip.compress(b"first" * 1000) + gzip.compress(b"second" * 1000)
    with pytest.raises(CodecError, match="zran context"):
        inflate_context(data[10 : 10 + cut], 0, 0, b"", 11000)


def test_thousands_of_empty_members_do_not_hang() -> None:
    # 16 MiB of them: were the rest of the input copied at each member's end, this would move 6 terabytes.
    data = gzip.compress(b"") * 800_000
    with pytest.raises(CodecError, match="give 0 of 100 bytes"):
        inflate_context(data[10:], 0, 0, b"", 100)


@pytest.mark.parametrize(
    ("bits", "dictionary", "out_len"),
    [(8, 0, 10), (-1, 0, 10), (0, 32769, 10), (0, 0, 0), (0, 0, MAX_CHUNK_SIZE + 1)],
)
def test_numbers_out_of_range_are_refused(bits: int, dictionary: int, out_len: int) -> None:
    with pytest.raises(CodecError, match="zran context"):
        inflate_context(b"abc", 0, bits, bytes(dictionary), out_len)


@given(data=st.binary(max_size=200), byte=st.integers(0, 255), bits=st.integers(0, 7), out=st.integers(1, 500))
def test_garbage_gives_the_length_or_codec_error(data: bytes, byte: int, bits: int, out: int) -> None:
    try:
        plain = inflate_context(data, byte, bits, b"dictionary", out)
    except CodecError:
        return
    assert len(plain) == out
