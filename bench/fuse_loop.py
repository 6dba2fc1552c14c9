"""What one FUSE front end does when everything is cached: `python -m bench.fuse_loop [--processes N ...]`.

An image of one 256 MiB file and 4,000 small ones, its complete cache file and bootstrap in /dev/shm, so that no disk is
measured; real front-end processes without a supervisor; fio for the reads. Needs root. Compare within one run only: on a
small or busy machine, where the scheduler puts the two sides matters more than what they do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nydusd.formats import open_bootstrap
from nydusd.frontends.fuse.session import Session, clear_stale_mount
from nydusd.ipc.mount_counters import make_counters
from nydusd.ipc.spec import write_spec
from nydusd.storage.state.names import remove
from nydusd.storage.state.segment import READY, RECORD, Identity, Segment
from nydusd.supervisor.mount_table import MountTable

SIZE = 256 << 20
SMALL_FILES = 4000
REPO = Path(__file__).resolve().parents[1]


def make_image(folder: Path) -> tuple[Path, Path]:
    """Build the image; gives its bootstrap and its complete cache file."""
    tree = folder / "tree"
    (tree / "small").mkdir(parents=True)
    with open(tree / "big", "wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
    for number in range(SMALL_FILES):
        (tree / "small" / f"file-{number:05d}").write_bytes(b"%d\n" % number)
    command = [sys.executable, "-m", "bench.image", str(tree), str(folder), "--plain", str(folder)]
    subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    (data,) = folder.glob("*.blob.data")
    return folder / "bootstrap", data


def make_segment(name: str, bootstrap: Path, data: Path) -> Segment:
    """The segment of the blob, every chunk ready."""
    image = open_bootstrap(memoryview(bootstrap.read_bytes()), str(bootstrap))
    chunks = sorted({(c.index, c.uoff, c.usize) for c in image.raw_chunks()})
    with open(data, "rb") as file:
        identity = Identity.of(file.fileno(), data.stat().st_size)
    return Segment.create(
        name,
        generation=1,
        identity=identity,
        records=b"".join(RECORD.pack(0, uoff, usize, usize, 0, 0, 0, 0) for _, uoff, usize in chunks),
        digests=bytes(32 * len(chunks)),
        contexts=b"",
        dict_offset=0,
        dict_size=0,
        state=bytes([READY]) * len(chunks),
    )


@contextlib.contextmanager
def served(
    folder: Path, bootstrap: Path, data: Path, processes: int, read_ahead_kib: int
) -> Iterator[tuple[Path, list[int]]]:
    """A mount of the image with `processes` front ends: its mount point, and their pids."""
    mountpoint = folder / "mnt"
    mountpoint.mkdir(exist_ok=True)
    clear_stale_mount(str(mountpoint))
    name = f"/nydusd.bench-{os.getpid()}"
    segment = make_segment(name, bootstrap, data)
    make_counters(f"{name}-counters", processes).close()
    table = MountTable(folder / "table", f"{name}-table")
    mount = {
        "id": "/",
        "bootstrap": str(bootstrap),
        "path_id": None,
        "extracted": False,
        "xattr": False,
        "counters": f"{name}-counters",
        "blobs": [{"blob_id": data.name, "handle": 1, "segment": name, "data": str(data)}],
    }
    table.add((), mount)
    session = Session.mount(str(mountpoint), read_ahead_kib=read_ahead_kib)
    children: list[subprocess.Popen[bytes]] = []
    try:
        for index, lane in enumerate(session.open_lanes(processes)):
            spec = {
                "index": index,
                "session_fd": lane.fd,
                "journal_fd": lane.journal,
                "init_flags": session.negotiated.flags,
                "front": "ipc:///nowhere",
                "read_deadline": 5,
                "log": {"level": "info", "file": None},
                "mounts": table.spec(),
            }
            fd = write_spec(spec)
            command = [sys.executable, "-m", "nydusd.frontends.fuse", "--spec-fd", str(fd)]
            children.append(subprocess.Popen(command, cwd=REPO, pass_fds=(fd, lane.fd, lane.journal)))
            os.close(fd)
        os.listdir(mountpoint)
        yield mountpoint, [child.pid for child in children]
    finally:
        session.unmount()
        session.close()
        for child in children:
            child.wait()
        segment.close()
        table.close()
        for block in (name, f"{name}-counters", f"{name}-table"):
            remove(block)


def cpu(pids: Sequence[int]) -> tuple[float, float]:
    """Seconds of CPU that processes have used: in Python, and in the kernel."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    tick = os.sysconf("SC_CLK_TCK")
    return sum(int(f[11]) for f in fields) / tick, sum(int(f[12]) for f in fields) / tick


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


def fio(path: Path, pattern: str, size: str, jobs: int, *, direct: bool, seconds: float) -> tuple[float, float, float]:
    """IOPS, MB/s and median latency in microseconds."""
    command = ["fio", "--name=x", f"--filename={path}", "--readonly", f"--rw={pattern}", f"--bs={size}"]
    command += ["--ioengine=psync", f"--numjobs={jobs}", "--thread", "--group_reporting", "--output-format=json"]
    command += [f"--direct={int(direct)}", "--time_based", f"--runtime={seconds}", "--invalidate=1", "--norandommap"]
    out = subprocess.run(command, check=True, capture_output=True).stdout
    read = json.loads(out)["jobs"][0]["read"]
    return read["iops"], read["bw_bytes"] / 1e6, read["clat_ns"]["percentile"]["50.000000"] / 1e3


def lookups(mountpoint: Path) -> float:
    """Names looked up a second by one process that finds nothing in the kernel's caches."""
    drop_caches()
    folder = mountpoint / "small"
    os.stat(folder)
    names = [str(folder / f"file-{number:05d}") for number in range(SMALL_FILES)]
    start = time.perf_counter()
    for name in names:
        os.lstat(name)
    return len(names) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--read-ahead", type=int, default=1024, help="KiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-bench-") as name:
        folder = Path(name)
        bootstrap, data = make_image(folder)
        for processes in options.processes:
            with served(folder, bootstrap, data, processes, options.read_ahead) as (mountpoint, pids):
                big = mountpoint / "big"
                for jobs in (1, 4):
                    before = cpu(pids)
                    iops, _, p50 = fio(big, "randread", "4k", jobs, direct=True, seconds=options.seconds)
                    reads = iops * options.seconds
                    user, system = ((b - a) * 1e6 / reads for a, b in zip(before, cpu(pids), strict=True))
                    print(
                        f"{processes} processes, 4 KiB direct, {jobs} jobs: {iops:8.0f} IOPS, p50 {p50:6.1f} us, "
                        f"front ends' CPU a read: {user:4.1f} us in Python, {system:4.1f} us in the kernel"
                    )
                _, rate, _ = fio(big, "read", "1m", 1, direct=True, seconds=options.seconds)
                print(f"{processes} processes, 1 MiB direct: {rate:8.0f} MB/s")
                start = time.perf_counter()
                os.posix_fadvise((fd := os.open(big, os.O_RDONLY)), 0, 0, os.POSIX_FADV_DONTNEED)
                while os.read(fd, 1 << 20):
                    pass
                os.close(fd)
                print(
                    f"{processes} processes, sequential, page cache: {SIZE / 1e6 / (time.perf_counter() - start):8.0f} MB/s"
                )
                print(f"{processes} processes, lookups: {lookups(mountpoint):8.0f} /s", flush=True)


if __name__ == "__main__":
    main()
