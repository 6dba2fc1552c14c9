"""`Cache`: a data file and its stored chunk map, for tests of what is written there and what is believed of it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from nydusd.storage.state.map_file import checkpoint, load, record_path
from nydusd.storage.state.segment import READY, VERIFY, Identity

COUNT = 373
SIZE = 4096 + 47
CHUNK = 4096


class Cache:
    """A data file of `count` whole chunks of 4 KiB, and its map."""

    def __init__(self, folder: Path, count: int = COUNT) -> None:
        self.count = count
        self.data = folder / "b.blob.data"
        self.path = folder / "b.blob.data.chunk_map"
        self.record = record_path(self.path)
        with open(self.data, "wb") as file:
            file.truncate(CHUNK * count)

    def identity(self) -> Identity:
        fd = os.open(self.data, os.O_RDONLY)
        try:
            return Identity.of(fd, CHUNK * self.count, b"L" * 32)
        finally:
            os.close(fd)

    def checkpoint(self, ready: list[int]) -> None:
        fd = os.open(self.data, os.O_RDWR)
        try:
            checkpoint(self.path, fd, ready, self.count, self.identity())
        finally:
            os.close(fd)

    def load(self) -> bytearray:
        return load(self.path, self.count, self.identity())

    def believed(self) -> list[int]:
        return [i for i, state in enumerate(self.load()) if state == READY]

    def doubted(self) -> list[int]:
        return [i for i, state in enumerate(self.load()) if state == VERIFY]

    def foreign(self, chunks: list[int], marker: int = 0) -> None:
        """A map as the reference leaves it."""
        bits = bytearray((self.count + 7) // 8)
        for chunk in chunks:
            bits[chunk // 8] |= 0x80 >> chunk % 8
        header = struct.pack("<IIII", 0x424D4150, 1, 0x434D4150, marker)
        self.path.write_bytes(header.ljust(4096, b"\0") + bits)

    def bits(self) -> bytes:
        return self.path.read_bytes()[4096:]
