"""What stands for a daemon from the nursery, without one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from nydusd.nursery import place, stand


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
