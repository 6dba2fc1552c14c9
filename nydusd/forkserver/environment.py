"""Which of our environment a child finds in its own: credentials only where they are needed.

Used by the supervisor for its children, and by the command for a daemon that the nursery makes. Pure but for `os.environ`.
"""

from __future__ import annotations

import os
import re

_SECRET_NAME = re.compile(
    r"(?i)secret|token|auth|passw|credential|cookie|key|sign|proxy|^NYDUS_HEADER_|^DOCKER_CONFIG$"
)
_SECRET_VALUE = re.compile(r"://[^/\s]*@")
"""What may hold credentials, by its name or as an URL: only a process that talks to backends gets it."""


def environment(*, secrets: bool) -> dict[str, str]:
    """What a child finds in its environment: ours, with or without what may hold credentials."""
    return {
        name: value
        for name, value in os.environ.items()
        if secrets or not (_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))
    }
