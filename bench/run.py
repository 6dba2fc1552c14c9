"""`make bench`: ours beside the kernel's EROFS on the complete cache file, and a reference if $NYDUSD_REF names one.

One run, contenders in turn, several rounds, medians and ratios. The image is made by `bench/image.py` from
$NYDUSD_BENCH_TREE, or from a Debian root file system that is made once below $NYDUSD_BENCH_DIR (/var/tmp/nydusd-bench).
The cache folder is on tmpfs, so that no disk is measured; the page cache is dropped before each step. Random reads are
O_DIRECT, 4 KiB, over files of more than 64 KiB: each one is answered by the contender. $NYDUSD_BENCH_ROUNDS (3) and
$NYDUSD_BENCH_SECONDS (2, of each random step) set the length.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import Process, SimpleQueue
from pathlib import Path

from bench.erofs import erofs_mount
from bench.image import Built, build, configuration
from bench.processes import cpu, memory

FOLDER = Path(os.environ.get("NYDUSD_BENCH_DIR", "/var/tmp/nydusd-bench"))
ROUNDS = int(os.environ.get("NYDUSD_BENCH_ROUNDS", "3"))
SECONDS = float(os.environ.get("NYDUSD_BENCH_SECONDS", "2"))
PLACES = 200_000
"""How many places of random reads are chosen; then they come again, and are asked for anew all the same."""
PACKAGES = "python3,perl,git,gcc,vim"
HIGHER_IS_BETTER = ("cold MB/s", "warm MB/s", "random 1 job, 1/s", "random 4 jobs, 1/s")

Figures = dict[str, float]


def main() -> int:
    """Measure and print the table; the raw figures go to FOLDER/figures.json."""
    image = prepare()
    contenders: list[tuple[str, Callable[[Built], Figures]]] = [("ours", ours)]
    if reference := os.environ.get("NYDUSD_REF"):
        contenders.append(("reference", lambda built: daemon(built, [reference, "fuse", "--rlimit-nofile", "0"], {})))
    contenders.append(("EROFS", erofs))
    results: dict[str, list[Figures]] = {name: [] for name, _ in contenders}
    for turn in range(ROUNDS):
        for name, measure in contenders:
            print(f"round {turn + 1} of {ROUNDS}: {name}", file=sys.stderr)
            results[name].append(measure(image))
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "figures.json").write_text(json.dumps(results, indent=1))
    print(table({name: median(rows) for name, rows in results.items()}))
    return 0


def prepare() -> Built:
    """The image, made if it is not there yet; `plain` beside it is the complete cache file for EROFS."""
    out = FOLDER / "image"
    tree = root_file_system("rootfs", PACKAGES)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    return build(tree, out, plain=out / "plain")


def root_file_system(name: str, packages: str) -> Path:
    """$NYDUSD_BENCH_TREE, or a Debian root file system of this name below FOLDER, made if it is not there yet."""
    tree = Path(os.environ.get("NYDUSD_BENCH_TREE", FOLDER / name))
    if not tree.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        print("making a root file system with debootstrap, once", file=sys.stderr)
        part = FOLDER / f"{name}.part"
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(part)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        part.rename(tree)
    return tree


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def ours(image: Built) -> Figures:
    """Our daemon, from this checkout."""
    return daemon(image, [sys.executable, "-m", "nydusd", "fuse"], {"NYDUSD_RUNTIME_DIR": "/dev/shm/nydusd-bench-run"})


def daemon(image: Built, command: list[str], environment: dict[str, str]) -> Figures:
    """One round of a daemon over FUSE: start, cold read, then everything warm."""
    with tempfile.TemporaryDirectory(prefix="nydusd-bench-", dir="/dev/shm") as name:
        work = Path(name)
        mountpoint = work / "mnt"
        mountpoint.mkdir()
        config = work / "config.json"
        config.write_text(configuration(image, work / "cache"))
        arguments = ["-B", str(image.bootstrap), "-C", str(config), "-M", str(mountpoint), "--log-level", "error"]
        drop_caches()
        begin = time.perf_counter()
        process = subprocess.Popen([*command, *arguments], env=os.environ | environment, stderr=subprocess.DEVNULL)
        try:
            while not os.path.ismount(mountpoint):
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} ended with status {process.returncode}")
                time.sleep(0.001)
            os.listdir(mountpoint)
            figures = {"start to ls, s": time.perf_counter() - begin}
            before = cpu(process.pid)
            figures["cold MB/s"] = read_all(mountpoint)
            figures["cold, s of CPU"] = cpu(process.pid) - before
            figures |= warm(mountpoint)
            figures["memory MB"] = memory(process.pid)
        finally:
            process.terminate()
            process.wait()
        shutil.rmtree("/dev/shm/nydusd-bench-run", ignore_errors=True)
        return figures


def erofs(image: Built) -> Figures:
    """The kernel alone, on the complete cache file: nothing can be faster."""
    with tempfile.TemporaryDirectory(prefix="nydusd-bench-", dir="/dev/shm") as name:
        mountpoint, plain = Path(name) / "mnt", Path(name) / "plain"
        mountpoint.mkdir()
        shutil.copyfile(FOLDER / "image/plain" / f"{image.blob.name}.blob.data", plain)
        with erofs_mount(image.bootstrap, [plain], mountpoint):
            return warm(mountpoint)


def warm(mountpoint: Path, skip: Sequence[str] = ()) -> Figures:
    """What is measured of complete data. Files named `skip` are not read."""
    drop_caches()
    figures = {"warm MB/s": read_all(mountpoint, skip)}
    drop_caches()
    begin = time.perf_counter()
    subprocess.run(["find", str(mountpoint), "-ls"], check=True, stdout=subprocess.DEVNULL)
    figures["find -ls, s"] = time.perf_counter() - begin
    files = [path for path in regular_files(mountpoint, skip) if os.path.getsize(path) > 65536]
    for jobs in (1, 4):
        drop_caches()
        figures[f"random {jobs} job{'s' * (jobs > 1)}, 1/s"] = random_reads(files, jobs)
    return figures


def random_reads(files: list[bytes], jobs: int, *, kept: bool = False) -> float:
    """Reads a second of so many processes of ours. `kept`: by way of the page cache, in which nothing is at first."""
    queue: SimpleQueue[int] = SimpleQueue()
    readers = [Process(target=random_reader, args=(files[:800], seed, queue, kept)) for seed in range(jobs)]
    for reader in readers:
        reader.start()
    count = sum(queue.get() for _ in readers)
    for reader in readers:
        reader.join()
    return count / SECONDS


def regular_files(root: Path, skip: Sequence[str] = ()) -> list[bytes]:
    """All regular files but those named `skip`, in the order of their names."""
    found = []
    for folder, folders, names in os.walk(os.fsencode(root)):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            if os.fsdecode(name) not in skip and os.path.isfile(path) and not os.path.islink(path):
                found.append(path)
    return found


def read_all(root: Path, skip: Sequence[str] = ()) -> float:
    """Read every file in turn, but those named `skip`; MB/s."""
    size = 0
    begin = time.perf_counter()
    for path in regular_files(root, skip):
        with open(path, "rb", buffering=0) as f:
            while piece := f.read(1 << 20):
                size += len(piece)
    return size / (time.perf_counter() - begin) / 1e6


def random_reader(files: list[bytes], seed: int, queue: SimpleQueue[int], kept: bool) -> None:
    """Read 4 KiB at random places, which are chosen before, for SECONDS; reports how many."""
    choose = random.Random(seed)
    page = [mmap.mmap(-1, 4096)]
    try:
        if kept:
            raise OSError  # as below, but nothing is dropped
        opened = [(os.open(path, os.O_RDONLY | os.O_DIRECT), os.path.getsize(path) // 4096) for path in files]
        direct = True
    except OSError:  # EROFS over a file on tmpfs: what the page cache keeps is dropped before each read instead
        opened = [(os.open(path, os.O_RDONLY), os.path.getsize(path) // 4096) for path in files]
        for fd, _ in opened:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        direct = False
    places = [(fd, choose.randrange(pages) * 4096) for fd, pages in choose.choices(opened, k=PLACES)]
    count = 0
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = count % PLACES
        for fd, offset in places[start : start + 50]:
            if not direct and not kept:
                os.posix_fadvise(fd, offset, 4096, os.POSIX_FADV_DONTNEED)
            os.preadv(fd, page, offset)
        count += 50
    queue.put(count)


def median(rows: list[Figures]) -> Figures:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def table(results: dict[str, Figures]) -> str:
    """Markdown: a row a figure, with ratios (more than 1 is better for us) to the reference and to the limit."""
    others = [name for name in results if name != "ours"]
    lines = ["| | " + " | ".join(results) + " | " + " | ".join(f"ours / {name}" for name in others) + " |"]
    lines.append("|" + " --- |" * (1 + len(results) + len(others)))
    for key, mine in results["ours"].items():
        cells = [f"{results[name][key]:,.2f}" if key in results[name] else "" for name in results]
        for name in others:
            theirs = results[name].get(key)
            ratio = None if theirs is None else mine / theirs if key in HIGHER_IS_BETTER else theirs / mine
            cells.append("" if ratio is None else f"{ratio:.2f}x")
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
