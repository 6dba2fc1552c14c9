"""Part of `make bench`: how fast images are made and how large they are, beside a reference if $NYDUS_IMAGE_REF names one.

The tree is a Debian root file system of about 250 MB ($NYDUSD_BENCH_TREE: another), once as a folder and once as a tar; files
are in the page cache, output goes to the same disk.
Builders take turns, several rounds, medians. Seconds are what a user waits (wall clock) and what all processes of the command
took of the CPUs; a ratio above 1 is better for us. The last line is memory: a tree of many names, whose content is nothing.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench.run import FOLDER, ROUNDS, root_file_system

OURS = [sys.executable, "-m", "nydusd.cli.nydus_image"]
TAR = ("--type", "tar-rafs")
OPTIONS: dict[str, tuple[str, ...]] = {
    "zstd": (),
    "lz4_block": ("--compressor", "lz4_block"),
    "none": ("--compressor", "none"),
    "batch 1 MiB": ("--batch-size", "0x100000"),
    "v5, lz4_block": ("--fs-version", "5", "--compressor", "lz4_block"),
    "a tar, zstd": TAR,
    "a tar, lz4_block": (*TAR, "--compressor", "lz4_block"),
}
PACKAGES = "python3,ca-certificates"
NAMES = int(os.environ.get("NYDUSD_BENCH_NAMES", "300000"))
PER_FOLDER = 1000


class Row(NamedTuple):
    """What a build took: seconds, seconds of CPU, bytes of what was made, bytes of the largest process."""

    wall: float
    cpu: float
    size: int
    memory: int


def main() -> int:
    """Measure and print the tables."""
    tree = root_file_system("rootfs-small", PACKAGES)
    builders = {"ours": OURS}
    if reference := os.environ.get("NYDUS_IMAGE_REF"):
        builders["reference"] = [reference]
    tar = FOLDER / "rootfs.tar"
    # Sockets are left out, which ours would not mind. What cannot be read is not in the bench's own tree.
    subprocess.run(["tar", "--create", f"--file={tar}", f"--directory={tree}", "--format=gnu", "."], check=True)
    titles = [f"{name}, {what}" for name in builders for what in ("s", "s of CPU", "MB")]
    print(f"| {tree} | " + " | ".join([*titles, "time", "CPU", "size"]) + " |")
    print("|" + " --- |" * (4 + len(titles)))
    try:
        for title, options in OPTIONS.items():
            source = tar if "tar-rafs" in options else tree
            rows: dict[str, list[Row]] = {name: [] for name in builders}
            for _ in range(ROUNDS):
                for name, command in builders.items():
                    rows[name].append(measure([*command, "create", *options], source))
            print(f"| {title} | " + " | ".join(cells([median(found) for found in rows.values()])) + " |", flush=True)
    finally:
        tar.unlink()
    many = Path(tempfile.mkdtemp(prefix="names-", dir=FOLDER))
    try:
        plant(many)
        for name, command in builders.items():
            row, half = (measure([*command, "create"], folder) for folder in (many, many / "0"))
            each = (row.memory - half.memory) / (NAMES / 2)
            took = f"{row.wall:.1f} s, {row.cpu:.1f} s of CPU, {row.memory / 1e6:.0f} MB, {each:.0f} bytes a name"
            print(f"{NAMES} files of 8 bytes, {name}: {took}")
    finally:
        shutil.rmtree(many)
    return 0


def plant(folder: Path) -> None:
    """A tree of `NAMES` files that all differ, in two halves."""
    for first in range(0, NAMES, PER_FOLDER):
        below = folder / str(2 * first // NAMES) / str(first // PER_FOLDER)
        below.mkdir(parents=True)
        for number in range(first, first + PER_FOLDER):
            (below / f"file-{number}").write_bytes(number.to_bytes(8, "little"))


def median(rows: list[Row]) -> Row:
    return Row(
        statistics.median(row.wall for row in rows),
        statistics.median(row.cpu for row in rows),
        rows[0].size,
        max(row.memory for row in rows),
    )


def cells(rows: list[Row]) -> list[str]:
    """The figures of all builders, and the reference's (the last one's) divided by ours."""
    found = [text for row in rows for text in (f"{row.wall:.2f}", f"{row.cpu:.2f}", f"{row.size / 1e6:.1f}")]
    ours, other = rows[0], rows[-1]
    if ours is other:
        return [*found, "", "", ""]
    ratios = other.wall / ours.wall, other.cpu / ours.cpu, other.size / ours.size
    return [*found, *(f"{ratio:.2f}x" for ratio in ratios)]


def measure(command: list[str], tree: Path) -> Row:
    """Build an image, and throw it away."""
    out = Path(tempfile.mkdtemp(prefix="build-", dir=FOLDER))
    try:
        arguments = ["-B", str(out / "bootstrap"), "-D", str(out), str(tree)]
        begin = time.perf_counter()
        pid = os.posix_spawnp(
            command[0],
            [*command, *arguments],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)],
        )
        _, status, usage = os.wait4(pid, 0)
        wall = time.perf_counter() - begin
        if status:
            raise RuntimeError(f"{command[0]}: wait status {status}")
        made = sum(path.stat().st_size for path in out.iterdir())
        return Row(wall, usage.ru_utime + usage.ru_stime, made, usage.ru_maxrss << 10)
    finally:
        shutil.rmtree(out)


if __name__ == "__main__":
    sys.exit(main())
