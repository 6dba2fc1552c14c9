"""Parts of a supervisor that need no daemon: records, priorities, what a keeper sends, who is there at a stop."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn, cast

import pytest

from nydusd import priority
from nydusd.config import load_config
from nydusd.errors import CacheError
from nydusd.ipc.file_counters import FileCounters, files, make_tables
from nydusd.storage.cache.manager import segments_in
from nydusd.storage.state.names import inode_of, names, remove
from nydusd.supervisor import handover
from nydusd.supervisor.checked import read_checked, write_checked
from nydusd.supervisor.children import Child
from nydusd.supervisor.daemon import Supervisor
from nydusd.supervisor.engine import Engine
from nydusd.supervisor.image_memory import ImageMemory
from nydusd.supervisor.images import pace_of
from nydusd.supervisor.staff import Staff
from nydusd.supervisor.strays import remove_strays
from tests.support.discipline import wait_until
from tests.support.segments import die_at, in_child, join, make_segment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nydusd.forkserver.process import Process
    from nydusd.supervisor.family import Family
    from nydusd.supervisor.images import Image
    from nydusd.supervisor.pool import WorkerPool


@pytest.mark.parametrize("content", [{}, {"a": [1]}])
def test_a_record_is_read_as_it_was_written(tmp_path: Path, content: dict[str, object]) -> None:
    write_checked(tmp_path / "x.json", content)
    assert read_checked(tmp_path / "x.json") == content


def test_a_hurry_is_of_what_was_started_before_too_and_ends_for_all_threads_that_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(priority, "takes_over", lambda _: True)
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    code = "import threading; e = threading.Event(); threading.Thread(target=e.wait).start(); e.wait()"
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        try:

            def threads() -> list[int]:
                return sorted(map(int, os.listdir(f"/proc/{child.pid}/task")))

            wait_until(lambda: len(threads()) == 2, "a second thread")
            priority.hurry(*threads())
            everyone = [0, *threads()]
            hurried = {os.getpriority(os.PRIO_PROCESS, one) for one in everyone}
            listed = os.listdir
            # One ends when it was just listed.
            monkeypatch.setattr(os, "listdir", lambda path: [str(1 << 22), *listed(path)])
            priority.calm([child.pid])
            monkeypatch.setattr(os, "listdir", listed)
            assert hurried == {-20}
            assert {os.getpriority(os.PRIO_PROCESS, one) for one in everyone} == {usual}
        finally:
            child.send_signal(signal.SIGKILL)


def test_who_is_left_to_himself_in_a_hurry_does_not_keep_its_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priority, "takes_over", lambda _: True)
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    priority.hurry()
    try:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            priority.settle(child.pid)
            of_ours = os.getpriority(os.PRIO_PROCESS, child.pid)
            priority.release(child.pid)
            of_its_own = os.getpriority(os.PRIO_PROCESS, child.pid)
    finally:
        priority.calm([])
    assert (of_ours, of_its_own) == (-20, usual)


def test_a_guardian_starts_a_supervisor_at_the_priority_of_the_former_one() -> None:
    code = (
        "import os; from nydusd.forkserver.guardian import guard; end, other = os.pipe(); os.close(other)\n"
        "guard(end, {'delay': 0, 'command': [], 'environment': -1, 'nice': 7}); print(os.getpriority(os.PRIO_PROCESS, 0))"
    )
    assert subprocess.check_output([sys.executable, "-c", code]) == b"7\n"


def test_a_keeper_whose_state_trickles_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_PATIENCE", 0.2)
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def trickle() -> None:
        while not over.wait(0.01):
            theirs.send(b" ")

    with ours, theirs:
        ours.settimeout(30)
        sender = threading.Thread(target=trickle)
        sender.start()
        try:
            with pytest.raises(TimeoutError):
                handover.receive(ours, handover.FUSE_DEVICE)
        finally:
            over.set()
            sender.join()


def test_counters_of_a_second_supervisor_are_not_taken_for_the_segment_of_a_blob() -> None:
    prefix = "/nydusd.0123456789ab."
    segment = f"{prefix}a8fc3f9b7cab084d"
    assert segments_in(
        [segment, f"{prefix}count.4294967297", f"{prefix}files.4294967297", f"{segment}.500"], prefix
    ) == [segment]


def test_what_killed_workers_have_left_of_segments_in_use_is_removed_and_nothing_else(tmp_path: Path) -> None:
    prefix = f"/nydusd.{os.getpid():012x}."
    segment, count, files = f"{prefix}a8fc3f9b7cab084d", f"{prefix}count.4294967297", f"{prefix}files.4294967297"
    cache = SimpleNamespace(spec=SimpleNamespace(meta_path=Path("/cache/b.blob.meta")))
    image = cast("Image", SimpleNamespace(counters=count, files=files, trace=str(tmp_path / "trace.1"), caches=[cache]))
    for name in ("a.blob.meta", "b.blob.meta"):
        (tmp_path / name).touch()

    def die_over(point: str) -> None:
        die_at(point)
        make_segment(segment, 4)

    def here() -> list[str]:
        return sorted(entry for entry in os.listdir("/dev/shm") if prefix[1:] in entry)

    try:
        made = make_segment(segment, 4)
        with made.lock():
            pass
        made.close()
        for name in (count, files, f"{segment}.{os.getppid()}"):  # of the last one the worker lives
            Path(f"/dev/shm{name}").touch()
        kept = here()
        assert f"sem.{segment[1:]}.{inode_of(segment)}" in kept
        assert join(in_child(lambda: die_over("segment: written"))) == -signal.SIGKILL
        assert len(here()) == len(kept) + 1
        remove_strays(prefix, tmp_path, [image], [segment])
        assert here() == kept
        assert [path.name for path in tmp_path.iterdir()] == ["b.blob.meta"]
    finally:
        for name in names(prefix[1:]):
            remove(name)


def test_counters_for_which_there_is_no_room_leave_no_file_descriptor_open(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"/nydusd.full{os.getpid()}.files.1.0"
    make_tables(name.removesuffix(".0"), 1)

    def full(*_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CacheError, match="No space left"):
        FileCounters(name)
    remove(name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_front_end_that_is_late_makes_no_counters_of_files_of_an_image_that_is_gone(tmp_path: Path) -> None:
    """It has read what the supervisor says of the image before the umount, and nobody would remove what it makes."""
    prefix = f"/nydusd.late{os.getpid()}."
    old, new, silent = (
        cast("Image", SimpleNamespace(counters=None, files=None, trace=None, block=None, counts_files=counts))
        for counts in (False, True, False)
    )
    memory = ImageMemory(tmp_path, prefix, 2, 1, anew=True)
    try:
        others = names(prefix[1:])
        for image in (old, silent):
            memory.give(image)
        assert not [name for name in names(prefix[1:]) if ".files." in name], "nobody has asked for these"
        memory.pass_on(old, new)
        assert new.files is not None
        tables = [f"{new.files}.{row}" for row in range(2)]
        assert files(tables) == {}
        counters = FileCounters(tables[1])
        counters.count_read(4711, 100)
        counters.close()
        assert files(tables)["4711"]["data_read"] == 100
        for image in (new, silent):
            memory.take(image)
        assert names(prefix[1:]) == others
        with pytest.raises(CacheError):
            FileCounters(tables[0])
        assert names(prefix[1:]) == others
    finally:
        for name in names(prefix[1:]):
            remove(name)


def test_a_worker_that_is_to_leave_and_waits_for_a_disk_is_killed_once_in_a_while() -> None:
    signals: list[int] = []
    child = Child("fetch", 0, "workers")
    child.process = cast("Process", SimpleNamespace(send_signal=signals.append))
    child.leave_by = 100.0
    pools = {"fetch": SimpleNamespace(is_busy=lambda _: True)}
    staff = object.__new__(Staff)
    staff.family = cast("Family", SimpleNamespace(children=[child]))
    staff.pools = cast("Mapping[str, WorkerPool]", pools)
    staff._upgrade, staff._changing = None, set()
    for now in (99.0, 100.0, 100.1, 101.0, 110.0):
        staff.step(now)
    assert signals == [signal.SIGKILL]
    staff.step(150.0)
    assert signals == [signal.SIGKILL] * 2


def test_what_was_put_off_and_nobody_waits_for_any_more_is_not_kept() -> None:
    daemon = object.__new__(Supervisor)
    daemon.coming, daemon._restoring, daemon._put_off = {}, True, []
    asked: list[object] = []
    for number in range(100):
        daemon.control({"op": "mount", "until": time.monotonic() - 1, "number": number}, asked.append)
    daemon.control({"op": "mount", "until": time.monotonic() + 60, "number": 100}, asked.append)
    assert len(daemon._put_off) == 1


@pytest.mark.parametrize(
    ("of_rafs", "of_cache", "holds"), [(0, 5000, True), (5000, 0, True), (9000, 5000, True), (0, 0, False)]
)
def test_a_limit_of_prefetch_may_be_in_either_table(of_rafs: int, of_cache: int, holds: bool) -> None:
    rafs = {"prefetch": {"enable": True, "bandwidth_limit": of_rafs}}
    cache = {
        "type": "filecache",
        "filecache": {"work_dir": "/c"},
        "prefetch": {"enable": True, "bandwidth_limit": of_cache},
    }
    backend = {"type": "localfs", "localfs": {"dir": "/b"}}
    limiter = pace_of(
        load_config(json.dumps({"version": 2, "backend": backend, "rafs": rafs, "cache": cache}), "c")
    ).limiter
    limiter.spend(0.0, 10_500)
    assert limiter.wait(0.0) == pytest.approx(2.0 if holds else 0.0)


def test_a_stop_wakes_a_worker_to_store_what_is_cached_where_all_rest_but_one_that_leaves() -> None:
    """That one has its last job still, and gets no other."""
    leaving, resting = Child("fetch", 0, "workers"), Child("fetch", 1, "workers")
    leaving.leave_by = math.inf
    leaving.process = cast("Process", SimpleNamespace(pid=os.getpid()))
    launched: list[Child] = []
    turns: list[float] = []

    def turn(seconds: float) -> None:
        turns.append(seconds)
        assert len(turns) < 3, "nobody stores it"

    engine = SimpleNamespace(
        _family=SimpleNamespace(children=[leaving, resting], launch=launched.append),
        fetch=SimpleNamespace(refuse=lambda _kind: []),
        router=SimpleNamespace(checkpoint=lambda: not launched),
    )
    Engine.store_all(cast("Engine", engine), turn)
    assert launched == [resting]
