"""ChunkClient: a front end's line to the supervisor. One ZeroMQ DEALER; nothing here blocks.

ZeroMQ reconnects by itself, and queues what is sent meanwhile, so a supervisor that is replaced costs a wait and no
request. Data that comes in shared memory (dummy cache, full disk) is viewed through `pieces` and given back by `release`.
Each supervisor has an arena of its own name, and numbers of leases that none before it gave out: what a former one has given
is never taken for what its successor gives.
"""

from __future__ import annotations

from typing import NamedTuple

import zmq

from nydusd.errors import CacheError
from nydusd.ipc.arena import Arena
from nydusd.ipc.messages import ANSWER, ANSWER_BODY, CANCEL, NUMBER, RELEASE, REQUEST, REQUEST_BODY, SlotRef, decode
from nydusd.storage.api.io import ChunkRun


class Reply(NamedTuple):
    """The end of a request: errno 0 and the chunks are ready, or in `slot`; or the errno for the reader."""

    request: int
    errno: int
    slot: SlotRef | None


class ChunkClient:
    """Requests for chunks of blobs, each named by the supervisor's handle."""

    def __init__(self, endpoint: str, identity: bytes) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 80)
        self._socket.connect(endpoint)
        self._next = 0
        self._arenas: dict[str, Arena] = {}

    def fileno(self) -> int:
        """Becomes readable when replies may have come. Edge-triggered: call `replies` until it gives nothing."""
        return int(self._socket.getsockopt(zmq.FD))

    def request(self, run: ChunkRun, flags: int = 0, number: int | None = None) -> int:
        """Ask for a run of chunks (`run.blob` a handle); `number` repeats an earlier request. Gives the number."""
        if number is None:
            self._next += 1
            number = self._next
        self._socket.send_multipart([REQUEST, REQUEST_BODY.pack(number, run.blob, run.first, run.count, flags)])
        return number

    def replies(self) -> list[Reply]:
        """All replies that have come. One whose arena is gone is of a former supervisor and void: who waits asks again."""
        out = []
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            if frames[0] == ANSWER:
                number, errno = ANSWER_BODY.unpack(frames[1])
                slot = None
                if len(frames) > 2:
                    raw = decode(frames[2])
                    slot = SlotRef(raw["lease"], raw["arena"], raw["handle"], [tuple(c) for c in raw["chunks"]])
                    if not self._maps(slot.arena):
                        self.release(slot)
                        continue
                out.append(Reply(number, errno, slot))
        return out

    def cancel(self, request: int) -> None:
        """Nobody waits for this any more."""
        self._socket.send_multipart([CANCEL, NUMBER.pack(request)])

    def pieces(self, slot: SlotRef) -> dict[int, memoryview]:
        """The plain bytes of each chunk in a slot; to be dropped before `release`."""
        arena = self._arenas[slot.arena]
        return {chunk: arena.view(offset, length) for chunk, offset, length in slot.chunks}

    def _maps(self, name: str) -> bool:
        if name not in self._arenas:
            try:
                self._arenas[name] = Arena.open(name)
            except CacheError:
                return False
        return True

    def forget_arenas(self) -> None:
        """What was given in shared memory is used no more: the supervisor that gave it is gone. Its pages go with it."""
        self._arenas.clear()

    def release(self, slot: SlotRef) -> None:
        """Give a slot's lease back."""
        self._socket.send_multipart([RELEASE, NUMBER.pack(slot.lease)])

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        for arena in self._arenas.values():
            arena.close()
