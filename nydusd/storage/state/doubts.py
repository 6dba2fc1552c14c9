"""Doubts: what is done when the disk of a cache file did not take what is said to be ready.

The kernel drops such bytes and says so once to each open file. What was ready may then be read as zeros. So nothing is ready
any more in any segment of the file before it was looked for on the disk: it is VERIFY, or EMPTY where it cannot be checked.

Runs in workers. What holds after SIGKILL: `syncing` is set in the segment by which it is done, until all of it is done; so
the next one does it again.
"""

from __future__ import annotations

from nydusd.storage.state.segment import READY, Segment
from nydusd.storage.state.sharing import segments_of


def doubt(segment: Segment) -> None:
    """Nothing of one segment is certain any more. Who relies on a sync of before looks at `doubts`."""
    segment.doubts[0] += 1
    for chunk, state in enumerate(bytes(segment.state)):
        if state == READY:
            segment.state[chunk] = segment.doubted(chunk)
    segment.dirty[0] = 1  # who writes just now may have said so before it was taken back, and not marked the chunk yet
    segment.doubts[0] += 1


def doubt_all(segment: Segment) -> None:
    """Nothing of its data file is certain any more, for all who use it.

    Raises CacheError when not all of them can be told now: `syncing` is set still.
    """
    segment.syncing[0] = 1  # killed here, the next one does all of it
    doubt(segment)
    for other in segments_of(segment.identity.dev, segment.identity.ino):
        if other.identity.file == segment.identity.file:
            other.lost[0] = 0  # before: what is lost from here on is doubted again
            doubt(other)
    segment.syncing[0] = 0
