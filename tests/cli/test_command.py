"""`nydusd` as a process: what it prints and its exit status, up to the start of the supervisor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import nydusd.cli.nydusd as command
from nydusd.cli.options import FuseOptions
from nydusd.config import Config
from nydusd.errors import InternalError, MountError
from nydusd.version import GIT_COMMIT, build_info

V1 = {
    "device": {"backend": {"type": "registry", "config": {"host": "h", "repo": "r", "x": 1}}},
    "mode": "direct",
}


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nydusd", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_version_line_is_what_the_api_reports() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    found = re.search(r"Git Commit:\s*(.+)", done.stdout)
    assert found is not None
    assert found[1] == GIT_COMMIT == build_info()["git_commit"]
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert names == ["nydusd ", "Version", "Git Commit", "Build Time", "Profile", "Rustc"]


def test_help_is_no_error() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--thread-num" in done.stdout


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--no-such-flag"], 2, "Error: unexpected argument '--no-such-flag' (try `nydusd --help`)\n"),
        ([], 2, "Error: --mountpoint is missing: nydusd fuse --bootstrap "),
        (["fuse", "-M", "/no/where"], 2, "Error: --mountpoint /no/where: must be an existing folder: No such file"),
        (["fuse", "-M", "/", "-C", "/no/where"], 2, "Error: /no/where: cannot be read: No such file or directory\n"),
        (["singleton", "--fscache", "/"], 1, "Error: --fscache /: fscache is not available"),
        (["singleton", "--fscache", "/no/where"], 2, "Error: --fscache /no/where: must be an existing folder\n"),
        (["singleton", "-C", "/no/where"], 2, "Error: /no/where: cannot be read: No such file or directory\n"),
        (["fuse", "-M", "/", "-s", "/"], 1, "Error: --shared-dir is not supported yet: only images can be served\n"),
        (
            ["fuse", "-M", "/", "--writable"],
            1,
            "Error: --writable is not supported yet: images are mounted read-only\n",
        ),
        (["fuse", "-M", "/", "--dedup-db", "x"], 1, "Error: --dedup-db is not supported yet"),
    ],
)
def test_error_is_one_line_and_a_status(args: list[str], status: int, message: str) -> None:
    done = run(*args)
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_daemon_that_can_never_have_an_image_says_so(caplog: pytest.LogCaptureFixture) -> None:
    useless = FuseOptions(mountpoint="/m", rlimit_nofile=0)
    for options in (replace(useless, apisock="/s"), replace(useless, bootstrap="/b")):
        command._log_start(options, Config())
    assert "nothing" not in caplog.text
    command._log_start(useless, Config())
    assert "no --bootstrap and no --apisock: nothing is mounted and nothing can be" in caplog.text


def test_configuration_error_names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("version = 2\n[backend]\ntype = 'localfs'\nlocalfs = { dir = 1 }\n")
    done = run("fuse", "-M", str(tmp_path), "-C", str(path))
    assert done.returncode == 2
    assert done.stderr == f"Error: {path}: backend.localfs.dir: must be text, but is a whole number\n"


def test_wrong_pull_auth_is_refused_without_printing_it(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(V1))
    done = run("fuse", "-M", str(tmp_path), "-C", str(path), IMAGE_PULL_AUTH="cGFzc3dvcmQ=")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: IMAGE_PULL_AUTH: must be base64 of user:password")
    assert "cGFzc3dvcmQ" not in done.stderr


def test_import_is_light() -> None:
    code = "import nydusd.cli.nydusd, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"msgspec", "zmq", "logging", "json", "tomllib", "http", "urllib", "subprocess", "socket", "cryptography"}
    assert not heavy & set(done.stdout.split())


class FakeSupervisor:
    """Stands for `nydusd.supervisor.main.run` in this process."""

    def __init__(self) -> None:
        self.calls: list[tuple[FuseOptions, Config]] = []
        self.error: Exception | None = None

    def run(self, options: FuseOptions, config: Config, entries: object, fork_server: object) -> int:
        self.calls.append((options, config))
        if self.error is not None:
            raise self.error
        return 0


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> FakeSupervisor:
    fake = FakeSupervisor()
    monkeypatch.setattr("nydusd.supervisor.main.run", fake.run)
    monkeypatch.setattr("nydusd.logs._secrets", [])
    monkeypatch.delenv(command.AUTH_VARIABLE, raising=False)
    return fake


@pytest.fixture
def log(tmp_path: Path, quiet_logging: None) -> Path:
    return tmp_path / "new" / "folder" / "nydusd"


def test_supervisor_gets_options_and_configuration(
    tmp_path: Path, log: Path, supervisor: FakeSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.json").write_text(json.dumps(V1))
    monkeypatch.setenv(command.AUTH_VARIABLE, "am9lOmh1bnRlcjI=")
    args = [
        "fuse",
        "-M",
        str(tmp_path),
        "-C",
        str(tmp_path / "c.json"),
        "-B",
        "b",
        "-L",
        str(log),
        "--rlimit-nofile",
        "0",
    ]
    assert command.main(args) == 0
    ((options, config),) = supervisor.calls
    assert (options.mountpoint, options.bootstrap) == (str(tmp_path), "b")
    assert config.backend is not None
    assert config.backend.registry is not None
    assert config.backend.registry.auth == "am9lOmh1bnRlcjI="
    text = log.with_suffix(".log").read_text()
    assert f"commit {GIT_COMMIT}" in text
    assert "unknown configuration key device.backend.config.x is ignored" in text
    assert "am9lOmh1bnRlcjI" not in text


def test_daemon_without_image_gets_an_empty_configuration(
    tmp_path: Path, log: Path, supervisor: FakeSupervisor
) -> None:
    assert command.main(["fuse", "-M", str(tmp_path), "-L", str(log), "--rlimit-nofile", "0"]) == 0
    assert supervisor.calls[0][1] == Config()


def test_localfs_dir_makes_the_configuration(tmp_path: Path, log: Path, supervisor: FakeSupervisor) -> None:
    args = ["-M", str(tmp_path), "-B", "b", "-D", "/d", "-L", str(log), "--rlimit-nofile", "0"]
    assert command.main(args) == 0
    config = supervisor.calls[0][1]
    assert config.backend is not None
    assert config.backend.localfs is not None
    assert config.backend.localfs.dir == "/d"


@pytest.mark.parametrize(
    ("error", "status", "message", "has_traceback"),
    [
        (MountError("mount\nfailed at http://u:p@h"), 1, "Error: mount failed at http://***@h\n", False),
        (InternalError("oops"), 1, "Error: oops\n", True),
        (ZeroDivisionError("http://u:p@h"), 1, "ZeroDivisionError: http://***@h\n", True),
    ],
)
def test_errors_of_the_supervisor(
    error: Exception,
    status: int,
    message: str,
    has_traceback: bool,
    tmp_path: Path,
    log: Path,
    supervisor: FakeSupervisor,
    capsys: pytest.CaptureFixture[str],
) -> None:
    supervisor.error = error
    assert command.main(["-M", str(tmp_path), "-L", str(log), "--rlimit-nofile", "0"]) == status
    printed = capsys.readouterr().err
    assert printed.endswith(message)
    assert ("Traceback" in printed) == has_traceback
    assert "ended by an error" in log.with_suffix(".log").read_text()


def test_wrong_log_file_is_refused(
    tmp_path: Path, supervisor: FakeSupervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert command.main(["-M", str(tmp_path), "-L", str(tmp_path / "file" / "x.log")]) == 2
    assert capsys.readouterr().err.startswith(f"Error: --log-file {tmp_path}/file/x.log: cannot be opened: ")
    assert supervisor.calls == []
