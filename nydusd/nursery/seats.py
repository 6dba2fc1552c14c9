"""Seats: how many worker processes the daemons of a node have together, and whose turn it is. What is said about them.

A daemon on a node with others has a seat for each of its worker processes: so there are as many processes as seats, however
many daemons there are. The `Ledger` is the nursery's; it knows numbers only. A worker is its daemon's own child, in its cgroup,
with its credentials and its log: nothing of a daemon's work is here.

Both sides say how things are, not what has changed: each message is the whole truth of its sender, the last one counts, and
nothing drifts. The one thing that crosses on the way is a seat just granted: a daemon says how many grants it has `seen`.

- A seat that is free is granted at once, to whoever has fewest; among these to one with a reader that waits.
- If none is free, who has most is asked for one back, and gives it when a worker has no job, or its turn is over (`TURNS`).
  Of who has one only it is asked for those that have none: so everybody gets his turn.
- Who is asked and does not give one back in time (a worker that waits for a slow server, a daemon that is stopped) is late:
  what it has does not count until it gives something back. So nobody waits for somebody else's slow server, and there are
  more processes than seats for a while, by no more than the late ones have.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

ROLES = ("fetch", "decompress")
TURNS = {"fetch": 0.05, "decompress": 0.2}
"""Seconds for which a daemon may go on after it was asked for a seat; less when many wait, so that each waits about so long."""
PATIENCE = {"fetch": 0.05, "decompress": 0.3}
"""Seconds from the end of a turn until a daemon counts as late. A fetch worker takes no CPU while it waits for a server."""
MOST = 4096
"""What no number of workers that anybody says exceeds."""

_HELLO = b"nydusd seats 1\0"
_ASK = struct.Struct("=IIIII")
_ANSWER = struct.Struct("=IIIIIIII")


class Ask(NamedTuple):
    """What a daemon says of one role."""

    have: int = 0
    """Worker processes, and seats for those that are about to begin."""
    want: int = 0
    """Workers for which it has jobs beyond these."""
    urgent: int = 0
    """Whether one of these is a reader's: 0 or 1."""
    seen: int = 0
    """How many grants it has received, ever."""
    seats: int = 0
    """How many seats its configuration gives the node. The highest of all daemons counts."""


class Answer(NamedTuple):
    """What a daemon is told of one role."""

    granted: int = 0
    """How many grants it was given, ever."""
    back: int = 0
    """How many seats are wanted back."""
    keep: int = 0
    """How many it has then."""
    turn: int = 0
    """Milliseconds for which it may go on before."""
    urgent: int = 0
    """Whether it is a reader that waits for one of them: 0 or 1. Then only who has one himself may go on."""
    seats: int = 0
    taken: int = 0
    """Of these, by anybody."""
    waiting: int = 0
    """Daemons that have none and wait for one."""


def packet_of(asks: Sequence[Ask]) -> bytes:
    """What a daemon sends; one `Ask` a role, in the order of `ROLES`."""
    return _HELLO + b"".join(_ASK.pack(*ask) for ask in asks)


def asks_of(packet: bytes) -> list[Ask] | None:
    """What a daemon has sent; None for anything else."""
    if not is_ask(packet) or len(packet) != len(_HELLO) + _ASK.size * len(ROLES):
        return None
    asks = [Ask._make(fields) for fields in _ASK.iter_unpack(packet[len(_HELLO) :])]
    if any(max(ask.have, ask.want, ask.seats) > MOST or ask.urgent > 1 or not ask.seats for ask in asks):
        return None
    return asks


def is_ask(packet: bytes) -> bool:
    """Whether a packet is about seats."""
    return packet.startswith(_HELLO)


def answers_of(packet: bytes) -> list[Answer] | None:
    """What the nursery has sent; None for anything else."""
    if len(packet) != _ANSWER.size * len(ROLES):
        return None
    return [Answer._make(fields) for fields in _ANSWER.iter_unpack(packet)]


def answer_packet(answers: Sequence[Answer]) -> bytes:
    """What the nursery sends; one `Answer` a role."""
    return b"".join(_ANSWER.pack(*answer) for answer in answers)


class _Member:
    """One daemon's part of a role."""

    def __init__(self) -> None:
        self.ask = Ask()
        self.granted = 0
        self.back = 0
        self.turn = 0.0
        self.asked_at = 0.0
        self.late = False
        self.since = 0.0
        """When it began to wait, behind those that waited already."""
        self.held_since = 0.0
        """When it had none for the last time."""

    @property
    def taken(self) -> int:
        return self.ask.have + self.granted - self.ask.seen

    @property
    def lacks(self) -> int:
        return max(0, self.ask.want - (self.granted - self.ask.seen))

    def hear(self, ask: Ask, now: float) -> bool:
        """Take in what it says; False if that cannot be true."""
        if not self.ask.seen <= ask.seen <= self.granted:
            return False
        if not self.taken:
            self.held_since = now
        before, waited, self.ask = self.taken, self.ask.want, ask
        if self.taken < before or not waited:
            self.since = now
        if self.taken < before or not self.taken:  # it lives, and gives back
            self.late = False
            self.asked_at = now
        return True


class Ledger:
    """The seats of one role. Members are known by any key, the fd of their connection."""

    def __init__(self, role: str) -> None:
        self._turn = TURNS[role]
        self._patience = PATIENCE[role]
        self._members: dict[int, _Member] = {}

    def join(self, key: int) -> None:
        """A daemon is there that has said nothing yet."""
        self._members[key] = _Member()

    def leave(self, key: int) -> None:
        """A daemon is gone, and with it all that it had."""
        self._members.pop(key, None)

    def hear(self, key: int, ask: Ask, now: float) -> bool:
        """Take in what a daemon says; False if that cannot be true. `settle` comes next."""
        return self._members[key].hear(ask, now)

    @property
    def seats(self) -> int:
        return max((member.ask.seats for member in self._members.values()), default=0)

    @property
    def taken(self) -> int:
        return sum(member.taken for member in self._members.values())

    @property
    def waiting(self) -> int:
        """Daemons that have none and wait for one."""
        return sum(member.lacks > 0 and not member.taken for member in self._members.values())

    def answer(self, key: int) -> Answer:
        """What a daemon is to know."""
        member = self._members[key]
        keep, turn = member.taken - member.back, round(member.turn * 1000)
        urgent = int(any(other.lacks and other.ask.urgent for other in self._members.values()))
        return Answer(member.granted, member.back, keep, turn, urgent, self.seats, self.taken, self.waiting)

    def facts(self, key: int) -> dict[str, int | bool]:
        """One daemon's part, for the operator."""
        member = self._members[key]
        return {"have": member.taken, "want": member.lacks, "asked_back": member.back, "late": member.late}

    def due(self) -> float | None:
        """When to `settle` in any case (`time.monotonic()`), if ever: somebody is late then."""
        ends = [self._end(member) for member in self._members.values() if member.back and not member.late]
        return min(ends, default=None)

    def settle(self, now: float) -> set[int]:
        """Grant what is free, ask for what is wanted; gives who must be told."""
        active = {key: member for key, member in self._members.items() if member.taken or member.lacks or member.back}
        before = {key: (member.granted, member.back) for key, member in active.items()}
        for member in active.values():
            if member.back and now >= self._end(member):
                member.late = True
        self._grant(active.values())
        back = self._wanted_back(active)
        turn = min(self._turn, self._turn * max(1, self.seats) / max(1, self.waiting))
        for key, member in active.items():
            if back[key] and not member.back:
                member.asked_at, member.turn = now, turn
            member.back = back[key]
        return {key for key, member in active.items() if before[key] != (member.granted, member.back)}

    def _end(self, member: _Member) -> float:
        """When a daemon that was asked for a seat is late."""
        return member.asked_at + member.turn + self._patience

    def _grant(self, active: Collection[_Member]) -> None:
        free = self.seats - sum(member.taken for member in active if not member.late)
        while free > 0:
            waiting = [member for member in active if member.lacks]
            if not waiting:
                return
            chosen = min(waiting, key=lambda member: (member.taken, -member.ask.urgent, member.since))
            chosen.granted += 1
            free -= 1

    def _wanted_back(self, active: Mapping[int, _Member]) -> Counter[int]:
        back: Counter[int] = Counter()
        left = {key: member.taken for key, member in active.items() if not member.late}

        def chosen(but: int, stay: bool) -> int:
            """Who is to give one back: who was asked already if others are to be left alone; else who has most, for longest."""
            return max(
                (key for key in left if key != but and left[key]),
                key=lambda key: (stay and active[key].back > back[key], left[key], -active[key].held_since),
                default=-1,
            )

        lacking = [(key, member) for key, member in active.items() if member.lacks]
        for key, member in sorted(lacking, key=lambda row: (row[1].taken, -row[1].ask.urgent, row[1].since)):
            for has in range(member.taken, member.taken + member.lacks):
                other = chosen(key, stay=not has)
                if other < 0 or (has and left[other] <= has + 1):
                    break  # they would only change places
                left[other] -= 1
                back[other] += 1
        over = self.taken - self.seats
        for key, member in active.items():
            if member.late:  # it has what others have been granted meanwhile
                back[key] = max(0, min(member.taken, over))
                over -= back[key]
        while over > 0 and (other := chosen(-1, stay=True)) >= 0:  # what was begun without a seat
            left[other] -= 1
            back[other] += 1
            over -= 1
        return back
