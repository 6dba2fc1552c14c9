"""Handing over: what a daemon that keeps our session sends, and the time in which a daemon is to take over and cannot yet.

Runs in the supervisor. There are two such times, in both of which the API says INIT and nothing is served by this process:
with `--upgrade` until the predecessor, which serves on, has been told to exit; and after a crash of which no process was left,
until whoever keeps the session (`--supervisor`) has sent it.

What holds after SIGKILL in that time: nothing was changed; the predecessor serves on, or the next one waits in the same way.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import zmq

from nydusd.errors import NydusError
from nydusd.ipc import messages
from nydusd.ipc.messages import Json, decode, encode
from nydusd.supervisor.sockets import Sockets, drain

if TYPE_CHECKING:
    from nydusd.supervisor.family import Family

VERSION, READABLE_BY, OLDEST = 2, 2, 2
"""Of the state, and of all that front ends and supervisors say to each other: the version that we write, that of the oldest
release that can read it, and the oldest that we read. A release that only adds to it counts VERSION up, not READABLE_BY."""
_LOOK_MS = 20
_PACKET, _FDS_MOST, _STATE_MOST = 64 << 10, 16, 16 << 20
FUSE_DEVICE = os.makedev(10, 229)
_OPS = ("daemon", "takeover", "start", "exit", "sendfd", "events", "set_log_level")
"""What is answered by a daemon that serves nothing."""


class EndedError(NydusError):
    """Told to end before there was anything to serve."""


class Sent(NamedTuple):
    """What whoever keeps a session has sent."""

    fd: int
    state: Json


def why_unknown(state: Json) -> str | None:
    """Why a state cannot be taken over by this release; None if it can."""
    version = state.get("version")
    if type(version) is int and version >= OLDEST:
        readable_by = state.get("readable_by", version)
        if version <= VERSION or (type(readable_by) is int and readable_by <= VERSION):
            return None
    return f"its state is of version {version!r}, this release knows {OLDEST} to {VERSION}"


def receive(wire: socket.socket, device: int) -> Sent:
    """The session's fd, of the device that has this number, and its state. The caller owns the fd.

    Raises OSError, or NydusError for what is neither.
    """
    data, fds, _, _ = socket.recv_fds(wire, _PACKET, _FDS_MOST, socket.MSG_CMSG_CLOEXEC)
    try:
        text = data
        while data and len(text) < _STATE_MOST:
            data = wire.recv(_PACKET)
            text += data
        if not fds or os.fstat(fds[0]).st_rdev != device or not stat.S_ISCHR(os.fstat(fds[0]).st_mode):
            raise NydusError(f"no file descriptor of a {'FUSE session' if device == FUSE_DEVICE else 'cache'} was sent")
        try:
            state = json.loads(text)
            why = why_unknown(state)
        except (ValueError, AttributeError, RecursionError):
            why = "its state is none of ours"
        if why is not None:
            raise NydusError(f"what was sent cannot be taken over: {why}")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    for fd in fds[1:]:
        os.close(fd)
    return Sent(fds[0], state)


class Waiting:
    """The API of a daemon that serves nothing. Its sockets, in `folder`, are served by the daemon from then on, too.

    `control` answers what the API process asks; `wake` is the pipe of signals.
    """

    def __init__(self, folder: Path, family: Family, poller: zmq.Poller, wake: int) -> None:
        self.sockets = Sockets(f"ipc://{folder}/front", f"ipc://{folder}/work")
        self._family = family
        self._poller = poller
        self._wake = wake
        for source in (self.sockets.front, wake):
            poller.register(source, zmq.POLLIN)

    def turn(self, now: float, control: Callable[[Json, Callable[[Json], object]], None]) -> bytes:
        """Answer what was asked; gives what signals have written."""
        events = dict(self._poller.poll(_LOOK_MS))
        if self.sockets.front in events:
            for frames in drain(self.sockets.front):
                if len(frames) == 4 and frames[1] == messages.CONTROL:
                    self._answer(frames, control)
        for child, status in self._family.reap(lambda _child, _identity: None):
            self._family.judge(child, status)
        self._family.tend_fork_server(events, now)
        self._family.restart(now)
        return os.read(self._wake, 64) if self._wake in events else b""

    def _answer(self, frames: list[bytes], control: Callable[[Json, Callable[[Json], object]], None]) -> None:
        def reply(answer: Json) -> None:
            self.sockets.front.send_multipart([*frames[:3], encode(answer)])

        request = decode(frames[3])
        if request.get("op") in _OPS:
            control(request, reply)
        else:
            reply({"error": {"status": 503, "message": "NotReady"}})
