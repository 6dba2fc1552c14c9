"""The supervisor's side of an export's clients, where the system refuses something or a front end does not do its part."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence

import pytest

from nydusd.frontends.nbd.kept import CLIENTS_MOST, NUMBER, SIZE
from nydusd.supervisor.listener import Listener
from nydusd.supervisor.nbd_clients import Clients


class Door(Listener):
    """Who knocks, and what accept(2) says instead of letting somebody in."""

    def __init__(self) -> None:
        self._socket, self.other = socket.socketpair()
        self.knocking: list[socket.socket | OSError] = []

    def accept(self) -> socket.socket:
        first = self.knocking.pop(0)
        if isinstance(first, OSError):
            raise first
        return first

    def close(self) -> None:
        self._socket.close()
        self.other.close()


class World:
    """A daemon around its clients. `theirs`: the front end's end of the line, `held`: what the fork server holds."""

    def __init__(self) -> None:
        self.door = Door()
        self.watched: dict[int, Callable[[], None]] = {}
        self.held: list[int] = []
        self.renewed = 0
        self.clients = Clients(self.door, self)
        fds, spec = self.clients.spec()
        self.theirs = socket.socket(fileno=os.dup(int(spec["line"])))
        self.memory = os.dup(int(spec["known"]))
        self.clients.started()
        assert set(fds) >= {int(spec["known"]), self.door.fileno()}

    def watch(self, fd: int, take: Callable[[], None]) -> None:
        self.watched[fd] = take

    def forget(self, fd: int) -> None:
        del self.watched[fd]

    def hold(self, fds: Sequence[int]) -> None:
        self.held += fds

    def release(self, fds: Sequence[int]) -> None:
        self.held = [fd for fd in self.held if fd not in fds]

    def renew(self) -> None:
        self.renewed += 1

    def knock(self, what: socket.socket | OSError) -> None:
        self.door.knocking.append(what)
        self.watched[self.door.fileno()]()

    def client(self) -> socket.socket:
        """One that is let in: its end."""
        ours, theirs = socket.socketpair()
        self.knock(theirs)
        return ours

    def close(self) -> None:
        self.clients.close()
        self.theirs.close()
        os.close(self.memory)
        self.door.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.EPERM])
def test_where_nobody_can_be_let_in_the_door_is_shut_for_a_moment_and_nobody_suffers(world: World, code: int) -> None:
    with world.client() as present:
        world.knock(OSError(code, os.strerror(code)))
        assert world.door.fileno() not in world.watched, "it would be readable for as long as somebody knocks"
        world.clients.tick(world.clients.due() - 0.001)
        assert world.door.fileno() not in world.watched
        world.clients.tick(world.clients.due())
        with world.client():
            assert len(world.held) == 2 + 2 * 3
        present.settimeout(10)
        assert present.send(b"x") == 1, "who is there stays"


def test_who_is_gone_before_it_was_let_in_is_nothing_to_wait_for(world: World) -> None:
    world.knock(OSError(errno.ECONNABORTED, ""))
    assert world.door.fileno() in world.watched


def test_a_front_end_that_takes_no_client_is_replaced_by_one_that_is_given_all(world: World) -> None:
    world.theirs.close()
    with world.client() as client:
        assert world.renewed == 1
        _, spec = world.clients.spec()
        assert [number for number, *_ in spec["clients"]] == [0]
        client.settimeout(10)
        client.send(b"x")
        (sock,) = [fd for number, fd, *_ in spec["clients"]]
        assert os.read(sock, 1) == b"x"


def test_who_is_gone_is_seen_in_memory_even_if_the_word_of_it_did_not_arrive(world: World) -> None:
    with world.client(), world.client():
        os.pwrite(world.memory, bytes(16), SIZE + 32)
        world.theirs.send(NUMBER.pack(CLIENTS_MOST - 1))  # of somebody else
        (line,) = [fd for fd in world.watched if fd != world.door.fileno()]
        world.watched[line]()
        _, spec = world.clients.spec()
        assert [number for number, *_ in spec["clients"]] == [0]
        assert len(world.held) == 2 + 3
