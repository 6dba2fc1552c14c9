"""What systemd hears, with a socket that stands in for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.supervisor.lives import IMAGE, crash
from tests.supervisor.systemd import Systemd
from tests.support.daemon import Daemon, wait_for_role


class TestDaemon:
    def environment(self, systemd: Systemd, microseconds: int) -> dict[str, str]:
        return {"NOTIFY_SOCKET": systemd.path, "WATCHDOG_USEC": str(microseconds)}

    def test_ready_comes_when_the_image_is_mounted_and_stopping_before_the_end(self, systemd: Systemd) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, environment=self.environment(systemd, 600_000_000)) as daemon:
            assert systemd.until("READY")["STATUS"] == f"{IMAGE.bootstrap} is mounted at {daemon.mountpoint}"
            wait_for_role(daemon, "decompress", len(os.sched_getaffinity(0)))
            for pid in [*daemon.pids("fuse"), *daemon.pids("decompress"), *daemon.pids("api")]:
                assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
            daemon.stop()
        assert systemd.until("STOPPING")["STOPPING"] == "1"

    def test_progress_is_told_until_all_blobs_are_open(self, systemd: Systemd) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, environment=self.environment(systemd, 600_000_000)):
            ready = systemd.until("READY")["STATUS"]
            seen = [systemd.until("STATUS")["STATUS"]]
            while seen[-1] != ready:
                seen.append(systemd.until("STATUS")["STATUS"])
            assert set(seen[:-1]) <= {f"{ready}; {number} of 1 blobs are open" for number in range(2)}

    def test_signs_of_life_come_as_long_as_the_supervisor_looks_after_things(self, systemd: Systemd) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, environment=self.environment(systemd, 300_000)) as daemon:
            systemd.until("READY")
            for _ in range(3):
                assert systemd.until("WATCHDOG")
            os.kill(daemon.pid, signal.SIGSTOP)
            systemd.socket.settimeout(0.5)
            with pytest.raises(TimeoutError):
                while True:
                    systemd.message()
            systemd.socket.settimeout(30)
            os.kill(daemon.pid, signal.SIGCONT)
            assert systemd.until("WATCHDOG")

    def test_start_after_a_crash_says_ready_again(self, systemd: Systemd) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, environment=self.environment(systemd, 600_000_000)) as daemon:
            systemd.until("READY")
            crash(daemon)
            daemon.start()
            assert systemd.until("READY")
