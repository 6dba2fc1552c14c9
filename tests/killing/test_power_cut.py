"""The power fails while a daemon fills its cache: no bit on the disk that is left claims bytes that are not there.

A real daemon has its cache folder on a block device that records (`tests/support/disk.py`). From the recording the disks are
made that a cut may leave, after each write: what was flushed is there, of what was not any part. Nothing of the daemon maps a
file of the cache folder, so what it does there are writes; when those reach the device is the kernel's affair.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nydusd.formats import open_bootstrap
from nydusd.storage.cache.spec import BlobSpec
from nydusd.storage.state.map_file import HEADER_SIZE
from nydusd.storage.state.segment import READY, RECORD, VERIFY, Segment
from tests.killing.scene import read
from tests.support.daemon import Daemon
from tests.support.discipline import wait_until
from tests.support.disk import Disk, Recording, mounted
from tests.support.mounted import CHUNK, Tree
from tests.support.segments import segment_name
from workers.blobs import OpenBlobs
from workers.checkpoint import checkpoint
from workers.fill import fill
from workers.prepare import prepare

NAMES = [f"{number:02}" for number in range(12)]
ALL = os.environ.get("KILL_POINTS") == "all"
CUTS = 14
"""Disks that are looked at, unless KILL_POINTS=all."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: nothing here waits for this machine's disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-k-") as made:
        yield Path(made)


def config(tree: Tree, cache: Path) -> dict[str, object]:
    backend = {"type": "localfs", "config": {"dir": str(tree.bootstrap.parent / "blobs")}}
    device = {"backend": backend, "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}}}
    tuning = {"front_ends": 1, "fetch_workers": 1, "decompress_workers": 1, "checkpoint_interval": 1, "cache_keep": 0}
    return {"device": device, "mode": "direct", "amplify_io": 0, "nydusd": tuning}


def bits_of(tree: Tree, raw: bytes, marker: bool = False) -> list[int]:
    count = len(tree.plain) // CHUNK
    return [i for i in range(count) if marker or raw[i // 8] >> (7 - i % 8) & 1]


def stored(tree: Tree, cache: Path) -> list[int]:
    """The chunks that the map on the disk claims, and those of the record of our own bits."""
    path = cache / f"{tree.blob_id}.blob.data.chunk_map"
    if not path.exists() or not (raw := path.read_bytes())[HEADER_SIZE:]:
        return []
    return bits_of(tree, raw[HEADER_SIZE:], any(raw[12:16]))


def lies(tree: Tree, cache: Path) -> list[int]:
    """Chunks that are claimed and not there."""
    claimed = stored(tree, cache)
    if not claimed:
        return []
    data = cache / f"{tree.blob_id}.blob.data"
    have = data.read_bytes() if data.exists() else b""
    return [i for i in claimed if have[i * CHUNK : (i + 1) * CHUNK] != tree.plain[i * CHUNK : (i + 1) * CHUNK]]


class Blob:
    """The jobs of workers for the tree's blob, in this process."""

    def __init__(self, tree: Tree, cache: Path, segment: str, run: Path) -> None:
        image = open_bootstrap(memoryview(tree.bootstrap.read_bytes()), "bootstrap")
        (info,) = image.blobs
        self.spec = BlobSpec(
            handle=7,
            generation=1,
            info=info,
            segment=segment,
            work_dir=str(cache),
            meta_dir=str(run),
            bootstrap=str(tree.bootstrap),
            path_id=None,
            extracted=False,
            backend="localfs",
            backend_config={"dir": str(tree.bootstrap.parent / "blobs")},
            always_verify=False,
        )
        self.open = OpenBlobs()
        self.known = False

    def do(self, job: Callable[..., dict[str, object]], **more: object) -> dict[str, object]:
        task = {"handle": 7, "spec": None if self.known else self.spec.to_json(), **more}
        self.open.learn(task)
        self.known = True
        return job(self.open, task)


@contextmanager
def blob_of(tree: Tree, cache: Path, folder: Path) -> Iterator[Blob]:
    with segment_name() as name:
        made = Blob(tree, cache, name, folder)
        try:
            yield made
        finally:
            made.open.close()


def judged(tree: Tree, cache: Path, folder: Path) -> list[int]:
    """The chunks that the next daemon has, or looks at before it fetches them; AssertionError unless they are right."""
    with blob_of(tree, cache, folder) as blob:
        blob.do(prepare)
        segment = Segment.open(blob.spec.segment)
        assert segment is not None
        have = (cache / f"{tree.blob_id}.blob.data").read_bytes()
        ready = [chunk for chunk, state in enumerate(bytes(segment.state)) if state in (READY, VERIFY)]
        for chunk in ready:
            _, at, _, size, *_ = RECORD.unpack_from(segment.records, chunk * RECORD.size)
            assert have[at : at + size] == tree.plain[at : at + size], chunk
        segment.close()
        return ready


def disks(recording: Recording, seed: int) -> Iterator[tuple[int, bytes]]:
    """Cuts and what they leave: nothing that was not flushed, and parts of it; all cuts, or some."""
    choose = random.Random(seed)
    cuts = recording.cuts()
    ways = [(cut, way) for cut in cuts for way in (None, choose, choose)]
    for cut, way in ways if ALL else choose.sample(ways, CUTS):
        yield cut, recording.left(cut, way)
    yield len(recording.events), recording.left(len(recording.events), None)


def test_bits_on_the_disk_are_true_whenever_the_power_fails(tree: Tree, folder: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    with Disk(folder) as disk:
        cache = disk.path / "cache"
        with Daemon(tree.bootstrap, folder, cache=cache, config=config(tree, cache)) as daemon:
            for part in (NAMES[:5], NAMES[5:8]):
                for name in part:
                    assert read(daemon.mountpoint / name) == tree.contents[name]
                so_far = NAMES.index(part[-1]) + 1
                wait_until(lambda so_far=so_far: len(stored(tree, cache)) == so_far, "the checkpoint", 60)  # type: ignore[misc]
            daemon.ctl("cache", "gc", "--to", str(4 * CHUNK))
            wait_until(lambda: len(stored(tree, cache)) <= 4, "room", 60)
            for name in NAMES:
                assert read(daemon.mountpoint / name) == tree.contents[name]
        assert len(stored(tree, cache)) == len(NAMES)
        recording = disk.recording()
    claims = []
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-k-") as name:
        left, point = Path(name) / "disk", Path(name) / "mnt"
        for cut, content in disks(recording, seed):
            left.write_bytes(content)
            with mounted(left, point, "rw"):
                where = f"cut after {cut} of {len(recording.events)} events, seed {seed}"
                assert lies(tree, point / "cache") == [], where
                claims.append(len(judged(tree, point / "cache", folder)))
    # A checkpoint that is done outlives any cut: the last disk has lost nothing. (Which bits are ours may not be on it yet.)
    assert claims[-1] == len(NAMES)
    print(f"{len(recording.events)} events, {len(claims)} cuts; chunks that the next daemon has: {sorted(set(claims))}")


def test_recording_shows_a_bit_that_came_before_its_bytes(
    tree: Tree, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would see of a checkpoint that does not wait for the data."""
    with Disk(folder) as disk:
        cache = disk.path / "cache"
        with blob_of(tree, cache, folder) as blob:
            blob.do(prepare)
            blob.do(fill, chunks=list(range(len(NAMES))), verify=[], slot=None, source=None)
            whole, data = os.fdatasync, (cache / f"{tree.blob_id}.blob.data").stat().st_ino

            def careless(fd: int) -> None:
                if os.fstat(fd).st_ino != data:
                    whole(fd)

            monkeypatch.setattr(os, "fdatasync", careless)
            monkeypatch.setattr("workers.checkpoint.flush", lambda _fd: None)
            blob.do(checkpoint)
        recording = disk.recording()
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-k-") as name:
        left, point = Path(name) / "disk", Path(name) / "mnt"
        # It shows after the map's flush, and until the kernel brings the data by itself: from the last cut backwards.
        for cut in sorted(recording.cuts(), reverse=True):
            left.write_bytes(recording.left(cut, None))
            with mounted(left, point, "rw"):
                if lies(tree, point / "cache"):
                    return
    raise AssertionError("no cut has shown it")
