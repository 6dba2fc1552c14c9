"""Start, stop, and kills of the supervisor itself, with real daemons. What is left behind, the discipline finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.supervisor.lives import IMAGE, ONE_CHUNK, config_for, crash, not_started, read_direct, run_to_end, wrong
from tests.support.daemon import Daemon
from tests.support.discipline import becomes_true, cmdline, descendants, is_running, wait_until
from tests.support.oracle import truth

Expect = Callable[..., None]

READ = "import os,sys; fd=os.open(sys.argv[1], os.O_RDONLY); print('open', flush=True)\n" + (
    "try: os.read(fd, 4096)\nexcept OSError as e: sys.exit(e.errno)"
)


def blocked_reader(path: Path) -> subprocess.Popen[bytes]:
    """A process that reads a file; given back when the read is under way. Its exit status is the errno it got."""
    reader = subprocess.Popen([sys.executable, "-c", READ, str(path)], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"open\n"
    wait_until(lambda: "fuse" in Path(f"/proc/{reader.pid}/wchan").read_text() or _sleeps(reader.pid), "a blocked read")
    return reader


def _sleeps(pid: int) -> bool:
    return "request_wait_answer" in Path(f"/proc/{pid}/stack").read_text()


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
    def test_while_a_reader_is_blocked_by_a_worker_that_hangs(self, number: signal.Signals) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            for pid in [*daemon.pids("decompress"), *daemon.pids("fetch")]:
                os.kill(pid, signal.SIGSTOP)
            reader = blocked_reader(daemon.mountpoint / ONE_CHUNK)
            daemon.stop(number)
            assert reader.wait(10) != 0
            assert reader.stdout is not None
            reader.stdout.close()

    def test_twice_at_once_is_one_stop(self) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            os.kill(daemon.pid, signal.SIGTERM)
            os.kill(daemon.pid, signal.SIGINT)
            daemon.stop()

    def test_while_a_file_is_open_lets_its_holder_go_on_to_an_error(self) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon, open(daemon.mountpoint / ONE_CHUNK, "rb") as file:
            file.read(1)
            daemon.stop()
            with pytest.raises(OSError):
                os.pread(file.fileno(), 1, 69_000) or os.fstat(file.fileno())

    @pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
    def test_during_the_start_leaves_nothing(self, count: int) -> None:
        """The signal comes when `count` children are there."""
        with not_started(IMAGE.bootstrap, IMAGE.blobs) as daemon, open(daemon.log, "wb") as log:
            with subprocess.Popen(daemon.command, stdin=subprocess.DEVNULL, stderr=log, cwd=os.getcwd()) as process:
                wait_until(
                    lambda: len(descendants(process.pid)) >= count and _handles_signals(process.pid), "the start"
                )
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
            assert not os.path.ismount(daemon.mountpoint)


def _handles_signals(pid: int) -> bool:
    """Whether SIGTERM is caught: before that a process has made nothing that it could leave behind."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) & (1 << (signal.SIGTERM - 1)))
    return False


class TestSecondDaemon:
    def test_on_one_mount_point_is_refused_in_one_line_and_the_first_is_unharmed(self) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            reads_before = wrong(daemon)
            with not_started(IMAGE.bootstrap, IMAGE.blobs) as second:
                second.command = [
                    str(daemon.mountpoint) if part == str(second.mountpoint) else part for part in second.command
                ]
                status, lines = run_to_end(second)
            assert status == 1
            assert lines == [
                f"Error: {daemon.mountpoint}: nydusd with pid {daemon.pid} serves this mount point already"
            ]
            assert reads_before == wrong(daemon) == []
            assert daemon.get("/api/v1/daemon")
            daemon.kill(daemon.pids("decompress")[0])  # a new one must find the sockets
            assert read_direct(daemon.mountpoint / "dup/a") == truth(IMAGE.name)[b"dup/a"]

    def test_with_another_run_time_folder_does_not_cover_the_mount(self, tmp_path: Path) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            with not_started(IMAGE.bootstrap, IMAGE.blobs) as second:
                second.command[second.command.index(str(second.mountpoint))] = str(daemon.mountpoint)
                done = subprocess.run(
                    second.command,
                    env=os.environ | {"NYDUSD_RUNTIME_DIR": str(tmp_path)},
                    capture_output=True,
                    text=True,
                    timeout=30,
                    check=False,
                )
            assert done.returncode == 1
            assert "mounted here already" in done.stderr
            assert list(tmp_path.iterdir()) == []
            assert wrong(daemon) == []


class TestKilledSupervisor:
    def test_cached_files_are_served_on_and_the_same_command_starts_anew(self) -> None:
        """The checkpoint has not run: what is ready is known from shared memory alone."""
        config = config_for(IMAGE, Path("/nonexistent"))
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            config_file = Path(daemon.command[daemon.command.index("-C") + 1])
            config = json.loads(config_file.read_text()) | {"nydusd": {"checkpoint_interval": 3600}}
            config_file.write_text(json.dumps(config))
            daemon.stop()
            daemon.start()
            assert wrong(daemon) == []
            assert daemon.backend_reads() > 0
            assert list(daemon.cache.glob("*.chunk_map")) == []
            frontends = crash(daemon)
            assert all(map(is_running, frontends))
            assert wrong(daemon) == []
            daemon.start()
            assert not any(map(is_running, frontends))
            for pid in frontends:
                os.waitpid(pid, 0)
            assert wrong(daemon) == []
            assert daemon.backend_reads() == 0
            daemon.stop()
            daemon.start()  # what was inherited has also been stored at the stop
            assert wrong(daemon) == []
            assert daemon.backend_reads() == 0

    def test_again_and_again_in_the_middle_of_reads_gives_right_bytes(self) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            for path in ("dup/a", "sizes/1048577", ONE_CHUNK, "sizes/300K-text"):
                assert read_direct(daemon.mountpoint / path) == truth(IMAGE.name)[path.encode()]
                frontends = crash(daemon)
                daemon.start()
                for pid in frontends:
                    os.waitpid(pid, 0)
            assert wrong(daemon) == []

    def test_then_a_miss_waits_for_the_successor_or_ends_with_an_error(self) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            (daemon.mountpoint / "dup/a").read_bytes()
            frontends = crash(daemon)
            reader = blocked_reader(daemon.mountpoint / ONE_CHUNK)
            daemon.start()
            assert reader.wait(10) != 0  # its mount is gone with the old front ends
            assert reader.stdout is not None
            reader.stdout.close()
            for pid in frontends:
                os.waitpid(pid, 0)
            assert wrong(daemon) == []


class TestBadStart:
    """One line, the right status, and nothing left behind."""

    def check(self, daemon: Daemon, status: int, text: str) -> None:
        ended, lines = run_to_end(daemon)
        assert ended == status
        assert len(lines) == 1, lines
        assert lines[0].startswith("Error: ")
        assert text in lines[0]
        assert not daemon.apisock.exists()

    @pytest.mark.parametrize("content", [b"", b"x", bytes(100_000), b"\xff" * 8192])
    def test_bootstrap_that_is_none(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "boot").write_bytes(content)
        with not_started(tmp_path / "boot", IMAGE.blobs) as daemon:
            self.check(daemon, 1, str(tmp_path / "boot"))

    def test_bootstrap_that_is_missing(self, tmp_path: Path) -> None:
        with not_started(tmp_path / "boot", IMAGE.blobs) as daemon:
            self.check(daemon, 1, "No such file")

    def test_bootstrap_that_is_a_pipe_or_a_folder(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", tmp_path):
            with not_started(path, IMAGE.blobs) as daemon:
                self.check(daemon, 1, "is not a regular file")

    def test_bootstrap_that_is_cut_off(self, tmp_path: Path) -> None:
        whole = IMAGE.bootstrap.read_bytes()
        (tmp_path / "boot").write_bytes(whole[: len(whole) // 3])
        with not_started(tmp_path / "boot", IMAGE.blobs) as daemon:
            self.check(daemon, 1, str(tmp_path / "boot"))

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"device": 1}', '{"version": 2}', "\0"])
    def test_configuration_that_makes_no_sense(self, text: str) -> None:
        with not_started(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            Path(daemon.command[daemon.command.index("-C") + 1]).write_text(text)
            self.check(daemon, 2, "")

    def test_mount_point_that_is_missing(self) -> None:
        with not_started(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            daemon.mountpoint.rmdir()
            self.check(daemon, 2, "--mountpoint")

    def test_api_socket_that_cannot_be_bound(self) -> None:
        with not_started(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            daemon.command[daemon.command.index(str(daemon.apisock))] = "/nonexistent/api.sock"
            self.check(daemon, 1, "--apisock")

    def test_prefetch_list_that_is_missing(self) -> None:
        config = config_for(IMAGE, Path("/nonexistent"), fs_prefetch={"enable": True})
        with not_started(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
            daemon.command += ["--prefetch-files", "/nonexistent"]
            self.check(daemon, 2, "--prefetch-files")

    def test_run_time_folder_whose_path_is_too_long(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NYDUSD_RUNTIME_DIR", str(tmp_path / ("long" * 30)))
        with not_started(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            self.check(daemon, 1, "NYDUSD_RUNTIME_DIR")
        assert list((tmp_path / ("long" * 30)).iterdir()) == []


def test_children_that_die_are_replaced_and_the_rest_is_left_alone() -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        before = {role: daemon.pids(role) for role in ("fuse", "fetch", "decompress", "api")}
        for role, pids in before.items():
            daemon.kill(pids[0])
            assert becomes_true(
                lambda role=role, pids=pids: len(daemon.pids(role)) == len(pids) and pids[0] not in daemon.pids(role),  # type: ignore[misc]
                20,
            ), f"{role}: {[cmdline(pid) for pid in descendants(daemon.pid)]}"
            assert daemon.pids(role)[: len(pids) - 1] == pids[1:]
        assert wrong(daemon) == []
