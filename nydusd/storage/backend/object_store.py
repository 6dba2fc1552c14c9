"""What OSS and S3 have in common: a bucket at an endpoint, keys, and the server's clock. Run by fetch workers."""

from __future__ import annotations

import logging
import re
import time
from email.utils import parsedate_to_datetime
from typing import ClassVar

from nydusd.config.model import S3, Oss
from nydusd.errors import ConfigError
from nydusd.storage.backend.http.answer import Answer
from nydusd.storage.backend.http.base import HttpBackend
from nydusd.storage.backend.http.store import SharedStore
from nydusd.storage.backend.keys import Keys, KeySource

log = logging.getLogger(__name__)

MAX_SKEW = 60.0
"""Seconds by which our clock may differ from the server's before a refused signature is blamed on it."""

_NO_CLOCK = float(1 << 33)
"""Seconds since 1970 at which no server is: the year 2242. Signatures have dates that end with the year 9999."""

_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])"
_ENDPOINT = re.compile(rf"({_HOST})(?::([0-9]{{1,5}}))?/?", re.ASCII)
_BUCKET = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253}[A-Za-z0-9])?", re.ASCII)
_DEFAULT_PORT = {"http": "80", "https": "443"}


class ObjectStore(HttpBackend):
    """A bucket. Subclasses know its URLs and its signature."""

    KIND: ClassVar[str]

    def __init__(self, table: Oss | S3, endpoint: str, store: SharedStore) -> None:
        if table.scheme not in _DEFAULT_PORT:
            raise ConfigError(f"backend {self.KIND}: 'scheme' is {table.scheme[:64]!r}; http and https are allowed")
        if not _BUCKET.fullmatch(table.bucket_name):
            raise ConfigError(
                f"backend {self.KIND}: 'bucket_name' is {table.bucket_name[:300]!r}; "
                "up to 255 of A-Z a-z 0-9 . _ - are allowed, with a letter or digit at both ends"
            )
        self._scheme = table.scheme
        self._endpoint = self._checked_endpoint(endpoint)
        self._bucket = table.bucket_name
        self._prefix = self._checked_prefix(table.object_prefix)
        fixed = Keys(table.access_key_id, table.access_key_secret, table.session_token)
        super().__init__(self.KIND, table, store)
        self._key_source = KeySource(fixed, table.credentials_file)
        self._last_keys = Keys()
        self._clock_offset = 0.0

    def remedy(self, answer: Answer, tried: int) -> bool:
        """Correct our clock, or take the keys that somebody has renewed since."""
        if answer.status not in (400, 401, 403) or not self._last_keys:
            return False
        if self._key_source.current() != self._last_keys:
            return True
        return answer.status == 403 and self._correct_clock(answer)

    def _keys(self) -> Keys:
        self._last_keys = self._key_source.current()
        return self._last_keys

    def _now(self) -> float:
        """The server's time, as far as we know, in seconds since 1970."""
        return time.time() + self._clock_offset

    def _correct_clock(self, answer: Answer) -> bool:
        """Take the server's time for ours if they differ by more than what is usual."""
        try:
            server = parsedate_to_datetime(answer.headers.get("Date", "")).timestamp()
        except (ValueError, OverflowError, TypeError, IndexError):
            return False
        difference = server - self._now()
        if abs(difference) <= MAX_SKEW or not 0 <= server < _NO_CLOCK:
            return False
        self._clock_offset += difference
        log.warning(
            "%s %s: its clock is %+.0f s from ours; requests are signed by its time",
            self.KIND,
            self._endpoint,
            difference,
        )
        return True

    def _checked_endpoint(self, endpoint: str) -> str:
        """The endpoint as the Host header has it: in lower case, without the port that is the scheme's own."""
        match = _ENDPOINT.fullmatch(endpoint)
        if not match or int(match[2] or 1) not in range(1, 65536):
            raise ConfigError(
                f"backend {self.KIND}: 'endpoint' is no host name or host:port (the scheme has its own key, 'scheme')"
            )
        host, port = match[1].lower(), match[2]
        return host if port in (None, _DEFAULT_PORT[self._scheme]) else f"{host}:{port}"

    def _checked_prefix(self, prefix: str) -> str:
        if any(part in (".", "..") for part in prefix.split("/")) or not prefix.isprintable() or len(prefix) > 900:
            raise ConfigError(
                f"backend {self.KIND}: 'object_prefix' is {prefix[:1000]!r}; "
                "up to 900 characters without control characters are allowed, and no part . or .."
            )
        return prefix
