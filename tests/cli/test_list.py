"""`nydusctl list`: which daemons there are, by what each has written down."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nydusd.cli.nydusctl import main
from nydusd.storage.state.lock import start_time
from nydusd.supervisor.checked import write_checked
from tests.support import oracle
from tests.support.daemon import Daemon
from tests.support.discipline import wait_until

IMAGE = oracle.image("v6-zstd-blake3")
LIST = [sys.executable, "-m", "nydusd.cli.nydusctl", "--raw", "list"]


def listed(daemon: Daemon) -> dict[str, object]:
    done = subprocess.run(LIST, capture_output=True, timeout=60, check=True, env=daemon._environment)
    (row,) = [row for row in json.loads(done.stdout) if row["mountpoint"] == daemon.place]
    assert isinstance(row, dict)
    return row


def test_a_daemon_is_named_with_its_socket_whatever_has_become_of_it() -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        row = {"pid": daemon.pid, "state": "RUNNING", "mountpoint": daemon.place, "apisock": str(daemon.apisock)}
        assert listed(daemon) == row
        (api,) = daemon.pids("api")
        os.kill(api, signal.SIGSTOP)
        assert listed(daemon) == row | {"state": "silent"}
        os.kill(api, signal.SIGCONT)
        wait_until(lambda: listed(daemon) == row, "an answer")
        daemon.kill_supervisor()
        assert listed(daemon) == row | {"state": "killed"}
        daemon.start()


def test_a_daemon_whose_socket_another_one_has_taken_is_not_said_to_answer_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both were started with the same --apisock."""
    monkeypatch.setenv("NYDUSD_RUNTIME_DIR", str(tmp_path))
    sock = str(tmp_path / "api.sock")
    with socket.socket(socket.AF_UNIX) as ours, subprocess.Popen(["sleep", "1000"]) as other:
        ours.bind(sock)
        ours.listen()
        for name, pid in (("a", os.getpid()), ("b", other.pid)):
            (tmp_path / name).mkdir()
            record = {"mountpoint": f"/mnt/{name}", "apisock": sock, "processes": [[pid, start_time(pid)]]}
            write_checked(tmp_path / name / "state.json", record)
        assert main(["--raw", "list"]) == 0
        states = {row["mountpoint"]: row["state"] for row in json.loads(capsys.readouterr().out)}
        other.kill()
    assert states == {"/mnt/a": "silent", "/mnt/b": "taken"}


def test_table_and_daemons_without_an_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NYDUSD_RUNTIME_DIR", str(tmp_path))
    assert main(["list"]) == 0
    assert capsys.readouterr().out == f"no daemon has written anything down below {tmp_path}\n"
    for name, pid in (("a", os.getpid()), ("b", 2**22 + 1)):
        (tmp_path / name).mkdir()
        record = {"mountpoint": f"/mnt/{name}", "apisock": None, "processes": [[pid, start_time(os.getpid())]]}
        write_checked(tmp_path / name / "state.json", record)
    (tmp_path / "b.lock").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_bytes(b"{")
    assert main(["list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [[str(os.getpid()), "no", "API", "/mnt/a", "-"], [str(2**22 + 1), "killed", "/mnt/b", "-"]]


def test_whoever_may_not_look_is_told_who_may(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o700)
    environment = os.environ | {"NYDUSD_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(LIST, capture_output=True, text=True, user=65534, group=65534, check=False, env=environment)
    assert (done.returncode, done.stderr) == (
        1,
        f"Error: {tmp_path}: Permission denied: run nydusctl as the daemon's user (root)\n",
    )


def test_whoever_may_not_look_at_any_daemon_is_not_told_that_there_is_none() -> None:
    with tempfile.TemporaryDirectory(prefix="nydusd-test-") as folder:
        os.chmod(folder, 0o755)
        os.mkdir(f"{folder}/0123", mode=0o700)
        environment = os.environ | {"NYDUSD_RUNTIME_DIR": folder}
        done = subprocess.run(
            LIST, capture_output=True, text=True, user=65534, group=65534, check=False, env=environment
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {folder}/0123: Permission denied: run nydusctl as the daemon's user (root)\n"
