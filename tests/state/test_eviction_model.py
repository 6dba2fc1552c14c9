"""The eviction protocol, step by step in every order: a reader never takes a hole for data.

One chunk, three actors: readers that read it, evictions that take it out, fills that bring it back. Each actor is a list of
steps, each atomic; all interleavings are walked through. The steps are those of `nydusd/storage/state/eviction.py`, of
`BlobDevice` and of the job `fill`; the second half checks that the model would notice if one were left out or moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from nydusd.storage.state.segment import EMPTY, PENDING, READY


@dataclass(frozen=True)
class World:
    """What is shared, and what each actor has noted. `data`: the chunk's bytes are in the file."""

    state: int = READY
    epoch: int = 0
    data: bool = True
    stored: bool = True  # the bit of the map on disk
    owner: str = ""
    seen_epoch: int = -1
    seen_state: int = -1
    seen_data: bool | None = None


Step = Callable[[World], World | None]
"""Gives the world after it; None if the actor cannot go on now."""


# The supervisor is one process: its claims exclude each other, and one ends with its job.
def evict_claim(w: World) -> World | None:
    return replace(w, state=PENDING, owner="evict") if w.state == READY else None


def evict_epoch(w: World) -> World | None:
    return replace(w, epoch=w.epoch + 1)


def evict_map(w: World) -> World | None:
    return replace(w, stored=False)


def evict_punch(w: World) -> World | None:
    return replace(w, data=False)


def evict_end(w: World) -> World | None:
    return replace(w, state=EMPTY, owner="") if w.owner == "evict" else w


def fill_claim(w: World) -> World | None:
    return replace(w, state=PENDING, owner="fill") if w.state == EMPTY else None


def fill_write(w: World) -> World | None:
    return replace(w, data=True)


def fill_ready(w: World) -> World | None:
    return replace(w, state=READY, owner="")


def read_epoch(w: World) -> World | None:
    return replace(w, seen_epoch=w.epoch)


def read_state(w: World) -> World | None:
    return replace(w, seen_state=w.state)


def read_data(w: World) -> World | None:
    return replace(w, seen_data=w.data)


EVICT = (evict_claim, evict_epoch, evict_map, evict_punch, evict_end)
FILL = (fill_claim, fill_write, fill_ready)
READ = (read_epoch, read_state, read_data)


class Lie(AssertionError):
    """A reader took a hole for data, or the stored map claims what is not there."""


def explore(*actors: tuple[Step, ...], check_epoch: bool = True) -> int:
    """Walk through all orders; gives the number of complete ones in which the reader took its bytes. Raises Lie.

    An actor that cannot go on waits; if all that are left wait, the walk ends there.
    """
    served = 0

    def walk(w: World, at: tuple[int, ...]) -> None:
        nonlocal served
        if w.stored and not w.data:
            raise Lie("the stored map claims a hole")
        for i, actor in enumerate(actors):
            if at[i] == len(actor):
                continue
            after = actor[at[i]](w)
            if after is None:
                continue
            if actor is reader and at[i] + 1 == len(actor):
                good = after.seen_state == READY and (not check_epoch or after.epoch == after.seen_epoch)
                if good and not after.seen_data:
                    raise Lie("a reader took a hole for data")
                served += good
            walk(after, (*at[:i], at[i] + 1, *at[i + 1 :]))

    reader = actors[0]
    walk(World(), (0,) * len(actors))
    return served


def looked_at_the_end(read: tuple[Step, ...]) -> tuple[Step, ...]:
    """The last look at the epoch is a step of its own: it comes some time after the read."""
    return (*read, lambda w: w)


@pytest.mark.parametrize(
    "others",
    [
        (EVICT,),
        (EVICT + FILL,),
        (EVICT, FILL),
        (EVICT + FILL + EVICT + FILL,),
        (EVICT, FILL, EVICT),
        (EVICT, EVICT, FILL),
    ],
)
def test_reader_never_takes_a_hole_for_data(others: tuple[tuple[Step, ...], ...]) -> None:
    assert explore(looked_at_the_end(READ), *others) > 0


class TestTheModelNotices:
    """Each step and its place are needed."""

    def fails(self, read: tuple[Step, ...], *others: tuple[Step, ...], check_epoch: bool = True) -> bool:
        try:
            explore(looked_at_the_end(read), *others, check_epoch=check_epoch)
        except Lie:
            return True
        return False

    def test_no_epoch_at_all(self) -> None:
        assert self.fails(READ, EVICT, check_epoch=False)

    def test_state_byte_looked_at_again_would_not_do(self) -> None:
        """The chunk may be back by then: this is why there is an epoch."""

        def state_again(w: World) -> World | None:
            return replace(w, seen_state=min(w.seen_state, w.state) if w.state != READY else w.seen_state)

        assert self.fails((read_epoch, read_state, read_data, state_again), EVICT, FILL, check_epoch=False)

    def test_epoch_loaded_after_the_state(self) -> None:
        assert self.fails((read_state, read_epoch, read_data), EVICT)

    def test_epoch_raised_before_the_claim(self) -> None:
        assert self.fails(READ, (evict_epoch, evict_claim, evict_map, evict_punch, evict_end))

    def test_epoch_raised_after_the_punch(self) -> None:
        assert self.fails(READ, (evict_claim, evict_map, evict_punch, evict_epoch, evict_end))

    def test_claim_ended_before_the_punch(self) -> None:
        assert self.fails(READ, (evict_claim, evict_epoch, evict_map, evict_end, evict_punch), FILL)

    def test_map_cleared_after_the_punch(self) -> None:
        assert self.fails(READ, (evict_claim, evict_epoch, evict_punch, evict_map, evict_end))
