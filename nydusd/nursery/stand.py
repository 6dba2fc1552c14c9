"""Stand for a daemon that the nursery has forked: pass signals on to it, and end as it does.

Run as a program by the stub (`nydusd.nursery.stub`), whose process it replaces: `python -I -S /proc/self/fd/N WIRE PIDFD LINE…`
takes half the memory of an interpreter that has gone through `site`, and it is there as long as the daemon. So it imports next
to nothing (not even `os`, which is 0.3 MB), and nothing of ours. LINE is the command as it was started, which is run again if
the daemon has begun nothing.

What holds after SIGKILL: see the stub; the leash is inherited from it.
"""

from __future__ import annotations

import _socket
import posix
import select
import sys

TYPE_CHECKING = False  # known to type checkers by its name: `typing` takes 10 ms
if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal  # without the enumerations of `signal`

SIGNALS = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGUSR1, _signal.SIGUSR2)
"""What is passed on to the daemon: the stub blocks them before it says GO."""
NOTHING = b"nothing"
"""What a copy says that has begun nothing, for it got no GO in time."""
_STATUS_PATIENCE = 1.0
"""Seconds within which the nursery says which signal has ended the daemon, if it lives."""


def stand(wire: _socket.socket, pidfd: int) -> int | None:
    """Be the daemon for whoever started us, until it has ended. Gives its exit status; None if it has begun nothing."""
    passed: list[int] = []
    former = {}

    def pass_on(number: int, _frame: object) -> None:
        passed.append(number)
        try:
            _signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return  # it has ended, and we are about to

    for number in SIGNALS:
        # The daemon handles the first two even where they are ignored, such as in the background of a shell.
        if number in SIGNALS[:2] or _signal.getsignal(number) != _signal.SIG_IGN:
            former[number] = _signal.signal(number, pass_on)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, SIGNALS)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()
    wire.settimeout(_STATUS_PATIENCE)
    try:
        try:
            told = wire.recv(64)
        except ConnectionResetError:
            # It ended before it had read our GO. The kernel says so once, and then gives what was sent before.
            told = wire.recv(64)
    except OSError:
        told = b""
    if told == NOTHING:
        for number, handler in former.items():
            _signal.signal(number, handler)
        return None
    kind, _, value = told.decode().partition(" ")
    if kind == "exit":
        return int(value)
    # Killed. By what, the nursery knows; without it: what we have passed on, or what is sent from outside.
    by = int(value) if kind == "signal" else passed[-1] if passed else int(_signal.SIGKILL)
    if by != _signal.SIGKILL:
        _signal.signal(by, _signal.SIG_DFL)
    posix.kill(posix.getpid(), by)
    return 128 + by


def main() -> int:
    """Stand for the daemon that the arguments name."""
    wire, pidfd = _socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    status = stand(wire, pidfd)
    if status is None:
        for fd in (wire.fileno(), pidfd):
            posix.set_inheritable(fd, False)
        environment = posix.environ | {b"NYDUSD_NURSERY": b"off"}
        posix.execve(sys.executable, sys.argv[3:], environment)
    return status


if __name__ == "__main__":
    sys.exit(main())
