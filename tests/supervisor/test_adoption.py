"""SIGKILL of the supervisor: its front ends serve on, and the same command takes over all there is. Real daemons."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

import msgspec
import pytest

from nydusd.storage.state.lock import start_time
from nydusd.supervisor.adoption import Former, _Record
from nydusd.waits import DEAF
from tests.supervisor.lives import (
    IMAGE,
    ONE_CHUNK,
    ROOT,
    blocked_reader,
    config_for,
    configure,
    crash,
    not_started,
    read_direct,
    run_to_end,
    start_again,
    state_file,
    with_cache,
    wrong,
)
from tests.support import oracle
from tests.support.daemon import Daemon, image_config, wait_for_role
from tests.support.discipline import is_running, mounts_under, wait_until

ExpectLog = Callable[..., None]
TRUTH = oracle.truth(IMAGE.name)
V5 = oracle.image("v5-lz4-sha256")

DYING = """
import importlib, os, signal, sys
place, name = sys.argv[1].rsplit(":")
owner = module = importlib.import_module(place)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
whole = getattr(owner, name)
def dying(*args, **named):
    whole(*args, **named)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, staticmethod(dying) if isinstance(vars(owner)[name], staticmethod) else dying)
from nydusd.cli.nydusd import main
sys.exit(main(sys.argv[2:]))
"""
"""A `nydusd` that is killed right after the first call of a function of its own."""
HOLDS = """
import time
from nydusd.proctitle import set_title
set_title("fork server")
print(flush=True)
time.sleep(600)
"""
"""A process that is called like one of a daemon."""

STEPS = (
    "nydusd.supervisor.runtime:Runtime._take_lock",
    "nydusd.supervisor.runtime:_end_all",
    "nydusd.supervisor.adoption:_check_image",
    "nydusd.supervisor.runtime:Runtime.claim",
    "nydusd.supervisor.family:Family.adopt",
    "nydusd.supervisor.family:Family.remember",
    "nydusd.supervisor.daemon:Supervisor._bind",
    "nydusd.supervisor.restore:Restore.begin",
    "nydusd.supervisor.mount_table:MountTable._write",
    "nydusd.supervisor.mount_table:MountTable.begin_term",
    "nydusd.supervisor.fuse:FuseDaemon._mounts_changed",
    "nydusd.supervisor.children:Child.start",
    "nydusd.supervisor.family:Family.launch",
    "nydusd.supervisor.mounts:Mounts.serve",
    "nydusd.supervisor.daemon:Supervisor._ready",
    "nydusd.supervisor.restore:Restore.end",
)
"""What a supervisor does one after the other while it takes over."""


def start_and_die(daemon: Daemon, step: str) -> None:
    """Start the daemon's command, to be killed at a step of its start."""
    command = [sys.executable, "-c", DYING, step, *daemon.command[3:]]
    with open(daemon.log, "ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)
    assert process.wait(30) == -signal.SIGKILL, step


@pytest.mark.parametrize(
    "step", ["nydusd.forkserver.servers:Servers.hold", "nydusd.supervisor.fuse:Session.open_lanes"]
)
def test_a_start_that_is_killed_before_it_has_noted_a_mount_is_no_obstacle_to_the_next(step: str) -> None:
    """Its fork server, which may have the session by then, is ended by that."""
    with not_started(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        start_and_die(daemon, step)
        daemon.start()
        assert wrong(daemon) == []


def test_those_who_hold_the_mount_beside_front_ends_are_all_killed_before_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fork servers that are known, and then those that are not: the second one of either is the first to end."""
    kill, held_back = signal.pidfd_send_signal, []

    def killed(pidfd: int, number: signal.Signals) -> None:
        held_back.append(os.dup(pidfd))
        if len(held_back) == 2:
            while held_back:
                kill(held_back[-1], number)
                os.close(held_back.pop())

    def too_late(_pid: int) -> bool:
        pytest.fail("one was waited for, and another not killed yet")

    monkeypatch.setattr("signal.pidfd_send_signal", killed)
    monkeypatch.setattr("nydusd.supervisor.ends._may_take", too_late)
    monkeypatch.setattr("nydusd.supervisor.ends._END_SECONDS", 60.0)
    journal = os.memfd_create("nydusd-journal")
    command = [sys.executable, "-c", HOLDS]
    with ExitStack() as stack:
        stack.callback(os.close, journal)
        known, strangers = (
            [stack.enter_context(subprocess.Popen(command, stdout=PIPE, pass_fds=fds)) for _ in range(2)]
            for fds in ([], [journal])
        )
        for process in (*known, *strangers):
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        lanes = [[journal, journal, journal, journal, os.fstat(journal).st_ino]]
        record = {"version": 0, "term": 0, "parameters": "", "holders": [], "lanes": lanes}
        record["session"] = {"device": "", "minor": 0, "flags": 0, "max_readahead": 0}
        keepers = [(process.pid, start_time(process.pid)) for process in known]
        Former(0, None, None, [], [], keepers, msgspec.convert(record, _Record)).end_keepers([], DEAF)  # type: ignore[arg-type]
        assert [process.wait() for process in (*known, *strangers)] == [-signal.SIGKILL] * 4


def fork_servers(daemon: Daemon) -> list[int]:
    """The fork server and its copy, once both are noted in the state."""
    wait_until(lambda: len(noted_keepers(daemon)) == 2, "a fork server and its copy", 60)
    return list(noted_keepers(daemon))


def noted_keepers(daemon: Daemon) -> set[int]:
    """Who holds the mount beside the front ends, as the state tells a successor."""
    record = json.loads(state_file(daemon).read_bytes())
    return {row["pid"] for row in record["holders"] if row["role"] == "keeper" and is_running(row["pid"])}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Without read-ahead: what nobody has read is not cached."""
    cache = tmp_path / "cache"
    config = config_for(IMAGE, cache, amplify_io=0)
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=cache, config=config) as daemon:
        wait_for_role(daemon, "fuse", 2)
        wait_for_role(daemon, "decompress", 2)
        yield daemon


def stop_workers(daemon: Daemon) -> None:
    """What is read from now on waits."""
    for pid in daemon.pids("decompress"):
        os.kill(pid, signal.SIGSTOP)


def kill_with_front_ends(daemon: Daemon) -> list[int]:
    """SIGKILL the supervisor and its front ends; gives these."""
    frontends = daemon.pids("fuse")
    daemon.kill_supervisor()
    for pid in frontends:
        os.kill(pid, signal.SIGKILL)
    return frontends


class TestKilledSupervisor:
    def test_cached_files_are_served_on_and_the_same_command_takes_over(self, tmp_path: Path) -> None:
        """The checkpoint has not run: what is ready is known from shared memory alone."""
        config = config_for(IMAGE, tmp_path / "cache", nydusd={"checkpoint_interval": 3600})
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path / "cache", config=config) as daemon:
            assert wrong(daemon) == []
            assert daemon.backend_reads() > 0
            assert list(daemon.cache.glob("*.chunk_map")) == []
            frontends = crash(daemon)
            assert all(map(is_running, frontends))
            assert wrong(daemon) == []
            start_again(daemon, frontends)
            assert wrong(daemon) == []
            assert daemon.backend_reads() == 0
            daemon.stop()
            daemon.start()  # what was inherited was stored at the stop
            assert wrong(daemon) == []
            assert daemon.backend_reads() == 0

    def test_again_and_again_in_the_middle_of_reads_gives_right_bytes(self, daemon: Daemon) -> None:
        for path in ("dup/a", "sizes/1048577", ONE_CHUNK, "sizes/300K-text"):
            assert read_direct(daemon.mountpoint / path) == TRUTH[path.encode()]
            start_again(daemon, crash(daemon))
        assert wrong(daemon) == []

    def test_reader_of_what_is_not_cached_waits_for_the_next_one(self, daemon: Daemon) -> None:
        (daemon.mountpoint / "dup/a").read_bytes()
        frontends = crash(daemon)
        with blocked_reader(daemon.mountpoint / ONE_CHUNK) as reader:
            start_again(daemon, frontends)
            assert reader.wait(10) == 0
        assert wrong(daemon) == []

    def test_while_a_job_is_under_way_has_the_job_done_again(self, daemon: Daemon) -> None:
        """The chunk is claimed in shared memory by a worker that never gets to it."""
        stop_workers(daemon)
        with blocked_reader(daemon.mountpoint / ONE_CHUNK) as reader:
            frontends = daemon.pids("fuse")
            daemon.kill_supervisor()
            start_again(daemon, frontends)
            assert reader.wait(10) == 0
        assert wrong(daemon) == []

    def test_and_a_front_end_with_it_cost_no_read(self, daemon: Daemon) -> None:
        stop_workers(daemon)
        with blocked_reader(daemon.mountpoint / ONE_CHUNK) as reader:
            first, second = daemon.pids("fuse")
            daemon.kill_supervisor()
            os.kill(first, signal.SIGKILL)
            start_again(daemon, [second])
            assert reader.wait(10) == 0
            wait_for_role(daemon, "fuse", 2, without=first)
        assert wrong(daemon) == []

    def test_and_all_front_ends_with_it_cost_no_read(self, daemon: Daemon) -> None:
        stop_workers(daemon)
        with blocked_reader(daemon.mountpoint / ONE_CHUNK) as reader:
            kill_with_front_ends(daemon)
            daemon.start()
            assert reader.wait(10) == 0
        assert wrong(daemon) == []

    def test_and_all_front_ends_just_after_its_fork_server_cost_no_read(self, daemon: Daemon) -> None:
        """Whoever takes the place of a fork server that was killed holds at once what that had held."""
        for path, both in ((ONE_CHUNK, False), ("sizes/300K-text", True)):
            before = fork_servers(daemon)
            for pid in before if both else before[:1]:
                os.kill(pid, signal.SIGKILL)
            if both:
                wait_until(lambda before=before: noted_keepers(daemon) - set(before) != set(), "another one", 60)  # type: ignore[misc]
            frontends = kill_with_front_ends(daemon)
            wait_until(lambda pids=frontends: not any(map(is_running, pids)), "the end of the front ends")  # type: ignore[misc]
            daemon.start()
            assert read_direct(daemon.mountpoint / path) == TRUTH[path.encode()]
        assert wrong(daemon) == []

    def test_and_all_front_ends_while_a_new_fork_server_is_stopped_cost_no_read(self, daemon: Daemon) -> None:
        """What it is to hold lies in its line: it is stopped before it has loaded what comes first."""
        stop_workers(daemon)
        before = fork_servers(daemon)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: noted_keepers(daemon) - set(before) != set(), "another one", 60)
        (another,) = noted_keepers(daemon) - set(before)
        os.kill(another, signal.SIGSTOP)
        with blocked_reader(daemon.mountpoint / ONE_CHUNK) as reader:
            kill_with_front_ends(daemon)
            daemon.start()
            assert reader.wait(10) == 0
        assert wrong(daemon) == []

    def test_and_all_others_leave_a_dead_mount_that_is_made_anew(self, daemon: Daemon, expect_log: ExpectLog) -> None:
        expect_log("detached a dead FUSE mount")
        others = fork_servers(daemon) + daemon.pids("fuse")
        daemon.kill_supervisor()
        for pid in others:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, others)), "the end of them all")
        with pytest.raises(OSError) as raised:
            os.listdir(daemon.mountpoint)
        assert raised.value.errno == errno.ENOTCONN
        daemon.start()
        assert wrong(daemon) == []

    def test_mount_that_was_unmounted_meanwhile_is_made_anew(self, daemon: Daemon) -> None:
        frontends = crash(daemon)
        subprocess.run(["umount", str(daemon.mountpoint)], check=True)
        wait_until(lambda: not any(map(is_running, frontends)), "the end of the front ends")
        daemon.start()
        assert wrong(daemon) == []

    def test_mount_that_is_still_in_use_elsewhere_is_made_anew(self, daemon: Daemon, expect_log: ExpectLog) -> None:
        """Unmounted lazily, as a snapshotter does: the front ends go on for who has a file open."""
        expect_log("cannot be taken over: .*no FUSE file system is mounted here")
        with suppress(OSError), open(daemon.mountpoint / ONE_CHUNK, "rb"):  # its close tells of the dead mount
            frontends = crash(daemon)
            subprocess.run(["umount", "-l", str(daemon.mountpoint)], check=True)
            daemon.start()
            assert not any(map(is_running, frontends))
            assert wrong(daemon) == []


def priorities(daemon: Daemon) -> set[int]:
    """Of all threads of a daemon's processes."""
    found = set()
    for pid in [daemon.pid, *daemon.family()]:
        with suppress(OSError):  # it has ended
            found |= {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}
    return found


class TestSuccessor:
    def test_is_a_supervisor_like_any_other(self, daemon: Daemon) -> None:
        """It replaces front ends that it did not start, unmounts, and ends when somebody else does that."""
        frontends = crash(daemon)
        start_again(daemon, frontends)
        daemon.kill(frontends[0])
        wait_for_role(daemon, "fuse", 2, without=frontends[0])
        assert wrong(daemon) == []
        daemon.stop()
        assert mounts_under(daemon.folder) == set()
        daemon.start()
        start_again(daemon, crash(daemon))
        subprocess.run(["umount", str(daemon.mountpoint)], check=True)
        daemon.wait_for_end()

    def test_that_is_killed_at_any_step_leaves_all_to_the_next_one(self, daemon: Daemon) -> None:
        for number, path in enumerate((ONE_CHUNK, "sizes/300K-text", "sizes/1048577")):
            frontends = crash(daemon)
            for step in STEPS[number::3]:
                start_and_die(daemon, step)
                assert all(map(is_running, frontends)), step
            with blocked_reader(daemon.mountpoint / path) as reader:
                start_again(daemon, frontends)
                assert reader.wait(10) == 0
        assert wrong(daemon) == []

    def test_that_is_killed_at_any_step_without_any_front_end_leaves_all_to_the_next_one(self, daemon: Daemon) -> None:
        """Then the fork servers alone hold the mount: the former one's until that of the next is noted."""
        fork_servers(daemon)
        stop_workers(daemon)
        with blocked_reader(daemon.mountpoint / ONE_CHUNK) as reader:
            kill_with_front_ends(daemon)
            for step in STEPS[: STEPS.index("nydusd.supervisor.children:Child.start")]:
                if step != "nydusd.supervisor.family:Family.adopt":
                    start_and_die(daemon, step)
            daemon.start()
            assert reader.wait(60) == 0
        assert wrong(daemon) == []

    def test_runs_at_the_usual_priority_when_it_serves(self, daemon: Daemon) -> None:
        """With all that it has started: it takes over at a higher one."""
        for _ in range(2):
            start_again(daemon, crash(daemon))
            usual = os.getpriority(os.PRIO_PROCESS, 0)
            wait_for_role(daemon, "decompress", 2)
            wait_for_role(daemon, "fork server", 2)
            # The copy of the fork server gets it when the supervisor hears of it.
            wait_until(lambda usual=usual: priorities(daemon) == {usual}, "the usual priority", 60)  # type: ignore[misc]

    def test_that_cannot_start_leaves_the_mount_to_the_next_one(self, daemon: Daemon) -> None:
        assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
        frontends = crash(daemon)
        daemon.apisock.unlink()
        daemon.apisock.mkdir()
        status, lines = run_to_end(daemon)
        assert (status, len(lines)) == (1, 1)
        assert "--apisock" in lines[0]
        assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
        daemon.apisock.rmdir()
        start_again(daemon, frontends)
        assert wrong(daemon) == []

    def test_of_one_that_could_not_write_who_it_was_gives_no_byte_of_what_that_one_had(self, tmp_path: Path) -> None:
        """The run-time folder was full: its record is that of the supervisor before. Nothing is cached but in shared memory."""
        config = config_for(IMAGE, tmp_path / "cache", amplify_io=0, nydusd={"front_ends": 1})
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=with_cache(config, type="")) as daemon:
            record = state_file(daemon)
            first = record.read_bytes()
            for path in ("sizes/300K-text", ONE_CHUNK):
                frontends = crash(daemon)
                record.write_bytes(first)
                start_again(daemon, frontends)
                assert read_direct(daemon.mountpoint / path) == TRUTH[path.encode()]

    def test_takes_over_in_a_run_time_folder_that_is_full(self, tmp_path: Path) -> None:
        """Neither the table of mounts nor who it is can be written down. Who waits hears of it all the same."""
        run, place = tmp_path / "r", {"NYDUSD_RUNTIME_DIR": str(tmp_path / "r")}
        run.mkdir()
        config = config_for(IMAGE, tmp_path / "cache", amplify_io=0, nydusd={"front_ends": 1})
        with ExitStack() as stack:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(run)], check=True)
            stack.callback(subprocess.run, ["umount", str(run)], check=True)
            with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, environment=place) as daemon:
                with open(run / "ballast", "wb", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(4096))
                frontends = crash(daemon)
                with blocked_reader(daemon.mountpoint / ONE_CHUNK) as reader:
                    start_again(daemon, frontends)
                    assert reader.wait(60) == 0
                assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
                assert "table.json: No space left on device" in daemon.log.read_text()
            (run / "ballast").unlink()
            assert not list(run.iterdir())

    def test_with_other_tuning_takes_over_and_with_another_image_mounts_that(
        self, daemon: Daemon, expect_log: ExpectLog
    ) -> None:
        frontends = crash(daemon)
        configure(daemon, nydusd={"decompress_workers": 1})
        start_again(daemon, frontends)
        wait_for_role(daemon, "decompress", 1)
        frontends = crash(daemon)
        expect_log("cannot be taken over: it was mounted with other parameters; mounting anew")
        daemon.command[daemon.command.index(str(IMAGE.bootstrap))] = str(V5.bootstrap)
        configure(daemon, **image_config(V5.blobs, daemon.cache))
        daemon.start()
        assert not any(map(is_running, frontends))
        assert wrong(daemon, V5.name) == []

    @pytest.mark.parametrize("name", ["state.json", "mounts/table.json", "mounts/0.0.record"])
    def test_that_finds_a_damaged_file_mounts_anew(self, daemon: Daemon, name: str, expect_log: ExpectLog) -> None:
        expect_log(f"{name.split('/')[-1]}: .*checksum|not one of our files")
        crash(daemon)
        path = state_file(daemon).parent / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        daemon.start()
        assert wrong(daemon) == []


class TestSharedDaemon:
    @contextmanager
    def shared(self) -> Iterator[Daemon]:
        with Daemon(None, IMAGE.blobs) as daemon:
            assert daemon.mount("/one", IMAGE.bootstrap, IMAGE.blobs) == (204, "")
            assert daemon.mount("/deep/two", V5.bootstrap, V5.blobs) == (204, "")
            yield daemon

    def check(self, daemon: Daemon, place: str, name: str) -> None:
        for path, content in oracle.truth(name).items():
            assert read_direct(daemon.mountpoint / place / os.fsdecode(path)) == content, path

    def test_knows_its_mounts_again_and_files_stay_open(self) -> None:
        with self.shared() as daemon:
            assert daemon.mount("/gone", IMAGE.bootstrap, IMAGE.blobs) == (204, "")
            assert daemon.umount("/gone") == (204, "")
            with open(daemon.mountpoint / "one" / ONE_CHUNK, "rb") as file:
                frontends = crash(daemon)
                start_again(daemon, frontends)
                assert file.read() == TRUTH[ONE_CHUNK.encode()]
            assert sorted(os.listdir(daemon.mountpoint)) == ["deep", "one"]
            assert daemon.mount("/one", IMAGE.bootstrap, IMAGE.blobs) == (
                204,
                "",
            )  # the answer was lost with the supervisor
            assert daemon.umount("/deep/two") == (204, "")
            assert daemon.mount("/three", V5.bootstrap, V5.blobs) == (204, "")
            assert sorted(os.listdir(daemon.mountpoint)) == ["one", "three"]
            start_again(daemon, crash(daemon))
            self.check(daemon, "one", IMAGE.name)
            self.check(daemon, "three", V5.name)
            rows = daemon.get("/api/v1/daemon")
            assert isinstance(rows, dict)
            assert sorted(rows["backend_collection"]) == ["/one", "/three"]

    def test_that_was_killed_in_the_middle_of_a_mount_has_it_or_has_it_not(self) -> None:
        """Whoever asked for it hears nothing, and asks again."""
        with self.shared() as daemon:
            asking = threading.Thread(target=lambda: self.ask(daemon))
            asking.start()
            wait_until(lambda: len(list(state_file(daemon).parent.glob("mounts/3.*"))) > 0, "the third mount")
            frontends = daemon.pids("fuse")
            daemon.kill_supervisor()
            asking.join()
            start_again(daemon, frontends)
            assert daemon.mount("/three", V5.bootstrap, V5.blobs) == (204, "")
            self.check(daemon, "three", V5.name)

    @staticmethod
    def ask(daemon: Daemon) -> None:
        with suppress(OSError):
            daemon.mount("/three", V5.bootstrap, V5.blobs)

    def test_knows_what_was_set_at_run_time(self) -> None:
        with self.shared() as daemon:
            body = json.dumps({"registry_auth": "YTpi"}).encode()
            assert daemon.request("PUT", "/api/v1/config?id=/one", body)[0] == 204
            before = daemon.get("/api/v1/config")
            start_again(daemon, crash(daemon))
            assert daemon.get("/api/v1/config") == before
            for path in state_file(daemon).parent.rglob("*"):
                if path.is_file():
                    assert path.stat().st_mode & 0o077 == 0 or "YTpi" not in path.read_text(), path
