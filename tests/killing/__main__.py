"""`make kill-points`: in each scene, kill whoever passes a named point for the first, second, third … time, until none is left.

After each kill every byte is read through the mount, and what is left is looked for. KILL_POINTS_SCENE runs one scene (its
number), KILL_POINTS_MOST bounds how often the same point is taken (default 4; 0: no bound), KILL_POINTS_OF takes those only
whose names begin so (several with commas between). The exit status is 0 if no byte was wrong, no read failed, and nothing
was left.
"""

from __future__ import annotations

import os
import sys
import time
import traceback

from tests.killing.catalogue import SCENES
from tests.killing.plan import all_points
from tests.killing.scene import FILES
from tests.support.discipline import discipline
from tests.support.mounted import Tree


def sweep(name: str, tree: Tree, most: int, problems: list[str]) -> tuple[int, set[str], str]:
    """Run a scene again and again; gives how many kills that were, which points were passed, and the longest turn."""
    folder = discipline.folder / name.replace(" ", "-")
    folder.mkdir()
    kills = 0
    longest = (0.0, "")
    before = discipline.snapshot()
    with SCENES[name](tree, folder) as scene:
        _, passed = scene.turn()
        chosen = tuple(os.environ.get("KILL_POINTS_OF", "").split(","))
        for point, times in sorted((point, times) for point, times in passed.items() if point.startswith(chosen)):
            for number in range(1, min(times, most or times) + 1):
                begin = time.monotonic()
                try:
                    killed, _ = scene.turn(point, number)
                except Exception as error:
                    traceback.print_exc()
                    problems.append(f"{name}: {point}, {number}: {error!r}")
                    return kills, set(passed), f"longest {longest[0]:.1f} s: {longest[1]}"
                kills += killed
                longest = max(longest, (time.monotonic() - begin, f"{point}, {number}"))
                problems += [f"{name}: {point}, {number}: {line}" for line in discipline.logs.problems()]
    problems += [f"{name}: left behind: {what}" for what in discipline.leftovers(before)]
    return kills, set(passed), f"longest {longest[0]:.1f} s: {longest[1]}"


def main() -> int:
    chosen = os.environ.get("KILL_POINTS_SCENE")
    most = int(os.environ.get("KILL_POINTS_MOST", "4"))
    discipline.start()
    problems: list[str] = []
    kills, seen = 0, set[str]()
    began = time.monotonic()
    try:
        tree = Tree(FILES, discipline.folder / "tree")
        for number, name in enumerate(SCENES):
            if chosen and int(chosen) != number:
                continue
            begin = time.monotonic()
            of_it, passed, longest = sweep(name, tree, most, problems)
            kills += of_it
            seen |= passed
            print(
                f"{name}: {of_it} kills at {len(passed)} points, {time.monotonic() - begin:.0f} s; {longest}",
                flush=True,
            )
    finally:
        discipline.finish()
    missed = sorted(all_points() - seen)
    print(f"{kills} kills at {len(seen)} points, {time.monotonic() - began:.0f} s, {len(problems)} problems")
    print(f"not passed by any of these scenes: {', '.join(missed) or 'none'}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
