"""Handing over: what a daemon that keeps our session sends, and the time in which a daemon is to take over and cannot yet.

Runs in the supervisor. There are two such times, in both of which the API says INIT and nothing is served by this process:
with `--upgrade` until the predecessor, which serves on, has been told to exit; and after a crash of which no process was left,
until whoever keeps the session (`--supervisor`) has sent it.

What holds after SIGKILL in that time: nothing was changed; the predecessor serves on, or the next one waits in the same way.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import zmq

from nydusd import points
from nydusd.errors import NydusError
from nydusd.ipc import messages, passed
from nydusd.ipc.messages import Json, decode, encode
from nydusd.supervisor.sockets import Sockets, drain, guarded
from nydusd.waits import EndedError

if TYPE_CHECKING:
    from nydusd.supervisor.daemon import Supervisor
    from nydusd.supervisor.family import Family
    from nydusd.supervisor.notify import Notifier
    from nydusd.supervisor.runtime import Runtime

log = logging.getLogger(__name__)

VERSION, READABLE_BY, OLDEST = 2, 2, 2
"""Of the state, and of all that front ends and supervisors say to each other: the version that we write, that of the oldest
release that can read it, and the oldest that we read. A release that only adds to it counts VERSION up, not READABLE_BY."""
_LOOK_MS = 20
_PACKET, _FDS_MOST, _STATE_MOST = 64 << 10, 16, 16 << 20
_PATIENCE = 5.0
"""Seconds until all of a state must have come, however it trickles: nobody is served meanwhile."""
FUSE_DEVICE = os.makedev(10, 229)
ANY_TIME = ("daemon", "takeover", "start", "exit", "sendfd", "events", "set_log_level")
"""What is answered by a daemon that serves nothing, or does not know all its images yet."""


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
    end = time.monotonic() + _PATIENCE
    data, fds = passed.receive(wire, _PACKET, _FDS_MOST)
    try:
        text = bytearray(data)
        while data and len(text) < _STATE_MOST:
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
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


class Handover:
    """How a daemon comes to serve in the place of another one, and leaves its own to the next."""

    def __init__(self, serves: str, runtime: Runtime, family: Family, poller: zmq.Poller, notifier: Notifier) -> None:
        self._serves = serves
        self._runtime = runtime
        self._family = family
        self._poller = poller
        self._notifier = notifier
        self._place: Path | None = None
        self.sockets: Sockets | None = None
        """Those by which the API process asked us meanwhile."""
        self.waiting = False
        """We are to take over and cannot yet."""
        self.leaving = False
        """The next one is there, or is to come: all stays as it is."""
        self.sent: Sent | None = None
        self.told_to_start = False

    @property
    def waited(self) -> bool:
        """Whether we had to wait."""
        return self._place is not None

    def wait_for_predecessor(self, daemon: Supervisor) -> None:
        """Until the daemon that serves here, and goes on to do so, has been told to exit and we to take over."""
        self._runtime.wait_in_line()
        points.reach("handover: in line")
        self._wait(daemon, self._runtime.waiting, lambda: daemon.state != "INIT" and self._runtime.is_free())
        points.reach("handover: predecessor gone")
        self._runtime.leave_line()
        points.reach("handover: line left")

    def wait_for_session(self, daemon: Supervisor) -> None:
        """Until whoever keeps the session has sent it."""
        self._wait(daemon, self._runtime.folder, lambda: self.sent is not None)
        points.reach("handover: session came")

    def _wait(self, daemon: Supervisor, folder: Path, done: Callable[[], bool]) -> None:
        """Answer the API in INIT, by sockets in `folder`, until it is `done`. Raises EndedError when told to end before."""
        self.waiting, self._place = True, folder
        self._family.noted = False
        wake = daemon.told.catch()
        self.sockets = Sockets(f"ipc://{folder}/front", f"ipc://{folder}/work")
        for source in (self.sockets.front, wake):
            self._poller.register(source, zmq.POLLIN)
        self._family.front = f"ipc://{folder}/front"
        points.reach("handover: can be asked")
        daemon.open_api()
        points.reach("handover: API listens")
        log.info("waiting to take over %s", self._serves)
        while not done():
            if self._turn(daemon, wake):
                raise EndedError(f"{self._serves}: told to end before it was taken over")
        self._family.front = self._runtime.front
        self._family.noted = True
        self.waiting = False

    def _turn(self, daemon: Supervisor, wake: int) -> bool:
        """Answer what was asked, look after children; whether we are told to end."""
        sockets = self.sockets
        assert sockets is not None
        events = dict(self._poller.poll(_LOOK_MS))
        if sockets.front in events:
            for frames in drain(sockets.front):
                if len(frames) == 4 and frames[1] == messages.CONTROL:
                    guarded(lambda frames: self._answer(daemon, sockets, frames), frames)
        now = time.monotonic()
        for child, status in self._family.reap(lambda _child, _identity: None):
            self._family.judge(child, status)
        self._family.tend(events, now)
        self._family.restart(now)
        self._notifier.alive(now)
        return daemon.stopping or (wake in events and daemon.told.take())

    @staticmethod
    def _answer(daemon: Supervisor, sockets: Sockets, frames: list[bytes]) -> None:
        def reply(answer: Json) -> None:
            sockets.front.send_multipart([*frames[:3], encode(answer)])

        request = decode(frames[3])
        if request.get("op") in ANY_TIME:
            daemon.control(request, reply)
        else:
            reply({"error": {"status": 503, "message": "NotReady"}})

    def take(self, sent: Sent) -> None:
        """The session, from whoever keeps it: used if no process has it."""
        self.forget()
        if self.waiting:
            self.sent = sent
        else:
            os.close(sent.fd)

    def forget(self) -> None:
        """What was sent was used, or is not needed."""
        if self.sent is not None:
            os.close(self.sent.fd)
            self.sent = None

    def bind(self) -> Sockets:
        """The daemon's sockets: where the API process found us meanwhile we can be found by all others, too.

        Once more in the same place, if nothing was taken over: then `Runtime.claim` has emptied it.
        """
        runtime = self._runtime
        if self.sockets is None:
            self.sockets = Sockets(runtime.front, runtime.work)
        elif self._place != runtime.folder or not (runtime.folder / "front").exists():
            self.sockets.bind(runtime.front, runtime.work)
        return self.sockets
