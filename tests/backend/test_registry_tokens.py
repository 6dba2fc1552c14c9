"""Tokens of registries: asked for once by all who need one, and renewed in time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nydusd.errors import (
    CredentialsRejectedError,
)
from tests.backend.token_hub import BLOB, OLD, Hub
from tests.support.backends import REPO, registry_backend
from tests.support.faulty_server import Reply

pytestmark = pytest.mark.usefixtures("no_docker_of_this_machine", "no_secret_in_any_log_line")


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
