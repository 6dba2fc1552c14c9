"""The images that a killed supervisor had mounted, known again one after the other while its successor serves already.

Runs in the supervisor. Which there are, and how front ends call their blobs, is read before anything is served, by
`mount_records.py`. Here each of them gets its configuration, the segments of its blobs and its counters: that of the command
line at once, the others one in each turn of the loop, and before that those of which somebody wants chunks. Whatever looks at
all images or changes them waits until all are known: the API (`Supervisor.control`), the quota, prefetch.

What holds after SIGKILL: the table names all that are mounted from the beginning, and nothing is written here but that one of
them cannot be had. So the next supervisor finds them all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from nydusd import points
from nydusd.errors import NydusError, ScarceError

if TYPE_CHECKING:
    from nydusd.supervisor.images import Image
    from nydusd.supervisor.mount_records import Recorded
    from nydusd.supervisor.mounts import Mounts
    from nydusd.supervisor.router import Router

log = logging.getLogger(__name__)


class Restore:
    """`recalled(image)` sets for an image what was set for it at run time, before anything is fetched.

    `kept`: segments that somebody needs still, whether an image has them or not.
    """

    def __init__(
        self,
        mounts: Mounts,
        router: Router,
        records: Sequence[Recorded],
        recalled: Callable[[Image], None],
        kept: Collection[str] = (),
    ) -> None:
        self._mounts = mounts
        self._router = router
        self._recalled = recalled
        self._kept = kept
        self._coming = mounts.coming
        self.is_scarce = False
        """Whether the last step failed for want of file descriptors or memory: the next one is for later."""
        self._to_serve: list[tuple[Image, Sequence[bytes] | None]] = []
        self._by_handle: dict[int, list[Recorded]] = {}
        for recorded in records:
            self._coming[recorded.place] = recorded
            for handle in recorded.handles:
                self._by_handle.setdefault(handle, []).append(recorded)
        router.unknown = self._wanted

    def begin(self) -> None:
        """Know the image of the command line. Raises NydusError when it cannot be had."""
        for recorded in [recorded for recorded in self._coming.values() if recorded.given]:
            self._know(recorded)

    def step(self) -> bool:
        """Know the next image; whether there is another one."""
        self.is_scarce = False
        for place, recorded in list(self._coming.items())[:1]:
            try:
                self._know(recorded)
            except ScarceError as e:
                self.is_scarce = True
                self._coming[place] = self._coming.pop(place)  # the next one first
                log.warning("the image at %s is known again later: %s", place, e)
        return bool(self._coming)

    def serve(self) -> None:
        """Have the blobs opened of those that are known, and fetched ahead what is to be."""
        served, self._to_serve = self._to_serve, []
        for image, files in served:
            if not image.released:
                self._mounts.serve(image, files)

    def end(self) -> None:
        """All are known: remove what none of them has. Where we stop before that, all stays for the next one."""
        self._router.unknown = lambda handle: False
        if self._coming:
            return
        try:
            self._mounts.remove_strays(self._kept)
        except (NydusError, OSError) as e:
            log.warning("what no image has stays until the next takeover: %s", e)

    def _wanted(self, handle: int) -> bool:
        """Somebody waits for a blob of this handle: know an image now that has it. Whether that can only be done later."""
        having = self._by_handle.pop(handle, [])
        for recorded in having:
            try:
                if recorded.place in self._coming and self._know(recorded):
                    break
            except ScarceError as e:
                self._by_handle[handle] = having  # who waits asks again
                log.warning("the image at %s is known again later: %s", recorded.place, e)
                return True
        return False

    def _know(self, recorded: Recorded) -> bool:
        image = self._mounts.know(recorded)
        if image is not None:
            self._recalled(image)
            self._to_serve.append((image, recorded.files))
        points.reach("takeover: one image known")
        return image is not None
