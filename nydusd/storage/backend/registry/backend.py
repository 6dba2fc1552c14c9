"""Blobs in a container registry, by the OCI distribution API. Run by fetch workers.

The registry says by a challenge what it wants (Basic, or a token from a server that it names); that is remembered for all
workers, so that it is asked once and not once a request. Data mostly comes by a redirect to an object store: its URL is
remembered until it ends, and gets no credentials of ours.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import urlsplit

from nydusd.config.model import Registry
from nydusd.errors import ConfigError
from nydusd.logs import register_secret
from nydusd.storage.backend.http.answer import Answer
from nydusd.storage.backend.http.base import HttpBackend
from nydusd.storage.backend.http.failure import Failure, Kind
from nydusd.storage.backend.http.store import Entry, SharedStore
from nydusd.storage.backend.registry.challenge import parse_challenges
from nydusd.storage.backend.registry.credentials import Credentials, CredentialSource
from nydusd.storage.backend.registry.tokens import Realm, Tokens
from nydusd.storage.backend.table import read_table

log = logging.getLogger(__name__)

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?", re.ASCII)
_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*", re.ASCII)


class RegistryBackend(HttpBackend):
    """One repository of a registry. Blob `<id>` is the blob with digest sha256:`<id>` in it."""

    KEEP_REDIRECTS: ClassVar[bool] = True

    def __init__(self, table: Registry, store: SharedStore) -> None:
        super().__init__("registry", table, store)
        if not _HOST.fullmatch(table.host):
            raise ConfigError("backend registry: 'host' is no host name or host:port (the scheme has its own key)")
        if not _REPO.fullmatch(table.repo) or len(table.repo) > 255:
            raise ConfigError(f"backend registry: 'repo' is {table.repo[:300]!r}; it must be a repository's name")
        self._scheme = "http" if table.scheme == "http" else "https"
        self._host = table.host
        self._repo = table.repo
        self._redirect_scheme = table.blob_url_scheme
        self._redirect_host = table.blob_redirected_host
        self._source = CredentialSource(table.host, table.auth or "")
        self._tokens = Tokens(self)
        self._given_token = (table.registry_token or "").strip()
        register_secret(self._given_token)
        self._challenge_key = f"challenge:{table.host}/{table.repo}"
        self._sent = ""
        self._sent_as: Credentials = self._source.current()

    @classmethod
    def from_config(cls, config: Mapping[str, object], shared_fd: int = -1) -> RegistryBackend:
        """Take the table `backend.registry` in its plain form. Raises `ConfigError`."""
        return cls(read_table("registry", config, Registry), SharedStore(shared_fd))

    def blob_url(self, blob_id: str) -> str:
        return f"{self._base()}{blob_id}"

    def who(self) -> str:
        return self._source.current().name

    def authorize(self, method: str, url: str, headers: dict[str, str]) -> None:
        self._sent_as = self._source.current()
        challenge = self.store.get(self._challenge_key)
        if self._given_token:
            self._sent = f"Bearer {self._given_token}"
        elif challenge is None:
            self._sent = ""
        elif challenge["scheme"] == "basic":
            self._sent = f"Basic {self._sent_as.basic}" if self._sent_as.basic else ""
        else:
            self._sent = f"Bearer {self._token(challenge)}"
        if self._sent:
            headers["Authorization"] = self._sent

    def remedy(self, answer: Answer, tried: int) -> bool:
        """A challenge, or what we sent was not taken (401, and 403: some registries say so when a token ended)."""
        if answer.status not in (401, 403):
            return False
        sent_token = self._sent.partition(" ")[2] if self._sent.startswith("Bearer ") else ""
        if self._given_token:
            log.warning("%s: the configured registry_token was rejected (status %d)", self._host, answer.status)
            self._given_token = ""
        challenge = self._learn(answer.headers.get("WWW-Authenticate", "")) or self.store.get(self._challenge_key)
        if challenge is None:
            return False
        if challenge["scheme"] == "basic":
            credentials = self._source.current()
            if not self._sent.startswith("Basic ") or credentials != self._sent_as:
                return bool(credentials.basic)
            return self._source.rejected(self._sent_as) and bool(self._source.current().basic)
        if tried and sent_token and not self._source.rejected(self._sent_as):
            # A new token did not help, and there are no other credentials to get another one with.
            return False
        return self._token(challenge, sent_token) != sent_token

    def unreachable(self, failure: Failure) -> bool:
        """With `skip_verify` a registry that does not speak TLS is asked without it, from then on."""
        if self._scheme != "https" or not self.remote.skip_verify:
            return False
        log.warning("%s; skip_verify is set, so it is asked by http from now on", failure.text())
        self._scheme = "http"
        return True

    def takes_redirect(self, answer: Answer, target: str) -> str:
        """Replace scheme and host of the target as configured. A scheme that is configured needs no other leave."""
        if self._redirect_scheme:
            target = f"{self._redirect_scheme}://{target.partition('://')[2]}"
        elif not super().takes_redirect(answer, target):
            return ""
        if self._redirect_host:
            parts = urlsplit(target)
            target = parts._replace(netloc=self._redirect_host).geturl()
        return target

    def _base(self) -> str:
        return f"{self._scheme}://{self._host}/v2/{self._repo}/blobs/sha256:"

    def _learn(self, header: str) -> Entry | None:
        """Remember what the registry asks for; None if it is nothing that we have."""
        challenges = {challenge.scheme: challenge.params for challenge in reversed(parse_challenges(header))}
        bearer = challenges.get("bearer")
        entry: Entry
        if bearer is not None and bearer.get("realm"):
            scope = bearer.get("scope") or f"repository:{self._repo}:pull"
            entry = {"scheme": "bearer", "realm": bearer["realm"], "service": bearer.get("service", ""), "scope": scope}
        elif "basic" in challenges:
            entry = {"scheme": "basic"}
        else:
            return None
        known = self.store.get(self._challenge_key)
        if entry["scheme"] == "basic" and self._sent.startswith("Bearer ") and known and known["scheme"] == "bearer":
            # Some registries answer so to a token that ended; a new one will do.
            return known
        self.store.put(self._challenge_key, entry)
        return entry

    def _token(self, challenge: Entry, not_this: str = "") -> str:
        """A token for a Bearer challenge. Credentials that the token server rejects are read again, once."""
        realm = Realm(str(challenge["realm"]), str(challenge["service"]), str(challenge["scope"]))
        self._check_realm(realm)
        credentials = self._source.current()
        try:
            return self._tokens.get(realm, credentials, not_this)
        except Failure as failure:
            if failure.kind is not Kind.REFUSED or not self._source.rejected(credentials):
                raise
        return self._tokens.get(realm, self._source.current(), not_this)

    def _check_realm(self, realm: Realm) -> None:
        """A token server is sent our credentials, so it must not be less protected than the registry itself."""
        try:
            parts = urlsplit(realm.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and realm.url.isprintable()
        except ValueError:
            usable = False
        if not usable or "@" in parts.netloc:
            raise Failure(Kind.PERMANENT, self._host, "it names a token server by no usable URL")
        if parts.scheme == "http" and self._scheme == "https" and not self.remote.skip_verify:
            raise Failure(Kind.PERMANENT, self._host, "it speaks https but names a token server without")
