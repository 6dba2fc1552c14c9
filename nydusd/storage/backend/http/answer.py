"""What a server answered, and whether it is what was asked for. Run by fetch workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Answer:
    """Status and headers of an answer (`headers` finds names in any case); the body is still on the wire."""

    status: int
    headers: Mapping[str, str]
    url: str

    def peek(self, limit: int = 4096) -> bytes:
        """The first bytes of the body, for error documents."""
        raise NotImplementedError
