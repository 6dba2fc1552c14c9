"""Seats: what this daemon may have of the worker processes of its node, where there are other daemons.

Part of the supervisor. The nursery keeps them (`nydusd.nursery.seats` says by which rules): this is our side of the one
connection to it. Nothing waits for it: as long as none is there, or it does not answer within `_SILENCE`, all is allowed, as
for a daemon that is alone. What is allowed is looked at again in each turn of the loop.

What holds after SIGKILL of the nursery: the connection is closed, and all is allowed. Whoever looks next starts another
(`Rest`), and each daemon says to it what it has. After SIGKILL of the supervisor its seats are free, and its workers end.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nydusd.ipc.messages import Json
from nydusd.nursery import place
from nydusd.nursery.peers import peer_pid
from nydusd.nursery.seats import MOST, ROLES, Answer, Ask, answers_of, packet_of

log = logging.getLogger(__name__)

FETCH_SEATS = 16
"""Fetch workers of a node, if the configuration does not say: they wait for networks."""
_PER_CPU = 2
"""Decompress workers of a node for each CPU, if the configuration does not say."""
_SILENCE = 0.25
"""Seconds after which a nursery that does not answer counts as none."""
_LONGEST = 1.0
"""Seconds that a role waits without any worker: then it has one beyond its seats."""
_PACKET_MAX = 1024


@dataclass
class _Role:
    seats: int
    answer: Answer = field(default_factory=Answer)
    credit: int = 0
    """Seats for workers that are about to begin."""
    want: int = 0
    urgent: bool = False
    back_since: float = 0.0
    """When we were asked for a seat."""
    waits_since: float = math.inf
    """When it began to wait, having nothing."""
    waits: int = 0
    """How often it had none and asked for one, ever."""
    waited: float = 0.0
    """For how many seconds, ever."""


class Seats:
    """`seats`: how many the node is to have, by role. `watch(fd)`, `forget(fd)`: have the supervisor's loop wake for it."""

    def __init__(
        self, seats: Mapping[str, int], watch: Callable[[int], None], forget: Callable[[int], None], *, on: bool
    ) -> None:
        """`on`: whether this daemon takes part at all."""
        self._on = on and not place.is_off()
        self._roles = {role: _Role(seats[role]) for role in ROLES}
        self._watch, self._forget = watch, forget
        self._wire: socket.socket | None = None
        self._path = ""
        self._trusted = True
        """False after a silence, until it says something again."""
        self._sent = b""
        self._asked_at = math.inf
        """Since when there is no answer to what was asked."""
        self._was_joined = False

    @property
    def joined(self) -> bool:
        """Whether there is a connection to a nursery."""
        return self._wire is not None

    @property
    def counts(self) -> bool:
        """Whether a worker needs a seat."""
        return self._wire is not None and self._trusted

    @property
    def was_lost(self) -> bool:
        """Whether there was a connection before, and is none now."""
        return self._wire is None and self._was_joined

    def join(self) -> None:
        """Look for a nursery, if there is no connection to one."""
        if self._wire is not None or not self._on:
            return
        wire = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        wire.setblocking(False)
        try:
            self._path = f"{place.stem(place.identity())}.seats"
            wire.connect(self._path)
            if not peer_pid(wire):
                raise OSError(errno.EPERM, "it is another user's")
        except OSError:
            wire.close()  # none, or one that has too much to do
            return
        self._wire = wire
        self._sent, self._asked_at = b"", math.inf
        for role in self._roles.values():
            role.answer, role.credit = Answer(), 0
        self._watch(wire.fileno())

    def close(self) -> None:
        """Without a nursery from now on."""
        if self._wire is not None:
            self._forget(self._wire.fileno())
            self._wire.close()
            self._wire = None

    def hear(self, now: float) -> None:
        """Take in what the nursery says."""
        while self._wire is not None:
            try:
                packet = self._wire.recv(_PACKET_MAX)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            answers = answers_of(packet)
            if answers is None:
                self.close()
                return
            self._trusted, self._was_joined = True, True
            self._asked_at = math.inf
            for role, answer in zip(self._roles.values(), answers, strict=True):
                role.credit += max(0, answer.granted - role.answer.granted)
                if answer.back and not role.answer.back:
                    role.back_since = now
                role.answer = answer
        if now - self._asked_at > _SILENCE:
            log.warning("the nursery (%s) does not answer; going on without it", self._path)
            self._trusted = False
            self.close()

    def allowed(self, role: str, needed: int, urgent: bool, have: int, now: float) -> int:
        """How many workers of a role may begin now, of those that are `needed` beyond those that we `have`.

        `urgent`: whether a reader waits for them. `begun` is to be told of those that do.
        """
        own = self._roles[role]
        own.urgent = urgent
        if not self.counts:
            own.want, own.waits_since = 0, math.inf
            return needed
        own.credit = min(own.credit, needed)
        own.want = min(needed - own.credit, MOST)
        if not own.want or have or own.credit:
            if own.waits_since < now:
                own.waits += 1
                own.waited += now - own.waits_since
            own.waits_since = math.inf
        elif own.waits_since == math.inf:
            own.waits_since = now
        elif now - own.waits_since > _LONGEST:
            return 1
        return own.credit

    def begun(self, role: str) -> None:
        """A worker begins."""
        self._roles[role].credit = max(0, self._roles[role].credit - 1)

    def wanted_back(self, role: str, have: int) -> int:
        """How many of those that we `have` somebody else waits for."""
        own = self._roles[role]
        if not self.counts or not own.answer.back:
            return 0
        # The rest are on their way: the nursery has not heard of them yet.
        return max(0, min(own.answer.back, have + own.credit - own.answer.keep))

    def turn_ends(self, role: str, reader: bool) -> float:
        """Until when we may go on though something is wanted back. `reader`: whether one waits for us."""
        own = self._roles[role]
        return own.back_since + (0.0 if own.answer.urgent and not reader else own.answer.turn / 1000)

    def tell(self, have: Mapping[str, int], now: float) -> None:
        """Say how things are, if that has changed. To be called only while `joined`."""
        assert self._wire is not None
        asks = []
        for name, role in self._roles.items():
            urgent = int(role.urgent and role.want > 0)
            asks.append(Ask(min(have[name] + role.credit, MOST), role.want, urgent, role.answer.granted, role.seats))
        packet = packet_of(asks)
        if packet == self._sent:
            return
        try:
            self._wire.send(packet)
        except OSError:  # gone, or it has not read for long
            self.close()
            return
        self._sent = packet
        if self._asked_at == math.inf and (self._trusted and any(ask.want for ask in asks)):
            self._asked_at = now

    def due(self) -> list[float]:
        """When to look again (`time.monotonic()`), if ever."""
        if self._wire is None:
            return []
        until = [self._asked_at + _SILENCE]
        for name, role in self._roles.items():
            until.append(role.waits_since + _LONGEST)
            if role.answer.back:
                until.append(self.turn_ends(name, reader=True))
        now = time.monotonic()
        return [end for end in until if now < end < math.inf]

    def facts(self) -> Json:
        """For the operator."""
        roles: Json = {}
        now = time.monotonic()
        for name, role in self._roles.items():
            waits = max(0.0, now - role.waits_since)
            roles[name] = {
                "want": role.want,
                "waits": role.waits,
                "waited_seconds": round(role.waited + waits, 6),
                "seats": role.seats,
            }
        return {
            "joined": self.counts and self._was_joined,
            "nursery": self._path if self.counts else "",
            "roles": roles,
        }


def seats_of(fetch: int, decompress: int) -> dict[str, int]:
    """How many seats a node has by a configuration; 0: chosen here."""
    cpus = len(os.sched_getaffinity(0))
    return {"fetch": fetch or FETCH_SEATS, "decompress": decompress or _PER_CPU * cpus}
