"""AWS Signature Version 4 for reading objects: pure functions. Used by fetch workers.

Signed are the host, the x-amz-* headers and nothing else: not Range, because a peer-to-peer proxy on the way asks for
other ranges than we do, with our headers.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

from nydusd.storage.backend.keys import Keys

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_ALGORITHM = "AWS4-HMAC-SHA256"


def sign(
    keys: Keys,
    region: str,
    method: str,
    url: str,
    headers: Mapping[str, str],
    now: float,
    extra: tuple[str, ...] = (),
) -> dict[str, str]:
    """The headers that make a request without a body pass at S3: X-Amz-Date, X-Amz-Content-Sha256, perhaps
    X-Amz-Security-Token, and Authorization.

    `url` is the URL as it will be sent: percent-encoded, the host as the Host header will have it, no query. Of `headers`
    (what will be sent besides) the x-amz-* ones are signed and those that `extra` names, in lower case. `now` is the
    server's time in seconds since 1970.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    added = {"X-Amz-Date": stamp, "X-Amz-Content-Sha256": EMPTY_SHA256}
    if keys.session_token:
        added["X-Amz-Security-Token"] = keys.session_token
    parts = urlsplit(url)
    signed = {"host": parts.netloc}
    for name, value in {**headers, **added}.items():
        lower = name.lower()
        if lower.startswith("x-amz-") or lower in extra:
            signed[lower] = " ".join(value.split())
    names = ";".join(sorted(signed))
    lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    request = f"{method}\n{parts.path or '/'}\n\n{lines}\n{names}\n{EMPTY_SHA256}"
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    to_sign = f"{_ALGORITHM}\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{keys.secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"Credential={keys.key_id}/{scope}"
    added["Authorization"] = f"{_ALGORITHM} {credential}, SignedHeaders={names}, Signature={signature}"
    return added


def quote_path(path: str) -> str:
    """A path as it is sent and signed: all but A-Z a-z 0-9 - . _ ~ and slashes is percent-encoded, from UTF-8."""
    return quote(path, safe="/-._~")
