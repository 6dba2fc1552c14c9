"""What a server answered, and whether it is what was asked for. Run by fetch workers.

Servers and what is between them and us answer with other bytes than those asked for: whole blobs, pages that say that
something is wrong, compressed bodies. None of it may get into a cache, so everything that can be checked is.
"""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from nydusd.storage.backend.http.exchange import Exchange
from nydusd.storage.backend.http.failure import Failure, Kind

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

MAX_SKIP: Final = 1 << 20
"""Bytes of a body that are rather thrown away than paid for with a new connection."""
_CHUNK: Final = 64 << 10
_PEEK: Final = 8 << 10
_CONTENT_RANGE: Final = re.compile(r"bytes\s+(?:(\d{1,19})-(\d{1,19})|\*)/(?:(\d{1,19})|\*)", re.ASCII | re.IGNORECASE)


class Answer:
    """Status and headers of an answer (`headers` finds names in any case); the body is still on the wire.

    `finish` must be called when it is done with, so that the connection is used again or closed.
    """

    def __init__(
        self, response: BaseHTTPResponse, raw: http.client.HTTPResponse, url: str, host: str, exchange: Exchange
    ):
        self.status: int = response.status
        self.headers: Mapping[str, str] = response.headers
        self.url = url
        self.host = host
        self.received = 0
        """Bytes of the body that were taken from the wire, wanted or not."""
        self._response = response
        self._raw = raw
        self._exchange = exchange
        self._peeked: bytes | None = None

    def peek(self, limit: int = _PEEK) -> bytes:
        """The first bytes of the body, at most 8 KiB, for error documents. Nothing else may be read afterwards."""
        if self._peeked is None:
            buf = bytearray(_PEEK)
            with memoryview(buf) as view:
                count = self.fill(view)
            self._peeked = bytes(buf[:count])
        return self._peeked[:limit]

    def read_all(self, limit: int) -> bytes:
        """The whole body. Raises `Failure` if it is longer than `limit` or not complete."""
        buf = bytearray(limit + 1)
        with memoryview(buf) as view:
            count = self.fill(view)
        if count > limit:
            raise Failure(Kind.PERMANENT, self.host, f"an answer of more than {limit} bytes", status=self.status)
        if self._exchange.error is not None or self.left():
            raise self.cut_off()
        return bytes(buf[:count])

    def fill(self, view: memoryview) -> int:
        """Receive into `view` until it is full or the body is over; how many bytes that were. Never raises for I/O."""
        done = 0
        while done < len(view):
            try:
                count = self._raw.readinto(view[done:])
            except (OSError, ValueError, http.client.HTTPException):
                # Of a chunked body: a length that is none, or a chunk that was cut off.
                break
            if not count:
                break
            done += count
        self.received += done
        return done

    def skip(self, count: int) -> int:
        """Throw away `count` bytes of the body; how many there were."""
        scratch = memoryview(bytearray(min(count, _CHUNK)))
        done = 0
        while done < count:
            got = self.fill(scratch[: min(count - done, _CHUNK)])
            done += got
            if not got:
                break
        return done

    def left(self) -> int | None:
        """Bytes of the body that are still to come, None if the server did not say."""
        return 0 if self._raw.isclosed() and self._exchange.error is None else self._raw.length

    def length(self) -> int | None:
        """The Content-Length, None where there is no usable one."""
        value = self.headers.get("Content-Length", "").strip()
        return int(value) if value.isdecimal() and value.isascii() and len(value) < 20 else None

    def cut_off(self) -> Failure:
        """The failure that a body is which ended too early."""
        error = self._exchange.error
        if isinstance(error, TimeoutError):
            if self._exchange.over():
                return Failure(
                    Kind.DEADLINE,
                    self.host,
                    "no time left for the body",
                    status=self.status,
                    host_failed=self._exchange.was_fair(),
                )
            what = "the body stalled"
        elif error is not None:
            what = f"the connection broke in the body ({error.strerror or type(error).__name__})"
        else:
            what = "the body is shorter than it should be"
        return Failure(Kind.TRANSIENT, self.host, what, status=self.status, host_failed=True)

    def finish(self) -> int:
        """Done with it: keep the connection if the rest of the body is short, else close it. How much was thrown away."""
        thrown = 0
        left = self.left()
        if self._exchange.error is None and not self._raw.isclosed() and (left is None or left <= _CHUNK):
            thrown = self.skip(_PEEK if left is None else left)
            if self._raw.length == 0:
                # Nothing is read here: it is how http.client is told that an empty body is over.
                self._raw.read()
        if self._exchange.error is not None or not self._raw.isclosed():
            self._response.close()
        self._response.release_conn()
        return thrown


def check_body(answer: Answer, offset: int, size: int, blob_size: int | None) -> tuple[int, int, int | None]:
    """How to take the bytes `offset`, `size` from this answer: skip so many of the body, then take so many.

    The third is the length of the stored blob if the answer tells it. Fewer than `size` may be there to take. Raises
    `Failure` if the body is not, or is probably not, from the blob.
    """
    encoding = answer.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise _wrong(answer, f"a body in encoding {encoding[:32]!r}, which we said we do not take")
    content_type = answer.headers.get("Content-Type", "").strip().lower()
    if content_type.startswith("text/html"):
        raise _wrong(answer, "a page instead of the blob")
    if answer.status == 206:
        return _check_part(answer, offset, size, content_type)
    if answer.status == 200:
        return _check_whole(answer, offset, size, blob_size)
    raise _wrong(answer, "no answer to this question")


def total_of(answer: Answer) -> int | None:
    """The length of the blob as a Content-Range says it, None if it does not."""
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
    return int(match[3]) if match and match[3] else None


def _check_part(answer: Answer, offset: int, size: int, content_type: str) -> tuple[int, int, int | None]:
    value = answer.headers.get("Content-Range", "").strip()
    match = _CONTENT_RANGE.fullmatch(value)
    if not match or not match[1] or content_type.startswith("multipart/"):
        raise _wrong(answer, f"Content-Range {value[:64]!r}, so nobody knows which bytes these are")
    first, last, total = int(match[1]), int(match[2]), int(match[3]) if match[3] else None
    length = answer.length()
    if first != offset or not offset <= last < offset + size or (length is not None and length != last - first + 1):
        raise _wrong(
            answer, f"Content-Range {value[:64]!r} with {length} bytes, but {offset}-{offset + size - 1} was asked for"
        )
    if total is not None and total < offset + size:
        raise Failure(
            Kind.NO_RANGE,
            answer.host,
            f"the stored blob has {total} bytes, but the image needs {size} at {offset}",
            status=answer.status,
        )
    return 0, last - first + 1, total


def _check_whole(answer: Answer, offset: int, size: int, blob_size: int | None) -> tuple[int, int, int | None]:
    """The server does not know ranges and sends the blob from its start: good if little is in front of what we need."""
    length = answer.length()
    if length is not None and (length < offset + size or (blob_size is not None and length != blob_size)):
        expected = f"at least {offset + size}" if blob_size is None else str(blob_size)
        raise _wrong(answer, f"a body of {length} bytes, but the blob has {expected}")
    if offset > MAX_SKIP:
        raise Failure(
            Kind.NO_RANGES,
            answer.host,
            "it sends the whole blob where a part is asked for; it cannot serve images lazily",
            status=answer.status,
        )
    return offset, size, length


def _wrong(answer: Answer, what: str) -> Failure:
    # Another node behind the same name may do better, so it is worth trying again.
    return Failure(Kind.TRANSIENT, answer.host, f"wrong answer: {what}", status=answer.status)
