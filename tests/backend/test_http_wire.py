"""Connections to a server, the breaker that keeps readers from a dead one, and what goes over the wire in good order."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from nydusd.errors import BackendUnavailableError, NoSuchBlobError
from nydusd.storage.backend.http.breaker import Policy
from nydusd.storage.backend.http.fetch import Timing
from nydusd.storage.backend.registry.backend import RegistryBackend
from tests.backend.one_server import BLOB, PAGE, good, read
from tests.support.backends import REPO, registry_backend
from tests.support.faulty_server import Faulty, Handler, Reply, faulty, part_of


def test_one_connection_is_used_again_and_again(server: Faulty, backend: RegistryBackend) -> None:
    server.program(BLOB.path, good)
    for number in range(20):
        assert read(backend, number * 100, 100) == BLOB.data[number * 100 : number * 100 + 100]
    assert backend.get_reader(BLOB.id).blob_size() == len(BLOB.data)
    assert server.connections == 1
    assert sum(backend.state()["connections"].values()) == 1  # type: ignore[attr-defined]


def test_a_server_that_closes_each_connection_costs_no_retry(server: Faulty, backend: RegistryBackend) -> None:
    server.program(BLOB.path, lambda request: part_of(BLOB.data, request, close=True))
    for number in range(5):
        assert read(backend, number, 100) == BLOB.data[number : number + 100]
    assert server.count() == 5 and server.connections == 5
    assert not backend.metrics.retries


def test_a_server_that_is_replaced_is_found_again(server: Faulty, backend: RegistryBackend) -> None:
    """The kept connection is dead then; that is noticed before or costs one retry."""
    server.program(BLOB.path, lambda request: part_of(BLOB.data, request))
    read(backend, 0, 10)
    server._server.cut_all()
    assert read(backend, 0, 10) == BLOB.data[:10]


def test_a_breaker_keeps_readers_from_a_dead_host(server: Faulty) -> None:
    timing = Timing(backoff=0.001, longest_backoff=0.002, longest_wait=0.0, breaker=Policy(5, pause=60.0, longest=60.0))
    with registry_backend(server.host, timing=timing) as backend:
        server.program(BLOB.path, Reply(503))
        for _ in range(10):
            with pytest.raises(BackendUnavailableError):
                read(backend)
        assert server.count() == 5
        with pytest.raises(BackendUnavailableError, match=r"is down \(.*\), so it was not asked") as caught:
            read(backend)
        assert caught.value.retry_after > 10
        hosts = backend.state()["hosts"]
        assert isinstance(hosts, dict) and hosts[server.url]["state"] == "open"


READER = """
import dataclasses, sys
from nydusd.errors import BackendError
from nydusd.storage.backend import make_backend
from nydusd.storage.backend.http.breaker import Policy
from nydusd.storage.backend.http.fetch import Timing
fd, host, repo, blob = int(sys.argv[1]), *sys.argv[2:]
backend = make_backend("registry", {"scheme": "http", "host": host, "repo": repo, "timeout": 10}, fd)
backend.timing = Timing(backoff=0.001, longest_backoff=0.002, longest_wait=0.0, breaker=Policy(5, 60.0, 60.0))
print("ready", flush=True)
sys.stdin.readline()
failed = 0
for number in range(25):
    try:
        backend.get_reader(blob).read(number, 10)
    except BackendError:
        failed += 1
print(failed, flush=True)
"""


def test_a_storm_of_readers_on_a_dead_origin_is_a_bounded_number_of_requests(server: Faulty) -> None:
    """8 processes with 25 reads each, which would be 800 requests with their retries."""
    server.program(BLOB.path, Reply(500))
    fd = os.memfd_create("shared")
    arguments = [sys.executable, "-c", READER, str(fd), server.host, REPO, BLOB.id]
    workers = [
        subprocess.Popen(arguments, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        assert [worker.stdout.readline() for worker in workers if worker.stdout] == ["25\n"] * 8
    finally:
        for worker in workers:
            worker.communicate()
        os.close(fd)
    # Five open the breaker; each of the others may have had one under way then.
    assert 5 <= server.count() <= 5 + 7


def test_an_origin_that_comes_back_serves_readers_that_waited(server: Faulty) -> None:
    timing = Timing(backoff=0.001, longest_backoff=0.002, longest_wait=10.0, breaker=Policy(2, pause=0.1, longest=0.1))
    with registry_backend(server.host, timing=timing) as backend:
        server.program(BLOB.path, *[Reply(silent=True, reset=True)] * 3, good)
        assert read(backend) == BLOB.data[1000:151_000]
        assert server.count() == 4


def test_a_breaker_lets_one_request_through_after_its_pause_and_closes_if_that_is_well(server: Faulty) -> None:
    timing = Timing(backoff=0.001, longest_backoff=0.002, longest_wait=5.0, breaker=Policy(3, pause=0.05, longest=0.05))
    with registry_backend(server.host, timing=timing) as backend:
        server.program(BLOB.path, Reply(500), Reply(500), Reply(500), good)
        assert read(backend) == BLOB.data[1000:151_000], "waits until it may"
        assert server.count() == 4
        hosts = backend.state()["hosts"]
        assert isinstance(hosts, dict) and hosts[server.url]["state"] == "closed"


def test_nobody_listens(server: Faulty) -> None:
    with faulty() as gone:
        host = gone.host
    refused = r"no connection to it \(Connection refused\) \(attempt 4\)"
    with registry_backend(host) as backend, pytest.raises(BackendUnavailableError, match=refused):
        read(backend)


def test_a_name_that_cannot_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with registry_backend("registry.invalid") as backend, pytest.raises(BackendUnavailableError, match="looked up"):
        read(backend)


SIZES: dict[str, tuple[list[Reply | Handler], list[str]]] = {
    "by HEAD": ([good], ["HEAD"]),
    "HEAD not allowed": ([Reply(405), good], ["HEAD", "GET"]),
    "HEAD forbidden": ([Reply(403), good], ["HEAD", "GET"]),
    "HEAD without a length": ([Reply(200, {}, b"", length=-1), good], ["HEAD", "GET"]),
    "HEAD fails once": ([Reply(500), good], ["HEAD", "HEAD"]),
    "HEAD answered by a page": ([Reply(200, {"Content-Type": "text/html"}, PAGE), good], ["HEAD", "GET"]),
    "no ranges either": ([Reply(501), Reply(200, {}, BLOB.data)], ["HEAD", "GET"]),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_length_of_a_blob_is_found(server: Faulty, backend: RegistryBackend, case: str) -> None:
    steps, methods = SIZES[case]
    server.program(BLOB.path, *steps)
    assert backend.get_reader(BLOB.id).blob_size() == len(BLOB.data)
    assert [one.method for one in server.requests] == methods
    assert backend.get_reader(BLOB.id).blob_size() == len(BLOB.data)
    assert server.count() == len(methods), "it is remembered"


def test_the_length_of_a_blob_that_is_not_there(server: Faulty, backend: RegistryBackend) -> None:
    with pytest.raises(NoSuchBlobError):
        backend.get_reader(BLOB.id).blob_size()
    assert server.count() == 1


def test_what_every_request_carries(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYDUS_HEADER_X-Cluster", "blue")
    monkeypatch.setenv("NYDUS_HEADER_Bad Name", "x")
    monkeypatch.setenv("NYDUS_HEADER_X-Split", "a\r\nInjected: yes")
    with registry_backend(server.host) as backend:
        server.program(BLOB.path, good)
        read(backend)
    headers = server.requests[0].headers
    assert re.fullmatch(r"nydusd/\d+\.\d+\.\d+", headers["user-agent"])
    assert headers["accept-encoding"] == "identity"
    assert headers["x-cluster"] == "blue"
    assert "bad name" not in headers and "x-split" not in headers and "injected" not in headers
    assert "authorization" not in headers and "x-dragonfly-use-p2p" not in headers


def test_bytes_reach_the_callers_buffer_without_a_copy_in_between(server: Faulty, backend: RegistryBackend) -> None:
    """Most of a long body must be received by calls that are handed a part of the caller's own memory."""
    import ctypes

    from nydusd.storage.backend.http import transport

    server.program(BLOB.path, good)
    buf = bytearray(200_000)
    start = ctypes.addressof((ctypes.c_char * 1).from_buffer(buf))
    into_buf = 0
    plain = transport._Source.readinto

    def spy(self: transport._Source, view: memoryview) -> int | None:
        nonlocal into_buf
        address = ctypes.addressof((ctypes.c_char * 1).from_buffer(view))
        count = plain(self, view)
        if start <= address < start + len(buf):
            into_buf += count or 0
        return count

    transport._Source.readinto = spy  # type: ignore[method-assign,assignment]
    try:
        backend.get_reader(BLOB.id).read_into(memoryview(buf), 0)
    finally:
        transport._Source.readinto = plain  # type: ignore[method-assign]
    assert buf == BLOB.data[:200_000]
    assert into_buf > 180_000
