"""The journal of a lane: what was kept and not dropped is found by a successor, whatever came between."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.frontends.fuse import protocol as p
from nydusd.frontends.fuse.journal import READS, REQUEST_SIZE, Journal, create


@pytest.fixture
def fd() -> Iterator[int]:
    made = create()
    yield made
    os.close(made)


def read_request(unique: int, offset: int = 0) -> bytes:
    body = p.READ_IN.pack(0, offset, 4096, 0, 0, 0, 0)
    return p.IN_HEADER.pack(p.IN_HEADER.size + len(body), p.READ, unique, 2, 0, 0, 1, 0, 0) + body


def take(journal: Journal, unique: int) -> int:
    """What the kernel and a front end do: a read is placed in the buffer, and parked."""
    request = read_request(unique, unique * 10)
    journal.request[: len(request)] = request
    return journal.keep()


def found(journal: Journal) -> dict[int, bytes]:
    return {place: bytes(request) for place, request, _ in journal.left()}


def test_a_new_journal_is_empty_and_takes_little_memory(fd: int) -> None:
    journal = Journal(fd)
    assert journal.intact
    assert not found(journal)
    assert p.REQUEST.unpack_from(journal.request)[0] == 0
    assert len(journal.request) == REQUEST_SIZE
    # A page of the buffer that is missing when we are killed in read(2) would be an EIO for who asks: all are there.
    assert REQUEST_SIZE <= os.fstat(fd).st_blocks * 512 < 4 * REQUEST_SIZE
    assert not os.get_inheritable(fd)


@given(st.lists(st.integers(0, 9)))
def test_what_is_not_dropped_is_found(steps: list[int]) -> None:
    fd = create()
    try:
        journal, kept, unique = Journal(fd), dict[int, bytes](), 0
        for step in steps:
            if step == 0:
                journal = Journal(fd)
                assert found(journal) == kept
            elif step < 4 and kept:
                place = sorted(kept)[step % len(kept)]
                journal.drop(place)
                del kept[place]
            else:
                unique += 2
                place = take(journal, unique)
                assert place not in kept
                kept[place] = read_request(unique, unique * 10)
        assert found(Journal(fd)) == kept
    finally:
        os.close(fd)


def test_an_interrupt_is_remembered_until_the_read_is_answered(fd: int) -> None:
    journal = Journal(fd)
    first, second = take(journal, 2), take(journal, 4)
    journal.interrupted(second)
    assert {place: flag for place, _, flag in Journal(fd).left()} == {first: False, second: True}
    journal.drop(second)
    assert take(journal, 6) == second
    assert [flag for _, _, flag in Journal(fd).left()] == [False, False]


def test_a_place_that_is_dropped_twice_is_given_once(fd: int) -> None:
    journal = Journal(fd)
    place = take(journal, 2)
    journal.drop(place)
    journal.drop(place)
    assert take(journal, 4) != take(journal, 6)


def test_it_is_full_when_it_is(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(fd)
    monkeypatch.setattr(journal, "_unused", 2)
    places = [take(journal, 2), take(journal, 4)]
    assert journal.full
    journal.drop(places[0])
    assert not journal.full


def test_the_last_place_can_be_used(fd: int) -> None:
    journal = Journal(fd)
    places = {take(journal, 2 * number) for number in range(1, READS + 1)}
    assert places == set(range(READS))
    assert journal.full
    assert len(found(Journal(fd))) == READS
    assert Journal(fd).full is False, "before it was asked what is left"


@pytest.mark.parametrize("size", [0, 100, 1 << 23])
def test_a_journal_of_another_size_is_begun_anew(size: int) -> None:
    fd = os.memfd_create("nydusd-journal", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        assert not Journal(fd).intact
        again = Journal(fd)
        assert again.intact
        assert not found(again)
    finally:
        os.close(fd)


def test_a_request_is_given_up_after_three_crashes_and_only_that_one(fd: int) -> None:
    lives = [Journal(fd).serve_again(8)]
    for crashed in (True, False, True, False, True, True):
        lives.append(Journal(fd, crashed=crashed).serve_again(8))
    assert lives == [True, True, True, True, True, False, False]
    assert Journal(fd, crashed=True).serve_again(10)


def test_a_request_that_was_survived_starts_anew(fd: int) -> None:
    for _ in range(5):
        journal = Journal(fd, crashed=True)
        assert journal.serve_again(8)
        journal.served_again()
