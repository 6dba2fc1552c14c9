"""Reading blobs from Debian's docker-registry: plain, by TLS with an own authority, with a password, with tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nydusd.errors import BackendError, CredentialsRejectedError, NoSuchBlobError, RangeNotSatisfiableError
from nydusd.storage.backend.registry.backend import RegistryBackend
from tests.support.backends import REPO, Blob, registry_backend
from tests.support.certificates import Authority
from tests.support.registry import AUTH, DockerRegistry, TokenServer, docker_registry

BLOB = Blob(3_000_000)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with docker_registry(tmp_path_factory.mktemp("plain")) as registry:
        registry.push(REPO, BLOB.data, BLOB.id)
        yield registry


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[DockerRegistry]:
    folder = tmp_path_factory.mktemp("secure")
    with docker_registry(folder, authority=authority, auth="htpasswd") as registry:
        registry.push(REPO, BLOB.data, BLOB.id, {"Authorization": f"Basic {AUTH}"})
        yield registry


@pytest.fixture
def tokens(authority: Authority) -> Iterator[TokenServer]:
    tokens = TokenServer(authority)
    yield tokens
    tokens.close()


@pytest.fixture
def by_token(tmp_path: Path, authority: Authority, tokens: TokenServer) -> Iterator[DockerRegistry]:
    with docker_registry(tmp_path / "registry", authority=authority, auth="token", tokens=tokens) as registry:
        access: list[dict[str, object]] = [{"type": "repository", "name": REPO, "actions": ["pull", "push"]}]
        token = tokens.token("shop", access)
        registry.push(REPO, BLOB.data, BLOB.id, {"Authorization": f"Bearer {token}"})
        yield registry


def check(backend: RegistryBackend) -> None:
    reader = backend.get_reader(BLOB.id)
    assert bytes(reader.read(0, len(BLOB.data))) == BLOB.data
    assert bytes(reader.read(1_000_000, 12_345)) == BLOB.data[1_000_000:1_012_345]
    assert bytes(reader.read(len(BLOB.data) - 1, 1)) == BLOB.data[-1:]
    assert backend.get_reader(BLOB.id).blob_size() == len(BLOB.data)


def test_a_plain_registry(plain: DockerRegistry) -> None:
    with registry_backend(plain.host) as backend:
        assert backend.get_reader(BLOB.id).blob_size() == len(BLOB.data)
        check(backend)
        assert backend.metrics.requests == 4
        with pytest.raises(RangeNotSatisfiableError):
            backend.get_reader(BLOB.id).read(len(BLOB.data), 1)
        with pytest.raises(NoSuchBlobError):
            backend.get_reader("0" * 64).read(0, 1)


def test_a_registry_with_a_password_by_tls(secure: DockerRegistry, authority: Authority) -> None:
    options: dict[str, Any] = {"scheme": "https", "ca_cert_files": [str(authority.ca_file)]}
    with registry_backend(secure.host, auth=AUTH, **options) as backend:
        check(backend)
        assert backend.metrics.requests == 4, "one challenge, then three reads; the length was in their answers"
        assert backend.metrics.retries["auth"] == 1
    with registry_backend(secure.host, **options) as backend, pytest.raises(CredentialsRejectedError):
        backend.get_reader(BLOB.id).read(0, 1)


def test_a_certificate_that_nobody_vouches_for(secure: DockerRegistry) -> None:
    with registry_backend(secure.host, scheme="https", auth=AUTH) as backend:
        with pytest.raises(BackendError, match="certificate is not trusted"):
            backend.get_reader(BLOB.id).read(0, 1)
        assert backend.metrics.requests == 1
    with registry_backend(secure.host, scheme="https", auth=AUTH, skip_verify=True) as backend:
        check(backend)


def test_https_becomes_http_only_when_skip_verify_allows_it(
    plain: DockerRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    with registry_backend(plain.host, scheme="https") as backend, pytest.raises(BackendError, match="TLS failed"):
        backend.get_reader(BLOB.id).read(0, 1)
    with registry_backend(plain.host, scheme="https", skip_verify=True) as backend:
        check(backend)
        assert backend.metrics.requests == 4
    assert "asked by http from now on" in caplog.text


@pytest.mark.parametrize("post", [True, False])
def test_a_registry_with_a_token_server(by_token: DockerRegistry, tokens: TokenServer, post: bool) -> None:
    tokens.post = post
    with registry_backend(by_token.host, auth=AUTH) as backend:
        check(backend)
        assert backend.metrics.token_requests == (1 if post else 2)
        assert backend.metrics.requests == 4
    assert [one.method for one in tokens.server.requests] == (["POST"] if post else ["POST", "GET"])


def test_a_token_that_is_configured_is_used_first(by_token: DockerRegistry, tokens: TokenServer) -> None:
    access: list[dict[str, object]] = [{"type": "repository", "name": REPO, "actions": ["pull"]}]
    with registry_backend(by_token.host, registry_token=tokens.token("shop", access)) as backend:
        check(backend)
        assert backend.metrics.requests == 3 and backend.metrics.token_requests == 0
    with registry_backend(by_token.host, registry_token="stale", auth=AUTH) as backend:
        check(backend)
        assert backend.metrics.token_requests == 1


def test_a_wrong_password_is_told_once(by_token: DockerRegistry, tokens: TokenServer) -> None:
    with registry_backend(by_token.host, auth="dXNlcjp3cm9uZy1wYXNzd29yZA==") as backend:
        for blob in (BLOB.id, BLOB.id, "1" * 64):
            with pytest.raises(CredentialsRejectedError):
                backend.get_reader(blob).read(0, 1)
    assert tokens.server.count() == 2, "POST and GET, and then nothing for a while"
