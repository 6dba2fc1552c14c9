"""What front ends, the API process and workers say to the supervisor, and who is to hear it. Runs in the supervisor."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from nydusd.ipc import messages
from nydusd.ipc.messages import Json, decode, encode
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.router import Router
from nydusd.supervisor.sockets import Sockets, drain, guarded


class Traffic:
    """`live` are the identities of processes that are there; `control(request, answer)` is for what the API process asks.

    `guests`: who hears what a worker says (kind, body) that is of no pool yet, by its identity.
    """

    def __init__(
        self,
        sockets: Sockets,
        router: Router,
        fetch: WorkerPool,
        decompress: WorkerPool,
        live: Container[bytes],
        control: Callable[[Json, Callable[[Json], object]], None],
        guests: Mapping[bytes, Callable[[bytes, Json], None]],
    ) -> None:
        self._sockets = sockets
        self._router = router
        self._fetch = fetch
        self._decompress = decompress
        self._live = live
        self._control = control
        self._guests = guests

    def take(self, ready: Mapping[Any, int]) -> None:
        """Take in what has come at the sockets that are ready."""
        for socket, handle in ((self._sockets.front, self._from_front), (self._sockets.work, self._from_work)):
            if socket in ready:
                for frames in drain(socket):
                    guarded(handle, frames)

    def _from_front(self, frames: list[bytes]) -> None:
        client, kind, body = frames[0], frames[1], frames[2]
        if kind == messages.REQUEST:
            if client not in self._live:
                return  # sent before its process died: it would be given what nobody gives back
            number, handle, first, count, flags = messages.REQUEST_BODY.unpack(body)
            self._router.request(client, number, handle, first, count, flags)
        elif kind == messages.CANCEL:
            self._router.cancel(client, *messages.NUMBER.unpack(body))
        elif kind == messages.RELEASE:
            self._router.release(*messages.NUMBER.unpack(body))
        elif kind == messages.CONTROL:
            head = [client, messages.CONTROL, body]
            self._control(decode(frames[3]), lambda answer: self._sockets.front.send_multipart([*head, encode(answer)]))

    def _from_work(self, frames: list[bytes]) -> None:
        identity, kind, body = frames
        if identity in self._guests:
            self._guests[identity](kind, decode(body))
            return
        pool = self._fetch if identity.startswith(b"fetch-") else self._decompress
        if kind == messages.HELLO and identity in self._live:
            pool.worker_ready(identity)
        elif kind == messages.DONE:
            pool.worker_done(identity, decode(body))
