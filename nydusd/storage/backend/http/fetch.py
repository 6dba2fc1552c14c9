"""One read over HTTP from its first request to its end: ways, redirects, credentials, retries. Run by fetch workers.

What may be tried, and how often, is decided here and nowhere else:

- a way that is not the origin (mirror, proxy, remembered redirect) is left at its first failure, at once and for free;
- transient failures are retried `retries` times with exponential back-off and full jitter, going on behind the bytes
  that came; bytes that came in quantity give the retries back;
- 429, and 503 with Retry-After, keep all workers off the host for the time it asks for; nobody waits longer for that than his
  deadline, and prefetch and whoever is needed elsewhere (`ReadHow.waits`) do not wait at all;
- a refusal (401, 403) is put to the backend, which may renew what it has; that is tried once or twice, not more;
- what a second request would not change is remembered for some seconds and told to all who ask again;
- a host that keeps failing is asked by one worker at a time (see `breaker`); one that gives wrong answers for a blob is left
  alone with that blob.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from nydusd.storage.backend.base import ReadHow
from nydusd.storage.backend.http.answer import Answer
from nydusd.storage.backend.http.breaker import Breaker, Policy
from nydusd.storage.backend.http.failure import REMEMBERED, RETRIED, Failure, Kind, error_of, of_status
from nydusd.storage.backend.http.gate import Patience, pass_gate
from nydusd.storage.backend.http.redirect import MAX_HOPS, life_of, same_origin, target_of
from nydusd.storage.backend.http.route import Route
from nydusd.storage.backend.http.store import Entry
from nydusd.storage.backend.http.transport import host_of

if TYPE_CHECKING:
    from nydusd.storage.backend.http.base import HttpBackend

log = logging.getLogger(__name__)

MAX_REMEDIES: Final = 3
"""A challenge, a renewal of what it gave, and one more for a backend that has two things to correct."""
PROGRESS: Final = 64 << 10
"""Bytes that make a failed attempt count as none."""
_REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
_NO_REMEDY: Final = frozenset((404, 408, 410, 416, 425, 429))
_FOR_ORIGIN_ONLY: Final = frozenset(("authorization", "proxy-authorization", "cookie"))
_BY_DRAGONFLY: Final = "X-Dragonfly-Error-Type"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, and numbers of tries. `user` and `prefetch` are deadlines for who has none of his own."""

    retries: int = 3
    backoff: float = 0.05
    longest_backoff: float = 2.0
    user: float = 30.0
    prefetch: float = 120.0
    longest_wait: float = 2.0
    """How long a worker waits for a host that is down before it gives the read back."""
    remembered: float = 5.0
    throttled: float = 1.0
    """The pause after a 429 without Retry-After."""
    breaker: Policy = field(default_factory=Policy)


class Task(Protocol):
    """What is to be done with the answers. `progress` is bytes that need not be asked for again.

    A task may ask for less than all at once: then it is done when its last part is.
    """

    method: str
    progress: int

    def range(self) -> str:
        """The Range header to send now, empty for none."""

    def shrink(self) -> None:
        """The server was too slow for a request of this size: ask for less at once."""

    def take(self, answer: Answer) -> bool:
        """Use an answer with status 2xx; True if the task is done now. Raises `Failure`."""


class Fetch:
    """One task at one backend. Made for each read, and used once."""

    def __init__(self, backend: HttpBackend, blob_id: str, how: ReadHow) -> None:
        self._backend = backend
        self._blob_id = blob_id
        self._timing = backend.timing
        self._prefetch = how.prefetch
        self._waits = how.waits and not how.prefetch
        self._fresh = how.bypass
        default = self._timing.prefetch if how.prefetch else self._timing.user
        self._deadline = time.monotonic() + default if how.deadline is None else how.deadline
        self._tries = 1 + (min(1, self._timing.retries) if how.prefetch else self._timing.retries)
        self._attempt = 1
        """Counts what the retries are limited by; `_exchanges` counts all, for messages."""
        self._exchanges = 0
        self._remedies = 0
        self._passed: set[str] = backend.routes.bypass() if how.bypass else set()
        self._use_kept = backend.KEEP_REDIRECTS and not how.bypass
        self._route: Route = backend.routes.origin
        self._used_kept = False
        self._host = ""
        self._let_in_by: Breaker | None = None
        """Who has let the exchange under way go on."""
        self._blob = backend.breaker_of_blob(blob_id)

    def run(self, task: Task, remember: str = "") -> None:
        """Do the task or raise `BackendError`. `remember` tells tasks apart whose failure says nothing of others."""
        key = f"no:{self._backend.who()} {self._backend.blob_url(self._blob_id)}{remember}"
        ranged = f"{key} {task.range()}"
        if not self._fresh:
            self._raise_if_known(key)
            self._raise_if_known(ranged)
        while True:
            before = task.progress
            try:
                if self._once(task):
                    return
                failure = None
            except Failure as caught:
                failure = caught
            moved = task.progress - before
            if failure is None and moved >= PROGRESS:
                continue
            if failure is None:
                failure = Failure(Kind.TRANSIENT, self._host, f"gave {moved} bytes only")
            if failure.slow:
                task.shrink()
            self._failed(failure, moved, ranged if failure.kind is Kind.NO_RANGE else key)

    def _once(self, task: Task) -> bool:
        """One exchange on the best way there is now."""
        backend = self._backend
        self._exchanges += 1
        origin_url = backend.blob_url(self._blob_id)
        if time.monotonic() >= self._deadline:
            # Before a way is chosen: who is let through to one that is down has to try it.
            breaker = backend.breaker_of(origin_url)
            if breaker.is_open():  # it has failed so long, which says more than that time is over
                raise Failure(
                    Kind.DOWN, host_of(origin_url), f"is down ({breaker.why()}), and no time is left to ask it"
                )
            raise Failure(Kind.DEADLINE, host_of(origin_url), "no time left to ask it")
        route = backend.routes.next(self._passed)
        if route is None:
            assert backend.routes.proxy is not None
            raise Failure(
                Kind.DOWN,
                backend.routes.proxy.name,
                "is down, and the origin must not be asked without it",
                retry_after=1.0,
            )
        kept = self._kept_url(origin_url) if self._use_kept and task.method == "GET" and not route.base else ""
        self._route, self._used_kept = route, bool(kept)
        url = kept or origin_url
        self._let_in_by = None
        for hop in range(MAX_HOPS + 1):
            if hop and route.base:
                route = backend.routes.next(self._passed, first_hop=False) or route
            answer = self._send(task, route, url, origin_url)
            target = self._target(answer) if answer.status in _REDIRECTS else ""
            if not target:
                break
            self._sent_on(route, answer, target)
            url = target
        else:
            raise Failure(Kind.PERMANENT, answer.host, f"more than {MAX_HOPS} redirects", status=answer.status)
        done = self._use(task, route, answer, origin_url)
        if done and backend.KEEP_REDIRECTS and task.method == "GET" and not self._route.base:
            if kept:
                backend.metrics.redirect_hits += 1
            elif url != origin_url and (life := life_of(url)):
                backend.store.put(f"redirect:{origin_url}", {"url": url}, life)
        return done

    def _sent_on(self, route: Route, answer: Answer, target: str) -> None:
        """An answer that leads elsewhere: whoever gave it is up, whatever comes of the rest.

        Of a proxy, and of a host that leads to itself, the last hop tells more.
        """
        if route.base or (route.is_origin and not same_origin(answer.url, target)):
            (route.breaker or self._backend.breaker_of(answer.url)).succeeded()
        self._done_with(answer)

    def _send(self, task: Task, route: Route, url: str, origin_url: str) -> Answer:
        backend = self._backend
        at_origin = same_origin(url, origin_url)
        waits = self._waits and not route.base
        backend.patience = Patience(self._deadline, self._timing.longest_wait if waits else 0.0)
        headers = {
            name: value
            for name, value in backend.common_headers.items()
            if at_origin or name.lower() not in _FOR_ORIGIN_ONLY
        }
        if asked := task.range():
            headers["Range"] = asked
        if at_origin:
            try:
                backend.authorize(task.method, url, headers)
            except Failure as failure:
                # A mirror may have the blob for all who ask.
                if not route.base:
                    failure.for_want_of_credentials = True
                    raise
        if not route.is_origin:
            headers.update(route.headers)
            headers["X-Dragonfly-Use-P2P"] = "true"
            headers["X-Dragonfly-Prefetch"] = "true" if self._prefetch else "false"
            headers["X-Dragonfly-Priority"] = "3" if self._prefetch else "6"
        sent_to = route.url(url) if url == origin_url or not route.base else url
        breaker = route.breaker or backend.breaker_of(sent_to)
        if route.is_origin:
            pass_gate(self._blob, self._blob.busy, host_of(sent_to), "this blob ", backend.patience)
            if breaker is not self._let_in_by:  # else a host that leads to itself would wait for its own try
                pass_gate(breaker, breaker.admit, host_of(sent_to), "", backend.patience)
                self._let_in_by = breaker
        backend.metrics.requests += 1
        sent = time.monotonic()
        try:
            answer = backend.transport.send(task.method, sent_to, headers, self._deadline, proxied=route.proxied)
            backend.metrics.waited += time.monotonic() - sent
            return answer
        except Failure as failure:
            breaker.unanswered(failure.text(), at_fault=failure.host_failed)
            if failure.tls_or_refused and route.is_origin and at_origin:
                self._remedies += 1
                if self._remedies <= MAX_REMEDIES and backend.unreachable(failure):
                    raise _AgainError from failure
            raise

    def _use(self, task: Task, route: Route, answer: Answer, origin_url: str) -> bool:
        """Give the answer to the task, or to whoever knows what to do about it."""
        backend = self._backend
        breaker = route.breaker or backend.breaker_of(answer.url)
        self._host = answer.host
        before = task.progress
        try:
            if answer.status < 200 or answer.status >= 300:
                self._raise_for(answer, route, origin_url)
            done = task.take(answer)
        except _AgainError:
            breaker.succeeded()
            raise
        except Failure as failure:
            if failure.kind is Kind.THROTTLED and not failure.for_want_of_credentials:
                failure.retry_after = self._timing.throttled if failure.retry_after is None else failure.retry_after
                breaker.hold_off(failure.retry_after)
            # A proxy that gives something else than the blob is as bad as one that gives nothing.
            if failure.for_want_of_credentials:
                breaker.succeeded()
            elif failure.host_failed or (not route.is_origin and failure.kind is Kind.TRANSIENT):
                breaker.failed(failure.text())
            elif failure.kind is Kind.DEADLINE:
                breaker.unanswered(failure.text(), at_fault=False)
            else:
                breaker.succeeded()
                if failure.kind is Kind.TRANSIENT:
                    self._blob.failed(failure.text())
            raise
        finally:
            backend.metrics.route_bytes[route.kind] += task.progress - before
            self._done_with(answer)
        if route.is_origin:
            breaker.succeeded()
            self._blob.succeeded()
        else:
            backend.routes.worked(route)
        return done

    def _raise_for(self, answer: Answer, route: Route, origin_url: str) -> None:
        """An answer without the bytes: raise what it means."""
        failure = of_status(answer.status, answer.headers, answer.host)
        if route.proxied and answer.headers.get(_BY_DRAGONFLY, "").lower() == "proxy":
            if answer.status == 403:
                # The proxy's own rules say no, and they are the operator's: `_other_way` does not evade them.
                failure.kind = Kind.PERMANENT
            raise failure
        at_origin = not route.base and same_origin(answer.url, origin_url)
        if at_origin and 300 <= answer.status < 500 and answer.status not in _NO_REMEDY:
            answer.peek()
            self._done_with(answer)
            self._remedies += 1
            if self._remedies <= MAX_REMEDIES and self._remedy(answer):
                self._backend.metrics.retries["auth"] += 1
                log.info(
                    "blob %s: %s (attempt %d), asked again with what it wants to see",
                    self._blob_id,
                    failure.text(),
                    self._exchanges,
                )
                raise _AgainError
        raise failure

    def _remedy(self, answer: Answer) -> bool:
        try:
            return self._backend.remedy(answer, self._remedies - 1)
        except Failure as failure:
            failure.for_want_of_credentials = True
            raise

    def _target(self, answer: Answer) -> str:
        target = target_of(answer.url, answer.headers.get("Location", ""))
        return self._backend.takes_redirect(answer, target) if target else ""

    def _kept_url(self, origin_url: str) -> str:
        entry = self._backend.store.get(f"redirect:{origin_url}") or {}
        url = entry.get("url")
        return url if isinstance(url, str) else ""

    def _done_with(self, answer: Answer) -> None:
        self._backend.metrics.over_read += answer.finish()

    def _failed(self, failure: Failure, moved: int, key: str) -> None:
        """Return if there is something to try (after the pause for it), else raise `BackendError`."""
        backend, route = self._backend, self._route
        if isinstance(failure, _AgainError):
            return
        kept = self._used_kept
        backend.last_error = f"blob {self._blob_id}: {failure.text()}"
        if failure.kind is not Kind.DEADLINE and self._other_way(failure):
            log.warning(
                "blob %s: %s (attempt %d), by %s; another way is tried",
                self._blob_id,
                failure.text(),
                self._exchanges,
                "a remembered redirect" if kept else route.name,
            )
            backend.metrics.retries["route"] += 1
            return
        if failure.kind in REMEMBERED:
            self._remember(key, failure)
        left = self._deadline - time.monotonic()
        pause = self._pause(failure)
        if moved >= PROGRESS:
            self._attempt = 0
        gives_up = not self._waits and failure.kind is Kind.THROTTLED
        if failure.kind not in RETRIED or self._attempt >= self._tries or pause >= left or gives_up:
            if failure.kind is Kind.TRANSIENT and self._attempt < self._tries:
                failure.kind = Kind.DEADLINE
            error = error_of(failure, self._blob_id, self._exchanges)
            # Whoever noticed that the host is to be left alone has said so; here it was not even asked.
            not_asked = failure.kind in (Kind.DOWN, Kind.THROTTLED) and not failure.status
            log.log(logging.DEBUG if not_asked and not self._waits else logging.WARNING, "%s", error)
            raise error from failure
        log.warning("blob %s: %s (attempt %d), again in %.2f s", self._blob_id, failure.text(), self._exchanges, pause)
        backend.metrics.retries[failure.kind.value] += 1
        self._attempt += 1
        time.sleep(pause)

    def _other_way(self, failure: Failure) -> bool:
        """Leave the way that failed, if there is another one."""
        backend, route = self._backend, self._route
        if failure.for_want_of_credentials:
            return False
        if self._used_kept:
            backend.store.drop(f"redirect:{backend.blob_url(self._blob_id)}")
            self._use_kept = self._used_kept = False
            return True
        if route.is_origin or (failure.kind is Kind.PERMANENT and failure.status == 403):
            return False
        if route.proxied and not backend.routes.direct:
            return False
        if self._prefetch and failure.kind is Kind.THROTTLED:
            return False
        self._passed.add(route.name)
        return True

    def _pause(self, failure: Failure) -> float:
        if failure.kind is Kind.THROTTLED:
            return failure.retry_after or 0.0
        timing = self._timing
        ceiling = min(timing.longest_backoff, timing.backoff * (1 << min(self._attempt, 16)))
        return random.uniform(min(timing.backoff, ceiling), ceiling)

    def _remember(self, key: str, failure: Failure) -> None:
        entry: Entry = {
            "kind": failure.kind.value,
            "host": failure.host,
            "what": failure.what,
            "status": failure.status,
        }
        self._backend.store.put(key, entry, self._timing.remembered)

    def _raise_if_known(self, key: str) -> None:
        entry = self._backend.store.get(key)
        if entry is None:
            return
        failure = Failure(Kind(entry["kind"]), str(entry["host"]), f"{entry['what']}, as a moment ago")
        raise error_of(failure, self._blob_id, 0)


class _AgainError(Failure):
    """Send again at once: the backend has changed something."""

    def __init__(self) -> None:
        super().__init__(Kind.TRANSIENT, "", "again")
