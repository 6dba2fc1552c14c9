"""The limits of the API's loop that would take too long or too many clients to reach: lowered, in this process."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import zmq

from nydusd.control import server as server_module
from nydusd.control.routes import ROUTES, Call
from nydusd.control.server import ApiServer
from nydusd.ipc.silent import SilentLine
from tests.support.api import Wire
from tests.support.discipline import wait_until


class Running:
    """An `ApiServer` in a thread, its supervisor silent."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "s")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._context = zmq.Context()
        dealer = self._context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.connect(f"ipc://{folder}/front")
        self._dealer = dealer
        self._lifeline_out, self._lifeline = os.pipe()
        self._metrics = socket.create_server(("127.0.0.1", 0))
        self.metrics: tuple[str, int] = self._metrics.getsockname()
        self.server = ApiServer(self._listener, dealer, self._lifeline_out, SilentLine(None, 0), self._metrics)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()

    def stop(self) -> None:
        os.close(self._lifeline)
        self._thread.join(30)
        assert not self._thread.is_alive()
        os.close(self._lifeline_out)
        self._dealer.close()
        self._context.term()
        self._listener.close()
        self._metrics.close()


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(server_module, "REQUEST_PATIENCE", 0.2)
    monkeypatch.setattr(server_module, "SUPERVISOR_PATIENCE", 0.2)
    monkeypatch.setattr(server_module, "_MAX_CLIENTS", 3)
    monkeypatch.setattr(server_module, "_MAX_METRICS_CLIENTS", 2)
    monkeypatch.setattr(server_module, "_ACCEPT_PAUSE", 0.1)
    process = Running(tmp_path)
    yield process
    process.stop()


@pytest.mark.parametrize(
    "sent", ["G", "GET / HTTP/1.1\r\nHost: x\r\n", "PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n1"]
)
def test_half_sent_request_times_out_and_an_idle_connection_does_not(running: Running, sent: str) -> None:
    with Wire(running.path) as idle, Wire(running.path) as slow:
        assert idle.ask("GET", "/nowhere").status == 404
        slow.send(sent)
        response = slow.response()
        assert (response.status, response.message) == (408, "BadRequest")
        assert slow.at_end()
        assert idle.is_open()
        assert idle.ask("GET", "/nowhere").status == 404


def test_refused_client_that_never_leaves_is_closed(running: Running) -> None:
    with Wire(running.path) as wire:
        wire.send("PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n")
        assert wire.response().status == 413
        wait_until(lambda: not running.server._clients(), "end of the connection")


def test_client_over_the_limit_is_served_when_another_leaves(running: Running) -> None:
    with Wire(running.path) as one, Wire(running.path) as two, Wire(running.path) as three, Wire(running.path) as four:
        for wire in (one, two, three):
            assert wire.ask("GET", "/nowhere").status == 404
        four.send("GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        assert three.ask("GET", "/nowhere").status == 404
        assert four.is_open()
        two.sock.close()
        assert four.response().status == 404


def test_clients_of_the_metrics_port_keep_nobody_from_the_api(running: Running) -> None:
    with Wire(running.metrics) as one, Wire(running.metrics) as two, Wire(running.metrics) as three:
        three.send("GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: len(running.server._clients()) == 2, "as many as there is room for")
        with Wire(running.path) as wire:
            assert wire.ask("GET", "/nowhere").status == 404
            assert three.is_open()
            one.sock.close()
            assert three.response().status == 404
            assert two.is_open()
            assert wire.ask("GET", "/nowhere").status == 404


@pytest.mark.parametrize("asks", [False, True])
def test_client_of_the_metrics_port_that_does_nothing_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    monkeypatch.setattr(server_module, "METRICS_PATIENCE", 0.2)
    process = Running(tmp_path)
    try:
        with Wire(process.metrics) as wire:
            if asks:
                assert wire.ask("GET", "/nowhere").status == 404
            assert wire.at_end()
    finally:
        process.stop()


def test_client_of_the_metrics_port_may_send_no_body(running: Running) -> None:
    for sent in ("Content-Length: 1\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"):
        with Wire(running.metrics) as wire:
            wire.send(f"PUT /metrics HTTP/1.1\r\nHost: x\r\n{sent}")
            assert wire.response().status == 413
            assert wire.at_end()


def test_a_bug_of_ours_costs_one_answer(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as that the description of the API is away while a package is being upgraded."""

    def fails(*_: object) -> NoReturn:
        raise FileNotFoundError("openapi.yaml")

    with Wire(running.path) as wire, Wire(running.path) as other:
        with monkeypatch.context() as patch:
            patch.setattr(server_module, "resolve", fails)
            assert wire.ask("GET", "/api/openapi.yaml").status == 500
        assert wire.ask("GET", "/nowhere").status == other.ask("GET", "/nowhere").status == 404
    assert "GET /api/openapi.yaml failed by a bug of ours" in caplog.text


def test_a_body_that_can_be_read_but_not_passed_on_is_refused(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    call = Call(ROUTES["/api/v1/nydusd/workers"]["PUT"], {"wanted": deep})
    with Wire(running.path) as wire:
        with monkeypatch.context() as patch:
            patch.setattr(server_module, "resolve", lambda *_: call)
            assert wire.ask("PUT", "/api/v1/nydusd/workers", "{}").status == 400
        assert wire.ask("GET", "/nowhere").status == 404


def test_pipelined_questions_that_are_not_answered(running: Running) -> None:
    with Wire(running.path) as wire:
        wire.send("GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        assert [wire.response().status for _ in range(3)] == [503, 503, 503]
        assert wire.is_open()


def test_what_is_not_answered_when_the_supervisor_ends_is_not_waited_for(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes next waits for our end."""
    for patience in ("SUPERVISOR_PATIENCE", "_LAST_WORDS"):
        monkeypatch.setattr(server_module, patience, 3600.0)
    with Wire(running.path) as wire:
        wire.send("PUT /api/v1/nydusd/workers/upgrade HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        wait_until(lambda: bool(running.server._questions), "a question to the supervisor", 60)
        os.close(running._lifeline)
        running._lifeline = os.open(os.devnull, os.O_RDONLY)
        assert wire.at_end()
