"""Whether a host is worth a request now: counted by all workers together, in the shared store. Run by fetch workers.

Closed: requests go. After `limit` failures in a row: open for a pause that doubles with each further failure. When it
is over one worker may try (the others still see it open); what comes of that closes it or opens it again. A worker that
is killed while it tries blocks nobody: its try has an end. A host that asked for fewer requests (Retry-After) is left
alone by all until then.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from typing import Final

from nydusd.storage.backend.http.store import Entry, SharedStore

log = logging.getLogger(__name__)

_FORGET: Final = 3600.0
MAX_HOLD: Final = 3600.0
_MAX_WHY: Final = 200


@dataclass(frozen=True, slots=True)
class Policy:
    """`limit` failures in a row open the breaker for `pause` seconds, doubling up to `longest`. A try lasts `trial`."""

    limit: int = 5
    pause: float = 0.5
    longest: float = 4.0
    trial: float = 15.0


class Breaker:
    """The breaker of one host, or of one proxy or mirror. `name` is for the log and safe to print."""

    def __init__(self, store: SharedStore, name: str, policy: Policy) -> None:
        self._store = store
        self._key = f"breaker:{name}"
        self._name = name
        self._policy = policy

    def hold(self) -> float:
        """Seconds until the time that the host asked us to wait for."""
        entry = self._store.get(self._key) or {}
        return max(0.0, _number(entry, "hold") - time.monotonic())

    def admit(self) -> float:
        """0: send a request now, and then say `succeeded` or `failed`. Else the seconds after which to ask again."""
        entry = self._store.get(self._key)
        if entry is None or _number(entry, "failures") < self._policy.limit:
            return 0.0
        return self._store.update(self._key, self._claim)

    def busy(self) -> float:
        """As `admit`, but nothing is claimed: 0 means that a request could be sent now."""
        entry = self._store.get(self._key) or {}
        return 0.0 if _number(entry, "failures") < self._policy.limit else self._wait(entry)

    def is_open(self) -> bool:
        """Whether the host counts as down."""
        return _number(self._store.get(self._key) or {}, "failures") >= self._policy.limit

    def succeeded(self) -> None:
        """The host answered: it is up."""
        entry = self._store.get(self._key)
        if entry is not None and _number(entry, "failures"):
            self._store.update(self._key, self._close)
            if _number(entry, "failures") >= self._policy.limit:
                log.warning("%s: answers again", self._name)

    def failed(self, why: str) -> None:
        """The host could not be reached, broke off or failed."""
        pause = self._store.update(self._key, lambda entry: self._count(entry, why))
        if pause:
            log.warning("%s: counts as down for %.1f s after repeated failures (%s)", self._name, pause, why)

    def unanswered(self, why: str, *, at_fault: bool) -> None:
        """Nothing came of a request. If the host is not `at_fault` that says nothing of it, but a try must have an end."""
        if at_fault or self.is_open():
            self.failed(why)

    def why(self) -> str:
        """What failed last; safe to print."""
        return str((self._store.get(self._key) or {}).get("why", ""))

    def hold_off(self, seconds: float) -> None:
        """The host wants no request for so long."""
        until = time.monotonic() + min(seconds, MAX_HOLD)

        def change(entry: Entry | None) -> tuple[Entry, float, None]:
            entry = entry or {}
            entry["hold"] = max(until, _number(entry, "hold"))
            return entry, _FORGET, None

        self._store.update(self._key, change)

    def state(self) -> dict[str, object]:
        """For whoever operates the daemon."""
        entry = self._store.get(self._key) or {}
        now = time.monotonic()
        failures = int(_number(entry, "failures"))
        return {
            "state": "closed" if failures < self._policy.limit else "open",
            "failures": failures,
            "open_seconds": round(max(0.0, _number(entry, "until") - now), 3),
            "hold_seconds": round(max(0.0, _number(entry, "hold") - now), 3),
        }

    def _claim(self, entry: Entry | None) -> tuple[Entry | None, float | None, float]:
        if entry is None or _number(entry, "failures") < self._policy.limit:
            return entry, _FORGET, 0.0
        if wait := self._wait(entry):
            return entry, _FORGET, wait
        entry["trial"] = time.monotonic() + self._policy.trial
        return entry, _FORGET, 0.0

    @staticmethod
    def _wait(entry: Entry) -> float:
        now = time.monotonic()
        wait = max(_number(entry, "until"), _number(entry, "trial")) - now
        # The one who tries may be done long before its time is over.
        return max(0.0, wait if _number(entry, "until") > now else min(wait, 0.1))

    def _close(self, entry: Entry | None) -> tuple[Entry | None, float | None, None]:
        hold = _number(entry or {}, "hold")
        return ({"hold": hold} if hold > time.monotonic() else None), _FORGET, None

    def _count(self, entry: Entry | None, why: str) -> tuple[Entry, float, float]:
        entry = entry or {}
        now = time.monotonic()
        failures = int(_number(entry, "failures")) + 1
        entry["failures"], entry["why"] = failures, why[:_MAX_WHY]
        if failures < self._policy.limit:
            return entry, _FORGET, 0.0
        if _number(entry, "until") > now:
            # Requests that were under way when it opened: they say nothing new.
            return entry, _FORGET, 0.0
        last = _number(entry, "pause")
        pause = min(self._policy.longest, last * 2) if last else self._policy.pause
        entry["pause"] = pause
        # Daemons on many nodes must not come back all at once.
        length = pause * random.uniform(0.75, 1.25)
        entry["until"] = now + length
        entry["trial"] = 0.0
        return entry, _FORGET, length


def _number(entry: Entry, key: str) -> float:
    value = entry.get(key, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0
