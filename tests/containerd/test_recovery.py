"""What the snapshotter does when a daemon of ours dies, by its recover policy, and when it upgrades one: under readers."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.containerd.conftest import Shop
from tests.containerd.images import SMALL, cache_folder
from tests.containerd.node import SYSTEM_SOCK, Node, http_get, http_put
from tests.support.discipline import cmdline, descendants, is_running, wait_until
from tests.support.verifying import Verifying

PROGRAMS = "usr/bin"
READ_BYTES = 12 << 20
READERS = int(os.environ.get("CONTAINERD_READERS", "1"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the programs in the images, as they are in the tree that these were made of."""
    folder, left = tmp_path_factory.mktemp("programs"), READ_BYTES
    for path in sorted((cache_folder() / "debian-python3" / PROGRAMS).iterdir()):
        if path.is_file() and not path.is_symlink() and 0 < path.stat().st_size <= left:
            (folder / path.name).symlink_to(path)
            left -= path.stat().st_size
    return folder


def verifying(node: Node, programs: Path, folder: Path) -> Verifying:
    """Readers of what the daemon of the only image shows, most of it not cached yet: they compare every byte.

    One that is nice in `make test`: the snapshotter gives up a daemon that needs three seconds to start, however busy we are.
    """
    (mount,) = [Path(point) for point, kind, _ in node.mounts() if kind == "fuse"]
    if node.mode == "shared":
        (mount,) = mount.iterdir()
    return Verifying(mount / PROGRAMS, programs, folder, READERS, inside=("nice", "-n", "19"))


@pytest.mark.parametrize("mode", ["dedicated", "shared"])
def test_a_killed_daemon_is_started_again_and_containers_run(shop: Shop, mode: str) -> None:
    reference = shop.references[SMALL]
    with Node(mode, recover_policy="restart") as node:
        assert node.run_python(reference, "print(42)") == "42\n"
        (pid,) = node.daemon_pids()
        family = [pid, *descendants(pid)]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: node.daemon_pids() not in ([], [pid]), "the next daemon", 30.0)
        # The next daemon has its mounts back a moment after it is there: what runs earlier finds no image.
        wait_until(lambda: runs(node, reference), "a container to run again", 60.0)
        node.watch_daemon_logs()
        wait_until(lambda: not any(is_running(pid) for pid in family), "the end of all of the first daemon's processes")
        node.nerdctl("rmi", reference)
        if mode == "dedicated":
            wait_until(lambda: node.daemons() == [], "the end of the daemon")


def _states(node: Node) -> list[object]:
    """What the daemons say of themselves."""
    answers = []
    for path in (node.folder / "sn" / "socket").glob("*/api*.sock"):
        with contextlib.suppress(OSError):
            answers.append(http_get(str(path), "/api/v1/daemon"))
    return [answer["state"] for answer in answers if isinstance(answer, dict)]


def runs(node: Node, reference: str) -> bool:
    """Whether a container runs; False while its image is not mounted."""
    try:
        return node.run_python(reference, "import json; print(42)") == "42\n"
    except AssertionError as error:
        if "failed to mount" not in str(error):
            raise
        return False


@pytest.mark.parametrize("mode", ["dedicated", "shared"])
def test_a_killed_daemon_is_succeeded_under_a_running_container_and_readers(
    shop: Shop, programs: Path, tmp_path: Path, mode: str
) -> None:
    """The policy `failover`: the snapshotter keeps the session and starts the same command, which takes over."""
    reference = shop.references[SMALL]
    with Node(mode, recover_policy="failover") as node:
        container = node.start_container(reference)
        (pid,) = node.daemon_pids()
        # The API process alone: the snapshotter's probe goes on, and it does not wait for the end of a daemon that lives.
        (api,) = (child for child in descendants(pid) if cmdline(child).startswith("nydusd: api"))
        os.kill(api, signal.SIGKILL)
        wait_until(lambda: not is_running(api) and _states(node) == ["RUNNING"], "the next API process", 30.0)
        assert node.run_python(reference, "print(41)") == "41\n"
        assert not [line for line in node.complaints() if "died" in line]
        with verifying(node, programs, tmp_path) as readers:
            readers.go_on(0)
            os.kill(pid, signal.SIGKILL)
            assert node.exec_python(container, "import json; print(42)") == "42\n"
            wait_until(lambda: node.daemon_pids() not in ([], [pid]), "the next daemon", 30.0)
            wait_until(lambda: _states(node) == ["RUNNING"], "its start", 30.0)
            readers.go_on()
        print(f"{mode}: killed, the longest read took {readers.longest():.2f} s")
        assert node.exec_python(container, "import decimal, email; print(43)") == "43\n"
        node.watch_daemon_logs()
        node.nerdctl("rm", "-f", container)
        node.nerdctl("rmi", reference)


@pytest.mark.parametrize("mode", ["dedicated", "shared"])
def test_a_daemon_is_upgraded_under_a_running_container_and_readers(
    shop: Shop, programs: Path, tmp_path: Path, mode: str
) -> None:
    """The snapshotter's own hot upgrade, as an operator has it begin over its system socket; then a crash of the new one."""
    reference = shop.references[SMALL]
    node = Node(mode, recover_policy="failover")
    present, newer = node.folder / "nydusd", node.folder / "nydusd.newer"
    for link in (present, newer):  # it is renamed to the present one
        link.symlink_to(node.nydusd)
    node.nydusd = str(present)
    with node:
        container = node.start_container(reference)
        (before,) = api_pids(node)
        with verifying(node, programs, tmp_path) as readers:
            readers.go_on(0)
            http_put(str(node.folder / SYSTEM_SOCK), "/api/v1/daemons/upgrade", {"nydusd_path": str(newer)})
            wait_until(lambda: _states(node) == ["RUNNING"], "its start", 60.0)
            readers.go_on()
        print(f"{mode}: upgraded, the longest read took {readers.longest():.2f} s")
        (after,) = api_pids(node)
        assert before != after
        assert not newer.exists()
        assert node.exec_python(container, "import json, decimal, email; print(42)") == "42\n"
        os.kill(after, signal.SIGKILL)
        wait_until(
            lambda: api_pids(node) not in ([], [after]) and _states(node) == ["RUNNING"], "the next daemon", 60.0
        )
        assert node.exec_python(container, "import sqlite3; print(43)") == "43\n"
        node.watch_daemon_logs()
        node.nerdctl("rm", "-f", container)
        node.nerdctl("rmi", reference)
        # It has lost track of a daemon that it has upgraded, and leaves it at the end.
        node.stop_snapshotter()
        (last,) = api_pids(node)
        os.kill(last, signal.SIGTERM)
        wait_until(lambda: not is_running(last), "the end of the daemon", 60.0)


def api_pids(node: Node) -> list[int]:
    """The supervisors of the daemons that answer on an API socket."""
    answers = []
    for path in (node.folder / "sn" / "socket").glob("*/api*.sock"):
        with contextlib.suppress(OSError, AssertionError):
            answers.append(http_get(str(path), "/api/v1/nydusd/workers"))
    return [int(answer["supervisor"]) for answer in answers if isinstance(answer, dict)]
