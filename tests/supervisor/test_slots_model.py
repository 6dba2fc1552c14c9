"""Any interleaving of jobs, requests and clients that hold regions of the slot arena, die, and outlive their supervisor:
what somebody holds keeps its bytes, and what nobody holds is free in the end."""

from __future__ import annotations

import time
from itertools import count, pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from nydusd.ipc.arena import PAGE, Arena
from nydusd.ipc.messages import SlotRef
from nydusd.storage.state.names import remove
from nydusd.supervisor.slots import SlotTable

PAGES = 12
HANDLE = 7
picks = st.integers(0, 1 << 16)
clients = st.sampled_from([b"fuse-0-1", b"fuse-1-1", b"fuse-2-1"])
_machines = count(1)


class Machine(RuleBasedStateMachine):
    """`jobs` are regions that a job fills, `holds` those that requests keep, `leases` what clients copy from."""

    def __init__(self) -> None:
        super().__init__()
        self.instance = f"slots-{time.monotonic_ns()}-{next(_machines)}"
        self.term = 0
        self.names: list[str] = []
        self.tags = count(1)
        self.begin()
        self.stale: list[int] = []

    def begin(self) -> None:
        """The tables of a supervisor."""
        self.names.append(f"/nydusd.{self.instance}.{self.term}.arena")
        self.slots = SlotTable(self.names[-1], PAGES * PAGE, (self.term << 32) + 1)
        self.jobs: list[tuple[int, int]] = []
        self.holds: list[int] = []
        self.placed: dict[int, bytes] = {}
        """What each chunk is, by its number."""
        self.leases: list[tuple[bytes, SlotRef]] = []

    @rule(lengths=st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=3))
    def jobs_begin(self, lengths: list[int]) -> None:
        offsets = self.slots.reserve(lengths)
        if offsets is not None:
            self.jobs += zip(offsets, lengths, strict=True)

    @precondition(lambda self: self.jobs)
    @rule(pick=picks)
    def job_whose_worker_died_is_done_again(self, pick: int) -> None:
        offset, length = self.jobs[pick % len(self.jobs)]
        self.slots.arena.view(offset, length)[:] = b"?" * length  # as far as the dead one got

    @precondition(lambda self: self.jobs)
    @rule(pick=picks, chunks=st.lists(st.integers(0, 20), max_size=3, unique=True))
    def job_ends(self, pick: int, chunks: list[int]) -> None:
        offset, length = self.jobs.pop(pick % len(self.jobs))
        size = length // max(len(chunks), 1)
        placed = []
        for number, chunk in enumerate(chunks if size else []):
            content = next(self.tags).to_bytes(8, "little") * (size // 8 + 1)
            self.placed[chunk] = content[:size]
            placed.append((chunk, offset + number * size, size))
            self.slots.arena.view(offset + number * size, size)[:] = content[:size]
        self.slots.place(offset, HANDLE, placed)

    @rule(pick=picks)
    def request_holds(self, pick: int) -> None:
        there = [chunk for chunk in self.placed if self.slots.has(HANDLE, chunk)]
        if there:
            region = self.slots.where(HANDLE, there[pick % len(there)])
            assert region is not None
            self.slots.hold(region)
            self.holds.append(region)

    @precondition(lambda self: self.holds)
    @rule(pick=picks)
    def request_ends(self, pick: int) -> None:
        self.slots.drop(self.holds.pop(pick % len(self.holds)))

    @rule(client=clients, chunks=st.sets(st.integers(0, 20), min_size=1, max_size=4))
    def client_is_answered(self, client: bytes, chunks: set[int]) -> None:
        there = sorted(chunk for chunk in chunks if self.slots.has(HANDLE, chunk))
        if there:
            ref = self.slots.lease(client, HANDLE, there)
            assert [chunk for chunk, _, _ in ref.chunks] == there
            assert ref.lease not in self.stale, "a former supervisor gave this lease"
            self.leases.append((client, ref))

    @precondition(lambda self: self.leases)
    @rule(pick=picks, twice=st.booleans())
    def client_has_copied(self, pick: int, twice: bool) -> None:
        _, ref = self.leases.pop(pick % len(self.leases))
        for _ in range(1 + twice):
            self.slots.release(ref.lease)

    @precondition(lambda self: self.stale)
    @rule(pick=picks)
    def client_gives_a_former_supervisors_lease_back(self, pick: int) -> None:
        self.slots.release(self.stale[pick % len(self.stale)])

    @rule(client=clients)
    def client_dies(self, client: bytes) -> None:
        self.slots.drop_client(client)
        self.leases = [(owner, ref) for owner, ref in self.leases if owner != client]

    @rule()
    def nobody_needs_the_arena(self) -> None:
        busy = bool(self.jobs or self.holds or self.leases)
        assert self.slots.clear_unused() is not busy

    @rule()
    def memory_is_given_back(self) -> None:
        self.slots.trim()

    @precondition(lambda self: self.slots._arena is not None)
    @rule()
    def supervisor_is_killed_and_succeeded(self) -> None:
        """A client may copy still from the arena of the former one: the next one removes its name, not its pages."""
        copies = [(ref, Arena.open(ref.arena)) for _, ref in self.leases]
        expected = [[bytes(arena.view(at, size)) for _, at, size in ref.chunks] for ref, arena in copies]
        self.slots.close()
        remove(self.names[-1])
        self.stale += [ref.lease for _, ref in self.leases]
        self.term += 1
        self.begin()
        offsets = self.slots.reserve([PAGES * PAGE])
        assert offsets == [0]
        self.slots.arena.view(0, PAGES * PAGE)[:] = b"!" * (PAGES * PAGE)
        self.slots.drop(0)
        for (ref, arena), contents in zip(copies, expected, strict=True):
            assert [bytes(arena.view(at, size)) for _, at, size in ref.chunks] == contents
            arena.close()

    @invariant()
    def what_is_held_keeps_its_bytes(self) -> None:
        regions = sorted(self.slots._regions.values(), key=lambda region: region.offset)
        for before, after in pairwise(regions):
            assert before.offset + before.length <= after.offset, "two regions overlap"
        assert self.slots.in_use() == sum(-(-region.length // PAGE) * PAGE for region in regions)
        for chunk, content in self.placed.items():
            region = self.slots._where.get((HANDLE, chunk))
            if region is not None:
                at, size = region.chunks[HANDLE, chunk]
                assert region.offset <= at <= region.offset + region.length - size
                assert self.slots.arena.view(at, size) == content, f"chunk {chunk} has other bytes"
        held = {offset for offset, _ in self.jobs} | set(self.holds)
        held |= {region.offset for _, _, leased in self.slots._leases.values() for region in leased}
        assert {region.offset for region in regions if region.holders} == held
        assert len(self.slots._leases) == len(self.leases)

    def teardown(self) -> None:
        for offset, _ in self.jobs:
            self.slots.place(offset, HANDLE, [])
        for region in self.holds:
            self.slots.drop(region)
        for client, _ in self.leases:
            self.slots.drop_client(client)
        assert self.slots.clear_unused()
        assert not self.slots.in_use()
        self.slots.close()
        for name in self.names:
            remove(name)


def test_what_is_held_keeps_its_bytes_and_the_rest_is_free() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=80, stateful_step_count=40, deadline=None))
