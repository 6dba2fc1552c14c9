"""Chunks of remote blobs that kill whoever fetches or decodes them: an error for their readers, and for nobody else."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from bench.image import build
from nydusd.ipc.messages import Json
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.supervisor import transfers
from tests.supervisor.world import World
from tests.support.daemon import Daemon, image_config
from tests.support.discipline import wait_until
from tests.support.faulty_server import faulty, part_of
from tests.support.mounted import REPO
from tests.support.trees import half_random_tree

ROOT = Path(__file__).resolve().parents[2]
A, B = b"fuse-0-1", b"fuse-1-1"
CHUNKS, CHUNK = 4, 1 << 16
FATAL = {"fetch": 1, "fill": 2}
"""By what workers do, the chunk of which they die in the daemon's tests."""


def large_requests(world: World, patch: pytest.MonkeyPatch) -> None:
    """Chunks 0 to 2 are fetched by one request."""
    patch.setattr(transfers, "MIN_REQUEST", 32 << 10)


def work(world: World, is_fatal: Callable[[Json], bool]) -> int:
    """Until all requests are answered, workers end their jobs well, or die of those that are fatal. How many have died."""
    deaths = number = 0
    while world.open:
        number += 1
        assert number < 1000, "this does not end"
        for role in ("fetch", "decompress"):
            world.worker(role, b"%s-%d" % (role.encode(), number))
        world.pump()
        for identity, message in list(world.sent.items()):
            if is_fatal(message):
                deaths += 1
                world.kill(identity)
            else:
                world.finish(identity)
    return deaths


@pytest.mark.parametrize("blob", ["far", "far_dummy"])
@pytest.mark.parametrize("kind", ["fetch", "fill"])
@pytest.mark.parametrize("poison", range(3))
def test_chunk_that_kills_is_found_among_those_that_came_with_it(
    world: World, monkeypatch: pytest.MonkeyPatch, blob: str, kind: str, poison: int
) -> None:
    large_requests(world, monkeypatch)
    cache: BlobCache = getattr(world, blob)
    world.ask(A, 10, cache, 0, 3)
    for chunk in range(3):
        world.ask(B, chunk, cache, chunk, 1)
    deaths = work(world, lambda message: message["kind"] == kind and poison in message["chunks"])
    codes = {number: code for _client, number, code, _slot in world.answers}
    assert codes == {10: errno.EIO} | {chunk: errno.EIO if chunk == poison else 0 for chunk in range(3)}
    assert deaths <= 6
    world.settle()
    assert not world.slots.held() and not world.stage.in_use() and not cache.jobs
    world.ask(A, 11, cache, poison, 1)
    assert world.answers[-1][2] == errno.EIO, "it kills nobody for a minute"


def test_parts_in_shared_memory_lie_beside_each_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    large_requests(world, monkeypatch)
    lives = [3]

    def is_fatal(message: Json) -> bool:
        lives[0] -= message["kind"] == "fill"
        return message["kind"] == "fill" and lives[0] >= 0

    world.ask(A, 1, world.far_dummy, 0, 3)
    assert work(world, is_fatal) == 3
    ((_client, _number, code, slot),) = world.answers
    assert code == 0 and slot is not None
    places = sorted((offset, offset + length) for _chunk, offset, length in slot.chunks)
    assert len(places) == 3
    assert all(end <= start for (_, end), (start, _) in pairwise(places)), places


def test_damaged_chunk_in_a_part_is_fetched_once_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    large_requests(world, monkeypatch)
    world.ask(A, 1, world.far_dummy, 0, 3)
    damaged: list[Json] = []
    number = 0
    while world.open:
        number += 1
        for role in ("fetch", "decompress"):
            world.worker(role, b"%s-%d" % (role.encode(), number))
        world.pump()
        for identity, message in list(world.sent.items()):
            if message["kind"] == "fetch" and len(message["chunks"]) == 3:
                world.kill(identity)
            elif message["kind"] == "fill" and 1 in message["chunks"] and not damaged:
                damaged.append(message)
                world.filled(identity, failed=[1])
            else:
                world.finish(identity)
    assert [code for _client, _number, code, _slot in world.answers] == [0]
    assert [message["chunks"] for message in world.dispatched if message.get("bypass")] == [[1]]


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
def test_chunks_of_a_registry_that_kill_workers_fail_alone(
    tmp_path: Path, cached: bool, expect_log: Callable[..., None]
) -> None:
    expect_log("workers died on it|is given up", "a read failed")
    code = tmp_path / "code"
    for package in ("nydusd", "workers"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, chunk in FATAL.items():
        path = code / "workers" / f"{name}.py"
        start = f"def {name}(blobs: OpenBlobs, job: Json) -> Json:\n"
        text = path.read_text()
        assert text.count(start) == 1
        dies = f"    if {chunk} in job['chunks']:\n        import os\n\n        os.abort()\n"
        path.write_text(text.replace(start, start + dies))
    (tmp_path / "tree").mkdir()
    tree = half_random_tree(tmp_path / "tree", 1, CHUNKS * CHUNK, CHUNK)
    built = build(tree, tmp_path / "image", CHUNK)
    blob = built.blob.read_bytes()
    (wanted,) = (path.read_bytes() for path in tree.iterdir())
    with faulty() as server:
        server.handlers[f"/v2/{REPO}/blobs/sha256:{built.blob.name}"] = lambda request: part_of(blob, request)
        config = image_config(built.blob.parent, tmp_path / "cache")
        device = config["device"]
        assert isinstance(device, dict)
        device["backend"] = {"type": "registry", "config": {"scheme": "http", "host": server.host, "repo": REPO}}
        device["cache"]["type"] = "blobcache" if cached else ""
        environment = {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
        daemon = Daemon(built.bootstrap, tmp_path, cache=tmp_path / "cache", config=config, environment=environment)
        daemon.command.insert(1, "-P")
        with daemon:
            (name,) = os.listdir(daemon.mountpoint)
            fd = os.open(daemon.mountpoint / name, os.O_RDONLY | os.O_DIRECT)
            try:
                with pytest.raises(OSError, match="Input/output error"):
                    os.pread(fd, CHUNKS * CHUNK, 0)
                for chunk in range(CHUNKS):
                    if chunk in FATAL.values():
                        with pytest.raises(OSError, match="Input/output error"):
                            os.pread(fd, CHUNK, chunk * CHUNK)
                    else:
                        assert os.pread(fd, CHUNK, chunk * CHUNK) == wanted[chunk * CHUNK :][:CHUNK], chunk
            finally:
                os.close(fd)
            wait_until(lambda: "is given up" in daemon.log.read_text(), "the line about it", 60)
