"""Answers to the kernel, written to one front end's fd; data goes from the buffer that the cache file was read into.

Runs in a front-end process. An answer is one write(2): the kernel takes all of it or nothing.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import NamedTuple

from . import protocol as p
from .complaints import Complaints

GONE = (errno.ENODEV, errno.ECONNABORTED)
"""read(2) and write(2): the mount is gone."""
_NOBODY_WAITS = (errno.ENOENT, *GONE)
"""write(2): the request ended meanwhile (a predecessor had answered it, or it was interrupted), or the mount did."""
_HEAD = p.PAGE - p.OUT_HEADER.size
"""Where a read's reply begins in its buffer, so that the data lies on a page boundary."""
_SIZES = 64
"""Sizes of reads whose parts of the buffer are kept at hand: programs use few."""


class Part(NamedTuple):
    """The buffer for data of one size: `target` to read it into, as readv wants it, and `reply`, header included."""

    target: list[memoryview]
    reply: memoryview


class Answers:
    """Sends the answers of one front end; what the kernel refuses is a complaint."""

    def __init__(self, fd: int, complaints: Complaints) -> None:
        self._fd = fd
        self._complaints = complaints
        self._buffer = memoryview(mmap.mmap(-1, p.PAGE + p.MAX_READ))
        self.data = self._buffer[p.PAGE :]
        """Where the data of a read is put before it is sent."""
        self.parts: dict[int, Part] = {}
        """By size, those that were asked for lately."""

    def part(self, size: int) -> Part:
        """The buffer for `size` bytes of data."""
        part = self.parts.get(size)
        if part is None:
            if len(self.parts) >= _SIZES:
                self.parts.clear()
            part = self.parts[size] = Part([self.data[:size]], self._buffer[_HEAD : p.PAGE + size])
        return part

    def data_of(self, unique: int, part: Part, size: int) -> None:
        """Answer with the `size` bytes that were read into `part`."""
        p.OUT_HEADER.pack_into(self._buffer, _HEAD, p.OUT_HEADER.size + size, 0, unique)
        self.send(part.reply)

    def body(self, unique: int, body: bytes) -> None:
        """Answer with a structure, or with nothing but success."""
        self.send(p.OUT_HEADER.pack(p.OUT_HEADER.size + len(body), 0, unique) + body)

    def fail(self, unique: int, code: int) -> None:
        """Answer with an errno."""
        self.send(p.OUT_HEADER.pack(p.OUT_HEADER.size, -code, unique))

    def send(self, reply: bytes | memoryview) -> None:
        """Hand the kernel a reply, header included."""
        try:
            os.write(self._fd, reply)
        except OSError as e:
            if e.errno not in _NOBODY_WAITS:
                self._complaints.log("the kernel refused a reply of %d bytes: %s", len(reply), e.strerror)
