"""Which way `nydusd erofs` takes by itself, and that it says why, with the reason against each better one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.errors import UnsupportedError
from nydusd.supervisor.selection import choose, choose_without_image
from tests.erofs.test_images import differences
from tests.support.daemon import Daemon
from tests.support.oracle import Image, image

SMALL, TARS, OLD = image("v6-zstd-blake3"), image("v6-tarfs"), image("v5-zstd-blake3")
NO_TARFS = f"{SMALL.bootstrap} is no tarfs image"
NO_EVENTS = (
    "fanotify gives no events before reads of this file system: the kernel must be 6.15 or later, and the cache folder on"
    " ext4, xfs or btrfs"
)
NO_FOLDER = "no cache folder is configured"


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A cache folder on tmpfs."""
    folder = tmp_path / "memory"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def kernel(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    """Have this kernel say that it is another one."""
    ours = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((ours[0], ours[1], release, ours[3], ours[4])))


def says(daemon: Daemon, way: str, why: str) -> None:
    """AssertionError unless log, `nydusctl info` and the API say this of the way that was taken."""
    (row,) = daemon.get("/api/v1/nydusd/mounts")["images"]  # type: ignore[index]
    assert (row["front_end"], row["why_front_end"]) == (way, why)
    assert f"read through {way} ({why})" in daemon.ctl("info")
    (line,) = re.findall(r"front end: (.*)", daemon.log.read_text())
    assert line == f"{way}: {why}"


def test_fanotify_is_taken_where_it_can_be(tmp_path: Path) -> None:
    way, why = choose("auto", str(SMALL.bootstrap), str(tmp_path), local=True)
    assert (way, why) == ("fanotify", f"the kernel has all it needs; not tarfs: {NO_TARFS}")
    assert os.listdir(tmp_path) == [], "what it was tried with"


def test_a_tarfs_image_without_its_tars_is_read_as_any_other(tmp_path: Path) -> None:
    assert choose("auto", str(TARS.bootstrap), str(tmp_path), local=True) == (
        "tarfs",
        "all data is in tars on this machine",
    )
    way, why = choose("auto", str(TARS.bootstrap), str(tmp_path), local=False)
    assert (way, why) == ("fanotify", "the kernel has all it needs; not tarfs: its tars are not in a local folder")


def test_a_cache_folder_in_memory_is_served_by_blobfs(in_memory: Path) -> None:
    with Daemon(SMALL.bootstrap, SMALL.blobs, cache=in_memory, verb="erofs") as daemon:
        assert differences(SMALL, daemon.mountpoint) == []
        against = f"not tarfs: {NO_TARFS}; not fanotify: cache folder {in_memory}: {NO_EVENTS}"
        says(daemon, "EROFS over blobfs", f"the kernel has all it needs; {against}")


def test_without_a_cache_folder_fuse_serves(tmp_path: Path) -> None:
    config: dict[str, object] = {
        "version": 2,
        "backend": {"type": "localfs", "localfs": {"dir": str(SMALL.blobs)}},
        "cache": {"type": "dummycache"},
        "rafs": {"mode": "direct", "enable_xattr": True},
    }
    with Daemon(SMALL.bootstrap, SMALL.blobs, config=config, verb="erofs") as daemon:
        assert differences(SMALL, daemon.mountpoint) == []
        says(daemon, "FUSE", f"not tarfs: {NO_TARFS}; not fanotify, blobfs: {NO_FOLDER}")


def test_an_image_of_v5_is_served_by_fuse() -> None:
    with Daemon(OLD.bootstrap, OLD.blobs, verb="erofs") as daemon:
        assert differences(OLD, daemon.mountpoint) == []
        path = daemon.command[daemon.command.index("-B") + 1]
        against = (
            f"not tarfs: {path} is no tarfs image; not fanotify, blobfs: {path} is of RAFS v5, which only we can read"
        )
        says(daemon, "FUSE", against)


@pytest.mark.parametrize("release", ["6.11.0-1-amd64", "5.10.0"])
@pytest.mark.parametrize("what", [SMALL, TARS], ids=lambda what: what.name)
def test_an_older_kernel_has_none_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, what: Image
) -> None:
    kernel(monkeypatch, release)
    why = f"kernel {release} mounts EROFS from block devices only; 6.12 and later from files"
    bootstrap = str(what.bootstrap)
    assert choose("auto", bootstrap, str(tmp_path), local=True) == ("fuse", f"not tarfs, fanotify, blobfs: {why}")
    for way in ("tarfs", "fanotify", "blobfs"):
        with pytest.raises(UnsupportedError, match=re.escape(f"--driver {way}: {why}; use ")):
            choose(way, bootstrap, str(tmp_path), local=True)
    assert choose_without_image("auto") == (
        "fuse",
        f"not tarfs, blobfs: it serves the image of --bootstrap only; not fanotify: {why}",
    )


def test_a_kernel_with_such_mounts_is_taken_by_its_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for release in ("6.12", "6.12.0-rc1+", "10.0.1"):
        kernel(monkeypatch, release)
        assert choose("auto", str(SMALL.bootstrap), str(tmp_path))[0] == "fanotify"


def test_without_an_image_only_one_of_them_can_be() -> None:
    only = "it serves the image of --bootstrap only"
    assert choose_without_image("auto") == ("fanotify", f"the kernel has all it needs; not tarfs: {only}")
    assert choose_without_image("fanotify") == ("fanotify", "it was asked for")
    for way in ("tarfs", "blobfs"):
        with pytest.raises(UnsupportedError, match=f"--driver {way}: {only}; use fanotify"):
            choose_without_image(way)


def test_a_way_that_was_asked_for_and_is_not_there_is_an_error_with_the_reason(in_memory: Path) -> None:
    for way, bootstrap, folder, why in (
        ("tarfs", SMALL, in_memory, NO_TARFS),
        ("fanotify", SMALL, in_memory, f"cache folder {in_memory}: {NO_EVENTS}"),
        ("fanotify", SMALL, None, NO_FOLDER),
        ("blobfs", SMALL, None, NO_FOLDER),
        ("blobfs", OLD, in_memory, "is of RAFS v5"),
    ):
        with pytest.raises(UnsupportedError, match=re.escape(why)):
            choose(way, str(bootstrap.bootstrap), None if folder is None else str(folder), local=True)
    daemon = Daemon(SMALL.bootstrap, SMALL.blobs, cache=in_memory, verb="erofs", args=("--driver", "fanotify"))
    with pytest.raises(AssertionError, match=r"exit status [1-9](.|\n)*--driver fanotify: cache folder"):
        daemon.start()
    shutil.rmtree(daemon.folder)


def test_what_a_killed_daemon_has_mounted_is_taken_over_whatever_else_could_be_mounted(tmp_path: Path) -> None:
    why = "a killed daemon has left its mount, which is taken over"
    for bootstrap in (SMALL.bootstrap, TARS.bootstrap):
        assert choose("auto", str(bootstrap), str(tmp_path), local=True, left=True) == ("fanotify", why)
