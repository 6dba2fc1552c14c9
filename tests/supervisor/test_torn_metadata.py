"""Blob metadata in the cache folder that was torn between two mounts of an image: a daemon serves it all the same."""

from __future__ import annotations

import os
from pathlib import Path

from tests.state.test_torn_metadata import opened, places
from tests.supervisor.lives import read_direct, state_file
from tests.support import oracle
from tests.support.daemon import Daemon
from tests.support.damages import damages
from tests.support.discipline import wait_until


def test_it_is_fetched_anew_and_all_is_read_by_that(tmp_path: Path) -> None:
    image = oracle.image("v6-targz-ref")
    blob, _ = opened(image.name)
    work = tmp_path / "cache"
    meta = work / f"{blob.info.blob_id}.blob.meta"
    with Daemon(None, Path("/nonexistent"), cache=work) as daemon:
        prefix = f"nydusd.{state_file(daemon).parent.name}."
        before = shared_memory(prefix)

        def read_all() -> None:
            assert daemon.mount("/i", image.bootstrap, image.blobs) == (204, "")
            for path, content in oracle.truth(image.name).items():
                assert read_direct(daemon.mountpoint / "i" / os.fsdecode(path)) == content, path
            assert daemon.umount("/i") == (204, "")
            wait_until(lambda: shared_memory(prefix) <= before, "the end of what the daemon has of the image", 60)

        read_all()
        good = meta.read_bytes()
        for place in {place.what.split()[0]: place for place in places(blob)}.values():
            at = place.bytes[len(place.bytes) // 3]
            meta.write_bytes(list(damages(good, at))[at % 9])
            # What is read from now on is decoded by what the metadata says.
            (work / f"{blob.info.blob_id}.blob.data").unlink()
            read_all()


def shared_memory(prefix: str) -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(prefix)}
