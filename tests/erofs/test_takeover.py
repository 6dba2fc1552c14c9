"""`nydusd erofs` after a SIGKILL: what is mounted is neither hidden nor lost, whatever is started, or killed, next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nydusd.frontends.erofs import fanotify, left, mount_api, session, table
from nydusd.storage.cache.manager import segments_in
from nydusd.storage.state.names import names
from nydusd.supervisor.kernel_images import file_at
from nydusd.supervisor.selection import choose, choose_without_image
from nydusd.waits import DEAF
from tests.erofs.test_images import differences
from tests.erofs.test_kills import NAMES, Held, own
from tests.erofs.test_mounts import OTHER, SMALL, Many
from tests.killing.plan import Plan
from tests.supervisor.lives import state_file
from tests.support.daemon import Daemon, image_config, wait_for_role
from tests.support.discipline import is_running, wait_until
from tests.support.faulty_server import Reply, Request
from tests.support.mounted import CHUNK, REPO, Hub, Tree

Expect = Callable[..., None]


def put(many: Many, tree: Tree, place: str = "/a", method: str = "POST") -> tuple[int, str]:
    """Mount the tree from a local folder; nothing is fetched but what is read."""
    blobs = tree.bootstrap.parent / "blobs"
    config = json.dumps(image_config(blobs, many.cache) | {"id": place, "amplify_io": 0})
    return many.mount(place, tree.bootstrap, blobs, method, config=config)


def read_again(fd: int) -> bytes:
    """From the cache file, not from the page cache."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, CHUNK, 0)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


@pytest.fixture
def many() -> Iterator[Many]:
    with Many() as daemon:
        yield daemon


@pytest.mark.parametrize("way", ["fuse", "fuse with an image"])
def test_another_way_destroys_nothing_of_what_a_killed_daemon_has_mounted(way: str) -> None:
    """Nothing is mounted at the mount point itself, and the refusal comes before the records are cleared away."""
    with Many() as many:
        assert many.put("/a", SMALL) == (204, "") and many.put("/b/c", OTHER) == (204, "")
        devices = {place: os.stat(many.at(place)).st_dev for place in ("/a", "/b/c")}
        erofs = many.command
        many.kill_supervisor()
        at = erofs.index("erofs")
        image = ["-B", str(SMALL.bootstrap), "-C", str(many.folder / "config.json")]
        many.command = [*erofs[:at], "fuse", *(image if way != "fuse" else []), *erofs[at + 1 : -2]]
        with pytest.raises(AssertionError, match="has left its mount here"):
            many.start()
        many.command = erofs
        many.start()
        assert {place: os.stat(many.at(place)).st_dev for place in devices} == devices
        assert differences(SMALL, many.at("/a")) == [] and differences(OTHER, many.at("/b/c")) == []


def test_what_is_mounted_is_taken_over_where_another_mount_could_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    no_folder = str(tmp_path / "file" / "cache")
    assert choose("auto", str(SMALL.bootstrap), no_folder)[0] == "blobfs"
    for asked in ("auto", "fanotify"):
        assert choose(asked, str(SMALL.bootstrap), no_folder, left=True)[0] == "fanotify"
        assert choose_without_image(asked, left=True)[0] == "fanotify"


def test_a_takeover_that_is_killed_leaves_nobody_who_takes_events_and_cannot_have_them_answered(
    tree: Tree, hub: Hub, tmp_path: Path
) -> None:
    """The second supervisor has started its guard, the first one's front end lives: the third one ends both."""
    plan = Plan(tmp_path / "plan")
    held = Held(tree, hub, read_deadline=20.0)
    held.daemon._environment |= plan.environment
    with held.mounted:
        held.right(held.read(NAMES[0]), NAMES[0])
        held.daemon.kill_supervisor()
        plan.begin("start: before a child", 2)
        held.daemon.launch()
        wait_until(held.daemon.has_ended, "the end of the second supervisor", 60)
        assert plan.end()[0]
        held.daemon.forget()
        held.daemon.start()
        wait_until(lambda: len(own("erofs")) == 1 and len(own("guard")) == 1, "the end of the others", 60)
        held.right(held.read(NAMES[1]), NAMES[1])


def test_a_takeover_ends_nobody_who_holds_the_group_before_its_own_guard_and_front_end_are_there(
    tree: Tree, hub: Hub, tmp_path: Path
) -> None:
    plan = Plan(tmp_path / "plan")
    held = Held(tree, hub)
    daemon = held.daemon
    daemon._environment |= plan.environment
    with held.mounted:
        reader = held.waiting_reader(NAMES[0])
        daemon.kill_supervisor()
        plan.begin("takeover: before the holders of the former end", 1, signal.SIGSTOP)
        daemon.launch()
        wait_until(lambda: is_stopped(daemon.pid), "the second supervisor to be there", 60)
        guard = daemon.pids("guard")[0]
        daemon.kill(guard)
        wait_until(lambda: not is_running(guard), "its guard's end", 60)
        plan.begin("takeover: holders of the former ended", 1, signal.SIGSTOP)
        os.kill(daemon.pid, signal.SIGCONT)
        wait_until(lambda: plan.killed() and is_stopped(daemon.pid), "the end of those before it", 60)
        for pid in (*daemon.pids("guard"), daemon.pid):  # any two may go: its front end is there
            os.kill(pid, signal.SIGKILL)
        wait_until(daemon.has_ended, "its end", 60)
        assert plan.end()[0]
        daemon.forget()
        assert reader.poll() is None
        held.gate.set()
        daemon.start()
        held.right(reader, NAMES[0])


def test_a_guard_is_ended_with_what_it_has_started_at_that_moment() -> None:
    """That would read the group beside the next front end, and is not among those that were found."""
    with subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=-1, start_new_session=True) as guard:
        assert guard.stdout is not None
        copy = int(guard.stdout.readline())
        noted = left.Holder(guard.pid, 0, [])
        left.end(left.Left([os.pidfd_open(guard.pid)], session.Fds(-1, -1, -1), 1, [noted]), DEAF)
        wait_until(lambda: not is_running(copy), "its end", 60)


@pytest.mark.parametrize("again", [False, True])
def test_the_next_daemon_takes_over_from_the_copy_of_a_guard_that_was_killed(
    tree: Tree, hub: Hub, tmp_path: Path, expect_log: Expect, again: bool
) -> None:
    """Also one that comes after a takeover which was killed in the middle."""
    expect_log("a read failed: .*nobody has fetched it in time")
    plan = Plan(tmp_path / "plan")
    held = Held(tree, hub, read_deadline=1.0)
    daemon = held.daemon
    daemon._environment |= plan.environment
    with held.mounted:
        held.right(held.read(NAMES[0]), NAMES[0])
        device = os.stat(daemon.mountpoint).st_dev
        kept = os.open(daemon.mountpoint / NAMES[1], os.O_RDONLY)
        guard, front_end = held.one("guard"), held.one("erofs")
        daemon.kill_supervisor()
        os.kill(front_end, signal.SIGKILL)
        with pytest.raises(OSError):
            os.pread(kept, CHUNK, 0)  # until the guard has one that refuses it
        (copy,) = own("erofs")
        os.kill(guard, signal.SIGKILL)
        wait_until(lambda: not is_running(guard), "the end of the guard", 60)
        if again:
            plan.begin("takeover: before the holders of the former end", 1)
            daemon.launch()
            wait_until(daemon.has_ended, "the end of the second supervisor", 60)
            assert plan.end()[0]
            daemon.forget()
            assert is_running(copy)
        daemon.start()
        wait_until(lambda: len(own("erofs")) == 1 and len(own("guard")) == 1, "the end of the others", 60)
        assert not is_running(copy) and os.stat(daemon.mountpoint).st_dev == device
        assert os.pread(kept, CHUNK, 0) == tree.contents[NAMES[1]]
        os.close(kept)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")


def test_what_is_cached_of_an_unmounted_image_is_read_on_after_a_takeover_whatever_room_is_made(tree: Tree) -> None:
    with Many() as many:
        assert put(many, tree) == (204, "")
        fd = os.open(many.at("/a") / NAMES[0], os.O_RDONLY)
        assert os.pread(fd, CHUNK, 0) == tree.contents[NAMES[0]]
        assert many.umount("/a") == (204, "")
        many.kill_supervisor()
        many.start()
        assert many.put("/b", SMALL) == (204, "")  # so there is an image whose cache folder is looked at
        assert "0 unused blobs removed" in many.ctl("cache", "gc")
        assert read_again(fd) == tree.contents[NAMES[0]]
        assert len(segments(many)) == 2, "what says that it is there, and that of the other image"
        os.close(fd)
        wait_until(lambda: len(segments(many)) == 1, "the end of what nobody uses any more", 60)


def segments(many: Daemon) -> list[str]:
    """Those of blobs, of this daemon."""
    prefix = f"/nydusd.{state_file(many).parent.name}."
    return segments_in(names(prefix[1:]), prefix)


def test_a_remount_that_was_killed_leaves_the_mount_before_it_whoever_mounts_meanwhile(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "plan")
    daemon = Many()
    daemon._environment |= plan.environment
    with daemon as many:
        assert many.put("/a", SMALL) == (204, "")
        device = os.stat(many.at("/a")).st_dev
        (data,) = many.cache.glob("*.blob.data")
        plan.begin("erofs: written down", 1)
        with pytest.raises(OSError):
            many.put("/a", OTHER, "PUT")
        wait_until(many.has_ended, "the end of the supervisor", 60)
        assert plan.end()[0]
        many.forget()
        others = mount_api.make_erofs(str(SMALL.bootstrap), [str(data)], "another's")
        try:
            many.start()
            assert os.stat(many.at("/a")).st_dev == device
            assert differences(SMALL, many.at("/a")) == []
        finally:
            os.close(others)


def test_a_file_system_is_told_from_another_that_is_made_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    with open(data, "wb") as file:
        file.truncate(64 << 20)
    others: list[int] = []
    really = mount_api.make_erofs

    def with_another(bootstrap: str, devices: Iterator[str], what: str) -> int:
        mount = really(bootstrap, list(devices), what)
        if len(others) < 2:
            others.append(really(bootstrap, [str(data)], what))
        return mount

    monkeypatch.setattr(mount_api, "make_erofs", with_another)
    group = fanotify.open_group()
    mount, found = session.make(group, str(SMALL.bootstrap), [session.Range(str(data), file_at(str(data)))], "test")
    os.close(group)
    for fd in others:
        os.close(fd)
    (name,) = found
    wait_until(lambda: name in table.instances(), "it alone to be there")
    os.close(mount)
    wait_until(lambda: name not in table.instances(), "its end")


def test_blobs_are_called_differently_by_supervisors_whose_records_were_lost(many: Many, tree: Tree) -> None:
    """What one has mounted is filled on when the next one has mounted something else."""
    for place, what in (("/a", SMALL), ("/b", OTHER)):
        assert many.put(place, what) == (204, "")
        many.kill_supervisor()
        state_file(many).unlink()
        many.start()
    assert put(many, tree, "/c") == (204, "")
    assert differences(OTHER, many.at("/b")) == []
    for place in ("/b", "/c", "/a"):
        assert many.umount(place) == (204, "")
    assert many.mounted() == []


# --- cache files ------------------------------------------------------------------------------------------------


def test_an_image_is_not_mounted_over_a_cache_file_that_its_blob_does_not_have(tree: Tree, expect_log: Expect) -> None:
    expect_log("blob .*: reads of what is not cached fail until it can be used")
    with Many() as many:
        many.cache.mkdir()
        data = many.cache / f"{tree.blob_id}.blob.data"
        data.touch()
        subprocess.run(["mount", "--bind", "-o", "ro", str(data), str(data)], check=True)
        try:
            status, why = put(many, tree)
        finally:
            subprocess.run(["umount", str(data)], check=True)
        assert status == 500 and "cache folder" in why, why
        assert many.mounted() == []
        assert put(many, tree) == (204, "")
        assert (many.at("/a") / NAMES[0]).read_bytes() == tree.contents[NAMES[0]]


def test_a_remount_brings_back_what_was_lost_with_its_cache_file(tree: Tree, expect_log: Expect) -> None:
    with Many() as many:
        assert put(many, tree) == (204, "")
        (data,) = many.cache.glob("*.blob.data")
        data.unlink()
        assert put(many, tree, method="PUT") == (204, "")
        for name in NAMES:
            assert (many.at("/a") / name).read_bytes() == tree.contents[name]


def test_a_remount_that_the_kernel_must_be_told_of_does_not_take_what_is_mounted_inside(tmp_path: Path) -> None:
    with Many() as many:
        assert many.put("/a", SMALL) == (204, "")
        folder = next(p.name for p in many.at("/a").iterdir() if p.is_dir() and not p.is_symlink())
        assert many.put(f"/a/{folder}", OTHER) == (204, "")
        assert many.put("/a", SMALL, "PUT") == (204, ""), "the kernel need not be told"
        many.cache = tmp_path / "elsewhere"
        status, why = many.put("/a", SMALL, "PUT")
        assert status == 500 and f"/a/{folder} is mounted in it" in why, why
        assert differences(OTHER, many.at(f"/a/{folder}")) == []
        assert many.umount(f"/a/{folder}") == (204, "")
        assert many.put("/a", SMALL, "PUT") == (204, "")
        assert differences(SMALL, many.at("/a")) == []


# --- a run-time folder that takes nothing -----------------------------------------------------------------------


def obstacle(many: Many) -> Path:
    """A folder that is in the way of the table of images: as long as it is there that cannot be written."""
    return state_file(many).parent / "mounts" / "table.tmp"


def test_a_remount_that_cannot_be_written_down_can_be_repeated_and_unmounted(many: Many) -> None:
    for again in (True, False):
        assert many.put("/a", SMALL) == (204, "")
        obstacle(many).mkdir()
        status, why = many.put("/a", OTHER, "PUT")
        assert status == 500 and "table.json" in why, why
        obstacle(many).rmdir()
        if again:
            assert many.put("/a", OTHER, "PUT") == (204, "")
            assert differences(OTHER, many.at("/a")) == []
        assert many.umount("/a") == (204, "")
        assert many.mounted() == []


def test_a_mount_that_fails_and_cannot_be_taken_out_of_the_table_ends_nothing(
    many: Many, tree: Tree, hub: Hub, expect_log: Expect
) -> None:
    expect_log("cannot be opened")
    expect_log("stays in the table")
    in_the_way = obstacle(many)

    def refuse(_request: Request) -> Reply:
        in_the_way.mkdir(exist_ok=True)
        return Reply(404)

    hub.always, hub.open_to_all = refuse, True
    backend = {"type": "registry", "config": {"scheme": "http", "host": hub.server.host, "repo": REPO}}
    cache = {"type": "blobcache", "config": {"work_dir": str(many.cache)}}
    config = json.dumps({"device": {"backend": backend, "cache": cache}, "mode": "direct", "id": "/a"})
    status, why = many.mount("/a", tree.bootstrap, many.folder, config=config)
    assert status == 500 and "cannot be opened" in why, why
    assert many.says_running()
    in_the_way.rmdir()
    hub.always = None

    def mounted() -> bool:
        return many.mount("/a", tree.bootstrap, many.folder, config=config)[0] == 204

    wait_until(mounted, "the image to be mounted", 60)
    assert (many.at("/a") / NAMES[0]).read_bytes() == tree.contents[NAMES[0]]
    assert many.umount("/a") == (204, "")
    assert many.mounted() == []


def test_what_a_chunk_table_has_is_known_of_images_that_are_not_split_and_of_what_an_older_release_has_mounted(
    many: Many,
) -> None:
    """Else a blob with chunks that no file refers to never becomes complete: nobody asks for those."""

    def files() -> list[table.File]:
        return [file for mounted in table.read(memory).mounts for file in mounted.files]

    def is_known() -> bool:
        return bool(files()) and all(file.listed for file in files())

    assert many.put("/a", OTHER) == (204, "")
    wait_for_role(many, "guard", 1)
    folder = Path(f"/proc/{many.pids('guard')[0]}/fd")
    (entry,) = (entry for entry in folder.iterdir() if os.readlink(entry).startswith("/memfd:nydusd-mounts"))
    with open(entry, "r+b", buffering=0) as file:
        memory = file.fileno()
        wait_until(is_known, "the chunk table to be looked at", 60)
        assert [file.cuts for file in files()] == [(0,)], "it is not split"
        many.kill_supervisor()
        mounts = table.read(memory)
        unknown = tuple(
            replace(each, files=tuple(replace(f, listed=False) for f in each.files)) for each in mounts.mounts
        )
        table.write(memory, replace(mounts, mounts=unknown))
        many.start()
        wait_until(is_known, "the next supervisor to have it looked at", 60)
    assert differences(OTHER, many.at("/a")) == []
