"""A cache file that another image has, too."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from nydusd.formats.model import ChunkFlag
from nydusd.storage.state.names import inode_of, remove
from nydusd.storage.state.segment import EMPTY, RECORD, Segment
from tests.workers.harness import Jobs

UNLISTED = int(ChunkFlag.UNLISTED)


@contextlib.contextmanager
def twin(
    made: Jobs, chunk: int | None = None, record: dict[str, int] | None = None, digest: bytes | None = None
) -> Iterator[Segment]:
    """The segment of another image in the same cache file; of one chunk it says something else."""
    with made.segment() as segment:
        records, digests = bytearray(segment.records), bytearray(segment.digests)
        if chunk is not None:
            if record is not None:
                RECORD.pack_into(records, chunk * 40, *segment.record(chunk)._replace(**record))
            if digest is not None:
                digests[chunk * 32 : chunk * 32 + 32] = digest
        name = f"/nydusd.other{os.getpid()}.0123456789abcdef"
        other = Segment.create(
            name,
            generation=1,
            identity=segment.identity,
            records=bytes(records),
            digests=bytes(digests),
            contexts=bytes(segment.contexts),
            dict_offset=0,
            dict_size=0,
            state=bytes([EMPTY]) * segment.count,
        )
    try:
        yield other
    finally:
        other.close()
        remove(name)


def again(made: Jobs) -> str:
    """The blob is prepared as by a daemon that knows nothing; why it goes without the cache file, if so."""
    remove(made.prefix)
    made.generation += 1
    return str(made.prepare().get("uncached", ""))


def job_to_evict(made: Jobs, *covered: str, strays: tuple[str, ...] = ()) -> dict[str, object]:
    """A job that takes chunk 1 out of the file: `covered` are segments whose readers are told of it."""
    names = {name: inode_of(name) for name in (made.prefix, *covered)}
    return made._take(chunks=[1], covered=names, strays={name: inode_of(name) for name in strays}, pids=[os.getpid()])


class KilledError(BaseException):
    """A worker is killed here: nothing of it runs any more that would handle an error."""
