"""STATUS=: what `systemctl status` shows. After a start or a takeover also how far the blobs behind the mounts are opened.

Part of the supervisor: READY does not wait for them, and one that cannot be opened holds up no other. Nothing survives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from nydusd.supervisor.notify import Notifier

if TYPE_CHECKING:
    from nydusd.supervisor.images import Image

_INTERVAL = 0.5
"""Seconds between two messages at least."""


class Status:
    """`images()` are those that are mounted."""

    def __init__(self, notifier: Notifier, images: Callable[[], Iterable[Image]]) -> None:
        self._notifier = notifier
        self._images = images
        self._text = ""
        self._is_under_way = False
        self._due = 0.0

    def ready(self, text: str) -> None:
        """Say READY, and what is served; progress follows."""
        self._text = text
        self._notifier.send("READY=1", f"STATUS={text}")
        self._is_under_way = self._notifier.active

    def tick(self, now: float) -> None:
        """Called in each turn of the loop: says how far it is, until all blobs were looked at."""
        if not self._is_under_way or now < self._due:
            return
        self._due = now + _INTERVAL
        states = [
            state for _, state in {(cache.handle, cache.state) for image in self._images() for cache in image.caches}
        ]
        done, failed = states.count("ready"), states.count("failed")
        self._is_under_way = done + failed < len(states)
        progress = f"; {done} of {len(states)} blobs are open" if self._is_under_way or failed else ""
        problem = f", {failed} cannot be opened now" if failed else ""
        self._notifier.send(f"STATUS={self._text}{progress}{problem}")
