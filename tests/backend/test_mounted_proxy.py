"""A mount behind a forward proxy, as a node of a Dragonfly cluster has it; and a registry with TLS through one."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backends import Blob, registry_backend
from tests.support.certificates import Authority
from tests.support.fault_table import FALLBACK, PROXY, rows_of
from tests.support.faulty_server import Faulty, Reply, faulty, part_of
from tests.support.forward_proxy import forward_proxy
from tests.support.mounted import CHUNK, PASSWORD, Hub, Mounted, Tree

NAMES = [f"{number:02}" for number in range(12)]
HALF = len(NAMES) // 2
PAGE = b"<html><body>" + b"This is not what you asked for. " * 4000


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("image"))


@pytest.fixture
def origin(tree: Tree) -> Iterator[Faulty]:
    """The registry, at an address that only the proxy knows."""
    with faulty() as server:
        yield server


def test_all_bytes_come_by_the_proxy_until_it_dies(tree: Tree, origin: Faulty) -> None:
    """The registry's name leads to a port where nobody listens, so there is no way but the proxy; then there is."""
    assert rows_of(FALLBACK) == ["proxy that dies"]
    hub = Hub(tree, origin)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    blocked = f"127.0.0.1:{port}"
    # Tokens never go by the proxy; here they are not needed, so that nothing at all is asked for past it.
    hub.open_to_all = True
    with forward_proxy({blocked: origin.host}) as proxy:
        settings = {"url": proxy.url, "fallback": True, "check_interval": 1}
        with Mounted(tree, {"host": blocked, "proxy": settings}) as mounted:
            assert all(mounted.is_right(name) for name in NAMES[:HALF])
            assert proxy.passed >= HALF * CHUNK, "every byte"
            assert {asked.get("x-dragonfly-use-p2p") for asked in proxy.asked} == {"true"}
            assert not re.search("WARN .*blob", mounted.log())
            proxy.close()
            with faulty(port=port) as reachable:
                direct = Hub(tree, reachable)
                direct.open_to_all = True
                assert all(mounted.is_right(name) for name in NAMES[HALF:])
                assert reachable.count(direct.path) >= len(NAMES) - HALF
                assert not any("x-dragonfly-use-p2p" in request.headers for request in reachable.requests)
            assert re.search(
                rf"blob {tree.blob_id}: {re.escape(blocked)}: no connection by the proxy .*\(attempt 1\), "
                rf"by proxy {re.escape(proxy.url)}; another way is tried",
                mounted.log(),
            )
            assert mounted.wrong_in_cache() == []


def test_a_proxy_may_be_named_without_a_scheme(tree: Tree, origin: Faulty) -> None:
    Hub(tree, origin).open_to_all = True
    blocked = "registry.invalid:5000"  # no name server knows it
    with forward_proxy({blocked: origin.host}) as proxy:
        settings = {"url": proxy.url.removeprefix("http://"), "fallback": False}
        with Mounted(tree, {"host": blocked, "proxy": settings}) as mounted:
            assert all(mounted.is_right(name) for name in NAMES)


def test_what_a_proxy_gives_instead_of_the_blob_comes_from_the_origin(tree: Tree, origin: Faulty) -> None:
    assert rows_of(PROXY) == ["proxy that answers 200 with a page"]
    Hub(tree, origin)
    with forward_proxy({origin.host: origin.host}) as proxy:
        proxy.instead = lambda path: Reply(200, {"Content-Type": "text/html"}, PAGE)
        secret = "proxy-passes-word"
        url = proxy.url.replace("://", f"://user:{secret}@")
        with Mounted(tree, {"host": origin.host, "proxy": {"url": url}}) as mounted:
            assert all(mounted.is_right(name) for name in NAMES)
            log = mounted.log()
            assert re.search(
                rf"blob {tree.blob_id}: {re.escape(origin.host)}: wrong answer: a page instead of the blob "
                rf"\(attempt \d+\), by proxy {re.escape(proxy.url)}; another way is tried",
                log,
            )
            assert mounted.wrong_in_cache() == []
            assert secret not in log and PASSWORD not in log
        assert all("proxy-authorization" not in request.headers for request in origin.requests)
        assert len(proxy.asked) >= 3, "after three failures it is left alone"


def test_a_registry_with_tls_is_reached_through_a_tunnel(tmp_path: Path) -> None:
    """The proxy sees neither requests nor credentials; the certificate is the registry's own."""
    authority = Authority(tmp_path / "tls")
    blob = Blob(50_000)
    with faulty(authority.server_context()) as origin, forward_proxy({origin.host: origin.host}) as proxy:
        origin.program(blob.path, lambda request: part_of(blob.data, request))
        with registry_backend(
            origin.host, scheme="https", ca_cert_files=[str(authority.ca_file)], proxy={"url": proxy.url}
        ) as backend:
            reader = backend.get_reader(blob.id)
            assert bytes(reader.read(0, 30_000)) == blob.data[:30_000]
            assert bytes(reader.read(30_000, 20_000)) == blob.data[30_000:]
            assert backend.metrics.retries.total() == 0
        assert proxy.tunnels == 1 and proxy.passed > len(blob.data) and not proxy.asked
        assert origin.connections == 1
