"""The backend over HTTP that the others are made of: URLs, signatures and credentials are theirs, the rest is here.

Run by fetch workers, one request at a time. What the workers share (tokens, redirects, which host is down) is in the
`SharedStore`; nothing here matters after a kill.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from nydusd.config.model import Remote
from nydusd.storage.backend.base import USER, BlobBackend, BlobReader, ReadHow
from nydusd.storage.backend.http.answer import Answer
from nydusd.storage.backend.http.store import SharedStore


class HttpBackend(BlobBackend):
    """A store of blobs that is reached by HTTP. A subclass says where a blob is and how to sign a request for it.

    `unix_socket` is the path of a socket to which every connection goes, whatever the URL says.
    """

    KEEP_REDIRECTS: ClassVar[bool] = False
    """Remember where a blob's URL redirects to (for all workers, until it expires) and ask there first."""

    def __init__(self, kind: str, remote: Remote, store: SharedStore, unix_socket: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.remote = remote
        self.store = store

    @abstractmethod
    def blob_url(self, blob_id: str) -> str:
        """The full URL of a blob (http or https) at the origin. Computed anew for each attempt."""

    def authorize(self, method: str, url: str, headers: dict[str, str]) -> None:
        """Add to `headers` what lets this request to the origin pass. The default adds nothing.

        Called for each attempt just before it is sent (never for the target of a redirect); `headers` holds all that
        will be sent but what the library adds itself (Host, Content-Length), so they may be signed.
        """
        return

    def remedy(self, answer: Answer, tried: int) -> bool:
        """The origin answered with 3xx without use, or 4xx (not 404, 408, 410, 416, 425, 429): can something be done?

        True: something is different now (a token was got, a clock corrected, a region learnt), send again from the
        start. `tried` is how often this was called before in this read; the third answer is final whatever is
        returned. `answer.status`, `answer.headers` and `answer.peek(limit)` (the start of the body) may be used.
        """
        return False

    def takes_redirect(self, answer: Answer, target: str) -> str:
        """The URL to go to when `answer` redirects to `target` (already absolute). The default goes there.

        An empty text means that the redirect must not be followed; `remedy` is asked then.
        """
        return target

    def _new_reader(self, blob_id: str) -> BlobReader:
        return HttpReader(blob_id, self)


class HttpReader(BlobReader):
    """One blob over HTTP."""

    def __init__(self, blob_id: str, backend: HttpBackend) -> None:
        super().__init__(blob_id, backend.metrics)
        self._backend = backend

    def blob_size(self) -> int:
        raise NotImplementedError

    def _read_into(self, buf: memoryview, offset: int, how: ReadHow = USER) -> None:
        raise NotImplementedError
