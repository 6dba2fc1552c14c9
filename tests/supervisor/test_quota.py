"""A daemon with a quota: it keeps to it, and no reader sees a wrong byte while chunks are taken out under it."""

from __future__ import annotations

import itertools
import json
import time
from functools import partial
from pathlib import Path

import pytest

from bench.image import Built, build
from tests.supervisor.lives import IMAGE, config_for, read_direct, wrong
from tests.support import oracle
from tests.support.daemon import Daemon, image_config, wait_for_role
from tests.support.discipline import wait_until
from tests.support.trees import random_tree
from tests.support.verifying import Verifying

CHUNK = 1 << 16
FILES = 12
FILE_SIZE = 1 << 20
TRUTH = oracle.truth(IMAGE.name)


def taken(daemon: Daemon) -> int:
    return sum(path.stat().st_blocks * 512 for path in daemon.cache.glob("*.blob.data"))


def quota_facts(daemon: Daemon) -> dict[str, int]:
    answer = daemon.get("/api/v1/nydusd/quota")
    assert isinstance(answer, dict)
    (facts,) = answer["folders"].values()
    assert isinstance(facts, dict)
    return facts


def order(daemon: Daemon, target: int) -> int:
    """Have room made; gives how many rounds there had been."""
    status, body = daemon.request("PUT", "/api/v1/nydusd/quota", json.dumps({"target": target}).encode())
    assert status == 200
    (facts,) = json.loads(body)["folders"].values()
    return int(facts["rounds"])


def has_rounds(daemon: Daemon, count: int) -> bool:
    return quota_facts(daemon)["rounds"] >= count


def ready(daemon: Daemon) -> int:
    answer = daemon.get("/api/v1/nydusd/cache")
    assert isinstance(answer, dict)
    return int(answer["blobs"][0]["ready"])


class TestQuota:
    def test_unused_blobs_are_removed_and_chunks_taken_out_until_it_is_kept(self, tmp_path: Path) -> None:
        old = tmp_path / "old.blob.data"
        old.write_bytes(b"x" * (4 << 20))
        quota = 1 << 20
        config = config_for(IMAGE, tmp_path, nydusd={"cache_quota": quota, "cache_keep": 1})
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path, config=config) as daemon:
            assert wrong(daemon) == []
            wait_until(lambda: quota_facts(daemon)["evicted_chunks"] > 0 and taken(daemon) <= quota, "the quota", 40)
            assert not old.exists()
            assert quota_facts(daemon)["removed_blobs"] == 1
            assert wrong(daemon) == []

    def test_prefetch_does_not_go_over_it(self, tmp_path: Path) -> None:
        quota = 2 << 20
        prefetch = {"enable": True, "threads_count": 2, "prefetch_all": True}
        config = config_for(IMAGE, tmp_path, nydusd={"cache_quota": quota}, fs_prefetch=prefetch)
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path, config=config) as daemon:
            wait_until(lambda: quota_facts(daemon)["rounds"] >= 2 and taken(daemon) <= quota, "a survey", 40)
            assert read_direct(daemon.mountpoint / "dup/a") == TRUTH[b"dup/a"]

    def test_gc_takes_out_what_was_asked_and_the_next_daemon_knows(self, tmp_path: Path) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path) as daemon:
            assert wrong(daemon) == []
            before = taken(daemon)
            (tmp_path / "other.blob.data").write_bytes(b"x" * 8192)

            def emptied() -> bool:
                daemon.ctl("cache", "gc", "--to", "0")
                return ready(daemon) == 0

            wait_until(emptied, "chunks that were just read to be old enough", 40)
            assert taken(daemon) < before / 4  # blocks that hold pieces of several chunks stay
            assert [path.name for path in tmp_path.glob("other*")] == []
            reads = daemon.backend_reads()
            assert wrong(daemon) == []
            assert daemon.backend_reads() > reads
            daemon.stop()
            daemon.start()
            assert wrong(daemon) == []
            assert daemon.backend_reads() == 0

    def test_gc_without_any_bound_leaves_used_blobs_alone(self, tmp_path: Path) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path) as daemon:
            assert wrong(daemon) == []
            before = taken(daemon)
            assert "0 unused blobs removed, 0 chunks" in daemon.ctl("cache", "gc")
            assert taken(daemon) == before

    def test_two_daemons_in_one_folder_take_nothing_from_each_other(self, tmp_path: Path) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path) as one:
            assert wrong(one) == []
            with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path) as two:
                assert wrong(two) == []
                before = taken(one)
                for _ in range(3):
                    one.ctl("cache", "gc", "--to", "0")
                assert taken(one) == before
                assert wrong(one) == wrong(two) == []


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of many small chunks that differ everywhere: a hole, or another chunk's bytes, cannot pass for them."""
    return random_tree(tmp_path_factory.mktemp("tree"), FILES, FILE_SIZE)


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tree, tmp_path_factory.mktemp("image"), CHUNK)


@pytest.mark.parametrize("kill", ["", "fetch", "fuse"])
def test_readers_see_right_bytes_while_everything_is_taken_out_again_and_again(
    tree: Path, built: Built, tmp_path: Path, kill: str
) -> None:
    """Nothing is kept for being fresh, so chunks go between a reader's look and its read."""
    config = image_config(built.blob.parent, tmp_path / "cache") | {"nydusd": {"cache_keep": 0}}
    with Daemon(built.bootstrap, built.blob.parent, config=config) as daemon:
        evicted = 0
        with Verifying(daemon.mountpoint, tree, tmp_path) as readers:
            deadline = time.monotonic() + 60
            for turn in itertools.count():
                # Readers take a moment to start, and rounds before that find nothing.
                evicted = quota_facts(daemon)["evicted_chunks"]
                enough = turn >= 25 and evicted > FILES * FILE_SIZE // CHUNK
                if readers.have_ended() or enough or time.monotonic() > deadline:
                    break
                rounds = order(daemon, 0)
                wait_until(partial(has_rounds, daemon, rounds + 1), "a round", 30)
                if kill and turn % 8 == 4:
                    victim = daemon.pids(kill)[0]
                    count = len(daemon.pids(kill))
                    daemon.kill(victim)
                    wait_for_role(daemon, kill, count, without=victim)
        assert evicted > FILES * FILE_SIZE // CHUNK
        assert readers.pieces() > 0
