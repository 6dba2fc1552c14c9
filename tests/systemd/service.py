"""The unit `nydusd@one` on a machine with a systemd of its own: installed there, killed, stopped and looked at."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.discipline import wait_until
from tests.systemd.machine import ROOT, Machine, machine

UNIT = "nydusd@one.service"
ASK = """
import http.client, socket, sys
api = http.client.HTTPConnection("localhost")
api.sock = socket.socket(socket.AF_UNIX)
api.sock.connect(sys.argv[1])
api.request("GET", sys.argv[2])
answer = api.getresponse()
assert answer.status == 200
print(answer.read().decode())
"""


@contextmanager
def service(
    folder: Path, bootstrap: Path, config: dict[str, object], *, watchdog: int = 10, drop_in: str = ""
) -> Iterator[Machine]:
    """A machine whose `nydusd@one` is ours, with the image, not started yet; `drop_in`: one of ours that goes over the unit.

    `mnt` in its folder is the mount point.
    """
    commands = folder / "prefix" / "bin"
    commands.mkdir(parents=True)
    os.symlink(Path(sys.executable).parent / "nydusd", commands / "nydusd")
    (folder / "mnt").mkdir()
    with machine(folder) as it:
        text = _ours("nydusd@.service", folder)
        assert "WatchdogSec=10" in text
        text = text.replace("WatchdogSec=10", f"WatchdogSec={watchdog}\nStandardError=append:{log_of(folder)}")
        (it.units / "nydusd@.service").write_text(text)
        if drop_in:
            (it.units / f"{UNIT}.d").mkdir()
            (it.units / f"{UNIT}.d" / "ours.conf").write_text(_ours(drop_in, folder))
        (folder / "one.env").write_text(f"BOOTSTRAP={bootstrap}\nMOUNTPOINT={folder / 'mnt'}\n")
        (folder / "one.toml").write_text(json.dumps(config))
        for name in ("one.env", "one.toml"):
            assert it.run("cp", str(folder / name), "/etc/nydusd").returncode == 0
        it.systemctl("daemon-reload")
        yield it


def log_of(folder: Path) -> Path:
    """What the processes of the service say."""
    return folder / "service.log"


def _ours(name: str, folder: Path) -> str:
    return (ROOT / "systemd" / name).read_text().replace("@PREFIX@", str(folder / "prefix"))


def asked(node: Machine, path: str) -> Any:
    """What the API of the service answers; None if nobody answers."""
    done = node.run(sys.executable, "-c", ASK, "/run/nydusd/one.sock", path)
    return json.loads(done.stdout) if done.returncode == 0 else None


def device(node: Machine, folder: Path) -> str:
    """The file system that is mounted for the service, as `major:minor`."""
    lines = node.run("cat", "/proc/self/mountinfo").stdout.splitlines()
    return next(line.split()[2] for line in lines if line.split()[4] == str(folder / "mnt"))


def kill(node: Machine, who: str, signal: str = "KILL") -> None:
    """Kill the main process of the service, or all, and wait until another daemon serves."""
    pid = node.show(UNIT, "MainPID")
    node.systemctl("kill", f"--signal={signal}", f"--kill-who={who}", UNIT)
    wait_until(
        lambda: node.show(UNIT, "MainPID") not in ("0", pid) and node.show(UNIT, "ActiveState") == "active",
        "a successor",
        90,
    )


def stop_and_look(node: Machine, folder: Path) -> None:
    """Stop the service; AssertionError for what it leaves."""
    node.systemctl("stop", UNIT)
    assert node.show(UNIT, "Result") == "success"
    assert node.run("mountpoint", "-q", str(folder / "mnt")).returncode != 0
    # Who held what readers had open ends a moment after them.
    wait_until(lambda: node.run("pgrep", "-f", "nydusd").stdout == "", "the end of all processes", 60)
    assert node.run("ls", "/run/nydusd", "/dev/shm").stdout.split() == ["/dev/shm:", "/run/nydusd:"]
