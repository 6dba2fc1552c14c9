"""What a server does wrong, one fault at a time: what the reader gets, how often the server was asked, what the log says."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import logging
import time
from email.utils import formatdate

import pytest

from nydusd.errors import (
    BackendError,
    BackendTimeoutError,
    BackendUnavailableError,
    CredentialsRejectedError,
    NoRangeSupportError,
    NoSuchBlobError,
    RangeNotSatisfiableError,
    ThrottledError,
)
from nydusd.storage.backend import make_backend
from nydusd.storage.backend.base import ReadHow
from nydusd.storage.backend.http.breaker import MAX_HOLD, Policy
from nydusd.storage.backend.http.failure import retry_after
from nydusd.storage.backend.registry.backend import RegistryBackend
from tests.backend.one_server import BLOB, PAGE, good, read
from tests.support.backends import QUICK, REPO, Blob, registry_backend
from tests.support.faulty_server import Faulty, Handler, Reply, Request, part_of


def starts(server: Faulty) -> list[int]:
    """The first byte that each request asked for."""
    return [one.range[0] for one in server.requests if one.range is not None]


ONCE: dict[str, tuple[Reply | Handler, int | None]] = {
    "status 500": (Reply(500), 0),
    "status 502": (Reply(502, {}, PAGE), 0),
    "status 503": (Reply(503), 0),
    "status 504": (Reply(504), 0),
    "status 408": (Reply(408), 0),
    "status 429": (Reply(429, {"Retry-After": "0"}), 0),
    "status 503 with Retry-After": (Reply(503, {"Retry-After": "0"}), 0),
    "cut off before the headers": (Reply(silent=True, reset=True), 0),
    "reset in mid-body": (lambda request: part_of(BLOB.data, request, cut=70_000, reset=True), None),
    "body shorter than Content-Length": (lambda request: part_of(BLOB.data, request, cut=70_000), 70_000),
    "stalled body": (lambda request: part_of(BLOB.data, request, stall=70_000), 70_000),
    "other bytes than asked for": (
        lambda request: Reply(206, {"Content-Range": f"bytes 0-149999/{len(BLOB.data)}"}, BLOB.data[:150_000]),
        0,
    ),
    "more bytes than asked for": (
        lambda request: Reply(206, {"Content-Range": f"bytes 1000-299999/{len(BLOB.data)}"}, BLOB.data[1000:]),
        0,
    ),
    "Content-Range that is none": (lambda request: Reply(206, {"Content-Range": "bytes x"}, BLOB.data[:150_000]), 0),
    "206 without Content-Range": (lambda request: Reply(206, {}, BLOB.data[1000:151_000]), 0),
    "Content-Range and Content-Length differ": (
        lambda request: Reply(206, {"Content-Range": f"bytes 1000-150999/{len(BLOB.data)}"}, BLOB.data[1000:150_000]),
        0,
    ),
    "compressed body": (
        lambda request: Reply(200, {"Content-Encoding": "gzip"}, gzip.compress(BLOB.data, 1)),
        0,
    ),
    "page with status 200": (Reply(200, {"Content-Type": "text/html"}, PAGE), 0),
    "page with status 200 and no type": (Reply(200, {}, PAGE[:2000]), 0),
    "page with status 206": (Reply(206, {"Content-Type": "text/html; charset=utf-8"}, PAGE), 0),
    "a short 206": (
        lambda request: Reply(206, {"Content-Range": f"bytes 1000-1999/{len(BLOB.data)}"}, BLOB.data[1000:2000]),
        1000,
    ),
}


@pytest.mark.parametrize("fault", ONCE)
def test_one_fault_costs_one_more_request(
    server: Faulty, backend: RegistryBackend, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    step, kept = ONCE[fault]
    server.program(BLOB.path, step, good)
    assert read(backend) == BLOB.data[1000:151_000]
    assert server.count() == 2
    if kept is not None:
        assert starts(server) == [1000, 1000 + kept]
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert BLOB.id in lines[0] and server.host in lines[0] and "attempt 1" in lines[0]
    assert sum(backend.metrics.retries.values()) == 1


LASTING = {
    "status 400": (Reply(400), BackendError, "status 400"),
    "status 401 without a challenge": (Reply(401), CredentialsRejectedError, "status 401"),
    "status 403": (Reply(403), CredentialsRejectedError, "status 403"),
    "status 404": (Reply(404, {}, PAGE), NoSuchBlobError, "status 404"),
    "status 410": (Reply(410), NoSuchBlobError, "status 410"),
    "status 416": (Reply(416, {"Content-Range": "bytes */500"}), RangeNotSatisfiableError, "bytes */500"),
    "blob too short": (
        Reply(206, {"Content-Range": "bytes 1000-1999/2000"}, BLOB.data[1000:2000]),
        RangeNotSatisfiableError,
        "has 2000 bytes",
    ),
    "redirect without a target": (Reply(302), BackendError, "redirect to nowhere"),
    "redirect to another scheme": (Reply(302, {"Location": "file:///etc/passwd"}), BackendError, "redirect to nowhere"),
    "redirect to a port that is none": (Reply(302, {"Location": "http://a:99999/"}), BackendError, "to nowhere"),
    "status 501": (Reply(501), BackendError, "status 501"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_what_will_not_change_is_asked_once_and_remembered(
    server: Faulty, backend: RegistryBackend, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    reply, error, text = LASTING[fault]
    server.program(BLOB.path, reply)
    with pytest.raises(error) as caught:
        read(backend)
    message = str(caught.value)
    assert type(caught.value) is error
    assert BLOB.id in message and server.host in message and text in message and "attempt 1" in message
    assert message in caplog.text
    for _ in range(3):
        with pytest.raises(error, match="as a moment ago"):
            read(backend)
    assert server.count() == 1
    assert backend.metrics.read_amount == 0 and backend.metrics.read_errors == 4


def test_what_is_remembered_is_so_for_all_workers_of_a_daemon(server: Faulty, backend: RegistryBackend) -> None:
    server.program(BLOB.path, Reply(404))
    with pytest.raises(NoSuchBlobError):
        read(backend)
    with registry_backend(server.host, shared_fd=backend.store.fileno()) as other:
        with pytest.raises(NoSuchBlobError, match="as a moment ago"):
            read(other)
        assert server.count() == 1
        other.timing = backend.timing
        server.program(BLOB.path, good)
        assert read(other, how=ReadHow(bypass=True)) == BLOB.data[1000:151_000], "a bypass asks for itself"


def test_a_blob_that_ends_too_early_does_not_spoil_what_is_there(server: Faulty, backend: RegistryBackend) -> None:
    server.program(BLOB.path, good)
    with pytest.raises(RangeNotSatisfiableError):
        read(backend, len(BLOB.data) - 10, 100)
    with pytest.raises(RangeNotSatisfiableError):
        read(backend, len(BLOB.data) + 10, 100)
    assert read(backend, len(BLOB.data) - 10, 10) == BLOB.data[-10:]


FOR_EVER = {
    "status 500": Reply(500),
    "connection cut": Reply(silent=True, reset=True),
    "wrong Content-Range": Reply(206, {"Content-Range": "bytes 0-9/10"}, bytes(10)),
    "page with status 200": Reply(200, {"Content-Type": "text/html"}, PAGE),
    "compressed": Reply(206, {"Content-Encoding": "br", "Content-Range": "bytes 1000-150999/300000"}, bytes(150_000)),
}


@pytest.mark.parametrize("fault", FOR_EVER)
@pytest.mark.parametrize(("how", "requests"), [(ReadHow(), 4), (ReadHow(prefetch=True), 2)], ids=["user", "prefetch"])
def test_a_lasting_fault_is_tried_a_few_times(
    server: Faulty, backend: RegistryBackend, fault: str, how: ReadHow, requests: int
) -> None:
    server.program(BLOB.path, FOR_EVER[fault])
    with pytest.raises(BackendUnavailableError, match=f"attempt {requests}"):
        read(backend, how=how)
    assert server.count() == requests


def test_the_number_of_retries_is_configured(server: Faulty) -> None:
    backend = make_backend("registry", {"scheme": "http", "host": server.host, "repo": REPO, "retry_limit": 1})
    assert isinstance(backend, RegistryBackend)
    server.program(BLOB.path, Reply(500))
    with pytest.raises(BackendUnavailableError):
        read(backend)
    backend.close()
    assert server.count() == 2


def test_a_connection_that_is_cut_again_and_again_still_delivers(server: Faulty, backend: RegistryBackend) -> None:
    """Bytes in quantity give the retries back: here are more cuts than retries."""
    blob = Blob(1_000_000, seed=2)
    server.program(blob.path, lambda request: part_of(blob.data, request, cut=70_000))
    assert bytes(backend.get_reader(blob.id).read(0, 630_000)) == blob.data[:630_000]
    assert server.count(blob.path) == 9


def test_a_connection_that_gives_next_to_nothing_does_not_go_on_for_ever(
    server: Faulty, backend: RegistryBackend
) -> None:
    server.program(BLOB.path, lambda request: part_of(BLOB.data, request, cut=100))
    with pytest.raises(BackendUnavailableError):
        read(backend)
    assert starts(server) == [1000, 1100, 1200, 1300]


def test_a_slow_body_that_moves_is_waited_for(server: Faulty, backend: RegistryBackend) -> None:
    server.program(BLOB.path, lambda request: part_of(BLOB.data, request, pieces=30_000, pace=0.3))
    assert read(backend) == BLOB.data[1000:151_000], "takes longer than the time-out, which is for each wait"
    assert server.count() == 1


def test_a_server_that_is_too_slow_for_a_long_range_is_asked_for_shorter_ones(
    server: Faulty, backend: RegistryBackend
) -> None:
    blob = Blob(1 << 20)

    def slow(request: Request) -> Reply:
        assert request.range is not None
        first, last = request.range
        return part_of(blob.data, request) if last - first < 300_000 else Reply(silent=True)

    server.handlers[blob.path] = slow
    reader = backend.get_reader(blob.id)

    def lengths() -> list[int]:
        before = len(server.requests)
        assert reader.read(0, 1 << 20) == blob.data
        asked = [one.range for one in server.requests[before:] if one.range is not None]
        return [(last + 1 - first) >> 10 for first, last in asked]

    assert lengths() == [1024, 512, 256, 256, 256, 256]
    assert lengths() == [256] * 4, "what was learnt is forgotten"
    assert lengths() == [512, 256, 256, 256, 256], "what was learnt is never tried anew"


@pytest.mark.parametrize("fault", ["stalled headers", "stalled body", "trickle", "endless redirect to itself"])
def test_the_deadline_of_the_reader_ends_everything(server: Faulty, backend: RegistryBackend, fault: str) -> None:
    steps = {
        "stalled headers": Reply(silent=True),
        "stalled body": Reply(206, {"Content-Range": "bytes 1000-150999/300000"}, bytes(150_000), stall=10),
        "trickle": Reply(206, {"Content-Range": "bytes 1000-150999/300000"}, bytes(150_000), pieces=1, pace=0.01),
        "endless redirect to itself": Reply(429, {"Retry-After": "0"}),
    }
    server.program(BLOB.path, steps[fault])
    how = ReadHow(deadline=time.monotonic() + 0.3)
    with pytest.raises((BackendTimeoutError, ThrottledError)) as caught:
        read(backend, how=how)
    if fault != "endless redirect to itself":
        assert type(caught.value) is BackendTimeoutError
        assert server.count() == 1


@pytest.mark.parametrize(
    ("left", "counted"),
    [pytest.param(-1.0, 0, id="over"), pytest.param(0.2, 0, id="soon"), pytest.param(1.2, 1, id="far")],
)
@pytest.mark.parametrize("stall", [None, 10])
def test_what_readers_have_no_time_for_is_not_held_against_a_host(
    server: Faulty, left: float, counted: int, stall: int | None
) -> None:
    server.default = lambda request: Reply(silent=True) if stall is None else part_of(BLOB.data, request, stall=stall)
    with registry_backend(server.host, timeout=20) as backend:
        for _ in range(2):
            with pytest.raises(BackendTimeoutError):
                read(backend, how=ReadHow(deadline=time.monotonic() + left))
        assert backend.breaker_of(server.url).state()["failures"] == 2 * counted
    assert server.count() == (0 if left < 0 else 2)


def test_a_try_that_has_no_time_left_leaves_the_next_one_to_others(server: Faulty) -> None:
    timing = dataclasses.replace(QUICK, retries=1, breaker=Policy(limit=2, pause=0.01, longest=0.01, trial=60.0))
    server.program(BLOB.path, Reply(500), Reply(500), Reply(silent=True), good)
    with registry_backend(server.host, timing=timing, timeout=20) as backend:
        with pytest.raises(BackendUnavailableError):
            read(backend)
        time.sleep(0.02)
        with pytest.raises(BackendTimeoutError):
            read(backend, how=ReadHow(deadline=time.monotonic() + 0.2))
        time.sleep(0.02)
        with pytest.raises(BackendUnavailableError, match=r"is down .*no time is left") as caught:
            read(backend, how=ReadHow(deadline=time.monotonic() - 1))
        assert caught.value.errno == errno.EIO
        assert read(backend) == BLOB.data[1000:151_000]


def test_a_wait_that_the_deadline_does_not_allow_is_not_begun(server: Faulty, backend: RegistryBackend) -> None:
    server.program(BLOB.path, Reply(429, {"Retry-After": "3000"}))
    with pytest.raises(ThrottledError) as caught:
        read(backend)
    assert caught.value.retry_after == 3000
    with pytest.raises(ThrottledError) as caught:
        read(backend, 5, 6)
    assert 2000 < caught.value.retry_after <= 3000
    assert server.count() == 1, "the second read does not disturb the server"


@pytest.mark.parametrize("days", [-40, 40])
def test_date_to_wait_for_is_by_the_clock_of_the_server(server: Faulty, backend: RegistryBackend, days: int) -> None:
    """Ours may be days away from it: that would be no wait, or one that nobody has the time for."""
    now = time.time() + days * 86400
    date, until = formatdate(now, usegmt=True), formatdate(now + 1, usegmt=True)
    assert retry_after(until, date) == 1
    server.program(BLOB.path, Reply(429, {"Date": date, "Retry-After": until}), good)
    assert read(backend) == BLOB.data[1000:151_000]


@pytest.mark.parametrize("value", ["99999999999999999999", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_nobody_is_asked_to_wait_for_years(server: Faulty, backend: RegistryBackend, value: str) -> None:
    server.program(BLOB.path, Reply(429, {"Retry-After": value}))
    with pytest.raises(ThrottledError) as caught:
        read(backend)
    assert caught.value.retry_after == MAX_HOLD


def test_prefetch_does_not_wait_for_a_server_that_wants_less(server: Faulty, backend: RegistryBackend) -> None:
    server.program(BLOB.path, Reply(429, {"Retry-After": "1"}), good)
    with pytest.raises(ThrottledError):
        read(backend, how=ReadHow(prefetch=True))
    with pytest.raises(ThrottledError):
        read(backend, how=ReadHow(prefetch=True))
    assert server.count() == 1
    assert read(backend) == BLOB.data[1000:151_000], "a user waits"


@pytest.mark.parametrize(("offset", "requests"), [(0, 1), (200_000, 1)])
def test_a_server_without_ranges_is_good_for_the_start_of_a_blob(
    server: Faulty, backend: RegistryBackend, offset: int, requests: int
) -> None:
    server.program(BLOB.path, Reply(200, {}, BLOB.data))
    assert read(backend, offset, 1000) == BLOB.data[offset : offset + 1000]
    assert server.count() == requests
    assert backend.metrics.over_read >= offset


def test_a_server_without_ranges_is_no_good_for_the_rest(server: Faulty, backend: RegistryBackend) -> None:
    blob = Blob(1_200_000)
    server.program(blob.path, Reply(200, {}, blob.data))
    with pytest.raises(NoRangeSupportError, match="whole blob"):
        backend.get_reader(blob.id).read(1_100_000, 10)
    assert server.count() == 1


def test_a_blob_of_another_length_is_refused_once_the_length_is_known(server: Faulty, backend: RegistryBackend) -> None:
    server.program(BLOB.path, good, Reply(200, {}, bytes(400_000)))
    reader = backend.get_reader(BLOB.id)
    reader.read(0, 10)
    with pytest.raises(BackendUnavailableError, match="a body of 400000 bytes"):
        reader.read(0, 10)


def test_a_body_in_chunks_is_understood(server: Faulty, backend: RegistryBackend) -> None:
    chunked = b"".join(
        b"%x\r\n%s\r\n" % (len(part), part) for part in (BLOB.data[1000:90_000], BLOB.data[90_000:151_000])
    )
    headers = {"Transfer-Encoding": "chunked", "Content-Range": f"bytes 1000-150999/{len(BLOB.data)}"}

    def raw(body: bytes) -> Reply:
        return Reply(206, headers, body, length=-1)

    server.program(BLOB.path, raw(chunked[:70_000]), raw(b"zzzz\r\n" + chunked), raw(chunked + b"0\r\n\r\n"))
    server.handlers[BLOB.path] = _whole_ranges(server.handlers[BLOB.path])
    assert read(backend) == BLOB.data[1000:151_000]
    assert server.count() == 3


def _whole_ranges(handler: Handler) -> Handler:
    """Chunked replies are the same whatever was asked for, so the continuation is answered from the blob."""

    def wrapped(request: Request) -> Reply:
        if request.range != (1000, 150_999):
            return good(request)
        return handler(request)

    return wrapped
