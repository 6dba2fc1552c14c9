"""Pictures of chunk maps."""

from __future__ import annotations

import base64
import re
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.cli.ctl.picture import EMPTY, FAILED, PENDING, READY, VERIFY, legend, png, states_of, terminal_map

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def drawn(states: bytes, width: int = 20) -> list[str]:
    return list(terminal_map(states, width, colour=False, unicode=True))


def test_small_map_has_a_letter_for_each_chunk() -> None:
    assert drawn(bytes([READY] * 20 + [EMPTY, PENDING, FAILED, VERIFY, READY])) == ["█" * 20, "·↓✗?█"]


def test_letter_says_none_and_all_only_where_that_is_true() -> None:
    """240 letters at most: here each is of 10 chunks."""
    cells = [bytes([READY] * ready + [EMPTY] * (10 - ready)) for ready in range(11)]
    states = b"".join(cells) + bytes(2400 - 110)
    assert drawn(states)[0] == "·░░░▒▒▒▒▓▓█" + "·" * 9
    assert [len(line) for line in drawn(states)] == [20] * 12


@given(states=st.binary(max_size=3000), width=st.integers(20, 200))
def test_map_of_any_bytes_fits(states: bytes, width: int) -> None:
    lines = drawn(states, width)
    assert len(lines) <= 12
    assert all(0 < len(line) <= width for line in lines)
    coloured = list(terminal_map(states, width, colour=True, unicode=True))
    assert [COLOUR.sub("", line) for line in coloured] == lines
    assert all(line.endswith("\x1b[0m") for line in coloured)
    plain = list(terminal_map(states, width, colour=False, unicode=False))
    assert all(line.isascii() for line in plain)
    assert legend(states, width, unicode=False).isascii()


def test_million_chunks_fit() -> None:
    assert [len(line) for line in drawn(bytes([READY]) * 1_000_000, 100)][:3] == [100, 100, 100]


def pixels(data: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and lines of palette indexes; checks every checksum on the way."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    parts: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        parts[kind] = body
        at += 12 + length
    assert list(parts) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert (depth, colour, rest) == (8, 3, [0, 0, 0])
    raw = zlib.decompress(parts[b"IDAT"])
    assert len(raw) == height * (width + 1)
    lines = [raw[i : i + width + 1] for i in range(0, len(raw), width + 1)]
    assert all(line[0] == 0 for line in lines)
    assert max(raw) < len(parts[b"PLTE"]) // 3
    return width, height, [line[1:] for line in lines]


@pytest.mark.parametrize("count", [1, 17, 256, 1000, 70_000])
def test_png_shows_each_chunk_as_a_square(count: int) -> None:
    states = bytes(i * 7 % 5 for i in range(count))
    width, height, lines = pixels(png([states]))
    columns = next(c for c in (16, 32, 64, 128, 256, 384) if c * c >= count)
    scale = width // columns
    assert height == 24 + -(-count // columns) * scale
    for chunk in {0, count // 3, count - 1}:
        y, x = divmod(chunk, columns)
        block = [line[x * scale : (x + 1) * scale] for line in lines[12 + y * scale : 12 + (y + 1) * scale]]
        assert block == [bytes([states[chunk]]) * scale] * scale


def test_png_of_several_blobs_and_of_none() -> None:
    assert pixels(png([]))[1] == 12
    _, height, lines = pixels(png([bytes([READY]), b"", bytes([9])]))
    assert height == 12 * 4 + 48 * 2
    assert (lines[12][0], lines[12 + 48 + 24][0]) == (READY, VERIFY)


@pytest.mark.parametrize("states", [None, 5, "", "!", "AAAA", base64.b64encode(b"x").decode()])
def test_states_that_cannot_be_unpacked_are_none(states: object) -> None:
    assert states_of({"states": states}) == b""
    assert states_of(states) == b""
