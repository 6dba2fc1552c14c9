"""Rules for every test: it leaves nothing behind, and no process of its says an error that it did not announce."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import share
from tests.support.discipline import discipline

settings.register_profile("nydusd", deadline=None, print_blob=True)
settings.load_profile("nydusd")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """All temporary files of this run go below one short folder, pytest's own included."""
    discipline.start()
    os.environ["TMPDIR"] = tempfile.tempdir = str(discipline.folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="FOLDER", help="run the modules that no other pytest has taken in this folder")
    parser.addoption("--failures", metavar="FILE", help="append a line of JSON for each failure: the test and its text")


def pytest_collection_finish() -> None:
    """What was collected stays: `discipline` has gc look for what a test leaves, which must not look through all of that."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With `--share`, some of the modules. Module by module: what a module's fixtures make is then made once."""
    folder = session.config.getoption("--share")
    if folder is None or session.testsfailed or session.config.option.collectonly:
        return None  # pytest's own loop
    share.run(session, Path(folder))
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    discipline.finish()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the ends of its daemons' logs."""
    report = yield
    if report.failed:
        report.sections += discipline.logs.tails()
        if failures := item.config.getoption("--failures"):
            with open(failures, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"test": item.nodeid, "text": report.longreprtext}) + "\n")
    return report


@pytest.fixture(autouse=True, scope="session")
def _nothing_left_by_the_run() -> Iterator[None]:
    """For what module and session fixtures leave: the check of each test begins after they were made."""
    before = discipline.snapshot()
    yield
    left = discipline.leftovers(before)
    assert not left, "left behind by the test run:\n  " + "\n  ".join(left)


@pytest.fixture(autouse=True)
def _nothing_left_and_logs_clean(_nothing_left_by_the_run: None) -> Iterator[None]:
    """Set up first and torn down last of a test's own fixtures: so it sees what they leave, too."""
    before = discipline.snapshot()
    yield
    problems = discipline.logs.problems()
    problems += [f"left behind: {what}" for what in discipline.leftovers(before)]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.fixture
def expect_log() -> Callable[..., None]:
    """Announce log lines by regular expressions: they are excused, and the test fails if one of them never comes."""
    return discipline.logs.expect
