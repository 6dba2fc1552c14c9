"""What keeps a session beside front ends: the guardian, nydus-snapshotter, systemd's fd store. Real daemons, killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

from tests.supervisor.lives import (
    IMAGE,
    ONE_CHUNK,
    ROOT,
    blocked_reader,
    config_for,
    crash,
    read_direct,
    state_file,
    wrong,
)
from tests.supervisor.stored import Stored
from tests.support import oracle
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import is_running, mounts_under, wait_until

TRUTH = oracle.truth(IMAGE.name)


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
