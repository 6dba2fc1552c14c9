"""Servers that give tokens, or give none: their faults cost one registry's reads, and as few requests as can be."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from nydusd.config.model import Registry
from nydusd.errors import (
    BackendError,
    BackendTimeoutError,
    BackendUnavailableError,
    CredentialsRejectedError,
)
from nydusd.storage.backend.base import ReadHow
from nydusd.storage.backend.http.breaker import Policy
from nydusd.storage.backend.http.fetch import Timing
from tests.backend.token_hub import BLOB, OLD, Hub
from tests.support.backends import QUICK, REPO, Blob, registry_backend
from tests.support.certificates import Authority
from tests.support.faulty_server import Reply, faulty, part_of

pytestmark = pytest.mark.usefixtures("no_docker_of_this_machine", "no_secret_in_any_log_line")


def table(hub: Hub) -> Registry:
    return Registry(host=hub.server.host, repo=REPO)


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"{}", b'{"token": 5}', b'{"token": "a\\nb"}', b"[" * 100_000, b"\xff", b"x" * 300_000],
)
def test_a_reply_without_a_token_is_an_error_and_not_asked_for_again_at_once(hub: Hub, body: bytes) -> None:
    hub.server.program("/token", Reply(200, {}, body))
    with registry_backend(hub.server.host, auth=OLD) as backend:
        for _ in range(3):
            with pytest.raises(BackendError, match="no token"):
                backend.get_reader(BLOB.id).read(0, 10)
    assert hub.asked <= 2


def test_a_token_server_that_is_down_is_not_hammered(hub: Hub) -> None:
    timing = Timing(
        backoff=0.001, longest_backoff=0.002, longest_wait=0.01, breaker=Policy(5, pause=60.0, longest=60.0)
    )
    with faulty() as down, registry_backend(hub.server.host, auth=OLD, timing=timing) as backend:
        hub.server.program(BLOB.path, Reply(401, {"WWW-Authenticate": f'Bearer realm="{down.url}/token"'}))
        down.default = lambda request: Reply(503)
        for _ in range(10):
            with pytest.raises(BackendUnavailableError, match="no token"):
                backend.get_reader(BLOB.id).read(0, 10)
        assert down.count() == 5, "then it counts as down, for all workers"
    assert hub.server.count(BLOB.path) == 1, "and the registry is not asked either"


@pytest.mark.parametrize("fault", [Reply(silent=True), Reply(200, {}, b'{"token": "a"}', stall=5)])
def test_a_token_server_that_readers_have_no_time_for_is_not_down(hub: Hub, fault: Reply) -> None:
    right = hub.server.handlers["/token"]
    with faulty() as tokens, registry_backend(hub.server.host, auth=OLD, timeout=20) as backend:
        hub.server.program(BLOB.path, Reply(401, {"WWW-Authenticate": f'Bearer realm="{tokens.url}/token"'}))
        tokens.program("/token", fault, fault, right)
        for _ in range(2):
            with pytest.raises(BackendTimeoutError, match="no token"):
                backend.get_reader(BLOB.id).read(0, 10, ReadHow(deadline=time.monotonic() + 0.2))
        assert tokens.count() == 2 and backend.breaker_of(tokens.url).state()["failures"] == 0
        hub.server.program(BLOB.path, hub._blob)
        assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]


@pytest.mark.parametrize("fault", [Reply(500), Reply(silent=True, reset=True), Reply(429, {"Retry-After": "0"})])
def test_a_token_server_that_fails_once_is_a_delay(hub: Hub, fault: Reply) -> None:
    right = hub.server.handlers["/token"]
    hub.server.program("/token", fault, right)
    with registry_backend(hub.server.host, auth=OLD) as backend:
        assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
    assert hub.asked == 2


def test_what_fails_for_want_of_a_token_is_not_asked_for_past_the_proxy(hub: Hub) -> None:
    hub.server.program("/token", Reply(503))
    with faulty() as proxy:
        proxy.default = lambda request: hub.server.handlers[BLOB.path](request)
        with registry_backend(hub.server.host, auth=OLD, proxy={"url": proxy.url}) as backend:
            with pytest.raises(BackendUnavailableError, match="no token"):
                backend.get_reader(BLOB.id).read(0, 10)
            assert backend.metrics.retries["route"] == 0
    assert hub.server.count(BLOB.path) == 0


@pytest.mark.parametrize("fault", [Reply(401), Reply(503), Reply(429, {"Retry-After": "100"}), Reply(silent=True)])
def test_a_mirror_that_wants_no_token_serves_while_none_is_to_be_had(hub: Hub, fault: Reply) -> None:
    with faulty() as mirror:
        mirror.program("/v2", Reply(200))
        mirror.program(BLOB.path, Reply(404), lambda request: part_of(BLOB.data, request))
        options: dict[str, Any] = {
            "timing": dataclasses.replace(QUICK, longest_wait=20.0),
            "mirrors": [{"host": mirror.url}],
        }
        with registry_backend(hub.server.host, auth=OLD, **options) as backend:
            reader = backend.get_reader(BLOB.id)
            reader.read(0, 10)
            backend.store.drop(next(key for key in backend.store._load() if key.startswith("token:")))
            hub.server.program("/token", fault)
            before = hub.server.count(BLOB.path)
            for offset in range(3):
                assert bytes(reader.read(offset, 10)) == BLOB.data[offset : offset + 10]
        sent = [one.headers.get("authorization", "")[:6] for one in mirror.requests if one.path == BLOB.path]
        assert sent == ["", "", "", ""] and hub.server.count(BLOB.path) == before


def test_what_neither_a_mirror_nor_a_token_server_gives_is_said_of_the_token(hub: Hub) -> None:
    hub.server.program("/token", Reply(401))
    with faulty() as mirror:
        mirror.program("/v2", Reply(200))
        mirror.program(BLOB.path, Reply(401))
        with registry_backend(hub.server.host, auth=OLD, mirrors=[{"host": mirror.url}]) as backend:
            for _ in range(2):
                with pytest.raises(CredentialsRejectedError, match="no token"):
                    backend.get_reader(BLOB.id).read(0, 10)
        assert mirror.count(BLOB.path) == 1


def test_a_dead_token_server_of_one_mount_is_nothing_to_another(hub: Hub) -> None:
    """Both mounts are served by the same workers, which share one store."""
    hub.server.program("/token", Reply(401))
    other = Blob(20_000, seed=7)
    with (
        faulty() as second,
        registry_backend(hub.server.host, auth=OLD) as expired,
        registry_backend(second.host, expired.store.fileno()) as well,
    ):
        second.program(other.path, lambda request: part_of(other.data, request))
        for offset in range(4):
            with pytest.raises(CredentialsRejectedError):
                expired.get_reader(BLOB.id).read(0, 10)
            assert bytes(well.get_reader(other.id).read(offset, 10)) == other.data[offset : offset + 10]
        assert well.metrics.retries.total() == 0
    assert hub.asked == 2, "by POST and by GET"


def test_a_token_server_without_tls_gets_no_credentials_of_a_registry_with_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    with faulty() as plain, faulty(authority.server_context()) as secure:
        secure.program(BLOB.path, Reply(401, {"WWW-Authenticate": f'Bearer realm="{plain.url}/token"'}))
        options: dict[str, Any] = {"scheme": "https", "ca_cert_files": [str(authority.ca_file)]}
        without = pytest.raises(BackendError, match="names a token server without")
        with registry_backend(secure.host, auth=OLD, **options) as backend, without:
            backend.get_reader(BLOB.id).read(0, 10)
        assert plain.count() == 0


@pytest.mark.parametrize("realm", ["", "ftp://x/", "http://[", "http://user:pw@x/", "/token", "http:///x"])
def test_a_token_server_by_no_usable_url_is_an_error(hub: Hub, realm: str) -> None:
    hub.server.program(BLOB.path, Reply(401, {"WWW-Authenticate": f'Bearer realm="{realm}"'}))
    with registry_backend(hub.server.host, auth=OLD) as backend, pytest.raises(BackendError):
        backend.get_reader(BLOB.id).read(0, 10)
    assert hub.server.count() == 1
