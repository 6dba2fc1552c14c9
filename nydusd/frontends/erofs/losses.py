"""Losses of a blob: whether the disk of its cache file did not take all that was written, and until when nobody may rely on it.

The kernel tells it to each open file once, whoever else has heard. So one file is kept open by which it is asked, from before
the first look at what is ready. Runs in the front end. After SIGKILL the note in the segment (`Segment.lost`) says it, or who
syncs the file (`Segment.syncing`): a successor, whose file may be too young to hear of it, relies on nothing until he is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

from nydusd.storage.state.doubts import after, is_over, tell_lost
from nydusd.storage.state.lost import has_lost_writes
from nydusd.storage.state.segment import Segment


class Losses:
    """Of one blob. `segments` are those that speak of its file, one for each image."""

    def __init__(self) -> None:
        self._fd = -1
        self._suspect: dict[Segment, int] = {}
        """Those by which some is said to be there that is lost, until they were doubted as often."""
        self._unsure: dict[Segment, int] = {}
        """Those whose file was being synced when ours was opened, and the number of that sync: who does it may have been told,
        and we would not be. Of what is heard in the next one we are."""

    @property
    def listen_already(self) -> bool:
        return self._fd >= 0

    def listen(self, open_file: Callable[[], int], segments: Collection[Segment]) -> None:
        """Hear of what is lost from now on. Raises what `open_file` does."""
        if self._fd < 0:
            self._fd = open_file()
            syncs = {segment: segment.syncs[0] for segment in segments}
            self._unsure = {segment: number for segment, number in syncs.items() if segment.syncing[0]}

    def ask(self, segments: Collection[Segment]) -> None:
        """Whether something was lost since, for those who relied on it already and for all others."""
        if has_lost_writes(self._fd):
            for segment in segments:
                self._suspect[segment] = after(segment.doubts[0])
                tell_lost(segment)
        for segment in segments:
            doubts = segment.doubts[0]  # before `lost`: who doubts takes that away first
            if segment.lost[0]:  # or a predecessor was told
                self._suspect[segment] = after(doubts)

    def is_unsure(self, segments: Collection[Segment]) -> bool:
        """Whether the sync is not over yet that was under way when we began to listen; or whoever did that was killed."""
        if self._unsure:
            self._unsure = {
                segment: number
                for segment, number in self._unsure.items()
                if segment in segments and segment.syncing[0] and segment.syncs[0] == number
            }
        return bool(self._unsure)

    def matter(self, segments: Collection[Segment]) -> bool:
        """Whether some of what is said to be there is lost, and it is not known yet what."""
        if self._suspect:
            self._suspect = {
                segment: until
                for segment, until in self._suspect.items()
                if segment in segments and not is_over(segment.doubts[0], until)
            }
        return bool(self._suspect)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
