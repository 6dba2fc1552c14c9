"""What has a nursery make a daemon, and stands for that, without one."""

from __future__ import annotations

import _socket
import os
import socket
import subprocess
import sys
import tempfile
from typing import Any

import pytest

from nydusd import priority
from nydusd.nursery import place, stand, stub


def test_a_copy_that_began_nothing_though_it_was_told_to_meanwhile_costs_a_start_by_itself() -> None:
    """The command was stopped for so long that the copy gave up; then the command said GO, which nobody reads."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, subprocess.Popen(["true"]) as copy:
        pidfd = os.pidfd_open(copy.pid)
        theirs.send(stand.NOTHING)
        ours.send(place.GO)
        theirs.close()
        code = "import os; print(os.environ['NYDUSD_NURSERY'])"
        command = [sys.executable, "-I", "-S", stand.__file__, str(ours.fileno()), str(pidfd)]
        done = subprocess.run(
            [*command, sys.executable, "-c", code], pass_fds=[ours.fileno(), pidfd], capture_output=True, text=True
        )
        os.close(pidfd)
    assert (done.returncode, done.stdout) == (0, "off\n")


@pytest.mark.parametrize("takes_over", [False, True])
def test_a_takeover_waits_less_for_a_nursery_than_it_takes_to_load_by_itself(
    monkeypatch: pytest.MonkeyPatch, takes_over: bool
) -> None:
    patience: list[float] = []
    wires: list[socket.socket] = []
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as nursery,
    ):

        class Wire(_socket.socket):
            def settimeout(self, seconds: float | None) -> None:
                patience.append(seconds or 0.0)
                super().settimeout(seconds)

            def connect(self, path: Any) -> None:
                super().connect(path)
                wires.append(nursery.accept()[0])
                wires[-1].send(b"no")

        monkeypatch.setenv("NYDUSD_RUNTIME_DIR", folder)
        nursery.bind(f"{place.stem(place.identity())}.sock")
        nursery.listen()
        monkeypatch.setattr(_socket, "socket", Wire)
        monkeypatch.setattr(priority, "takes_over", lambda _: takes_over)
        before = os.getpriority(os.PRIO_PROCESS, 0)
        assert stub._from_nursery() is None
        for wire in wires:
            wire.close()
    assert patience == [0.5 if takes_over else 2.0]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before, "the nursery was in a hurry for that moment only"
