"""Daemons that are copies of a nursery are like any other from outside; and who gets none. Real daemons."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.nursery import place
from nydusd.nursery.peers import is_like_us
from tests.supervisor.lives import IMAGE, ROOT, config_for, wrong
from tests.support.daemon import wait_for_role
from tests.support.discipline import cmdline, descendants, discipline, is_running, mounts_under, wait_until
from tests.support.memory import found_in_memory
from tests.support.nursery import Another, running_nursery

SECRETS = {
    "NYDUS_HEADER_Cookie": "cookie-of-the-operator",
    "AWS_SECRET_ACCESS_KEY": "key-of-the-operator",
    "IMAGE_PULL_AUTH": "dXNlcjpwYXNzd29yZC1vZi10aGUtb3BlcmF0b3I=",
}
ASK = """
import os, socket, sys
from nydusd.nursery import place
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as wire:
    wire.connect(sys.argv[1])
    reader, writer = os.pipe()
    socket.send_fds(wire, [place.identity()], [0, 1, 2, os.open("/", os.O_PATH), os.memfd_create("x"), reader])
    print(wire.recv(64))
"""


@pytest.fixture(scope="module")
def nursery(first: Another) -> Iterator[int]:
    with running_nursery() as pid:
        yield pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_what_was_started_stops_the_daemon(nursery: int, number: signal.Signals) -> None:
    with Another() as daemon:
        assert daemon.is_copy()
        daemon.stop(number)


def test_a_signal_to_the_supervisor_ends_what_was_started_with_it(nursery: int) -> None:
    with Another() as daemon:
        os.kill(daemon.supervisor, signal.SIGTERM)
        daemon.wait_for_end()


def test_sigusr1_has_supervisor_and_fork_server_log_their_stacks(nursery: int) -> None:
    with Another() as daemon:
        (fork_server, *_) = [pid for pid in daemon.recorded() if cmdline(pid) == "nydusd: fork server"]
        for pid in (daemon.pid, fork_server):  # what was started passes it on to the supervisor
            daemon.ask_for_stacks(pid)
            assert is_running(pid)


@pytest.mark.parametrize("victim", ["stub", "supervisor"])
def test_sigkill_of_either_is_the_end_of_both_and_the_same_command_takes_over(nursery: int, victim: str) -> None:
    with Another() as daemon:
        assert wrong(daemon) == []
        stub, supervisor = daemon.pid, daemon.supervisor
        (frontend, *_) = daemon.pids("fuse")
        os.kill(stub if victim == "stub" else supervisor, signal.SIGKILL)
        assert daemon.status() == -signal.SIGKILL
        wait_until(lambda: not is_running(supervisor), "the supervisor's end")
        assert is_running(frontend)
        daemon.start()
        assert daemon.is_copy() and daemon.supervisor != supervisor
        assert frontend in daemon.pids("fuse")
        assert wrong(daemon) == []


def test_a_signal_that_kills_the_supervisor_is_what_ends_what_was_started(nursery: int) -> None:
    with Another() as daemon:
        os.kill(daemon.supervisor, signal.SIGALRM)
        assert daemon.status() == -signal.SIGALRM
        daemon.start()


@pytest.mark.parametrize("how", ['exec unshare --uts "$@"', 'exec "$@" <&-'], ids=["namespace", "closed"])
def test_a_command_in_another_namespace_or_without_stdio_starts_by_itself(nursery: int, how: str) -> None:
    daemon = Another()
    daemon.command = ["sh", "-c", how, "sh", *daemon.command]
    with daemon:
        assert not daemon.is_copy()


@pytest.mark.parametrize(
    "command",
    [["unshare", "--ipc"], ["unshare", "--net"], ["setpriv", "--no-new-privs"], ["chroot", "/proc/self/root/proc/.."]],
    ids=lambda command: command[0] + command[1],
)
def test_who_has_other_rights_or_sees_another_system_is_not_like_us(command: list[str]) -> None:
    with subprocess.Popen([*command, "cat"], stdin=subprocess.PIPE) as process:
        wait_until(lambda: cmdline(process.pid) == "cat", "the command")
        assert is_like_us(process.pid) is (command[0] == "chroot")  # into the same folder
        process.kill()
    assert is_like_us(os.getpid())


def test_another_user_is_refused(nursery: int) -> None:
    (path,) = discipline.runtime.glob("nursery-*.sock")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o666)
    command = [sys.executable, "-c", ASK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, user=65534, group=65534, extra_groups=[])
    path.chmod(0o600)
    assert (done.stdout, done.stderr) == ("b''\n", "")


@pytest.mark.parametrize("packet", [b"", b"end", b"another build", b"x" * 70000], ids=len)
def test_requests_that_it_does_not_understand_are_not_served(nursery: int, packet: bytes) -> None:
    (path,) = discipline.runtime.glob("nursery-*.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as wire:
        wire.connect(str(path))
        wire.send(packet)
        assert wire.recv(64) == (place.IN_USE if packet == place.END else b"")
    with Another() as daemon:
        assert daemon.is_copy()


def test_credentials_are_in_no_process_but_those_that_need_them(nursery: int) -> None:
    secrets = [value.encode() for value in SECRETS.values()]
    with Another(environment=SECRETS) as daemon:
        assert daemon.is_copy()
        assert wrong(daemon) == []
        assert found_in_memory(nursery, secrets) == []
        for role in ("fork server", "fuse", "api"):
            for pid in daemon.pids(role):
                assert found_in_memory(pid, secrets) == [], role
        assert found_in_memory(daemon.supervisor, secrets), "the search finds what is there"


def test_arguments_that_are_wrong_are_told_as_without_it(nursery: int) -> None:
    for arguments in (["fuse", "--no-such-flag"], ["fuse", "-M", "/nowhere"], ["--version"]):
        told = [
            subprocess.run(
                [sys.executable, "-m", "nydusd", *arguments],
                env=os.environ | {"NYDUSD_NURSERY": how},
                capture_output=True,
                text=True,
                cwd=ROOT,
                check=False,
            )
            for how in ("off", "")
        ]
        assert (told[0].returncode, told[0].stdout, told[0].stderr) == (
            told[1].returncode,
            told[1].stdout,
            told[1].stderr,
        )
        assert told[0].stdout or told[0].stderr


def test_a_copy_has_the_folder_limits_mask_and_priority_of_what_was_started(nursery: int, tmp_path: Path) -> None:
    daemon = Another()
    limited = 'umask 027; ulimit -n 5000; ulimit -c 0; cd "$0"; exec nice -n 3 "$@"'
    daemon.command = ["sh", "-c", limited, str(tmp_path), *daemon.command, "--rlimit-nofile", "0"]
    with daemon:
        assert daemon.is_copy()
        wait_for_role(daemon, "fetch", 1)
        for pid in (daemon.supervisor, daemon.pids("fetch")[0]):
            assert os.readlink(f"/proc/{pid}/cwd") == str(tmp_path)
            assert "Umask:\t0027" in Path(f"/proc/{pid}/status").read_text()
            assert "5000" in Path(f"/proc/{pid}/limits").read_text().partition("Max open files")[2].split("\n")[0]
            assert os.getpriority(os.PRIO_PROCESS, pid) == 3


def started(daemon: Another) -> list[int]:
    """Processes with the daemon's command line."""
    return [pid for pid in descendants(os.getpid()) if f"-M {daemon.mountpoint}" in cmdline(pid)]


def test_a_guardian_starts_a_killed_copy_again_as_it_was_started(nursery: int, tmp_path: Path) -> None:
    config = config_for(IMAGE, tmp_path / "cache", nydusd={"guardian": 0.2})
    with Another(config=config, environment={"GIVEN": "to it"}) as daemon:
        killed = daemon.supervisor
        daemon.kill_supervisor()
        wait_until(lambda: daemon.recorded()[:1] not in ([], [killed]), "the next supervisor")
        wait_until(lambda: len(started(daemon)) == 1, "what stands for it")
        (stub,) = started(daemon)
        assert b"GIVEN=to it" in Path(f"/proc/{stub}/environ").read_bytes().split(b"\0")
        assert wrong(daemon) == []
        os.kill(stub, signal.SIGTERM)
        wait_until(lambda: mounts_under(daemon.folder) == set(), "the end of the mount")
        daemon.forget()
