"""Several tables of chunks over one cache file: those that agree share it, others do not touch it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nydusd import points
from nydusd.errors import CacheError, ScarceError
from nydusd.formats.model import ChunkFlag
from nydusd.storage.state import doubts, map_file, sharing
from nydusd.storage.state.names import inode_of, remove
from nydusd.storage.state.segment import EMPTY, PENDING, READY, RECORD, TAKEN_OVER, VERIFY, Segment, file_of
from tests.workers.harness import Jobs, jobs
from workers.evict import evict, survey

NAME = "v6-zstd-blake3"
UNLISTED = int(ChunkFlag.UNLISTED)


@pytest.fixture
def made(folder: Path) -> Iterator[Jobs]:
    with jobs(NAME, folder) as image:
        image.prepare()
        image.fill_all()
        yield image


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


@pytest.mark.parametrize(
    ("record", "digest", "why"),
    [
        (None, None, ""),
        ({"usize": 0, "csize": 0, "flags": 0}, None, ""),
        ({"coff": 1}, None, "another place"),
        ({"flags": 0}, None, "another digest|another place"),
        (None, b"d" * 32, "another digest"),
        ({"uoff": 0}, None, "over the one before|another place"),
    ],
)
def test_only_tables_that_agree_share_a_file(
    made: Jobs, record: dict[str, int] | None, digest: bytes | None, why: str
) -> None:
    with twin(made, 7, record, digest):
        said = again(made)
    assert not said if not why else any(part in said for part in why.split("|"))


def test_difference_behind_what_is_compared_first_is_found(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_PIECE", 64)
    with made.segment() as segment:
        last = segment.count - 1
    with twin(made, last, None, b"d" * 32):
        assert "another digest" in again(made)
    with twin(made):
        assert again(made) == ""


def test_image_of_a_daemon_that_is_gone_contradicts_nobody(
    made: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYDUSD_RUNTIME_DIR", str(tmp_path))
    with twin(made, 7, {"coff": 1}) as other:
        path = Path("/dev/shm", other.name[1:])
        kept = path.read_bytes()
        (tmp_path / f"other{os.getpid()}.lock").touch()
        assert "another place" in again(made)  # somebody maps it
    path.write_bytes(kept)
    assert not again(made)
    assert not path.exists()


def test_chunk_over_another_ones_place_is_a_contradiction(made: Jobs) -> None:
    """A table may leave out a chunk and give its place to the next."""
    with made.segment() as segment:
        before, after = segment.record(7), segment.record(8)
    record = {"uoff": before.uoff, "usize": after.usize}
    with twin(made, 7, {"usize": 0, "csize": 0, "flags": 0}), twin_of(made, 8, record):
        assert again(made)


@contextlib.contextmanager
def twin_of(made: Jobs, chunk: int, record: dict[str, int]) -> Iterator[None]:
    """Of the other image's segment, one chunk more."""
    other = Segment.open(f"/nydusd.other{os.getpid()}.0123456789abcdef")
    assert other is not None
    RECORD.pack_into(other.records, chunk * 40, *other.record(chunk)._replace(**record))
    with made.segment() as own:
        RECORD.pack_into(own.records, chunk * 40, *own.record(chunk)._replace(usize=0))
    yield
    other.close()


def test_chunks_that_another_image_has_are_ready_and_those_of_other_digests_are_not(made: Jobs) -> None:
    with made.segment() as segment:
        flags = segment.record(3).flags & ~int(ChunkFlag.DIGEST | ChunkFlag.CRC) | UNLISTED
    with twin(made, 3, {"flags": flags, "crc": 0}, bytes(32)) as other:
        for chunk in (2, 3, 4):
            other.state[chunk] = READY
        assert again(made) == ""
        assert [made.states()[chunk] for chunk in (1, 2, 3, 4)] == [EMPTY, READY, EMPTY, READY]


def test_record_of_another_table_is_gone_before_the_file_can_be_written(made: Jobs) -> None:
    """As a hostile image's daemon, killed before its first checkpoint, would leave it to the next."""
    made.checkpoint()
    record = map_file.record_path(made.spec.map_path)
    raw = record.read_bytes()
    layout = map_file.recorded_layout(made.spec.map_path)
    assert layout
    head, _, bits = raw.partition(b"\n")
    record.write_bytes(head.replace(layout.encode(), b"ab" * 32) + b"\n" + bits)
    again(made)
    assert not record.exists()
    assert set(made.states()) == {VERIFY}


def test_lock_that_somebody_keeps_costs_the_cache_file_and_no_read(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_file, "_LOCK_PATIENCE", 0.05)
    fd = os.open(made.data, os.O_RDWR)
    fcntl.fcntl(fd, 37, struct.Struct("hhqqi4x").pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    try:
        assert "keeps its lock" in again(made)
    finally:
        os.close(fd)
    assert again(made) == ""


class _KilledError(BaseException):
    pass


@pytest.mark.parametrize("point", ["segment: former retired", "segment: named", "prepare: published"])
def test_worker_killed_over_a_new_segment_leaves_no_old_view(
    made: Jobs, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    device = made.device()
    ino = made.files()[b"sizes/4097"]
    vec = made.bootstrap.extents(ino, 0, 4097)
    assert device.missing(vec) == []
    made.generation = 2

    def killed(name: str) -> None:
        if name == point:
            raise _KilledError

    with monkeypatch.context() as patch:
        patch.setattr(points, "reach", killed)
        with pytest.raises(_KilledError):
            made.prepare()
    made.prepare()
    made.fill_all()
    chunk = vec[0].chunk
    with made.segment() as segment:
        segment.state[chunk] = PENDING
        segment.epoch[0] += 1
    covered = {made.prefix: inode_of(made.prefix)}
    assert "evicted" in evict(made.open, made._take(chunks=[chunk], covered=covered, strays={}, pids=[os.getpid()]))
    assert device.missing(vec) != []
    device.close()
    for path in Path("/dev/shm").glob(f"{made.prefix[1:]}.*"):
        path.unlink()


def test_retired_segment_that_has_its_name_still_is_not_read_from(made: Jobs) -> None:
    device = made.device()
    ino = made.files()[b"sizes/4097"]
    vec = made.bootstrap.extents(ino, 0, 4097)
    with made.segment() as segment:
        segment.retire()
    assert device.missing(vec) != []
    device.close()


class TestEvictionBesideOthers:
    def job(self, made: Jobs, *covered: str, strays: tuple[str, ...] = ()) -> dict[str, object]:
        names = {name: inode_of(name) for name in (made.prefix, *covered)}
        return made._take(
            chunks=[1], covered=names, strays={name: inode_of(name) for name in strays}, pids=[os.getpid()]
        )

    def test_segment_of_our_own_in_which_nothing_was_claimed_keeps_the_chunks(self, made: Jobs) -> None:
        """Another configuration's: its readers would read the hole."""
        with twin(made) as other:
            assert evict(made.open, self.job(made))["kept"] == other.name
            assert evict(made.open, self.job(made, other.name))["evicted"] == 1

    def test_segment_that_was_opened_anew_since_keeps_them(self, made: Jobs) -> None:
        with twin(made) as other:
            job = self.job(made, other.name)
            remove(other.name)
            with twin(made) as fresh:
                assert evict(made.open, job)["kept"] == fresh.name

    def test_segment_that_an_earlier_life_left_does_not_and_ends(self, made: Jobs) -> None:
        with twin(made) as other:
            assert evict(made.open, self.job(made, strays=(other.name,)))["evicted"] == 1
            assert inode_of(other.name) == 0

    def test_blob_mounted_since_the_survey_was_ordered_stays(self, made: Jobs) -> None:
        job = {"folder": str(made.work_dir), "limit": 1, "target": 0, "unused": True, "mounted": {}}
        answer = survey(made.open, job | {"now": 10**6, "keep": 0, "strays": {}, "pids": [os.getpid()]})
        assert answer["removed"] == [] and made.data.exists()

    def test_process_that_has_the_file_by_another_path_keeps_it(self, made: Jobs) -> None:
        link = made.work_dir / "link"
        os.link(made.data, link)
        code = "import sys; f = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", code, str(link)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as strange:
            assert strange.stdout is not None
            strange.stdout.readline()
            answer = evict(made.open, self.job(made))
            strange.communicate()
        assert answer["kept"] == f"process {strange.pid}"


def test_sync_that_nobody_heard_the_end_of_makes_all_doubtful(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is killed when the kernel had told it, and nobody else ever, that data was lost."""

    def killed(_fd: int) -> None:
        raise _KilledError

    with twin(made) as other:
        other.state[5] = READY
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", killed)
            with pytest.raises(_KilledError):
                made.checkpoint()
        assert made.checkpoint() == {"stored": 0}
        assert set(made.states()) == {VERIFY} and other.state[5] == VERIFY


@pytest.mark.parametrize("mark", ["syncing", "lost"])
def test_loss_that_another_image_heard_of_is_doubted_before_anything_is_stored(
    made: Jobs, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    """The kernel does not tell it again to a worker that opens the file after that, so that one's sync ends well."""
    synced = os.fdatasync

    def look(fd: int) -> None:
        monkeypatch.setattr(os, "fdatasync", synced)
        assert set(made.states()) == {VERIFY} and other.state[5] == VERIFY
        assert other.syncing[0] == 1 and other.dirty[0] == other.lost[0] == 0
        synced(fd)

    with twin(made) as other:
        other.state[5] = READY
        getattr(other, mark)[0] = 1
        monkeypatch.setattr(os, "fdatasync", look)
        assert made.checkpoint() == {"stored": 0}
        assert other.syncing[0] == 0 and other.doubts[0] == 2


def test_sync_of_a_file_is_of_what_all_images_have_in_it(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is just being made looks for itself."""
    with twin(made) as other:
        other.state[5] = READY
        other.dirty[0] = 1
        made.checkpoint()
        assert other.dirty[0] == other.syncing[0] == other.doubts[0] == 0
        other.dirty[0], other.syncing[0] = 1, TAKEN_OVER
        assert "others" not in made.checkpoint()
        assert (other.dirty[0], other.syncing[0], other.doubts[0]) == (1, TAKEN_OVER, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fails)
            with pytest.raises(CacheError):
                made.checkpoint()
        assert (other.dirty[0], other.syncing[0], other.doubts[0]) == (1, TAKEN_OVER, 2)


def fails(_fd: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_who_syncs_a_file_does_it_alone(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is killed at it holds up nobody; who does it for too long costs a checkpoint."""
    with open(made.data, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with monkeypatch.context() as patch:
            patch.setattr(doubts, "_PATIENCE", 0.05)
            with pytest.raises(CacheError, match="another process is syncing it"):
                made.checkpoint()
        assert set(made.states()) == {READY} and not made.spec.map_path.exists()
        made.prepare()  # nobody who only looks at it waits
    assert made.checkpoint()["stored"] == len(made.states())


def test_loss_that_a_front_end_heard_of_is_doubted_once_for_all(made: Jobs) -> None:
    """It has told all of them, for it does not know by which the file is synced."""
    with twin(made) as other, made.segment() as segment:
        other.state[5] = READY
        segment.lost[0] = other.lost[0] = 1
        made.checkpoint()
        assert set(segment.state) == {VERIFY} and other.state[5] == VERIFY
        assert segment.lost[0] == other.lost[0] == 0
        other.state[5] = READY
        assert made.checkpoint()["others"] == {other.name: (other.inode, 1)}


def test_checkpoint_tells_of_what_others_have_in_the_file(made: Jobs) -> None:
    made.checkpoint()
    with twin(made) as other:
        other.state[5] = READY
        with made.segment() as segment:
            segment.state[5] = EMPTY
        assert made.checkpoint()["others"] == {other.name: (other.inode, 1)}
        with made.segment() as segment:
            assert map_file.load(made.spec.map_path, segment.count, segment.identity)[5] == READY


def takes_over(made: Jobs, other: Segment, monkeypatch: pytest.MonkeyPatch, reach: Callable[[str], None]) -> None:
    """A new daemon opens the blob, of which another one has all; `reach` is called at each named point."""
    other.state[:] = bytes([READY]) * other.count
    remove(made.prefix)
    made.generation += 1
    monkeypatch.setattr(points, "reach", reach)
    made.prepare()


@pytest.mark.parametrize("what", ["doubts", "syncing", "lost", "gone", ""])
def test_what_was_doubted_while_it_was_taken_over_is_doubted(
    made: Jobs, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Who doubts may have looked for segments before the new one had its name."""
    real = points.reach

    def reach(point: str) -> None:
        real(point)
        if point == "segment: former retired" or (point == "segment: written" and not inode_of(made.prefix)):
            if what == "gone":
                remove(other.name)
            elif what:
                getattr(other, what)[0] += 1

    with twin(made) as other:
        takes_over(made, other, monkeypatch, reach)
        with made.segment() as segment:
            assert set(segment.state) == {VERIFY if what else READY}
            assert segment.syncing[0] == 0 and segment.doubts[0] == 0
        monkeypatch.undo()
        made.fill_all()
        assert made.wrong_files() == []


def test_what_is_doubted_while_it_is_being_published_is_not_left_half_doubted(
    made: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has the file synced begins with the new segment before its maker looks again, and ends after that."""
    real, begun, go_on = points.reach, threading.Event(), threading.Event()

    def doubts_it() -> None:
        with made.segment() as segment:
            doubts.doubt(segment)

    other_one = threading.Thread(target=doubts_it)

    def reach(point: str) -> None:
        real(point)
        if point == "prepare: taken over":
            other.doubts[0] += 2
            other_one.start()
            begun.wait()
        elif point == "doubts: begun" and threading.current_thread() is other_one:
            begun.set()
            go_on.wait()

    with twin(made) as other:
        takes_over(made, other, monkeypatch, reach)
        go_on.set()
        other_one.join()
        with made.segment() as segment:
            assert set(segment.state) == {VERIFY}
            assert segment.syncing[0] == 0 and not segment.doubts[0] % 2
        monkeypatch.undo()
        made.fill_all()
        assert made.wrong_files() == []


def test_who_is_killed_before_he_has_looked_again_has_it_doubted(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(point: str) -> None:
        if point == "prepare: taken over":
            raise _KilledError

    with monkeypatch.context() as patch:
        patch.setattr(points, "reach", killed)
        made.new_daemon(same_boot=True)
        with pytest.raises(_KilledError):
            made.prepare()
    made.prepare()
    assert set(made.states()) == {VERIFY}


def test_former_segment_that_was_doubted_while_it_was_taken_over_is_doubted(
    made: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = points.reach
    with made.segment() as former:

        def reach(point: str) -> None:
            real(point)
            if point == "segment: former retired":
                former.doubts[0] += 1

        monkeypatch.setattr(points, "reach", reach)
        made.new_daemon(same_boot=True)
        made.prepare()
    assert set(made.states()) == {VERIFY}


def test_old_view_of_a_file_that_cannot_be_used_now_is_retired(made: Jobs) -> None:
    """Others take chunks out of it meanwhile, and so do we when it can be used again."""
    device = made.device()
    ino = made.files()[b"sizes/4097"]
    vec = made.bootstrap.extents(ino, 0, 4097)
    assert device.missing(vec) == []
    with twin(made, 7, {"coff": 1}):
        made.generation += 1
        assert "uncached" in made.prepare()
        assert device.missing(vec) != []
    device.close()


def test_published_without_a_file_it_has_none(made: Jobs) -> None:
    with twin(made, 7, {"coff": 1}):
        again(made)
        with made.segment() as segment:
            assert segment.identity.ino == 0


class TestNothingCanBeOpenedNow:
    """File descriptors or memory are used up: what cannot be seen then may be there."""

    @pytest.fixture(params=["looked at", "mapped"])
    def scarce(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
        """Until it is undone, segments of others cannot be seen, as their names are new or they are too large."""
        real = Segment.open

        def look(path: Path) -> tuple[int, int] | None:
            if ".other" in path.name:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return file_of(path)

        def opened(name: str) -> Segment | None:
            if ".other" in name:
                raise ScarceError(name, errno.ENOMEM)
            return real(name)

        with monkeypatch.context() as patch:
            if request.param == "looked at":
                patch.setattr(sharing, "file_of", look)
            else:
                patch.setattr(Segment, "open", opened)
            yield patch

    def test_nothing_is_taken_out_and_the_next_one_sees_who_uses_it(
        self, made: Jobs, scarce: pytest.MonkeyPatch
    ) -> None:
        before = made.data.stat().st_blocks
        with twin(made) as other:
            job = TestEvictionBesideOthers().job(made)
            with pytest.raises(ScarceError):
                evict(made.open, job)
            unused = {"folder": str(made.work_dir), "limit": 1, "target": 0, "unused": True, "mounted": {}}
            pids = [os.getpid()]
            answer = survey(made.open, unused | {"now": 10**6, "keep": 0, "strays": {}, "pids": pids})
            assert answer["removed"] == [] and made.data.stat().st_blocks == before
            scarce.undo()
            assert evict(made.open, job)["kept"] == other.name

    def test_file_is_not_shared_with_whom_it_may_contradict(self, made: Jobs, scarce: pytest.MonkeyPatch) -> None:
        with twin(made, 7, {"coff": 1}):
            with pytest.raises(ScarceError):
                again(made)
            scarce.undo()
            assert "another place" in again(made)

    def test_checkpoint_stores_nothing_until_it_can_see_whether_another_heard_of_a_loss(
        self, made: Jobs, scarce: pytest.MonkeyPatch
    ) -> None:
        with twin(made) as other:
            other.state[5] = READY
            with pytest.raises(ScarceError):
                made.checkpoint()
            assert not made.spec.map_path.exists() and set(made.states()) == {READY}
            scarce.undo()
            assert made.checkpoint()["others"] == {other.name: (other.inode, 1)}

    def test_doubt_reaches_others_when_they_can_be_seen(self, made: Jobs, scarce: pytest.MonkeyPatch) -> None:
        with twin(made) as other:
            other.state[5] = READY
            with made.segment() as segment:
                segment.syncing[0] = 1
            with pytest.raises(ScarceError):
                made.checkpoint()
            assert set(made.states()) == {VERIFY} and other.state[5] == READY
            scarce.undo()
            made.checkpoint()
            assert other.state[5] == VERIFY
