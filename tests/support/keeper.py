"""`Keeper`: what nydus-snapshotter does for a daemon whose recover policy is `failover`, and its hot upgrade, step by step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from tests.support.discipline import wait_until
from tests.support.haste import not_in_haste

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 150.0
"""Seconds, also for a machine that is emulated by one that has other things to do."""
_LOOK_SECONDS = 0.1


class Daemon(Protocol):
    """A daemon that is kept: `tests.support.daemon`'s, or that of the guest in which fscache is tested."""

    command: list[str]
    apisock: Path
    log: Path
    _process: subprocess.Popen[bytes] | None
    _environment: dict[str, str]

    def request(self, method: str, path: str, body: bytes | None = None, seconds: float = 30.0) -> tuple[int, bytes]:
        """One request to the API: status and body."""


class Keeper:
    """What nydus-snapshotter does for a daemon: it keeps one fd and a state, and gives them back as often as it is asked."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "keeper")
        self.args = ("--supervisor", self.path, "--id", "x")
        self.state = b""
        self.fds: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen()
        self._socket.settimeout(_LOOK_SECONDS)

    def save(self, daemon: Daemon) -> None:
        """Have a daemon send them. If that fails, AssertionError or OSError, the former ones are kept."""
        fds: list[int] = []
        try:
            with self._asking(daemon, "sendfd", 204) as wire:
                state, fds, _, _ = socket.recv_fds(wire, 4096, 4)
                while piece := wire.recv(4096):
                    state += piece
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self.forget()
        self.state, self.fds = state, fds[:1]

    def give(self, daemon: Daemon, status: int = 204) -> None:
        """Have a daemon take over. AssertionError or OSError if it does not, or has no time to say so."""
        with self._asking(daemon, "takeover", status) as wire:
            socket.send_fds(wire, [self.state], self.fds)

    @contextmanager
    def _asking(self, daemon: Daemon, what: str, status: int) -> Iterator[socket.socket]:
        answers: list[int] = []

        def ask() -> None:
            with suppress(OSError):  # it was killed
                answers.append(daemon.request("PUT", f"/api/v1/daemon/fuse/{what}", seconds=PATIENCE)[0])

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            with self._called(asking) as wire:
                yield wire
        finally:
            asking.join()
        assert answers == [status]

    def _called(self, asking: threading.Thread) -> socket.socket:
        """The line to the daemon that was asked. OSError when it has answered, or was killed, and has not called."""
        while True:
            over = not asking.is_alive()
            try:
                wire, _ = self._socket.accept()
            except TimeoutError:
                if over:
                    raise
            else:
                wire.settimeout(PATIENCE)
                return wire

    def forget(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def close(self) -> None:
        self.forget()
        self._socket.close()


def begin(daemon: Daemon, *more: str) -> None:
    """Start the daemon's command once more, and wait until it is in INIT."""
    with open(daemon.log, "ab") as log:
        daemon._process = subprocess.Popen(
            [*daemon.command, *more],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=daemon._environment,
        )
    not_in_haste(daemon._process.pid)
    wait_until(lambda: state_of(daemon) == "INIT", "INIT", PATIENCE)


def state_of(daemon: Daemon) -> str | None:
    try:
        status, body = daemon.request("GET", "/api/v1/daemon", seconds=10)
    except OSError:
        return None
    return str(json.loads(body)["state"]) if status == 200 else None


def put(daemon: Daemon, what: str) -> int:
    return daemon.request("PUT", f"/api/v1/daemon/{what}", seconds=PATIENCE)[0]


def succeed(daemon: Daemon, keeper: Keeper) -> None:
    """Have a daemon whose supervisor was killed succeeded by the same command."""
    begin(daemon)
    keeper.give(daemon)
    wait_until(lambda: put(daemon, "start") == 204, "its start", PATIENCE)
    wait_until(lambda: state_of(daemon) == "RUNNING", "RUNNING", PATIENCE)


def upgrade(daemon: Daemon, keeper: Keeper, before_exit: Callable[[], object] = lambda: None) -> None:
    """Have a daemon succeeded by another process of the same command, with another API socket, while it serves.

    `before_exit` is called when the next one is ready, and the old one about to be told to exit.
    """
    old, sock = daemon._process, daemon.apisock
    assert old is not None
    place = daemon.command.index("-A") + 1
    new = sock.with_name(f"api{int(sock.stem.removeprefix('api') or 0) + 1}.sock")
    daemon.command[place], daemon.apisock = str(new), new
    begin(daemon, "--upgrade")
    keeper.give(daemon)
    assert state_of(daemon) == "READY"
    daemon.apisock = sock
    before_exit()
    assert put(daemon, "exit") == 204
    assert old.wait(PATIENCE) == 0
    assert not sock.exists()
    daemon.apisock = new
    assert put(daemon, "start") == 204
    wait_until(lambda: state_of(daemon) == "RUNNING", "RUNNING", PATIENCE)
    keeper.save(daemon)
