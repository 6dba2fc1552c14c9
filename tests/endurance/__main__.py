"""`make endurance`: 100 upgrades of the workers under 20 mounts with open files, and 300 mounts and umounts, leave a daemon as
it was.

ENDURANCE_UPGRADES (100), ENDURANCE_MOUNTS (300) say how often. The exit status is 0 if nothing has grown.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tests.endurance import Usage, growth, mounts_and_umounts, upgrades_with_open_files
from tests.support.daemon import Daemon
from tests.support.discipline import discipline

MOUNTS = 20
WARM_UP = 10


def main() -> int:
    upgrades = int(os.environ.get("ENDURANCE_UPGRADES", "100"))
    rounds = int(os.environ.get("ENDURANCE_MOUNTS", "300"))
    problems: list[str] = []
    discipline.start()
    try:
        before = discipline.snapshot()
        for what in ("upgrades", "mounts"):
            began = time.monotonic()
            folder = discipline.folder / what
            folder.mkdir()
            with Daemon(None, Path("/nonexistent")) as daemon:
                if what == "upgrades":
                    name = f"{MOUNTS} mounts with open files, {upgrades} upgrades of the workers"
                    found = upgrades_with_open_files(daemon, folder, MOUNTS, upgrades, WARM_UP)
                else:
                    name = f"{rounds} mounts and umounts"
                    found = mounts_and_umounts(daemon, folder, rounds, WARM_UP * 3)
            print(f"{name}, {time.monotonic() - began:.0f} s")
            show(found)
            problems += growth(*found)
        problems += discipline.logs.problems() + [f"left behind: {what}" for what in discipline.leftovers(before)]
    finally:
        discipline.finish()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def show(found: list[Usage]) -> None:
    for name, each in zip(("after the warm-up", "at the end"), found, strict=True):
        print(f"  {name}: {each}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
