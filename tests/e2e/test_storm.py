"""A thousand readers of one chunk that nobody has read before: the backend is asked once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.daemon import Daemon, image_config
from tests.support.oracle import image, truth

CHUNK = 1 << 20
FILE = "sizes/1048577"
"""Its first chunk has 1 MiB of stored bytes: no read of another chunk brings it along."""


def test_thousand_readers_of_one_cold_chunk_are_one_backend_read(tmp_path: Path) -> None:
    chosen = image("v6-none-sha256")
    (tmp_path / "truth").write_bytes(truth(chosen.name)[FILE.encode()])
    config = image_config(chosen.blobs, tmp_path / "cache") | {"amplify_io": 0}  # else it goes on behind the chunk
    with Daemon(chosen.bootstrap, chosen.blobs, config=config) as daemon:
        (daemon.mountpoint / "bigowner").read_bytes()  # so that the blob is open
        before = daemon.backend_reads()
        command = [sys.executable, "-m", "tests.support.readers", "storm", str(daemon.mountpoint / FILE)]
        subprocess.run([*command, str(tmp_path / "truth"), "50", "20", str(CHUNK)], check=True, timeout=120)
        assert daemon.backend_reads() == before + 1
