"""SIGKILL of any process of a daemon, at any time, under load: no reader sees a wrong byte or an error."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from bench.image import Built, build
from tests.support.daemon import Daemon, wait_for_role
from tests.support.readers import PIECE
from tests.support.trees import half_random_tree
from tests.support.verifying import Verifying

READERS = 16
FILES = 32
FILE_SIZE = 1 << 20
CHUNK = 1 << 16
ROLES = ("fuse", "fetch", "decompress", "fork server")
SUPERVISOR, BOTH = "supervisor", "supervisor and fuse"
ROUNDS = 1
KILLS = 12


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of many small chunks, so that the cache stays cold for a while; half of each is incompressible."""
    return half_random_tree(tmp_path_factory.mktemp("tree"), FILES, FILE_SIZE, CHUNK)


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tree, tmp_path_factory.mktemp("image"), CHUNK)


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_readers_see_right_bytes_while_processes_are_killed(
    tree: Path, built: Built, tmp_path: Path, round_: int
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    with Daemon(built.bootstrap, built.blob.parent) as daemon:
        strength = {role: wait_for_pool(daemon, role) for role in ROLES}
        with Verifying(daemon.mountpoint, tree, tmp_path, READERS, seed=seed) as readers:
            while not readers.have_ended() and len(readers.doings) < KILLS:
                role = choose.choice((*ROLES, SUPERVISOR, BOTH))
                victim = choose.choice(daemon.pids(role if role in ROLES else "fuse"))
                if role in (SUPERVISOR, BOTH):
                    daemon.kill_supervisor()
                if role != SUPERVISOR:
                    os.kill(victim, signal.SIGKILL)
                readers.doings.append(f"the end of {role} {victim}")
                if role in ROLES:
                    wait_for_role(daemon, role, strength[role], without=victim)
                else:
                    daemon.start()  # the same command: what systemd and snapshotters do
                    for other, count in strength.items():
                        wait_for_role(daemon, other, count)
                readers.go_on(0)
        print(f"{readers.doings}; longest read {readers.longest():.2f} s")
        assert readers.pieces() >= READERS * FILES * FILE_SIZE // PIECE
        assert len(readers.doings) == KILLS


def wait_for_pool(daemon: Daemon, role: str) -> int:
    """The number of processes of a role once all that the daemon starts are there."""
    expected = {"fuse": 2, "fetch": 1, "decompress": 2, "fork server": 2}[role]
    wait_for_role(daemon, role, expected)
    return expected
