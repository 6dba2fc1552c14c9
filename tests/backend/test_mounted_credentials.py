"""Credentials of a mount: expired ones, new ones, and where none may ever be seen."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.supervisor.lives import crash
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import descendants, wait_until
from tests.support.fault_table import CREDENTIALS, METADATA, rows_of
from tests.support.faulty_server import Reply, faulty
from tests.support.memory import found_in_memory
from tests.support.mounted import AUTH, PASSWORD, TOKEN, Hub, Mounted, Tree

NAMES = [f"{number:02}" for number in range(6)]
HEADER_SECRET = "cookie-of-the-operator"
FAILED = "ERROR .*(blob|a read failed)"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("image"))


@pytest.fixture
def hub(tree: Tree) -> Iterator[Hub]:
    with faulty() as server:
        yield Hub(tree, server)


def docker_login(mounted: Mounted, host: str, auth: str) -> None:
    """What `docker login` leaves: the file is replaced."""
    part = mounted.docker / "part"
    part.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    part.rename(mounted.docker / "config.json")


def test_expired_credentials_end_neither_the_mount_nor_the_daemon(
    tree: Tree, hub: Hub, expect_log: Callable[..., None]
) -> None:
    """The daemon starts, says so, and serves as soon as somebody has logged in again."""
    assert rows_of(CREDENTIALS) == ["expired credentials at start"]
    hub.users = set()
    expect_log(FAILED)
    with Mounted(tree, {"host": hub.server.host}) as mounted:
        assert sorted(os.listdir(mounted.daemon.mountpoint)) == NAMES, "metadata is served"
        assert mounted.read(NAMES[0]) == errno.EIO
        refused = rf"blob {tree.blob_id}: {re.escape(hub.server.host)}: no token: status 401, credentials are missing"
        assert re.search(refused, mounted.log())
        hub.users = {AUTH}
        docker_login(mounted, hub.server.host, AUTH)
        wait_until(lambda: mounted.is_right(NAMES[0]), "the new credentials to be used", 30)
        assert all(mounted.is_right(name) for name in NAMES)
        assert hub.server.count("/token") < 20, "the token server was not hammered meanwhile"


def test_new_credentials_are_taken_from_dockers_file_while_the_daemon_runs(tree: Tree, hub: Hub) -> None:
    with Mounted(tree, {"host": hub.server.host}) as mounted:
        assert mounted.is_right(NAMES[0])
        renewed = "dXNlcjphbm90aGVyLXBhc3N3b3Jk"  # user:another-password
        hub.users = {renewed}
        hub.good.clear()
        docker_login(mounted, hub.server.host, renewed)
        assert all(mounted.is_right(name) for name in NAMES[1:])
        assert not re.search("WARN .*blob", mounted.log()) and "another-password" not in mounted.log()


def test_new_credentials_are_given_by_the_api(tree: Tree, hub: Hub, expect_log: Callable[..., None]) -> None:
    """They are used at once, by every worker, also for what was refused a moment ago; the old connections are closed."""
    expect_log(FAILED)
    hub.users = set()
    memory = {"failure_memory": 3600}
    with Mounted(tree, {"host": hub.server.host, **memory}, tuning={"fetch_workers": 2}) as mounted:
        assert mounted.read(NAMES[0]) == errno.EIO
        renewed = "dXNlcjphbm90aGVyLXBhc3N3b3Jk"  # user:another-password
        hub.users = {renewed}
        body = json.dumps({"registry_auth": renewed}).encode()
        assert mounted.daemon.request("PUT", "/api/v1/config?id=/", body)[0] == 204
        assert all(mounted.is_right(name) for name in NAMES)
        answer = mounted.daemon.get("/api/v1/nydusd/workers")
        assert isinstance(answer, dict)
        assert all(row.get("connections", {}).get(hub.server.host, 0) <= 1 for row in answer["processes"])
        assert renewed not in mounted.log() and "another-password" not in mounted.log()
        assert hub.server.count("/token") < 20


def test_image_whose_credentials_become_those_of_the_command_line_is_read_on(
    tree: Tree, hub: Hub, tmp_path: Path
) -> None:
    """One blob is open under both when the supervisor is killed; the front ends know it by two names."""
    newer = "dXNlcjphbm90aGVyLXBhc3N3b3Jk"  # user:another-password
    hub.users = {AUTH, newer}
    with Mounted(tree, {"host": hub.server.host}, args=("--virtual-mountpoint", "/one")) as mounted:
        daemon = mounted.daemon
        file = daemon.folder / "config.json"
        config = json.loads(file.read_text())
        config["backend"]["registry"]["auth"] = newer
        text = json.dumps(config | {"id": "/two"})
        assert daemon.mount("/two", tree.bootstrap, tmp_path, config=text) == (204, "")
        for start in (0, 2):
            for place, name in zip(("one", "two"), NAMES[start:], strict=False):
                assert (daemon.mountpoint / place / name).read_bytes() == tree.contents[name]
            if not start:
                crash(daemon)
                file.write_text(json.dumps(config))
                daemon.start()


def test_credentials_that_are_set_for_a_mount_point_hold_until_a_mount_brings_others(
    tree: Tree, hub: Hub, tmp_path: Path
) -> None:
    """They may be set before anything is mounted there; what a mount or remount brings is newer, also for a successor."""
    newer = "dXNlcjphbm90aGVyLXBhc3N3b3Jk"  # user:another-password
    with Mounted(tree, {"host": hub.server.host}, args=("--virtual-mountpoint", "/one")) as mounted:
        daemon = mounted.daemon

        def config(auth: str | None, folder: str) -> str:
            text = json.loads((daemon.folder / "config.json").read_text())
            text["backend"]["registry"]["auth"] = auth
            text["cache"]["filecache"]["work_dir"] = str(tmp_path / folder)
            return json.dumps(text)

        def is_right(name: str) -> bool:
            return (daemon.mountpoint / "two" / name).read_bytes() == tree.contents[name]

        set_before = json.dumps({"registry_auth": AUTH}).encode()
        assert daemon.request("PUT", "/api/v1/config?id=/two/", set_before)[0] == 204
        assert daemon.mount("/two", tree.bootstrap, tmp_path, config=config(None, "a")) == (204, "")
        assert is_right(NAMES[0])
        assert daemon.mount("/two/", tree.bootstrap, tmp_path, config=config(None, "a")) == (204, ""), "once more"
        start_again(daemon)
        assert is_right(NAMES[1]), "what was set is known"
        for number, method in enumerate(("POST", "PUT")):
            hub.users, auth = ({newer}, newer) if method == "POST" else ({AUTH}, AUTH)
            hub.good.clear()
            if method == "POST":
                assert daemon.umount("/two") == (204, "")
            assert daemon.mount("/two", tree.bootstrap, tmp_path, method, config=config(auth, method)) == (204, "")
            assert is_right(NAMES[0])
            start_again(daemon)
            hub.good.clear()
            assert is_right(NAMES[number + 1]), f"{method}: what it brought is known"


def start_again(daemon: Daemon) -> None:
    crash(daemon)
    daemon.start()


def test_metadata_that_could_not_be_had_is_asked_for_again(
    tree: Tree, hub: Hub, expect_log: Callable[..., None]
) -> None:
    assert rows_of(METADATA) == ["blob metadata not to be had at start"]
    expect_log(FAILED)
    hub.always = Reply(404)
    with Mounted(tree, {"host": hub.server.host}) as mounted:
        assert mounted.read(NAMES[0]) == errno.EIO
        assert re.search(rf"blob {tree.blob_id}: {re.escape(hub.server.host)}: status 404", mounted.log())
        hub.always = None
        wait_until(lambda: mounted.is_right(NAMES[0]), "the metadata to be asked for again", 30)
        assert all(mounted.is_right(name) for name in NAMES)


def test_credentials_are_nowhere_but_where_they_are_used(tree: Tree, hub: Hub) -> None:
    """Not in files, the log, the API, titles and environments; and not in the memory of front ends and the API process."""
    environment = {
        "NYDUS_HEADER_Cookie": HEADER_SECRET,
        "IMAGE_PULL_AUTH": AUTH,
    }
    with Mounted(tree, {"host": hub.server.host, "auth": None}, environment=environment) as mounted:
        daemon = mounted.daemon
        assert all(mounted.is_right(name) for name in NAMES)
        assert {request.headers["cookie"] for request in hub.server.requests if request.path == hub.path} == {
            HEADER_SECRET
        }
        secrets = [text.encode() for text in (PASSWORD, AUTH, TOKEN + "1", HEADER_SECRET)]
        shown = [
            daemon.ctl("info"),
            daemon.ctl("--raw", "info"),
            daemon.ctl("metrics", "backend"),
            daemon.ctl("cache"),
            json.dumps(daemon.get("/api/v1/daemon")),
            json.dumps(daemon.get("/api/v1/daemon/backend?mountpoint=/")),
            mounted.log(),
        ]
        for text in shown:
            assert not [secret for secret in secrets if secret in text.encode()]
        runtime = Path(os.environ["NYDUSD_RUNTIME_DIR"])
        for path in [
            *daemon.folder.rglob("*"),
            *daemon.cache.rglob("*"),
            *runtime.rglob("*"),
            *Path("/dev/shm").iterdir(),
        ]:
            if path.is_file() and daemon.mountpoint not in path.parents and path.name != "config.json":
                assert not [secret for secret in secrets if secret in path.read_bytes()], path
        for pid in descendants(daemon.pid):
            for file in ("cmdline", "environ"):
                known = [HEADER_SECRET.encode()] if file == "environ" and is_worker(pid) else []
                content = Path(f"/proc/{pid}/{file}").read_bytes()
                assert not [secret for secret in secrets if secret in content and secret not in known], (pid, file)
        for role in ("fuse", "api"):
            for pid in daemon.pids(role):
                assert found_in_memory(pid, secrets) == [], f"a core file of {role} would hold them"
        assert found_in_memory(daemon.pids("fetch")[0], secrets), "the search finds what is there"


def is_worker(pid: int) -> bool:
    return b"nydusd: fetch" in (title := Path(f"/proc/{pid}/cmdline").read_bytes()) or b"nydusd: decompress" in title


def test_a_worker_that_is_started_again_has_the_credentials(tree: Tree, hub: Hub) -> None:
    with Mounted(tree, {"host": hub.server.host}) as mounted:
        assert mounted.is_right(NAMES[0])
        for role in ("fetch", "decompress"):
            (pid,) = mounted.daemon.pids(role)
            mounted.daemon.kill(pid)
            wait_for_role(mounted.daemon, role, 1, without=pid)
        assert all(mounted.is_right(name) for name in NAMES[1:])
