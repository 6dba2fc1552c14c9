"""The backend over HTTP that the others are made of: URLs, signatures and credentials are theirs, the rest is here.

Run by fetch workers, one request at a time. What the workers share (tokens, redirects, which host is down) is in the
`SharedStore`; nothing here matters after a kill.
"""

from __future__ import annotations

import logging
import os
import re
import time
from abc import abstractmethod
from typing import ClassVar

from nydusd.config.model import SECRET_NAME, Remote
from nydusd.errors import BackendError, BackendTimeoutError, BackendUnavailableError, NoSuchBlobError
from nydusd.logs import clean, register_secret
from nydusd.redact import user_info
from nydusd.storage.backend.base import HEADER_VARIABLE, USER, BackendMetrics, BlobBackend, BlobReader, ReadHow
from nydusd.storage.backend.http.answer import Answer, check_body, total_of
from nydusd.storage.backend.http.breaker import Breaker
from nydusd.storage.backend.http.failure import Failure, Kind
from nydusd.storage.backend.http.fetch import Fetch, Timing
from nydusd.storage.backend.http.gate import Patience
from nydusd.storage.backend.http.route import Routes
from nydusd.storage.backend.http.store import SharedStore
from nydusd.storage.backend.http.transport import Transport, host_of
from nydusd.version import VERSION

log = logging.getLogger(__name__)

_HEADER_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_MAX_BREAKERS = 64
_RETRIES = 3
MIN_LIMITED = 128 << 10
MAX_LIMITED = 16 << 20
"""Bounds of what is asked for at once of a server that was slow to answer (bytes); beyond, there is no limit again."""


class HttpBackend(BlobBackend):
    """A store of blobs that is reached by HTTP. A subclass says where a blob is and how to sign a request for it.

    `unix_socket` is the path of a socket to which every connection goes, whatever the URL says. Raises `ConfigError`.
    """

    KEEP_REDIRECTS: ClassVar[bool] = False
    """Remember where a blob's URL redirects to (for all workers, until it expires) and ask there first."""

    def __init__(self, kind: str, remote: Remote, store: SharedStore, unix_socket: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.remote = remote
        self.store = store
        self.timing = Timing(retries=remote.retry_limit or _RETRIES, remembered=remote.failure_memory)
        self.last_error = ""
        self.patience = Patience()
        """Of the read that is under way, for hooks that send requests of their own."""
        self.common_headers = _common_headers()
        register_secret(user_info(remote.proxy.url))
        self.transport = Transport(
            timeout=remote.timeout,
            connect_timeout=remote.connect_timeout,
            skip_verify=remote.skip_verify,
            ca_cert_files=remote.ca_cert_files,
            proxy_url=remote.proxy.url,
            unix_socket=unix_socket,
        )
        self.routes = Routes(remote, store, self.transport, self.common_headers)
        self._breakers: dict[str, Breaker] = {}

    @abstractmethod
    def blob_url(self, blob_id: str) -> str:
        """The full URL of a blob (http or https) at the origin. Computed anew for each attempt."""

    def who(self) -> str:
        """Tells apart as whom a blob is asked for, without giving it away: what one is refused another may get."""
        return ""

    def authorize(self, method: str, url: str, headers: dict[str, str]) -> None:
        """Add to `headers` what lets this request to the origin pass. The default adds nothing.

        Called for each attempt just before it is sent (never for a redirect to another host); `headers` holds all that
        will be sent but what the library adds itself (Host, Content-Length) and what proxies and mirrors get besides.
        """
        return

    def remedy(self, answer: Answer, tried: int) -> bool:
        """The origin answered with 3xx without use, or 4xx (not 404, 408, 410, 416, 425, 429): can something be done?

        True: something is different now (a token was got, a clock corrected, a region learnt), send again from the
        start. `tried` is how often this was called before in this read; the third answer is final whatever is
        returned. `answer.status`, `answer.headers` and `answer.peek(limit)` (the start of the body) may be used.
        """
        return False

    def unreachable(self, failure: Failure) -> bool:
        """The origin takes no connection, or no TLS. True: `blob_url` gives another URL now. The default is False."""
        return False

    def takes_redirect(self, answer: Answer, target: str) -> str:
        """The URL to go to when `answer` redirects to `target` (already absolute). The default goes there, but not without TLS
        from where there is TLS, unless `skip_verify` is set.

        An empty text means that the redirect must not be followed; `remedy` is asked then.
        """
        if answer.url.startswith("https:") and not target.startswith("https:") and not self.remote.skip_verify:
            log.warning("%s: redirects from https to http at %s, which is not followed", answer.host, host_of(target))
            return ""
        return target

    def breaker_of(self, url: str) -> Breaker:
        """The breaker of the host of an URL."""
        name = url.partition("://")[0] + "://" + host_of(url)
        breaker = self._breakers.get(name)
        if breaker is None:
            if len(self._breakers) >= _MAX_BREAKERS:
                del self._breakers[next(iter(self._breakers))]
            breaker = self._breakers[name] = Breaker(self.store, name, self.timing.breaker)
        return breaker

    def breaker_of_blob(self, blob_id: str) -> Breaker:
        """The breaker of one blob at the origin: for a server that lives, and gives something else instead of this blob."""
        return Breaker(self.store, f"blob {blob_id} at {host_of(self.blob_url(blob_id))}", self.timing.breaker)

    def connections(self) -> dict[str, int]:
        return self.transport.open_connections()

    def state(self) -> dict[str, object]:
        return {
            "type": self.kind,
            "connections": self.connections(),
            "in_flight": self.transport.in_flight,
            "hosts": {name: breaker.state() for name, breaker in self._breakers.items()},
            "routes": self.routes.state(),
            "requests": self.metrics.requests,
            "token_requests": self.metrics.token_requests,
            "redirect_hits": self.metrics.redirect_hits,
            "over_read": self.metrics.over_read,
            "retries": dict(self.metrics.retries),
            "last_error": clean(self.last_error),
        }

    def close(self) -> None:
        """Close readers, connections and the store."""
        super().close()
        self.transport.close()
        self.store.close()

    def _new_reader(self, blob_id: str) -> BlobReader:
        return HttpReader(blob_id, self)


class HttpReader(BlobReader):
    """One blob over HTTP."""

    def __init__(self, blob_id: str, backend: HttpBackend) -> None:
        super().__init__(blob_id, backend.metrics)
        self._backend = backend
        self._size: int | None = None
        self._most = 0  # bytes to ask for at once, 0: as many as are wanted

    def blob_size(self) -> int:
        """Length of the stored blob in bytes: by HEAD, else by asking for its first byte. Raises `BackendError`."""
        if self._size is None:
            deadline = time.monotonic() + self._backend.timing.user
            how = ReadHow(deadline=deadline)
            try:
                self._size = self._ask_size(_Size("HEAD"), how)
            except (NoSuchBlobError, BackendTimeoutError, BackendUnavailableError):
                raise
            except BackendError:
                # Signed URLs are often good for GET only, and some servers know no HEAD.
                self._size = self._ask_size(_Size("GET"), how)
        return self._size

    def _read_into(self, buf: memoryview, offset: int, how: ReadHow = USER) -> None:
        part = _Part(buf, offset, self._size, self._metrics, self._most)
        most = self._most
        try:
            Fetch(self._backend, self.blob_id, how).run(part)
            # Halved for each answer that did not come in time, doubled by each read for which all came.
            most = most * 2 if most < MAX_LIMITED else 0
        finally:
            self._most = most if part.most == self._most else part.most
        if part.blob_size is not None:
            self._size = part.blob_size

    def _ask_size(self, task: _Size, how: ReadHow) -> int:
        Fetch(self._backend, self.blob_id, how).run(task, f" size by {task.method}")
        return task.size


class _Part:
    """The task to fill a buffer."""

    method = "GET"

    def __init__(
        self, buf: memoryview, offset: int, blob_size: int | None, metrics: BackendMetrics, most: int = 0
    ) -> None:
        self.progress = 0
        self.blob_size = blob_size
        self.most = most
        self._buf = buf
        self._offset = offset
        self._metrics = metrics

    def _asked(self) -> int:
        left = len(self._buf) - self.progress
        return min(left, self.most) if self.most else left

    def range(self) -> str:
        start = self._offset + self.progress
        return f"bytes={start}-{start + self._asked() - 1}"

    def shrink(self) -> None:
        if self._asked() >= 2 * MIN_LIMITED:
            self.most = self._asked() // 2

    def take(self, answer: Answer) -> bool:
        left = self._asked()
        skip, count, total = check_body(answer, self._offset + self.progress, left, self.blob_size)
        skipped = answer.skip(skip)
        self._metrics.over_read += skipped
        if skipped < skip:
            raise answer.cut_off()
        got = answer.fill(self._buf[self.progress : self.progress + count])
        self.progress += got
        if got < count:
            raise answer.cut_off()
        self.blob_size = total if total is not None else self.blob_size
        return self.progress == len(self._buf)


class _Size:
    """The task to learn the length of a blob."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.progress = 0
        self.size = 0

    def range(self) -> str:
        return "bytes=0-0" if self.method == "GET" else ""

    def shrink(self) -> None:
        """It is as small as can be."""

    def take(self, answer: Answer) -> bool:
        size = total_of(answer) if answer.status == 206 else answer.length()
        page = answer.headers.get("Content-Type", "").lower().startswith("text/html")
        if size is None or page:
            raise Failure(Kind.PERMANENT, answer.host, "does not tell the length of the blob", status=answer.status)
        self.size = size
        return True


def _common_headers() -> dict[str, str]:
    """What every request carries: who we are, no compression, and what the environment adds (NYDUS_HEADER_Name)."""
    headers = {"User-Agent": f"nydusd/{VERSION}", "Accept-Encoding": "identity"}
    for variable, value in os.environ.items():
        name = variable.removeprefix(HEADER_VARIABLE)
        if name == variable or not _HEADER_NAME.fullmatch(name) or not value.isprintable():
            continue
        headers[name] = value
        if SECRET_NAME.search(name):
            register_secret(value)
    return headers
