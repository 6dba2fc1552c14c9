"""The command `nydusd`, before anything else is loaded: have the nursery fork the daemon, or become the daemon.

Where a nursery is (`nydusd.nursery.client` says when), this process stays what clients have started, watch and signal: as a
smaller program (`nydusd.nursery.stand`) it passes its signals on to the daemon and ends as the daemon does. Until it has sent
GO it may give up at any time and go on by itself: the daemon begins nothing before. So a nursery that is dead, hangs or refuses
costs a start some time, nothing more.

What holds after SIGKILL: the daemon's supervisor gets SIGKILL from the kernel, for the leash, a pipe, is closed. It holds no
secret but what it was started with. Imports little: it is in the way of the daemon's start.
"""

from __future__ import annotations

import os
import sys

from nydusd import priority
from nydusd.nursery import place

TYPE_CHECKING = False  # known to type checkers by its name: `typing` takes 10 ms
if TYPE_CHECKING:
    from _socket import socket as Socket

_PATIENCE = 2.0
"""Seconds that the nursery may take for each step. It takes some 20 ms."""
_PATIENCE_IN_TAKEOVER = 0.5
"""The same where readers wait for us: less than it takes to load all by ourselves. Nobody begins by an answer that is late."""
_PLACES = ("PYTHONHOME", "PYTHONPLATLIBDIR")
"""Where an interpreter finds its own library, if the environment says so: it is not asked by `stand`."""


def main() -> int:
    """Run the command. The exit status is that of `nydusd.cli.nydusd.main`."""
    if not (os.environ.get("NOTIFY_SOCKET") or place.is_off()):  # systemd wants to be told by its main process
        try:
            status = _from_nursery()
        except OSError:
            status = None
        if status is not None:
            return status
    priority.hurry()
    from nydusd.cli.nydusd import main as become_the_daemon

    return become_the_daemon(sys.argv[1:])


def _from_nursery() -> int | None:
    """The daemon's exit status; None if no nursery made one. Raises OSError for the same."""
    for fd in range(3):
        os.fstat(fd)  # where one is closed, the next fd that we open would be taken for it
    who = place.identity()
    path = f"{place.stem(who)}.sock"
    os.stat(path)
    import _socket

    with _Closing(_socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)) as wire:
        takes_over = priority.takes_over(sys.argv)
        wire.settimeout(_PATIENCE_IN_TAKEOVER if takes_over else _PATIENCE)
        wire.connect(path)
        credentials = wire.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
        if int.from_bytes(credentials[4:8], sys.byteorder) != os.geteuid():
            return None
        leash, leash_end = os.pipe2(os.O_CLOEXEC)
        fds = [0, 1, 2, os.open(".", os.O_PATH | os.O_CLOEXEC), _letter(), leash]
        rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
        nursery = int.from_bytes(credentials[:4], sys.byteorder)
        usual = priority.haste(nursery) if takes_over else None  # the daemon that it makes is of our own priority
        try:
            wire.sendmsg([who], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
            answer, ancillary, _, _ = wire.recvmsg(64, _socket.CMSG_SPACE(4))
        except OSError:
            os.close(leash_end)
            raise
        finally:
            if usual is not None:
                priority.give(nursery, usual)
            for fd in fds[3:]:
                os.close(fd)
        if answer != place.READY or not ancillary:
            os.close(leash_end)
            return None
        pidfd = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
        return _stand_for(wire, pidfd, leash_end)


def _letter() -> int:
    """A memfd with what only the daemon may read: arguments and environment."""
    parts = [str(len(sys.argv)).encode(), *map(os.fsencode, sys.argv)]
    parts += [name + b"=" + value for name, value in os.environb.items()]
    data = b"\0".join(parts)
    fd = os.memfd_create("nydusd-start", os.MFD_CLOEXEC)
    while data:
        data = data[os.write(fd, data) :]
    return fd


def _stand_for(wire: Socket, pidfd: int, leash_end: int) -> int | None:
    """Let the daemon begin, and be it for whoever started us, until it has ended. None if it did not begin."""
    import contextlib
    import signal

    from nydusd.nursery import stand

    # Opened while we may still give up: an upgrade may take the file away.
    program = os.open(stand.__file__, os.O_RDONLY | os.O_CLOEXEC)
    signal.pthread_sigmask(signal.SIG_BLOCK, stand.SIGNALS)
    # From here on it is the daemon's turn whatever happens: a second one must not begin.
    with contextlib.suppress(OSError):  # it is dead: its pidfd tells
        wire.send(place.GO)
    kept = (program, wire.fileno(), pidfd, leash_end)
    if not any(name in os.environ for name in _PLACES):
        command = [sys.executable, "-I", "-S", f"/proc/self/fd/{program}", str(wire.fileno()), str(pidfd)]
        for fd in kept:
            os.set_inheritable(fd, True)
        try:
            os.execv(sys.executable, [*command, *sys.orig_argv])
        except OSError:  # no memory for it, or the interpreter is being replaced: then as we are
            for fd in kept:
                os.set_inheritable(fd, False)
    os.close(program)
    return stand.stand(wire, pidfd)


class _Closing:
    """`contextlib.closing` without its import."""

    def __init__(self, wire: Socket) -> None:
        self._wire = wire

    def __enter__(self) -> Socket:
        return self._wire

    def __exit__(self, *_: object) -> None:
        self._wire.close()
