"""From a name to a connection: addresses that are gone, dead or slow, and time-outs of each phase."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from nydusd.errors import BackendError, BackendUnavailableError
from nydusd.storage.backend.base import ReadHow
from nydusd.storage.backend.http import resolver
from nydusd.storage.backend.http.failure import Failure, Kind
from nydusd.storage.backend.http.resolver import Resolver
from nydusd.storage.backend.http.transport import Transport
from tests.support.backends import Blob, registry_backend
from tests.support.fault_table import CONNECT, NAMES, rows_of
from tests.support.faulty_server import Faulty, Reply, Request, faulty, part_of

BLOB = Blob(20_000)
NAME = "registry.test"


@pytest.fixture
def server() -> Iterator[Faulty]:
    with faulty() as server:
        server.program(BLOB.path, good)
        yield server


def good(request: Request) -> Reply:
    return part_of(BLOB.data, request)


class Names:
    """The system's resolver, with one name of ours: its addresses, or the error that looking it up gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.fails = False
        self.asked = 0
        real = socket.getaddrinfo

        def look_up(host: str, port: int, **named: int) -> list[object]:
            if host != NAME:
                return list(real(host, port, **named))
            self.asked += 1
            if self.fails:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)


@contextlib.contextmanager
def full_queue() -> Iterator[int]:
    """A port that listens and never accepts: the kernel drops what would begin another connection."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        yield port


def test_a_name_that_is_not_found_any_more_is_still_reached(
    server: Faulty, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each answer closes its connection, so each read needs a new one."""
    assert rows_of(NAMES) == ["host name not found any more"]
    names = Names(monkeypatch, "127.0.0.1")
    server.program(BLOB.path, lambda request: part_of(BLOB.data, request, close=True))
    with registry_backend(f"{NAME}:{server.port}") as backend:
        reader = backend.get_reader(BLOB.id)
        reader.read(0, 10)
        names.fails = True
        for offset in range(5):
            assert bytes(reader.read(offset, 10)) == BLOB.data[offset : offset + 10]
        assert backend.metrics.retries.total() == 0
        assert names.asked == 2, "a look-up that failed is not repeated for a second"
    assert f"{NAME}: look-up failed (Temporary failure in name resolution), using the last address known" in caplog.text


def test_a_look_up_that_fails_first_is_repeated(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "NEGATIVE_SECONDS", 0.0)
    names = Names(monkeypatch, "127.0.0.1")
    plain = Resolver.addresses

    def second_time_lucky(self: Resolver, host: str, port: int) -> list[resolver.Address]:
        names.fails = names.asked == 0
        return plain(self, host, port)

    monkeypatch.setattr(Resolver, "addresses", second_time_lucky)
    with registry_backend(f"{NAME}:{server.port}") as backend:
        assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
        assert backend.metrics.retries["transient"] == 1
    assert names.asked == 2


def test_another_address_is_taken_when_the_first_is_dead(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    Names(monkeypatch, "127.0.0.2", "127.0.0.1")
    with registry_backend(f"{NAME}:{server.port}") as backend:
        assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
        assert backend.metrics.retries.total() == 0


def test_a_host_that_moved_is_found_at_its_new_address(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch, "127.0.0.2")
    with registry_backend(f"{NAME}:{server.port}") as backend:
        with pytest.raises(BackendUnavailableError, match="Connection refused"):
            backend.get_reader(BLOB.id).read(0, 10)
        names.addresses = ["127.0.0.1"]
        assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]


def test_a_connection_that_is_not_accepted_ends_in_time() -> None:
    assert rows_of(CONNECT) == ["connection not accepted"]
    with full_queue() as port:
        host = f"127.0.0.1:{port}"
        with (
            registry_backend(host, connect_timeout=1) as backend,
            pytest.raises(BackendUnavailableError, match=r"no connection to it in time \(attempt 2\)"),
        ):
            backend.get_reader(BLOB.id).read(0, 10, ReadHow(prefetch=True))


@pytest.mark.parametrize("timeout", [0.0, 0.1])
def test_each_wait_is_limited_by_its_time_out_or_by_the_deadline(timeout: float) -> None:
    """A time-out of 0 means none: the deadline ends it then, and who had no second to answer is not to blame."""
    transport = Transport(timeout=timeout, connect_timeout=timeout)
    kind = Kind.TRANSIENT if timeout else Kind.DEADLINE
    with full_queue() as port, faulty() as silent:
        silent.default = lambda request: Reply(silent=True)
        for url in (f"http://127.0.0.1:{port}/", f"{silent.url}/"):
            with pytest.raises(Failure) as caught:
                transport.send("GET", url, {}, time.monotonic() + (60.0 if timeout else 0.2))
            assert caught.value.kind is kind and caught.value.host_failed == bool(timeout)
    transport.close()


def test_https_that_nobody_offers_becomes_http_only_with_skip_verify(caplog: pytest.LogCaptureFixture) -> None:
    with faulty() as gone:
        host = gone.host
    for skip_verify in (False, True):
        caplog.clear()
        with (
            registry_backend(host, scheme="https", skip_verify=skip_verify) as backend,
            pytest.raises(BackendError, match="Connection refused"),
        ):
            backend.get_reader(BLOB.id).read(0, 10)
        assert ("asked by http from now on" in caplog.text) == skip_verify
