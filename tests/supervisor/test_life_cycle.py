"""Start, stop, and kills of the supervisor itself, with real daemons. What is left behind, the discipline finds."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.supervisor.lives import (
    IMAGE,
    ONE_CHUNK,
    ROOT,
    blocked_reader,
    config_for,
    not_started,
    run_to_end,
    wrong,
)
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import descendants, wait_until

DEAD_MOUNT = (errno.ECONNABORTED, errno.ENOTCONN)


class TestStop:
    def test_while_a_reader_is_blocked_by_workers_that_hang(self) -> None:
        """By either signal, of two daemons at once: a stop takes as long as workers that hang are waited for."""
        with ExitStack() as stack:
            daemons, readers = {}, []
            for number in (signal.SIGTERM, signal.SIGINT):
                daemon = daemons[number] = stack.enter_context(Daemon(IMAGE.bootstrap, IMAGE.blobs))
                wait_for_role(daemon, "decompress", 2)
                for pid in [*daemon.pids("decompress"), *daemon.pids("fetch")]:
                    os.kill(pid, signal.SIGSTOP)
                readers.append(stack.enter_context(blocked_reader(daemon.mountpoint / ONE_CHUNK)))
            pool = stack.enter_context(ThreadPoolExecutor())
            for _ in pool.map(lambda number: daemons[number].stop(number), daemons):
                pass
            assert all(reader.wait(10) in DEAD_MOUNT for reader in readers)

    def test_twice_at_once_is_one_stop(self) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            os.kill(daemon.pid, signal.SIGTERM)
            os.kill(daemon.pid, signal.SIGINT)
            daemon.stop()

    def test_while_a_file_is_open_gives_its_holder_an_error_at_the_next_read(self) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            fd = os.open(daemon.mountpoint / ONE_CHUNK, os.O_RDONLY | os.O_DIRECT)
            try:
                os.pread(fd, 4096, 0)
                daemon.stop()
                with pytest.raises(OSError) as raised:
                    os.pread(fd, 4096, 0)
            finally:
                with contextlib.suppress(OSError):  # the close tells of the dead mount, too
                    os.close(fd)
            assert raised.value.errno in DEAD_MOUNT

    @pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
    def test_during_the_start_leaves_nothing(self, count: int) -> None:
        """The signal comes when `count` children are there."""
        with not_started(IMAGE.bootstrap, IMAGE.blobs) as daemon, open(daemon.log, "wb") as log:
            with subprocess.Popen(daemon.command, stdin=subprocess.DEVNULL, stderr=log, cwd=ROOT) as process:
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
    def on_mount_of(self, daemon: Daemon, environment: dict[str, str] | None = None) -> tuple[int, list[str]]:
        """How a daemon with the same mount point ends."""
        with not_started(IMAGE.bootstrap, IMAGE.blobs) as second:
            second.command[second.command.index(str(second.mountpoint))] = str(daemon.mountpoint)
            return run_to_end(second, environment)

    def test_is_refused_in_one_line_and_the_first_is_unharmed(self) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            assert wrong(daemon) == []
            assert self.on_mount_of(daemon) == (
                1,
                [
                    f"Error: {daemon.mountpoint}: nydusd with pid {daemon.pid} serves this mount point already: stop it "
                    f"(kill -TERM {daemon.pid}), or take another mount point"
                ],
            )
            assert wrong(daemon) == []
            victim = daemon.pids("decompress")[0]
            daemon.kill(victim)  # the next one must find the sockets
            wait_for_role(daemon, "decompress", 2, without=victim)
            assert daemon.get("/api/v1/daemon")

    def test_with_another_run_time_folder_neither_covers_the_mount_nor_takes_the_shared_memory(
        self, tmp_path: Path
    ) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            assert wrong(daemon) == []
            status, lines = self.on_mount_of(daemon, {"NYDUSD_RUNTIME_DIR": str(tmp_path)})
            assert (status, len(lines)) == (1, 1)
            assert "mounted here already" in lines[0]
            assert list(tmp_path.iterdir()) == []
            victim = daemon.pids("fuse")[0]
            daemon.kill(victim)  # the next one must find the segment
            wait_for_role(daemon, "fuse", 2, without=victim)
            assert wrong(daemon) == []


class TestBadStart:
    """One line, the right status, and nothing left behind."""

    def check(self, daemon: Daemon, status: int, text: str, environment: dict[str, str] | None = None) -> None:
        ended, lines = run_to_end(daemon, environment)
        assert ended == status
        assert len(lines) == 1, lines
        assert lines[0].startswith("Error: ")
        assert text in lines[0]
        assert not daemon.apisock.exists()

    @pytest.mark.parametrize("content", [b"", b"x", bytes(100_000), b"\xff" * 8192], ids=["empty", "x", "0", "ff"])
    def test_bootstrap_that_is_none(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "boot").write_bytes(content)
        with not_started(tmp_path / "boot", IMAGE.blobs) as daemon:
            self.check(daemon, 1, str(tmp_path / "boot"))

    def test_bootstrap_that_is_missing(self, tmp_path: Path) -> None:
        with not_started(tmp_path / "boot", IMAGE.blobs) as daemon:
            self.check(daemon, 1, "No such file")

    @pytest.mark.parametrize("kind", ["pipe", "folder"])
    def test_bootstrap_that_is_no_file(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "boot"
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
        with not_started(path, IMAGE.blobs) as daemon:
            self.check(daemon, 1, "is not a regular file")

    def test_bootstrap_that_is_cut_off(self, tmp_path: Path) -> None:
        whole = IMAGE.bootstrap.read_bytes()
        (tmp_path / "boot").write_bytes(whole[: len(whole) // 3])
        with not_started(tmp_path / "boot", IMAGE.blobs) as daemon:
            self.check(daemon, 1, str(tmp_path / "boot"))

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"device": 1}', '{"version": 2}'])
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

    def test_run_time_folder_whose_path_is_too_long(self, tmp_path: Path) -> None:
        folder = tmp_path / ("long" * 30)
        with not_started(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            self.check(daemon, 1, "NYDUSD_RUNTIME_DIR", {"NYDUSD_RUNTIME_DIR": str(folder)})
        assert list(folder.iterdir()) == []


def test_children_that_die_are_replaced_and_the_rest_is_left_alone() -> None:
    sizes = {"fuse": 2, "fetch": 1, "decompress": 2, "api": 1}
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        for role, size in sizes.items():
            wait_for_role(daemon, role, size)
        for role, size in sizes.items():
            others = {other: daemon.pids(other) for other in sizes if other != role}
            victim, *same = daemon.pids(role)
            daemon.kill(victim)
            wait_for_role(daemon, role, size, without=victim)
            assert set(same) <= set(daemon.pids(role))
            assert others == {other: daemon.pids(other) for other in others}
        assert wrong(daemon) == []
