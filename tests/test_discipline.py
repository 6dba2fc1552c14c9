"""The discipline itself: that it sees each kind of thing left behind, cleans it up, and reads logs as it should."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.discipline import Discipline, detach_mount, discipline, is_running, mounts_under, wait_until


@pytest.fixture
def strict() -> Iterator[Discipline]:
    """A discipline of the test's own, that does not wait long; marked as the run that is going on."""
    own = Discipline(grace=0.2)
    own.run_id = discipline.run_id
    own.folder.mkdir()
    own.runtime.mkdir()
    yield own
    own.finish()


def test_nothing_left_is_no_complaint(strict: Discipline) -> None:
    assert strict.leftovers(strict.snapshot()) == []


def test_running_child_is_named_and_killed(strict: Discipline) -> None:
    before = strict.snapshot()
    with subprocess.Popen(["sleep", "1000"]) as child:
        wait_until(lambda: "sleep" in Path(f"/proc/{child.pid}/comm").read_text(), "exec")
        assert strict.leftovers(before) == [f"process {child.pid} (sleep 1000)"]
        assert not is_running(child.pid)


def test_orphan_of_an_ended_child_is_named_and_killed(strict: Discipline) -> None:
    before = strict.snapshot()
    program = "import subprocess; print(subprocess.Popen(['sleep', '1000'], stdout=-3).pid)"
    child = subprocess.run([sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, check=True)
    orphan = int(child.stdout)
    assert strict.leftovers(before) == [f"process {orphan} (sleep 1000)"]
    assert not is_running(orphan)


def test_what_a_longer_lived_daemon_starts_ends_with_that(strict: Discipline) -> None:
    with subprocess.Popen(["sh", "-c", "read line; sleep 1000 & echo $!; wait"], stdin=-1, stdout=-1) as daemon:
        assert daemon.stdin is not None
        assert daemon.stdout is not None
        before = strict.snapshot()
        daemon.stdin.write(b"go\n")
        daemon.stdin.flush()
        worker = int(daemon.stdout.readline())
        assert strict.leftovers(before) == []
        assert is_running(worker)
        daemon.kill()
        daemon.wait()
        assert strict.leftovers(before) == [f"process {worker} (sleep 1000)"]


def test_orphan_that_hides_in_a_session_of_its_own_is_found(strict: Discipline) -> None:
    before = strict.snapshot()
    program = (
        "import subprocess; print(subprocess.Popen(['sleep', '1000'], stdout=-3, start_new_session=True, env={}).pid)"
    )
    child = subprocess.run([sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, check=True)
    assert strict.leftovers(before) == [f"process {int(child.stdout)} (sleep 1000)"]


def test_shared_memory_of_another_runs_daemon_is_left_alone(strict: Discipline) -> None:
    before = strict.snapshot()
    other = Path(f"/tmp/nydusd-test-other-{os.getpid()}")
    block = Path(f"/dev/shm/nydusd.other{os.getpid()}.count.1")
    folder = other / "run" / block.name.split(".")[1]
    folder.mkdir(parents=True)
    block.touch()
    try:
        assert strict.leftovers(before) == []
        assert block.exists()
        folder.rmdir()
        assert strict.leftovers(before) == [f"shared memory {block}"]
        assert not block.exists()
    finally:
        block.unlink(missing_ok=True)
        shutil.rmtree(other)


def test_open_descriptor_is_named(strict: Discipline, tmp_path: Path) -> None:
    path = tmp_path / "held"
    before = strict.snapshot()
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        assert strict.leftovers(before) == [f"file descriptor {fd} ({path})"]
    finally:
        os.close(fd)


def test_shared_memory_of_ours_is_named_and_removed_but_no_other(strict: Discipline) -> None:
    before = strict.snapshot()
    ours = Path(f"/dev/shm/nydusd.discipline-{os.getpid()}")
    other = Path(f"/dev/shm/other.discipline-{os.getpid()}")
    try:
        ours.touch()
        other.touch()
        assert f"shared memory {ours}" in strict.leftovers(before)
        assert not ours.exists()
        assert other.exists()
    finally:
        other.unlink()


def test_file_in_the_runtime_folder_is_named_and_removed(strict: Discipline) -> None:
    before = strict.snapshot()
    (strict.runtime / "instance").mkdir()
    (strict.runtime / "instance" / "state").touch()
    assert strict.leftovers(before) == [f"file {strict.runtime}/instance", f"file {strict.runtime}/instance/state"]
    assert list(strict.runtime.iterdir()) == []


def test_mount_is_named_and_detached(strict: Discipline) -> None:
    point = strict.folder / "a mount"
    point.mkdir()
    before = strict.snapshot()
    subprocess.run(["mount", "-t", "tmpfs", "discipline", str(point)], check=True)
    try:
        assert strict.leftovers(before) == [f"mount {point}"]
        assert mounts_under(strict.folder) == set()
    finally:
        detach_mount(str(point))


@pytest.mark.parametrize(
    "line",
    [
        "[2026-11-24 00:00:00] ERROR cannot read",
        "CRITICAL out of memory",
        "Traceback (most recent call last):",
        "AssertionError: no",
        "supervisor: assert failed",
    ],
)
def test_bad_line_in_a_log_is_a_problem_once(strict: Discipline, line: str) -> None:
    log = strict.folder / "log"
    log.write_text(f"INFO all is well\n{line}\n")
    strict.logs.watch(log)
    assert strict.logs.problems() == [f"unannounced in a log: {line}"]
    assert strict.logs.problems() == []


def test_announced_line_is_excused_in_this_test_only(strict: Discipline) -> None:
    log = strict.folder / "log"
    strict.logs.watch(log)
    strict.logs.expect("ERROR disk .* full")
    log.write_text("ERROR disk /cache full\n")
    assert strict.logs.problems() == []
    with log.open("a") as file:
        file.write("ERROR disk /cache full\n")
    assert strict.logs.problems() == ["unannounced in a log: ERROR disk /cache full"]


def test_announced_line_that_never_comes_is_a_problem(strict: Discipline) -> None:
    strict.logs.expect("ERROR disk full")
    assert strict.logs.problems() == ["announced with expect_log, but never logged: ERROR disk full"]


def test_half_a_line_is_read_when_the_log_has_ended(strict: Discipline) -> None:
    log = strict.folder / "log"
    log.write_text("INFO fine\nCRITICAL killed in the mid")
    strict.logs.watch(log)
    assert strict.logs.problems() == []
    strict.logs.end(log)
    assert strict.logs.problems() == ["unannounced in a log: CRITICAL killed in the mid"]
