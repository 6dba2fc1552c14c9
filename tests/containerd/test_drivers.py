"""Each `fs_driver` of nydus-snapshotter: the command line that it starts a daemon with, and that ours understands it."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from nydusd.cli.arguments import parse_arguments
from nydusd.cli.options import FuseOptions, SingletonOptions
from tests.containerd.images import cache_folder
from tests.containerd.node import SNAPSHOTTER, SNAPSHOTTER_TOML, daemon_config, http_get
from tests.support.discipline import becomes_true, wait_until

RECORD = """#!/bin/sh
printf '%s\\n' "$*" >>{calls}
exit 1
"""


def commands(driver: str, mode: str, folder: Path) -> list[str]:
    """What the snapshotter calls the daemon with at its start, once it serves, or waits for the daemon that it has started."""
    folder.mkdir()
    calls, program = folder / "calls", folder / "nydusd"
    calls.touch()
    program.write_text(RECORD.format(calls=calls))
    program.chmod(0o755)
    text = SNAPSHOTTER_TOML.format(folder=folder, mode=mode, cleanup="true", nydusd=program, recover_policy="none")
    (folder / "snapshotter.toml").write_text(text.replace('"fusedev"', f'"{driver}"'))
    entry = {"type": "bootstrap", "config": {"backend_type": "registry", "backend_config": {}, "cache_type": "fscache"}}
    (folder / "nydusd.json").write_text(json.dumps(daemon_config() | (entry if driver == "fscache" else {})))
    command = [str(cache_folder() / "bin" / SNAPSHOTTER), "--config", str(folder / "snapshotter.toml")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
    try:

        def serves() -> bool:
            try:
                http_get(str(folder / "system.sock"), "/api/v1/daemons")
            except OSError:
                return False
            return True

        wait_until(lambda: process.poll() is not None or bool(calls.read_text()) or serves(), "the snapshotter", 60)
        assert process.poll() is None, (folder / "log").read_text()
    finally:
        process.terminate()
        if not becomes_true(lambda: process.poll() is not None, 30):
            process.kill()
        process.wait()
    return calls.read_text().splitlines()


def test_fusedev_starts_a_daemon_that_images_are_mounted_in(tmp_path: Path) -> None:
    (line,) = commands("fusedev", "shared", tmp_path / "sn")
    options = parse_arguments(shlex.split(line))
    assert isinstance(options, FuseOptions)
    assert options.bootstrap is None and options.mountpoint == str(tmp_path / "sn/sn/mnt")


def test_fscache_starts_a_singleton_with_the_kernels_cache(tmp_path: Path) -> None:
    (line,) = commands("fscache", "shared", tmp_path / "sn")
    options = parse_arguments(shlex.split(line))
    assert isinstance(options, SingletonOptions)
    assert (options.fscache, options.fscache_threads) == (str(tmp_path / "sn/sn/cache"), 4)
    assert options.apisock is not None


@pytest.mark.parametrize("driver", ["blockdev", "nodev", "proxy"])
def test_others_start_no_daemon(driver: str, tmp_path: Path) -> None:
    assert commands(driver, "none", tmp_path / "sn") == []
