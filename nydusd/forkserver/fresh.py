"""A fork server that is being tried: what it is asked is answered later, so that nobody has to wait for it.

Runs in the supervisor, whose loop waits for nothing. It loads the code that is on disk now. Once it has proved good it
changes places with the daemon's fork server (`Servers.trade_places`), and that one is ended.

What holds after SIGKILL of the supervisor: it ends by itself, or is ended by the next supervisor, as any fork server.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

from nydusd.forkserver.line import PACKET_MAX
from nydusd.forkserver.process import Process, let_begin
from nydusd.forkserver.servers import Servers


class FreshServer(Servers):
    """One question at a time. Raises OSError when there is no room for the process."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: list[int] = []
        """The child that is being made begins when something is written here, and ends if it is closed."""

    def fileno(self) -> int:
        """To be polled for its answers."""
        return self._servers[0].line.fileno()

    def ended(self) -> bool:
        """Whether its process is gone."""
        return self._servers[0].process.poll() is not None

    def ask_for_child(self, module: str, fds: Sequence[int], load: Sequence[str]) -> None:
        """As `ForkServer.spawn`, but for `take_child`, which gives what comes of it. Raises OSError when it is gone."""
        request = json.dumps({"module": module, "fds": list(fds), "load": list(load)}).encode()
        gate, key = os.pipe2(os.O_CLOEXEC)
        self._keys.append(key)
        try:
            self._servers[0].line.settimeout(0)
            socket.send_fds(self._servers[0].line, [request], [*fds, gate])
        finally:
            os.close(gate)

    def take_child(self) -> Process | None:
        """The child that was asked for, None as long as there is no answer. Raises OSError when there will be none."""
        answer = self._receive()
        if answer is None or "pid" not in answer:
            return None
        key = self._keys.pop()
        try:
            return let_begin(answer["pid"], key)
        finally:
            os.close(key)

    def is_ready(self) -> bool:
        """Whether it has loaded all that it was to load. Raises OSError when it cannot."""
        return self.ready or (self._receive() is not None and self.ready)

    def _receive(self) -> dict[str, Any] | None:
        server = self._servers[0]
        server.line.settimeout(0)
        try:
            try:
                packet = server.line.recv(PACKET_MAX)
            except (
                ConnectionResetError
            ):  # said once by the kernel, before what it had to say: it had not read all that it was sent
                packet = server.line.recv(PACKET_MAX)
        except BlockingIOError:
            return None
        except ConnectionError:
            packet = b""
        if not packet:
            raise OSError(errno.EPIPE, "it has ended")
        answer: dict[str, Any] = json.loads(packet)
        if "error" in answer:
            raise OSError(answer["errno"], answer["error"])
        self._takes(server, answer)
        return answer

    def close(self) -> None:
        """End it, or what it has changed places with; a child that is being made does not begin."""
        for key in self._keys:
            os.close(key)
        self._keys.clear()
        super().close()
