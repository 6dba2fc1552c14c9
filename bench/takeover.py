"""`python -m bench.takeover [KILLS]`: how long a read of what is not cached waits when the supervisor is killed.

One daemon; a reader that asks for one chunk after another that nobody has read yet, and, in every second table, 16 processes
that read what is cached, as fast as they can, past the page cache: the machine is busy then. The supervisor is killed KILLS
(10) times, alone or with all other processes of the daemon but the one that holds the mount, and the same command is started
at once each time, as whoever looks after a daemon does. A line each for a successor that loads all by itself
(NYDUSD_NURSERY=off), and for one that comes from a nursery (NYDUSD_NURSERY=always): seconds of the longest read of each kill,
the median and the worst, and of a miss in between.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Event, Process
from multiprocessing.synchronize import Event as Flag
from pathlib import Path
from typing import Any

from bench.image import Built, build, configuration
from bench.processes import family, title
from nydusd.forkserver.process import take_in_orphans

_READERS = 16
_CHUNK = 1 << 16
_CACHED = 8 << 20
_UNREAD = 128 << 20
_PAUSE = 0.01
"""Seconds between two reads of chunks that are not cached."""
_BETWEEN = 1.5
"""Seconds between two kills: a nursery that was started is there by then, on a busy machine as well."""


class Misses:
    """Reads a file chunk by chunk, once, and notes when each read began, and how long it took."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.reads: list[tuple[float, float]] = []

    def __enter__(self) -> Misses:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        page = [mmap.mmap(-1, 4096)]
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        for offset in range(0, _UNREAD, _CHUNK):
            if self._end.wait(_PAUSE):
                break
            begin = time.monotonic()
            os.preadv(fd, page, offset)
            self.reads.append((begin, time.monotonic() - begin))
        os.close(fd)


def main(argv: list[str]) -> int:
    """Measure and print the table."""
    kills = int(argv[0]) if argv else 10
    take_in_orphans()  # whoever loses its parent stays below us
    with tempfile.TemporaryDirectory(prefix="nydusd-takeover-", dir="/dev/shm") as name:
        folder = Path(name)
        tree = folder / "tree"
        tree.mkdir()
        (tree / "cached").write_bytes(os.urandom(_CACHED))
        (tree / "unread").write_bytes(os.urandom(_UNREAD))
        image = build(tree, folder / "image", _CHUNK)
        print("| machine | killed | successor | wait, s (median) | wait, s (worst) | a miss without a kill, s |")
        print("| --- | --- | --- | --- | --- | --- |")
        for readers, victims, mode in itertools.product((0, _READERS), VICTIMS, MODES):
            with tempfile.TemporaryDirectory(dir=folder) as work:
                waits, usual = measure(image, Path(work), mode, readers, kills, VICTIMS[victims])
            machine = f"{readers} readers" if readers else "idle"
            row = (statistics.median(waits), max(waits), usual)
            figures = " | ".join(f"{value:.3f}" for value in row)
            print(f"| {machine} | {victims} | {MODES[mode]} | {figures} |", flush=True)
    return 0


def nobody_else(_run: Path) -> list[int]:
    return []


def all_but_a_fork_server(run: Path) -> list[int]:
    """Those of a daemon's processes that may die with its supervisor: all but one fork server that is noted as a holder."""
    while not (keepers := [row["pid"] for row in holders(run) if row["role"] == "keeper"]):
        time.sleep(0.001)
    roles = [f"nydusd: {role}" for role in ("fuse", "fetch", "decompress", "fork server")]
    return [pid for pid in family(os.getpid()) if title(pid).startswith(tuple(roles)) and pid != keepers[0]]


def holders(run: Path) -> list[dict[str, Any]]:
    """Of the mount, as a successor finds them."""
    return [row for path in run.glob("*/state.json") for row in json.loads(path.read_bytes()).get("holders", ())]


VICTIMS = {"the supervisor": nobody_else, "all but a fork server": all_but_a_fork_server}
MODES = {"off": "loads all by itself", "always": "from a nursery"}


def measure(
    image: Built, work: Path, mode: str, readers: int, kills: int, victims: Callable[[Path], list[int]]
) -> tuple[list[float], float]:
    """The longest wait after each kill, and the median of the reads that no kill concerned."""
    mountpoint = work / "mnt"
    mountpoint.mkdir()
    # One miss brings no other chunk.
    (work / "config.json").write_text(json.dumps(json.loads(configuration(image, work / "cache")) | {"amplify_io": 0}))
    command = [str(Path(sys.executable).with_name("nydusd")), "fuse", "-B", str(image.bootstrap)]
    command += ["-C", str(work / "config.json"), "-M", str(mountpoint), "--log-level", "error"]
    environment = os.environ | {"NYDUSD_RUNTIME_DIR": str(work / "run"), "NYDUSD_NURSERY": mode}
    process = subprocess.Popen(command, env=environment)
    times = []
    try:
        while not os.path.ismount(mountpoint):
            time.sleep(0.001)
        (mountpoint / "cached").read_bytes()
        with busy(mountpoint / "cached", readers), Misses(mountpoint / "unread") as misses:
            for _ in range(kills):
                time.sleep(_BETWEEN)
                others = victims(work / "run")
                times.append(time.monotonic())
                process.send_signal(signal.SIGKILL)
                for pid in others:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
                process = subprocess.Popen(command, env=environment)
            time.sleep(_BETWEEN)
    finally:
        process.terminate()
        process.wait()
        while any(pid != os.getpid() and "nydusd: " in title(pid) for pid in family(os.getpid())):
            time.sleep(0.05)
    times.append(time.monotonic())
    waits = [
        max((took for begin, took in misses.reads if begin < then and begin + took > now), default=0.0)
        for now, then in itertools.pairwise(times)
    ]
    return waits, statistics.median(took for _, took in misses.reads)


@contextlib.contextmanager
def busy(path: Path, readers: int) -> Iterator[None]:
    """So many processes that read a file past the page cache, over and over."""
    end = Event()
    processes = [Process(target=read_on, args=(path, end)) for _ in range(readers)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        end.set()
        for process in processes:
            process.join()


def read_on(path: Path, end: Flag) -> None:
    page = [mmap.mmap(-1, 1 << 16)]
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    while not end.is_set():
        for offset in range(0, _CACHED, 1 << 16):
            os.preadv(fd, page, offset)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
