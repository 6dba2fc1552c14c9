"""The jobs `survey` and `evict`: what is removed, what is taken out, and what stays because somebody uses it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from nydusd.errors import ScarceError, StaleCacheError
from nydusd.ipc.messages import Json
from nydusd.storage.state import gone, map_file
from nydusd.storage.state.lock import start_time
from nydusd.storage.state.names import inode_of, names, remove
from nydusd.storage.state.segment import EMPTY, PENDING, READY, Identity, Segment
from tests.support.segments import die_at, in_child, join, make_segment
from tests.workers.harness import Jobs, jobs
from workers.evict import evict, survey

NAME = "v6-zstd-blake3"


@pytest.fixture
def filled(folder: Path) -> Iterator[Jobs]:
    """A blob with all its chunks in the cache file and in the stored map."""
    with jobs(NAME, folder) as made:
        made.prepare()
        made.fill_all()
        made.checkpoint()
        yield made


def take_out(made: Jobs, chunks: list[int]) -> Json:
    """As the supervisor does: claim, epoch, job, end of the claims."""
    with made.segment() as segment:
        for chunk in chunks:
            segment.state[chunk] = PENDING
        segment.epoch[0] += 1
    answer = evict(made.open, evict_job(made, chunks))
    with made.segment() as segment:
        for chunk in chunks:
            segment.state[chunk] = READY if "kept" in answer else EMPTY
    return answer


def evict_job(made: Jobs, chunks: list[int], strays: Mapping[str, int] = MappingProxyType({})) -> Json:
    """The job for chunks that are claimed in the segment that there is now, and in no other."""
    covered = {made.prefix: inode_of(made.prefix)}
    return made._take(chunks=chunks, covered=covered, strays=dict(strays), pids=[os.getpid()])


def stored(made: Jobs) -> set[int]:
    with made.segment() as segment:
        state = map_file.load(made.spec.map_path, segment.count, segment.identity)
    return {chunk for chunk, value in enumerate(state) if value == READY}


def identity_of(path: Path) -> Identity:
    fd = os.open(path, os.O_RDONLY)
    try:
        return Identity.of(fd, path.stat().st_size)
    finally:
        os.close(fd)


@contextlib.contextmanager
def other_daemon(made: Jobs, *, mapped: bool = True) -> Iterator[str]:
    """A segment of another instance that speaks of the same data file; gives its name."""
    name = f"/nydusd.other{os.getpid()}.0123"
    segment = make_segment(name, 3, identity=identity_of(made.data))
    if not mapped:
        segment.close()
    try:
        yield name
    finally:
        if mapped:
            segment.close()
        remove(name)


def replace_when_locked(data: Path, aside: Path, patch: pytest.MonkeyPatch) -> None:
    """As soon as somebody has the lock of a data file, another file has its name, and it has another."""
    lock = map_file.lock

    def locked(fd: int) -> None:
        lock(fd)
        if not aside.exists():
            data.rename(aside)
            data.write_bytes(b"new")

    patch.setattr(map_file, "lock", locked)


def test_segment_that_a_killed_worker_has_not_published_is_nobodys(filled: Jobs) -> None:
    """Whichever process has its pid now: who makes one has the lock of the data file."""
    name, me = f"/nydusd.{os.getpid():012x}.{0:016x}", os.getpid()

    def die_over_it() -> None:
        die_at("segment: written")
        make_segment(name, 3, identity=identity_of(filled.data))

    assert join(in_child(die_over_it)) == -signal.SIGKILL
    try:
        (left,) = names(name[1:])
        reused = Path(f"/dev/shm{name}.{me}")
        Path(f"/dev/shm{left}").rename(reused)
        assert take_out(filled, [0])["evicted"] == 1
        assert names(name[1:]) == []
    finally:
        for left in names(name[1:]):
            remove(left)
    filled.fill_all()
    assert filled.wrong_files() == []


class TestDaemonThatIsGone:
    """The other daemon was killed; its lock file is there."""

    @pytest.fixture(autouse=True)
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        root = tmp_path / "root"
        (root / f"other{os.getpid()}").mkdir(parents=True)
        self.lock(root).touch()
        monkeypatch.setenv("NYDUSD_RUNTIME_DIR", str(root))
        return root

    def lock(self, root: Path) -> Path:
        return root / f"other{os.getpid()}.lock"

    def test_its_blobs_are_everybodys_and_nobody_believes_it_later(self, filled: Jobs) -> None:
        with other_daemon(filled, mapped=False) as name:
            assert take_out(filled, [0])["evicted"] == 1
            assert not inode_of(name)
        filled.fill_all()
        assert filled.wrong_files() == []

    def test_it_counts_while_anybody_maps_what_it_knew(self, filled: Jobs) -> None:
        with other_daemon(filled) as name:
            assert take_out(filled, [0]) == {"kept": name}
            assert inode_of(name)

    def test_it_counts_while_it_lives(self, filled: Jobs, root: Path) -> None:
        with other_daemon(filled, mapped=False) as name, self.lock(root).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert take_out(filled, [0]) == {"kept": name}

    def test_it_counts_where_its_lock_cannot_be_seen(self, filled: Jobs, root: Path) -> None:
        self.lock(root).unlink()
        with other_daemon(filled, mapped=False) as name:
            assert take_out(filled, [0]) == {"kept": name}

    @pytest.mark.parametrize("as_holder", [False, True])
    def test_it_counts_while_one_of_its_processes_lives(
        self, filled: Jobs, root: Path, monkeypatch: pytest.MonkeyPatch, as_holder: bool
    ) -> None:
        me = os.getpid(), start_time(os.getpid())
        dead = me[0], me[1] + 1
        holders = [{"pid": me[0], "start": me[1]}] if as_holder else []
        state = root / f"other{os.getpid()}" / "state.json"
        with other_daemon(filled, mapped=False) as name:
            state.write_text(json.dumps({"processes": [dead if as_holder else me], "holders": holders}))
            assert take_out(filled, [0]) == {"kept": name}
            state.write_text("not a record")
            assert take_out(filled, [0]) == {"kept": name}
            state.write_text(json.dumps({"processes": [dead]}))
            with monkeypatch.context() as patch:
                patch.setattr(gone, "start_time", lambda _pid: -1)  # cannot be told
                assert take_out(filled, [0]) == {"kept": name}
            assert take_out(filled, [0])["evicted"] == 1

    def test_it_counts_while_the_kernel_may_read_its_files(
        self, filled: Jobs, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bdi = tmp_path / "bdi"
        (bdi / "erofs-7").mkdir(parents=True)
        monkeypatch.setattr(gone, "_BDI", bdi)
        self.lock(root).with_suffix(".erofs.json").touch()
        with other_daemon(filled, mapped=False) as name:
            assert take_out(filled, [0]) == {"kept": name}
            (bdi / "erofs-7").rmdir()
            assert take_out(filled, [0])["evicted"] == 1


class TestEvict:
    def test_space_is_given_back_and_the_map_knows(self, filled: Jobs) -> None:
        before = filled.data.stat()
        every = stored(filled)
        with filled.segment() as segment:
            sizes = [segment.record(chunk).usize for chunk in range(segment.count)]
        chunks = [chunk for chunk in sorted(every) if sizes[chunk] > 8192][:3]
        answer = take_out(filled, chunks)
        after = filled.data.stat()
        assert answer["evicted"] == len(chunks)
        assert answer["bytes"] == sum(sizes[chunk] for chunk in chunks)
        assert (after.st_size, after.st_ino) == (before.st_size, before.st_ino)
        freed = (before.st_blocks - after.st_blocks) * 512
        assert answer["bytes"] - len(chunks) * 8192 <= freed <= answer["bytes"] + len(chunks) * 4096
        assert stored(filled) == every - set(chunks)
        assert answer["stored"] == len(every) - len(chunks)

    def test_every_file_is_right_after_any_chunks_went_and_came_back(self, filled: Jobs) -> None:
        every = sorted(stored(filled))
        for part in (every[::2], every[1::3], every):
            take_out(filled, part)
            assert filled.wrong_files()
            filled.fill_all()
            assert filled.wrong_files() == []

    def test_next_daemon_finds_the_rest_and_fetches_what_is_gone(self, filled: Jobs) -> None:
        every = stored(filled)
        chunks = sorted(every)[5:50]
        take_out(filled, chunks)
        filled.new_daemon()
        assert filled.prepare()["ready"] == len(every) - len(chunks)
        filled.fill_all()
        assert filled.wrong_files() == []

    def test_daemon_killed_in_the_middle_loses_no_byte(self, filled: Jobs) -> None:
        """The chunks are claimed, the worker has done its part, nobody hears of it."""
        every = stored(filled)
        chunks = sorted(every)[:10]
        with filled.segment() as segment:
            for chunk in chunks:
                segment.state[chunk] = PENDING
        evict(filled.open, evict_job(filled, chunks))
        filled.new_daemon(same_boot=True)
        assert filled.prepare()["ready"] == len(every) - len(chunks)
        filled.fill_all()
        assert filled.wrong_files() == []

    def test_twice_is_as_once(self, filled: Jobs) -> None:
        chunks = sorted(stored(filled))[:4]
        first = take_out(filled, chunks)
        assert take_out(filled, chunks)["stored"] == first["stored"]

    def test_blob_that_another_daemon_uses_stays(self, filled: Jobs) -> None:
        before = filled.data.stat().st_blocks
        every = stored(filled)
        with other_daemon(filled):
            assert "/nydusd.other" in take_out(filled, sorted(every))["kept"]
        assert (filled.data.stat().st_blocks, stored(filled)) == (before, every)
        assert filled.wrong_files() == []

    def test_blob_that_a_strange_process_has_open_stays(self, filled: Jobs) -> None:
        code = "import sys; f = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", code, str(filled.data)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as strange:
            assert strange.stdout is not None
            strange.stdout.readline()
            answer = take_out(filled, [0])
            strange.communicate()
        assert answer["kept"] == f"process {strange.pid}"
        assert filled.wrong_files() == []

    def test_blob_stays_when_it_cannot_be_seen_who_has_it_open(
        self, filled: Jobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, real = filled.data.stat().st_blocks, os.scandir

        def scandir(path: Path) -> Any:
            if str(path).startswith("/proc/"):
                raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(ScarceError):
            take_out(filled, [0])
        assert filled.data.stat().st_blocks == before

    def test_blob_that_another_daemon_uses_stays_whatever_has_its_name_by_now(
        self, filled: Jobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its readers have that file open, and not the new one."""
        before, aside = filled.data.stat().st_blocks, filled.data.with_name("aside")
        replace_when_locked(filled.data, aside, monkeypatch)
        with other_daemon(filled) as name:
            assert take_out(filled, [0]) == {"kept": name}
        assert aside.stat().st_blocks == before

    def test_what_cannot_be_given_back_stays_cached(self, tmp_path: Path) -> None:
        """It would be fetched again and again, and the folder be as full as before."""
        subprocess.run(["mount", "-t", "ramfs", "none", str(tmp_path)], check=True)
        try:
            with jobs(NAME, tmp_path) as made:
                made.prepare()
                made.fill_all()
                made.checkpoint()
                every = stored(made)
                assert take_out(made, [0, 1]) == {"kept": "a file system without holes"}
                assert stored(made) == every
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)

    def test_segment_that_was_replaced_takes_nothing_out(self, filled: Jobs) -> None:
        """A worker of a daemon that was killed, while its successor has begun."""
        before = filled.data.stat().st_blocks
        job = evict_job(filled, [1, 2])
        assert filled.open._blobs[7].segment
        with filled.segment() as segment:
            fresh = Segment.create(
                filled.prefix,
                generation=1,
                identity=segment.identity,
                records=bytes(segment.records),
                digests=bytes(32 * segment.count),
                contexts=bytes(segment.contexts),
                dict_offset=0,
                dict_size=0,
                state=bytes(segment.state),
            )
        fresh.close()
        with pytest.raises(StaleCacheError):
            evict(filled.open, job)
        assert filled.data.stat().st_blocks == before

    def test_old_segment_is_retired_by_prepare(self, filled: Jobs) -> None:
        device = filled.device()
        ino = filled.files()[b"sizes/4097"]
        vec = filled.bootstrap.extents(ino, 0, 4097)
        assert device.missing(vec) == []
        filled.generation = 2
        filled.prepare()
        take_out(filled, sorted(stored(filled)))
        assert device.missing(vec) != []
        device.close()


class TestSurvey:
    def ask(self, made: Jobs, limit: int, *, mounted: bool = True, **more: object) -> Json:
        own = {made.info.blob_id: [{"handle": 7, "segment": made.prefix}]} if mounted else {}
        job: Json = {"folder": str(made.work_dir), "limit": limit, "target": limit, "unused": False, "mounted": own}
        return survey(made.open, job | {"now": 1000, "keep": 10, "strays": {}, "pids": [os.getpid()]} | more)

    def other(self, made: Jobs, name: str, used: int) -> Path:
        data = made.work_dir / f"{name}.blob.data"
        data.write_bytes(b"x" * 65536)
        for suffix in (".chunk_map", ".chunk_map.nydusd", ".chunk_map.bad", ".bad"):
            (made.work_dir / f"{name}.blob.data{suffix}").write_bytes(b"m")
        (made.work_dir / f"{name}.blob.meta").write_bytes(b"m")
        os.utime(data, (used, used))
        return data

    def left(self, made: Jobs) -> set[str]:
        return {path.name.partition(".")[0] for path in made.work_dir.iterdir()}

    def test_below_the_limit_nothing_happens(self, filled: Jobs) -> None:
        used = filled.data.stat().st_blocks * 512
        answer = self.ask(filled, used)
        assert answer == {"used": used, "removed": [], "freed": 0, "victims": {}}

    def test_file_that_has_taken_the_place_of_an_unused_one_stays(
        self, filled: Jobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who has made it has it locked, and is about to use it."""
        data = self.other(filled, "gone", 100)
        replace_when_locked(data, filled.folder / "aside", monkeypatch)
        assert self.ask(filled, filled.data.stat().st_blocks * 512)["removed"] == []
        assert data.read_bytes() == b"new" and data.with_name(f"{data.name}.chunk_map").exists()

    def test_unused_blobs_go_first_the_least_recently_used_of_them_before_others(self, filled: Jobs) -> None:
        used = filled.data.stat().st_blocks * 512
        for name, when in (("new", 300), ("old", 100), ("mid", 200)):
            self.other(filled, name, when)
        answer = self.ask(filled, used + 65536)
        assert answer == {"used": used + 65536, "removed": ["old", "mid"], "freed": 131072, "victims": {}}
        assert self.left(filled) == {filled.info.blob_id, "new"}

    def test_all_unused_go_when_asked_for(self, filled: Jobs) -> None:
        self.other(filled, "one", 5)
        assert self.ask(filled, 1 << 40, unused=True)["removed"] == ["one"]
        assert self.left(filled) == {filled.info.blob_id}

    def test_unused_blob_that_another_daemon_uses_stays(self, filled: Jobs) -> None:
        with other_daemon(filled):
            answer = self.ask(filled, 0, mounted=False)
        assert (answer["removed"], answer["victims"]) == ([], {})
        assert filled.data.exists()
        remove(filled.prefix)  # or it is in use by ourselves, since the survey was ordered
        assert self.ask(filled, 0, mounted=False)["removed"] == [filled.info.blob_id]
        assert self.left(filled) == set()

    def test_chunks_go_in_the_order_of_their_last_use_and_fresh_ones_stay(self, filled: Jobs) -> None:
        used = filled.data.stat().st_blocks * 512
        with filled.segment() as segment:
            for chunk in range(segment.count):
                segment.touched[chunk] = 980 - chunk
            for chunk in range(200, segment.count):
                segment.touched[chunk] = 995  # within `keep`
            segment.state[199] = EMPTY
            sizes = [segment.record(chunk).usize for chunk in range(segment.count)]
        (victims,) = self.ask(filled, used - 1, target=used - sizes[198] - sizes[197] + 1)["victims"].values()
        assert victims == [197, 198]
        (victims,) = self.ask(filled, 0)["victims"].values()
        assert victims == list(range(199))

    def test_folder_that_is_not_there_is_empty(self, filled: Jobs) -> None:
        answer = self.ask(filled, 0, folder=str(filled.work_dir / "none"), mounted=False)
        assert answer["used"] == 0
