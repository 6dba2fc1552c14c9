"""Several pytests of one run share its tests: each takes the next module that none has taken, until there is none.

Runs in each pytest that `scripts/run-tests` starts. A module is taken by making a file of its name in the run's folder, which
only one can do; when its tests have ended, the seconds that they took are written into it. So a pytest that ends before, and
however it says so, leaves an empty file: `scripts/run-tests` fails the run.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

AS_ONE = ("tests/containerd/",)
"""Folders that one pytest runs whole: nodes live one at a time on a machine, so a second pytest would only wait."""


def run(session: pytest.Session, folder: Path) -> None:
    """Run what is this pytest's: what `pytest_runtestloop` does, module by module. Raises what that raises."""
    taken = _taken(session, folder)
    current = next(taken, None)
    while current is not None:
        file, items = current
        seconds: defaultdict[str, float] = defaultdict(float)
        for item, following in zip(items, [*items[1:], None], strict=True):
            if following is None:  # pytest wants to know before the last test which fixtures are needed longer
                current = next(taken, None)
                following = current[1][0] if current else None
            began = time.monotonic()
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            seconds[_module(item)] += time.monotonic() - began
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
        file.write_text(json.dumps(seconds))


def _taken(session: pytest.Session, folder: Path) -> Iterator[tuple[Path, list[pytest.Item]]]:
    """The file and the tests of each module, or of a folder that is run as one, as they are asked for and not taken yet."""
    parts: dict[str, list[pytest.Item]] = {}
    for item in session.items:
        name = _module(item)
        parts.setdefault(next((whole for whole in AS_ONE if name.startswith(whole)), name), []).append(item)
    for name, items in parts.items():
        file = folder / quote(name, safe="")
        try:
            file.touch(exist_ok=False)
        except FileExistsError:
            continue
        yield file, items


def _module(item: pytest.Item) -> str:
    return item.path.relative_to(item.config.rootpath).as_posix()
