"""Images that the API mounts in `nydusd erofs`: each by the kernel, at its place, through everything that may be killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from bench.image import Built, build
from bench.run import regular_files
from nydusd.frontends.erofs import table
from tests.erofs.test_images import differences
from tests.image.build import image as image_tool
from tests.support.daemon import Daemon, image_config, wait_for_role
from tests.support.discipline import discipline, mounts_under, wait_until
from tests.support.disk import Disk
from tests.support.oracle import Image, image
from tests.support.trees import random_tree

_FREEZE, _THAW = 0xC0045877, 0xC0045878
"""ioctl(2) on a folder: FIFREEZE, FITHAW."""
SMALL, OTHER = image("v6-zstd-blake3"), image("v6-smallchunk")


class Many(Daemon):
    """A daemon that is started without an image."""

    def __init__(self, *args: str) -> None:
        super().__init__(None, Path("/"), verb="erofs", args=("--driver", "fanotify", *args))

    def serves(self) -> bool:
        return self.says_running()

    def at(self, place: str) -> Path:
        return self.mountpoint / place.lstrip("/")

    def put(self, place: str, what: Image = SMALL, method: str = "POST") -> tuple[int, str]:
        return self.mount(place, what.bootstrap, what.blobs, method)

    def mounted(self) -> list[str]:
        return sorted(mounts_under(self.mountpoint))

    def front_end(self) -> int:
        wait_for_role(self, "erofs", 1)
        return self.pids("erofs")[0]


@pytest.fixture
def many() -> Iterator[Many]:
    with Many() as daemon:
        yield daemon


def test_images_come_and_go_each_with_a_mount_of_the_kernels(many: Many) -> None:
    for place, what in (("/a", SMALL), ("/deep/er", OTHER), ("/same", SMALL)):
        assert many.put(place, what) == (204, "")
        assert differences(what, many.at(place)) == []
    assert many.mounted() == sorted(str(many.at(place)) for place in ("/a", "/deep/er", "/same"))
    told = many.ctl("info")
    assert "read through EROFS with fanotify" in told and "/deep/er" in told
    assert many.put("/a") == (204, ""), "whoever lost the answer may ask again"
    status, why = many.put("/a", OTHER)
    assert status == 500 and "already exists" in why
    assert many.umount("/deep/er") == (204, "")
    assert sorted(os.listdir(many.mountpoint)) == ["a", "same"], "folders that were made for it are gone"
    assert many.umount("/deep/er")[0] == 500
    assert differences(SMALL, many.at("/same")) == []


def test_the_front_end_knows_what_is_cached_of_every_blob_before_somebody_reads_from_it(
    many: Many, tmp_path: Path
) -> None:
    """A stop may come before that, after which it is to be read on."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for layer in ("lower", "upper"):
        (tmp_path / layer).mkdir()
        (tmp_path / layer / layer).write_bytes(os.urandom(200_000))
        image_tool("create", "--fs-version", "6", "-B", tmp_path / f"{layer}.boot", "-D", blobs, tmp_path / layer)
    image_tool("merge", "-B", tmp_path / "both", tmp_path / "lower.boot", tmp_path / "upper.boot")
    assert many.mount("/a", tmp_path / "both", blobs) == (204, "")
    front_end = many.front_end()

    def known() -> set[str]:
        maps = Path(f"/proc/{front_end}/maps").read_text().splitlines()
        return {line.split()[-1] for line in maps if re.search(r" /dev/shm/nydusd\.\w+\.[0-9a-f]{16}$", line)}

    wait_until(lambda: len(known()) == 2, "both segments to be mapped", 60)
    assert not any(path.stat().st_blocks for path in many.cache.glob("*.blob.data")), "nothing is there of either"


@contextlib.contextmanager
def standing_still(folder: Path) -> Iterator[None]:
    """Whoever writes to the disk of a folder waits."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _FREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(fd, _THAW, 0)
    finally:
        os.close(fd)


def test_a_disk_that_stands_still_while_an_image_is_mounted_holds_up_nobody_else() -> None:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-k-"))
        disk = stack.enter_context(Disk(Path(folder)))
        many, pool = stack.enter_context(Many()), stack.enter_context(ThreadPoolExecutor())
        many.cache = disk.path / "cache"
        assert many.put("/a")[0] == 204
        assert differences(SMALL, many.at("/a")) == []
        with standing_still(disk.path):
            answer = pool.submit(many.put, "/b")
            with pytest.raises(TimeoutError):
                answer.result(2)
            assert many.request("GET", "/api/v1/nydusd/mounts", seconds=5)[0] == 200
        assert answer.result(60)[0] == 204
        assert differences(SMALL, many.at("/b")) == []


def test_an_image_goes_into_a_folder_of_another_and_not_below_what_it_would_hide(many: Many) -> None:
    assert many.put("/", SMALL) == (204, "")
    folder = next(path.name for path in many.mountpoint.iterdir() if path.is_dir() and not path.is_symlink())
    assert many.put(f"/{folder}", OTHER) == (204, "")
    assert differences(OTHER, many.at(folder)) == []
    status, why = many.put("/nowhere", OTHER)
    assert status == 500 and "no such folder" in why
    status, why = many.umount("/")
    assert status == 500 and "in use" in why
    assert many.umount(f"/{folder}") == (204, "")
    assert differences(SMALL, many.mountpoint) == []


def test_a_place_never_leads_out_of_the_mount_point(many: Many, tmp_path: Path) -> None:
    (many.mountpoint / "link").symlink_to(tmp_path)
    (many.mountpoint / "file").write_text("mine")
    for place, why in (
        ("/link", ""),
        ("/link/below", ""),
        ("/file", ""),
        ("/../x", "without '..'"),
        ("x", "must begin with '/'"),
        ("/" + "n" * 256, ""),
    ):
        status, told = many.put(place)
        assert status == 500 and why in told, (place, status, told)
    assert many.mounted() == [] and not mounts_under(tmp_path)
    assert os.listdir(tmp_path) == []
    (many.mountpoint / "link").unlink()
    (many.mountpoint / "file").unlink()
    assert many.put("/x") == (204, "")


def test_what_cannot_be_mounted_is_refused_and_leaves_nothing(
    many: Many, tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    expect_log("cannot be opened: .*no file has it")
    old = image("v5-zstd-blake3")
    status, why = many.put("/old", old)
    assert status == 501 and "RAFS v6 only" in why
    broken = tmp_path / "bootstrap"
    broken.write_bytes(SMALL.bootstrap.read_bytes()[:8192])
    status, why = many.put("/broken", Image("broken", broken, SMALL.blobs, SMALL.manifest, SMALL.tar))
    assert status == 500 and "bootstrap" in why
    status, why = many.put("/empty", Image("none", SMALL.bootstrap, tmp_path, SMALL.manifest, SMALL.tar))
    assert status == 500 and "cannot be opened" in why
    assert many.mounted() == [] and os.listdir(many.mountpoint) == []
    assert many.put("/old") == (204, "")


def test_a_remount_shows_the_new_image_at_once_and_keeps_what_is_open(many: Many) -> None:
    assert many.put("/a") == (204, "")
    assert many.put("/a", method="PUT") == (204, ""), "the same, with another configuration"
    assert differences(SMALL, many.at("/a")) == []
    name = max(regular_files(many.at("/a")), key=os.path.getsize)
    with open(name, "rb") as held:
        content = held.read()
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert many.put("/a", OTHER, method="PUT") == (204, "")
        assert differences(OTHER, many.at("/a")) == []
        held.seek(0)
        assert held.read() == content
    assert many.mounted() == [str(many.at("/a"))]
    assert many.put("/b", method="PUT")[0] == 500


def test_an_image_that_is_used_is_unmounted_and_read_on(many: Many) -> None:
    assert many.put("/a") == (204, "")
    with open(max(regular_files(many.at("/a")), key=os.path.getsize), "rb") as cold:
        assert many.umount("/a") == (204, "")
        assert many.mounted() == []
        assert many.put("/a", OTHER) == (204, "")
        assert len(cold.read()) == os.fstat(cold.fileno()).st_size, "what was not cached is fetched still"
    assert differences(OTHER, many.at("/a")) == []


def test_every_mount_outlives_a_kill_of_any_process(many: Many) -> None:
    places = {"/a": SMALL, "/b/c": OTHER}
    for place, what in places.items():
        assert many.put(place, what) == (204, "")
    held = {place: os.open(many.at(place), os.O_RDONLY) for place in places}
    try:
        for role in ("erofs", "guard", "fetch", "supervisor", "supervisor and front end", "supervisor and guard"):
            for holder in ("erofs", "guard"):  # a supervisor with many images is there before its front end
                wait_for_role(many, holder, 1)
            if role.startswith("supervisor"):
                also = {"supervisor": "none", "supervisor and front end": "erofs"}.get(role, "guard")
                victims = many.pids(also)
                many.kill_supervisor()
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
                many.start()
            else:
                victim = many.pids(role)[0]
                many.kill(victim)
                wait_for_role(many, role, 1, without=victim) if role != "fetch" else None
            for place in places:
                assert os.fstat(held[place]).st_dev == os.stat(many.at(place)).st_dev, "it is the same mount"
        for place, what in places.items():
            assert differences(what, many.at(place)) == []
        assert many.put("/d", SMALL) == (204, "")
        assert differences(SMALL, many.at("/d")) == []
        assert many.umount("/b/c") == (204, "")
    finally:
        for fd in held.values():
            os.close(fd)
    assert sorted(os.listdir(many.mountpoint)) == ["a", "d"]


def test_beside_the_image_of_the_command_line(tmp_path: Path) -> None:
    with Daemon(SMALL.bootstrap, SMALL.blobs, verb="erofs", args=("--driver", "fanotify")) as daemon:
        folder = next(path.name for path in daemon.mountpoint.iterdir() if path.is_dir() and not path.is_symlink())
        assert daemon.mount(f"/{folder}", OTHER.bootstrap, OTHER.blobs) == (204, "")
        daemon.kill_supervisor()
        daemon.start()
        assert differences(OTHER, daemon.mountpoint / folder) == []
        assert daemon.umount(f"/{folder}") == (204, "")
        assert differences(SMALL, daemon.mountpoint) == []


def test_mounts_from_outside_are_noticed(many: Many) -> None:
    assert many.put("/a") == (204, "")
    subprocess.run(["umount", str(many.at("/a"))], check=True)
    wait_until(lambda: "/a" not in many.ctl("info"), "the daemon to notice", 60)
    assert many.put("/a") == (204, "")


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_what_somebody_else_has_unmounted_is_mounted_again_when_that_is_asked_for(many: Many, method: str) -> None:
    """The file system lives, since a file is open; or it is not known yet that it does not."""
    assert many.put("/a") == (204, "")
    name = max(regular_files(many.at("/a")), key=os.path.getsize)
    with open(name, "rb") as held:
        subprocess.run(["umount", "-l", str(many.at("/a"))], check=True)
        assert many.put("/a", method=method) == (204, "")
        assert many.mounted() == [str(many.at("/a"))]
        with open(name, "rb") as again:
            assert held.read() == again.read()
    subprocess.run(["umount", str(many.at("/a"))], check=True)
    assert many.put("/a") == (204, "")
    assert differences(SMALL, many.at("/a")) == []
    assert many.umount("/a") == (204, "")
    assert os.listdir(many.mountpoint) == []


def test_what_an_operator_has_mounted_where_a_killed_daemon_had_an_image_is_left_alone(many: Many) -> None:
    """Its number may be that which the image had: the kernel gives it to the next file system."""
    assert many.put("/a") == (204, "")
    (note,) = (path for path in discipline.runtime.glob("*.erofs.json") if str(many.mountpoint) in path.read_text())
    many.kill_all()
    place = str(many.at("/a"))
    subprocess.run(["umount", place], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "an-operators", place], check=True)
    try:
        number = os.stat(place).st_dev
        noted = json.loads(note.read_text())
        note.write_text(json.dumps(noted | {"mounts": [[place, f"{os.major(number)}:{os.minor(number)}"]]}))
        many.start()
        assert many.mounted() == [place]
        assert os.stat(place).st_dev == number
    finally:
        subprocess.run(["umount", place], check=True)


# --- ranges -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    tree = random_tree(tmp_path_factory.mktemp("tree"), 12, 2 << 20)
    return tree, build(tree, tmp_path_factory.mktemp("image"), 1 << 20)


def often_stored(built: Built, folder: Path) -> Daemon:
    """A daemon whose cache file is synced often: what is not on its disk is asked about."""
    blobs = built.blob.parent
    cache = folder / "cache"
    config = image_config(blobs, cache) | {"nydusd": {"checkpoint_interval": 0.2}}
    return Daemon(built.bootstrap, blobs, cache=cache, config=config, verb="erofs", args=("--driver", "fanotify"))


def questions(daemon: Daemon) -> int:
    """How often the kernel has asked before a read."""
    reads = daemon.get("/api/v1/nydusd/load")["reads"]  # type: ignore[index]
    return int(reads["hits"]) + int(reads["misses"])


def is_read_without_a_question(daemon: Daemon, name: str) -> bool:
    before = questions(daemon)
    subprocess.run([sys.executable, "-c", READ, str(daemon.mountpoint / name)], stdout=subprocess.DEVNULL, check=True)
    return questions(daemon) == before


READ = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
sys.stdout.buffer.write(os.read(fd, 4 << 20))
"""


def read_ahead(daemon: Daemon) -> list[int]:
    """KiB of each file system that the daemon has mounted; what they are called is in its table of mounts."""
    guard = Path(f"/proc/{daemon.pids('guard')[0]}/fd")
    (entry,) = (entry for entry in guard.iterdir() if os.readlink(entry).startswith("/memfd:nydusd-mounts"))
    with open(entry, "rb") as memory:
        names = [name for mounted in table.read(memory.fileno()).mounts for name in mounted.names or ()]
    return [int(Path(f"/sys/class/bdi/{name}/read_ahead_kb").read_text()) for name in names]


def test_the_read_ahead_is_raised_until_all_ranges_are_there(large: tuple[Path, Built], tmp_path: Path) -> None:
    tree, built = large
    names = sorted((path.name for path in tree.iterdir()), reverse=True)  # so nothing is fetched ahead of the reader
    with often_stored(built, tmp_path) as daemon:
        wait_for_role(daemon, "guard", 1)
        assert read_ahead(daemon) == [2048]
        for name in names[:-1]:
            assert (daemon.mountpoint / name).read_bytes() == (tree / name).read_bytes()
        assert "the kernel reads it by itself" not in daemon.log.read_text()
        assert read_ahead(daemon) == [2048]
        assert (daemon.mountpoint / names[-1]).read_bytes() == (tree / names[-1]).read_bytes()
        wait_until(lambda: read_ahead(daemon) == [128], "the usual read-ahead", 60)
        assert "the kernel reads it by itself" in daemon.log.read_text()


def test_what_is_cached_is_read_without_the_front_end_while_other_ranges_are_missing(
    large: tuple[Path, Built], tmp_path: Path
) -> None:
    tree, built = large
    names = sorted(path.name for path in tree.iterdir())
    with often_stored(built, tmp_path) as daemon:
        for name in names[:6]:
            assert (daemon.mountpoint / name).read_bytes() == (tree / name).read_bytes()
        for name in names[1:3]:
            wait_until(partial(is_read_without_a_question, daemon, name), "its range to be on the disk", 60)
        front_end = daemon.pids("erofs")[0]
        begin = [subprocess.run([sys.executable, "-c", READ, str(daemon.mountpoint / names[1])], stdout=-1, check=True)]
        os.kill(front_end, signal.SIGSTOP)
        try:
            for name in names[1:3]:
                command = [sys.executable, "-c", READ, str(daemon.mountpoint / name)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60)
                assert done.stdout == (tree / name).read_bytes()
        finally:
            os.kill(front_end, signal.SIGCONT)
        assert begin[0].stdout == (tree / names[1]).read_bytes()
        for name in names:
            assert (daemon.mountpoint / name).read_bytes() == (tree / name).read_bytes()
