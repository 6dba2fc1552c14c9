"""`make bench-delays`: cold start and cold sequential read from a registry that is 0, 5, 20 and 100 ms away.

Ours, and a reference if $NYDUSD_REF names one, in turn, several rounds, medians. The registry is a process on loopback that
is as far away as `bench/delay.py` makes it. Cold start is the time from the start of the process to the first byte of a small
file; the sequential read is of one file of $NYDUSD_BENCH_MIB (64) MiB after that. The cache folder is on tmpfs and empty, the
mount is new in each run, there is no prefetch. Programs and libraries are in the page cache, as on a node that has started
an image before. The table goes to stdout; $NYDUSD_BENCH_OUT=docs makes docs/delays.md and docs/delays.svg anew.
$NYDUSD_BENCH_ROUNDS (3) sets the number of rounds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.image import Built, build
from bench.plot import page, panel
from bench.registry import far_away
from bench.run import ROUNDS

ROUND_TRIPS = (0.0, 0.005, 0.020, 0.100)
REPO = "bench/image"
SIZE = int(os.environ.get("NYDUSD_BENCH_MIB", "64")) << 20
START, READ = "cold start, s", "cold read, MB/s"
Figures = dict[str, float]
PAGE = """# What a registry far away costs

Time from the start of the daemon to the first byte of a small file, and speed of a cold read of a file of {size} MiB after it,
from a registry that is 0, 5, 20 and 100 ms away: medians of {rounds} rounds, no prefetch, empty cache. `make bench-delays`
measures this; `bench/delays.py` says how, `NYDUSD_BENCH_OUT=docs` makes this page anew, `NYDUSD_REF` names a reference.

In the last two columns we are faster above 1. The start is slower, by the time that Python takes to load, whatever the
distance; reads are faster.

{table}

![The same as a plot](delays.svg)
"""


def main() -> int:
    """Measure and print."""
    contenders: dict[str, tuple[list[str], dict[str, str]]] = {
        "ours": (
            [sys.executable, "-m", "nydusd", "fuse"],
            {"NYDUSD_RUNTIME_DIR": "/dev/shm/nydusd-bench-run"},
        )
    }
    if reference := os.environ.get("NYDUSD_REF"):
        contenders["reference"] = ([reference, "fuse", "--rlimit-nofile", "0"], {})
    results: dict[str, dict[float, list[Figures]]] = {name: {far: [] for far in ROUND_TRIPS} for name in contenders}
    with tempfile.TemporaryDirectory(prefix="nydusd-bench-", dir="/dev/shm") as name:
        image = make_image(Path(name), SIZE)
        for turn in range(ROUNDS):
            for far in ROUND_TRIPS:
                for who, (command, environment) in contenders.items():
                    print(f"round {turn + 1} of {ROUNDS}: {who}, {far * 1000:g} ms", file=sys.stderr)
                    results[who][far].append(measure(image, far, command, environment))
    medians = {
        who: [{key: statistics.median(row[key] for row in rows[far]) for key in (START, READ)} for far in ROUND_TRIPS]
        for who, rows in results.items()
    }
    print(table(medians))
    if out := os.environ.get("NYDUSD_BENCH_OUT"):
        Path(out, "delays.md").write_text(PAGE.format(table=table(medians), rounds=ROUNDS, size=SIZE >> 20))
        Path(out, "delays.svg").write_text(plot(medians))
    return 0


def make_image(folder: Path, size: int) -> Built:
    """A small file, and one of `size` bytes of which half compresses well."""
    tree = folder / "tree"
    tree.mkdir()
    source = random.Random(1)
    (tree / "first").write_bytes(source.randbytes(10_000))
    with (tree / "long").open("wb") as file:
        for number in range(size // (64 << 10)):
            file.write(source.randbytes(64 << 10) if number % 2 else source.randbytes(64) * (1 << 10))
    built = build(tree, folder / "image")
    shutil.rmtree(tree)
    return built


def measure(image: Built, far: float, command: Sequence[str], environment: Mapping[str, str]) -> Figures:
    """One run of a daemon with an empty cache."""
    with (
        tempfile.TemporaryDirectory(prefix="nydusd-bench-", dir="/dev/shm") as name,
        far_away(image.blob, REPO, far) as host,
    ):
        mountpoint, config = Path(name) / "mnt", Path(name) / "config.json"
        mountpoint.mkdir()
        backend = {"type": "registry", "config": {"scheme": "http", "host": host, "repo": REPO}}
        cache = {"type": "blobcache", "config": {"work_dir": f"{name}/cache"}}
        config.write_text(json.dumps({"device": {"backend": backend, "cache": cache}, "mode": "direct"}))
        arguments = ["-B", str(image.bootstrap), "-C", str(config), "-M", str(mountpoint), "--log-level", "error"]
        begin = time.perf_counter()
        process = subprocess.Popen([*command, *arguments], env=os.environ | environment, stderr=subprocess.DEVNULL)
        try:
            while not os.path.ismount(mountpoint):
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} ended with status {process.returncode}")
                time.sleep(0.001)
            with open(mountpoint / "first", "rb", buffering=0) as file:
                file.read(1)
            start = time.perf_counter() - begin
            begin, size = time.perf_counter(), 0
            with open(mountpoint / "long", "rb", buffering=0) as file:
                while piece := file.read(1 << 20):
                    size += len(piece)
            seconds = time.perf_counter() - begin
        finally:
            process.terminate()
            process.wait()
            shutil.rmtree("/dev/shm/nydusd-bench-run", ignore_errors=True)
        return {START: start, READ: size / seconds / 1e6}


def table(medians: Mapping[str, Sequence[Figures]]) -> str:
    """Markdown: a row for each distance; with a reference also how many times faster we are."""
    heads = [f"{who}: {key}" for key in (START, READ) for who in medians]
    ratios = len(medians) > 1
    if ratios:
        heads += ["start: reference / ours", "read: ours / reference"]
    lines = ["| round trip | " + " | ".join(heads) + " |", "|" + " --- |" * (1 + len(heads))]
    for number, far in enumerate(ROUND_TRIPS):
        rows = {who: figures[number] for who, figures in medians.items()}
        cells = [f"{row[START]:.2f}" for row in rows.values()] + [f"{row[READ]:.1f}" for row in rows.values()]
        if ratios:
            ours, other = rows["ours"], rows["reference"]
            cells += [f"{other[START] / ours[START]:.2f}", f"{ours[READ] / other[READ]:.2f}"]
        lines.append(f"| {far * 1000:g} ms | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(medians: Mapping[str, Sequence[Figures]]) -> str:
    """The same as SVG."""
    points = [f"{far * 1000:g} ms" for far in ROUND_TRIPS]
    panels = [
        panel(title, unit, points, {who: [row[key] for row in rows] for who, rows in medians.items()})
        for title, unit, key in (
            ("start of the daemon to first byte", "s", START),
            ("cold sequential read", "MB/s", READ),
        )
    ]
    return page(panels)


if __name__ == "__main__":
    sys.exit(main())
