"""A systemd of our own: pid 1 of fresh namespaces (pid, mount, cgroup, uts, ipc), with no units but ours."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.discipline import wait_until

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sysinit", "basic", "shutdown", "umount", "final", "multi-user", "network-online", "local-fs", "default")

INIT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /etc/nydusd
mount -t tmpfs tmpfs /var/lib/nydus
while mountpoint -q /sys/fs/cgroup; do umount -R /sys/fs/cgroup; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=test NYDUSD_TEST_ID="$NYDUSD_TEST_ID" SYSTEMD_UNIT_PATH={units} \\
    /lib/systemd/systemd --system --show-status=no --log-target=console --log-level=notice
"""


class Machine:
    """`folder` is seen inside and outside under the same path."""

    def __init__(self, folder: Path) -> None:
        self.units = folder / "units"
        self.log = folder / "systemd.log"
        self.units.mkdir()
        for target in TARGETS:
            (self.units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        self._folders = [path for path in (Path("/etc/nydusd"), Path("/var/lib/nydus")) if not path.exists()]
        for path in self._folders:  # what is mounted over; empty, and removed again
            path.mkdir()
        command = [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--mount-proc",
            "--cgroup",
            "--uts",
            "--ipc",
        ]
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [*command, "sh", "-c", INIT.format(units=self.units)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(lambda: self.init() != 0, "pid 1")
        wait_until(lambda: self.run("systemctl", "is-active", "default.target").returncode == 0, "systemd")

    def init(self) -> int:
        """The pid of its pid 1, as we see it; 0 before it is there."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        assert self._process.poll() is None, self.log.read_text()
        return int(children[0]) if children else 0

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        inside = ["nsenter", "--target", str(self.init()), "--mount", "--pid", "--uts", "--ipc", "--cgroup"]
        return subprocess.run([*inside, *command], capture_output=True, text=True, timeout=60, check=False)

    def systemctl(self, *arguments: str) -> str:
        """The output of a systemctl that succeeds."""
        done = self.run("systemctl", "--no-pager", *arguments)
        assert done.returncode == 0, f"systemctl {arguments}: {done.stderr}\n{self.log.read_text()}"
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", unit, "--value", f"--property={name}")

    def close(self) -> None:
        """SIGKILL to pid 1 ends all in its namespace."""
        os.kill(self.init(), signal.SIGKILL)
        self._process.wait()
        for path in self._folders:
            path.rmdir()


@contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    it = Machine(folder)
    try:
        yield it
    finally:
        it.close()
