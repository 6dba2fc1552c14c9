"""A worker's whole life with a blob, killed at each point that it passes: what it leaves is believed only where it is true.

In processes forked from the test: the jobs themselves, without a daemon. `test_kill_points.py` does the same to daemons.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nydusd import points
from nydusd.formats.model import ChunkFlag
from nydusd.storage.state import map_file
from nydusd.storage.state.chunk_map import ChunkMap
from nydusd.storage.state.names import inode_of, names
from nydusd.storage.state.segment import EMPTY, PENDING, READY, RECORD, VERIFY
from tests.support.segments import in_child, join
from tests.workers.harness import Jobs, jobs
from workers.evict import evict, survey

NAME = "v6-zstd-blake3"
"""With chunk information in the blob, which is stored beside the cache file."""
SOME, GONE = range(4), [1, 2]
"""Chunks that are filled at first, and those of them that are taken out again."""
ALL = os.environ.get("KILL_POINTS") == "all"
_seen: set[str] = set()


def nothing(made: Jobs) -> None:
    """Nobody has used the blob yet."""


def begin(made: Jobs) -> None:
    """The blob is opened, some of its chunks are claimed, filled, and stored in the map."""
    made.prepare()
    with made.segment() as segment:
        ChunkMap(segment).check_ready_and_mark_pending(SOME[:2])
    made.fill(SOME)
    made.checkpoint()


def fill_up(made: Jobs) -> None:
    """Nothing is missing, in the file and in the map."""
    begin(made)
    made.fill_all()
    made.checkpoint()


def make_room(made: Jobs) -> None:
    """Chunks are taken out, and come back. A map that was complete is so again."""
    with made.segment() as segment:
        ChunkMap(segment).claim_ready(GONE)
        segment.epoch[0] += 1
        covered = {made.prefix: inode_of(made.prefix)}
        job = made._take(chunks=GONE, covered=covered, strays={}, pids=[os.getpid(), os.getppid()])
        assert "stored" in evict(made.open, job)
        for chunk in GONE:
            ChunkMap(segment).clear_pending(chunk)
    made.fill(GONE)
    made.checkpoint()


def again(made: Jobs) -> None:
    """The blob is opened once more by the same daemon, which knows what is ready; then one that nobody uses is removed."""
    made.generation += 1
    made.prepare()
    made.new_daemon()
    job = {"folder": str(made.work_dir), "limit": 0, "target": 0, "unused": True, "mounted": {}, "now": 0, "keep": 0}
    answer = survey(made.open, job | {"strays": {}, "pids": [os.getpid(), os.getppid()]})
    assert answer["removed"] == [made.info.blob_id]


LIVES = {
    "begin": (nothing, begin),
    "make room": (begin, make_room),
    "complete": (fill_up, make_room),
    "end": (begin, again),
}
"""What has been done, and then the part of a worker's life in which it is killed."""


@contextmanager
def blob() -> Iterator[Jobs]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-k-") as folder, jobs(NAME, Path(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def plain() -> bytes:
    """What belongs into the cache file."""
    with blob() as made:
        made.prepare()
        made.fill_all()
        assert made.wrong_files() == []
        return made.data.read_bytes()


def true_claims(made: Jobs, plain: bytes) -> int:
    """How many chunks are said to be ready; AssertionError unless the cache file has the bytes of each."""
    with made.segment() as segment:
        state = bytes(segment.state)
        data = made.data.read_bytes()
        for chunk, (_, at, _, size, *_) in enumerate(RECORD.iter_unpack(bytes(segment.records))):
            assert state[chunk] in (EMPTY, PENDING, READY, VERIFY)
            assert state[chunk] != READY or data[at : at + size] == plain[at : at + size], chunk
            if state[chunk] == VERIFY:
                assert segment.record(chunk).flags & ChunkFlag.DIGEST
    return state.count(READY)


def stored_claims(made: Jobs) -> int:
    """How many bits are set in the map on disk."""
    try:
        bits = made.spec.map_path.read_bytes()[map_file.HEADER_SIZE :]
    except FileNotFoundError:
        return 0
    return sum(byte.bit_count() for byte in bits)


def lives(made: Jobs, life: str, number: int) -> list[str]:
    """Live this part of a life in a child, killed at its `number`-th point (0: at none). The points that it passed."""
    before, part = LIVES[life]
    assert join(in_child(lambda: before(made))) == 0
    path = made.folder / "passed"

    def live() -> None:
        def reach(name: str) -> None:
            with open(path, "a") as passed:
                passed.write(f"{name}\n")
            if len(path.read_text().splitlines()) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        vars(points)["reach"] = reach
        part(made)

    assert join(in_child(live)) == (-signal.SIGKILL if number else 0), (life, number)
    return path.read_text().splitlines()


def check(made: Jobs, plain: bytes, *, same_boot: bool) -> None:
    """What a successor finds is true, it can do all that is to be done, and then nothing else is there than always."""
    if same_boot and made.prefix in names(made.prefix[1:]):
        with made.segment() as segment, segment.lock():
            pass  # whoever held it is dead
    made.new_daemon(same_boot=same_boot)
    made.prepare()
    true_claims(made, plain)
    made.fill(SOME)
    made.checkpoint()
    with made.segment() as segment, segment.lock():
        ready = bytes(segment.state)[SOME.start : SOME.stop].count(READY)
    assert len(SOME) == ready <= true_claims(made, plain) == stored_claims(made)
    data = made.data.name
    assert {path.name for path in made.work_dir.iterdir()} == {
        *(data, f"{data}.chunk_map", f"{data}.chunk_map.nydusd"),
        f"{made.info.blob_id}.blob.meta",
    }
    assert list(made.meta_dir.iterdir()) == []
    assert len(names(made.prefix[1:])) == 2  # the segment and its lock


@pytest.mark.parametrize("life", LIVES)
def test_worker_killed_at_any_point_leaves_only_what_is_true(life: str, plain: bytes) -> None:
    """The first time that it passes each point, or each time (KILL_POINTS=all); with its shared memory, then without."""
    with blob() as made:
        passed = lives(made, life, 0)
    assert len(passed) > 5
    for number, name in enumerate(passed, 1):
        if not ALL and name in _seen:
            continue
        _seen.add(name)
        for same_boot in (True, False) if ALL else (number % 2 == 0,):
            with blob() as made:
                assert lives(made, life, number) == passed[:number]
                check(made, plain, same_boot=same_boot)
