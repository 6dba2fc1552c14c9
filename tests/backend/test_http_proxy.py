"""Blobs by their ids from a server near by: over TCP and unix sockets."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from nydusd.errors import BackendError, ConfigError, FormatError, NoSuchBlobError
from nydusd.storage.backend import make_backend
from nydusd.storage.backend.base import BlobBackend, ReadHow
from tests.support.object_server import Reply, object_server

CONTENT = bytes(range(256)) * 400


@contextlib.contextmanager
def backend(addr: str, path: str = "", **more: object) -> Iterator[BlobBackend]:
    made = make_backend("http-proxy", {"addr": addr, "path": path, **more})
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("base", "path", "asked"),
    [
        ("", "", "/b1"),
        ("/", "", "/b1"),
        ("", "/", "/b1"),
        ("", "blobs", "/blobs/b1"),
        ("", "/a/b//c/", "/a/b/c/b1"),
        ("/base/", "/blobs", "/base/blobs/b1"),
        ("", "a b/é", "/a%20b/%C3%A9/b1"),
        ("", "a%20b", "/a%20b/b1"),
    ],
)
def test_paths_over_tcp(base: str, path: str, asked: str) -> None:
    with object_server({unquote(asked): CONTENT}) as server:
        with backend(f"http://{server.address}{base}", path) as made:
            reader = made.get_reader("b1")
            assert reader.blob_size() == len(CONTENT)
            assert reader.read(0, len(CONTENT)) == CONTENT
            assert reader.read(100, 7) == CONTENT[100:107]
        assert {request.path for request in server.asked} == {asked}
        assert [request.method for request in server.asked] == ["HEAD", "GET", "GET"]


@pytest.mark.parametrize(("path", "asked"), [("", "/"), ("/", "/b1"), ("blobs", "/blobs/b1"), ("/blobs/", "/blobs/b1")])
def test_paths_over_a_unix_socket(tmp_path: Path, path: str, asked: str) -> None:
    """Without a path the socket serves one blob: that is how it always was. With one it serves any."""
    with object_server({asked: CONTENT}, socket_path=tmp_path / "socket") as server:
        with backend(server.address, path) as made:
            reader = made.get_reader("b1")
            assert reader.blob_size() == len(CONTENT)
            assert reader.read(100, 7) == CONTENT[100:107]
        assert {request.path for request in server.asked} == {asked}


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_the_status_is_looked_at(tmp_path: Path, kind: str) -> None:
    """An error page must not be taken for the blob, over the socket neither."""
    socket_path = tmp_path / "socket" if kind == "unix" else None
    with object_server({}, socket_path=socket_path) as server:
        addr = server.address if kind == "unix" else f"http://{server.address}"
        with backend(addr, "blobs") as made:
            with pytest.raises(NoSuchBlobError):
                made.get_reader("b1").read(0, 5)
            with pytest.raises(NoSuchBlobError):
                made.get_reader("b2").blob_size()


def test_a_socket_that_comes_later(tmp_path: Path) -> None:
    with backend(str(tmp_path / "socket"), "blobs") as made:
        with pytest.raises(BackendError, match="blob b1"):
            made.get_reader("b1").read(0, 5, ReadHow(deadline=time.monotonic() + 0.2))
        with object_server({"/blobs/b1": CONTENT}, socket_path=tmp_path / "socket"):
            assert made.get_reader("b1").read(0, 5) == CONTENT[:5]
            made.close()


def test_one_connection_serves_many_reads(tmp_path: Path) -> None:
    with (
        object_server({"/x/b1": CONTENT}, socket_path=tmp_path / "socket") as server,
        backend(server.address, "x") as made,
    ):
        for offset in range(20):
            assert made.get_reader("b1").read(offset, 3) == CONTENT[offset : offset + 3]
        assert server.connections == 1


def test_user_and_password_in_the_address_are_sent_and_not_shown() -> None:
    with object_server({"/b1": CONTENT}) as server, backend(f"http://me:SECRET%40WORD@{server.address}") as made:
        assert made.get_reader("b1").read(0, 3) == CONTENT[:3]
        given = server.asked[0].headers["authorization"]
        assert base64.b64decode(given.removeprefix("Basic ")) == b"me:SECRET@WORD"
        server.guard = lambda asked: Reply(403)
        with pytest.raises(BackendError) as caught:
            made.get_reader("b1").read(0, 3)
        assert "SECRET" not in str(caught.value) + repr(made.state())


def test_a_size_without_content_length_is_had_from_a_range() -> None:
    with object_server({"/b1": CONTENT}) as server:
        server.guard = lambda asked: Reply(405) if asked.method == "HEAD" else None
        with backend(f"http://{server.address}") as made:
            assert made.get_reader("b1").blob_size() == len(CONTENT)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"addr": ""}, "'addr' is neither"),
        ({"addr": "ftp://h"}, "'addr' is neither"),
        ({"addr": "http://"}, "'addr' is neither"),
        ({"addr": "http://h:99999"}, "'addr' is neither"),
        ({"addr": "http://h/?x=SECRETWORD"}, "'addr' is neither"),
        ({"addr": "http://u:SECRETWORD@h x/"}, "'addr' is neither"),
        ({"addr": "http://[::1"}, "'addr' is neither"),
        ({"addr": "relative/path"}, "'addr' is neither"),
        ({"addr": "/a\0b"}, "'addr' has a zero byte"),
        ({"addr": "http://h", "path": "a/../b"}, "'path' is"),
        ({"path": "x"}, "addr"),
        ({"addr": 7}, "addr"),
    ],
)
def test_configurations_that_cannot_be_used(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=f"backend http-proxy.*{says}") as caught:
        make_backend("http-proxy", wrong)
    assert "SECRETWORD" not in str(caught.value)


def test_ids_cannot_leave_the_path() -> None:
    with backend("http://h", "blobs") as made:
        for blob_id in ("../b1", "a/b", "b?x=1", "b#", "%2e%2e"):
            with pytest.raises(FormatError, match="blob id"):
                made.get_reader(blob_id)
