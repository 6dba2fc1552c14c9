"""Two images with a layer in common, in one daemon and in two: one of them does not list what an upper layer replaced."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from nydusd.formats import open_bootstrap
from tests.image.build import image
from tests.supervisor.lives import read_direct
from tests.support.daemon import Daemon

ExpectLog = Callable[..., None]
NAMES = ("gone", "keep", "last")


class Made(NamedTuple):
    """`layer` is the image of the lower layer alone, `merged` that of both. `plain`: what the layer's files have."""

    layer: Path
    merged: Path
    blobs: Path
    blob: Path
    plain: dict[str, bytes]


@pytest.fixture(scope="module", params=["5", "6"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("shared")
    source = random.Random(7)
    plain = {name: source.randbytes(60_000) for name in NAMES}
    trees = {"lower": plain, "upper": {"gone": source.randbytes(7_000)}}
    (folder / "blobs").mkdir()
    for layer, files in trees.items():
        (folder / layer).mkdir()
        for name, content in files.items():
            (folder / layer / name).write_bytes(content)
        image(
            "create",
            "--fs-version",
            request.param,
            "-B",
            folder / f"{layer}.boot",
            "-D",
            folder / "blobs",
            folder / layer,
        )
    image("merge", "-B", folder / "merged.boot", folder / "lower.boot", folder / "upper.boot")
    boot = folder / "lower.boot"
    (info,) = open_bootstrap(memoryview(boot.read_bytes()), "lower", None).blobs
    return Made(boot, folder / "merged.boot", folder / "blobs", folder / "blobs" / info.blob_id, plain)


def read(top: Path, name: str) -> bytes:
    return read_direct(top / name)


def test_each_image_is_read_by_its_own_metadata_and_nothing_is_fetched_twice(made: Made) -> None:
    with Daemon(None, made.blobs) as daemon:
        assert daemon.mount("/merged", made.merged, made.blobs)[0] == 204
        assert read(daemon.mountpoint / "merged", "keep") == made.plain["keep"]
        assert read(daemon.mountpoint / "merged", "last") == made.plain["last"]
        assert daemon.mount("/layer", made.layer, made.blobs)[0] == 204
        assert read(daemon.mountpoint / "layer", "keep") == made.plain["keep"]
        assert read(daemon.mountpoint / "layer", "last") == made.plain["last"]
        counts = daemon.get("/api/v1/metrics/backend?id=/layer")
        assert isinstance(counts, dict) and counts["read_count"] == 0
        assert read(daemon.mountpoint / "layer", "gone") == made.plain["gone"]
        assert len(list(daemon.cache.glob(f"{made.blob.name}*.blob.data"))) == 1


def test_chunk_that_the_other_image_cannot_check_is_checked(made: Made, tmp_path: Path, expect_log: ExpectLog) -> None:
    """The merged image's reader has its neighbours read ahead; a damaged chunk among them must not come into the file."""
    expect_log("digest is .* instead of", "a read failed")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in made.blobs.iterdir():
        raw = bytearray(path.read_bytes())
        if path.name == made.blob.name:
            raw[1000] ^= 1  # of "gone", the first file
        (blobs / path.name).write_bytes(raw)
    with Daemon(None, blobs) as daemon:
        assert daemon.mount("/merged", made.merged, blobs)[0] == 204
        assert read(daemon.mountpoint / "merged", "keep") == made.plain["keep"]
        assert daemon.mount("/layer", made.layer, blobs)[0] == 204
        with pytest.raises(OSError, match="Input/output error"):
            read(daemon.mountpoint / "layer", "gone")
        assert read(daemon.mountpoint / "layer", "keep") == made.plain["keep"]


def test_two_daemons_share_a_folder_and_the_next_one_fetches_nothing(made: Made, tmp_path: Path) -> None:
    with Daemon(made.merged, made.blobs, cache=tmp_path) as one, Daemon(made.layer, made.blobs, cache=tmp_path) as two:
        for daemon in (one, two, one):
            assert read(daemon.mountpoint, "keep") == made.plain["keep"]
            assert read(daemon.mountpoint, "last") == made.plain["last"]
        assert read(two.mountpoint, "gone") == made.plain["gone"]
    with Daemon(made.layer, made.blobs, cache=tmp_path) as daemon:
        assert [read(daemon.mountpoint, name) for name in NAMES] == list(made.plain.values())
        assert daemon.backend_reads() == 0
