"""The desk: where daemons ask the nursery for seats, over one connection each as long as they live.

Part of the nursery's loop; waits for nobody. Who does not read what it is told is told no more, and is gone for us: it has its
own ways then (`nydusd.supervisor.seats`). What holds after SIGKILL: daemons start the workers that they need without asking,
and tell the next nursery what they have.
"""

from __future__ import annotations

import json
import select
import socket
import time

from nydusd.nursery.peers import peer_pid
from nydusd.nursery.seats import ROLES, Ledger, answer_packet, asks_of

_PACKET_MAX = 1024
_SHOWN_MOST = 500
"""Daemons that are shown one by one: more are no packet any more."""


class Desk:
    """`poll` learns of each connection."""

    def __init__(self, poll: select.poll) -> None:
        self._poll = poll
        self._wires: dict[int, socket.socket] = {}
        self._pids: dict[int, int] = {}
        self._ledgers = {role: Ledger(role) for role in ROLES}

    def __contains__(self, fd: int) -> bool:
        return fd in self._wires

    def admit(self, wire: socket.socket, packet: bytes) -> None:
        """A daemon asks for the first time; `wire` is registered with `poll` already, and ours from now on."""
        fd = wire.fileno()
        self._wires[fd], self._pids[fd] = wire, peer_pid(wire)
        for ledger in self._ledgers.values():
            ledger.join(fd)
        self._hear(fd, packet, first=True)

    def hear(self, fd: int) -> None:
        """A connection is readable: a daemon has said something, or is gone."""
        try:
            packet = self._wires[fd].recv(_PACKET_MAX, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        self._hear(fd, packet)

    def _hear(self, fd: int, packet: bytes, first: bool = False) -> None:
        asks, now = asks_of(packet), time.monotonic()
        ledgers = self._ledgers.values()
        if asks is None or not all(ledger.hear(fd, ask, now) for ledger, ask in zip(ledgers, asks, strict=True)):
            self._dismiss(fd)
            self.settle()
        else:
            # An answer at once, also where there is nothing new: so that it knows that we live.
            self.settle(fd if first or any(ask.want for ask in asks) else -1)

    def settle(self, fd: int = -1) -> None:
        """Look whose turn it is, and tell those whom it concerns, `fd` in any case."""
        now = time.monotonic()
        told = {fd} & self._wires.keys()
        for ledger in self._ledgers.values():
            told |= ledger.settle(now)
        failed = [each for each in told if not self._tell(each)]
        for each in failed:
            self._dismiss(each)
        if failed:
            self.settle()

    def _tell(self, fd: int) -> bool:
        packet = answer_packet([ledger.answer(fd) for ledger in self._ledgers.values()])
        try:
            self._wires[fd].send(packet, socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def _dismiss(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._wires.pop(fd).close()
        del self._pids[fd]
        for ledger in self._ledgers.values():
            ledger.leave(fd)

    def due(self) -> float | None:
        """When to `settle` in any case (`time.monotonic()`), if ever."""
        return min((due for ledger in self._ledgers.values() if (due := ledger.due()) is not None), default=None)

    def facts(self) -> bytes:
        """What there is, as JSON, for whoever looks."""
        roles = {
            role: {"seats": ledger.seats, "taken": ledger.taken, "waiting": ledger.waiting}
            for role, ledger in self._ledgers.items()
        }
        daemons = []
        for fd, pid in self._pids.items():
            parts = {role: ledger.facts(fd) for role, ledger in self._ledgers.items()}
            if any(part["have"] or part["want"] for part in parts.values()):
                daemons.append({"pid": pid, **parts})
        return json.dumps({"daemons": len(self._wires), "roles": roles, "active": daemons[:_SHOWN_MOST]}).encode()

    def close(self) -> None:
        """Let go of all connections, in a copy of the nursery."""
        for wire in self._wires.values():
            wire.close()
