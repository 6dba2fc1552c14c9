"""Chunk information that comes over HTTP: by a slow link, and damaged on the way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nydusd.errors import FormatError, NoSuchBlobError
from nydusd.storage.backend.http import base
from nydusd.storage.backend.http.fetch import Timing
from nydusd.storage.cache.spec import BlobSpec
from tests.support.backends import REPO
from tests.support.faulty_server import Faulty, Reply, faulty, part_of
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


def _damaged(image: Remote, at: int) -> bytes:
    """The object with one byte wrong, `at` from the start of its chunk information, or from the end of the header."""
    content = bytearray(image.stored)
    content[image.info.ci_offset + (at if at >= 0 else image.info.ci_compressed_size + 4096 + at)] ^= 0xFF
    return bytes(content)


@pytest.mark.parametrize(("name", "at"), [("v6-none-sha256", 3), ("v6-lz4-sha256", 0), ("v6-targz-ref", -1)])
@pytest.mark.parametrize("way", ["mirror", "redirect"])
def test_chunk_information_that_came_damaged_is_asked_for_at_the_origin(
    folder: Path, server: Faulty, name: str, at: int, way: str
) -> None:
    """A record that contradicts the image, a frame that cannot be unpacked, and a header."""
    with faulty() as other:
        other.program("/v2", Reply(200))
        config: dict[str, Any] = {"mirrors": [{"host": other.url}]} if way == "mirror" else {}
        with remote(name, folder, server, **config) as image:
            stored, damaged = image.stored, _damaged(image, at)
            other.program(image.path, lambda request: part_of(damaged, request))
            redirect = Reply(307, {"Location": f"{other.url}{image.path}"})
            good = [lambda request: part_of(stored, request)]
            server.program(image.path, *([redirect] if way == "redirect" else []), *good)
            image.prepare()
            assert len(image.states()) == image.info.chunk_count
            assert (other.count(image.path), server.count()) == (1, 2 if way == "redirect" else 1)
            image.new_daemon()
            image.prepare()
            assert server.count() == (2 if way == "redirect" else 1), "what was stored is sound"


def test_chunk_information_that_is_damaged_at_the_origin_is_asked_for_twice(folder: Path, server: Faulty) -> None:
    with remote("v6-none-sha256", folder, server) as image:
        damaged = _damaged(image, 3)
        server.program(image.path, lambda request: part_of(damaged, request))
        with pytest.raises(FormatError):
            image.prepare()
        assert server.count() == 2 and not image.spec.meta_path.exists()


def test_origin_that_does_not_have_what_a_mirror_gave_damaged_is_what_is_reported(folder: Path, server: Faulty) -> None:
    with faulty() as mirror:
        mirror.program("/v2", Reply(200))
        with remote("v6-none-sha256", folder, server, mirrors=[{"host": mirror.url}]) as image:
            damaged = _damaged(image, 3)
            mirror.program(image.path, lambda request: part_of(damaged, request))
            with pytest.raises(NoSuchBlobError):
                image.prepare()
