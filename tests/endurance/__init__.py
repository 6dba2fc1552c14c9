"""Endurance: what a daemon takes (memory, file descriptors, semaphores, shared memory) after many rounds of the same.

A scenario does its rounds and measures twice: after a warm-up, and at the end. Nothing may have grown but by what is stated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tests.support import oracle
from tests.support.daemon import Daemon, image_config
from tests.support.discipline import wait_until

IMAGE = oracle.image("v6-zstd-blake3")
FILES = ("sizes/70K-random", "sizes/300K-text")
PSS_GROWTH, PSS_SLACK = 0.05, 4 << 20
"""What may be more at the end: this part, and these bytes (allocators do not give everything back at once)."""
SLACK = {"processes": 0, "fds": 4, "semaphores": 0, "shared": 1 << 20}
"""And of the rest: a worker keeps open what it has met, the last one a file more than the one before; an arena keeps chunks."""
_SETTLE_SECONDS = 60.0


class Usage(NamedTuple):
    """What all processes of a daemon take together. `pss` is in bytes, `shared` the size of its shared memory in bytes."""

    pss: int
    processes: int
    fds: int
    semaphores: int
    shared: int

    def __str__(self) -> str:
        return (
            f"{self.pss / 2**20:.1f} MiB PSS in {self.processes} processes, {self.fds} file descriptors,"
            f" {self.semaphores} semaphores, {self.shared / 1024:.0f} KiB of shared memory"
        )


def usage(daemon: Daemon) -> Usage:
    """What the daemon takes now."""
    pids = [daemon.pid, *daemon.family()]
    state = next(
        path
        for path in Path(os.environ["NYDUSD_RUNTIME_DIR"]).glob("*/state.json")
        if json.loads(path.read_bytes())["mountpoint"] == str(daemon.mountpoint)
    )
    name = f"nydusd.{state.parent.name}."
    shared = [
        os.stat(f"/dev/shm/{entry}").st_blocks * 512 for entry in os.listdir("/dev/shm") if entry.startswith(name)
    ]
    semaphores = [entry for entry in os.listdir("/dev/shm") if entry.startswith(f"sem.{name}")]
    fds = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
    return Usage(sum(map(_pss, pids)), len(pids), fds, len(semaphores), sum(shared))


def _pss(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def settled_usage(daemon: Daemon) -> Usage:
    """`usage` once nothing is under way: no process comes or goes, no worker has a job."""

    def is_quiet() -> bool:
        answer = daemon.get("/api/v1/nydusd/workers")
        assert isinstance(answer, dict)
        rows = answer["processes"]
        return all(row["state"] in ("idle", "running", "resting") for row in rows)

    wait_until(is_quiet, "all workers to be idle", _SETTLE_SECONDS)
    return usage(daemon)


def growth(before: Usage, after: Usage) -> list[str]:
    """Sentences about what has grown."""
    found = [
        f"{name}: {getattr(before, name)} after the warm-up, {getattr(after, name)} at the end"
        for name, slack in SLACK.items()
        if getattr(after, name) > getattr(before, name) + slack
    ]
    if after.pss > before.pss * (1 + PSS_GROWTH) + PSS_SLACK:
        found.append(f"PSS: {before.pss} bytes after the warm-up, {after.pss} at the end")
    return found


def upgrades_with_open_files(daemon: Daemon, folder: Path, mounts: int, rounds: int, warm_up: int) -> list[Usage]:
    """Upgrade the workers again and again, while a file of each mount is open and read after each upgrade."""
    with ExitStack() as stack:
        files = []
        for number in range(mounts):
            mount(daemon, f"/m{number}", folder / f"cache{number}", cached=number % 2 == 0)
            file = FILES[number // 2 % len(FILES)]
            fd = os.open(daemon.mountpoint / f"m{number}" / file, os.O_RDONLY | os.O_DIRECT)
            stack.callback(os.close, fd)
            files.append((fd, oracle.truth(IMAGE.name)[file.encode()]))

        def one() -> None:
            daemon.ctl("workers", "upgrade")
            check(files)

        return measured(daemon, one, rounds, warm_up)


def mounts_and_umounts(daemon: Daemon, folder: Path, rounds: int, warm_up: int) -> list[Usage]:
    """Mount an image by the API, read a file, unmount it, again and again."""

    def one() -> None:
        mount(daemon, "/again", folder / "cache", cached=True)
        path = daemon.mountpoint / "again" / FILES[0]
        assert path.read_bytes() == oracle.truth(IMAGE.name)[FILES[0].encode()]
        assert daemon.umount("/again") == (204, "")

    return measured(daemon, one, rounds, warm_up)


def mount(daemon: Daemon, place: str, cache: Path, *, cached: bool) -> None:
    """Mount the image with a cache of its own, or with none."""
    config = image_config(IMAGE.blobs, cache) | {"id": place}
    if not cached:
        device = config["device"]
        assert isinstance(device, dict)
        device["cache"]["type"] = ""
    command = {"fs_type": "rafs", "source": str(IMAGE.bootstrap), "config": json.dumps(config)}
    status, body = daemon.request("POST", f"/api/v1/mount?mountpoint={place}", json.dumps(command).encode())
    assert status == 204, body


def check(files: Sequence[tuple[int, bytes]]) -> None:
    """Each open file gives what is in it."""
    for fd, content in files:
        assert os.pread(fd, 1 << 20, 0) == content


def measured(daemon: Daemon, one: Callable[[], None], rounds: int, warm_up: int) -> list[Usage]:
    """Do it so often; what the daemon takes after the warm-up and at the end."""
    found = []
    for number in range(1, rounds + 1):
        one()
        if number in (warm_up, rounds):
            found.append(settled_usage(daemon))
    return found
