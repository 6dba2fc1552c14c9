"""`python -m bench.busy`: what a reader waits for on a machine whose processors are all busy.

Beside 16 processes that only compute, a reader asks for a chunk that is not cached (from a folder in memory: no network is
measured), and for one that is, past the page cache, in turn, for $NYDUSD_BENCH_SECONDS (5) a round, $NYDUSD_BENCH_ROUNDS (3)
rounds, contenders in turn: ours, the same with turns as long as anybody's (what `nydusd/turns.py` is for), and a reference
if $NYDUSD_REF names one. Milliseconds, median and 9 of 10 below; how much the computing processes get done, in all, of what
they do with no daemon beside them; and the limit: a byte that goes through a pipe to another process and back, which is
waked for it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Event, Process, RawArray
from multiprocessing.synchronize import Event as Flag
from pathlib import Path
from typing import TYPE_CHECKING

from bench.image import Built, build, configuration
from bench.processes import family
from nydusd import turns

if TYPE_CHECKING:
    Counts = ctypes.Array[ctypes.c_uint64]

ROUNDS = int(os.environ.get("NYDUSD_BENCH_ROUNDS", "3"))
SECONDS = float(os.environ.get("NYDUSD_BENCH_SECONDS", "5"))
_BUSY = 16
_CHUNK = 1 << 16
_CACHED = 8 << 20
_UNREAD = 192 << 20
_PAUSE = 0.01
"""Seconds between two reads: who reads has its turn at once, and what is measured is ours."""
_SETTLE = 4.0
"""Seconds after which a daemon that has begun on such a machine is done with that."""
_STEP = 20_000
_LONG = "ours, long turns"


def main() -> int:
    """Measure, and print a line for each contender."""
    ours = [str(Path(sys.executable).with_name("nydusd")), "fuse"]
    contenders = {"ours": ours, _LONG: ours}
    if reference := os.environ.get("NYDUSD_REF"):
        contenders["reference"] = [reference, "fuse", "--rlimit-nofile", "0"]
    with tempfile.TemporaryDirectory(prefix="nydusd-busy-", dir="/dev/shm") as name:
        folder = Path(name)
        tree = folder / "tree"
        tree.mkdir()
        (tree / "cached").write_bytes(os.urandom(_CACHED))
        (tree / "unread").write_bytes(os.urandom(_UNREAD))
        image = build(tree, folder / "image", _CHUNK)
        found: dict[str, list[tuple[list[float], list[float], float]]] = {}
        with busy() as work_done:
            alone, pings = work_in(work_done), round_trips()
            for number in range(ROUNDS):
                for who, command in contenders.items():
                    place = folder / f"{number} {who}"
                    found.setdefault(who, []).append(measure(command, image, place, work_done, long_turns=who == _LONG))
    print("| contender | not cached, ms | 9 of 10 below | cached, ms | 9 of 10 below | work of others |")
    print("| --- | --- | --- | --- | --- | --- |")
    for who, rounds in found.items():
        missed, hit, work = zip(*rounds, strict=True)
        row = [statistics.median(map(part, several)) for several in (missed, hit) for part in (_half, _most)]
        print(
            f"| {who} | {' | '.join(f'{value * 1000:.2f}' for value in row)} | {statistics.median(work) / alone:.2f} |"
        )
    print(f"| a pipe there and back | | | {_half(pings) * 1000:.2f} | {_most(pings) * 1000:.2f} | |")
    return 0


def _half(times: list[float]) -> float:
    return statistics.median(times)


def _most(times: list[float]) -> float:
    return sorted(times)[len(times) * 9 // 10]


def measure(
    command: list[str], image: Built, place: Path, work_done: Counts, *, long_turns: bool
) -> tuple[list[float], list[float], float]:
    """Seconds of each read of what was not cached, and of what was, and the work of others a second."""
    mountpoint = place / "mnt"
    mountpoint.mkdir(parents=True)
    config = place / "config.json"
    # One miss brings no other chunk.
    config.write_text(json.dumps(json.loads(configuration(image, place / "cache")) | {"amplify_io": 0}))
    command = [*command, "-B", str(image.bootstrap), "-C", str(config), "-M", str(mountpoint), "--log-level", "error"]
    command += ["-A", str(place / "api.sock")]
    environment = os.environ | {"NYDUSD_RUNTIME_DIR": str(place / "run"), "NYDUSD_NURSERY": "off"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not os.path.ismount(mountpoint):
            time.sleep(0.01)
        (mountpoint / "cached").read_bytes()
        time.sleep(_SETTLE)
        if long_turns:
            for pid in family(process.pid):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    turns.ask_for(0, int(thread))
        began, before = time.monotonic(), sum(work_done)
        missed, hit = reads(mountpoint, began + SECONDS)
        return missed, hit, (sum(work_done) - before) / (time.monotonic() - began)
    finally:
        process.terminate()
        process.wait()
        while os.path.ismount(mountpoint):
            time.sleep(0.05)


def reads(mountpoint: Path, until: float) -> tuple[list[float], list[float]]:
    """One after the other until then, or until there is nothing left that is not cached."""
    page = [mmap.mmap(-1, 4096)]
    times: tuple[list[float], list[float]] = ([], [])
    files = [os.open(mountpoint / name, os.O_RDONLY | os.O_DIRECT) for name in ("unread", "cached")]
    for offset in range(0, _UNREAD, _CHUNK):
        if time.monotonic() > until:
            break
        for file, taken in zip(files, times, strict=True):
            time.sleep(_PAUSE)
            began = time.monotonic()
            os.preadv(file, page, offset % _CACHED if taken is times[1] else offset)
            taken.append(time.monotonic() - began)
    for file in files:
        os.close(file)
    return times


def work_in(work_done: Counts) -> float:
    """Of those that compute, a second, with nobody beside them."""
    before = sum(work_done)
    time.sleep(SECONDS)
    return (sum(work_done) - before) / SECONDS


def round_trips() -> list[float]:
    """Seconds of each."""
    there, back = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(there[1])
        while byte := os.read(there[0], 1):
            os.write(back[1], byte)
        os._exit(0)
    os.close(there[0])
    times = []
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        time.sleep(_PAUSE)
        began = time.monotonic()
        os.write(there[1], b".")
        os.read(back[0], 1)
        times.append(time.monotonic() - began)
    os.close(there[1])
    os.wait()
    for fd in back:
        os.close(fd)
    return times


@contextmanager
def busy() -> Iterator[Counts]:
    """Processes that compute; gives what each has done."""
    end = Event()
    done = RawArray(ctypes.c_uint64, _BUSY)
    processes = [Process(target=compute, args=(done, number, end)) for number in range(_BUSY)]
    for process in processes:
        process.start()
    try:
        yield done
    finally:
        end.set()
        for process in processes:
            process.join()


def compute(done: Counts, number: int, end: Flag) -> None:
    while not end.is_set():
        for _ in range(_STEP):
            pass
        done[number] += 1


if __name__ == "__main__":
    sys.exit(main())
