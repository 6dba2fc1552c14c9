"""`scripts/run-tests` with tests of its own: who runs which module, and what fails a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "scripts/run-tests",
    "pyproject.toml",
    "tests/conftest.py",
    "tests/support/discipline.py",
    "tests/support/share.py",
)

NOTING = """
import json, os, time
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[{depth}]

def note(what):
    with open(ROOT / "notes", "a") as notes:
        notes.write(json.dumps([what, Path(__file__).stem, os.getpid()]) + "\\n")

@pytest.fixture(scope="module", autouse=True)
def _made():
    note("made")
    yield
    note("done")

def test_one(of_the_session):
    note("one")
    {one}

def test_two():
    note("two")
"""
OF_THE_SESSION = """
@pytest.fixture(scope="session")
def of_the_session():
    with open(Path(__file__).parents[1] / "notes", "a") as notes:
        notes.write(json.dumps(["session", "", os.getpid()]) + "\\n")
"""
UNTIL_ALL_OTHERS_ARE_DONE = """
    deadline = time.monotonic() + 100
    while len(os.sched_getaffinity(0)) > 1 and (ROOT / "notes").read_text().count("done") < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
"""
AT_FIRST = """
    if not (ROOT / "failed").exists():
        (ROOT / "failed").touch()
        assert False, "the first time"
"""
ENDS = """
    from tests.support.discipline import discipline
    discipline.finish()
    os._exit(0)
"""


def checkout(folder: Path, modules: dict[str, str]) -> Path:
    """A folder in which `scripts/run-tests` has these modules, each with what its first test does."""
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    with (folder / "tests" / "conftest.py").open("a") as conftest:
        conftest.write(OF_THE_SESSION)
    for name, one in modules.items():
        path = folder / "tests" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(NOTING.format(depth=name.count("/") + 1, one=one.strip()))
    return folder


def run_tests(folder: Path) -> tuple[int, str]:
    """Exit status and output."""
    command = [sys.executable, str(folder / "scripts" / "run-tests")]
    # Not the plugins that are only for our tests: loading them takes longer than all the rest.
    few = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_timeout"}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | few,
        timeout=280,
        check=False,
    )
    return done.returncode, done.stdout


def notes(folder: Path) -> list[tuple[str, str, int]]:
    """What was noted down, by which module, in which pytest."""
    return [tuple(json.loads(line)) for line in (folder / "notes").read_text().splitlines()]


def test_a_module_is_run_once_and_whole_and_who_has_time_takes_the_next(tmp_path: Path) -> None:
    names = ("containerd/test_x", "containerd/test_y", "test_a", "test_b", "test_0long")
    firsts = dict.fromkeys(names, "") | {"test_0long": UNTIL_ALL_OTHERS_ARE_DONE, "test_b": AT_FIRST}
    folder = checkout(tmp_path, firsts)
    status, output = run_tests(folder)
    assert status == 0, output
    assert "UNSTABLE: tests/test_b.py::test_one failed above and passed 3 times by itself" in output
    assert "the slowest of 5 modules, in seconds:" in output
    noted = notes(folder)
    pids = {pid for _, _, pid in noted}
    runs = Counter(module for what, module, _ in noted if what == "two")
    assert runs == {Path(name).name: 1 for name in names}
    assert sum(what == "session" for what, _, _ in noted) == len(pids), "a session's fixtures are made once in a pytest"
    for module in runs:
        made = [what for what, its, _ in noted if its == module]
        assert made[:4] == ["made", "one", "two", "done"]
        assert made[4:] == (["made", "one", "done"] * 3 if module == "test_b" else [])
    first = {module: pid for what, module, pid in noted if what == "two"}
    assert first["test_x"] == first["test_y"], "of containerd one pytest runs all"


def test_a_test_that_fails_again_fails_the_run(tmp_path: Path) -> None:
    folder = checkout(tmp_path, {"test_a": "assert False, 'always'", "test_b": ""})
    status, output = run_tests(folder)
    assert status == 1, output
    assert "repeating by itself, 1 of 3: tests/test_a.py::test_one" in output
    assert "repeating by itself, 2 of 3" not in output
    assert "UNSTABLE" not in output


def test_a_pytest_that_ends_in_the_middle_of_a_module_fails_the_run_whatever_its_status(tmp_path: Path) -> None:
    folder = checkout(tmp_path, {"test_a": ENDS, "test_b": "", "test_c": ""})
    status, output = run_tests(folder)
    assert status == 1, output
    assert "NOT ENDED: tests/test_a.py" in output
