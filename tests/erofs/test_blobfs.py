"""The blobs of an image as files over FUSE, by themselves and below the kernel's EROFS."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from bench.image import build
from bench.run import regular_files
from nydusd.formats.rafs_v6 import RafsV6
from nydusd.formats.write.rafs_v6_split import split_devices
from nydusd.frontends.erofs.session import detach, mount_erofs
from nydusd.storage.state.names import remove
from tests.erofs.test_images import V6, differences
from tests.erofs.test_takeover import is_stopped, segments
from tests.killing.plan import Plan
from tests.support.daemon import Daemon
from tests.support.discipline import mounts_under, wait_until
from tests.support.oracle import Image, image
from tests.support.trees import random_tree


@pytest.mark.parametrize("image", V6, ids=lambda image: image.name)
def test_the_kernel_shows_the_manifest_over_blobfs(image: Image, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    shutil.copytree(image.blobs, blobs)
    bootstrap = blobs / image.bootstrap.name if image.bootstrap.parent == image.blobs else image.bootstrap
    with Daemon(bootstrap, blobs, verb="erofs", args=("--driver", "blobfs")) as daemon:
        assert differences(image, daemon.mountpoint) == []
        assert daemon.backend_reads() > 0
        assert "read through EROFS over blobfs (it was asked for)" in daemon.ctl("info")


def test_a_mount_takes_many_blobs_and_any_path(tmp_path: Path) -> None:
    """More than the options of mount(2) have room for, a comma, and paths that are longer than fsconfig(2) takes."""
    folder = tmp_path / "a,b" / ("deep" * 60)
    folder.mkdir(parents=True)
    tree = tmp_path / "tree"
    tree.mkdir()
    built = build(random_tree(tree, 50, 8192), tmp_path / "image", 4096, plain=folder)
    (plain,) = folder.iterdir()
    view = memoryview(built.bootstrap.read_bytes())
    split = split_devices(view, RafsV6(view, "bootstrap"), "bootstrap", 8192, 512)
    assert split is not None and len(split.cuts[0]) == 50
    metadata = folder / "metadata"
    metadata.write_bytes(split.metadata)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    mount_erofs(str(mountpoint), str(metadata), [str(plain)] * len(split.cuts[0]))
    try:
        assert {p.name: p.read_bytes() for p in mountpoint.iterdir()} == {
            p.name: p.read_bytes() for p in tree.iterdir()
        }
    finally:
        detach(str(mountpoint))


def test_a_blob_is_a_file_with_its_plain_bytes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(5):
        (tree / f"{number}").write_bytes(os.urandom(70_000))
    built = build(tree, tmp_path / "image", 1 << 16, plain=tmp_path / "plain")
    plain = (tmp_path / "plain" / f"{built.blob.name}.blob.data").read_bytes()
    with Daemon(built.bootstrap, built.blob.parent, verb="blobfs") as daemon:
        assert os.listdir(daemon.mountpoint) == [built.blob.name]
        blob = daemon.mountpoint / built.blob.name
        assert blob.stat().st_size == len(plain)
        with open(blob, "rb", buffering=0) as file:  # across the padding behind a chunk, and up to the end
            assert os.pread(file.fileno(), 9000, 60_000) == plain[60_000:69_000]
            assert os.pread(file.fileno(), 1 << 20, len(plain) - 5) == plain[-5:]
        assert blob.read_bytes() == plain


def test_a_killed_supervisor_is_succeeded_under_open_files(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    built = build(random_tree(tree, 4, 3 << 20), tmp_path / "image", 1 << 16)
    with Daemon(built.bootstrap, built.blob.parent, verb="erofs", args=("--driver", "blobfs")) as daemon:
        device = os.stat(daemon.mountpoint).st_dev
        with open(daemon.mountpoint / "03", "rb", buffering=0) as file:
            assert os.pread(file.fileno(), 4096, 0) == (tree / "03").read_bytes()[:4096]
            for _ in range(2):
                daemon.kill_supervisor()
                daemon.start()
                assert os.stat(daemon.mountpoint).st_dev == device
            assert file.read() == (tree / "03").read_bytes()
        assert (daemon.mountpoint / "02").read_bytes() == (tree / "02").read_bytes()
        assert "detach" not in daemon.log.read_text()


def test_a_stop_in_a_takeover_unmounts_what_was_taken_over(tmp_path: Path) -> None:
    small, plan = image("v6-zstd-blake3"), Plan(tmp_path / "plan")
    args = ("--driver", "blobfs")
    with Daemon(small.bootstrap, small.blobs, verb="erofs", args=args, environment=plan.environment) as daemon:
        daemon.kill_supervisor()
        (segment,) = segments(daemon)
        remove(segment)  # so the blob must be opened again
        plan.begin("takeover: front ends woken", 1, signal.SIGSTOP)
        daemon.launch()
        wait_until(lambda: plan.killed() and is_stopped(daemon.pid), "the next supervisor", 60)
        for number in (signal.SIGTERM, signal.SIGCONT):
            os.kill(daemon.pid, number)
        daemon.wait_for_end()
        assert mounts_under(daemon.folder) == set()


def test_without_any_process_of_ours_a_read_fails(tmp_path: Path) -> None:
    small = image("v6-zstd-blake3")
    with Daemon(small.bootstrap, small.blobs, verb="erofs", args=("--driver", "blobfs")) as daemon:
        fd = os.open(max(regular_files(daemon.mountpoint), key=os.path.getsize), os.O_RDONLY)
        daemon.kill_all()  # also fork servers, which hold the mount for a minute
        with pytest.raises(OSError) as failure:
            os.pread(fd, 4096, 0)
        assert failure.value.errno == errno.EIO
        os.close(fd)
        daemon.start()
        assert differences(small, daemon.mountpoint) == []
