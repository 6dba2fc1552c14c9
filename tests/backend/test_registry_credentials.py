"""Which credentials a registry is shown: never in a log line, never sent to anybody else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nydusd.errors import (
    ConfigError,
    CredentialsRejectedError,
)
from nydusd.storage.backend.registry.credentials import CredentialSource
from tests.backend.token_hub import BLOB, NEW, OLD, SECRETS, Hub, docker_config
from tests.support.backends import REPO, registry_backend
from tests.support.faulty_server import Handler, Reply, Request, part_of

pytestmark = pytest.mark.usefixtures("no_docker_of_this_machine", "no_secret_in_any_log_line")


def test_what_was_refused_to_one_is_asked_for_as_another_at_once(hub: Hub) -> None:
    """Other credentials make another backend; what the workers share outlives it."""
    hub.users = {NEW}
    with registry_backend(hub.server.host, auth=OLD) as old:
        for _ in range(2):
            with pytest.raises(CredentialsRejectedError):
                old.get_reader(BLOB.id).read(0, 10)
        asked = hub.server.count()
        with registry_backend(hub.server.host, old.store.fileno(), auth=NEW) as new:
            assert bytes(new.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
        with pytest.raises(CredentialsRejectedError, match="as a moment ago"):
            old.get_reader(BLOB.id).read(0, 10)
        assert hub.server.count() - asked <= 3


def test_docker_config_is_used_and_read_again_when_it_is_renewed(hub: Hub, tmp_path: Path) -> None:
    docker_config(tmp_path, {"auths": {"https://other": {"auth": NEW}, hub.server.host: {"auth": OLD}}})
    with registry_backend(hub.server.host) as backend:
        reader = backend.get_reader(BLOB.id)
        reader.read(0, 10)
        hub.users = {NEW}
        hub.good.clear()
        docker_config(
            tmp_path, {"auths": {f"https://{hub.server.host}/v2/": {"username": "user", "password": SECRETS[1]}}}
        )
        assert bytes(reader.read(0, 10)) == BLOB.data[:10]


def test_docker_config_helps_when_the_configured_credentials_ended(hub: Hub, tmp_path: Path) -> None:
    hub.users = {NEW}
    docker_config(tmp_path, {"auths": {hub.server.host: {"auth": NEW}}})
    with registry_backend(hub.server.host, auth=OLD) as backend:
        assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]


def test_a_credential_helper_is_asked_again_when_what_it_gave_is_rejected(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    calls = tmp_path / "calls"
    helper = tmp_path / "docker-credential-vault"
    helper.write_text(
        f'#!/bin/sh\nread host\necho "$1 $host" >> {calls}\n'
        f'printf \'{{"Username": "user", "Secret": "%s"}}\' "$(cat {secret})"\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    docker_config(tmp_path, {"credHelpers": {hub.server.host: "vault"}})
    secret.write_text(SECRETS[0])
    with registry_backend(hub.server.host) as backend:
        reader = backend.get_reader(BLOB.id)
        for _ in range(3):
            reader.read(0, 10)
        assert calls.read_text().splitlines() == [f"get {hub.server.host}"]
        secret.write_text(SECRETS[1])
        hub.users = {NEW}
        hub.good.clear()
        assert bytes(reader.read(0, 10)) == BLOB.data[:10]


@pytest.mark.parametrize(
    "config",
    [
        "no json",
        "[]",
        "[" * 100_000,
        {"auths": 5},
        {"auths": {"HOST": {"auth": "***"}}},
        {"credsStore": "../../bin/sh"},
        {"credsStore": "not-installed"},
        {"credHelpers": {"HOST": 7}, "auths": {"HOST": []}},
    ],
)
def test_a_docker_config_that_is_no_good_is_as_none(hub: Hub, tmp_path: Path, config: object) -> None:
    text = config if isinstance(config, str) else json.dumps(config).replace("HOST", hub.server.host)
    docker_config(tmp_path, text)
    with registry_backend(hub.server.host) as backend, pytest.raises(CredentialsRejectedError):
        backend.get_reader(BLOB.id).read(0, 10)


def test_an_identity_token_of_docker_login_gets_tokens(hub: Hub, tmp_path: Path) -> None:
    docker_config(tmp_path, {"auths": {hub.server.host: {"auth": OLD, "identitytoken": "battery-staple-refresh"}}})
    plain = hub.server.handlers["/token"]

    def refresh(request: Request) -> Reply:
        assert "authorization" not in request.headers
        assert "grant_type=refresh_token&refresh_token=battery-staple-refresh" in request.body.decode()
        return plain(Request("POST", request.path, {"authorization": f"Basic {OLD}"}))

    hub.server.handlers["/token"] = refresh
    with registry_backend(hub.server.host) as backend:
        assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]


def test_docker_hub_is_found_by_its_old_name(tmp_path: Path) -> None:
    docker_config(tmp_path, {"auths": {"https://index.docker.io/v1/": {"auth": OLD}}})
    assert CredentialSource("registry-1.docker.io", "").current().basic == OLD
    assert not CredentialSource("registry.example", "").current()


def test_basic_after_a_rejected_token_of_the_configuration(hub: Hub) -> None:
    def answer(request: Request) -> Reply:
        if request.headers.get("authorization") == f"Basic {OLD}":
            return part_of(BLOB.data, request)
        return Reply(401, {"WWW-Authenticate": "BASIC realm=x"})

    handler: Handler = answer
    hub.server.program(BLOB.path, handler)
    with registry_backend(hub.server.host, auth=OLD, registry_token="token-number-0") as backend:
        assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
    assert [one.headers.get("authorization") for one in hub.server.requests] == [
        "Bearer token-number-0",
        f"Basic {OLD}",
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"host": ""},
        {"host": "a/b"},
        {"host": "user:pw@h"},
        {"host": "h\r\nX: y"},
        {"repo": ""},
        {"repo": "../x"},
        {"repo": "a//b"},
        {"repo": "a?b"},
        {"repo": 5},
        {"ca_cert_files": ["/nonexistent.pem"]},
    ],
)
def test_a_wrong_configuration_is_refused(config: dict[str, object]) -> None:
    from nydusd.storage.backend import make_backend

    with pytest.raises(ConfigError):
        make_backend("registry", {"host": "registry.example", "repo": REPO, **config})
