"""STATUS=: what `systemctl status` shows. After a takeover also how many images are known again, after any start how far the
blobs behind the mounts are opened.

Part of the supervisor: READY does not wait for them, and one that cannot be opened holds up no other. Nothing survives it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from nydusd.supervisor.notify import Notifier

if TYPE_CHECKING:
    from nydusd.supervisor.images import Image

_INTERVAL = 0.5
"""Seconds between two messages at least."""


class Status:
    """`images()` are those that are mounted, `coming()` those of a killed supervisor that are not known again yet."""

    def __init__(
        self, notifier: Notifier, images: Callable[[], Collection[Image]], coming: Callable[[], Collection[str]]
    ) -> None:
        self._notifier = notifier
        self._images = images
        self._coming = coming
        self._text = ""
        self._is_under_way = False
        self._due = 0.0

    def ready(self, text: str) -> None:
        """Say READY, and what is served; progress follows."""
        self._text = text
        self._notifier.send("READY=1", f"STATUS={text}{self._restored()}")
        self._is_under_way = self._notifier.active

    def tick(self, now: float) -> None:
        """Called in each turn of the loop: says how far it is, until all images are there and all blobs were looked at."""
        if not self._is_under_way or now < self._due:
            return
        self._due = now + _INTERVAL
        if restored := self._restored():
            self._notifier.send(f"STATUS={self._text}{restored}")
            return
        states = [
            state for _, state in {(cache.handle, cache.state) for image in self._images() for cache in image.caches}
        ]
        done, failed = states.count("ready"), states.count("failed")
        self._is_under_way = done + failed < len(states)
        progress = f"; {done} of {len(states)} blobs are open" if self._is_under_way or failed else ""
        problem = f", {failed} cannot be opened now" if failed else ""
        self._notifier.send(f"STATUS={self._text}{progress}{problem}")

    def _restored(self) -> str:
        """How many images of a killed supervisor are known again; "" when that is over."""
        known, coming = len(self._images()), len(self._coming())
        return f"; restoring {known} of {known + coming} images" if coming else ""
