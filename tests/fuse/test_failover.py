"""`--failover-policy`, where the journal of a front end that was killed tells nothing: it is of another release."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nydusd.frontends.fuse.journal import NAME
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import wait_until
from tests.support.mounted import Tree

Expect = Callable[..., None]


def spoil_journals(pid: int) -> int:
    """Have what is taken be unknown to this front end's successor; gives how many journals it has."""
    spoiled = 0
    for number in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{number}"
        if os.readlink(path).startswith(f"/memfd:{NAME}"):
            with open(path, "r+b", buffering=0) as journal:
                journal.write(bytes(8))
            spoiled += 1
    return spoiled


class Reader:
    """Reads a file in a thread of its own: `outcome` is its bytes, or why there are none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.outcome: bytes | OSError | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
            try:
                self.outcome = os.pread(fd, 4096, 0)
            finally:
                os.close(fd)
        except OSError as e:
            self.outcome = e

    def join(self) -> bytes | OSError | None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.outcome


@pytest.mark.parametrize("policy", ["none", "resend", "flush"])
def test_what_a_front_end_had_taken_is_sent_again_unless_the_policy_is_none(
    policy: str, tmp_path: Path, expect_log: Expect
) -> None:
    """Flushing is not in the mainline kernel: rather than waiting for ever, reads are sent again."""
    if policy == "none":
        expect_log("what a predecessor had taken is lost: the policy is none")
    tree = Tree(["a", "b"], tmp_path / "tree")
    blobs = {"type": "localfs", "config": {"dir": str(tree.bootstrap.parent / "blobs")}}
    cache = {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}}
    tuning = {"front_ends": 1, "decompress_workers": 1}
    config: dict[str, object] = {"device": {"backend": blobs, "cache": cache}, "mode": "direct", "amplify_io": 0}
    daemon = Daemon(
        tree.bootstrap,
        tmp_path,
        cache=tmp_path / "cache",
        config=config | {"nydusd": tuning},
        args=("--failover-policy", policy),
    )
    with daemon:
        wait_for_role(daemon, "decompress", 1)
        (worker,) = daemon.pids("decompress")
        os.kill(worker, signal.SIGSTOP)
        reader = Reader(daemon.mountpoint / "a")
        wait_until(lambda: daemon.get("/api/v1/nydusd/load")["waiting"] == 1, "a read to wait", 60)  # type: ignore[index]
        (front_end,) = daemon.pids("fuse")
        assert spoil_journals(front_end)
        os.kill(front_end, signal.SIGKILL)
        wait_until(lambda: daemon.pids("fuse") not in ([], [front_end]), "another front end", 60)
        os.kill(worker, signal.SIGCONT)
        other = Reader(daemon.mountpoint / "b")
        assert other.join() == tree.contents["b"][:4096]
        if policy == "none":
            assert reader.outcome is None
        else:
            assert reader.join() == tree.contents["a"][:4096]
    if policy == "none":
        assert isinstance(reader.join(), OSError)
