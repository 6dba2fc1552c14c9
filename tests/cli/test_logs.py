"""The log: its format, its file shared by processes, its rotation, and what never gets into it."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nydusd import logs
from nydusd.errors import ConfigError

log = logging.getLogger("test")
TIME = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} \+00:00\]"

pytestmark = pytest.mark.usefixtures("quiet_logging")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "d.log"


def setup(file: Path, level: str = "trace", role: str = "supervisor", rotation_size: int = 0) -> None:
    logs.setup(level, str(file), role, rotation_size)


def test_lines_have_the_format_of_the_reference(file: Path) -> None:
    setup(file)
    log.info("hello %s", "you")
    log.warning("careful")
    log.log(logs.TRACE, "small")
    lines = file.read_text().splitlines()
    assert re.fullmatch(rf"{TIME} INFO hello you", lines[0])
    assert re.fullmatch(rf"{TIME} WARN \[test_logs.py:\d+\] careful", lines[1])
    assert re.fullmatch(rf"{TIME} TRACE \[test_logs.py:\d+\] small", lines[2])


def test_other_roles_are_named(file: Path) -> None:
    setup(file, role="fuse 0")
    log.info("hello")
    assert file.read_text().endswith("INFO fuse 0: hello\n")


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("trace", "TRACE DEBUG INFO WARN ERROR"),
        ("debug", "DEBUG INFO WARN ERROR"),
        ("info", "INFO WARN ERROR"),
        ("WARN", "WARN ERROR"),
        ("error", "ERROR"),
        ("off", ""),
    ],
)
def test_levels(file: Path, level: str, expected: str) -> None:
    setup(file, "info")
    logs.set_level(level)
    assert logs.level_name() == level.lower()
    for number in (logs.TRACE, 10, 20, 30, 40):
        log.log(number, "x")
    assert " ".join(line.split("] ")[1].split(" ")[0] for line in file.read_text().splitlines()) == expected


def test_unknown_level_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="log level: must be one of trace, debug, info, warn, error, off, but is 'loud'"
    ):
        logs.set_level("loud")


@pytest.mark.parametrize(("given", "made"), [("a/b/c", "a/b/c.log"), ("x.txt", "x.txt"), ("y.", "y.")])
def test_file_name_and_folder(tmp_path: Path, given: str, made: str) -> None:
    setup(tmp_path / given)
    log.info("x")
    assert (tmp_path / made).read_text()


def test_relative_file_is_below_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logs.setup("info", "r", "supervisor")
    log.info("x")
    assert (tmp_path / "r.log").read_text()


def test_named_pipe_without_reader_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.log")
    with pytest.raises(ConfigError, match="cannot be opened"):
        setup(tmp_path / "p.log")


def test_hostile_text_stays_on_its_line(file: Path) -> None:
    setup(file)
    log.info("file %s", "a\n[2026-01-01] INFO forged\x1b[2J\ud800")
    assert file.read_text().count("\n") == 1
    assert file.read_text().endswith("file a\\x0a[2026-01-01] INFO forged\\x1b[2J\\ud800\n")


def test_traceback_is_there_and_without_secrets(file: Path) -> None:
    setup(file)
    try:
        raise ValueError("http://joe:hunter2@h/")
    except ValueError:
        log.exception("bad")
    text = file.read_text()
    assert "Traceback" in text
    assert "ValueError: http://***@h/" in text
    assert "hunter2" not in text


def test_registered_secret_never_shows_even_inside_another(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_secrets", [])
    setup(file)
    for value in ("hunter2", "joe:hunter2:x", ""):
        logs.register_secret(value)
    log.info("a joe:hunter2:x b hunter2 c")
    assert file.read_text().endswith("INFO a *** b *** c\n")


def test_wrong_logging_call_is_shown_and_harmless(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    setup(file)
    log.info("%d", "x")
    log.info("after")
    assert "TypeError" in capfd.readouterr().err
    assert file.read_text().endswith("after\n")


def test_full_disk_is_harmless() -> None:
    logs.setup("info", "/dev/full", "supervisor")
    log.info("x")


def test_file_moved_away_is_followed_by_a_new_one(file: Path) -> None:
    setup(file)
    log.info("one")
    file.rename(file.with_suffix(".1"))
    log.info("two")
    assert file.read_text().endswith("two\n")
    assert file.with_suffix(".1").read_text().endswith("one\n")


def test_rotation_keeps_every_line_and_ten_files(file: Path) -> None:
    setup(file, rotation_size=200)
    for number in range(40):
        log.info("%s %s", number, "x" * 200)
    rotated = sorted(path for path in file.parent.iterdir() if path != file)
    assert len(rotated) == 10
    assert all(re.fullmatch(r"d_r\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+\.log", path.name) for path in rotated)
    assert all(path.read_text().count("\n") == 1 for path in rotated)


def test_rotation_keeps_the_newest_files_when_the_clock_was_put_back(file: Path) -> None:
    """Files that have later names than the time now are from before that."""
    ahead = [file.with_name(f"d_r2999-01-01_00-00-00_{number}.log") for number in range(10)]
    for path in ahead:
        path.touch()
    setup(file, rotation_size=200)
    for number in range(4):
        log.info("%s %s", number, "x" * 200)
    kept = [path for path in ahead if path.exists()]
    assert 0 < len(kept) < 10 and kept == ahead[-len(kept) :]
    text = "".join(path.read_text() for path in file.parent.iterdir())
    assert all(f"INFO {number} x" in text for number in range(4))


def test_processes_share_a_file_and_its_rotation(file: Path) -> None:
    code = (
        "import logging, sys; from nydusd import logs; logs.setup('info', sys.argv[1], sys.argv[2], 20000)\n"
        "for n in range(300): logging.info('%s %s', n, 'x' * 100)"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(file), f"role {n}"]) for n in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    # Some 135 kB of 3 processes: rotated, and the ten files kept hold it all.
    parts = [path.read_text() for path in file.parent.iterdir()]
    assert len(parts) > 1
    lines = [line for part in parts for line in part.splitlines()]
    for n in range(3):
        mine = [line for line in lines if f"INFO role {n}: " in line]
        assert len(mine) == 300
        assert all(line.endswith("x" * 100) for line in mine)


def test_sigusr1_writes_the_stack_into_the_log(file: Path) -> None:
    setup(file)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert "in test_sigusr1_writes_the_stack_into_the_log" in file.read_text()


def test_sigusr1_follows_the_rotation(file: Path) -> None:
    setup(file)
    file.rename(file.with_suffix(".1"))
    log.info("new")
    os.kill(os.getpid(), signal.SIGUSR1)
    assert "in test_sigusr1_follows_the_rotation" in file.read_text()


def test_without_a_file_the_log_is_stderr() -> None:
    code = "import logging; from nydusd import logs; logs.setup('info', None, 'api'); logging.info('x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert re.fullmatch(rf"{TIME} INFO api: x\n", done.stderr)
