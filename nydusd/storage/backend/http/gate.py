"""Waiting for a host that is to be left alone. Run by fetch workers; nothing here matters after a kill.

A worker waits only a little for a host that is down: it is needed for others. For a host that named a time (Retry-After)
it waits as long as the reader does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from nydusd.storage.backend.http.breaker import Breaker
from nydusd.storage.backend.http.failure import Failure, Kind


@dataclass(slots=True)
class Patience:
    """Until when (`time.monotonic()`) a wait may last, and for how many seconds for a host that is down. 0: no wait."""

    deadline: float = 0.0
    for_down: float = 0.0


def pass_gate(breaker: Breaker, ask: Callable[[], float], host: str, who: str, patience: Patience) -> None:
    """Return when `ask` (of the breaker: `admit`, or `busy` to claim nothing) gives 0 and the host wants requests.

    Raises `Failure` at once if that will not be soon enough. `who` begins its text.
    """
    waited = 0.0
    while wait := breaker.hold() or ask():
        hold = breaker.hold() > 0.0
        left = patience.deadline - time.monotonic()
        limit = left if hold else min(left, patience.for_down - waited)
        if not patience.for_down or wait > limit:
            what = "wants no request" if hold else f"is down ({breaker.why()}), so it was not asked"
            kind = Kind.THROTTLED if hold else Kind.DOWN
            raise Failure(kind, host, f"{who}{what} for {wait:.1f} s", retry_after=wait)
        time.sleep(wait)
        waited += 0.0 if hold else wait
