"""The request that a transport has under way: how long it may wait, and what came of it. Used by fetch workers."""

from __future__ import annotations

import http.client
import time
from dataclasses import dataclass


@dataclass(slots=True)
class Exchange:
    """So many seconds for each wait, `deadline` (`time.monotonic()`) for all of it. There is one of it for a transport."""

    for_connection: float | None
    for_data: float | None
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

    def over(self) -> bool:
        """Whether the deadline has come."""
        return time.monotonic() >= self.deadline
