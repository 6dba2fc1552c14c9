"""What `nydus-image create` keeps in memory grows with names and chunks, never with data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.image.build import HERE

MEASURE = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
print(status, usage.ru_maxrss)
"""
"""A process of its own does it: what a process had in memory before it ran the command counts, and the tests' has much."""


def peak(tree: Path, out: Path, *options: str) -> int:
    """Most bytes that any one process of a build had in memory."""
    out.mkdir()
    where = ("-B", out / "bootstrap", "-D", out)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "nydusd.cli.nydus_image",
        "create",
        *where,
        "--processes",
        "1",
        *options,
        tree,
    ]
    said = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], cwd=HERE, check=True, capture_output=True, text=True
    ).stdout.split()
    assert said[0] == "0"
    return int(said[1]) << 10


def test_data_passes_through_and_is_not_kept(tmp_path: Path) -> None:
    peaks = []
    for number, size in enumerate((8 << 20, 48 << 20)):
        tree = tmp_path / str(number)
        tree.mkdir()
        with open(tree / "file", "wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        peaks.append(peak(tree, tmp_path / f"out{number}", "--compressor", "lz4_block"))
    assert peaks[1] < peaks[0] + (6 << 20), peaks


def test_a_name_takes_little(tmp_path: Path) -> None:
    peaks = []
    for count in (1000, 6000):
        tree = tmp_path / str(count)
        for number in range(count):
            folder = tree / str(number // 1000)
            if number % 1000 == 0:
                folder.mkdir(parents=True)
            (folder / f"file-{number}").write_bytes(number.to_bytes(8, "little"))
        peaks.append(peak(tree, tmp_path / f"out{count}"))
    assert (peaks[1] - peaks[0]) / 5000 < 1500, peaks
