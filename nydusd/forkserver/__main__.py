"""`python -m nydusd.forkserver FD`: the fork server. Children of the daemon begin as copies of this process.

A fresh interpreter that loads what a child needs takes 0.15 s of a processor and 10 MB; a copy of one that has loaded it takes
a few milliseconds, and shares the memory. This process does little else: one thread, no library's background threads, no
secret in its memory or environment, nothing open but its socket and what it holds.

A request (`client.ForkServer`) is one packet: JSON {module, fds, load}, and the fds. `module` is run as with `python -m`, with
the spec fd, the first of the fds, on its command line; `fds` are the numbers under which the child finds them all; the modules
`load` are imported here first, once, so that later children share them too. The answer is {pid} or {errno, error}.

A request {hold: true} brings fds of the FUSE session, to be held for a supervisor to come: then it does not end with the
present one, but with the mount. The answer is {held}, their numbers here. No child has them. {guard: {delay, command}} brings
an fd with an environment: if the supervisor is killed and nobody has started another one `delay` seconds later, this
process does (`guardian.py`).

A child is forked twice: its parent ends at once, so it becomes the supervisor's own child (a subreaper), which sees it end.

What holds after SIGKILL: all children live on. The supervisor starts another fork server. Ends when the supervisor does, unless
it holds what the next one needs, which ends it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from typing import Any, NamedTuple

from nydusd.forkserver.client import FDS_MAX, PACKET_MAX

_PID = struct.Struct("=i")
_FDS_END = 1 << 20
_HOLD_SECONDS = 60
"""How long a mount waits for its next supervisor if all others that served it are gone."""


class Task(NamedTuple):
    """What a child is to do: run `module`, whose spec is in `spec_fd`."""

    module: str
    spec_fd: int


def main(argv: list[str]) -> int:
    """Serve until the supervisor is gone; in a child, run what was asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from nydusd.proctitle import set_title

    set_title("fork server")
    line = socket.socket(fileno=int(argv[0]))
    line.set_inheritable(False)
    for first, end in ((3, line.fileno()), (line.fileno() + 1, _FDS_END)):  # what the supervisor was given for itself
        os.closerange(first, end)
    _load(argv[1:])
    held: list[int] = []
    guards: list[dict[str, Any]] = []
    task = _serve(line, held, guards)
    if task is None:
        if guards:
            from nydusd.forkserver.guardian import guard

            guard(held[0], guards[-1])
        elif held:
            _outlive(held[0])
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [task.module, "--spec-fd", str(task.spec_fd)]
    # It ends by SystemExit, which goes through here: the child ends as an interpreter of its own does.
    runpy.run_module(task.module, run_name="__main__", alter_sys=True)
    return 0


def _serve(line: socket.socket, held: list[int], guards: list[dict[str, Any]]) -> Task | None:
    while True:
        try:
            packet, fds, _, _ = socket.recv_fds(line, PACKET_MAX, FDS_MAX)
        except ConnectionResetError:  # killed before it had read our last answer
            return None
        if not packet:
            return None
        request = json.loads(packet)
        if "hold" in request:
            for fd in fds:
                os.set_inheritable(fd, False)
            if "guard" in request:
                guards.append(request["guard"] | {"environment": fds[0]})
            held += fds
            with contextlib.suppress(ConnectionError):  # noticed when the next request is waited for
                line.send(json.dumps({"held": fds}).encode())
            continue
        try:
            _load(request["load"])
            pid = _fork()
        except OSError as e:
            answer = {"errno": e.errno, "error": e.strerror}
        except ImportError as e:
            answer = {"errno": 0, "error": str(e)}
        else:
            if pid == 0:
                line.close()
                for fd in held:
                    os.close(fd)
                return Task(request["module"], _place(fds, request["fds"]))
            answer = {"pid": pid}
        for fd in fds:
            os.close(fd)
        try:
            line.send(json.dumps(answer).encode())
        except ConnectionError:
            return None


def _outlive(session: int) -> None:
    """The supervisor is gone: hold what is held until the next one has it and ends us, or until the mount is over.

    Not for ever: if there is no front end either, users of the mount are better off with an error than waiting.
    """
    poll = select.poll()
    poll.register(session, 0)
    poll.poll(_HOLD_SECONDS * 1000)


def _load(modules: list[str]) -> None:
    new = [name for name in modules if name not in sys.modules]
    for name in new:
        importlib.import_module(name)
    if new:
        # What is loaded stays, so a child's search for garbage need not touch it, and its memory stays shared.
        gc.collect()
        gc.freeze()


def _fork() -> int:
    """0 in the child; its pid here, when it is the supervisor's child. Raises OSError when there is no room for it."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        middle = os.fork()
    except OSError:
        os.close(reader)
        os.close(writer)
        raise
    if middle == 0:
        os.close(reader)
        try:
            pid = os.fork()
        except OSError as e:
            pid = -(e.errno or 1)
        if pid == 0:
            os.close(writer)
            return 0
        os.write(writer, _PID.pack(pid))
        os._exit(0)
    os.close(writer)
    os.waitpid(middle, 0)
    told = os.read(reader, _PID.size)
    os.close(reader)
    pid = _PID.unpack(told)[0] if told else -errno.EINTR  # none: somebody killed the one between us and it
    if pid < 0:
        raise OSError(-pid, os.strerror(-pid))
    return int(pid)


def _place(fds: list[int], numbers: list[int]) -> int:
    """Give each fd the number that it must have; gives that of the first."""
    above = max(numbers) + 1
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(high, numbers, strict=True):
        os.dup2(fd, number, inheritable=False)
        os.close(fd)
    return numbers[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
