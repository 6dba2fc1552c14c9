"""Redirects: where they lead, and how long a signed URL is good for. Pure; used by fetch workers."""

from __future__ import annotations

import calendar
import time
from typing import Final
from urllib.parse import parse_qs, urljoin, urlsplit

MAX_HOPS: Final = 10
_DEFAULT_LIFE: Final = 300.0
_MARGIN: Final = 10.0
_MAX_LIFE: Final = 86400.0
_MAX_URL: Final = 16 << 10


def target_of(url: str, location: str) -> str:
    """The absolute http or https URL to which `location` leads from `url`, empty if it is none."""
    if not location or len(location) > _MAX_URL or not location.isprintable():
        return ""
    try:
        target = urljoin(url, location.strip()).partition("#")[0]
        parts = urlsplit(target)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
        # The library that connects takes a backslash for the host's end, and what follows for a path: by `same_origin` such an
        # URL could be the registry's, and be sent to another host, with our credentials.
        usable = usable and "\\" not in parts.netloc
    except ValueError:
        return ""
    return target.replace(" ", "%20") if usable else ""


def life_of(url: str) -> float:
    """Seconds for which a signed URL may be used: what it says of itself less 10 s, or 5 minutes. 0: not at all.

    Known are X-Amz-Date + X-Amz-Expires (also X-Goog- and X-Oss-), Expires (seconds since 1970) and se (a date).
    """
    try:
        query = {key.lower(): values[0] for key, values in parse_qs(urlsplit(url).query, max_num_fields=200).items()}
    except ValueError:
        return 0.0
    end = _end(query)
    life = _DEFAULT_LIFE if end is None else end - time.time() - _MARGIN
    return min(max(life, 0.0), _MAX_LIFE)


def same_origin(one: str, other: str) -> bool:
    """Whether two URLs have the same scheme, host and port: only then may credentials go along."""
    try:
        return _origin(one) == _origin(other)
    except ValueError:
        return False


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _end(query: dict[str, str]) -> float | None:
    """When a signed URL ends, in seconds since 1970; None if it does not say so in a way we know."""
    for vendor in ("amz", "goog", "oss"):
        since = _date(query.get(f"x-{vendor}-date", ""), "%Y%m%dT%H%M%SZ")
        seconds = query.get(f"x-{vendor}-expires", "")
        if since is not None and _is_number(seconds):
            return since + int(seconds)
    if _is_number(query.get("expires", "")):
        return float(query["expires"])
    return _date(query.get("se", ""), "%Y-%m-%dT%H:%M:%SZ")


def _is_number(text: str) -> bool:
    return text.isdecimal() and text.isascii() and len(text) < 12


def _date(text: str, form: str) -> float | None:
    try:
        return float(calendar.timegm(time.strptime(text, form)))
    except ValueError:
        return None
