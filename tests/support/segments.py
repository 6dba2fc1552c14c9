"""Invented blob segments and forked children, for tests of the shared state."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from nydusd import points
from nydusd.storage.state.names import names, remove
from nydusd.storage.state.segment import EMPTY, RECORD, Identity, Segment


class Place(NamedTuple):
    """A chunk of an invented blob; `flags` are those of `ChunkFlag`, `ctx` the context of a grouped one."""

    uoff: int
    usize: int
    csize: int = 0
    flags: int = 0
    ctx: int = 0


@contextlib.contextmanager
def segment_name() -> Iterator[str]:
    """A name nobody else uses; what has it afterwards is removed."""
    name = f"/nydusd.test-{uuid.uuid4().hex[:12]}"
    try:
        yield name
    finally:
        for left in names(name[1:]):
            remove(left)


def make_segment(
    name: str,
    chunks: int | Sequence[Place],
    *,
    state: bytes | None = None,
    identity: Identity | None = None,
    generation: int = 1,
) -> Segment:
    """A segment of `chunks` chunks: a number of them, 100 bytes each, or the places themselves."""
    places = [Place(100 * i, 100) for i in range(chunks)] if isinstance(chunks, int) else chunks
    size = max((p.uoff + p.usize for p in places), default=0)
    return Segment.create(
        name,
        generation=generation,
        identity=identity or Identity(0, 0, size),
        records=b"".join(RECORD.pack(p.uoff, p.uoff, p.csize, p.usize, p.flags, p.ctx, 0, 0) for p in places),
        digests=bytes(32 * len(places)),
        contexts=b"",
        dict_offset=0,
        dict_size=0,
        state=bytes([EMPTY]) * len(places) if state is None else state,
    )


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; gives its pid. Its exit status is 0 unless `work` raised."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def die_at(point: str) -> None:
    """Have this process, a forked child, killed when it comes to a point."""

    def reach(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    vars(points)["reach"] = reach


def join(pid: int) -> int:
    """Wait for a child; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
