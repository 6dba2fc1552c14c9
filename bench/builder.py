"""Part of `make bench`: how fast images are made and how large they are, beside a reference if $NYDUS_IMAGE_REF names one.

The tree is that of `bench.run`; files are in the page cache, output goes to the same disk. Builders take turns, several
rounds, medians. "ours, 1 process" shows what the pool brings.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.run import FOLDER, ROUNDS, prepare

OURS = [sys.executable, "-m", "nydusd.cli.nydus_image"]
OPTIONS = {"zstd": [], "lz4_block": ["--compressor", "lz4_block"], "batch 1 MiB": ["--batch-size", "0x100000"]}

Row = tuple[float, int]


def main() -> int:
    """Measure and print the table."""
    tree = Path(os.environ.get("NYDUSD_BENCH_TREE", FOLDER / "rootfs"))
    if not tree.exists():
        prepare()
    builders = {"ours": OURS, "ours, 1 process": OURS}
    if reference := os.environ.get("NYDUS_IMAGE_REF"):
        builders["reference"] = [reference]
    subprocess.run(["tar", "-cf", "/dev/null", "--ignore-failed-read", tree], check=False, stderr=subprocess.DEVNULL)
    print(f"| {tree} | " + " | ".join(f"{name}, s | {name}, MB" for name in builders) + " |")
    print("|" + " --- |" * (1 + 2 * len(builders)))
    for title, options in OPTIONS.items():
        rows: dict[str, list[Row]] = {name: [] for name in builders}
        for _ in range(ROUNDS):
            for name, command in builders.items():
                more = ["--processes", "1"] if name.endswith("1 process") else []
                rows[name].append(measure([*command, "create", *options, *more], tree))
        cells = [f"{statistics.median(r[0] for r in found):.2f} | {found[0][1] / 1e6:.1f}" for found in rows.values()]
        print(f"| {title} | " + " | ".join(cells) + " |")
    print(f"largest process of all builders: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024} MB")
    return 0


def measure(command: list[str], tree: Path) -> Row:
    """Seconds that a build takes, and bytes of what it makes."""
    out = Path(tempfile.mkdtemp(prefix="build-", dir=FOLDER))
    try:
        begin = time.perf_counter()
        arguments = ["-B", str(out / "bootstrap"), "-D", str(out), str(tree)]
        subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - begin
        return seconds, sum(path.stat().st_size for path in out.iterdir())
    finally:
        shutil.rmtree(out)


if __name__ == "__main__":
    sys.exit(main())
