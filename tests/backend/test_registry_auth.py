"""Credentials and tokens of registries: asked for once, renewed in time, never shown, never sent to anybody else."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.errors import BackendError, BackendUnavailableError, CredentialsRejectedError
from nydusd.storage.backend.registry.challenge import Challenge, parse_challenges
from nydusd.storage.backend.registry.credentials import CredentialSource
from tests.support.backends import REPO, Blob, registry_backend
from tests.support.faulty_server import Faulty, Handler, Reply, Request, faulty, part_of

BLOB = Blob(50_000)
SECRETS = ("correct-horse", "battery-staple")


def basic(password: str, user: str = "user") -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


OLD, NEW = basic(SECRETS[0]), basic(SECRETS[1])


class Hub:
    """A registry and its token server in one. Tokens are t1, t2, ...; `good` are those that it takes now."""

    def __init__(self, server: Faulty) -> None:
        self.server = server
        self.users = {OLD}
        self.good: set[str] = set()
        self.given = 0
        self.life: object = 300
        self.status = 401
        server.program(BLOB.path, self._blob)
        server.program("/token", self._token)

    def _blob(self, request: Request) -> Reply:
        if request.headers.get("authorization", "").removeprefix("Bearer ") in self.good:
            return part_of(BLOB.data, request)
        challenge = f'Bearer realm="{self.server.url}/token?a=b",service="the hub",scope="repository:{REPO}:pull"'
        return Reply(self.status, {"WWW-Authenticate": challenge} if self.status == 401 else {})

    def _token(self, request: Request) -> Reply:
        if request.headers.get("authorization", "").removeprefix("Basic ") not in self.users:
            return Reply(401)
        with self.server.lock:
            self.given += 1
            token = f"token-number-{self.given}"
            self.good.add(token)
        return Reply(200, {}, json.dumps({"access_token": token, "expires_in": self.life}).encode())

    @property
    def asked(self) -> int:
        return self.server.count("/token")


@pytest.fixture(autouse=True)
def _no_docker_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


@pytest.fixture(autouse=True)
def _no_secret_in_any_log_line(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level("DEBUG")
    yield
    for secret in (*SECRETS, OLD, NEW, "token-number"):
        assert secret not in caplog.text


@pytest.fixture
def hub() -> Iterator[Hub]:
    with faulty() as server:
        yield Hub(server)


def docker_config(tmp_path: Path, config: object) -> None:
    folder = tmp_path / "docker"
    folder.mkdir(exist_ok=True)
    part = folder / "part"
    part.write_text(config if isinstance(config, str) else json.dumps(config))
    part.rename(folder / "config.json")


READER = """
import sys
from nydusd.storage.backend import make_backend
fd, host, repo, auth, blob = int(sys.argv[1]), *sys.argv[2:]
backend = make_backend("registry", {"scheme": "http", "host": host, "repo": repo, "auth": auth, "timeout": 10}, fd)
reader = backend.get_reader(blob)
print("ready", flush=True)
for line in sys.stdin:
    for offset in range(8):
        reader.read(offset, 10)
    print(backend.metrics.token_requests, backend.metrics.requests, flush=True)
"""


def test_eight_processes_that_meet_a_challenge_at_once_ask_for_one_token(hub: Hub) -> None:
    fd = os.memfd_create("shared")
    arguments = [sys.executable, "-c", READER, str(fd), hub.server.host, REPO, OLD, BLOB.id]
    workers = [
        subprocess.Popen(arguments, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]

    def go() -> list[list[int]]:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        return [[int(part) for part in worker.stdout.readline().split()] for worker in workers if worker.stdout]

    try:
        assert {worker.stdout.readline() for worker in workers if worker.stdout} == {"ready\n"}
        counts = go()
        assert sum(tokens for tokens, _ in counts) == hub.asked == hub.given == 1
        hub.good.clear()
        counts = go()
        assert hub.asked == hub.given == 2, "the token was revoked: one new one for all"
        assert sum(requests for _, requests in counts) <= 2 * 8 * 8 + 2 * 8
    finally:
        for worker in workers:
            worker.communicate()
        os.close(fd)


def test_a_token_is_used_by_all_reads_and_by_the_next_worker(hub: Hub) -> None:
    with (
        registry_backend(hub.server.host, auth=OLD) as one,
        registry_backend(hub.server.host, one.store.fileno(), auth=OLD) as two,
    ):
        for offset in range(5):
            assert bytes(one.get_reader(BLOB.id).read(offset, 10)) == BLOB.data[offset : offset + 10]
        two.get_reader(BLOB.id).read(0, 10)
        assert hub.asked == 1
        assert hub.server.count(BLOB.path) == 7, "one challenge"
        assert "token-number" not in str(one.state())
    request = next(one for one in hub.server.requests if one.path.startswith("/token"))
    assert request.method == "POST" and request.path == "/token?a=b"
    assert (
        "service=the+hub" in request.body.decode()
        and f"scope=repository%3A{REPO.replace('/', '%2F')}" in request.body.decode()
    )


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_ended_is_replaced_once(hub: Hub, status: int) -> None:
    with registry_backend(hub.server.host, auth=OLD) as backend:
        reader = backend.get_reader(BLOB.id)
        reader.read(0, 10)
        hub.good.clear()
        hub.status = status
        assert bytes(reader.read(0, 10)) == BLOB.data[:10]
        assert hub.asked == 2
        assert backend.metrics.retries["auth"] == 2


@pytest.mark.parametrize("status", [401, 403])
def test_a_registry_that_never_lets_us_in_is_not_hammered(hub: Hub, status: int) -> None:
    with registry_backend(hub.server.host, auth=OLD) as backend:
        reader = backend.get_reader(BLOB.id)
        reader.read(0, 10)
        hub.server.program(BLOB.path, Reply(status, {"WWW-Authenticate": f'Bearer realm="{hub.server.url}/token"'}))
        before = hub.server.count(BLOB.path)
        for _ in range(5):
            with pytest.raises(CredentialsRejectedError, match=f"status {status}"):
                reader.read(0, 10)
        assert hub.server.count(BLOB.path) - before == 2
        assert hub.asked == 2


def test_a_token_is_renewed_shortly_before_its_end_by_whoever_uses_it(hub: Hub) -> None:
    with registry_backend(hub.server.host, auth=OLD) as backend:
        reader = backend.get_reader(BLOB.id)
        reader.read(0, 10)
        key = _make_due(backend.store)
        reader.read(0, 10)
        assert (hub.asked, hub.server.count(BLOB.path)) == (2, 3), "no request was refused for it"
        _make_due(backend.store)
        hub.users.clear()
        assert bytes(reader.read(0, 10)) == BLOB.data[:10], "the old one is used while it lasts"
        with backend.store.lock(key, 0.0) as locked:
            assert locked


def _make_due(store: object) -> str:
    from nydusd.storage.backend.http.store import KEEP, Entry, SharedStore

    assert isinstance(store, SharedStore)
    key = next(key for key in store._load() if key.startswith("token:"))

    def due(entry: Entry | None) -> tuple[Entry | None, float, None]:
        assert entry is not None
        return {**entry, "renew": 0.0}, KEEP, None

    store.update(key, due)
    return key


@pytest.mark.parametrize("life", [None, "soon", -1, 0, True, 1e300, 10**30])
def test_a_strange_life_of_a_token_does_no_harm(hub: Hub, life: object) -> None:
    hub.life = life
    with registry_backend(hub.server.host, auth=OLD) as backend:
        for _ in range(3):
            assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
    assert hub.asked == 1


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
    hub.server.program("/token", Reply(503))
    with registry_backend(hub.server.host, auth=OLD) as backend:
        for _ in range(5):
            with pytest.raises(BackendUnavailableError, match="no token"):
                backend.get_reader(BLOB.id).read(0, 10)
    assert hub.asked == 1, "and for some seconds that is known"


@pytest.mark.parametrize("realm", ["", "ftp://x/", "http://[", "http://user:pw@x/", "/token", "http:///x"])
def test_a_token_server_by_no_usable_url_is_an_error(hub: Hub, realm: str) -> None:
    hub.server.program(BLOB.path, Reply(401, {"WWW-Authenticate": f'Bearer realm="{realm}"'}))
    with registry_backend(hub.server.host, auth=OLD) as backend, pytest.raises(BackendError):
        backend.get_reader(BLOB.id).read(0, 10)
    assert hub.server.count() == 1


def test_new_credentials_are_used_from_the_next_read_on(hub: Hub) -> None:
    hub.users = {NEW}
    with registry_backend(hub.server.host, auth=OLD) as backend:
        reader = backend.get_reader(BLOB.id)
        with pytest.raises(CredentialsRejectedError):
            reader.read(0, 10)
        backend.update_credentials(NEW)
        assert bytes(reader.read(0, 10)) == BLOB.data[:10]


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
    ("header", "challenges"),
    [
        ("", []),
        ("Basic", [("basic", {})]),
        ('bearer REALM="http://a/b?c=d",service="e"', [("bearer", {"realm": "http://a/b?c=d", "service": "e"})]),
        ('Bearer realm="a,b=\\"c\\"", scope=""', [("bearer", {"realm": 'a,b="c"', "scope": ""})]),
        (
            'Basic realm=x, Bearer realm="y" , service = z',
            [("basic", {"realm": "x"}), ("bearer", {"realm": "y", "service": "z"})],
        ),
        ("Negotiate, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        ("Negotiate abc==, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        ("Bearer realm=http://a/t", [("bearer", {"realm": "http://a/t"})]),
        (", ,Basic realm=x,,", [("basic", {"realm": "x"})]),
        ('Bearer realm="unterminated', [("bearer", {})]),
        ("\u00e9", []),
    ],
)
def test_challenges(header: str, challenges: list[tuple[str, dict[str, str]]]) -> None:
    assert [(one.scheme, one.params) for one in parse_challenges(header)] == challenges


@given(st.text(alphabet='aA=", \\\t;:/é\x00Bearer', max_size=300))
def test_any_header_is_survived(header: str) -> None:
    for challenge in parse_challenges(header):
        assert isinstance(challenge, Challenge)


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
    from nydusd.errors import ConfigError
    from nydusd.storage.backend import make_backend

    with pytest.raises(ConfigError):
        make_backend("registry", {"host": "registry.example", "repo": REPO, **config})
