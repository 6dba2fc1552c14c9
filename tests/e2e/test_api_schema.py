"""The API against its own description: whatever it is sent, the answer is one that the description knows."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from nydusd.control.routes import DESCRIPTION, ROUTES
from tests.support import oracle
from tests.support.daemon import Daemon
from tests.support.discipline import wait_until
from tests.support.singleton import Singleton, entry

SCHEMA = schemathesis.openapi.from_path(Path(__file__).resolve().parents[2] / "docs" / "openapi.yaml")
CHECKS: list[CheckFunction] = [content_type_conformance, response_schema_conformance, status_code_conformance]
IMAGE = oracle.image("v6-zstd-blake3")


class _Bridge(socketserver.ThreadingTCPServer):
    """Hands each TCP connection on to the unix socket: the client of the tests knows no other."""

    daemon_threads = False
    path = ""


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Bridge)
        with socket.socket(socket.AF_UNIX) as inner:
            inner.connect(self.server.path)
            back = threading.Thread(target=_copy, args=(inner, self.request))
            back.start()
            _copy(self.request, inner)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
    finally:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def blobs(daemon: Daemon) -> list[dict[str, object]]:
    answer = daemon.get("/api/v1/nydusd/cache")
    assert isinstance(answer, dict)
    return list(answer["blobs"])


@contextlib.contextmanager
def reached(daemon: Daemon) -> Iterator[str]:
    """The address of a daemon that runs; it lives at the end."""
    with daemon:
        bridge = _Bridge(("127.0.0.1", 0), _Handler)
        bridge.path = str(daemon.apisock)
        thread = threading.Thread(target=bridge.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{bridge.server_address[1]}"
            assert isinstance(daemon.get("/api/v1/daemon"), dict), "the daemon is harmed"
        finally:
            bridge.shutdown()
            thread.join()
            bridge.server_close()


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    daemon = Daemon(IMAGE.bootstrap, IMAGE.blobs)
    with reached(daemon) as address:
        wait_until(lambda: all(row["state"] == "ready" for row in blobs(daemon)), "the blob to be opened")
        yield address


@pytest.fixture(scope="module")
def singleton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with reached(Singleton(entry("first", IMAGE, tmp_path_factory.mktemp("cache")))) as address:
        yield address


def test_each_route_is_described_and_no_other() -> None:
    described = {path: set(methods) - {"parameters"} for path, methods in SCHEMA.raw_schema["paths"].items()}
    served = {path: {method.lower() for method in methods} for path, methods in ROUTES.items()}
    assert described == {**served, DESCRIPTION: {"get"}}


@SCHEMA.exclude(operation_id="exit").parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_every_answer_is_described(case: schemathesis.Case[Any], base: str) -> None:
    case.call_and_validate(base_url=base, checks=CHECKS)


@SCHEMA.include(tag=["blobs", "operator"]).exclude(operation_id="upgradeWorkers").parametrize()
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_every_answer_of_a_singleton_is_described(case: schemathesis.Case[Any], singleton: str) -> None:
    case.call_and_validate(base_url=singleton, checks=CHECKS)


def test_the_description_is_served_as_it_is_in_docs(base: str) -> None:
    operation = SCHEMA["/api/openapi.yaml"]["GET"]
    response = operation.Case().call(base_url=base)
    assert response.text == (Path(__file__).resolve().parents[2] / "docs" / "openapi.yaml").read_text()
