"""The socket of the API: who has it, and what becomes of one that was there before."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nydusd.errors import NydusError
from nydusd.supervisor.listener import Listener
from tests.support.discipline import wait_until


class TestListener:
    def test_replaces_a_socket_and_is_the_users_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "api.sock"
        old, new = Listener(str(path)), Listener(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        old.remove()
        assert path.exists()
        new.remove()
        assert not path.exists()

    @pytest.mark.parametrize("killed", [False, True])
    def test_takes_the_socket_of_another_daemon_and_says_so_unless_that_one_was_killed(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, killed: bool
    ) -> None:
        """Its API process answers still, for the moment."""
        path = tmp_path / "api.sock"
        program = (
            "import socket, subprocess, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen();"
            "print(flush=True); subprocess.run(['sleep', '1000'], pass_fds=[s.fileno()], stdout=-3)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, start_new_session=True
        ) as other:
            assert other.stdout is not None and other.stdout.readline()
            wait_until(
                lambda: bool(Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text()), "it holds the socket"
            )
            if killed:
                other.kill()
                other.wait()
            Listener(str(path)).remove()
            os.killpg(other.pid, signal.SIGKILL)
        said = f"--apisock {path}: process {other.pid} listens there, and cannot be reached by it any more"
        assert [record.getMessage() for record in caplog.records] == ([] if killed else [said])

    def test_spares_what_is_not_a_socket(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("precious")
        with pytest.raises(NydusError, match="is not a socket"):
            Listener(str(path))
        assert path.read_text() == "precious"

    @pytest.mark.parametrize(
        ("name", "why"), [("missing/api.sock", "its folder does not exist"), ("a" * 200, "long"), ("nul\0", "null")]
    )
    def test_that_cannot_be_bound_is_an_error_that_names_it(self, tmp_path: Path, name: str, why: str) -> None:
        with pytest.raises(NydusError, match=f"--apisock .*{why}"):
            Listener(str(tmp_path / name))
