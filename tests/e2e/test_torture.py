"""A short run of `make torture`: kills at random, upgrades and evictions under readers that compare every byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_reads_are_right_while_processes_of_all_kinds_are_killed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"TORTURE_MINUTES": "0.25", "TORTURE_SEED": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
