"""A tarfs image, mounted straight over its tar: nothing is fetched, nothing is needed to go on reading."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import manifest
from tests.support.daemon import Daemon
from tests.support.discipline import detach_mount
from tests.support.oracle import Image, image, images

TARFS = image("v6-tarfs")


def same(place: Path, what: Image = TARFS) -> None:
    found = manifest.differences(manifest.load(what.manifest), manifest.walk(place))
    assert [line for line in found if "long-symlink" not in line] == [], "the builder's own fault is known"


def daemon(blobs: Path = TARFS.blobs, driver: str = "auto", what: Image = TARFS) -> Daemon:
    return Daemon(what.bootstrap, blobs, verb="erofs", args=("--driver", driver))


@pytest.mark.parametrize("what", [image for image in images() if "tarfs" in image.name], ids=lambda what: what.name)
def test_auto_takes_the_tar_itself_and_nothing_is_copied(what: Image) -> None:
    with daemon(what.blobs, what=what) as served:
        same(served.mountpoint, what)
        assert "EROFS over tars" in served.ctl("info")
        assert served.backend_reads() == 0
        assert list(served.cache.glob("*")) == []
        assert served.pids("decompress") == []


def test_reads_go_on_while_every_process_is_dead_and_the_next_daemon_takes_the_mount_over() -> None:
    rows = manifest.load(TARFS.manifest).values()
    name = next(manifest.unescape(str(row["path"])) for row in rows if row.get("size") and "sha256" in row)
    with daemon(driver="tarfs") as served:
        with open(served.mountpoint / name.decode(), "rb") as held:
            served.kill_supervisor()
            same(served.mountpoint)
            served.start()
            same(served.mountpoint)
            assert held.read()
        assert "is taken over" in served.log_tail()


def test_a_tar_that_is_missing_cut_off_or_not_local_is_refused(tmp_path: Path) -> None:
    (tar,) = TARFS.blobs.iterdir()
    for what, blobs, why in (
        (TARFS, tmp_path / "none", "its tar is not in"),
        (TARFS, tmp_path / "cut", "the image needs"),
        (image("v6-zstd-blake3"), TARFS.blobs, "is no tarfs image"),
    ):
        blobs.mkdir(exist_ok=True)
        if blobs.name == "cut":
            (blobs / tar.name).write_bytes(tar.read_bytes()[:-512])
        refused = daemon(blobs, "tarfs", what)
        with pytest.raises(AssertionError, match=why):
            refused.start()
        detach_mount(str(refused.mountpoint))
        shutil.rmtree(refused.folder)
