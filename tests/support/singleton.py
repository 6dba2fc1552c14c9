"""`Singleton`: a real `nydusd singleton` for tests, and entries for its table of images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support import oracle
from tests.support.blob_entry import blob_entry
from tests.support.daemon import Daemon


class Singleton(Daemon):
    """A daemon without a mount; `entries` are in its configuration file."""

    def __init__(self, *entries: dict[str, object]) -> None:
        super().__init__(None, Path("/nonexistent"))
        config = self.folder / "config.json"
        config.write_text(json.dumps({"blobs": list(entries)}))
        self.command = [sys.executable, "-m", "nydusd", "singleton", "-C", str(config), "-A", str(self.apisock)]

    def serves(self) -> bool:
        if not self.apisock.exists():
            return False
        try:
            return self.request("GET", "/api/v2/daemon", seconds=2.0)[0] == 200
        except OSError:
            return False


def entry(name: str, image: oracle.Image, cache: Path, domain: str = "d") -> dict[str, object]:
    return blob_entry(name, image.bootstrap, image.blobs, cache, domain)
