"""SIGKILL of any process of `nydusd erofs`, the supervisor too, at any time, under load: not one hole read as data."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from bench.image import Built, build
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import cmdline
from tests.support.readers import PIECE
from tests.support.trees import random_tree
from tests.support.verifying import Verifying

READERS = 8
FILES = 16
FILE_SIZE = 1 << 20
CHUNK = 1 << 14
ROLES = ("erofs", "guard", "fetch", "decompress")
KILLS = int(os.environ.get("NYDUSD_TEST_KILLS", "10"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of many small chunks, so that the cache stays cold for a while; none of them has zeros."""
    return random_tree(tmp_path_factory.mktemp("tree"), FILES, FILE_SIZE)


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tree, tmp_path_factory.mktemp("image"), CHUNK)


@pytest.mark.parametrize("round_", range(-(-KILLS // 5)))
def test_readers_see_right_bytes_while_processes_are_killed(
    tree: Path, built: Built, tmp_path: Path, round_: int
) -> None:
    """Each round has a cold cache: once all is there, nobody is asked any more."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    with (
        Daemon(built.bootstrap, built.blob.parent, verb="erofs") as daemon,
        Verifying(daemon.mountpoint, tree, tmp_path, READERS, seed=seed) as readers,
    ):
        for _ in range(5):
            kill_some(daemon, choose, readers.doings)
            readers.go_on(0)
    print(f"killed {readers.doings}; longest read {readers.longest():.2f} s")
    assert readers.pieces() >= READERS * FILES * FILE_SIZE // PIECE


def kill_some(daemon: Daemon, choose: random.Random, killed: list[str]) -> None:
    """One process, or the supervisor, perhaps together with one of the two others that hold the group."""
    if choose.random() < 0.4:
        also = choose.choice((None, "erofs", "guard"))
        others = [] if also is None else daemon.pids(also)
        daemon.kill_supervisor()
        for pid in others:
            if cmdline(pid).startswith("nydusd: "):
                os.kill(pid, signal.SIGKILL)
        killed.append(f"supervisor and {also}" if also else "supervisor")
        daemon.start()
        return
    role = choose.choice(ROLES)
    pids = daemon.pids(role)
    if pids:
        victim = choose.choice(pids)
        killed.append(role)
        daemon.kill(victim)
        wait_for_role(daemon, role, {"decompress": 2}.get(role, 1), without=victim)
