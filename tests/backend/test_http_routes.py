"""Redirects, proxies and mirrors: where requests go, what goes along with them, and what happens when a way is down."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nydusd.errors import BackendError, BackendUnavailableError, CredentialsRejectedError
from nydusd.storage.backend.base import ReadHow
from nydusd.storage.backend.http.breaker import Policy
from nydusd.storage.backend.http.redirect import life_of, target_of
from tests.support.backends import QUICK, Blob, registry_backend
from tests.support.certificates import Authority
from tests.support.faulty_server import Faulty, Handler, Reply, Request, faulty, part_of

BLOB = Blob(50_000)
AUTH = "dXNlcjpjb3JyZWN0LWhvcnNl"  # user:correct-horse


@pytest.fixture
def origin() -> Iterator[Faulty]:
    with faulty() as server:
        server.program(BLOB.path, good)
        yield server


@pytest.fixture
def other() -> Iterator[Faulty]:
    """An object store, a proxy or a mirror."""
    with faulty() as server:
        yield server


def good(request: Request) -> Reply:
    return part_of(BLOB.data, request)


def to(url: str, status: int = 307) -> Reply:
    return Reply(status, {"Location": url})


def with_basic(reply: Reply) -> Handler:
    """Ask for Basic first."""

    def handler(request: Request) -> Reply:
        if request.headers.get("authorization") != f"Basic {AUTH}":
            return Reply(401, {"WWW-Authenticate": 'Basic realm="shop"'})
        return reply

    return handler


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_without_our_credentials_and_remembered(
    origin: Faulty, other: Faulty, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYDUS_HEADER_Cookie", "session=4711")
    origin.handlers[BLOB.path] = with_basic(to(f"{other.url}/data?X-Sig=abc", status))
    other.program("/data", good)
    with registry_backend(origin.host, auth=AUTH) as backend:
        reader = backend.get_reader(BLOB.id)
        for offset in (0, 100, 200):
            assert bytes(reader.read(offset, 50)) == BLOB.data[offset : offset + 50]
        assert backend.metrics.redirect_hits == 2
        assert AUTH not in str(backend.state()) and "abc" not in str(backend.state())
    assert [one.headers.get("authorization") for one in origin.requests] == [None, f"Basic {AUTH}"]
    assert {one.headers.get("cookie") for one in origin.requests} == {"session=4711"}
    assert other.count("/data?X-Sig=abc") == 3
    for one in other.requests:
        assert "authorization" not in one.headers and "cookie" not in one.headers


def test_a_remembered_redirect_serves_all_workers(origin: Faulty, other: Faulty) -> None:
    origin.program(BLOB.path, to(f"{other.url}/data"))
    other.program("/data", good)
    with registry_backend(origin.host) as one, registry_backend(origin.host, one.store.fileno()) as two:
        one.get_reader(BLOB.id).read(0, 10)
        two.get_reader(BLOB.id).read(0, 10)
        assert (origin.count(), other.count()) == (1, 2)
        two.get_reader(BLOB.id).read(0, 10, ReadHow(bypass=True))
        assert (origin.count(), other.count()) == (2, 3), "a bypass asks the registry anew"


@pytest.mark.parametrize("fault", [401, 403, 404, 500, 200, 429])
def test_a_remembered_redirect_that_fails_is_dropped_and_asked_for_anew(
    origin: Faulty, other: Faulty, fault: int
) -> None:
    origin.program(BLOB.path, to(f"{other.url}/old"), to(f"{other.url}/new"))
    other.program("/old", good, Reply(fault, {"Content-Type": "text/html"}, b"<html>expired</html>" * 100))
    other.program("/new", good)
    with registry_backend(origin.host) as backend:
        reader = backend.get_reader(BLOB.id)
        for _ in range(4):
            assert bytes(reader.read(100, 50)) == BLOB.data[100:150]
    assert (other.count("/old"), other.count("/new"), origin.count()) == (2, 3, 2)


def test_a_redirect_is_forgotten_before_it_ends(origin: Faulty, other: Faulty) -> None:
    soon = int(time.time()) + 5
    origin.program(BLOB.path, to(f"{other.url}/data?Expires={soon}"))
    other.program("/data", good)
    with registry_backend(origin.host) as backend:
        for _ in range(3):
            backend.get_reader(BLOB.id).read(0, 10)
    assert (origin.count(), other.count()) == (3, 3), "10 s before the end it is not used any more"


def test_a_host_that_only_redirects_is_up_again_for_all_by_its_first_answer(origin: Faulty, other: Faulty) -> None:
    """Also if the data cannot be had: that is the other host's fault."""
    timing = dataclasses.replace(QUICK, retries=1, breaker=Policy(limit=2, pause=0.01, longest=0.01, trial=60.0))
    origin.program(BLOB.path, Reply(500), Reply(500), to(f"{other.url}/data"))
    other.program("/data", Reply(404), good)
    with registry_backend(origin.host, timing=timing) as backend:
        reader = backend.get_reader(BLOB.id)
        with pytest.raises(BackendUnavailableError):
            reader.read(0, 10)
        with pytest.raises(BackendError, match="404"):
            reader.read(0, 10)
        with registry_backend(origin.host, backend.store.fileno(), timing=timing) as another:
            how = ReadHow(bypass=True, waits=False)
            assert bytes(another.get_reader(BLOB.id).read(0, 10, how)) == BLOB.data[:10]


def test_a_host_that_leads_to_itself_is_up_again_after_an_outage(origin: Faulty) -> None:
    """Its second hop does not wait for what becomes of the try that the first one was."""
    timing = dataclasses.replace(QUICK, retries=1, breaker=Policy(limit=2, pause=0.01, longest=0.01, trial=60.0))
    origin.program(BLOB.path, Reply(500), Reply(500), to(f"{origin.url}/data"))
    origin.program("/data", good)
    with registry_backend(origin.host, timing=timing) as backend:
        reader = backend.get_reader(BLOB.id)
        with pytest.raises(BackendUnavailableError):
            reader.read(0, 10)
        for _ in range(2):
            assert bytes(reader.read(0, 10)) == BLOB.data[:10]


def test_a_mirror_that_only_redirects_is_not_taken_out_by_failures_long_ago(origin: Faulty, other: Faulty) -> None:
    other.program("/v2", Reply(200))
    other.program("/data", good)
    to_data = to(f"{other.url}/data")
    other.program(BLOB.path, Reply(500), to_data, Reply(500), to_data)
    with registry_backend(origin.host, mirrors=[{"host": other.url, "failure_limit": 2}]) as backend:
        for _ in range(4):
            assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
    assert (other.count(BLOB.path), origin.count()) == (4, 2)


def test_redirects_may_be_relative_and_several(origin: Faulty) -> None:
    for hop in range(9):
        origin.program(f"/hop{hop}", to(f"hop{hop + 1}"))
    origin.program(BLOB.path, to("/hop0"))
    origin.program("/hop9", good)
    with registry_backend(origin.host) as backend:
        assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
        assert origin.count() == 11
        assert backend.get_reader(BLOB.id).blob_size() == len(BLOB.data), "HEAD follows, too"


def test_redirects_in_a_circle_end(origin: Faulty) -> None:
    origin.program(BLOB.path, to(BLOB.path))
    with registry_backend(origin.host) as backend:
        with pytest.raises(BackendError, match="more than 10 redirects"):
            backend.get_reader(BLOB.id).read(0, 10)
        assert origin.count() == 11


def test_a_fresh_redirect_that_is_refused_says_so(origin: Faulty, other: Faulty) -> None:
    origin.program(BLOB.path, to(f"{other.url}/data?X-Amz-Signature=SECRET"))
    other.program("/data", Reply(403))
    with registry_backend(origin.host) as backend, pytest.raises(CredentialsRejectedError) as caught:
        backend.get_reader(BLOB.id).read(0, 10)
    assert other.host in str(caught.value) and "SECRET" not in str(caught.value)
    assert (origin.count(), other.count()) == (1, 1)


def test_scheme_and_host_of_redirects_are_replaced_as_configured(origin: Faulty, other: Faulty) -> None:
    origin.program(BLOB.path, to("https://bucket.internal.invalid:444/data?a=b"))
    other.program("/data", good)
    config: dict[str, Any] = {"blob_url_scheme": "http", "blob_redirected_host": other.host}
    with registry_backend(origin.host, **config) as backend:
        assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
    assert [one.path for one in other.requests] == ["/data?a=b"]


@pytest.mark.parametrize(
    ("config", "follows"), [({}, False), ({"skip_verify": True}, True), ({"blob_url_scheme": "http"}, True)]
)
def test_https_becomes_http_by_a_redirect_only_where_that_is_configured(
    other: Faulty, tmp_path: Path, caplog: pytest.LogCaptureFixture, config: dict[str, Any], follows: bool
) -> None:
    authority = Authority(tmp_path / "tls")
    other.program("/data", good)
    with faulty(authority.server_context()) as secure:
        secure.program(BLOB.path, to(f"{other.url}/data?X-Sig=abc"))
        options = {"scheme": "https", "ca_cert_files": [str(authority.ca_file)], **config}
        with registry_backend(secure.host, **options) as backend:
            reader = backend.get_reader(BLOB.id)
            if follows:
                assert bytes(reader.read(0, 10)) == BLOB.data[:10]
            else:
                with pytest.raises(BackendError, match="status 307"):
                    reader.read(0, 10)
    assert other.count() == int(follows)
    assert ("from https to http" in caplog.text) != follows and "abc" not in caplog.text


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/b", "http://h/b"),
        ("//x/b", "http://x/b"),
        ("https://x/b#frag", "https://x/b"),
        ("ftp://x/b", ""),
        ("javascript:1", ""),
        ("http://x:port/", ""),
        ("http://[::1/b", ""),
        ("a\r\nb", ""),
        ("", ""),
        ("http://x/" + "a" * 20_000, ""),
        ("http://x\\@h/b", ""),
        ("//x\\@h/b", ""),
        ("http://x\\/b", ""),
    ],
)
def test_where_a_redirect_leads(location: str, target: str) -> None:
    assert target_of("http://h/v2/a", location) == target


def test_a_redirect_that_only_looks_like_one_to_us_gets_no_credentials(origin: Faulty, other: Faulty) -> None:
    """By way of another host, which may lead us wherever it likes."""
    origin.handlers[BLOB.path] = with_basic(to(f"{other.url}/data"))
    other.program("/data", to(f"{other.url}\\@{origin.host}/stolen"))
    with registry_backend(origin.host, auth=AUTH) as backend, pytest.raises(BackendError):
        backend.get_reader(BLOB.id).read(0, 10)
    assert {one.path for one in other.requests} == {"/data"}
    assert not any("authorization" in one.headers for one in other.requests)


def test_how_long_a_signed_url_is_good_for() -> None:
    now = time.time()
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    azure = time.strftime("%Y-%m-%dT%H%%3A%M%%3A%SZ", time.gmtime(now + 100))
    about_90 = [
        f"https://x/y?X-Amz-Date={stamp}&X-Amz-Expires=100",
        f"https://x/y?x-goog-date={stamp}&x-goog-expires=100",
        f"https://x/y?Expires={int(now) + 100}&Signature=x",
        f"https://x/y?se={azure}&sig=x",
    ]
    for url in about_90:
        assert 85 < life_of(url) < 92, url
    assert life_of("https://x/y") == life_of("https://x/y?Expires=soon") == 300
    assert life_of("https://x/y?Expires=5") == 0
    assert life_of("https://x/y?Expires=99999999999") == 86400


def test_every_byte_comes_by_the_proxy_while_it_works(origin: Faulty, other: Faulty) -> None:
    """A Dragonfly daemon as a forward proxy: the origin is not reachable for us at all."""
    other.default = good
    with registry_backend("registry.invalid", proxy={"url": other.url, "fallback": False}) as backend:
        reader = backend.get_reader(BLOB.id)
        assert bytes(reader.read(0, len(BLOB.data))) == BLOB.data
        reader.read(5, 5, ReadHow(prefetch=True))
        assert reader.blob_size() == len(BLOB.data)
    assert [one.path for one in other.requests] == [f"http://registry.invalid{BLOB.path}"] * 2
    assert [one.headers["x-dragonfly-priority"] for one in other.requests] == ["6", "3"]
    assert [one.headers["x-dragonfly-prefetch"] for one in other.requests] == ["false", "true"]
    assert {one.headers["x-dragonfly-use-p2p"] for one in other.requests} == {"true"}


def test_use_http_asks_the_proxy_for_http_where_the_registry_is_https(other: Faulty) -> None:
    other.default = good
    with registry_backend("registry.invalid", scheme="https", proxy={"url": other.url, "use_http": True}) as backend:
        assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
    assert other.requests[0].path == f"http://registry.invalid{BLOB.path}"


PROXY_FAULTS = {
    "502": Reply(502),
    "404": Reply(404),
    "403": Reply(403),
    "429 of its own": Reply(429, {"X-Dragonfly-Error-Type": "proxy", "Retry-After": "100"}),
    "page": Reply(200, {"Content-Type": "text/html"}, b"<html>" + bytes(60_000)),
    "cut": Reply(silent=True, reset=True),
    "cut in the body": Reply(206, {"Content-Range": "bytes 0-99/50000"}, bytes(100), cut=0),
    "partial copy": Reply(416),
}


@pytest.mark.parametrize("fault", PROXY_FAULTS)
def test_what_a_proxy_does_wrong_is_asked_for_at_the_origin(origin: Faulty, other: Faulty, fault: str) -> None:
    other.default = lambda request: PROXY_FAULTS[fault]
    with registry_backend(origin.host, proxy={"url": other.url}) as backend:
        assert bytes(backend.get_reader(BLOB.id).read(0, 100)) == BLOB.data[:100]
        assert not backend.metrics.retries["transient"] and backend.metrics.retries["route"] == 1
    assert (origin.count(), other.count()) == (1, 1)
    assert "x-dragonfly-use-p2p" not in origin.requests[0].headers


def test_a_proxy_that_forbids_is_obeyed(origin: Faulty, other: Faulty) -> None:
    other.default = lambda request: Reply(403, {"X-Dragonfly-Error-Type": "proxy"})
    with registry_backend(origin.host, proxy={"url": other.url}) as backend, pytest.raises(BackendError, match="403"):
        backend.get_reader(BLOB.id).read(0, 100)
    assert (origin.count(), other.count()) == (0, 1)


def test_prefetch_gives_up_when_the_proxy_wants_less(origin: Faulty, other: Faulty) -> None:
    other.default = lambda request: PROXY_FAULTS["429 of its own"]
    with registry_backend(origin.host, proxy={"url": other.url}) as backend, pytest.raises(BackendUnavailableError):
        backend.get_reader(BLOB.id).read(0, 100, ReadHow(prefetch=True))
    assert (origin.count(), other.count()) == (0, 1)


def test_a_dead_proxy_is_left_alone_after_three_failures_by_all_workers(origin: Faulty) -> None:
    with faulty() as gone:
        proxy = {"url": gone.url, "check_interval": 1000}
    with registry_backend(origin.host, proxy=proxy) as one:
        for _ in range(5):
            assert bytes(one.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
        assert one.metrics.retries["route"] == 3
        with registry_backend(origin.host, one.store.fileno(), proxy=proxy) as two:
            two.get_reader(BLOB.id).read(0, 10)
            assert two.metrics.retries["route"] == 0
            states = two.state()["routes"]
            assert isinstance(states, dict) and states[f"proxy {gone.url}"]["state"] == "open"


def test_a_dead_proxy_without_fallback_never_reaches_the_origin(origin: Faulty) -> None:
    with faulty() as gone:
        proxy = {"url": gone.url, "fallback": False}
    with registry_backend(origin.host, proxy=proxy) as backend:
        for how in (ReadHow(), ReadHow(bypass=True), ReadHow(prefetch=True)):
            with pytest.raises(BackendUnavailableError):
                backend.get_reader(BLOB.id).read(0, 10, how)
    assert origin.count() == 0


def test_a_bypass_goes_past_the_proxy(origin: Faulty, other: Faulty) -> None:
    with registry_backend(origin.host, proxy={"url": other.url}) as backend:
        assert bytes(backend.get_reader(BLOB.id).read(0, 10, ReadHow(bypass=True))) == BLOB.data[:10]
    assert (origin.count(), other.count()) == (1, 0)


def test_the_ping_says_when_a_proxy_is_back(origin: Faulty, other: Faulty) -> None:
    other.program("/ping", Reply(500), Reply(200))
    other.default = lambda request: Reply(502)
    with registry_backend(origin.host, proxy={"url": other.url, "ping_url": f"{other.url}/ping"}) as backend:
        reader = backend.get_reader(BLOB.id)
        for _ in range(4):
            reader.read(0, 10)
        assert other.count("/ping") == 1, "not pinged again before its time"
        assert (other.count("http://"), origin.count()) == (2, 4), "a failed ping and two failed requests take it out"
        other.default = good
        backend.store.drop(f"checked:{next(iter(backend.routes.state()))}")
        reader.read(0, 10)
        assert (other.count("/ping"), other.count("http://"), origin.count()) == (2, 3, 4)


def test_the_password_of_a_proxy_goes_to_the_proxy_only(
    origin: Faulty, other: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    other.default = lambda request: Reply(502)
    url = other.url.replace("://", "://user:hunter2hunter2@")
    with registry_backend(origin.host, proxy={"url": url}) as backend:
        backend.get_reader(BLOB.id).read(0, 10)
        assert "hunter2" not in str(backend.state())
    assert other.requests[0].headers["proxy-authorization"].startswith("Basic ")
    assert "proxy-authorization" not in origin.requests[0].headers
    assert "hunter2" not in caplog.text


def test_a_mirror_is_asked_first_with_its_own_headers(origin: Faulty, other: Faulty) -> None:
    other.program(BLOB.path, good)
    other.program("/v2", Reply(200))
    mirror = {"host": other.url, "headers": {"X-Dragonfly-Registry": "https://registry.example"}}
    with registry_backend(origin.host, mirrors=[mirror]) as backend:
        for _ in range(3):
            assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
        backend.get_reader(BLOB.id).read(0, 10, ReadHow(bypass=True))
    assert (other.count(BLOB.path), other.count("/v2", "GET") - 3, origin.count()) == (3, 1, 1)
    assert other.requests[-1].headers["x-dragonfly-registry"] == "https://registry.example"


@pytest.mark.parametrize("status", [401, 404, 500])
def test_what_a_mirror_does_not_have_comes_from_the_origin(origin: Faulty, other: Faulty, status: int) -> None:
    other.program("/v2", Reply(200))
    other.program(BLOB.path, Reply(status))
    with registry_backend(origin.host, mirrors=[{"host": other.url, "failure_limit": 2}]) as backend:
        for _ in range(4):
            assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
    assert origin.count() == 4
    assert other.count(BLOB.path) == (2 if status == 500 else 4), "server errors take it out, a 404 does not"


def test_two_mirrors_are_tried_in_turn(origin: Faulty, other: Faulty) -> None:
    with faulty() as second:
        second.program("/v2", Reply(401))
        second.program(BLOB.path, good)
        mirrors = [{"host": other.host}, {"host": second.url}]
        with registry_backend(origin.host, mirrors=mirrors) as backend:
            assert bytes(backend.get_reader(BLOB.id).read(0, 10)) == BLOB.data[:10]
        assert (origin.count(), second.count(BLOB.path)) == (0, 1)
