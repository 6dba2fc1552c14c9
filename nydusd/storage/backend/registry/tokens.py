"""Bearer tokens of registries: got from the token server that a challenge names, shared by all workers.

Run by fetch workers. A token is asked for by one worker while the others wait for it (the lock of its key in the shared
store, which ends with its holder). It is renewed shortly before its end by whoever needs it then, while the others go on
with the old one; a token that nobody uses is left to end. Tokens are in memory only.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode, urlsplit

from nydusd.storage.backend.http.failure import REMEMBERED, Failure, Kind, of_status
from nydusd.storage.backend.http.gate import pass_gate
from nydusd.storage.backend.http.store import Entry
from nydusd.storage.backend.http.transport import host_of
from nydusd.storage.backend.registry.credentials import Credentials

if TYPE_CHECKING:
    from nydusd.storage.backend.http.base import HttpBackend

log = logging.getLogger(__name__)

CLIENT_ID: Final = "nydusd"
_DEFAULT_LIFE: Final = 600.0
_LIVES: Final = (1.0, 30 * 86400.0)
_MARGIN: Final = 20.0
_MAX_REPLY: Final = 256 << 10
_GET_KNOWN: Final = 3600.0
"""How long it is remembered that a token server knows GET only."""


@dataclass(frozen=True, slots=True)
class Realm:
    """What a Bearer challenge asks for."""

    url: str
    service: str
    scope: str

    def form(self) -> dict[str, str]:
        """The fields of a request for a token."""
        fields = {"service": self.service, "scope": self.scope, "client_id": CLIENT_ID}
        return {name: value for name, value in fields.items() if value}


class Tokens:
    """The tokens that one backend uses."""

    def __init__(self, backend: HttpBackend) -> None:
        self._backend = backend
        self._store = backend.store

    def get(self, realm: Realm, credentials: Credentials, not_this: str = "") -> str:
        """A token, but another one than `not_this`. Raises `Failure`.

        It is asked for only if there is none in the store, or if that is about to end.
        """
        key = _key(realm, credentials)
        entry = self._store.get(key)
        if entry is not None and _usable(entry, not_this):
            if time.monotonic() >= float(entry["renew"] or 0.0):
                return self._renew_early(key, entry, realm, credentials)
            return str(entry["token"])
        # Not while others wait for us: behind the lock nobody sleeps.
        self._raise_if_known(key, realm)
        breaker = self._backend.breaker_of(realm.url)
        pass_gate(breaker, breaker.busy, host_of(realm.url), "no token: it ", self._backend.patience)
        begun = time.monotonic()
        with self._store.lock(key, self._backend.patience.deadline) as locked:
            if not locked:
                raise Failure(Kind.DEADLINE, host_of(realm.url), "no time left for a token")
            # Somebody else may have got it while we waited, or may have failed to: that is our answer, too.
            entry = self._store.get(key)
            if entry is not None and _usable(entry, not_this):
                return str(entry["token"])
            self._raise_if_known(key, realm, begun)
            return self._ask(key, realm, credentials)

    def _raise_if_known(self, key: str, realm: Realm, since: float = math.inf) -> None:
        """Raise `Failure` if a token was refused a moment ago, or could not be had since that time."""
        known = self._store.get(f"no-token:{key}")
        if known is not None and (Kind(known["kind"]) in REMEMBERED or float(known["at"] or 0.0) >= since):
            raise Failure(Kind(known["kind"]), host_of(realm.url), f"{known['what']}, as a moment ago")

    def _renew_early(self, key: str, entry: Entry, realm: Realm, credentials: Credentials) -> str:
        """The old token is good still: renew it if nobody else does."""
        old = str(entry["token"])
        with self._store.lock(key, 0.0) as locked:
            if not locked:
                return old
            newest = self._store.get(key)
            if newest is not None and newest["token"] != old:
                return str(newest["token"])
            if self._store.get(f"no-token:{key}") is not None:
                return old  # somebody has tried a moment ago
            try:
                return self._ask(key, realm, credentials)
            except Failure as failure:
                log.warning("%s; the old token is used while it lasts", failure.text())
                return old

    def _ask(self, key: str, realm: Realm, credentials: Credentials) -> str:
        try:
            start = time.monotonic()
            token, life = self._request(realm, credentials)
        except Failure as failure:
            if failure.kind is not Kind.DEADLINE:
                known: Entry = {"kind": failure.kind.value, "what": failure.what, "at": time.monotonic()}
                self._store.put(f"no-token:{key}", known, self._backend.timing.remembered)
            raise
        margin = min(_MARGIN, life / 10)
        self._store.put(key, {"token": token, "renew": start + life - margin}, life)
        return token

    def _request(self, realm: Realm, credentials: Credentials) -> tuple[str, float]:
        """Ask by POST, and by GET where POST is not known; which of them is remembered for all."""
        by_get = f"token-by-get:{realm.url}"
        if credentials.identity:
            form = {**realm.form(), "grant_type": "refresh_token", "refresh_token": credentials.identity}
            return self._send("POST", realm, credentials, urlencode(form).encode())
        if self._store.get(by_get) is None:
            try:
                return self._send("POST", realm, credentials, urlencode(realm.form()).encode())
            except Failure as failure:
                if not 300 <= failure.status < 500 or failure.kind is Kind.THROTTLED:
                    raise
        result = self._send("GET", realm, credentials, None)
        self._store.put(by_get, {"yes": 1}, _GET_KNOWN)
        return result

    def _send(self, method: str, realm: Realm, credentials: Credentials, body: bytes | None) -> tuple[str, float]:
        backend = self._backend
        host = host_of(realm.url)
        headers = {"User-Agent": backend.common_headers["User-Agent"], "Accept": "application/json"}
        url = realm.url
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        elif form := urlencode(realm.form()):
            url += ("&" if urlsplit(url).query else "?") + form
        if credentials.basic:
            headers["Authorization"] = f"Basic {credentials.basic}"
        breaker = backend.breaker_of(realm.url)
        if wait := breaker.hold() or breaker.admit():
            raise Failure(Kind.DOWN, host, f"no token: it is left alone for {wait:.1f} s", retry_after=wait)
        backend.metrics.token_requests += 1
        try:
            # Never by a proxy or a mirror: it would see the credentials.
            answer = backend.transport.send(method, url, headers, backend.patience.deadline, body=body)
        except Failure as failure:
            failure.what = f"no token: {failure.what}"
            breaker.unanswered(failure.text(), at_fault=failure.host_failed)
            raise
        try:
            if answer.status != 200:
                raise of_status(answer.status, answer.headers, host)
            reply = _parse(answer.read_all(_MAX_REPLY), host)
        except Failure as failure:
            failure.what = f"no token: {failure.what}"
            failure.status = failure.status or answer.status
            if failure.kind is Kind.THROTTLED:
                failure.retry_after = backend.timing.throttled if failure.retry_after is None else failure.retry_after
                breaker.hold_off(failure.retry_after)
            if failure.host_failed or failure.kind is Kind.DEADLINE:
                breaker.unanswered(failure.text(), at_fault=failure.host_failed)
            else:
                breaker.succeeded()
            if failure.kind is Kind.NO_BLOB:
                failure.kind = Kind.PERMANENT
            raise
        finally:
            answer.finish()
        breaker.succeeded()
        return reply


def _key(realm: Realm, credentials: Credentials) -> str:
    return f"token:{realm.url} {realm.service} {realm.scope} {credentials.name}"


def _usable(entry: Entry, not_this: str) -> bool:
    return entry["token"] != not_this


def _parse(raw: bytes, host: str) -> tuple[str, float]:
    """The token and its life in seconds out of the reply of a token server."""
    try:
        reply = json.loads(raw)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        raise Failure(Kind.PERMANENT, host, "the reply is no JSON object")
    token = reply.get("token") or reply.get("access_token")
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        raise Failure(Kind.PERMANENT, host, "the reply has no token")
    life = reply.get("expires_in")
    if not isinstance(life, int | float) or isinstance(life, bool) or not life > 0:
        life = _DEFAULT_LIFE
    return token, float(min(max(life, _LIVES[0]), _LIVES[1]))  # in this order: an int may be too large for a float
