"""Credentials and tokens of registries: asked for once, renewed in time, never shown, never sent to anybody else."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.config.model import Registry
from nydusd.errors import (
    BackendError,
    BackendTimeoutError,
    BackendUnavailableError,
    ConfigError,
    CredentialsRejectedError,
)
from nydusd.storage.backend.base import ReadHow
from nydusd.storage.backend.http.breaker import Policy
from nydusd.storage.backend.http.fetch import Timing
from nydusd.storage.backend.registry.challenge import Challenge, parse_challenges
from nydusd.storage.backend.registry.credentials import CredentialSource
from tests.support.backends import QUICK, REPO, Blob, registry_backend
from tests.support.certificates import Authority
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


def table(hub: Hub) -> Registry:
    return Registry(host=hub.server.host, repo=REPO)


def docker_config(tmp_path: Path, config: object) -> None:
    folder = tmp_path / "docker"
    folder.mkdir(exist_ok=True)
    part = folder / "part"
    part.write_text(config if isinstance(config, str) else json.dumps(config))
    part.rename(folder / "config.json")


READERS = 64
STORM = """
import os, struct, sys
from nydusd.storage.backend import make_backend
from nydusd.storage.backend.registry import backend as _
fd, count, host, repo, auth, blob = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
result, report = os.pipe()
starts = []
for _ in range(count):
    begin, start = os.pipe()
    if not os.fork():
        backend = make_backend("registry", {"scheme": "http", "host": host, "repo": repo, "auth": auth, "timeout": 20}, fd)
        reader = backend.get_reader(blob)
        while os.read(begin, 1) == b"g":
            reader.read(0, 10)
            metrics = backend.metrics
            os.write(report, struct.pack("<II", metrics.token_requests, metrics.requests))
        os._exit(0)
    starts.append(start)
for line in sys.stdin:
    for start in starts:
        os.write(start, b"g")
    counts = [struct.unpack("<II", os.read(result, 8)) for _ in range(count)]
    print(sum(tokens for tokens, _ in counts), sum(requests for _, requests in counts), flush=True)
for start in starts:
    os.write(start, b"q")
for _ in range(count):
    os.wait()
"""


def test_sixty_four_processes_that_meet_a_challenge_at_once_ask_for_one_token(hub: Hub) -> None:
    """Each is a worker with connections of its own; what they share is the store."""
    fd = os.memfd_create("shared")
    arguments = [sys.executable, "-c", STORM, str(fd), str(READERS), hub.server.host, REPO, OLD, BLOB.id]
    with subprocess.Popen(arguments, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as storm:
        os.close(fd)
        assert storm.stdin is not None and storm.stdout is not None

        def go() -> tuple[int, int]:
            assert storm.stdin is not None and storm.stdout is not None
            storm.stdin.write("go\n")
            storm.stdin.flush()
            tokens, requests = storm.stdout.readline().split()
            return int(tokens), int(requests)

        tokens, requests = go()
        assert (tokens, hub.asked, hub.given) == (1, 1, 1)
        assert requests <= 2 * READERS
        hub.good.clear()
        tokens, _ = go()
        assert (tokens, hub.asked, hub.given) == (2, 2, 2), "the token was revoked: one new one for all"
        storm.stdin.close()
        assert storm.wait(30) == 0


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


@pytest.mark.parametrize(("refusal", "asked"), [(Reply(401), 2), (Reply(503), 1)])
def test_a_token_that_is_not_renewed_is_not_asked_for_by_each_read(hub: Hub, refusal: Reply, asked: int) -> None:
    with (
        registry_backend(hub.server.host, auth=OLD) as one,
        registry_backend(hub.server.host, one.store.fileno(), auth=OLD) as two,
    ):
        one.get_reader(BLOB.id).read(0, 10)
        _make_due(one.store)
        before = hub.asked
        hub.server.program("/token", refusal)
        for offset in range(3):
            for backend in (one, two):
                assert bytes(backend.get_reader(BLOB.id).read(offset, 10)) == BLOB.data[offset : offset + 10]
        assert hub.asked - before == asked, "by POST, and by GET if that is refused"


def _make_due(store: object) -> str:
    from nydusd.storage.backend.http.store import KEEP, Entry, SharedStore

    assert isinstance(store, SharedStore)
    key = next(key for key in store._load() if key.startswith("token:"))

    def due(entry: Entry | None) -> tuple[Entry | None, float, None]:
        assert entry is not None
        return {**entry, "renew": 0.0}, KEEP, None

    store.update(key, due)
    return key


@pytest.mark.parametrize("life", [None, "soon", -1, 0, True, 1e300, 10**30, pytest.param(10**400, id="huge")])
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
    from nydusd.storage.backend import make_backend

    with pytest.raises(ConfigError):
        make_backend("registry", {"host": "registry.example", "repo": REPO, **config})
