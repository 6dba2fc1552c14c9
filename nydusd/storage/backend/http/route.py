"""The ways to a blob: mirrors, a proxy, the origin itself; and which of them are up. Run by fetch workers.

There is no checker in the background: whoever sends next looks whether a check is due, and what it finds is in the shared
store for all. Requests count as checks, so a way that is in use and works is never pinged.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from nydusd.config.model import Remote
from nydusd.redact import redact_url
from nydusd.storage.backend.http.breaker import Breaker, Policy
from nydusd.storage.backend.http.failure import Failure
from nydusd.storage.backend.http.store import KEEP, Entry, SharedStore
from nydusd.storage.backend.http.transport import Transport, host_of

PROXY_FAILURES: Final = 3
"""Failures in a row after which a proxy counts as down; a mirror has its own `failure_limit`."""
_PING_SECONDS: Final = 5.0


@dataclass(slots=True)
class Route:
    """One way. `name` is safe to print. `base` replaces scheme and host of the URL (mirrors)."""

    name: str
    breaker: Breaker | None = None
    base: str = ""
    proxied: bool = False
    plain_http: bool = False
    ping_url: str = ""
    interval: float = 5.0
    ping_below: int = 400
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def is_origin(self) -> bool:
        return self.breaker is None

    @property
    def kind(self) -> str:
        """origin, proxy or mirror."""
        return "origin" if self.is_origin else "proxy" if self.proxied else "mirror"

    def url(self, url: str) -> str:
        """What to ask on this way for an URL of the origin."""
        if self.base:
            return self.base + _after_host(url)
        if self.plain_http and url.startswith("https://"):
            return "http://" + url[len("https://") :]
        return url


class Routes:
    """The ways of one backend, in the order in which they are to be tried."""

    def __init__(self, remote: Remote, store: SharedStore, transport: Transport, headers: dict[str, str]) -> None:
        self._store = store
        self._transport = transport
        self._headers = headers
        self._ping_limit = min(remote.connect_timeout or _PING_SECONDS, _PING_SECONDS)
        self.mirrors = [_mirror(store, remote, number) for number in range(len(remote.mirrors))]
        self.proxy = _proxy(store, remote) if remote.proxy.url else None
        self.origin = Route("origin")
        self.direct = self.proxy is None or remote.proxy.fallback
        """Whether the origin may be asked without the proxy."""

    def next(self, passed: set[str], first_hop: bool = True) -> Route | None:
        """The best way that is up and whose name is not in `passed`, None if there is none."""
        for mirror in self.mirrors if first_hop else ():
            if mirror.name not in passed and self._is_up(mirror):
                return mirror
        if self.proxy is not None and self.proxy.name not in passed and self._is_up(self.proxy):
            return self.proxy
        return self.origin if self.direct else None

    def bypass(self) -> set[str]:
        """The names to pass over when the origin itself is to be asked (by the proxy, if it must not be without)."""
        names = {mirror.name for mirror in self.mirrors}
        if self.proxy is not None and self.direct:
            names.add(self.proxy.name)
        return names

    def worked(self, route: Route) -> None:
        """A request went well on this way: that is as good as a check."""
        if route.breaker is None:
            return
        route.breaker.succeeded()
        if route.ping_url:
            now = time.monotonic()
            entry = self._store.get(f"checked:{route.name}") or {}
            # Not for each request: the store is shared, and this is only to spare a ping.
            if now - float(entry.get("at") or 0.0) > route.interval / 2:
                self._store.put(f"checked:{route.name}", {"at": now}, route.interval)

    def state(self) -> dict[str, object]:
        """Health of proxy and mirrors."""
        ways = [*self.mirrors, *([self.proxy] if self.proxy is not None else [])]
        return {way.name: way.breaker.state() for way in ways if way.breaker is not None}

    def _is_up(self, route: Route) -> bool:
        breaker = route.breaker
        assert breaker is not None
        if not route.ping_url:
            return breaker.admit() == 0.0
        if self._check_is_due(route):
            self._ping(route, breaker)
        return not breaker.is_open()

    def _check_is_due(self, route: Route) -> bool:
        now = time.monotonic()

        def claim(entry: Entry | None) -> tuple[Entry | None, float | None, bool]:
            # The entry ends when the next check is due, so whoever makes it anew has to check.
            return (entry, KEEP, False) if entry is not None else ({"at": now}, route.interval, True)

        key = f"checked:{route.name}"
        return self._store.get(key) is None and self._store.update(key, claim)

    def _ping(self, route: Route, breaker: Breaker) -> None:
        try:
            answer = self._transport.send("GET", route.ping_url, self._headers, time.monotonic() + self._ping_limit)
        except Failure as failure:
            breaker.failed(f"ping: {failure.text()}")
            return
        answer.peek()
        answer.finish()
        if 200 <= answer.status < route.ping_below:
            breaker.succeeded()
        else:
            breaker.failed(f"ping: status {answer.status}")


def _proxy(store: SharedStore, remote: Remote) -> Route:
    proxy = remote.proxy
    name = f"proxy {redact_url(proxy.url)}"
    interval = max(1.0, float(proxy.check_interval))
    policy = Policy(PROXY_FAILURES, pause=interval, longest=interval)
    return Route(
        name,
        Breaker(store, name, policy),
        proxied=True,
        plain_http=proxy.use_http,
        ping_url=proxy.ping_url,
        interval=interval,
    )


def _mirror(store: SharedStore, remote: Remote, number: int) -> Route:
    mirror = remote.mirrors[number]
    # Clients write a host with or without a scheme.
    base = (mirror.host if "://" in mirror.host else f"http://{mirror.host}").rstrip("/")
    name = f"mirror {host_of(base)}"
    interval = max(1.0, float(mirror.health_check_interval))
    policy = Policy(max(1, mirror.failure_limit), pause=interval, longest=interval)
    return Route(
        name,
        Breaker(store, name, policy),
        base=base,
        ping_url=mirror.ping_url or f"{base}/v2",
        interval=interval,
        ping_below=500,
        headers=dict(mirror.headers),
    )


def _after_host(url: str) -> str:
    parts = urlsplit(url)
    return parts.path + (f"?{parts.query}" if parts.query else "")
