"""What clients of an export cost who take nothing of what they ask for, and what is left for others then."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import cast

import pytest

from nydusd.frontends.nbd import kept, protocol, room
from nydusd.frontends.nbd.connection import Connection
from nydusd.frontends.nbd.kept import SIZE, Kept, Sending
from nydusd.frontends.nbd.main import Server
from nydusd.frontends.nbd.protocol import Export, Request
from nydusd.frontends.nbd.reads import Reads
from nydusd.frontends.nbd.room import Room
from tests.nbd.test_export import command, exactly
from tests.support.discipline import wait_until

LENGTH, READS, CLIENTS = 1 << 16, 40, 8
ALL_MOST, CLIENT_MOST = 4 << 20, 1 << 20


def content(offset: int, length: int) -> bytes:
    return (offset // LENGTH).to_bytes(4, "big") * (length // 4)


class Cached:
    """Reads of which all is there."""

    client = None

    def begin(self, connection: Connection, asked: Request) -> None:
        connection.reserve(asked.length)
        connection.answer(asked, 0, memoryview(content(asked.offset, asked.length)))

    def service(self) -> None:
        """Nobody waits."""


class Front:
    """A front end in a thread, and its clients, which are past the negotiation."""

    def __init__(self) -> None:
        line, self._line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lifeline, self._lifeline = os.pipe()
        self._fds = [lifeline]
        self._ours = line
        line.setblocking(False)
        self.known = memoryview(bytearray(SIZE * CLIENTS))
        self.server = Server(line, lifeline, self.known, Export(1 << 40, 4096), cast(Reads, Cached()))
        self.wires: list[socket.socket] = []
        self._thread = threading.Thread(target=self.server.run)

    def add(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        number = len(self.wires)
        known = Kept(self.known[number * SIZE : (number + 1) * SIZE])
        known.phase = kept.SERVING
        self.server.add(number, [theirs.detach(), *os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)])
        ours.settimeout(30)
        self.wires.append(ours)
        return ours

    def start(self) -> None:
        self._thread.start()

    def connections(self) -> list[Connection]:
        return list(self.server._connections.values())

    def close(self) -> None:
        os.close(self._lifeline)
        for wire in self.wires:
            wire.close()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.server._room.used == 0, "who is gone holds nothing"
        self._line.close()
        self._ours.close()
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    monkeypatch.setattr(room, "_ALL_MOST", ALL_MOST)
    monkeypatch.setattr(room, "_CLIENT_MOST", CLIENT_MOST)
    made = Front()
    yield made
    made.close()


def ask(wire: socket.socket) -> None:
    wire.sendall(b"".join(command(protocol.READ, at * LENGTH, LENGTH, at) for at in range(READS)))


def check_all(wire: socket.socket) -> None:
    """All replies are there, in whatever order."""
    wanted = set(range(READS))
    while wanted:
        _, code, cookie = protocol.REPLY.unpack(exactly(wire, protocol.REPLY.size))
        assert (code, exactly(wire, LENGTH)) == (0, content(cookie * LENGTH, LENGTH))
        wanted.remove(cookie)


def test_what_nobody_takes_is_bounded_for_all_clients_together_and_another_is_served(front: Front) -> None:
    for _ in range(CLIENTS):
        front.add()
    front.start()
    *idle, last = front.wires
    for wire in idle:
        ask(wire)
    wait_until(lambda: sum(each.is_put_off for each in front.connections()) == len(idle), "reads that are put off", 30)
    assert front.server._room.used <= ALL_MOST
    held = sorted(each.held for each in front.connections())[1:]
    assert held[0] >= LENGTH and held[-1] <= CLIENT_MOST
    ask(last)
    check_all(last)
    for wire in idle:
        check_all(wire)


def test_who_has_nothing_is_let_read_where_nothing_is_left(front: Front) -> None:
    full = Room()
    full.used = ALL_MOST
    assert full.has(0, protocol.READ_MOST)
    assert not full.has(1, 1)
    front.start()


def test_room_that_somebody_leaves_goes_to_those_who_wait(front: Front) -> None:
    for _ in range(CLIENTS):
        front.add()
    front.start()
    first, *others = front.wires
    for wire in front.wires:
        ask(wire)
    wait_until(lambda: all(each.is_put_off for each in front.connections()), "reads that are put off", 30)
    before = {each.number: each.held for each in front.connections()}
    first.close()
    wait_until(lambda: len(front.connections()) == len(others), "its end", 30)
    wait_until(lambda: any(each.held > before[each.number] for each in front.connections()), "more for others", 30)
    assert front.server._room.used <= ALL_MOST


def test_what_a_predecessor_has_half_sent_is_sent_though_others_of_the_client_have_the_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "_CLIENT_MOST", 0)
    known = Kept(memoryview(bytearray(SIZE)))
    known.phase = kept.SERVING
    for slot in range(3):
        known.request(slot)[:] = command(protocol.READ, slot * LENGTH, LENGTH, slot)
    known.sending = Sending(100, 0, 1 + 2)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours:
        pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        connection = Connection(0, theirs, pipe, known, Export(1 << 40, 4096), Cached().begin, Room())
        connection.resume()
        connection.send()
        assert connection.go_on()
        connection.send()
        ours.settimeout(10)
        replies = [protocol.reply(slot, 0) + content(slot * LENGTH, LENGTH) for slot in range(3)]
        wanted = replies[2][100:] + replies[0] + replies[1]
        assert exactly(ours, len(wanted)) == wanted
        connection.close()
