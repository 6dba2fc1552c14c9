"""What a front end asks for: pieces of chunks (BlobIoDesc), in the order of the bytes wanted (BlobIoVec).

A `BlobIoDesc` is what a bootstrap calls an `Extent`: the two names are one type, the second being the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nydusd.formats.model import ChunkRecord, Extent

BlobIoDesc = Extent
BlobIoVec = Sequence[Extent]
BlobIoChunk = ChunkRecord


class ChunkRun(NamedTuple):
    """Consecutive chunks of one blob; `blob` is an index in the image's blob table or a handle, as the context says."""

    blob: int
    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls


def runs_of(vec: Sequence[Extent]) -> list[ChunkRun]:
    """All chunks that `vec` touches, as runs of consecutive ones."""
    runs: list[ChunkRun] = []
    for extent in vec:
        if runs:
            blob, first, count = runs[-1]
            if blob == extent.blob and first <= extent.chunk <= first + count:
                runs[-1] = ChunkRun(blob, first, max(count, extent.chunk - first + 1))
                continue
        runs.append(ChunkRun(extent.blob, extent.chunk, 1))
    return runs
