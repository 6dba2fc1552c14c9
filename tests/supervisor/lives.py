"""Helpers for tests of a real daemon's life: starts that fail, kills of the supervisor, reads past the page cache."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import oracle
from tests.support.daemon import Daemon, image_config
from tests.support.discipline import discipline, is_running, wait_until

ROOT = Path(__file__).resolve().parents[2]
IMAGE = oracle.image("v6-zstd-blake3")
READ = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
try:
    os.read(fd, 4096)
except OSError as e:
    sys.exit(e.errno)
"""

ONE_CHUNK = "sizes/70K-random"
"""A file of one chunk, with 70,001 bytes that do not compress."""


def config_for(image: oracle.Image, cache: Path, **more: object) -> dict[str, object]:
    """The usual configuration with top-level keys added or replaced; `nydusd` tunes ours."""
    return image_config(image.blobs, cache) | more


def with_cache(config: dict[str, object], **cache: object) -> dict[str, object]:
    """The configuration with keys of `device.cache` replaced."""
    device = config["device"]
    assert isinstance(device, dict)
    return config | {"device": device | {"cache": device["cache"] | cache}}


def read_direct(path: Path) -> bytes:
    """The content of a file as the daemon gives it now: past the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        out = bytearray()
        while piece := os.pread(fd, 1 << 20, len(out)):
            out += piece
        return bytes(out)
    finally:
        os.close(fd)


def wrong(daemon: Daemon, name: str = IMAGE.name, place: str = "") -> list[bytes]:
    """Files of an image whose bytes are not right, read past the page cache. OSError for one that cannot be read."""
    top = os.fsencode(daemon.mountpoint / place)
    return [
        path
        for path, content in oracle.truth(name).items()
        if read_direct(Path(os.fsdecode(os.path.join(top, path)))) != content
    ]


def failing(daemon: Daemon, name: str = IMAGE.name) -> set[str]:
    """Files of an image that cannot be read; AssertionError if one gives a wrong byte."""
    found = set()
    for path, content in oracle.truth(name).items():
        file = os.fsdecode(path)
        try:
            have = read_direct(daemon.mountpoint / file)
        except OSError:
            found.add(file)
        else:
            assert have == content, file
    return found


@contextmanager
def not_started(
    bootstrap: Path, blobs: Path, cache: Path | None = None, config: dict[str, object] | None = None
) -> Iterator[Daemon]:
    """A daemon that the test starts by hand."""
    daemon = Daemon(bootstrap, blobs, cache=cache, config=config)
    try:
        yield daemon
    finally:
        daemon.__exit__(None, None, None)


def run_to_end(daemon: Daemon, environment: dict[str, str] | None = None) -> tuple[int, list[str]]:
    """Exit status and stderr, without what is logged, of a daemon that is expected to end by itself.

    What it leaves to the next one may have its stderr still.
    """
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            daemon.command,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=errors,
            timeout=30,
            cwd=ROOT,
            env=os.environ | (environment or {}),
            check=False,
        )
        for file in (told, errors):
            file.seek(0)
        assert told.read() == ""
        return done.returncode, [line for line in errors.read().splitlines() if not line.startswith("[")]


def configure(daemon: Daemon, **keys: object) -> None:
    """Add keys to a daemon's configuration, for its next start."""
    file = Path(daemon.command[daemon.command.index("-C") + 1])
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@contextmanager
def blocked_reader(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose read of a file is under way. Its exit status is the errno it got."""
    with subprocess.Popen([sys.executable, "-c", READ, str(path)]) as reader:
        try:
            wait_until(lambda: "fuse_direct_io" in Path(f"/proc/{reader.pid}/stack").read_text(), "a blocked read")
            yield reader
        finally:
            reader.kill()


def crash(daemon: Daemon) -> list[int]:
    """SIGKILL the supervisor; gives its front ends, which live on, once all the others have ended."""
    frontends = daemon.pids("fuse")
    others = [pid for role in ("fetch", "decompress", "api") for pid in daemon.pids(role)]
    process = daemon._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for pid in others:
        wait_until(lambda pid=pid: _reaped(pid), f"the end of {pid}, whose supervisor is gone")  # type: ignore[misc]
    return frontends


def start_again(daemon: Daemon, frontends: list[int]) -> None:
    """The same command once more: it takes over these front ends."""
    daemon.start()
    assert all(map(is_running, frontends))
    assert set(frontends) <= set(daemon.pids("fuse"))


def _reaped(pid: int) -> bool:
    """Whether an orphan, which is our child now, has ended."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return not Path(f"/proc/{pid}").exists()


def copy_blobs(image: oracle.Image, folder: Path) -> Path:
    """A copy of an image's blobs, to be damaged."""
    shutil.copytree(image.blobs, folder)
    return folder


def device_of(daemon: Daemon) -> str:
    """The device number of what is mounted."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next(line.split()[2] for line in lines if line.split()[4] == str(daemon.mountpoint))


def state_file(daemon: Daemon) -> Path:
    (path,) = (path for path in discipline.runtime.glob("*/state.json") if str(daemon.mountpoint) in path.read_text())
    return path
