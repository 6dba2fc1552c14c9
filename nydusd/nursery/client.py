"""A daemon's part in the life of the nursery: start it when there are several daemons, have it end when the last one stops.

Runs in the supervisor, after it is RUNNING and after it has stopped. Nothing depends on any of it: a daemon that finds no
nursery starts by itself, and a nursery that nobody ends looks by itself whether it is needed. The lock is taken before the
nursery is started and passed on to it, so from the first instant everybody sees that there is one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

from nydusd import priority
from nydusd.errors import CacheError
from nydusd.forkserver.environment import environment
from nydusd.nursery import place
from nydusd.nursery.peers import peer_pid
from nydusd.supervisor.checked import read_checked
from nydusd.supervisor.runtime import alive

log = logging.getLogger(__name__)

_END_PATIENCE = 2.0
"""Seconds that a nursery may take to end, or to be there at all, before it is killed."""
_ANSWER_PATIENCE = 0.5
_PATH_MAX = 107 - len(".seats")


def is_any_alive(without: int = 0) -> bool:
    """Whether a daemon lives whose run-time folder is below this root; the supervisor with the pid `without` does not count."""
    for state in Path(place.root()).glob("*/state.json"):
        with contextlib.suppress(CacheError, KeyError, TypeError, ValueError, IndexError):
            pid, start = read_checked(state)["processes"][0]
            if pid != without and alive((pid, start)):
                return True
    return False


def start_if_useful(*, for_one: bool = False) -> None:
    """Start a nursery if another daemon than ours lives or it is wanted for one, and there is none yet.

    `for_one`: whoever looks after this daemon has it succeeded when it is killed.
    """
    if place.is_off() or not (for_one or place.is_for_one() or is_any_alive(without=os.getpid())):
        return
    try:
        stem = place.stem(place.identity())
        if len(os.fsencode(stem)) > _PATH_MAX:
            return
        lock = _take_lock(f"{stem}.lock")
        if lock is None:
            return
        try:
            os.set_inheritable(lock, True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            stdio = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(2)]
            stdio.append((os.POSIX_SPAWN_OPEN, 2, f"{stem}.log", flags, 0o600))
            command = [sys.executable, "-P", "-m", "nydusd.nursery", str(lock), stem]
            pid = os.posix_spawn(
                sys.executable,
                command,
                environment(secrets=False),
                file_actions=stdio,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM],
            )
            priority.release(pid)
        finally:
            os.close(lock)
    except OSError as e:
        log.warning("no nursery for further daemons: %s", e)
        return
    log.info("further daemons on this node begin as copies of a nursery, pid %d", pid)


def end_if_last() -> None:
    """Called by a daemon that has stopped: if it was the last one, end the nursery, whatever its version, and wait for that."""
    try:
        if is_any_alive(without=os.getpid()):
            return
        for lock in Path(place.root()).glob(f"{place.prefix()}*.lock"):
            _end(lock)
    except OSError as e:
        log.warning("the nursery of this node: %s", e)


def _take_lock(path: str) -> int | None:
    """None: another process has it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        # Its holder may have removed it between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)


def _end(path: Path) -> None:
    start = time.monotonic()
    wire_path = path.with_suffix(".sock")
    killed = False
    while path.exists():
        waited = time.monotonic() - start
        if waited > 2 * _END_PATIENCE:
            log.warning("the nursery of %s does not end", path)
            return
        lock = _take_lock(str(path))
        if lock is not None:  # it has ended, or was killed
            wire_path.unlink(missing_ok=True)
            for suffix in (".new", ".seats", ".seats.new", ".log"):
                path.with_suffix(suffix).unlink(missing_ok=True)
            path.unlink()
            os.close(lock)
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as wire:
            wire.settimeout(_ANSWER_PATIENCE)
            try:
                wire.connect(str(wire_path))
                wire.send(place.END)
                if wire.recv(16) == place.IN_USE:
                    return
            except OSError:  # it has still to load, is about to end, or hangs
                pid = peer_pid(wire) if waited > _END_PATIENCE else 0
                if pid and not killed:
                    log.warning("the nursery (pid %d) does not end; killing it", pid)
                    killed = True
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
