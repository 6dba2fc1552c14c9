"""Where a process of a daemon is to be killed next, and which points were passed: a file that all of them share."""

from __future__ import annotations

import ast
import fcntl
import json
import os
from collections import Counter
from pathlib import Path
from signal import SIGKILL

ROOT = Path(__file__).resolve().parents[2]


def all_points() -> set[str]:
    """The names of all points in the code. AssertionError for one that is there twice or is not literal."""
    found: Counter[str] = Counter()
    for path in [*(ROOT / "nydusd").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "points.reach":
                (name,) = node.args
                assert isinstance(name, ast.Constant) and isinstance(name.value, str), path
                found[name.value] += 1
    assert set(found.values()) == {1}, [name for name, times in found.items() if times > 1]
    return set(found)


class Plan:
    """`environment` makes the processes of a daemon look at it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        inject = Path(__file__).parent / "inject"
        self.environment = {"NYDUSD_TEST_PLAN": str(path), "PYTHONPATH": f"{inject}:{ROOT}"}

    def begin(self, name: str = "", number: int = 0, signal: int = SIGKILL) -> None:
        """Kill whoever reaches this point for the `number`-th time from now on; count what is passed.

        `signal`: or stop it there, by SIGSTOP.
        """
        self._change({"name": name, "number": number, "passed": {}, "killed": 0, "signal": signal})

    def end(self) -> tuple[bool, dict[str, int]]:
        """Whether somebody was killed, and how often each point was passed."""
        text = self._change(None)
        plan = json.loads(text)
        return bool(plan["killed"]), plan["passed"]

    def killed(self) -> bool:
        """Whether somebody was killed."""
        with open(self._path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return bool(json.loads(file.read())["killed"])

    def _change(self, plan: dict[str, object] | None) -> bytes:
        with open(self._path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = file.read()
            os.ftruncate(file.fileno(), 0)
            if plan is not None:
                os.pwrite(file.fileno(), json.dumps(plan).encode(), 0)
            return before
