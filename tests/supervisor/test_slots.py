"""SlotTable: leases, what is kept, and what goes first."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from nydusd.errors import CacheError, ScarceError
from nydusd.storage.state.names import remove
from nydusd.supervisor.slots import SlotTable

PAGE = 4096


@pytest.fixture
def slots() -> Iterator[SlotTable]:
    """Room for four pages."""
    name = f"/nydusd.slots-{time.monotonic_ns()}"
    table = SlotTable(name, 4 * PAGE)
    yield table
    table.close()
    remove(name)


def fill(slots: SlotTable, chunk: int, size: int = PAGE) -> int:
    """A region that holds this chunk of blob 1, held by nobody."""
    taken = slots.reserve([size])
    assert taken is not None
    slots.place(taken[0], 1, [(chunk, taken[0], size)])
    return taken[0]


def test_makes_no_arena_before_it_is_needed(slots: SlotTable) -> None:
    assert slots.in_use() == 0
    assert slots._arena is None


def test_chunk_unused_for_longest_goes_first(slots: SlotTable) -> None:
    for chunk in range(4):
        fill(slots, chunk)
    slots.release(slots.lease(b"c", 1, [0]).lease)
    fill(slots, 4)
    fill(slots, 5)
    assert [chunk for chunk in range(6) if slots.has(1, chunk)] == [0, 3, 4, 5]


def test_leased_chunk_stays_until_its_release(slots: SlotTable) -> None:
    for chunk in range(4):
        fill(slots, chunk)
    slot = slots.lease(b"c", 1, [0, 1, 2, 3])
    assert [chunk for chunk, _, _ in slot.chunks] == [0, 1, 2, 3]
    assert slots.reserve([1]) is None
    slots.release(slot.lease)
    assert slots.reserve([1]) is not None


def test_lease_of_a_dead_client_ends_and_of_others_not(slots: SlotTable) -> None:
    fill(slots, 0)
    slots.lease(b"dead", 1, [0])
    slots.lease(b"alive", 1, [0])
    slots.drop_client(b"dead")
    assert slots.held() == 1
    slots.drop_client(b"alive")
    assert slots.held() == 0


def test_lease_ends_once(slots: SlotTable) -> None:
    fill(slots, 0)
    first, second = slots.lease(b"c", 1, [0]), slots.lease(b"c", 1, [0])
    slots.release(first.lease)
    slots.release(first.lease)
    slots.release(4711)
    assert slots.held() == 1
    slots.release(second.lease)
    assert slots.held() == 0


def test_lease_for_a_request_that_is_withdrawn_ends_and_of_others_not(slots: SlotTable) -> None:
    fill(slots, 0)
    slots.lease(b"c", 1, [0], 7)
    slots.lease(b"c", 1, [0], 8)
    other = slots.lease(b"d", 1, [0], 7)
    slots.withdraw(b"c", 7)
    slots.withdraw(b"c", 8)
    assert slots.held() == 1
    slots.release(other.lease)
    assert slots.held() == 0


def test_all_or_nothing_is_reserved(slots: SlotTable) -> None:
    held = slots.reserve([2 * PAGE])
    assert held is not None
    assert slots.reserve([PAGE, 2 * PAGE]) is None
    assert slots.in_use() == 2 * PAGE
    assert slots.reserve([PAGE, PAGE]) is not None


def test_region_of_a_failed_job_is_free_again(slots: SlotTable) -> None:
    taken = slots.reserve([PAGE])
    assert taken is not None
    slots.place(taken[0], 1, [])
    assert slots.in_use() == 0


def test_region_of_a_failed_job_that_a_request_holds_is_free_after_it(slots: SlotTable) -> None:
    taken = slots.reserve([PAGE])
    assert taken is not None
    slots.hold(taken[0])
    slots.place(taken[0], 1, [])
    assert slots.in_use() == PAGE
    slots.drop(taken[0])
    assert slots.in_use() == 0


def test_chunk_in_two_regions_is_found_while_one_of_them_is_there(slots: SlotTable) -> None:
    fill(slots, 7)
    newer = fill(slots, 7)
    assert slots.where(1, 7) == newer
    for chunk in range(3):  # the older region goes
        fill(slots, chunk)
    assert slots.where(1, 7) == newer
    fill(slots, 3)
    assert slots.where(1, 7) is None


def test_clear_unused_does_nothing_while_one_region_is_held(slots: SlotTable) -> None:
    fill(slots, 0)
    fill(slots, 1)
    slot = slots.lease(b"c", 1, [0])
    assert not slots.clear_unused()
    assert slots.has(1, 1)
    slots.release(slot.lease)
    assert slots.clear_unused()
    assert slots.in_use() == 0


def test_shared_memory_that_is_full_is_an_error_and_can_be_tried_again(slots: SlotTable) -> None:
    slots._size = 1 << 60
    with pytest.raises(CacheError):
        slots.reserve([PAGE])
    slots._size = PAGE
    assert slots.reserve([PAGE]) == [0]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes can be backed in all still, in one item."""
    real, left = os.posix_fallocate, [1 << 30]

    def bounded(fd: int, offset: int, size: int) -> None:
        if size > left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= size
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", bounded)
    return left


def test_memory_that_ends_in_mid_reservation_takes_nothing(slots: SlotTable, memory: list[int]) -> None:
    memory[0] = PAGE
    with pytest.raises(ScarceError, match="No space left"):
        slots.reserve([PAGE, PAGE])
    assert slots.in_use() == 0
    assert slots.held() == 0


def test_who_finds_no_memory_waits_for_those_who_have_some(slots: SlotTable, memory: list[int]) -> None:
    held = slots.reserve([PAGE])
    assert held is not None
    memory[0] = 0
    assert slots.reserve([PAGE]) is None
    slots.drop(held[0])
    memory[0] = PAGE
    assert slots.reserve([PAGE]) == [0]


def test_the_last_of_the_memory_is_for_others_unless_nothing_else_is_here(
    slots: SlotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def system(_fd: int) -> SimpleNamespace:
        taken = os.fstat(slots.arena._fd).st_blocks * 512 // PAGE
        return SimpleNamespace(f_blocks=16, f_bavail=5 - taken, f_frsize=PAGE)

    monkeypatch.setattr(os, "fstatvfs", system)
    first = slots.reserve([3 * PAGE])
    assert first is not None
    assert slots.reserve([PAGE]) is None, "two of 16 pages are left, an eighth"
    slots.drop(first[0])
    fill(slots, 0, 2 * PAGE)
    assert slots.reserve([2 * PAGE]) is not None
    assert not slots.has(1, 0), "what is only kept is given up before"
    slots.drop(0)
    assert slots.reserve([4 * PAGE]) == [0], "there is nobody whom it could wait for"


def test_what_is_only_kept_is_given_up_for_want_of_memory(slots: SlotTable, memory: list[int]) -> None:
    fill(slots, 0)
    fill(slots, 1)
    slots.lease(b"c", 1, [1])
    memory[0] = 0
    assert slots.reserve([PAGE]) is None
    assert [slots.has(1, 0), slots.has(1, 1)] == [False, True]


def test_what_is_only_kept_beside_is_given_up_for_want_of_memory(slots: SlotTable, memory: list[int]) -> None:
    other = SlotTable(f"{slots._name}-other", 4 * PAGE)
    slots.beside, other.beside = other, slots
    try:
        assert other.reserve([PAGE]) == [0]
        other.drop(0)
        assert os.stat(f"/dev/shm{other._name}").st_blocks
        memory[0] = 0
        with pytest.raises(ScarceError):
            slots.reserve([PAGE])
        assert not os.stat(f"/dev/shm{other._name}").st_blocks, "nobody uses it"
        memory[0] = 4 * PAGE
        kept = [fill(slots, chunk) for chunk in range(4)]
        memory[0] = 0
        with pytest.raises(ScarceError):
            other.reserve([PAGE])
        assert not any(slots.has(1, chunk) for chunk in range(4)), kept
        assert not os.stat(f"/dev/shm{slots._name}").st_blocks
    finally:
        other.close()
        remove(other._name)
