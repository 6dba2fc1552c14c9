"""Failover when no process is left, hot upgrade as nydus-snapshotter drives it, states of other versions. Real daemons."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.image import build
from nydusd.ipc.messages import Json
from tests.supervisor.lives import IMAGE, ONE_CHUNK, config_for, crash, device_of, read_direct, state_file, wrong
from tests.support import oracle
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import discipline, is_running, wait_until
from tests.support.keeper import Keeper, begin, put, state_of, succeed, upgrade
from tests.support.trees import random_tree
from tests.support.verifying import Verifying

ExpectLog = Callable[..., None]
TRUTH = oracle.truth(IMAGE.name)


READER = "import sys; f = open(sys.argv[1], 'rb'); input(); print(len(f.read()))"

PATIENT = """
import sys
from nydusd.supervisor import family
family._END_PATIENCE = 600.0
from nydusd.cli.nydusd import main
sys.exit(main(sys.argv[1:]))
"""
"""A `nydusd` that gives its children longer to end than a test may take."""


@contextmanager
def left_to(keeper: Keeper, folder: Path) -> Iterator[Daemon]:
    """A daemon of which nothing is left but what is kept."""
    config = config_for(IMAGE, folder / "cache")
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, args=keeper.args) as daemon:
        keeper.save(daemon)
        daemon.kill_all()
        yield daemon


class TestFailover:
    def test_of_which_no_process_is_left_is_taken_over_by_what_was_sent(self, keeper: Keeper, tmp_path: Path) -> None:
        """The same mount goes on: who has a file open reads on."""
        config = config_for(IMAGE, tmp_path / "cache", amplify_io=0)
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, args=keeper.args) as daemon:
            keeper.save(daemon)
            before = device_of(daemon)
            for path in (ONE_CHUNK, "sizes/300K-text"):
                with subprocess.Popen(
                    [sys.executable, "-c", READER, str(daemon.mountpoint / path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                ) as reader:
                    wait_until(lambda pid=reader.pid, path=path: has_open(pid, path), "an open file", 60)  # type: ignore[misc]
                    daemon.kill_all()
                    begin(daemon)
                    assert daemon.request("GET", "/api/v1/metrics/backend")[0] == 503
                    keeper.give(daemon)
                    wait_until(lambda: state_of(daemon) == "READY", "READY", 60)
                    assert put(daemon, "start") == 204
                    assert state_of(daemon) == "RUNNING"
                    out, _ = reader.communicate(b"\n", timeout=60)
                    assert int(out) == len(TRUTH[path.encode()])
            assert device_of(daemon) == before
            assert wrong(daemon) == []

    def test_what_was_sent_of_a_version_that_is_not_known_is_refused_and_taken_over_later(
        self, keeper: Keeper, tmp_path: Path
    ) -> None:
        with left_to(keeper, tmp_path) as daemon:
            begin(daemon)
            good = keeper.state
            newer = json.loads(good) | {"version": 1000, "readable_by": 999}
            for bad in (b"{}", b"[]", b"junk", json.dumps(newer).encode()):
                keeper.state = bad
                keeper.give(daemon, 500)
                assert state_of(daemon) == "INIT"
            keeper.state = json.dumps(json.loads(good) | {"version": 1000, "added": [1]}).encode()
            keeper.give(daemon)
            wait_until(lambda: put(daemon, "start") == 204, "its start", 60)
            assert wrong(daemon) == []

    def test_one_that_is_told_to_end_while_it_waits_leaves_all_to_the_next(
        self, keeper: Keeper, tmp_path: Path
    ) -> None:
        with left_to(keeper, tmp_path) as daemon:
            for number in (signal.SIGTERM, signal.SIGKILL):
                begin(daemon)
                assert daemon._process is not None
                daemon._process.send_signal(number)
                assert daemon._process.wait(60) == (0 if number == signal.SIGTERM else -number)
            begin(daemon)
            keeper.give(daemon)
            wait_until(lambda: put(daemon, "start") == 204, "its start", 60)
            assert wrong(daemon) == []


def has_open(pid: int, name: str) -> bool:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{fd}").endswith(name):
                return True
    return False


class TestUpgrade:
    def test_by_the_protocol_costs_readers_nothing(self, keeper: Keeper, tmp_path: Path) -> None:
        """As the snapshotter does it: the next one takes over, the old one is told to exit, the next one to start."""
        (tmp_path / "tree").mkdir()
        tree = random_tree(tmp_path / "tree", 4, 1 << 20)
        built = build(tree, tmp_path / "image", 1 << 16)
        with Daemon(built.bootstrap, built.blob.parent, args=keeper.args) as daemon:
            keeper.save(daemon)
            with Verifying(daemon.mountpoint, tree, tmp_path, 2) as readers:
                for _ in range(2):
                    readers.go_on(0)
                    upgrade(daemon, keeper)
                    assert state_of(daemon) == "RUNNING"
                readers.go_on(100)
            assert list(discipline.runtime.glob("*.next*")) == []

    def test_does_not_wait_for_workers_that_are_stopped(self, keeper: Keeper, tmp_path: Path) -> None:
        """Whom it would kill later anyway: readers wait for the next one."""
        config = config_for(IMAGE, tmp_path / "cache")
        daemon = Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, args=keeper.args)
        daemon.command = [sys.executable, "-c", PATIENT, *daemon.command[3:]]
        with daemon:
            keeper.save(daemon)
            workers = [*daemon.pids("fetch"), *daemon.pids("decompress")]

            def stop_workers() -> None:
                for pid in workers:
                    os.kill(pid, signal.SIGSTOP)

            upgrade(daemon, keeper, stop_workers)
            assert not any(map(is_running, workers))
            assert wrong(daemon) == []

    def test_one_that_is_killed_while_it_waits_costs_nothing_and_the_next_may_come(
        self, keeper: Keeper, tmp_path: Path
    ) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, args=keeper.args) as daemon:
            keeper.save(daemon)
            old, sock = daemon._process, daemon.apisock
            for taken in (False, True):
                daemon.apisock = daemon.folder / "api1.sock"
                begin(daemon, "--upgrade", "--apisock", str(daemon.apisock))
                if taken:
                    keeper.give(daemon)
                assert daemon._process is not None
                daemon._process.kill()
                daemon._process.wait()
                daemon.apisock.unlink()
                daemon._process, daemon.apisock = old, sock
                assert state_of(daemon) == "RUNNING"
            upgrade(daemon, keeper)
            assert wrong(daemon) == []

    def test_one_that_is_told_to_exit_for_one_that_was_killed_just_then_leaves_all_to_the_next(
        self, keeper: Keeper, tmp_path: Path
    ) -> None:
        """Whoever tells it does not know yet that nobody waits any more."""
        config = config_for(IMAGE, tmp_path / "cache")
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, args=keeper.args) as daemon:
            old, before = daemon._process, device_of(daemon)
            assert old is not None
            keeper.save(daemon)
            read_direct(daemon.mountpoint / ONE_CHUNK)
            sock, daemon.apisock = daemon.apisock, daemon.folder / "api1.sock"
            begin(daemon, "--upgrade", "--apisock", str(daemon.apisock))
            assert daemon._process is not None
            daemon._process.kill()
            daemon._process.wait()
            daemon.apisock.unlink()
            daemon.apisock = sock
            assert put(daemon, "exit") == 204
            assert old.wait(60) == 0
            assert len(read_direct(daemon.mountpoint / ONE_CHUNK)) == len(TRUTH[ONE_CHUNK.encode()])
            succeed(daemon, keeper)
            assert device_of(daemon) == before
            assert wrong(daemon) == []

    def test_front_ends_of_another_build_are_succeeded_by_new_ones(self, keeper: Keeper, tmp_path: Path) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, args=keeper.args) as daemon:
            wait_for_role(daemon, "fuse", 2)
            before = daemon.pids("fuse")
            crash(daemon)
            edit_state(daemon, made_by_another_build)
            begin(daemon)
            wait_until(lambda: not set(before) & set(daemon.pids("fuse")), "the end of the old front ends", 60)
            wait_for_role(daemon, "fuse", 2)
            assert wrong(daemon) == []


def made_by_another_build(state: Json) -> None:
    for row in state["holders"]:
        row["commit"] = "older"


def unreadable(state: Json) -> None:
    """Of a release that we cannot read, and from before its second fork server was noted."""
    state.update(version=1000, readable_by=999)
    second = [row["pid"] for row in state["holders"] if row["role"] == "keeper"][1]
    state["holders"] = [row for row in state["holders"] if row["pid"] != second]
    state["processes"] = [row for row in state["processes"] if row[0] != second]


def of_another_form(state: Json) -> None:
    """The same; and it does not say either by what the processes are known that hold the mount."""
    unreadable(state)
    state.update(lanes="elsewhere", holders=[])


def edit_state(daemon: Daemon, change: Callable[[Json], object]) -> None:
    """Change the state that a killed daemon has left, as another release would have written it."""
    from nydusd.supervisor.checked import read_checked, write_checked

    (path,) = (path for path in discipline.runtime.glob("*/state.json") if str(daemon.mountpoint) in path.read_text())
    state = read_checked(path)
    change(state)
    write_checked(path, state)


NEWER = """
import sys
from nydusd.supervisor import handover
handover.VERSION, handover.READABLE_BY = 1000, int(sys.argv[1])
from nydusd.cli.nydusd import main
sys.exit(main(sys.argv[2:]))
"""
"""A release of a later version of the state."""


class TestVersions:
    def test_an_older_and_a_newer_release_take_over_from_each_other(self, tmp_path: Path) -> None:
        from nydusd.supervisor.handover import VERSION

        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path / "cache") as daemon:
            ours = daemon.command
            newer = [sys.executable, "-c", NEWER, str(VERSION), *ours[3:]]
            for command in (newer, ours):
                frontends = crash(daemon)
                edit_state(daemon, lambda state: state.update(added={"by": "another release"}))
                daemon.command = command
                daemon.start()
                assert set(frontends) <= set(daemon.pids("fuse"))
                assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
            daemon.command = ours
            assert wrong(daemon) == []

    def test_one_that_says_that_we_cannot_read_it_is_mounted_anew(self, tmp_path: Path, expect_log: ExpectLog) -> None:
        expect_log("its state is of version 1000, this release knows 2 to 2; mounting anew")
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path / "cache") as daemon:
            # Of what that version says only the pids are known: none that holds the mount may come beside them.
            wait_until(lambda: state_file(daemon).read_text().count('"keeper"') == 2, "the copy of the fork server", 60)
            frontends = crash(daemon)
            edit_state(daemon, lambda state: state.update(version=1000, readable_by=999))
            daemon.start()
            assert not any(map(is_running, frontends))
            assert wrong(daemon) == []

    def test_whom_one_that_we_cannot_read_started_in_its_last_moment_holds_no_mount_on(
        self, tmp_path: Path, expect_log: ExpectLog
    ) -> None:
        expect_log("holds the mount of a daemon that was killed")
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path / "cache") as daemon:
            for change in (unreadable, of_another_form):
                wait_until(lambda: state_file(daemon).read_text().count('"keeper"') == 2, "two fork servers", 60)
                keepers = daemon.pids("fork server")
                crash(daemon)
                edit_state(daemon, change)
                daemon.start()
                assert not any(map(is_running, keepers))
                assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
