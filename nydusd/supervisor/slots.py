"""SlotTable: chunks that travel in shared memory, and who holds them.

A region of the arena is filled by one job and kept after its readers have copied it, so that the next read of the same chunk
need not fetch it again; the one unused for longest goes first when room is needed. A region that anybody holds stays: the
job that fills it, a request that will be answered with it, a client that copies from it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from nydusd import points
from nydusd.errors import ScarceError
from nydusd.ipc.arena import Arena
from nydusd.ipc.messages import SlotRef


@dataclass(eq=False, slots=True)
class _Region:
    offset: int
    length: int
    chunks: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    holders: int = 0


class SlotTable:
    """All regions of the daemon's arena, which is made when first needed. A region is named by its offset.

    Front ends may outlive the supervisor and give leases of it back to the next one, whose numbers are others: `first_lease`.
    """

    def __init__(self, name: str, size: int, first_lease: int = 1) -> None:
        self._name = name
        self._size = size
        self._arena: Arena | None = None
        self._regions: OrderedDict[int, _Region] = OrderedDict()
        self._where: dict[tuple[int, int], _Region] = {}
        self._leases: dict[int, tuple[bytes, int, list[_Region]]] = {}
        self._numbers = count(first_lease)
        self.beside: SlotTable | None = None
        """Another one in the same /dev/shm, which gives what it only keeps when memory is short."""

    @property
    def arena(self) -> Arena:
        """Raises CacheError when shared memory is full."""
        if self._arena is None:
            self._arena = Arena.create(self._name, self._size)
            points.reach("supervisor: arena made")
        return self._arena

    @property
    def size(self) -> int:
        return self._size

    def reserve(self, lengths: Sequence[int]) -> list[int] | None:
        """Regions of these lengths, each held once; None while there is no room for all of them.

        Nobody waits with a part of what he needs: so two cannot wait for each other. Where memory is short, and not the arena,
        he waits for those who have a region here. Raises ScarceError when there are none of these, CacheError for all else.
        """
        offsets: list[int] = []
        granted = False
        try:
            for length in lengths:
                offset = self._make_room(length, len(offsets))
                if offset is None:
                    return None
                self._regions[offset] = _Region(offset, length, holders=1)
                offsets.append(offset)
            granted = True
            return offsets
        finally:
            if not granted:
                for taken in offsets:
                    self.drop(taken)

    def _make_room(self, length: int, own: int) -> int | None:
        """Offset of a free piece; `own` regions are of him who needs it."""
        arena = self.arena
        while True:
            lack = None
            try:
                offset = arena.allocate(length, all_of_it=len(self._regions) == own)
                if offset is not None:
                    return offset
            except ScarceError as e:
                lack = e
            if self._give_up(length if lack is not None else 1):
                continue
            if lack is None or self.beside is None or not self.beside.spare(length):
                if lack is not None and len(self._regions) == own:
                    raise lack
                return None

    def _give_up(self, wanted: int) -> bool:
        """Give up regions with so many bytes, those that were unused for longest first. False if somebody holds each."""
        unused = [region for region in self._regions.values() if not region.holders]
        for region in unused:
            if wanted <= 0:
                break
            wanted -= region.length
            self._forget(region)
        return bool(unused)

    def spare(self, wanted: int) -> bool:
        """Somebody is short of so many bytes of memory: give back what is only kept. False if there is nothing."""
        if self._arena is None:
            return False
        self._give_up(wanted)
        return self._arena.give_back()

    def place(self, offset: int, handle: int, placed: Sequence[Sequence[int]]) -> None:
        """The job that held this region is done; it holds these (chunk, offset, length)."""
        region = self._regions[offset]
        for chunk, at, length in placed:
            region.chunks[handle, chunk] = (at, length)
            self._where[handle, chunk] = region
        self.drop(offset)

    def where(self, handle: int, chunk: int) -> int | None:
        """The region that has this chunk."""
        region = self._where.get((handle, chunk))
        return None if region is None else region.offset

    def has(self, handle: int, chunk: int) -> bool:
        return (handle, chunk) in self._where

    def hold(self, offset: int) -> None:
        """Keep a region until `drop`."""
        self._regions[offset].holders += 1

    def drop(self, offset: int) -> None:
        """End one hold. A region that nobody holds stays for its chunks, if it has any, until room is needed."""
        region = self._regions[offset]
        region.holders -= 1
        if not region.holders and not region.chunks:
            self._forget(region)

    def clear_unused(self) -> bool:
        """Give up all regions if nobody holds one: then the arena is in one piece again. False if somebody does."""
        if any(region.holders for region in self._regions.values()):
            return False
        for region in list(self._regions.values()):
            self._forget(region)
        return True

    def lease(self, client: bytes, handle: int, chunks: Sequence[int], request: int = 0) -> SlotRef:
        """Hand chunks to a client until it releases them, or withdraws its request of this number."""
        regions = []
        found = []
        for chunk in chunks:
            region = self._where[handle, chunk]
            if region not in regions:
                regions.append(region)
                region.holders += 1
                self._regions.move_to_end(region.offset)
            found.append((chunk, *region.chunks[handle, chunk]))
        number = next(self._numbers)
        self._leases[number] = (client, request, regions)
        return SlotRef(number, self._name, handle, found)

    def release(self, number: int) -> None:
        """The client has copied the data. Unknown numbers are ignored: a lease ends once."""
        _, _, regions = self._leases.pop(number, (b"", 0, []))
        for region in regions:
            self.drop(region.offset)

    def drop_client(self, client: bytes) -> None:
        """A client has died: its leases end."""
        for number in [n for n, (owner, _, _) in self._leases.items() if owner == client]:
            self.release(number)

    def withdraw(self, client: bytes, request: int) -> None:
        """The client uses nothing of what it was given for a request, perhaps as it does not look for answers any more."""
        for number in [n for n, (owner, of, _) in self._leases.items() if owner == client and of == request]:
            self.release(number)

    def _forget(self, region: _Region) -> None:
        for key in region.chunks:
            if self._where.get(key) is region:
                del self._where[key]
        del self._regions[region.offset]
        self.arena.free(region.offset, region.length)

    def in_use(self) -> int:
        """Bytes of the arena that are allocated."""
        return 0 if self._arena is None else self._arena.size - self._arena.free_bytes()

    def held(self) -> int:
        """Regions that somebody holds."""
        return sum(1 for region in self._regions.values() if region.holders)

    def trim(self) -> None:
        """Give the arena's memory back to the system if nothing is in it."""
        if self._arena is not None:
            self._arena.trim()

    def close(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena = None
