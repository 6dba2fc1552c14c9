"""WWW-Authenticate: what a registry wants to see (RFC 9110, 11.6.1). Pure; used by fetch workers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAM: Final = re.compile(rf'({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}[^,\s"]*))')
_SCHEME: Final = re.compile(rf"({_TOKEN})(?=[ \t,]|$)")
_TOKEN68: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|$))")
_BETWEEN: Final = re.compile(r"[ \t,]*")
_MAX_LENGTH: Final = 16 << 10


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate: `scheme` and the names of `params` are in lower case."""

    scheme: str
    params: dict[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """All challenges of a header, several headers joined by commas. What is no challenge ends the list."""
    found: list[Challenge] = []
    header = header[:_MAX_LENGTH]
    place = 0
    while True:
        place = _end(_BETWEEN, header, place)
        scheme = _SCHEME.match(header, place)
        if not scheme:
            return found
        params: dict[str, str] = {}
        found.append(Challenge(scheme[1].lower(), params))
        place = _end(_BETWEEN, header, scheme.end())
        if (
            not _PARAM.match(header, place)
            and (blob := _TOKEN68.match(header, place))
            and _is_blob(header, scheme, blob)
        ):
            place = blob.end()
            continue
        while param := _PARAM.match(header, place):
            value = re.sub(r"\\(.)", r"\1", param[2]) if param[2] is not None else param[3]
            params.setdefault(param[1].lower(), value)
            place = _end(_BETWEEN, header, param.end())


def _is_blob(header: str, scheme: re.Match[str], blob: re.Match[str]) -> bool:
    """Whether this stands directly behind the scheme: behind a comma it would be the next scheme."""
    return "," not in header[scheme.end() : blob.start()]


def _end(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place
