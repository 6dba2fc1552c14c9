"""Endurance: what a daemon takes (memory, file descriptors, semaphores, shared memory, files) after many rounds of the same.

A scenario does its rounds and measures twice: after a warm-up, and at the end. Nothing may have grown but by what is stated.
The daemon has an image of its own, and others that are mounted by the API.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bench.image import build
from tests.support import oracle
from tests.support.daemon import Daemon, image_config
from tests.support.discipline import becomes_true, cmdline, is_running, wait_until
from tests.support.keeper import Keeper, succeed, upgrade
from tests.support.verifying import Verifying

IMAGE = oracle.image("v6-zstd-blake3")
FILES = ("sizes/70K-random", "sizes/300K-text")
MOUNTS_MOST = 20
READERS = 2
PSS_GROWTH, PSS_SLACK = 0.05, 4 << 20
"""What may be more at the end: this part, and these bytes (allocators do not give everything back at once)."""
SHARED_SLACK = 1 << 20
"""And these bytes of shared memory: an arena keeps chunks."""
WORKERS = ("fetch", "decompress")
_MET = 4
"""File descriptors that a worker may have of an image that it has met. Where workers are new in each round, what leaks is seen
at those that they come from."""
_SETTLE_SECONDS = 60.0
_LOOKS = 4
"""How often in a row a daemon must look the same."""


class Usage(NamedTuple):
    """What all processes of a daemon take together. `pss` is in bytes, `shared` the size of its shared memory in bytes.

    `fds`: by the kind of process, how many file descriptors each of that kind has, most first. `objects` are names of
    shared memory, `files` those in the daemon's folders.
    """

    pss: int
    fds: dict[str, list[int]]
    semaphores: int
    objects: int
    shared: int
    files: int

    def __str__(self) -> str:
        fds = ", ".join(f"{kind} {'+'.join(map(str, each))}" for kind, each in sorted(self.fds.items()))
        return (
            f"{self.pss / 2**20:.1f} MiB PSS in {sum(map(len, self.fds.values()))} processes, {self.semaphores} semaphores,"
            f" {self.objects} names of shared memory with {self.shared / 1024:.0f} KiB, {self.files} files;"
            f" file descriptors: {fds}"
        )


class Measured(NamedTuple):
    """What a daemon took after the warm-up and at the end.

    `worker_fds`: how many file descriptors more a worker may have: it keeps open what it has met, and no two meet the same.
    """

    before: Usage
    after: Usage
    worker_fds: int

    def growth(self) -> list[str]:
        """Sentences about what has grown."""
        before, after = self.before, self.after
        slack = {"pss": int(before.pss * PSS_GROWTH) + PSS_SLACK, "semaphores": 0, "objects": 0}
        slack |= {"shared": SHARED_SLACK, "files": 0}
        found = [
            f"{name}: {getattr(before, name)} after the warm-up, {getattr(after, name)} at the end"
            for name, more in slack.items()
            if getattr(after, name) > getattr(before, name) + more
        ]
        for kind, now in after.fds.items():
            then = before.fds.get(kind, [])
            more = self.worker_fds if kind in WORKERS else 0
            if len(now) > len(then) or any(b > a + more for a, b in zip(then, now, strict=False)):
                found.append(f"file descriptors of each {kind}: {then} after the warm-up, {now} at the end")
        return found


@contextmanager
def daemon_with_image(folder: Path, args: tuple[str, ...] = ()) -> Iterator[Daemon]:
    """A daemon with an image of its own, in which there are FILES, and folders to mount others upon.

    No worker of it rests: how many there are does not depend on what was asked last.
    """
    tree = folder / "tree"
    for file in FILES:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).write_bytes(oracle.truth(IMAGE.name)[file.encode()])
    for place in ("again", *(f"m{number}" for number in range(MOUNTS_MOST))):
        (tree / place).mkdir()
    built = build(tree, folder / "image")
    config = image_config(built.blob.parent, folder / "cache")
    config["nydusd"] = {"front_ends": 2, "worker_idle": 0}
    with Daemon(built.bootstrap, built.blob.parent, cache=folder / "cache", config=config, args=args) as daemon:
        yield daemon


def usage(daemon: Daemon, folder: Path) -> Usage:
    """What the daemon takes now. `folder` has its caches."""
    pss = 0
    fds: dict[str, list[int]] = {}
    for pid in (daemon.pid, *daemon.family()):
        with suppress(OSError):  # it has just ended
            kind = "supervisor" if pid == daemon.pid else cmdline(pid).removeprefix("nydusd: ").rstrip(" 0123456789")
            if is_running(pid):
                pss += _pss(pid)
                fds.setdefault(kind, []).append(len(os.listdir(f"/proc/{pid}/fd")))
    state = next(
        path
        for path in Path(os.environ["NYDUSD_RUNTIME_DIR"]).glob("*/state.json")
        if json.loads(path.read_bytes())["mountpoint"] == str(daemon.mountpoint)
    )
    name = f"nydusd.{state.parent.name}."
    objects = [entry for entry in os.listdir("/dev/shm") if entry.startswith(name)]
    semaphores = [entry for entry in os.listdir("/dev/shm") if entry.startswith(f"sem.{name}")]
    shared = 0
    for entry in objects:
        with suppress(FileNotFoundError):
            shared += os.stat(f"/dev/shm/{entry}").st_blocks * 512
    kept = [path for top in (state.parent, folder) for path in top.rglob("*")]
    # A chunk map is stored when it is time.
    files = len(os.listdir(daemon.folder)) + sum("chunk_map" not in path.name for path in kept)
    each = {kind: sorted(numbers, reverse=True) for kind, numbers in fds.items()}
    return Usage(pss, each, len(semaphores), len(objects), shared, files)


def _pss(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def settled_usage(daemon: Daemon, folder: Path) -> Usage:
    """`usage` once nothing is under way: no process comes or goes, no worker has a job, and it is the same at some looks."""
    seen: list[Usage] = []

    def is_quiet() -> bool:
        seen.append(usage(daemon, folder))
        answer = daemon.get("/api/v1/nydusd/workers")
        assert isinstance(answer, dict)
        last = [look._replace(pss=0, shared=0) for look in seen[-_LOOKS:]]
        same = len(last) == _LOOKS and all(look == last[0] for look in last)
        return same and all(row["state"] in ("idle", "running") for row in answer["processes"])

    wait_until(is_quiet, "a daemon in which nothing is under way", _SETTLE_SECONDS)
    return seen[-1]


def measured(
    daemon: Daemon,
    folder: Path,
    one: Callable[[int], None],
    rounds: int,
    warm_up: int,
    *,
    worker_fds: int,
    before_looking: Callable[[], None] = lambda: None,
) -> Measured:
    """Do `one(number)` so often; what the daemon takes after the warm-up and at the end, if need be a while later."""
    for number in range(warm_up):
        one(number)
    before_looking()
    before = settled_usage(daemon, folder)
    for number in range(warm_up, rounds):
        one(number)
    before_looking()
    found: list[Measured] = []

    def is_flat() -> bool:
        found[:] = [Measured(before, settled_usage(daemon, folder), worker_fds)]
        return not found[0].growth()

    becomes_true(is_flat, _SETTLE_SECONDS)
    return found[0]


def measured_with(
    files: Sequence[tuple[int, bytes]],
    daemon: Daemon,
    folder: Path,
    one: Callable[[int], None],
    rounds: int,
    warm_up: int,
) -> Measured:
    """`measured` while a file of each mount is open: who serves them has met them all when it is looked at."""
    return measured(
        daemon, folder, one, rounds, warm_up, worker_fds=_MET * len(files), before_looking=lambda: meet(daemon, files)
    )


def upgrades_with_open_files(daemon: Daemon, folder: Path, mounts: int, rounds: int, warm_up: int) -> Measured:
    """Upgrade the workers again and again, while a file of each mount is open and read after each upgrade."""
    with ExitStack() as stack:
        files = open_files(stack, daemon, folder, mounts)

        def one(_number: int) -> None:
            daemon.ctl("workers", "upgrade")
            check(files)

        return measured_with(files, daemon, folder, one, rounds, warm_up)


def successions(daemon: Daemon, keeper: Keeper, folder: Path, mounts: int, rounds: int, warm_up: int) -> Measured:
    """Have the daemon succeeded again and again, killed or while it serves, by turns, as nydus-snapshotter does.

    Under readers, while a file of each mount is open and read after each succession.
    """
    keeper.save(daemon)
    truth = folder / "truth"
    truth.mkdir()
    for file in FILES:
        (truth / Path(file).name).write_bytes(oracle.truth(IMAGE.name)[file.encode()])
    with ExitStack() as stack:
        files = open_files(stack, daemon, folder, mounts)
        readers = stack.enter_context(Verifying((daemon.mountpoint / FILES[0]).parent, truth, folder, READERS))

        def one(number: int) -> None:
            if number % 2:
                upgrade(daemon, keeper)
            else:
                daemon.kill_supervisor()
                succeed(daemon, keeper)
            check(files)
            readers.go_on(READERS)

        return measured_with(files, daemon, folder, one, rounds, warm_up)


def mounts_and_umounts(daemon: Daemon, folder: Path, rounds: int, warm_up: int) -> Measured:
    """Mount an image by the API, read a file, unmount it, again and again. A file of the daemon's own image is open."""
    with ExitStack() as stack:
        files = open_files(stack, daemon, folder, 0)

        def one(_number: int) -> None:
            mount(daemon, "/again", folder / "cache-again", cached=True)
            path = daemon.mountpoint / "again" / FILES[0]
            assert path.read_bytes() == oracle.truth(IMAGE.name)[FILES[0].encode()]
            umount(daemon, "/again")
            check(files)

        # A worker has what it had of the last mount until it is told something else.
        return measured(
            daemon, folder, one, rounds, warm_up, worker_fds=_MET, before_looking=lambda: meet(daemon, files)
        )


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


def umount(daemon: Daemon, place: str) -> None:
    assert daemon.umount(place) == (204, "")


def open_files(stack: ExitStack, daemon: Daemon, folder: Path, mounts: int) -> list[tuple[int, bytes]]:
    """Open a file of the daemon's own image, and one of each of so many mounts, of which every second has a cache.

    `stack` closes and unmounts them.
    """
    files = []
    for number in range(-1, mounts):
        if number >= 0:
            mount(daemon, f"/m{number}", folder / f"cache{number}", cached=number % 2 == 0)
            stack.callback(umount, daemon, f"/m{number}")
        top = daemon.mountpoint if number < 0 else daemon.mountpoint / f"m{number}"
        file = FILES[number // 2 % len(FILES)]
        fd = os.open(top / file, os.O_RDONLY | os.O_DIRECT)
        stack.callback(os.close, fd)
        files.append((fd, oracle.truth(IMAGE.name)[file.encode()]))
    return files


def check(files: Sequence[tuple[int, bytes]]) -> None:
    """Each open file gives what is in it."""
    for fd, content in files:
        assert os.pread(fd, 1 << 20, 0) == content


def meet(daemon: Daemon, files: Sequence[tuple[int, bytes]]) -> None:
    """Have each front end read each file, so that what it has open does not depend on who was asked before."""
    front_ends = daemon.pids("fuse")
    for front_end in front_ends:
        others = [pid for pid in front_ends if pid != front_end]
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        try:
            # One that is about to stop may take a request still.
            wait_until(lambda others=others: all(map(_has_stopped, others)), "the others to stop", _SETTLE_SECONDS)  # type: ignore[misc]
            check(files)
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)


def _has_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
