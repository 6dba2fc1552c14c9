"""`python -m nydusd.nursery LOCK_FD STEM`: the nursery. Daemons begin as copies of this process, and share its memory.

A daemon that loads all by itself takes 0.4 s and some 60 MB; a copy takes less of both. This process does nothing else: one
thread, no library's background threads, no secret in its memory or environment. It never reads what a daemon is started
with: the daemon does, from a memfd, when it has forked off its own fork server (`nydusd.nursery.birth`).

A request is one packet from `nydusd.nursery.stub`: its identity, and the fds of its stdio, folder, memfd and leash. Who differs
from this process in what matters (`nydusd.nursery.peers`) gets no answer, and goes on by itself. The nursery is the parent of
the daemons, and tells the stub of one that a signal has ended. Another copy of it, which it replaces when that ends, keeps the
seats of the daemons' workers (`nydusd.nursery.desk`): here that would write to pages that all copies share.

What holds after SIGKILL: daemons live on; the next one starts by itself, and another nursery after it. Ends when no daemon is
left on the node: the last one that stops asks for it, and it looks from time to time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import stat
import sys
import time
from typing import NamedTuple

from nydusd.ipc import passed
from nydusd.nursery import place
from nydusd.nursery.birth import FDS, Birth, be_born
from nydusd.nursery.client import is_any_alive
from nydusd.nursery.desk import keep_seats
from nydusd.nursery.peers import is_like_us, peer_pid
from nydusd.nursery.rehearsal import rehearse
from nydusd.proctitle import set_title

_LOOK = 10.0
"""Seconds between looks whether any daemon is left."""
_LOOK_AGAIN = 3.0
"""Seconds that whoever starts a killed daemon again has for it."""
_DAWDLE = 5.0
"""Seconds that a connection may stay without a request."""
_PAUSE = 0.05
_PACKET_MAX = 64 * 1024
_LOG_MOST, _LOG_KEPT = 64 << 10, 16 << 10
"""Bytes of what nursery and seats have printed: from the first on the oldest go, until the second are left."""


class _Connection:
    """One that has sent nothing yet, or the stub of a daemon that lives."""

    def __init__(self, wire: socket.socket) -> None:
        self.wire = wire
        self.since = time.monotonic()


class Seats(NamedTuple):
    """What a copy of the nursery is to be that keeps the seats: the line that is closed when the nursery ends."""

    lifeline: int


class Nursery:
    """`serve` is the loop; it ends with what is to be made of a copy of this process, and with None in the nursery."""

    def __init__(self, lock: int, identity: bytes) -> None:
        self._lock = lock
        self._identity = identity
        self._path = f"{place.stem(identity)}.sock"
        self._waiting: dict[int, _Connection] = {}
        """Connections that have sent nothing yet, by fd."""
        self._daemons: dict[int, tuple[int, socket.socket]] = {}
        """pid and stub of our children, by pidfd."""
        self._seats = (-1, -1)
        """pid and pidfd of the copy that keeps the seats."""
        self._lifeline, self._lifeline_end = os.pipe2(os.O_CLOEXEC)
        self._poll = select.poll()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def serve(self) -> Birth | Seats | None:
        """Make daemons until none is left on this node. Raises OSError if it cannot listen."""
        part = place.stem(self._identity) + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)  # of one that was killed: we hold the lock
        mask = os.umask(0o177)
        self._listener.bind(part)
        os.umask(mask)
        self._listener.listen(256)
        os.rename(part, self._path)  # so whoever finds it can connect
        self._listener.setblocking(False)
        self._poll.register(self._listener, select.POLLIN)
        next_look, needed = 0.0, True
        while True:
            now = time.monotonic()
            if now >= next_look:
                shorten(2, _LOG_MOST, _LOG_KEPT)
                alive = is_any_alive()
                if self._is_outdated() or not (alive or needed):
                    break
                # One that was killed is about to be started again, from here.
                needed = alive
                next_look = now + (_LOOK if alive else _LOOK_AGAIN)
                for fd in [fd for fd, connection in self._waiting.items() if now - connection.since > _DAWDLE]:
                    self._forget(fd)
                if self._seats[0] < 0 and (seats := self._have_seats_kept()) is not None:
                    return seats
            for fd, _ in self._poll.poll(min(_DAWDLE, max(next_look - now, _PAUSE)) * 1000):
                if fd == self._listener.fileno():
                    self._accept()
                elif fd == self._seats[1]:
                    self._poll.unregister(fd)
                    os.close(fd)
                    os.waitpid(self._seats[0], 0)
                    self._seats = (-1, -1)
                    next_look = time.monotonic() + _PAUSE
                elif fd in self._daemons:
                    self._bury(fd)
                elif fd in self._waiting:
                    wire = self._waiting[fd].wire
                    birth, ends = self._request(wire)
                    if birth is not None:
                        return birth
                    if ends:
                        self._remove()
                        wire.close()
                        return None
                    self._forget(fd)
        self._remove()
        return None

    def close(self) -> None:
        """Let go of all fds; the files stay."""
        for connection in self._waiting.values():
            connection.wire.close()
        for pidfd, (_, stub) in self._daemons.items():
            os.close(pidfd)
            stub.close()
        self._listener.close()
        for fd in (self._lock, self._lifeline, self._lifeline_end):
            os.close(fd)
        if self._seats[1] >= 0:
            os.close(self._seats[1])

    def _is_outdated(self) -> bool:
        """Whether the files of another build have replaced those that we have loaded: then nobody asks us any more."""
        try:
            return place.identity() != self._identity
        except OSError:
            return True

    def _remove(self) -> None:
        """Before the lock goes with us: nobody finds a nursery that is gone, or removes the next one's."""
        lock = f"{place.stem(self._identity)}.lock"
        with contextlib.suppress(
            FileNotFoundError
        ):  # somebody has cleared the folder, and there may be another nursery
            if os.path.samestat(os.fstat(self._lock), os.stat(lock)):
                os.unlink(self._path)
                for suffix in (".seats", ".log"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(place.stem(self._identity) + suffix)
                os.unlink(lock)

    def _accept(self) -> None:
        try:
            wire, _ = self._listener.accept()
        except OSError:  # it has given up, or no fd is left: then it waits, and need not be looked at all the time
            time.sleep(_PAUSE)
            return
        wire.setblocking(False)
        self._waiting[wire.fileno()] = _Connection(wire)
        self._poll.register(wire, select.POLLIN)

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._waiting.pop(fd).wire.close()

    def _request(self, wire: socket.socket) -> tuple[Birth | None, bool]:
        """What is to be born in the copy that we then are; and whether we are to end."""
        try:
            body, fds = passed.receive(wire, _PACKET_MAX, FDS)
        except OSError:
            return None, False
        try:
            pid = peer_pid(wire)
            if body == place.END and pid:
                if not is_any_alive():  # our children that are about to end do not count
                    return None, True
                wire.send(place.IN_USE)
            elif body == self._identity and len(fds) == FDS and pid and is_like_us(pid):
                return self._bear(pid, wire, fds), False
        except OSError:
            pass  # no room for another process, or the stub is gone: it goes on by itself
        finally:
            for fd in fds:
                os.close(fd)
        return None, False

    def _bear(self, stub: int, wire: socket.socket, fds: list[int]) -> Birth | None:
        """Raises OSError where there is no room for another process: before there is one, for a copy has nobody to tell."""
        kept = wire.dup()
        try:
            room = os.dup(kept.fileno())
            try:
                child = os.fork()
            finally:
                os.close(room)  # for the pidfd
        except OSError:
            kept.close()
            raise
        if child == 0:
            given = fds.copy()
            fds.clear()  # they are the daemon's now
            self.close()
            return Birth(stub, kept, *given)
        pidfd = os.pidfd_open(child)
        self._daemons[pidfd] = child, kept
        self._poll.register(pidfd, select.POLLIN)
        return None

    def _have_seats_kept(self) -> Seats | None:
        """Have a copy keep the seats; what it is to be, in the copy. Where there is no room for it, it is tried again."""
        try:
            lifeline = os.dup(self._lifeline)
        except OSError:
            return None
        try:
            child = os.fork()
        except OSError:
            os.close(lifeline)
            return None
        if child == 0:
            self.close()
            return Seats(lifeline)
        os.close(lifeline)  # so there is room for another
        self._seats = child, os.pidfd_open(child)
        self._poll.register(self._seats[1], select.POLLIN)
        return None

    def _bury(self, pidfd: int) -> None:
        """A daemon has ended: tell its stub if it could not."""
        pid, wire = self._daemons.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):
            wire.send(f"signal {-status}".encode() if status < 0 else f"exit {status}".encode())
        wire.close()


def shorten(fd: int, most: int, kept: int) -> None:
    """If a file that is written at its end has more than `most` bytes, leave the last `kept`. What comes now may be lost."""
    with contextlib.suppress(OSError):
        facts = os.fstat(fd)
        if stat.S_ISREG(facts.st_mode) and facts.st_size > most:
            end = os.pread(fd, kept, facts.st_size - kept)
            os.ftruncate(fd, 0)
            os.write(fd, end)


def main(argv: list[str]) -> int:
    """Serve until no daemon is left; in a copy, be the daemon, or its fork server. `argv`: the lock and whose it is."""
    lock, locked = int(argv[0]), argv[1]
    os.set_inheritable(lock, False)
    os.setsid()  # what a terminal sends to its processes is not for us
    faulthandler.register(signal.SIGUSR1, file=2)  # by its number: a copy has the daemon's, until it knows its log
    identity = place.identity()
    if place.stem(identity) != locked:  # an upgrade has replaced the files while we loaded them: the lock is another's
        return 1
    set_title("nursery")
    rehearse()
    os.chdir("/")  # not before: $PYTHONPATH may be relative
    nursery = Nursery(lock, identity)
    made = nursery.serve()
    if made is None:
        return 0
    if isinstance(made, Seats):
        set_title("seats")
        return keep_seats(place.stem(identity), made.lifeline)
    return be_born(made)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
