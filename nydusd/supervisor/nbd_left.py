"""What a killed supervisor has left of its block export: the next one finds the clients' sockets and goes on with them.

Runs in the supervisor, in its first moments. `state.json` names the memory in which the clients are known
(`frontends/nbd/kept.py`) and the listening socket, by their inodes. Whoever has that memory open, a front end that serves on or
a fork server, holds sockets and pipes as well; of each a copy is taken from the first who has it (pidfd_getfd(2)).

What holds after SIGKILL in the middle: the holders go on. They are ended when a fork server of ours has taken all this (what
lies in its line would be lost with it) and `state.json` says so, and only then is there another front end: so no two serve the
same client.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from nydusd import points
from nydusd.frontends.nbd.kept import CLIENTS_MOST, LAYOUT, inodes_of
from nydusd.ipc.borrow import memories_of
from nydusd.ipc.messages import Json
from nydusd.storage.state.lock import start_time
from nydusd.supervisor.ends import end_together
from nydusd.supervisor.nbd_clients import MEMORY
from nydusd.supervisor.orphans import Orphan
from nydusd.supervisor.runtime import alive
from nydusd.waits import Told

log = logging.getLogger(__name__)

_KEEPER_SECONDS = 20.0
"""How long a fork server that was started in a supervisor's last moments may take to have what it was given."""
_ARRIVAL_SECONDS = 1.0
"""How long a client whom the killed supervisor has let in may lie in the line to a process before that takes it."""
_LOOK_SECONDS = 0.01


class Note(msgspec.Struct):
    """What `state.json` says. `parameters`: of image and configuration; `path`: the inode of the socket's name."""

    parameters: str
    memory: int
    listener: int
    path: int
    layout: int = LAYOUT


class Left(NamedTuple):
    """Copies, all of them ours. `holders`: pid and start time of who else has these; `clients`: by number, socket and pipe."""

    note: Note
    memory: int
    listener: int
    clients: dict[int, tuple[socket.socket, int, int]]
    holders: list[tuple[int, int]]

    def is_held_by(self, pid: int) -> bool:
        """Whether a process has memory and clients open, whatever becomes of all others."""
        wanted = Counter([f"{MEMORY}:{self.note.memory}"])
        for sock, *pipe in self.clients.values():
            wanted.update(_what(f"/proc/self/fd/{fd}") for fd in (sock.fileno(), *pipe))
        with contextlib.suppress(OSError):  # it has ended
            return wanted <= Counter(what for what, _ in _open_in(pid))
        return False

    def end_holders(self, ours: Sequence[int], told: Told) -> None:
        """End them, and those that they have made since; not our own processes, which hold all this by now.

        Waits until they are gone, however long that takes: before that, nobody else may serve these clients. Raises
        EndedError when `told` to end meanwhile: our fork server holds them for the next one, which ends who is there still.
        """
        for holder in self.holders:
            log.info("ending pid %d, which has the clients' sockets open", holder[0])
        end_together(self.holders, told)
        while strangers := [pid for pid in _processes() if pid not in ours and self.note.memory in _memories(pid)]:
            log.warning("waiting for the end of %s: clients' sockets are still open there", _named(strangers))
            end_together([(pid, start_time(pid)) for pid in strangers], told)

    def close(self) -> None:
        """It cannot be gone on with."""
        os.close(self.memory)
        os.close(self.listener)
        for sock, *pipe in self.clients.values():
            sock.close()
            for fd in pipe:
                os.close(fd)


def noted(record: Json) -> Note | None:
    """What a record says of an export, None if that is nothing that can be used."""
    try:
        return msgspec.convert(record["nbd"], Note)
    except (KeyError, msgspec.ValidationError):
        return None


def to_json(note: Note) -> Json:
    """A note as it was in the record."""
    raw: Json = msgspec.to_builtins(note)
    return raw


def who(pids: Sequence[int]) -> list[Json]:
    """What the record says of those who have, or are given, what is to be taken over."""
    return [{"pid": pid, "start": start_time(pid)} for pid in pids]


def take(note: Note, record: Json, told: Told) -> Left | None:
    """What is left of an export; None, and a line in the log, if that is too little.

    Raises EndedError when `told` to end while it waits for a fork server that is to have it: nothing is changed then.
    """
    since = time.monotonic()
    until = since + _KEEPER_SECONDS
    said = False
    # What a fork server was given lies in its line until it has loaded, and is then held by nobody whom we could ask.
    while not (holders := list(_holders(note.memory))) and time.monotonic() < until and (there := _living(record)):
        if not said:
            said = True
            log.info(
                "waiting for %s to take the clients that it was given, %g s at most", _named(there), _KEEPER_SECONDS
            )
        for pid in there:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)  # one that somebody has stopped does not load
        told.wait(since, _LOOK_SECONDS)
    try:
        memory = _copy(holders, f"{MEMORY}:{note.memory}")
        listener = _copy(holders, f"socket:[{note.listener}]")
        if memory < 0 or listener < 0:
            for fd in (memory, listener):
                if fd >= 0:
                    os.close(fd)
            log.info("nobody is left of a nydusd that was killed")
            return None
        points.reach("clients: memory copied")
        clients = _clients(memory, holders)
        return Left(note, memory, listener, clients, [(holder.pid, holder.start) for holder in holders])
    finally:
        for holder in holders:
            holder.process.close()


def _living(record: Json) -> list[int]:
    """Those whom a record names and who are there still."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        rows = [(int(row["pid"]), int(row.get("start", 0))) for row in record["holders"]]
        return [process[0] for process in rows if alive(process)]
    return []


def _named(pids: Sequence[int]) -> str:
    return ", ".join(f"pid {pid}" for pid in pids)


class _Holder:
    """A process that has the memory open. Raises OSError when it is gone."""

    def __init__(self, pid: int) -> None:
        self.pid, self.start = pid, start_time(pid)
        self.process = Orphan(pid, self.start)
        self.numbers: dict[str, list[int]] = {}
        self.look()

    def look(self) -> None:
        """By what they are, under which numbers it has its fds. Nothing if it has ended."""
        self.numbers = {}
        with contextlib.suppress(OSError):
            for what, number in _open_in(self.pid):
                self.numbers.setdefault(what, []).append(number)


def _open_in(pid: int) -> Iterator[tuple[str, int]]:
    """The fds of a process: `socket:[INODE]`, `pipe:[INODE]`, the memory as NAME:INODE. Raises OSError when it has ended."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # that one was closed meanwhile
            yield _what(f"/proc/{pid}/fd/{name}"), int(name)


def _what(path: str) -> str:
    what = os.readlink(path)
    return f"{MEMORY}:{os.stat(path).st_ino}" if what.startswith(f"/memfd:{MEMORY}") else what


def _processes() -> Iterator[int]:
    """Processes of daemons, but us."""
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended
                if Path(f"/proc/{name}/comm").read_bytes().startswith(b"nydusd: "):
                    yield int(name)


def _memories(pid: int) -> list[int]:
    """Inodes of such memories that a process has open."""
    with contextlib.suppress(OSError):
        return [memory.st_ino for memory in memories_of(pid, MEMORY)]
    return []


def _holders(memory: int) -> Iterator[_Holder]:
    for pid in _processes():
        if memory in _memories(pid):
            with contextlib.suppress(OSError):
                yield _Holder(pid)


def _copy(holders: Sequence[_Holder], what: str, access: int | None = None) -> int:
    """A copy of this file from whoever has it, -1 if nobody does. `access`: that end of a pipe (O_RDONLY, O_WRONLY)."""
    for holder in holders:
        for number in holder.numbers.get(what, ()):
            try:
                fd = holder.process.get_fd(number)
            except OSError:
                continue
            # It may have closed the file and used the number again since we looked.
            is_it = _what(f"/proc/self/fd/{fd}") == what
            if is_it and access in (None, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE):
                return fd
            os.close(fd)
    return -1


def _clients(memory: int, holders: Sequence[_Holder]) -> dict[int, tuple[socket.socket, int, int]]:
    """All who are known in the memory and held by somebody."""
    found: dict[int, tuple[socket.socket, int, int]] = {}
    until = time.monotonic() + _ARRIVAL_SECONDS
    while True:
        missing = False
        for number in range(CLIENTS_MOST):
            sock, pipe = inodes_of(memory, number)
            if number in found or not sock:
                continue
            fds = [
                _copy(holders, f"socket:[{sock}]"),
                _copy(holders, f"pipe:[{pipe}]", os.O_RDONLY),
                _copy(holders, f"pipe:[{pipe}]", os.O_WRONLY),
            ]
            if -1 not in fds:
                found[number] = socket.socket(fileno=fds[0]), fds[1], fds[2]
                continue
            missing = True
            for fd in fds:
                if fd >= 0:
                    os.close(fd)
        if not missing or time.monotonic() >= until:
            return found
        for holder in holders:
            holder.process.send_signal(signal.SIGCONT)  # one that somebody has stopped takes nothing from its line
        time.sleep(_LOOK_SECONDS)
        for holder in holders:
            holder.look()
