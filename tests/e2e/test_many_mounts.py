"""Many images in one daemon: mounted and unmounted by the API, none disturbed by another, none taken for another."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.processes import pss
from tests.support import manifest, oracle
from tests.support.daemon import Daemon, image_config, wait_for_role
from tests.support.discipline import wait_until

ROOT = Path(__file__).resolve().parents[2]
FIRST = oracle.image("v6-zstd-blake3")
SECOND = oracle.image("v5-zstd-blake3")
EXISTS = 'Mount(MountFilesystem(Other("object or filesystem already exists")))'
ABSENT = 'Mount(MountFilesystem(Other("object or filesystem doesn\'t exist")))'


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon without an image."""
    with Daemon(None, Path("/nonexistent")) as made:
        yield made


def mount(daemon: Daemon, place: str, image: oracle.Image, method: str = "POST") -> None:
    assert daemon.mount(place, image.bootstrap, image.blobs, method) == (204, "")


def assert_right(daemon: Daemon, place: str, image: oracle.Image) -> None:
    found = manifest.walk(Path(f"{daemon.mountpoint}{place}"))
    assert manifest.differences(manifest.load(image.manifest), found) == []


def test_what_is_ignored_of_a_configuration_is_named_in_the_log(daemon: Daemon) -> None:
    config = image_config(FIRST.blobs, daemon.cache) | {"novelty": 1, "fs_prefetch": {"stream_prefetch": True}}
    for method in ("POST", "PUT"):
        before = daemon.log.stat().st_size
        assert daemon.mount("/a", FIRST.bootstrap, FIRST.blobs, method, config=json.dumps(config)) == (204, "")
        said = daemon.log.read_text()[before:]
        assert "configuration of /a: unknown configuration key novelty is ignored" in said
        assert "configuration of /a: rafs.prefetch.stream_prefetch: ignored, " in said


def test_images_are_mounted_and_unmounted_side_by_side(daemon: Daemon) -> None:
    assert os.listdir(daemon.mountpoint) == []
    mount(daemon, "/a", FIRST)
    mount(daemon, "/deep/in/folders", SECOND)
    assert sorted(os.listdir(daemon.mountpoint)) == ["a", "deep"]
    assert_right(daemon, "/a", FIRST)
    assert_right(daemon, "/deep/in/folders", SECOND)
    assert daemon.umount("/a") == (204, "")
    assert os.listdir(daemon.mountpoint) == ["deep"]
    assert not (daemon.mountpoint / "a").exists()
    assert_right(daemon, "/deep/in/folders", SECOND)
    assert daemon.umount("/deep/in/folders") == (204, "")
    assert os.listdir(daemon.mountpoint) == []
    mount(daemon, "/a", SECOND)
    assert_right(daemon, "/a", SECOND)


def test_nydusctl_mounts_and_unmounts_and_names_an_image_of_several(daemon: Daemon) -> None:
    config = daemon.folder / "image.json"
    config.write_text(json.dumps(image_config(FIRST.blobs, daemon.cache)))
    for place in ("/a", "/b/c"):
        assert daemon.ctl("mount", "-s", str(FIRST.bootstrap), "-c", str(config), "-m", place) == ""
        assert_right(daemon, place, FIRST)
    assert "Instance:     /b/c\n" in daemon.ctl("metrics", "fsstats", "-m", "/b/c")
    assert "Backend Type:" in daemon.ctl("metrics", "backend", "-m", "/a")
    assert "Hit Ratio:" in daemon.ctl("metrics", "cache", "-m", "/a")
    with pytest.raises(AssertionError, match="--mountpoint: name one of /a, /b/c\n"):
        daemon.ctl("metrics", "fsstats")
    with pytest.raises(AssertionError, match=r"exit status 1\nError: .*object or filesystem already exists"):
        daemon.ctl("mount", "-s", str(SECOND.bootstrap), "-c", str(config), "-m", "/a")
    assert daemon.ctl("umount", "-m", "/a") == ""
    assert os.listdir(daemon.mountpoint) == ["b"]
    with pytest.raises(AssertionError, match=r"exit status 1\nError: .*object or filesystem doesn't exist"):
        daemon.ctl("umount", "-m", "/a")


def test_wrong_mounts_are_refused_in_the_known_words_and_harm_nothing(daemon: Daemon, tmp_path: Path) -> None:
    mount(daemon, "/a", FIRST)
    assert daemon.mount("/a", FIRST.bootstrap, FIRST.blobs) == (204, ""), "the same once more"
    assert daemon.mount("/a", SECOND.bootstrap, SECOND.blobs) == (500, EXISTS)
    assert daemon.mount("/b", FIRST.bootstrap, FIRST.blobs, method="PUT") == (500, ABSENT)
    for place in ("/b", "/a/b", "/"):
        assert daemon.umount(place) == (500, ABSENT)
    for place in ("b", "/../b", "/a/../../b", ""):
        status, message = daemon.mount(place, FIRST.bootstrap, FIRST.blobs)
        assert (status, message.partition("(Os")[0]) == (
            *(500, 'Mount(MountFilesystem(Other("VFS failed to handle request, PathWalk'),
        )
        assert "code: 22" in message
    for kind in ("", "ext4"):
        assert daemon.mount("/b", FIRST.bootstrap, FIRST.blobs, fs_type=kind) == (
            500,
            "Mount(MountFilesystem(Other(\"invalid argument `only 'rafs' and 'passthrough_fs' are supported, "
            f'but {kind} was specified`")))',
        )
    for config, why in (("", "neither"), ("{", "not valid JSON"), ('{"device":{}}', "backend")):
        status, message = daemon.mount("/b", FIRST.bootstrap, FIRST.blobs, config=config)
        start = (
            'Mount(MountFilesystem(Other("RAFS failed to handle request, Failed to load config: '
            "failed to parse configuration information"
        )
        assert (status, message[: len(start)]) == (500, start)
        assert why in message
    (tmp_path / "bad").write_bytes(bytes(8192))
    for source, why in (
        (tmp_path / "bad", "no tar header"),
        (tmp_path / "none", "No such file"),
        (tmp_path, "regular"),
    ):
        status, message = daemon.mount("/b", source, FIRST.blobs)
        assert status == 500
        assert why in message
    for folder in (tmp_path / "bad", tmp_path / "bad" / "below", "/proc/none/of/it", "nul\0", "x" * 300):
        config = json.dumps(image_config(FIRST.blobs, Path(folder)))
        status, message = daemon.mount("/b", FIRST.bootstrap, FIRST.blobs, config=config)
        assert (status, "cache folder" in message) == (500, True), "every read would fail"
    status, message = daemon.mount("/b", FIRST.bootstrap, FIRST.blobs, prefetch_files=["a"])
    assert (status, "prefetch_files" in message) == (500, True)
    status, why = daemon.mount("/b", FIRST.bootstrap, FIRST.blobs, fs_type="passthrough_fs")
    assert status == 501 and "use fs_type rafs, or a bind mount for a folder of the host" in why
    assert os.listdir(daemon.mountpoint) == ["a"]
    assert_right(daemon, "/a", FIRST)


def test_a_cache_folder_that_can_be_none_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "c.json").write_text(json.dumps(image_config(FIRST.blobs, tmp_path / "file")))
    options = ["-M", str(tmp_path / "mnt"), "-B", str(FIRST.bootstrap), "-C", str(tmp_path / "c.json")]
    command = [sys.executable, "-m", "nydusd", "fuse", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        f"Error: cache folder {tmp_path}/file: cannot be made: File exists",
    )
    assert not os.path.ismount(tmp_path / "mnt")


def test_a_mount_inside_an_image_takes_the_place_of_its_folder(daemon: Daemon) -> None:
    mount(daemon, "/a", FIRST)
    inner = daemon.mountpoint / "a" / "deep"
    before = os.listdir(inner)
    mount(daemon, "/a/deep", SECOND)
    assert_right(daemon, "/a/deep", SECOND)
    status, message = daemon.umount("/a")
    assert (status, "in use: /a/deep" in message) == (500, True)
    status, message = daemon.mount("/a/nothing", SECOND.bootstrap, SECOND.blobs)
    assert (status, "no such folder" in message) == (500, True)
    assert daemon.umount("/a/deep") == (204, "")
    assert os.listdir(inner) == before
    assert_right(daemon, "/a", FIRST)


def test_an_image_at_the_root_comes_and_goes(daemon: Daemon) -> None:
    for image in (FIRST, SECOND, FIRST):
        mount(daemon, "/", image)
        assert_right(daemon, "", image)
        assert daemon.umount("/") == (204, "")
        assert os.listdir(daemon.mountpoint) == []
        mount(daemon, "/in", image)
        assert (daemon.mountpoint / "in").is_dir(), "a name that the image did not have"
        assert daemon.umount("/in") == (204, "")


def test_an_open_file_of_an_unmounted_image_gives_an_error_and_never_another_images_bytes(daemon: Daemon) -> None:
    path, content = next((path, data) for path, data in oracle.truth(FIRST.name).items() if len(data) > 100_000)
    mount(daemon, "/a", FIRST)
    fd = os.open(os.fsencode(daemon.mountpoint) + b"/a/" + path, os.O_RDONLY | os.O_DIRECT)
    try:
        assert os.pread(fd, 4096, 0) == content[:4096]
        assert daemon.umount("/a") == (204, "")
        mount(daemon, "/a", SECOND)
        with pytest.raises(OSError) as caught:
            os.pread(fd, 4096, 4096)
        assert caught.value.errno == errno.ESTALE
    finally:
        os.close(fd)


def test_a_remount_with_the_same_metadata_keeps_open_files(daemon: Daemon, tmp_path: Path) -> None:
    path, content = next((path, data) for path, data in oracle.truth(FIRST.name).items() if len(data) > 100_000)
    mount(daemon, "/a", FIRST)
    fd = os.open(os.fsencode(daemon.mountpoint) + b"/a/" + path, os.O_RDONLY | os.O_DIRECT)
    try:
        daemon.cache = tmp_path / "other"
        mount(daemon, "/a", FIRST, method="PUT")
        assert os.pread(fd, 8192, 0) == content[:8192]
        assert any(name.endswith(".blob.data") for name in os.listdir(tmp_path / "other"))
        mount(daemon, "/a", SECOND, method="PUT")
        with pytest.raises(OSError) as caught:
            os.pread(fd, 4096, 16384)
        assert caught.value.errno == errno.ESTALE
    finally:
        os.close(fd)
    assert_right(daemon, "/a", SECOND)


def test_an_unmounted_image_gives_back_all_it_held(daemon: Daemon) -> None:
    """Its segment, its cache file, its metadata: in every process, also in those that nobody asks anything."""
    mount(daemon, "/a", FIRST)
    assert_right(daemon, "/a", FIRST)
    family = [daemon.pid, *daemon.pids("fuse")]

    def in_use() -> list[str]:
        maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in family)
        links = [os.readlink(link) for pid in family for link in Path(f"/proc/{pid}/fd").iterdir()]
        files = [line.split(maxsplit=5)[-1] for line in maps.splitlines()] + links
        return [name for name in files if str(FIRST.bootstrap) in name or ".blob.data" in name]

    assert in_use()
    assert daemon.umount("/a") == (204, "")
    wait_until(lambda: not in_use(), "the end of all uses")
    mount(daemon, "/a", FIRST)
    reads = daemon.backend_reads()
    assert_right(daemon, "/a", FIRST)
    assert daemon.backend_reads() == reads, "what was fetched before the umount was fetched again"


def test_front_ends_that_die_come_back_with_all_mounts(daemon: Daemon) -> None:
    mount(daemon, "/a", FIRST)
    for pid in daemon.pids("fuse"):
        daemon.kill(pid)
    mount(daemon, "/b", SECOND)
    assert_right(daemon, "/a", FIRST)
    assert_right(daemon, "/b", SECOND)
    assert daemon.umount("/a") == (204, "")
    for pid in daemon.pids("fuse"):
        daemon.kill(pid)
    assert os.listdir(daemon.mountpoint) == ["b"]
    wait_for_role(daemon, "fuse", max(1, len(os.sched_getaffinity(0)) // 2))


def test_a_bootstrap_that_vanished_fails_its_image_alone(
    daemon: Daemon, tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    expect_log("bootstrap: bootstrap: cannot be opened: No such file")
    copy = tmp_path / "bootstrap"
    copy.write_bytes(FIRST.bootstrap.read_bytes())
    assert daemon.mount("/a", copy, FIRST.blobs) == (204, "")
    mount(daemon, "/b", SECOND)
    copy.unlink()
    with pytest.raises(OSError, match="Input/output error"):
        os.listdir(daemon.mountpoint / "a")
    assert sorted(os.listdir(daemon.mountpoint)) == ["a", "b"]
    assert_right(daemon, "/b", SECOND)
    assert daemon.umount("/a") == (204, "")


def test_mounts_come_and_go_under_readers_of_another(daemon: Daemon) -> None:
    mount(daemon, "/steady", FIRST)
    contents = list(oracle.truth(FIRST.name).items())[:40]
    wrong: list[object] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            for path, content in contents:
                try:
                    with open(os.fsencode(daemon.mountpoint) + b"/steady/" + path, "rb") as file:
                        if file.read() != content:
                            wrong.append(path)
                except OSError as e:
                    wrong.append(e)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(12):
            mount(daemon, "/other", SECOND if turn % 2 else FIRST)
            assert os.listdir(daemon.mountpoint / "other")
            assert daemon.umount("/other") == (204, "")
    finally:
        over.set()
        reader.join()
    assert wrong == []


BUILD = """
import sys
from pathlib import Path
from bench.image import build
for number in range(300):
    tree = Path(sys.argv[1], "trees", str(number))
    tree.mkdir(parents=True)
    (tree / "who").write_text(f"image {number}")
    build(tree, Path(sys.argv[1], "images", str(number)))
"""
"""In a process of its own: the builder forks for each image, and the tests' process has much to be copied."""


def memory(daemon: Daemon) -> int:
    """Bytes of PSS of all its processes."""
    return sum(map(pss, [daemon.pid, *daemon.family()])) * 1024


def test_three_hundred_images_and_each_shows_its_own_files(daemon: Daemon, tmp_path: Path) -> None:
    """More than fit into the 8 bits that the reference has for them; each of them takes 1 MB at most."""
    of_first = 0
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=ROOT, check=True, timeout=200)
    for number in range(300):
        image = tmp_path / "images" / str(number)
        assert daemon.mount(f"/{number}", image / "bootstrap", image / "blobs") == (204, "")
        if number == 0:
            assert (daemon.mountpoint / "0" / "who").read_text() == "image 0"
            of_first = memory(daemon)
    assert sorted(map(int, os.listdir(daemon.mountpoint))) == list(range(300))
    for number in range(300):
        assert (daemon.mountpoint / str(number) / "who").read_text() == f"image {number}"
        assert os.listdir(daemon.mountpoint / str(number)) == ["who"]
    inodes = {os.stat(daemon.mountpoint / str(number) / "who").st_ino for number in range(300)}
    assert len(inodes) == 300
    assert memory(daemon) - of_first <= 299_000_000
    for number in range(0, 300, 7):
        assert daemon.umount(f"/{number}") == (204, "")
    assert sorted(map(int, os.listdir(daemon.mountpoint))) == [n for n in range(300) if n % 7]
    assert (daemon.mountpoint / "299" / "who").read_text() == "image 299"


def test_the_image_of_the_command_line_may_be_mounted_elsewhere() -> None:
    with Daemon(FIRST.bootstrap, FIRST.blobs, args=("--virtual-mountpoint", "/images/first")) as daemon:
        assert os.listdir(daemon.mountpoint) == ["images"]
        assert_right(daemon, "/images/first", FIRST)
        mount(daemon, "/images/second", SECOND)
        assert_right(daemon, "/images/second", SECOND)
