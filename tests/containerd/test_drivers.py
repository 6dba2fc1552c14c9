"""Each `fs_driver` of nydus-snapshotter: the command line that it starts a daemon with, and that ours understands it."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.cli.arguments import parse_arguments
from nydusd.cli.options import FuseOptions, SingletonOptions
from tests.containerd.images import cache_folder
from tests.containerd.node import SNAPSHOTTER, SYSTEM_SOCK, http_get, write_examples
from tests.support.discipline import becomes_true, discipline, wait_until

RECORD = """#!/bin/sh
printf '%s\\n' "$*" >>{calls}
exit 1
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a name that leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory(prefix="n", dir=discipline.folder) as name:
        yield Path(name)


def commands(driver: str, mode: str, folder: Path) -> list[str]:
    """What the snapshotter calls the daemon with at its start, once it serves, or waits for the daemon that it has started."""
    calls, program = folder / "calls", folder / "nydusd"
    calls.touch()
    program.write_text(RECORD.format(calls=calls))
    program.chmod(0o755)
    config = write_examples(folder, mode, nydusd=program, recover_policy="none")
    if driver != "fusedev":
        config.write_text(config.read_text().replace('"fusedev"', f'"{driver}"'))
    if driver == "fscache":
        template = folder / "nydusd-registry-v1.json"
        entry = {"backend_type": "registry", "backend_config": {}, "cache_type": "fscache"}
        template.write_text(json.dumps(json.loads(template.read_text()) | {"type": "bootstrap", "config": entry}))
    command = [str(cache_folder() / "bin" / SNAPSHOTTER), "--config", str(config)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
    try:

        def serves() -> bool:
            try:
                http_get(str(folder / SYSTEM_SOCK), "/api/v1/daemons")
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


def test_fusedev_starts_a_daemon_that_images_are_mounted_in(folder: Path) -> None:
    (line,) = commands("fusedev", "shared", folder)
    options = parse_arguments(shlex.split(line))
    assert isinstance(options, FuseOptions)
    assert options.bootstrap is None and options.mountpoint == str(folder / "sn/mnt")


def test_fscache_starts_a_singleton_with_the_kernels_cache(folder: Path) -> None:
    (line,) = commands("fscache", "shared", folder)
    options = parse_arguments(shlex.split(line))
    assert isinstance(options, SingletonOptions)
    assert (options.fscache, options.fscache_threads) == (str(folder / "sn/cache"), 4)
    assert options.apisock is not None


@pytest.mark.parametrize("driver", ["blockdev", "nodev", "proxy"])
def test_others_start_no_daemon(driver: str, folder: Path) -> None:
    assert commands(driver, "none", folder) == []
