"""What the front end knows of the mounts: their blobs by cache file, and the private mounts of which nothing is missing.

The kernel asks as long as a private mount is marked. There is one for each range of a blob (`formats/write/rafs_v6_split.py`),
and its mark goes as soon as the range is complete and on its disk (`synced.py`): so what is cached is read without us, whatever
else is missing. We have a private mount only by the file of an event that came through it; one such file of each is kept.

After SIGKILL: a mark that is gone was not needed any more, since nothing is taken out of these files; one that stays costs an
event, after which it goes.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

from nydusd import points
from nydusd.errors import CacheError, FormatError, MountError

from . import fanotify, table
from .device import Blob
from .synced import Send, Syncs
from .table import Table

log = logging.getLogger(__name__)

_KEPT_MOST = 4096
"""Files of events that are kept open."""


class Known:
    """`memory` is the table's fd, `group` the fanotify group's, `row` that in which the front end counts.

    `complain(text)` says what goes wrong.
    """

    def __init__(self, memory: int, group: int, row: int, complain: Callable[[str], None]) -> None:
        self._memory = memory
        self._group = group
        self._row = row
        self._complain = complain
        self.table = Table()
        self.files: dict[tuple[int, int], tuple[int, Blob]] = {}
        """By device and inode of the cache file: its number in the journal, and the blob."""
        self.keys: dict[int, Blob] = {}
        """By number in the journal."""
        self._kept: dict[tuple[Blob, int, int], int] = {}
        """By interval, a file that was opened through its private mount."""
        self._complete: set[int] = set()
        """Indexes of mounts of which nothing is missing."""
        self._syncs = Syncs()
        self.answered = self._syncs.answered
        """Told of the answers to requests that `look` has sent, and of others."""
        self.refresh()

    @property
    def waits(self) -> bool:
        """Whether `look` may find something."""
        return len(self._complete) < len(self.table.mounts)

    def refresh(self) -> bool:
        """Know what the supervisor has written since; whether there was something."""
        try:
            if table.revision_of(self._memory) == self.table.revision:
                return False
            self.table = table.read(self._memory)
        except FormatError as e:
            self._complain(str(e))
            return False
        found: dict[tuple[int, int], list[table.File]] = {}
        for mounted in self.table.mounts:
            for file in mounted.files:
                found.setdefault((file.device, file.inode), []).append(file)
        before = self.files
        self.files, self.keys = {}, {}
        for place, files in found.items():
            # A number that was given to another file says that nobody uses the mounts any more that had the former one.
            birth = files[-1].birth
            here = [file for file in files if birth is None or file.birth in (None, birth)]
            if place in before and before[place][1].is_still(here):
                blob = before[place][1]
                blob.describe(here)
            else:
                blob = Blob(here, self._row)
            self.files[place] = here[-1].key, blob
            self.keys |= {file.key: blob for file in files}
        for place, (_, blob) in before.items():
            if self.files.get(place, (0, None))[1] is not blob:
                self._forget(blob)
        self._complete &= {mounted.index for mounted in self.table.mounts}
        return True

    def current(self, blob: Blob) -> Blob:
        """The blob that has the place of this one now: itself, unless its mounts have come and gone."""
        return self.files.get(blob.file, (0, blob))[1]

    def passes(self, blob: Blob, offset: int, fd: int) -> bool:
        """A reader passes at `offset`, or will, that has come by the file `fd`: unmark its private mount if that can be.

        Whether it can: else what is read may be in the page cache alone.
        """
        if self.current(blob) is not blob:
            return False
        interval = blob.interval(offset)
        free = blob.is_stored(*interval)
        if not free and ((blob, *interval) in self._kept or len(self._kept) >= _KEPT_MOST):
            return False
        # The mounts as they are now: it may be one that was made of the same file since, with other ranges. Each is in the
        # table before it can be read.
        if self.refresh():
            if self.current(blob) is not blob:
                return False
            interval = blob.interval(offset)
            free = blob.is_stored(*interval)
        if free:
            self._unwatch(blob, fd)
        elif (blob, *interval) not in self._kept:
            with contextlib.suppress(OSError):
                self._kept[(blob, *interval)] = os.dup(fd)
        return free

    def look(self, send: Send | None) -> None:
        """Unmark what has become complete without an event; have synced, by `send`, what is complete and perhaps not stored."""
        self.refresh()
        unsure = dict.fromkeys(blob for blob in self.keys.values() if blob.is_suspect())
        for (blob, begin, end), fd in list(self._kept.items()):
            if blob.is_stored(begin, end):
                self._unwatch(blob, fd)
                os.close(self._kept.pop((blob, begin, end)))
                continue
            with contextlib.suppress(CacheError):
                if blob.whole(begin, end):
                    unsure[blob] = None
        for mounted in self.table.mounts:
            if mounted.index in self._complete or mounted.names is None:
                continue
            blobs = [self.keys[file.key] for file in mounted.files]
            # Each is looked at, and so has its segment opened: those that nobody has read from yet are known after a stop, too.
            complete = [blob.complete() for blob in blobs]
            if not all(complete):
                continue
            if all(blob.is_stored() for blob in blobs):
                self._complete.add(mounted.index)
                log.info("%s: all of it is in the cache; the kernel reads it by itself", mounted.mountpoint)
                mounted.set_read_ahead(incomplete=False)
            else:
                unsure |= dict.fromkeys(blob for blob in blobs if not blob.is_stored())
        if send is not None:
            for blob in unsure:
                self._syncs.ask(blob, send)

    def _unwatch(self, blob: Blob, fd: int) -> None:
        try:
            fanotify.unwatch(self._group, fd)
        except MountError as e:
            self._complain(f"blob {blob.blob_id}: {e}")
        points.reach("fanotify: mark removed")

    def _forget(self, blob: Blob) -> None:
        """No mount has it any more: whoever would come by these files is gone."""
        for interval in [interval for interval in self._kept if interval[0] is blob]:
            os.close(self._kept.pop(interval))
        self._syncs.forget(blob)
        blob.close()
