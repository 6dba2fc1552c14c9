"""What an operator does to the workers of a daemon under torture: upgrades, which others may disturb, and other numbers.

An upgrade runs beside what else happens. It may fail when something was killed meanwhile, and then says why, and is asked for
again, as an operator would; one that was left in peace must go well.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
from collections import Counter

from tests.support.daemon import Daemon

_PATIENCE = 150.0
_TRIES = 3
_LOST = 0
"""No answer: whoever was asked was killed."""


class Upgrades:
    """Of one daemon. `ended` counts them by how they ended, `problems` are sentences."""

    def __init__(self, ended: Counter[str]) -> None:
        self.ended = ended
        self.problems: list[str] = []
        self._running: threading.Thread | None = None
        self._disturbed = False
        self._lost = False
        """Whether nobody has told how the last one ended: it may be under way still."""

    def disturb(self) -> None:
        """Something else happens to the daemon now."""
        self._disturbed = True

    def wait(self) -> None:
        """Until none is under way."""
        if self._running is not None:
            self._running.join()
            self._running = None

    def begin(self, daemon: Daemon, choose: random.Random) -> None:
        """An upgrade. Every second one goes on beside what comes next."""
        alone = choose.random() < 0.5
        self.wait()
        self._disturbed = False
        self._running = threading.Thread(target=self._upgrade, args=(daemon,))
        self._running.start()
        if alone:
            self.wait()

    def _upgrade(self, daemon: Daemon) -> None:
        for _ in range(_TRIES):
            if not self._try(daemon):
                return

    def _try(self, daemon: Daemon) -> bool:
        """Whether it was interrupted."""
        status, told = _ask(daemon, "/api/v1/nydusd/workers/upgrade", None)
        disturbed = self._disturbed or (self._lost and status == 409)
        self._lost = status == _LOST or (self._lost and status == 409)
        if status == 200:
            self.ended["went well"] += 1
        elif status in (503, _LOST) or disturbed:
            self.ended["interrupted"] += 1
            return True
        else:
            self.problems.append(f"an upgrade that nobody disturbed: {status} {told}")
        return False

    def scale(self, daemon: Daemon, choose: random.Random) -> None:
        """Other numbers of workers, 0 for those that are configured."""
        wanted = {"decompress": choose.randrange(5), "fetch": choose.randrange(4)}
        status, told = _ask(daemon, "/api/v1/nydusd/workers", json.dumps(wanted).encode())
        if status not in (200, 409, 503, _LOST):
            self.problems.append(f"{wanted}: {status} {told}")


def _ask(daemon: Daemon, path: str, body: bytes | None) -> tuple[int, str]:
    try:
        status, answer = daemon.request("PUT", path, body, seconds=_PATIENCE)
    except (OSError, http.client.HTTPException) as e:
        return _LOST, str(e)
    return status, answer.decode(errors="replace")
