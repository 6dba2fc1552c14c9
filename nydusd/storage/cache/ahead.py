"""ReadAhead: what to fetch before readers of a blob ask for it, because they read on from where they are.

Plain tables of the supervisor. A few readers of one blob are told apart by where they are; each has a window, which grows
whenever its reader comes near the end of what was fetched ahead of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from nydusd.storage.cache.meta_info import BlobMetaInfo

_NEAR = 16
"""Chunks that a reader may skip and still count as sequential."""
_STREAMS = 4


@dataclass(eq=False, slots=True)
class _Stream:
    """A reader that was seen at chunk `start`, and for which all up to chunk `end` is there or under way."""

    start: int
    end: int
    window: int


class ReadAhead:
    """The sequential readers of one blob, the one that was seen last at the end."""

    def __init__(self) -> None:
        self._streams: list[_Stream] = []

    @property
    def window(self) -> int:
        """Compressed bytes that are fetched ahead of the reader seen last."""
        return self._streams[-1].window if self._streams else 0

    def forget(self) -> None:
        """Chunk numbers or states mean something else now."""
        self._streams.clear()

    def plan(self, meta: BlobMetaInfo, first: int, last: int, least: int, most: int, growth: int = 2) -> list[int]:
        """A reader is at chunks `first` to `last`: what is to be fetched behind them and is not ready.

        `least` compressed bytes are for a reader that was not seen before, `most` for one that goes on and on: each time
        `growth` times as many.
        """
        stream = next((s for s in reversed(self._streams) if s.start <= first <= s.end + _NEAR), None)
        if stream is None:
            stream = _Stream(first, last, 0)
            self._streams = self._streams[1 - _STREAMS :]
        else:
            self._streams.remove(stream)
        self._streams.append(stream)
        stream.start = first
        begin = max(last, stream.end)
        under_way = meta.distance(last, begin)
        if under_way > stream.window // 2:
            return []
        stream.window = max(least, min(stream.window * growth, most))
        chunks, stream.end = meta.ahead(begin, stream.window - under_way)
        return chunks
