"""Chunk information that comes over HTTP: by a slow link, and damaged on the way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nydusd.storage.backend.http import base
from nydusd.storage.backend.http.fetch import Timing
from nydusd.storage.cache.spec import BlobSpec
from tests.support.backends import REPO
from tests.support.faulty_server import Faulty, faulty, part_of
from tests.support.segments import segment_name
from tests.workers.harness import Jobs
from workers import chunk_info


class Remote(Jobs):
    """The jobs of an image whose blobs a registry has."""

    config: dict[str, Any]

    @property
    def spec(self) -> BlobSpec:
        return dataclasses.replace(super().spec, backend="registry", backend_config=self.config)

    @property
    def stored(self) -> bytes:
        """The object that holds the chunk information."""
        return (self.blobs / self.info.meta_blob_id).read_bytes()

    @property
    def path(self) -> str:
        return f"/v2/{REPO}/blobs/sha256:{self.info.meta_blob_id}"


@contextlib.contextmanager
def remote(name: str, folder: Path, server: Faulty, **config: Any) -> Iterator[Remote]:
    with segment_name() as prefix:
        image = Remote(name, folder, prefix)
        image.config = {"scheme": "http", "host": server.host, "repo": REPO, "timeout": 5, **config}
        try:
            yield image
        finally:
            image.close()


@pytest.fixture
def server() -> Iterator[Faulty]:
    with faulty() as server:
        yield server


def test_chunk_information_behind_a_slow_link_may_take_as_long_as_it_moves(
    folder: Path, server: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_info, "_PIECE", 4096)
    monkeypatch.setattr(base, "Timing", partial(Timing, user=1.5))
    with remote("v6-targz-ref", folder, server) as image:
        size = image.info.ci_compressed_size + 4096
        server.program(image.path, lambda request: part_of(image.stored, request, pieces=500, pace=0.03))
        image.prepare()
        assert len(image.states()) == image.info.chunk_count
        asked = [one.range for one in server.requests if one.range is not None]
        assert sum(last + 1 - first for first, last in asked) == size and len(asked) == -(-size // 4096)
