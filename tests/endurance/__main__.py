"""`make endurance`: with 20 mounts and open files 100 upgrades of the workers, and 100 successions of the whole daemon under
readers; then 300 mounts and umounts. They leave a daemon as it was.

ENDURANCE_UPGRADES (100), ENDURANCE_SUCCESSIONS (100), ENDURANCE_MOUNTS (300) say how often. The exit status is 0 if nothing has
grown.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

from tests.endurance import MOUNTS_MOST, daemon_with_image, mounts_and_umounts, successions, upgrades_with_open_files
from tests.support.discipline import discipline
from tests.support.keeper import Keeper

WARM_UP = 10


def main() -> int:
    upgrades, succeeded, rounds = (
        int(os.environ.get(f"ENDURANCE_{name}", number))
        for name, number in (("UPGRADES", "100"), ("SUCCESSIONS", "100"), ("MOUNTS", "300"))
    )
    scenarios = {
        "upgrades": f"{upgrades} upgrades of the workers, {MOUNTS_MOST} mounts with open files",
        "successions": f"{succeeded} successions of the daemon under readers, {MOUNTS_MOST} mounts with open files",
        "mounts": f"{rounds} mounts and umounts",
    }
    problems: list[str] = []
    discipline.start()
    try:
        before = discipline.snapshot()
        for what, name in scenarios.items():
            began = time.monotonic()
            folder = discipline.folder / what
            folder.mkdir()
            with contextlib.closing(Keeper(folder)) as keeper, daemon_with_image(folder, keeper.args) as daemon:
                if what == "upgrades":
                    found = upgrades_with_open_files(daemon, folder, MOUNTS_MOST, upgrades, WARM_UP)
                elif what == "successions":
                    found = successions(daemon, keeper, folder, MOUNTS_MOST, succeeded, WARM_UP)
                else:
                    found = mounts_and_umounts(daemon, folder, rounds, WARM_UP * 3)
            print(f"{name}, {time.monotonic() - began:.0f} s")
            print(f"  after the warm-up: {found.before}")
            print(f"  at the end: {found.after}", flush=True)
            problems += [f"{name}: {sentence}" for sentence in found.growth()]
        problems += discipline.logs.problems() + [f"left behind: {what}" for what in discipline.leftovers(before)]
    finally:
        discipline.finish()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
