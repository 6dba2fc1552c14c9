"""The request that a transport has under way: how long it may wait, and what came of it. Used by fetch workers."""

from __future__ import annotations

import http.client
import time
from dataclasses import dataclass
from typing import Final

_FAIR: Final = 1.0
"""Seconds of silence that speak against a server, also if nobody has the time to wait for longer."""


@dataclass(slots=True)
class Exchange:
    """So many seconds for each wait, `deadline` (`time.monotonic()`) for all of it. There is one of it for a transport."""

    for_connection: float | None
    for_data: float | None
    begun: float = 0.0
    deadline: float = 0.0
    in_body: bool = False
    error: OSError | None = None
    """Why the body ended before its end."""
    raw: http.client.HTTPResponse | None = None
    """The answer as http.client has it: the one whose `readinto` does not copy."""

    def limit(self, wait: float | None) -> float:
        """How long a wait may be now. Raises `TimeoutError` if there is no time left."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time left")
        return left if wait is None else min(left, wait)

    def was_fair(self) -> bool:
        """Whether the server has had the time to answer: a second, or less if its time-out is shorter."""
        return time.monotonic() - self.begun >= min(_FAIR, self.for_data or _FAIR)

    def over(self) -> bool:
        """Whether the deadline has come."""
        return time.monotonic() >= self.deadline
