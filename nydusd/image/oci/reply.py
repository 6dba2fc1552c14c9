"""Answers of registries and token servers: read up to a limit, ended whatever they go on to send. Runs in the command."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

import urllib3

from nydusd.image.oci.model import MAX_JSON

_LITTLE = 64 << 10
# What a server says about when to come again is not waited for: it may say years.
RETRIES = urllib3.Retry(3, redirect=0, status=0, respect_retry_after_header=False)


class Reply(NamedTuple):
    """An answer that has come. `data` is its body, or more than `MAX_JSON` bytes of the begin of a longer one."""

    status: int
    headers: Mapping[str, str]
    data: bytes


def whole(answer: urllib3.BaseHTTPResponse) -> Reply:
    """Read an answer that was asked for without its content, and end it. Raises `HTTPError`."""
    try:
        data = answer.read(MAX_JSON + 1)
    finally:
        end(answer)
    return Reply(answer.status, answer.headers, data)


def end(answer: urllib3.BaseHTTPResponse) -> None:
    """Go on without the rest of an answer: its connection is kept if that is little, else closed."""
    left = answer.length_remaining
    with contextlib.suppress(urllib3.exceptions.HTTPError):
        if left is not None and left <= _LITTLE:
            answer.read(left)
    answer.close()
    answer.release_conn()
