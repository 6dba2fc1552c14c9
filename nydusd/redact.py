"""Removing secrets from text that people will read: logs, error messages, the configuration as the API shows it.

Pure text functions, used by every process. They know shapes (URL user-info, authorization values, signed queries), not values.
"""

from __future__ import annotations

import re
from typing import Final

MASK: Final = "***"

_USER_INFO = re.compile(r"(?<=://)[^/?#\s'\"@]{1,4096}@(?:[^/?#\s'\"@]{1,4096}@)*")
_AUTHORIZATION = re.compile(
    r"(?i)\b((?:proxy-)?authorization\b['\"]?\s*[:=,]\s*(?:b?['\"])?)(?:(basic|bearer|oss|aws4-hmac-sha256)\s+)?[^\s'\"][^\r\n'\"]*"
)
_SCHEME_VALUE = re.compile(r"(?i)\b(basic|bearer)\s+[A-Za-z0-9+/=_.~-]{6,}")
_QUERY_SECRET = re.compile(
    r"(?i)([?&;](?:x-(?:amz|oss|goog)-(?:signature|credential|security-token)|signature|sig|ossaccesskeyid|awsaccesskeyid"
    r"|security-token|(?:access_|refresh_|id_)?token|password|secret|auth|account)=)[^&;\s'\"#]+"
)
_QUERY = re.compile(r"\?[^#\s'\"]+")


def redact_text(text: str) -> str:
    """Mask credentials by their shape, wherever they stand in a text."""
    if "://" in text:
        text = _USER_INFO.sub(MASK + "@", text)
    if "=" in text:
        text = _QUERY_SECRET.sub(rf"\g<1>{MASK}", text)
    text = _AUTHORIZATION.sub(rf"\g<1>{MASK}", text)
    return _SCHEME_VALUE.sub(rf"\g<1> {MASK}", text)


def redact_url(url: str) -> str:
    """Cut the user-info and the query from a value that is known to be an URL or a host, with or without a scheme.

    Everything up to the last "@" goes, in case a password holds an unescaped slash.
    """
    scheme, rest = _split(url)
    return scheme + _QUERY.sub("", rest.rpartition("@")[2])


def user_info(url: str) -> str:
    """The `user:password` that `redact_url` cuts, empty if there is none."""
    return _split(url)[1].rpartition("@")[0]


def _split(url: str) -> tuple[str, str]:
    """`https://` and what follows; the first is empty where there is no scheme."""
    scheme, mark, rest = url.partition("://")
    return (scheme + mark, rest) if mark and scheme.isalnum() else ("", url)
