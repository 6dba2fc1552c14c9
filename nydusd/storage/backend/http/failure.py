"""Why a request did not give what was asked for, and what may be done about it. Pure; used by fetch workers.

Inside of this package one exception, `Failure`, carries the class that the retries go by; `error_of` makes of it what the
rest of the daemon knows.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from nydusd.errors import (
    BackendError,
    BackendTimeoutError,
    BackendUnavailableError,
    CredentialsRejectedError,
    NoRangeSupportError,
    NoSuchBlobError,
    RangeNotSatisfiableError,
    ThrottledError,
)
from nydusd.logs import clean
from nydusd.storage.backend.http.breaker import MAX_HOLD


class Kind(enum.Enum):
    """What to do: try again (TRANSIENT), later (THROTTLED), never (the others)."""

    TRANSIENT = "transient"
    THROTTLED = "throttled"
    DOWN = "down"
    """Not asked at all: the host is known to be down."""
    DEADLINE = "deadline"
    NO_BLOB = "no such blob"
    NO_RANGE = "no such range"
    NO_RANGES = "no range support"
    REFUSED = "refused"
    """401 or 403, and nothing more to be done about it."""
    PERMANENT = "permanent"


RETRIED = frozenset((Kind.TRANSIENT, Kind.THROTTLED))
REMEMBERED = frozenset((Kind.NO_BLOB, Kind.NO_RANGE, Kind.NO_RANGES, Kind.REFUSED, Kind.PERMANENT))
"""Kinds of which a second request would learn nothing new for some seconds."""

_ERRORS: dict[Kind, type[BackendError]] = {
    Kind.TRANSIENT: BackendUnavailableError,
    Kind.THROTTLED: ThrottledError,
    Kind.DOWN: BackendUnavailableError,
    Kind.DEADLINE: BackendTimeoutError,
    Kind.NO_BLOB: NoSuchBlobError,
    Kind.NO_RANGE: RangeNotSatisfiableError,
    Kind.NO_RANGES: NoRangeSupportError,
    Kind.REFUSED: CredentialsRejectedError,
    Kind.PERMANENT: BackendError,
}
_TRANSIENT_STATUS = frozenset((408, 425, 500, 502, 503, 504))


class Failure(Exception):
    """One failed attempt. `tls_or_refused`: no connection, for want of TLS or of a listener."""

    def __init__(
        self,
        kind: Kind,
        host: str,
        what: str,
        *,
        status: int = 0,
        retry_after: float | None = None,
        tls_or_refused: bool = False,
        host_failed: bool = False,
        slow: bool = False,
    ) -> None:
        super().__init__(what)
        self.kind = kind
        self.host = host
        self.what = what
        self.status = status
        self.retry_after = retry_after
        self.tls_or_refused = tls_or_refused
        self.for_want_of_credentials = False
        """Nothing was sent for want of a token: another way to the blob would not help."""
        self.slow = slow
        """The server took a request and gave nothing in time: it may do better with a smaller one."""
        self.host_failed = host_failed
        """The host itself is to blame (no connection, cut off, 5xx): its breaker counts this."""

    def text(self) -> str:
        """What happened, where; safe to print."""
        return clean(f"{self.host}: {self.what}")


def of_status(status: int, headers: Mapping[str, str], host: str) -> Failure:
    """The failure that an answer with this status (not 2xx) is."""
    what = f"status {status}"
    if status == 429 or (status == 503 and headers.get("Retry-After")):
        after = retry_after(headers.get("Retry-After", ""), headers.get("Date", ""))
        return Failure(Kind.THROTTLED, host, what, status=status, retry_after=after)
    if status in _TRANSIENT_STATUS or status > 505:
        return Failure(Kind.TRANSIENT, host, what, status=status, host_failed=status >= 500)
    if status in (404, 410):
        return Failure(Kind.NO_BLOB, host, f"{what}, it has no such blob", status=status)
    if status == 416:
        return Failure(
            Kind.NO_RANGE,
            host,
            f"{what}, the stored blob is shorter than the image says ({headers.get('Content-Range', 'length not told')[:64]})",
            status=status,
        )
    if status in (401, 403):
        return Failure(Kind.REFUSED, host, f"{what}, credentials are missing, wrong or expired", status=status)
    if 300 <= status < 400:
        return Failure(Kind.PERMANENT, host, f"{what}, a redirect to nowhere", status=status)
    return Failure(Kind.PERMANENT, host, what, status=status)


def retry_after(value: str, date: str) -> float | None:
    """Seconds that a Retry-After header asks for (a number, or a date by the server's clock); None if it is unusable.

    An hour at most: a slip of the server must not keep a blob from all who ask for it until the daemon ends.

    `date`: the answer's Date header. Where it is one, our clock does not count: it may be days away from the server's.
    """
    value = value.strip()
    if value.isdecimal() and value.isascii():
        return min(float(value[:9]), MAX_HOLD)
    when, now = _seconds_of(value), _seconds_of(date)
    return None if when is None else min(max(0.0, when - (time.time() if now is None else now)), MAX_HOLD)


def _seconds_of(date: str) -> float | None:
    """A date of an HTTP header in seconds since 1970; None if it is none."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def error_of(failure: Failure, blob_id: str, tries: int) -> BackendError:
    """The error that tells the rest of the daemon. Its text names blob, host, status and attempt, and no secret."""
    kind = _ERRORS[failure.kind]
    text = f"blob {blob_id}: {failure.text()} (attempt {tries})"
    if issubclass(kind, BackendUnavailableError):
        return kind(text, failure.retry_after or 0.0)
    return kind(text)
