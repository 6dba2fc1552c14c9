"""SIGKILL of the supervisor: its front ends serve on, and the same command takes over all there is. Real daemons."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

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

STEPS = (
    "nydusd.supervisor.runtime:Runtime._take_lock",
    "nydusd.supervisor.runtime:_end_all",
    "nydusd.supervisor.adoption:_check_image",
    "nydusd.supervisor.runtime:Runtime.claim",
    "nydusd.supervisor.family:Family.adopt",
    "nydusd.supervisor.family:Family.remember",
    "nydusd.supervisor.daemon:Supervisor._bind",
    "nydusd.supervisor.restore:Restore.begin",
    "nydusd.supervisor.mount_table:MountTable.publish",
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
    "step", ["nydusd.forkserver.client:ForkServer.hold", "nydusd.supervisor.fuse:Session.open_lanes"]
)
def test_a_start_that_is_killed_before_it_has_noted_a_mount_is_no_obstacle_to_the_next(step: str) -> None:
    """Its fork server, which may have the session by then, is ended by that."""
    with not_started(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        start_and_die(daemon, step)
        daemon.start()
        assert wrong(daemon) == []


def start_again(daemon: Daemon, frontends: list[int]) -> None:
    """The same command once more: it takes over these front ends."""
    daemon.start()
    assert all(map(is_running, frontends))
    assert set(frontends) <= set(daemon.pids("fuse"))


GIVING = """
import fcntl, os, sys
from nydusd.storage.state.lock import start_time
from nydusd.supervisor.orphans import Orphan
giver = Orphan(os.getppid(), start_time(os.getppid()))
names, numbers = sys.argv[1], sys.argv[2].split(",")
fds = [fcntl.fcntl(giver.get_fd(int(number)), fcntl.F_DUPFD_CLOEXEC, 100) for number in numbers]
for number, fd in enumerate(fds):
    os.dup2(fd, 3 + number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts a daemon with fds as systemd gives them: those of the process that starts this."""


class Stored:
    """The receiving end of systemd's fd store: fds by name, in no order."""

    def __init__(self, folder: Path) -> None:
        self.fds: dict[str, list[int]] = {}
        self.environment = {"NOTIFY_SOCKET": str(folder / "notify")}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.environment["NOTIFY_SOCKET"])
        self._socket.settimeout(30)

    def until_ready(self) -> None:
        text = ""
        while "READY=1" not in text:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            text = data.decode()
            message = dict(line.split("=", 1) for line in text.split("\n"))
            if "FDSTORE" in message and message["FDNAME"] not in self.fds:
                self.fds[message["FDNAME"]], fds = fds[::-1], []
            if "FDSTOREREMOVE" in message:
                fds = self.fds.pop(message["FDNAME"])
            for fd in fds:
                os.close(fd)

    def giving(self, command: list[str]) -> list[str]:
        """A command that gives these fds to another."""
        names = ":".join(name for name, fds in self.fds.items() for _ in fds)
        numbers = ",".join(str(fd) for fds in self.fds.values() for fd in fds)
        return [sys.executable, "-c", GIVING, names, numbers, *command]

    def close(self) -> None:
        self._socket.close()
        for fds in self.fds.values():
            for fd in fds:
                os.close(fd)


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Stored]:
    made = Stored(tmp_path)
    yield made
    made.close()


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


class TestGuardian:
    def test_starts_a_killed_supervisor_again_as_it_was_started(self, tmp_path: Path) -> None:
        config = config_for(IMAGE, tmp_path / "cache", amplify_io=0, nydusd={"guardian": 0.2})
        with Daemon(
            IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path / "cache", config=config, environment={"GIVEN": "to it"}
        ) as daemon:
            for path in (ONE_CHUNK, "sizes/300K-text"):
                frontends, killed = daemon.pids("fuse"), supervisor_of(daemon)
                os.kill(killed, signal.SIGKILL)
                assert read_direct(daemon.mountpoint / path) == TRUTH[path.encode()]
                wait_until(lambda killed=killed: supervisor_of(daemon) != killed, "the next supervisor")  # type: ignore[misc]
                assert daemon.pids("fuse") == frontends
                assert b"GIVEN=to it" in Path(f"/proc/{supervisor_of(daemon)}/environ").read_bytes().split(b"\0")
            os.kill(supervisor_of(daemon), signal.SIGTERM)
            wait_until(lambda: mounts_under(daemon.folder) == set(), "the end of the mount")
            daemon.forget()


def supervisor_of(daemon: Daemon) -> int:
    return int(json.loads(state_file(daemon).read_bytes())["processes"][0][0])


class TestFailover:
    """The protocol by which nydus-snapshotter keeps a session and has a crashed daemon succeeded."""

    def test_session_is_sent_and_after_a_crash_taken_over_as_told(self, tmp_path: Path) -> None:
        config = config_for(IMAGE, tmp_path / "cache", amplify_io=0)
        path = str(tmp_path / "keeper")
        with (
            Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, args=("--supervisor", path, "--id", "x")) as daemon,
            socket.socket(socket.AF_UNIX) as keeper,
        ):
            assert daemon.request("PUT", "/api/v1/daemon/fuse/sendfd")[0] == 500  # nobody listens
            keeper.bind(path)
            keeper.listen()
            state, fds = self.exchange(daemon, keeper, "PUT", "fuse/sendfd", b"", [])
            assert state
            assert [os.readlink(f"/proc/self/fd/{fd}") for fd in fds] == ["/dev/fuse"]
            crash(daemon)
            with open(daemon.log, "ab") as log:
                daemon._process = subprocess.Popen(daemon.command, stdin=subprocess.DEVNULL, stderr=log, cwd=ROOT)
            wait_until(lambda: state_of(daemon) == "INIT", "the next daemon")
            assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
            assert daemon.request("PUT", "/api/v1/daemon/start")[0] == 400
            self.exchange(daemon, keeper, "PUT", "fuse/takeover", state, fds)
            assert state_of(daemon) == "READY"
            assert daemon.request("PUT", "/api/v1/daemon/start")[0] == 204
            assert state_of(daemon) == "RUNNING"
            assert wrong(daemon) == []
            for fd in fds:
                os.close(fd)

    @staticmethod
    def exchange(
        daemon: Daemon, keeper: socket.socket, method: str, path: str, state: bytes, fds: list[int]
    ) -> tuple[bytes, list[int]]:
        """What the daemon sends while it is asked, or, given a state, what it is sent."""
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(daemon.request(method, f"/api/v1/daemon/{path}")[0]))
        asking.start()
        wire, _ = keeper.accept()
        with wire:
            if state:
                socket.send_fds(wire, [state], fds)
            else:
                state, fds, _, _ = socket.recv_fds(wire, 4096, 4)
                assert wire.recv(1) == b""
        asking.join()
        assert answers == [204]
        return state, fds


def state_of(daemon: Daemon) -> str | None:
    try:
        answer = daemon.get("/api/v1/daemon", seconds=2.0)
    except OSError:
        return None
    assert isinstance(answer, dict)
    return str(answer["state"])


class TestFdStore:
    def test_that_has_the_fds_lets_every_process_be_killed_at_no_read(self, stored: Stored, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        config = config_for(IMAGE, cache, amplify_io=0)
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=cache, config=config, environment=stored.environment) as daemon:
            command = daemon.command
            for path in (ONE_CHUNK, "sizes/300K-text"):
                stored.until_ready()
                assert [len(fds) for fds in stored.fds.values()] == [4, 4]
                wait_for_role(daemon, "decompress", 2)
                for pid in daemon.pids("decompress"):
                    os.kill(pid, signal.SIGSTOP)
                with blocked_reader(daemon.mountpoint / path) as reader:
                    others = [pid for pid in daemon.family() if is_running(pid)]
                    daemon.kill_supervisor()
                    for pid in others:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    daemon.command = stored.giving(command)
                    daemon.start()
                    assert reader.wait(10) == 0
            assert wrong(daemon) == []

    def test_is_rid_of_what_is_over(self, stored: Stored) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, environment=stored.environment) as daemon:
            stored.until_ready()
            before = set(stored.fds)
            daemon.stop()
            daemon.command = stored.giving(daemon.command)
            daemon.start()
            stored.until_ready()
            assert len(stored.fds) == 2
            assert len(before & set(stored.fds)) in (0, 2)  # the next mount may have the number of the last
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
