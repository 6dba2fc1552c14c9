"""What has come in shared memory for one read: used in place when the read ends, copied when it has to wait for more.

A supervisor gives a request of a read its place in shared memory when others give theirs back. So whoever waits for one
holds nothing there: two reads would else wait for each other, or one for itself, until their time is over.

Runs in the front ends that read cache files themselves (FUSE, block export). It dies with the process, whose leases the
supervisor ends.
"""

from __future__ import annotations

from typing import Protocol

from nydusd.formats.model import Extent
from nydusd.ipc.messages import SlotRef
from nydusd.storage.api.device import Pieces


class Source(Protocol):
    """What is used of `nydusd.ipc.client.ChunkClient`."""

    def pieces(self, slot: SlotRef) -> dict[int, memoryview]: ...
    def release(self, slot: SlotRef) -> None: ...


class Blobs(Protocol):
    """What is used of `nydusd.storage.api.device.BlobDevice`."""

    def handle(self, blob: int) -> int: ...
    def settled(self, vec: list[Extent]) -> list[Extent]: ...


class Part:
    """`data` are the bytes of a chunk from `start` on, to be addressed as in the whole chunk."""

    __slots__ = ("_data", "_start")

    def __init__(self, start: int, data: bytes) -> None:
        self._start = start
        self._data = memoryview(data)

    def __getitem__(self, where: slice, /) -> memoryview:
        return self._data[where.start - self._start : where.stop - self._start]


class Arrived:
    """`source` is the line by which it came."""

    __slots__ = ("_kept", "_slots")

    def __init__(self) -> None:
        self._slots: list[SlotRef] = []
        self._kept: dict[tuple[int, int], Part] = {}

    def add(self, slot: SlotRef) -> None:
        """A request was answered with this."""
        self._slots.append(slot)

    def keep(self, source: Source | None, device: Blobs, vec: list[Extent]) -> None:
        """The read of `vec` waits on: copy what it needs, as much as it reads, and give all leases back."""
        if not self._slots or source is None:
            return
        needed: dict[tuple[int, int], tuple[int, int]] = {}
        for blob, chunk, _, offset, length, chunk_len in device.settled(vec):
            if chunk_len >= 0:  # else it is no part of a chunk, or not known yet of which (`RangeDevice`)
                first, end = needed.get((blob, chunk), (offset, offset + length))
                needed[blob, chunk] = min(first, offset), max(end, offset + length)
        for key, plain in self._leased(source, device, vec).items():
            if key in needed:
                first, end = needed[key]
                self._kept[key] = Part(first, bytes(plain[first:end]))
        self.give_back(source)

    def pieces(self, source: Source | None, device: Blobs, vec: list[Extent]) -> Pieces:
        """The chunks that came, by index of the blob and number. To be dropped before `give_back`."""
        if not self._slots or source is None:
            return self._kept
        return {**self._kept, **self._leased(source, device, vec)}

    def give_back(self, source: Source | None) -> bool:
        """End all leases. Whether there were any."""
        slots, self._slots = self._slots, []
        if source is not None:
            for slot in slots:
                source.release(slot)
        return bool(slots)

    def _leased(self, source: Source, device: Blobs, vec: list[Extent]) -> dict[tuple[int, int], memoryview]:
        blobs = {device.handle(blob): blob for blob in {extent.blob for extent in vec}}
        return {
            (blobs[slot.handle], chunk): plain
            for slot in self._slots
            if slot.handle in blobs  # what is known of the pieces by now may have nothing of that blob in it
            for chunk, plain in source.pieces(slot).items()
        }
