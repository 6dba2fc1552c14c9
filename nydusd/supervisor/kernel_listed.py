"""Which blobs of a mounted image have no chunk that its chunk table lacks, where that is not known of the copy of its
metadata: no copy was made, or a release mounted it that did not say so. Part of the supervisor.

As long as it is not known, chunks that no image lists count as missing: the kernel never asks for those that no file refers
to, and the blob never becomes complete. A worker finds it out, behind all else that is to be done.

What holds after SIGKILL: the table of mounts has it, or the next supervisor asks again.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from nydusd.errors import NydusError
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.supervisor.kernel_table import KernelTable

if TYPE_CHECKING:
    from nydusd.supervisor.images import Image
    from nydusd.supervisor.pool import WorkerPool

log = logging.getLogger(__name__)


class Listing:
    """Notes in `table` what workers of `fetch` find."""

    def __init__(self, fetch: WorkerPool, table: KernelTable) -> None:
        self._fetch = fetch
        self._table = table

    def ask(self, index: int, image: Image) -> None:
        """Have it found out of this mount, which is of this image, unless it is known that no blob has such chunks."""
        if not all(file.listed for file in self._table.mounted(index).files):
            payload: Answer = {"image": image.metadata.to_json()}
            self._fetch.submit(Job("list_image", None, Priority.PREFETCH, payload, partial(self._found, index)))

    def _found(self, index: int, _job: Job, answer: Answer) -> None:
        mounted = next((each for each in self._table.mounts if each.index == index), None)
        if mounted is None:
            return
        try:
            if "error" in answer:
                log.warning(
                    "%s: whether its chunk table is whole is not known: %s", mounted.mountpoint, answer["error"]
                )
                return
            pairs = zip(mounted.files, answer["listed"], strict=True)
            files = tuple(replace(file, listed=listed) for file, listed in pairs)
            if files != mounted.files:
                self._table.note(replace(mounted, files=files))
        except (NydusError, OSError) as e:
            log.warning("%s: what its chunk table has cannot be noted: %s", mounted.mountpoint, e)
