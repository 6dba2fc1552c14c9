"""The run-time folder: one daemon a mount point, and what a killed one left is found."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq

from nydusd.cli.options import FuseOptions
from nydusd.config import Config
from nydusd.errors import MountError, NydusError
from nydusd.frontends.fuse.session import Negotiated, Session
from nydusd.ipc.messages import Json
from nydusd.storage.state.lock import start_time
from nydusd.storage.state.names import names
from nydusd.supervisor.adoption import FrontEnd, record_of
from nydusd.supervisor.children import Child, end_all
from nydusd.supervisor.ends import end_together
from nydusd.supervisor.family import Family
from nydusd.supervisor.handover import Handover
from nydusd.supervisor.orphans import Orphan
from nydusd.supervisor.runtime import TRIAL, Runtime, end
from nydusd.supervisor.sockets import Sockets
from tests.support.discipline import wait_until
from tests.support.disk import make_ext4, mounted
from tests.support.fork_server import fork_server
from tests.support.scarce import no_fd_left

PUNCHES = """
import fcntl, os, sys
from nydusd.proctitle import set_title
from nydusd.storage.state.eviction import punch
set_title(sys.argv[1])
fd = os.open(sys.argv[2], os.O_RDWR)
for path in sys.argv[3:]:
    lock = open(path, "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
punch(fd, [(0, 4096)])
"""
"""A worker that makes room when it is told to, or another process that has locks."""
SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]
THREAD = """
import threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
print(flush=True)
"""
HAS_A_THREAD = [sys.executable, "-c", THREAD]


@contextlib.contextmanager
def held_by_a_disk(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], None]]]:
    """A process in the middle of a write, and what lets it end that. The first argument is its name, others are locks."""
    image, disk = folder / "image", folder / "disk"
    make_ext4(image)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mounted(image, disk, "rw"))
        file = disk / "blob.data"
        file.write_bytes(b"x" * 8192)
        command = [sys.executable, "-c", PUNCHES, arguments[0], str(file), *arguments[1:]]
        process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        subprocess.run(["fsfreeze", "-f", str(disk)], check=True)
        thaw = stack.enter_context(contextlib.ExitStack())
        thaw.callback(subprocess.run, ["fsfreeze", "-u", str(disk)], check=True)
        process.stdin.close()
        wait_until(lambda: ") D " in Path(f"/proc/{process.pid}/stat").read_text(), "wait for the disk", 60)
        yield process, thaw.close


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYDUSD_RUNTIME_DIR", str(tmp_path / "run"))


class TestRuntime:
    def test_folder_is_the_users_alone_and_goes_with_the_daemon(self, tmp_path: Path) -> None:
        runtime = Runtime("/mnt/image")
        runtime.claim()
        assert stat.S_IMODE(runtime.folder.stat().st_mode) == 0o700
        runtime.remove()
        assert list((tmp_path / "run").iterdir()) == []

    def test_worker_of_another_daemon_that_looks_whether_there_is_one_is_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime = Runtime("/mnt/image")
        path = runtime.folder.with_suffix(".lock")
        path.parent.mkdir(parents=True)
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            monkeypatch.setattr("time.sleep", lambda _: fcntl.flock(lock, fcntl.LOCK_UN))
            runtime.claim()
        runtime.remove()

    def test_folder_that_was_there_with_wide_permissions_is_narrowed(self) -> None:
        runtime = Runtime("/mnt/image")
        runtime.folder.mkdir(parents=True, mode=0o777)
        runtime.folder.chmod(0o777)
        runtime.claim()
        assert stat.S_IMODE(runtime.folder.stat().st_mode) == 0o700
        runtime.remove()

    def test_second_daemon_is_refused_and_takes_nothing_away(self, tmp_path: Path) -> None:
        first, second = Runtime("/mnt/image"), Runtime("/mnt/image")
        first.claim()
        with pytest.raises(MountError, match=f"/mnt/image: nydusd with pid {os.getpid()} serves"):
            second.claim()
        second.remove()
        assert (first.folder / "state.json").exists()
        first.remove()
        second.claim()
        second.remove()

    def test_daemons_of_other_mount_points_are_others(self) -> None:
        first, second = Runtime("/mnt/a"), Runtime("/mnt/b")
        first.claim()
        second.claim()
        second.remove()
        assert first.folder.exists()
        first.remove()

    def test_processes_of_a_killed_daemon_are_ended(self) -> None:
        runtime = Runtime("/mnt/image")
        with subprocess.Popen(SLEEPS) as orphan:
            runtime.folder.mkdir(parents=True)
            rows = [[1 << 22, 1], [orphan.pid, start_time(orphan.pid)]]
            (runtime.folder / "state.json").write_text(json.dumps({"processes": rows}))
            (runtime.folder / "front").touch()
            (runtime.folder / "folder").mkdir()
            runtime.claim()
            assert orphan.wait() == -9
        assert [path.name for path in runtime.folder.iterdir()] == ["state.json"]
        runtime.remove()

    def test_worker_that_a_disk_holds_in_the_middle_of_its_work_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It would punch its hole later, into what others have fetched meanwhile. All others have ended by then."""
        monkeypatch.setattr("nydusd.supervisor.ends._END_SECONDS", 0.05)
        runtime = Runtime("/mnt/image")
        with held_by_a_disk(tmp_path, "fetch 0") as (worker, let_go), contextlib.ExitStack() as stack:
            other = stack.enter_context(subprocess.Popen(SLEEPS))
            stack.callback(other.kill)
            runtime.folder.mkdir(parents=True)
            rows = [[1 << 22, 1], *([process.pid, start_time(process.pid)] for process in (worker, other))]
            (runtime.folder / "state.json").write_text(json.dumps({"processes": rows}))
            claim = threading.Thread(target=runtime.claim)
            claim.start()
            assert other.wait(60) == -9
            wait_until(lambda: caplog.text.count(f"waiting for the end of pid {worker.pid}") > 2, "several looks", 60)
            assert claim.is_alive()
            assert start_time(worker.pid)
            let_go()
            claim.join()
            assert worker.wait() == -9
        runtime.remove()

    def test_supervisor_that_was_killed_and_cannot_end_yet_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Whoever started it may know its end by its stub, and starts the next one."""
        monkeypatch.setattr("nydusd.supervisor.ends._END_SECONDS", 0.05)
        runtime = Runtime("/mnt/image")
        runtime.folder.mkdir(parents=True)
        lock = str(runtime.folder.with_suffix(".lock"))
        with held_by_a_disk(tmp_path, "supervisor", lock) as (supervisor, let_go):
            rows = [[supervisor.pid, start_time(supervisor.pid)]]
            (runtime.folder / "state.json").write_text(json.dumps({"processes": rows}))
            with pytest.raises(MountError, match=f"nydusd with pid {supervisor.pid} serves"):
                runtime.claim()  # it was not killed
            supervisor.kill()
            assert not runtime.is_free()
            claim = threading.Thread(target=runtime.claim)
            claim.start()
            what = f"waiting for the end of pid {supervisor.pid}"
            wait_until(lambda: caplog.text.count(what) > 2 or not claim.is_alive(), "several looks", 60)
            assert claim.is_alive()
            assert start_time(supervisor.pid)
            let_go()
            claim.join()
            assert supervisor.wait() == -9
        assert runtime._lock >= 0
        runtime.remove()

    @pytest.mark.parametrize("hurried", [True, False])
    def test_processes_of_a_killed_daemon_end_before_others_run_if_somebody_waits(
        self, hurried: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With all their threads."""
        monkeypatch.setattr("nydusd.priority._usual", [0] * hurried)
        usual, kill = os.getpriority(os.PRIO_PROCESS, 0), signal.pidfd_send_signal
        seen: list[int] = []
        runtime = Runtime("/mnt/image")
        with subprocess.Popen(HAS_A_THREAD, stdout=subprocess.PIPE) as orphan:
            assert orphan.stdout is not None
            orphan.stdout.readline()

            def killed(pidfd: int, number: signal.Signals) -> None:
                threads = os.listdir(f"/proc/{orphan.pid}/task")
                seen.extend(os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in threads)
                kill(pidfd, number)

            monkeypatch.setattr("signal.pidfd_send_signal", killed)
            runtime.folder.mkdir(parents=True)
            rows = [[1 << 22, 1], [orphan.pid, start_time(orphan.pid)]]
            (runtime.folder / "state.json").write_text(json.dumps({"processes": rows}))
            runtime.claim()
            assert orphan.wait() == -9
        assert seen == [-20 if hurried else usual] * 2
        assert os.getpriority(os.PRIO_PROCESS, 0) == usual
        runtime.remove()

    def test_processes_are_ended_though_there_are_not_enough_file_descriptors_to_see_all_end_at_once(self) -> None:
        with contextlib.ExitStack() as stack:
            orphans = [stack.enter_context(subprocess.Popen(SLEEPS)) for _ in range(3)]
            for orphan in orphans:
                stack.callback(orphan.kill)
            processes = [(orphan.pid, start_time(orphan.pid)) for orphan in orphans]
            with no_fd_left(os.getpid(), spare=3):
                end_together(processes)
            assert [orphan.wait() for orphan in orphans] == [-9] * 3

    def test_process_is_not_taken_for_ended_where_that_cannot_be_told(self) -> None:
        with subprocess.Popen(SLEEPS) as orphan:
            process = orphan.pid, start_time(orphan.pid)
            for spare in range(3):  # none to wait with, none to hold it by, and none to look at it with
                with no_fd_left(os.getpid(), spare), pytest.raises(OSError, match=r"open files|cannot be told"):
                    end(process)
            assert orphan.poll() is None
            end(process)
            assert orphan.wait() == -9

    def test_trial_that_ended_with_its_supervisor_is_cleared_away_by_the_one_that_takes_over(self) -> None:
        runtime = Runtime("/mnt/image")
        for name in (TRIAL, f"{TRIAL}.77", f"0.{TRIAL}.1.arena"):
            Path(f"/dev/shm{runtime.prefix}{name}").touch()
        (runtime.folder / TRIAL).mkdir(parents=True)
        (runtime.folder / TRIAL / TRIAL).touch()
        runtime.claim(lambda _record: [])
        assert names(runtime.prefix[1:]) == []
        assert [path.name for path in runtime.folder.iterdir()] == ["state.json"]
        runtime.remove()

    def test_place_of_one_that_was_killed_while_it_waited_goes_with_the_next_start(self, tmp_path: Path) -> None:
        runtime, waiting, third = (Runtime("/mnt/image") for _ in range(3))
        waiting.wait_in_line()
        runtime.claim()
        assert runtime.has_successor()
        os.close(waiting._line)  # as the kernel does
        runtime.let_go()
        third.claim()
        assert {path.suffix for path in (tmp_path / "run").iterdir()} == {"", ".lock"}
        third.remove()

    def test_process_that_only_has_the_number_of_one_is_spared(self) -> None:
        runtime = Runtime("/mnt/image")
        runtime.folder.mkdir(parents=True)
        rows = [[1 << 22, 1], [os.getpid(), start_time(os.getpid()) - 1]]
        (runtime.folder / "state.json").write_text(json.dumps({"processes": rows}))
        runtime.claim()  # or this test process would not see its end
        runtime.remove()

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"processes": 1}', '{"processes": [[]]}', "[" * 100_000, "null"])
    def test_record_that_makes_no_sense_is_as_none(self, text: str) -> None:
        runtime = Runtime("/mnt/image")
        runtime.folder.mkdir(parents=True)
        (runtime.folder / "state.json").write_text(text)
        runtime.claim()
        runtime.remove()

    def test_folder_that_cannot_be_made_is_an_error_that_names_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("NYDUSD_RUNTIME_DIR", str(tmp_path / "file"))
        runtime = Runtime("/mnt/image")
        with pytest.raises(MountError, match="run-time folder"):
            runtime.claim()
        runtime.remove()

    def test_who_may_not_make_the_folder_is_told_who_may(self) -> None:
        code = "from nydusd.supervisor.runtime import Runtime; Runtime('/mnt/image').claim()"
        with tempfile.TemporaryDirectory(prefix="nydusd-test-") as folder:
            os.chmod(folder, 0o755)
            environment = os.environ | {"NYDUSD_RUNTIME_DIR": folder}
            command = [sys.executable, "-c", code]
            done = subprocess.run(
                command, capture_output=True, text=True, user=65534, group=65534, check=False, env=environment
            )
        assert re.search(f"run-time folder {folder}/.*: Permission denied: run nydusd as root$", done.stderr.strip())

    def test_folder_that_is_a_link_is_refused(self, tmp_path: Path) -> None:
        runtime = Runtime("/mnt/image")
        runtime.folder.parent.mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "precious").touch()
        runtime.folder.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(MountError):
            runtime.claim()
        assert (tmp_path / "elsewhere" / "precious").exists()
        runtime.remove()

    def test_record_that_cannot_be_written_costs_no_more_than_the_record(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        runtime = Runtime("/mnt/image")
        runtime.claim()
        (runtime.folder / "state.tmp").mkdir()
        runtime.record([1, 2])
        assert "state.json" in caplog.text
        runtime.remove()


class TestLine:
    def test_of_which_the_lock_is_removed_meanwhile_is_joined_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The one that waited has taken over in that moment: its successor must be seen by it, and no third one wait."""
        before, runtime, third, predecessor = (Runtime("/mnt/image") for _ in range(4))
        before.wait_in_line()
        opened = os.open

        def slow(path: Path, *args: int) -> int:
            fd = opened(path, *args)
            monkeypatch.setattr(os, "open", opened)
            before.leave_line()
            return fd

        monkeypatch.setattr(os, "open", slow)
        runtime.wait_in_line()
        assert predecessor.has_successor()
        with pytest.raises(MountError, match="another nydusd waits already"):
            third.wait_in_line()
        third.leave_line()
        assert predecessor.has_successor()
        runtime.leave_line()
        assert not predecessor.has_successor()


@pytest.mark.parametrize("former", [True, False])
def test_who_has_come_while_it_was_waited_for_what_is_taken_over_is_noted_before_it_holds_anything(
    former: bool,
) -> None:
    first, runtime = Runtime("/mnt/image"), Runtime("/mnt/image")
    ours: list[int] = []

    def take(_record: Json) -> list[int] | None:
        ours.append(os.getpid())  # the copy of a fork server, which may come at any moment
        return [] if former else None

    with subprocess.Popen(SLEEPS) as of_the_former:
        try:
            first.claim()
            first.record([of_the_former.pid])
            first.let_go()
            runtime.claim(take, lambda: ours)
            noted = json.loads((runtime.folder / "state.json").read_text())["processes"]
            assert [os.getpid(), start_time(os.getpid())] in noted[1:]
        finally:
            of_the_former.kill()
            runtime.remove()


def test_sockets_come_back() -> None:
    """Those of a daemon that has waited for what it was to take over, and takes nothing over."""
    runtime = Runtime("/mnt/image")

    def take(_record: object) -> None:
        handover._place = runtime.folder  # as `wait_for_session` does
        handover.sockets = Sockets(runtime.front, runtime.work)

    handover = Handover("/mnt/image", runtime, cast(Any, None), zmq.Poller(), cast(Any, None))
    runtime.claim(take)
    sockets = handover.bind()
    for served, endpoint in ((sockets.front, runtime.front), (sockets.work, runtime.work)):
        with zmq.Context() as context, context.socket(zmq.DEALER) as client:
            client.setsockopt(zmq.IDENTITY, b"client")
            client.connect(endpoint)
            client.send(b"hello")
            assert served.poll(60_000)
            assert served.recv_multipart() == [b"client", b"hello"]
    sockets.close()
    runtime.remove()


def test_workers_of_two_supervisors_have_different_names_and_front_ends_have_not() -> None:
    """A worker that is slow to end must not be taken for one of the next supervisor's."""
    with fork_server() as server:
        names = []
        for _ in range(2):
            family = Family(FuseOptions(mountpoint="/mnt/image"), Config(), server, Runtime("/mnt/image"), zmq.Poller())
            children = [Child(role, 0, "none") for role in ("fetch", "decompress", "api", "fuse")]
            for child in children:
                family.prepare(child)
            names.append({child.identity for child in children})
            family.close()
        assert names[0] & names[1] == {b"fuse-0-0"}


def test_a_front_end_that_was_taken_over_is_noted_as_it_was_found_though_its_number_is_anothers_by_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not our child: its number is free when it has ended, and not when we have seen that."""
    runtime = Runtime("/mnt/image")
    runtime.claim()
    with fork_server() as server, subprocess.Popen(SLEEPS) as process:
        family = Family(FuseOptions(mountpoint="/mnt/image"), Config(), server, runtime, zmq.Poller())
        pid, start = process.pid, start_time(process.pid)
        child = Child("fuse", 0, "none")
        family.adopt(child, FrontEnd(0, 1, "", Orphan(pid, start), []))
        process.kill()
        process.wait()
        for module in ("runtime", "adoption", "family"):
            monkeypatch.setattr(f"nydusd.supervisor.{module}.start_time", lambda of: 7 if of == pid else start_time(of))
        family.remember()
        noted = json.loads((runtime.folder / "state.json").read_bytes())["processes"]
        assert [row for row in noted if row[0] == pid] == [[pid, start]]
        session = SimpleNamespace(lanes=[], negotiated=Negotiated(7, 0, 0), device="0:0")
        (row, *_) = record_of(cast("Session", session), "", family.children, server)["holders"]
        assert (row["pid"], row["start"]) == (pid, start)
        family.end()
        family.close()
    runtime.remove()


def test_a_child_for_which_there_is_no_file_descriptor_is_tried_again_and_ends_no_supervisor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the line to the front end of an export, whose clients have taken them all."""
    with fork_server() as server:
        family = Family(FuseOptions(mountpoint="/mnt/image"), Config(), server, Runtime("/mnt/image"), zmq.Poller())
        child = Child("nbd", 0, "none")

        def refused(_child: Child) -> tuple[list[int], Json]:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        family.own_spec = refused
        with pytest.raises(NydusError, match="Too many open files"):
            family.add(child)
        for _ in range(2):
            assert child.restart_at is not None
            server._servers[0].ready = True
            family.restart(child.restart_at)
        assert (child.process, child.deaths) == (None, 3)
        assert caplog.text.count("nbd 0 cannot be started: Too many open files; trying again") == 2
        family.end()
        family.close()


def test_endpoint_that_is_too_long_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="NYDUSD_RUNTIME_DIR"):
        Sockets(f"ipc://{tmp_path}/a", f"ipc://{tmp_path}/{'b' * 120}")


class TestChild:
    def test_waits_longer_each_time_it_dies_at_once_and_not_the_first_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        child = Child("fuse", 0, "nydusd.nothing_of_this_name")
        delays = []
        monkeypatch.setattr("time.monotonic", lambda: 5.0)
        for number in range(100):
            child._started = 4.9
            child._back_off()
            assert child.restart_at is not None
            assert child.deaths == number + 1
            delays.append(child.restart_at - 5.0)
        assert delays[:9] == pytest.approx([0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
        assert set(delays[9:]) == {5.0}
        child._started = 2.0  # it lived for 3 seconds
        child._back_off()
        assert child.restart_at == 5.0
        assert child.deaths == 0

    def test_that_cannot_be_started_is_tried_again_later(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_process(*_: object, **__: object) -> None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        child = Child("fetch", 0, "workers")
        with fork_server() as server:
            monkeypatch.setattr(server, "spawn", no_process)
            with pytest.raises(NydusError, match="fetch 0 cannot be started: Resource temporarily unavailable"):
                child.start(server, {}, [])
        assert child.restart_at is not None
        assert child.pid == 0

    def test_that_ignores_sigterm_is_killed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "stubborn.py").write_text(
            "import os, signal, sys\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            f"open({str(tmp_path / 'up')!r}, 'w').close()\n"
            "signal.pause()\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        child = Child("fetch", 0, "stubborn")
        os.mkfifo(tmp_path / "up")
        with fork_server() as server:
            child.start(server, {}, [])
            (tmp_path / "up").read_bytes()  # until it is up
            end_all([child], 0.05)
        assert "fetch 0 did not end; killing it" in caplog.text
        assert child.pid == 0
