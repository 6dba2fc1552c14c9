"""The front-end process itself: what it refuses at start, and which signals it minds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nydusd.errors import FormatError
from nydusd.frontends.fuse.main import open_mount
from tests.fuse.harness import REPO, Stage
from tests.support.discipline import wait_until


def spec(bootstrap: Path, **more: object) -> dict[str, object]:
    return {
        "id": "/",
        "bootstrap": str(bootstrap),
        "path_id": None,
        "extracted": False,
        "xattr": False,
        "blobs": [],
        **more,
    }


def test_an_empty_bootstrap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap"
    path.touch()
    with pytest.raises(FormatError, match="bootstrap: size: 0 bytes"):
        open_mount(spec(path), 0)


def test_a_bootstrap_that_changed_since_the_mount_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap"
    path.write_bytes(bytes(4096))
    with pytest.raises(FormatError, match="4096 bytes, 8192 when it was mounted"):
        open_mount(spec(path, bootstrap_size=8192), 0)


def test_a_real_image_opens_mapped_and_not_copied() -> None:
    path = REPO / "tests/data/small/images/v6-zstd-blake3/bootstrap"
    mount = open_mount(spec(path, bootstrap_size=path.stat().st_size), 0)
    assert mount.ino_of(1) == mount.bootstrap.root_ino
    assert str(path) in Path("/proc/self/maps").read_text()


def test_metadata_that_is_let_go_of_takes_no_memory_and_is_there_again_when_it_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap"
    shutil.copy(REPO / "tests/data/small/images/v6-zstd-blake3/bootstrap", path)
    mount = open_mount(spec(path, bootstrap_size=path.stat().st_size), 0)

    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().partition(str(path))[2].splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    found = mount.bootstrap.lookup(mount.bootstrap.root_ino, b"sizes")
    assert found is not None and resident() > 0
    mount.trim()
    assert resident() == 0
    assert mount.bootstrap.lookup(mount.bootstrap.root_ino, b"sizes") == found


def test_started_by_hand_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nydusd.frontends.fuse"], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "started by nydusd with --spec-fd" in done.stderr


def test_sigint_is_the_supervisors_business_and_sigterm_ends_it(tmp_path: Path) -> None:
    with Stage(tmp_path) as stage:
        assert (stage.mountpoint / "hello").exists()
        process = stage.processes[0]
        process.send_signal(signal.SIGINT)
        assert "dir" in os.listdir(stage.mountpoint)
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM


def test_sigusr1_dumps_its_stack_and_it_goes_on(tmp_path: Path) -> None:
    with Stage(tmp_path) as stage:
        assert (stage.mountpoint / "hello").exists()
        stage.processes[0].send_signal(signal.SIGUSR1)
        wait_until(lambda: "_serve_blocking" in stage.log.read_text(), "the stack")
        assert "dir" in os.listdir(stage.mountpoint)
