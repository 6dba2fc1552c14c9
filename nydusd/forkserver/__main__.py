"""`python -m nydusd.forkserver FD`: the fork server. Children of the daemon begin as copies of this process.

A fresh interpreter that loads what a child needs takes 0.15 s of a processor and 10 MB; a copy of one that has loaded it takes
a few milliseconds, and shares the memory. This process does little else: one thread, no library's background threads, no
secret in its memory or environment, nothing open but its socket and what it holds.

When it has loaded what `argv` names it says {ready}. If the supervisor is killed before, it loads no more, for a successor and
its fork server wait for the processor, and holds what it was given. A request (`client.py`, `servers.py`) is one packet:
JSON, and fds.

- {module, fds, load}: `module` is run as with `python -m`, with the spec fd, the first of the fds, on its command line; `fds`
  are the numbers under which the child finds them all; the modules `load` are imported here first, once, so that later
  children share them too. One fd more than numbers: the gate, a pipe. The child begins when a byte comes through it, and
  not at all when it is closed: so nobody begins of whom the supervisor does not know. Answer: {pid} or {errno, error}.
- {hold: numbers}: fds of the FUSE session, or of an export's clients, to be held under these numbers for a supervisor to come:
  then this process does not end with the present one, but with the mount. They are safe in the packet, before it is read. No
  child has them. No answer.
- {release: numbers}: these are held no more. No answer.
- {guard: {delay, command}}, and an fd with an environment: if the supervisor is killed and nobody has started another one
  `delay` seconds later, this process does (`guardian.py`). No child has it. No answer.
- {stderr}, and an fd: what is printed here goes there from now on. No answer.
- {copy}, and an fd: a copy of this process, a fork server with all that this one has, serves the line behind the fd.
  Answer: {copy: pid}, or {copy: 0} where there is no room. It begins with the first packet, and not at all without one.

A child is forked twice: its parent ends at once, so it becomes the supervisor's own child (a subreaper), which sees it end.

What holds after SIGKILL: all children live on. The supervisor goes on with the copy, or starts another fork server. Ends when
the supervisor does, unless it holds what the next one needs, which ends it.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
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
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nydusd import points
from nydusd.forkserver.line import FDS_MAX, PACKET_MAX
from nydusd.ipc import passed

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
    faulthandler.register(signal.SIGUSR1, file=2)  # by its number: children, too, until they know their log
    from nydusd.proctitle import set_title

    set_title("fork server")
    line = socket.socket(fileno=int(argv[0]))
    line.set_inheritable(False)
    for first, end in ((3, line.fileno()), (line.fileno() + 1, _FDS_END)):  # what the supervisor was given for itself
        os.closerange(first, end)
    server = _Server(line)
    try:
        _load(argv[1:], server.has_supervisor)
    except Exception as e:
        traceback.print_exc()
        server.answer({"errno": 0, "error": f"{type(e).__name__}: {e}"})  # whoever asks first is told why
        return 1
    from nydusd import turns  # loads ctypes, which is loaded now

    turns.be_short()
    server.answer({"ready": True})
    task = server.serve()
    if task is None:
        server.outlive()
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [task.module, "--spec-fd", str(task.spec_fd)]
    # It ends by SystemExit, which goes through here: the child ends as an interpreter of its own does.
    entry = sys.modules.get(f"{task.module}.__main__")
    if entry is not None:  # loaded once for all: to find and to run it again would take each child 0.8 MB
        sys.exit(entry.run())
    runpy.run_module(task.module, run_name="__main__", alter_sys=True)
    return 0


class _Server:
    """Serves the requests that come by `line`."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._held: list[int] = []
        self._guard: dict[str, Any] | None = None
        """What is to be done when the supervisor was killed, and the fd of the environment for it."""

    def has_supervisor(self) -> bool:
        """Whether there is anybody to make children for."""
        poll = select.poll()
        poll.register(self._line, 0)
        return not poll.poll(0)

    def answer(self, answer: dict[str, Any]) -> None:
        """A line that is closed is noticed when the next request is waited for."""
        with contextlib.suppress(ConnectionError):
            self._line.send(json.dumps(answer).encode())

    def serve(self) -> Task | None:
        """Until the line is closed: None. In a child at once: what that is to do."""
        while True:
            try:
                packet, fds = passed.receive(self._line, PACKET_MAX, FDS_MAX)
            except ConnectionResetError:
                # Killed before it had read our last answer. The kernel says so once, and then gives what it had sent
                # before: that may be the last there is of the fds that we are to hold.
                continue
            if not packet:
                return None
            request = json.loads(packet)
            if "hold" in request:
                self._hold(fds, request["hold"])
            elif "release" in request:
                for number in set(self._held) & set(request["release"]):
                    os.close(number)
                    self._held.remove(number)
            elif "guard" in request:
                if self._guard is not None:
                    os.close(self._guard["environment"])
                self._guard = request["guard"] | {"environment": fds[0]}
            elif "stderr" in request:
                os.dup2(fds[0], 2)
                os.close(fds[0])
            elif "copy" in request:
                self._copy(fds[0])
            elif (task := self._spawn(request, fds)) is not None:
                return task

    def _spawn(self, request: dict[str, Any], fds: list[int]) -> Task | None:
        try:
            points.reach("fork server: asked")
            if not self.has_supervisor():
                raise OSError(errno.EPIPE, "the supervisor is gone")
            _load(request["load"])
            pid = _fork()
        except OSError as e:
            answer = {"errno": e.errno, "error": e.strerror}
        except ImportError as e:
            answer = {"errno": 0, "error": str(e)}
        else:
            if pid == 0:
                points.reach("fork server: child made")
                self._line.close()
                for fd in self._held:
                    os.close(fd)
                if self._guard is not None:
                    os.close(self._guard["environment"])
                if not os.read(fds[-1], 1):
                    os._exit(0)
                os.close(fds.pop())
                return Task(request["module"], _place(fds, request["fds"]))
            points.reach("fork server: before the answer")
            answer = {"pid": pid}
        for fd in fds:
            os.close(fd)
        self.answer(answer)
        return None

    def _hold(self, fds: list[int], numbers: list[int]) -> None:
        above = max(numbers) + 1
        if self._line.fileno() in numbers:
            line = fcntl.fcntl(self._line.fileno(), fcntl.F_DUPFD_CLOEXEC, above)
            self._line.close()
            self._line = socket.socket(fileno=line)
        if self._guard is not None and self._guard["environment"] in numbers:
            self._guard["environment"] = fcntl.fcntl(self._guard["environment"], fcntl.F_DUPFD_CLOEXEC, above)
        self._held = list(dict.fromkeys([*self._held, *numbers]))
        _place(fds, numbers)
        points.reach("fork server: holds")

    def _copy(self, line: int) -> None:
        """One to take our place. It is the second to start a supervisor."""
        try:
            pid = _fork()
        except OSError:
            pid = 0
        else:
            if pid == 0:
                points.reach("fork server: copy made")
                self._line.close()
                self._line = socket.socket(fileno=line)
                if not self._line.recv(1):
                    os._exit(0)
                if self._guard is not None:
                    self._guard["delay"] *= 2
                points.reach("fork server: takes its predecessor's place")
                return
        os.close(line)
        self.answer({"copy": pid})

    def outlive(self) -> None:
        """The supervisor is gone: hold what is held until the next one has it and ends us, or until the mount is over.

        Not for ever: if there is no front end either, users of the mount are better off with an error than waiting.
        """
        if not self._held:
            return
        if self._guard is not None:
            from nydusd.forkserver.guardian import guard

            guard(self._held[0], self._guard)
        else:
            poll = select.poll()
            poll.register(self._held[0], 0)
            poll.poll(_HOLD_SECONDS * 1000)


def _load(modules: Sequence[str], goes_on: Callable[[], bool] = lambda: True) -> None:
    """`goes_on()`: asked before each module; what is left is not loaded when it says no."""
    new = [name for name in modules if name not in sys.modules]
    for name in new:
        if not goes_on():
            return
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
        points.reach("fork server: between it and a child")
        try:
            pid = os.fork()
        except OSError as e:
            pid = -(e.errno or 1)
        if pid == 0:
            os.close(writer)
            return 0
        points.reach("fork server: before a child's pid is told")
        with contextlib.suppress(OSError):  # killed, who wanted to know; and this one must not go on in its place
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
