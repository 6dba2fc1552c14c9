"""The drop-in for `nydusd erofs` under a real systemd, whose fd store holds what must not be closed: no reader sees a hole."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import image_config
from tests.support.discipline import wait_until
from tests.support.mounted import CHUNK, Tree
from tests.systemd.machine import Machine
from tests.systemd.service import UNIT, asked, device, kill, log_of, service, stop_and_look

NAMES = [f"{number:02}" for number in range(8)]
READ = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("open", flush=True)
for _ in sys.stdin:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        print(os.pread(fd, int(sys.argv[2]), 0).hex(), flush=True)
    except OSError as error:
        print("error", error.errno, flush=True)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


@pytest.fixture
def node(tmp_path: Path, tree: Tree) -> Iterator[Machine]:
    """A machine with the service, which fetches nothing but what is read, by one worker; not started yet."""
    config = image_config(tree.bootstrap.parent / "blobs", tmp_path / "cache")
    config |= {"amplify_io": 0, "nydusd": {"decompress_workers": 1, "fetch_workers": 1}}
    with service(tmp_path, tree.bootstrap, config, drop_in="nydusd-erofs.conf") as it:
        yield it


class Reader:
    """A process inside that has a file open, and reads it when it is told to, past the page cache."""

    def __init__(self, node: Machine, path: Path) -> None:
        inside = ["nsenter", "--target", str(node.init()), "--mount", "--pid"]
        command = [*inside, sys.executable, "-c", READ, str(path), str(2 * CHUNK)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "open"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> bytes | int:
        """What was read, or the errno."""
        line = self._line()
        return int(line.split()[1]) if line.startswith("error") else bytes.fromhex(line)

    def read(self) -> bytes | int:
        self.begin()
        return self.end()

    def close(self) -> None:
        self._process.communicate(timeout=60)


def pids(node: Machine, title: str) -> list[str]:
    """Our processes inside, as they are called there."""
    return node.run("pgrep", "-f", f"^nydusd: {title}").stdout.split()


def waiting_reader(node: Machine, path: Path) -> Reader:
    """One that waits for bytes which nobody fetches: the worker is stopped."""
    wait_until(lambda: len(pids(node, "decompress")) == 1, "the worker", 60)
    assert node.run("kill", "-STOP", *pids(node, "decompress")).returncode == 0
    reader = Reader(node, path)
    reader.begin()
    wait_until(lambda: (asked(node, "/api/v1/nydusd/load") or {}).get("waiting", 0) > 0, "the reader to wait", 60)
    return reader


def test_readers_wait_for_the_next_daemon_whatever_is_killed_and_nothing_stays_after_a_stop(
    node: Machine, tree: Tree, tmp_path: Path
) -> None:
    place, contents = tmp_path / "mnt", tree.contents
    node.systemctl("start", UNIT)
    (image,) = asked(node, "/api/v1/nydusd/mounts")["images"]
    assert image["front_end"] == "EROFS with fanotify"
    before = device(node, tmp_path)
    held = Reader(node, place / NAMES[0])
    assert held.read() == contents[NAMES[0]]
    for number, who in enumerate(("main", "all", "all"), 1):
        reader = waiting_reader(node, place / NAMES[number])
        kill(node, who)
        assert reader.end() == contents[NAMES[number]], f"{who} killed"
        assert (reader.read(), held.read()) == (contents[NAMES[number]], contents[NAMES[0]])
        reader.close()
    node.systemctl("restart", UNIT)
    assert held.read() == contents[NAMES[0]]
    held.close()
    late = Reader(node, place / NAMES[4])
    assert late.read() == contents[NAMES[4]]
    late.close()
    assert device(node, tmp_path) == before
    assert "mounting anew" not in log_of(tmp_path).read_text()
    stop_and_look(node, tmp_path)


def test_a_stop_leaves_readers_data_or_an_error_and_then_nothing(node: Machine, tree: Tree, tmp_path: Path) -> None:
    node.systemctl("start", UNIT)
    cached, absent = (Reader(node, tmp_path / "mnt" / name) for name in NAMES[:2])
    assert cached.read() == tree.contents[NAMES[0]]
    node.systemctl("stop", UNIT)
    assert node.run("mountpoint", "-q", str(tmp_path / "mnt")).returncode != 0
    assert cached.read() == tree.contents[NAMES[0]]
    assert absent.read() == errno.EIO
    cached.close()
    absent.close()
    wait_until(lambda: not pids(node, ""), "the end of those that stayed for the readers", 60)
    stop_and_look(node, tmp_path)
