"""`make bench-erofs`: the ways of `nydusd erofs` beside the kernel alone on the complete cache file and a reference over FUSE.

All cache folders are on one ext4 in a file on tmpfs, through a loop device: fanotify needs such a file system, and no disk is
measured; $NYDUSD_BENCH_ROOM names a folder of a disk instead, which is cold at each step. The image is that of `make bench`
and one file more, which nobody reads: so a blob can be all cached where it is read, and still be incomplete. One run,
contenders in turn, $NYDUSD_BENCH_ROUNDS (2) rounds, medians and ratios. $NYDUSD_REF names the reference. Random reads are
4 KiB, over files of more than 64 KiB, each past the reader's page cache; by a reader of ours, for an EROFS over files opens
none with O_DIRECT (EINVAL, with or without us), and fio, which picks among several files at random, then tries for ever.
Those that are called kept go by way of the page cache, which is empty at first: what was read before comes from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.erofs import erofs_mount
from bench.image import Built, build, configuration
from bench.run import FOLDER, Figures, drop_caches, median, prepare, random_reads, read_all, regular_files, warm

ROUNDS = int(os.environ.get("NYDUSD_BENCH_ROUNDS", "2"))
UNREAD = "zz-unread"
UNREAD_SIZE = 64 << 20
ROOM = 4 << 30
PLACE = os.environ.get("NYDUSD_BENCH_ROOM", "")
HIGHER_IS_BETTER = (
    "cold MB/s",
    "warm MB/s",
    "random 1 job, 1/s",
    "random 4 jobs, 1/s",
    "kept 1 job, 1/s",
    "kept 4 jobs, 1/s",
)


def main() -> int:
    """Measure and print the table."""
    image = make_image()
    with on_disk(PLACE) if PLACE else ext4_on_tmpfs() as room:
        kept = room / "kept"
        contenders: list[tuple[str, Callable[[], Figures]]] = [
            ("fanotify, complete", lambda: ours(image, room, "fanotify", complete=True, keep=kept)),
            ("fanotify, incomplete", lambda: ours(image, room, "fanotify", complete=False)),
            ("blobfs, incomplete", lambda: ours(image, room, "blobfs", complete=False)),
            ("ours, FUSE", lambda: ours(image, room, "fuse", complete=False)),
        ]
        if reference := os.environ.get("NYDUSD_REF"):
            command = [reference, "fuse", "--rlimit-nofile", "0"]
            contenders.append(("reference, FUSE", lambda: daemon(image, room, command, complete=False)))
        contenders.insert(1, ("EROFS alone", lambda: alone(image, room, kept)))
        results: dict[str, list[Figures]] = {name: [] for name, _ in contenders}
        for turn in range(ROUNDS):
            for name, measure in contenders:
                print(f"round {turn + 1} of {ROUNDS}: {name}", file=sys.stderr)
                results[name].append(measure())
    medians = {name: median(rows) for name, rows in results.items()}
    (FOLDER / f"erofs-ways{'-disk' if PLACE else ''}.json").write_text(json.dumps(medians, indent=1))
    print(table(medians))
    return 0


def make_image() -> Built:
    """The image of `make bench`'s tree and one file more."""
    tree = Path(os.environ.get("NYDUSD_BENCH_TREE", FOLDER / "rootfs"))
    if not tree.exists():
        prepare()
    out = FOLDER / "ways"
    shutil.rmtree(out, ignore_errors=True)
    (out / "tree").mkdir(parents=True)
    subprocess.run(["cp", "-al", f"{tree}/.", str(out / "tree")], check=True)
    (out / "tree" / UNREAD).write_bytes(os.urandom(UNREAD_SIZE))
    return build(out / "tree", out)


@contextlib.contextmanager
def on_disk(place: str) -> Iterator[Path]:
    """A folder on the disk that this one is on."""
    with tempfile.TemporaryDirectory(prefix="nydusd-bench-", dir=place) as name:
        yield Path(name)


@contextlib.contextmanager
def ext4_on_tmpfs() -> Iterator[Path]:
    """A folder on an ext4 of its own."""
    with tempfile.TemporaryDirectory(prefix="nydusd-bench-", dir="/dev/shm") as name:
        disk, folder = Path(name) / "disk", Path(name) / "mnt"
        folder.mkdir()
        with open(disk, "wb") as file:
            file.truncate(ROOM)
        subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(disk)], check=True)
        subprocess.run(["mount", "-o", "loop", str(disk), str(folder)], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)


def ours(image: Built, room: Path, driver: str, *, complete: bool, keep: Path | None = None) -> Figures:
    """Our daemon, from this checkout."""
    command = [sys.executable, "-m", "nydusd", "erofs", "--driver", driver]
    return daemon(image, room, command, complete=complete, keep=keep)


def daemon(image: Built, room: Path, command: list[str], *, complete: bool, keep: Path | None = None) -> Figures:
    """One round of a daemon: cold read of all but the file that nobody reads, or of all, then everything warm.

    `keep`: where the cache file is put that it leaves.
    """
    with tempfile.TemporaryDirectory(prefix="w", dir=room) as name:
        work = Path(name)
        mountpoint = work / "mnt"
        mountpoint.mkdir()
        (work / "config.json").write_text(configuration(image, work / "cache"))
        more = [
            "-B",
            str(image.bootstrap),
            "-C",
            str(work / "config.json"),
            "-M",
            str(mountpoint),
            "--log-level",
            "info" if complete else "error",
        ]
        drop_caches()
        environment = os.environ | {"NYDUSD_RUNTIME_DIR": str(work / "run")}
        log = work / "log"
        with open(log, "wb") as file:
            process = subprocess.Popen([*command, *more], env=environment, stderr=file)
        try:
            while not os.path.ismount(mountpoint):
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} ended with status {process.returncode}")
                time.sleep(0.001)
            figures = {"cold MB/s": read_all(mountpoint, skip=() if complete else (UNREAD,))}
            if complete:
                while "the kernel reads it by itself" not in log.read_text():  # all is there, and on its disk
                    if process.poll() is not None:
                        raise RuntimeError(f"{command[0]} ended with status {process.returncode}")
                    time.sleep(0.05)
            figures |= warm(mountpoint, (UNREAD,)) | kept(mountpoint)
        finally:
            process.terminate()
            process.wait()
        if keep is not None:
            (data,) = (work / "cache").glob("*.blob.data")
            data.replace(keep)
        return figures


def alone(image: Built, room: Path, plain: Path) -> Figures:
    """The kernel on the very cache file that our daemon has completed: nothing can be faster."""
    mountpoint = room / "alone"
    mountpoint.mkdir(exist_ok=True)
    with erofs_mount(image.bootstrap, [plain], mountpoint):
        return warm(mountpoint, (UNREAD,)) | kept(mountpoint)


def kept(mountpoint: Path) -> Figures:
    """Random reads by way of the page cache, as most programs read; it is empty at first."""
    files = [path for path in regular_files(mountpoint, (UNREAD,)) if os.path.getsize(path) > 65536]
    figures = {}
    for jobs in (1, 4):
        drop_caches()
        figures[f"kept {jobs} job{'s' * (jobs > 1)}, 1/s"] = random_reads(files, jobs, kept=True)
    return figures


def table(results: dict[str, Figures]) -> str:
    """Markdown: a row a contender; in brackets the ratio to the kernel alone and to the reference, more than 1 is better."""
    keys = list(dict.fromkeys(key for row in results.values() for key in row))
    lines = ["| | " + " | ".join(keys) + " |", "|" + " --- |" * (1 + len(keys))]
    for name, row in results.items():
        cells = []
        for key in keys:
            if key not in row:
                cells.append("")
                continue
            ratios = []
            for other in ("EROFS alone", "reference, FUSE"):
                theirs = results.get(other, {}).get(key)
                if theirs is not None and other != name:
                    ratio = row[key] / theirs if key in HIGHER_IS_BETTER else theirs / row[key]
                    ratios.append(f"{ratio:.2f}")
            cells.append(f"{row[key]:,.{0 if row[key] > 100 else 2}f}" + (f" ({', '.join(ratios)})" if ratios else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
