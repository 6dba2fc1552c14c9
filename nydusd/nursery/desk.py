"""The desk: where the daemons of a node ask for seats (`nydusd.nursery.seats`), over one connection each as long as they live.

A process of its own, `nydusd: seats`: a copy of the nursery, which ends with it and is replaced by it. Waits for nobody. Who
does not read what it is told is told no more, and is gone for us: it has its own ways then (`nydusd.supervisor.seats`).

What holds after SIGKILL: daemons start the workers that they need without asking, and tell the next one what they have.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time

from nydusd.nursery.peers import peer_pid
from nydusd.nursery.place import LOOK
from nydusd.nursery.seats import ROLES, Ledger, answer_packet, asks_of

_PACKET_MAX = 1024
_SHOWN_MOST = 500
"""Daemons that are shown one by one: more are no packet any more."""
_PAUSE = 0.05
_LONGEST = 5.0
"""Seconds that a connection may stay without a word, and of one wait."""


def keep_seats(stem: str, lifeline: int) -> int:
    """Serve at STEM.seats until the nursery has ended and the pipe `lifeline` is closed. Raises OSError if it cannot listen."""
    part = f"{stem}.seats.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(part)
    poll = select.poll()
    desk = Desk(poll)
    silent: dict[int, tuple[socket.socket, float]] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        mask = os.umask(0o177)
        listener.bind(part)
        os.umask(mask)
        listener.listen(256)
        os.rename(part, f"{stem}.seats")
        listener.setblocking(False)
        for fd in (lifeline, listener.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            # The listener last: what it accepts may have the number of one that has just been closed.
            events = [fd for fd, _ in poll.poll(desk.patience() * 1000)]
            for fd in sorted(events, key=lambda fd: fd == listener.fileno()):
                if fd == lifeline:
                    desk.close()
                    return 0
                if fd in desk:
                    desk.hear(fd)
                elif fd in silent:
                    wire, _ = silent.pop(fd)
                    _first_word(desk, poll, wire)
                elif fd == listener.fileno():
                    _accept(listener, poll, silent)
            for fd in [fd for fd, (_, since) in silent.items() if time.monotonic() - since > _LONGEST]:
                poll.unregister(fd)
                silent.pop(fd)[0].close()
            desk.settle()


def _accept(listener: socket.socket, poll: select.poll, silent: dict[int, tuple[socket.socket, float]]) -> None:
    try:
        wire, _ = listener.accept()
    except OSError:  # it has given up, or no fd is left: then it waits, and need not be looked at all the time
        time.sleep(_PAUSE)
        return
    wire.setblocking(False)
    silent[wire.fileno()] = wire, time.monotonic()
    poll.register(wire, select.POLLIN)


def _first_word(desk: Desk, poll: select.poll, wire: socket.socket) -> None:
    """Somebody has said something for the first time, or is gone."""
    try:
        packet = wire.recv(_PACKET_MAX)
    except OSError:
        packet = b""
    if peer_pid(wire) and packet and packet != LOOK:
        desk.admit(wire, packet)
        return
    if peer_pid(wire) and packet:
        with contextlib.suppress(OSError):
            wire.send(desk.facts())
    poll.unregister(wire)
    wire.close()


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

    def patience(self) -> float:
        """Seconds until it is to `settle` in any case."""
        ends = [due for ledger in self._ledgers.values() if (due := ledger.due()) is not None]
        return min(max(min(ends, default=_LONGEST + time.monotonic()) - time.monotonic(), 0.001), _LONGEST)

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
        """Let go of all connections."""
        for wire in self._wires.values():
            wire.close()
