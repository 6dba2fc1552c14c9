"""Blob ids come from images, so from anybody: none leads to another folder, host, repository or bucket."""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nydusd.errors import FormatError
from nydusd.storage.backend import make_backend
from nydusd.storage.backend.http.base import HttpBackend

KEYS = {"access_key_id": "a", "access_key_secret": "bcde"}
REMOTE: dict[str, tuple[dict[str, object], str]] = {
    "registry": ({"host": "h", "repo": "a/b"}, "https://h/v2/a/b/blobs/sha256:"),
    "s3": ({"endpoint": "e", "region": "r", "bucket_name": "b", "object_prefix": "p/", **KEYS}, "https://e/b/p/"),
    "oss": ({"endpoint": "e", "bucket_name": "b", "object_prefix": "p/", **KEYS}, "https://b.e/p/"),
    "http-proxy": ({"addr": "http://h", "path": "p"}, "http://h/p/"),
}
ids = st.text(max_size=300) | st.text(alphabet="abc./\\%?#@:&\0\r\n ~", max_size=40)


@pytest.fixture(scope="module")
def backends() -> Iterator[dict[str, HttpBackend]]:
    made = {}
    for kind, (config, _) in REMOTE.items():
        backend = make_backend(kind, config)
        assert isinstance(backend, HttpBackend)
        made[kind] = backend
    yield made
    for backend in made.values():
        backend.close()


@given(blob_id=ids)
@example(blob_id="..")
@example(blob_id="../x")
@example(blob_id="x/../../y")
@example(blob_id="%2e%2e%2fx")
@example(blob_id="x?y=1")
@example(blob_id="x#y")
@example(blob_id="x\r\nHost: y")
@example(blob_id="@host/x")
@example(blob_id="b" * 64)
@example(blob_id="b" * 257)
def test_any_id_is_refused_or_is_the_last_part_of_the_url(backends: dict[str, HttpBackend], blob_id: str) -> None:
    for kind, backend in backends.items():
        try:
            backend.get_reader(blob_id)
        except FormatError as error:
            assert "blob id" in str(error) and "\n" not in str(error)
            continue
        base = REMOTE[kind][1]
        parts = urlsplit(backend.blob_url(blob_id))
        assert backend.blob_url(blob_id) == f"{base}{blob_id}"
        assert (parts.netloc, parts.query, parts.fragment) == (urlsplit(base).netloc, "", "")
        assert os.path.normpath(parts.path) == parts.path
