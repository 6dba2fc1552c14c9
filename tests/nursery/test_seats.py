"""The ledger of seats: who is granted one, who is asked for one back, who is late; and packets that are none."""

from __future__ import annotations

import struct

import pytest

from nydusd.nursery.seats import MOST, PATIENCE, ROLES, TURNS, Answer, Ask, Ledger, answers_of, asks_of, packet_of

LATE = TURNS["decompress"] + PATIENCE["decompress"]


class Book:
    """A ledger of 4 seats whose daemons answer only when they are told to; times are seconds since its beginning."""

    def __init__(self, daemons: int, seats: int = 4) -> None:
        self.ledger = Ledger("decompress")
        self.seats = seats
        self.now = 0.0
        for key in range(daemons):
            self.ledger.join(key)
            self.say(key)

    def say(self, key: int, have: int | None = None, want: int = 0, urgent: bool = True) -> Answer:
        """A daemon says how things are, by default that it has all that it was granted; gives what it is told."""
        self.now += 1e-6
        granted = self.ledger.answer(key).granted
        has = self.ledger.facts(key)["have"] if have is None else have
        assert self.ledger.hear(key, Ask(has, want, int(urgent), granted, self.seats), self.now)
        self.ledger.settle(self.now)
        return self.ledger.answer(key)

    def back(self) -> list[int]:
        """What is wanted back of each."""
        return [self.ledger.answer(key).back for key in self.ledger._members]

    def have(self) -> list[int]:
        return [self.ledger.facts(key)["have"] for key in self.ledger._members]

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.ledger.settle(self.now)


def test_what_is_free_is_granted_at_once_and_no_more() -> None:
    book = Book(2)
    assert book.say(0, want=3).granted == 3
    assert book.say(1, want=3).granted == 1
    assert book.ledger.taken == 4


def test_who_has_fewest_is_granted_first_and_among_these_who_has_a_reader() -> None:
    book = Book(4)
    book.say(0, want=4)
    for key in (1, 2, 3):
        book.say(key, want=1, urgent=key == 3)
    book.say(0, have=3)
    assert book.have() == [3, 0, 0, 1]
    book.say(0, have=1)
    assert book.have() == [1, 1, 1, 1]


def test_who_has_most_is_asked_for_as_many_as_others_lack() -> None:
    book = Book(3)
    book.say(0, want=3)
    book.say(1, want=1)
    assert book.say(2, want=1).waiting == 1
    assert book.back() == [1, 0, 0]
    answer = book.ledger.answer(0)
    assert (answer.keep, answer.turn) == (2, round(TURNS["decompress"] * 1000))
    book.say(0, have=2)
    assert book.have() == [2, 1, 1]
    assert book.back() == [0, 0, 0]


def test_of_who_has_one_only_it_is_asked_for_who_has_none_and_the_longest_holder_first() -> None:
    book = Book(5)
    for key in range(4):
        book.say(key, want=1)
        book.wait(0.01)
    for key in range(4):
        book.say(key, want=2)
    assert book.back() == [0, 0, 0, 0, 0], "they would only change places"
    book.say(4, want=1)
    assert book.back() == [1, 0, 0, 0, 0]
    book.say(0, have=0, want=1)
    assert book.have() == [0, 1, 1, 1, 1]
    assert book.back() == [0, 1, 0, 0, 0]


def test_the_more_wait_the_shorter_is_a_turn() -> None:
    book = Book(12)
    for key in range(4):
        book.say(key, want=1)
    for key in range(4, 12):
        book.say(key, want=1)
        book.wait(0)
    assert book.back() == [1] * 4 + [0] * 8
    assert {book.ledger.answer(key).turn for key in range(4)} == {round(TURNS["decompress"] * 1000)}
    book.say(0, have=0, want=1)
    assert book.back() == [0, 1, 1, 1, 1] + [0] * 7
    assert book.ledger.answer(4).turn == round(TURNS["decompress"] * 1000) // 2, "for 4 seats 8 wait"


def test_who_does_not_answer_is_late_and_what_he_has_is_granted_to_others() -> None:
    book = Book(3)
    book.say(0, want=4)
    book.say(1, want=2)
    assert book.ledger.due() == pytest.approx(LATE, abs=1e-3)
    book.wait(LATE - 0.01)
    assert book.have() == [4, 0, 0]
    book.wait(0.02)
    assert book.have() == [4, 2, 0]
    assert book.say(2, want=1).granted == 1, "nobody else waits for it again"
    assert book.back() == [3, 0, 0]
    assert book.ledger.due() is None


def test_who_was_late_counts_again_as_soon_as_he_gives_one_back() -> None:
    book = Book(2)
    book.say(0, want=4)
    book.say(1, want=2)
    book.wait(LATE + 0.01)
    assert book.ledger.facts(0)["late"] is True
    book.say(0, have=3)
    assert book.ledger.facts(0)["late"] is False
    assert book.back() == [1, 0], "there are five"
    book.say(0, have=2)
    assert book.back() == [0, 0]


def test_what_was_begun_without_a_seat_is_wanted_back() -> None:
    book = Book(2)
    assert book.say(0, have=3).back == 0
    book.say(1, have=3)
    assert sum(book.back()) == 2


def test_a_daemon_that_is_gone_has_nothing() -> None:
    book = Book(2)
    book.say(0, want=4)
    book.say(1, want=1)
    book.ledger.leave(0)
    book.ledger.settle(book.now)
    assert book.ledger.answer(1).granted == 1
    assert book.ledger.taken == 1


def test_a_grant_that_is_on_its_way_counts_until_it_was_seen_and_is_not_granted_twice() -> None:
    book = Book(2)
    assert book.say(0, want=2).granted == 2
    assert book.ledger.hear(0, Ask(0, 2, 1, 0, 4), 0.0), "said before it has seen them"
    book.ledger.settle(0.0)
    assert book.ledger.answer(0).granted == 2
    assert book.ledger.taken == 2
    assert book.say(0, have=0).granted == 2, "and given back unused"
    assert book.ledger.taken == 0


@pytest.mark.parametrize("seen", [3, 1 << 31])
def test_grants_that_were_not_given_cannot_have_been_seen(seen: int) -> None:
    book = Book(1)
    book.say(0, want=2)
    assert not book.ledger.hear(0, Ask(0, 0, 0, seen, 4), 0.0)


def test_seen_grants_are_not_unseen() -> None:
    book = Book(1)
    book.say(0, want=2)
    book.say(0)
    assert not book.ledger.hear(0, Ask(0, 0, 0, 1, 4), 0.0)


GOOD = Ask(1, 2, 1, 3, 4)


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"nydusd seats 1",
        b"nydusd seats 2" + packet_of([GOOD, GOOD])[14:],
        packet_of([GOOD]),
        packet_of([GOOD, GOOD]) + b"\0",
        packet_of([GOOD, GOOD._replace(have=MOST + 1)]),
        packet_of([GOOD._replace(want=MOST + 1), GOOD]),
        packet_of([GOOD._replace(urgent=2), GOOD]),
        packet_of([GOOD._replace(seats=0), GOOD]),
        packet_of([GOOD, GOOD._replace(seats=MOST + 1)]),
    ],
    ids=["empty", "cut", "version", "one role", "longer", "have", "want", "urgent", "no seats", "seats"],
)
def test_what_is_not_said_as_it_must_be_is_not_taken(bad: bytes) -> None:
    assert asks_of(bad) is None


def test_what_is_said_arrives() -> None:
    assert asks_of(packet_of([GOOD, Ask(seats=1)])) == [GOOD, Ask(seats=1)]
    assert answers_of(struct.pack("=IIIIIIII", *range(8)) * len(ROLES)) == [Answer(*range(8))] * len(ROLES)
    assert answers_of(b"x") is None
