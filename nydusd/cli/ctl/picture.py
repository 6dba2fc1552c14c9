"""Pictures of chunk maps: for a terminal, and as PNG. Pure.

In a terminal one letter stands for so many neighbouring chunks as make the map fit: its shade says how many of them are here,
its colour the same once more, from blue to red. In the PNG each chunk is a square of its own.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

EMPTY, PENDING, READY, FAILED, VERIFY = range(5)
"""State bytes as the API gives them (see the segment in docs/architecture.md)."""

_SHADES: Final = "·░▒▓█"
_PLAIN_SHADES: Final = ".:+*#"
_MARKS: Final = {FAILED: "✗x", PENDING: "↓v", VERIFY: "??"}
"""Shown instead of a shade where a chunk of the cell is in this state; the second for terminals without Unicode."""
_COLOURS: Final = (240, 27, 38, 214, 196)
"""Of the 256 colours of terminals, by shade."""
_MARK_COLOURS: Final = {FAILED: 201, PENDING: 226, VERIFY: 51}
_MAX_ROWS: Final = 12

_PALETTE: Final = bytes.fromhex("30343a f0c000 2a9d4a e0218a 30b0d0 ffffff")
"""PNG colours by state; the last is the paper."""
_PAPER: Final = 5
_PNG_WIDTH: Final = 768
_GAP: Final = 12


def states_of(blob: object) -> bytes:
    """The state bytes in the API's answer for a blob; none if there are none."""
    packed = blob.get("states") if isinstance(blob, Mapping) else None
    if not isinstance(packed, str):
        return b""
    try:
        return zlib.decompressobj().decompress(base64.b64decode(packed), 1 << 26)
    except (binascii.Error, zlib.error, ValueError):
        return b""


def terminal_map(states: bytes, width: int, colour: bool, unicode: bool) -> Iterator[str]:
    """Lines of at most `width` letters that show the map of a blob."""
    per_cell = -(-len(states) // (width * _MAX_ROWS)) or 1
    for start in range(0, len(states), per_cell * width):
        line = states[start : start + per_cell * width]
        cells = (line[at : at + per_cell] for at in range(0, len(line), per_cell))
        yield _line((_cell(cell, unicode) for cell in cells), colour)


def legend(states: bytes, width: int, unicode: bool) -> str:
    """What the letters of `terminal_map` mean."""
    per_cell = -(-len(states) // (width * _MAX_ROWS)) or 1
    shades = _SHADES if unicode else _PLAIN_SHADES
    of = "a chunk" if per_cell == 1 else f"{per_cell} chunks"
    marks = [letters[0 if unicode else 1] for letters in _MARKS.values()]
    return f"a letter is {of}: {shades[0]} none {shades[1:-1]} some {shades[-1]} all here, {marks[1]} coming, {marks[0]} failed"


def _cell(cell: bytes, unicode: bool) -> tuple[str, int]:
    """Letter and colour."""
    for state, letters in _MARKS.items():
        if state in cell:
            return letters[0 if unicode else 1], _MARK_COLOURS[state]
    ready = cell.count(READY)
    # "None" and "all" are said of cells only in which that is true.
    shade = 0 if not ready else 4 if ready == len(cell) else 1 + 3 * ready // (len(cell) + 1)
    return (_SHADES if unicode else _PLAIN_SHADES)[shade], _COLOURS[shade]


def _line(cells: Iterator[tuple[str, int]], colour: bool) -> str:
    out, current = [], -1
    for letter, number in cells:
        if colour and number != current:
            out.append(f"\x1b[38;5;{number}m")
            current = number
        out.append(letter)
    return "".join(out) + ("\x1b[0m" if current >= 0 else "")


def png(maps: Sequence[bytes]) -> bytes:
    """A PNG of the maps of blobs, one below the other."""
    largest = max(map(len, maps), default=0)
    columns = next((c for c in (16, 32, 64, 128, 256, 384) if c * c >= largest), _PNG_WIDTH)
    scale = _PNG_WIDTH // columns
    paper = bytes([0, *[_PAPER] * _PNG_WIDTH])  # a line begins with its filter: none
    lines = [paper] * _GAP
    for states in maps:
        for start in range(0, len(states), columns):
            row = bytes(min(state, VERIFY) for state in states[start : start + columns])
            row += bytes([_PAPER]) * (columns - len(row))
            lines += [b"\0" + b"".join(bytes([state]) * scale for state in row)] * scale
        lines += [paper] * _GAP
    header = struct.pack(">IIBBBBB", _PNG_WIDTH, len(lines), 8, 3, 0, 0, 0)
    parts = ((b"IHDR", header), (b"PLTE", _PALETTE), (b"IDAT", zlib.compress(b"".join(lines), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
