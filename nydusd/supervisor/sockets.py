"""The supervisor's two ZeroMQ sockets: one for front ends and the API process, one for workers."""

from __future__ import annotations

import logging
from collections.abc import Callable

import zmq

from nydusd.errors import MountError
from nydusd.ipc import messages
from nydusd.ipc.messages import Json, encode

log = logging.getLogger(__name__)

_MESSAGES = 256
"""Messages taken from a socket before the others get their turn."""


class Sockets:
    """Both ROUTER sockets, bound. What is sent to a process that is gone is dropped. Raises MountError."""

    def __init__(self, front: str, work: str) -> None:
        self._context = zmq.Context()
        self.front, self.work = self._context.socket(zmq.ROUTER), self._context.socket(zmq.ROUTER)
        for socket, endpoint in ((self.front, front), (self.work, work)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
            self._bind(socket, endpoint)

    def bind(self, front: str, work: str) -> None:
        """At other endpoints, too. Raises MountError."""
        self._bind(self.front, front)
        self._bind(self.work, work)

    def _bind(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as e:
            self.close()
            raise MountError(f"{endpoint}: {e.strerror}; a shorter NYDUSD_RUNTIME_DIR may help") from e

    def send_job(self, identity: bytes, message: Json) -> None:
        """Give a worker a job."""
        self.work.send_multipart([identity, messages.JOB, encode(message)])

    def reply(self, client: bytes, number: int, errno: int, slot: messages.SlotRef | None) -> None:
        """Answer a request of a front end."""
        frames = [client, messages.ANSWER, messages.ANSWER_BODY.pack(number, errno)]
        if slot is not None:
            frames.append(encode(slot._asdict()))
        self.front.send_multipart(frames)

    def close(self) -> None:
        self._context.destroy(linger=0)


def drain(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    """The messages that have come, up to a limit."""
    out: list[list[bytes]] = []
    try:
        while len(out) < _MESSAGES:
            out.append(socket.recv_multipart(zmq.NOBLOCK))
    except zmq.Again:
        pass
    return out


def guarded(handle: Callable[[list[bytes]], None], frames: list[bytes]) -> None:
    """One message must not end the daemon: a bug in its handling costs its sender a deadline, and is logged."""
    try:
        handle(frames)
    except Exception:
        log.exception("a message of %s failed by a bug of ours", frames[0].decode(errors="backslashreplace"))
