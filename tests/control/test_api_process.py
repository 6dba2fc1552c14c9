"""The API process on a real socket: HTTP as clients speak it, and as they should not."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nydusd.control import client as client_module
from tests.support.api import ApiProcess, Json, Wire
from tests.support.discipline import wait_until

REPLIES: dict[str, Json] = {
    "daemon": {"ok": {"id": None, "supervisor": None, "state": "RUNNING", "backend_collection": {}}},
    "set_log_level": {"ok": None},
    "start": {"error": {"status": 400, "message": 'UnexpectedEvent("Start")'}},
    "exit": {"ok": None},
    "cache": {"ok": {"blobs": [{"blob_id": "x" * 300_000}]}},
}


def handler(request: Json) -> Json | None:
    return REPLIES.get(str(request["op"]))


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiProcess]:
    with ApiProcess(tmp_path, handler) as process:
        yield process


@pytest.fixture
def wire(api: ApiProcess) -> Iterator[Wire]:
    with api.connect() as wire:
        yield wire


def test_answer_looks_as_clients_expect(wire: Wire) -> None:
    response = wire.ask("GET", "/api/v1/daemon")
    assert response.status_line == "HTTP/1.1 200 "
    assert response.headers == {
        "server": "Nydus API",
        "connection": "keep-alive",
        "content-type": "application/json",
        "content-length": str(len(response.body)),
    }
    assert response.json["state"] == "RUNNING"
    assert set(response.json) == {"version", "id", "supervisor", "state", "backend_collection"}


def test_connection_is_kept_for_the_next_request(wire: Wire) -> None:
    assert wire.ask("GET", "/api/v1/daemon").status == 200
    assert wire.ask("GET", "/nowhere").status == 404
    assert wire.ask("PUT", "/api/v1/daemon", '{"log_level":"warn"}').status == 204
    assert wire.ask("GET", "/api/v1/daemon").status == 200
    assert wire.is_open()


def test_success_without_body_has_neither_length_nor_type(wire: Wire) -> None:
    response = wire.ask("PUT", "/api/v1/daemon", '{"log_level":"info"}')
    assert response.status_line == "HTTP/1.1 204 "
    assert response.headers == {"server": "Nydus API", "connection": "keep-alive"}


def test_error_of_the_supervisor(wire: Wire) -> None:
    response = wire.ask("PUT", "/api/v1/daemon/start")
    assert response.status == 400
    assert response.message == 'Configure(DaemonAbnormal(UnexpectedEvent("Start")))'


def test_log_level_changes_in_this_process_too(api: ApiProcess, wire: Wire) -> None:
    wire.ask("PUT", "/api/v1/daemon", '{"log_level":"error"}')
    with api.connect() as other:
        other.send("nonsense\r\n\r\n")
        assert other.response().status == 400
    assert "DEBUG" not in api.log.read_text()


def test_http_1_0_is_answered_and_closed(wire: Wire) -> None:
    wire.send("GET /api/v1/daemon HTTP/1.0\r\n\r\n")
    response = wire.response()
    assert response.status == 200
    assert response.headers["connection"] == "close"
    assert wire.at_end()


def test_client_that_asks_for_the_end_gets_it(wire: Wire) -> None:
    wire.send("GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert wire.response().headers["connection"] == "close"
    assert wire.at_end()


def test_client_that_has_said_everything_still_gets_its_answer(wire: Wire) -> None:
    wire.send("GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\n\r\n")
    wire.sock.shutdown(socket.SHUT_WR)
    assert wire.response().status == 200
    assert wire.at_end()


def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    targets = ["/api/v1/daemon", "/nowhere", "/api/v1/daemon/backend"] * 40
    wire.send("".join(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n" for target in targets))
    assert [wire.response().status for _ in targets] == [200, 404, 400] * 40
    assert wire.is_open()


def test_more_pipelined_requests_than_one_turn(wire: Wire) -> None:
    wire.send("GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" * 500)
    assert [wire.response().status for _ in range(500)] == [404] * 500


def test_client_that_sends_on_while_it_waits_is_not_read(tmp_path: Path) -> None:
    with ApiProcess(tmp_path, lambda _: None) as api, api.connect() as wire:
        wire.send("GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: bool(api.supervisor.asked), "question")
        wire.sock.setblocking(False)
        sent = 0
        while select.select([], [wire.sock], [], 0.5)[1]:
            sent += wire.sock.send(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
            assert sent < 4 << 20


def test_head_has_no_body(wire: Wire) -> None:
    wire.send("HEAD /api/v1/daemon HTTP/1.1\r\nHost: x\r\n\r\nGET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
    while b"NoRoute" not in wire._got:
        wire._more()
    first, second = wire._got.split(b"\r\n\r\n", 1)
    assert first.startswith(b"HTTP/1.1 400 ")
    assert second.startswith(b"HTTP/1.1 404 ")


def test_body_is_asked_for_when_the_client_waits_for_it(wire: Wire) -> None:
    body = '{"log_level":"info"}'
    wire.send(f"PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n")
    assert wire.response().status == 100
    wire.send(body)
    assert wire.response().status == 204


def test_chunked_body(wire: Wire) -> None:
    head = "PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    wire.send(head + '8\r\n{"log_le\r\nc\r\nvel":"info"}\r\n0\r\n\r\n')
    assert wire.response().status == 204


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"hello\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /api/v1/daemon HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400),
        (b"GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET /" + b"a" * 100_000, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000, 431),
    ],
)
def test_garbage_is_refused_and_the_connection_ends(wire: Wire, sent: bytes, status: int) -> None:
    wire.send(sent)
    response = wire.response()
    assert response.status == status
    assert response.message == "BadRequest"
    assert response.headers["connection"] == "close"
    assert wire.at_end()


def test_garbage_after_a_good_request(wire: Wire) -> None:
    wire.send("GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n\0\0\0\r\n\r\n")
    assert wire.response().status == 404
    assert wire.response().status == 400
    assert wire.at_end()


@pytest.mark.parametrize(
    "framing",
    ["Content-Length: 1048577\r\n\r\n", "Content-Length: 99999999999999999999\r\n\r\n"],
)
def test_too_long_body_is_refused_by_its_announcement(wire: Wire, framing: str) -> None:
    wire.send("PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\n" + framing)
    response = wire.response()
    assert (response.status, response.message) == (413, "BadRequest")
    assert wire.at_end()


def test_too_long_body_is_refused_when_it_is_not_announced(wire: Wire) -> None:
    wire.send("PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(40):
        wire.send(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
    assert wire.response().status == 413


def test_client_that_sends_a_too_long_body_to_its_end_reads_the_refusal(wire: Wire) -> None:
    wire.send(b"PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nContent-Length: 8388608\r\n\r\n" + b" " * 8388608)
    assert wire.response().status == 413


def test_longest_body_is_accepted(wire: Wire) -> None:
    body = '{"log_level":"info"}'.ljust(client_module.MAX_BODY)
    assert wire.ask("PUT", "/api/v1/daemon", body).status == 204


def test_slow_clients_delay_nobody(api: ApiProcess) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(api.connect()) for _ in range(20)]
        for number, wire in enumerate(slow):
            wire.send("PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{"[: 10 + 4 * number])
        # Three that do not read what they asked for: far more than a socket buffers.
        deaf = [stack.enter_context(api.connect()) for _ in range(3)]
        for wire in deaf:
            wire.send("GET /api/v1/nydusd/cache HTTP/1.1\r\nHost: x\r\n\r\n" * 30)
        quick = stack.enter_context(api.connect())
        for _ in range(50):
            assert quick.ask("GET", "/api/v1/daemon").status == 200
        for wire in deaf:
            assert [len(wire.response().body) for _ in range(30)] == [300_000 + len('{"blobs":[{"blob_id":""}]}')] * 30
        slow[0].send(
            "PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n"[10:] + '{"log_level":"info"}'
        )
        assert slow[0].response().status == 204


def test_many_idle_connections_stay_open_while_others_work(api: ApiProcess) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(api.connect()) for _ in range(200)]
        for wire in idle:
            assert wire.ask("GET", "/api/v1/daemon").status == 200
        with api.connect() as other:
            for _ in range(100):
                assert other.ask("GET", "/nowhere").status == 404
        assert all(wire.is_open() for wire in idle)
        assert idle[7].ask("GET", "/api/v1/daemon").status == 200


def test_clients_that_leave_at_any_point_harm_nobody(api: ApiProcess) -> None:
    whole = b"GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\n\r\n"
    for cut in range(len(whole) + 1):
        with api.connect() as wire:
            wire.send(whole[:cut])
    with api.connect() as wire:
        assert wire.ask("GET", "/api/v1/daemon").status == 200
    wait_until(lambda: len(os.listdir(f"/proc/{api.process.pid}/fd")) < 25, "closed connections")


def test_supervisor_that_is_busy_delays_only_its_own_askers(tmp_path: Path) -> None:
    let_go = threading.Event()

    def stuck(request: Json) -> Json | None:
        if request["op"] == "cache":
            let_go.wait(30)
        return handler(request)

    with ApiProcess(tmp_path, stuck) as api, api.connect() as waiting, api.connect() as other:
        waiting.send("GET /api/v1/nydusd/cache HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: bool(api.supervisor.asked), "question")
        assert other.ask("GET", "/nowhere").status == 404
        assert other.ask("GET", "/api/v1/daemon/backend").status == 400
        let_go.set()
        assert waiting.response().status == 200


def test_supervisor_that_does_not_answer_is_503(tmp_path: Path) -> None:
    with ApiProcess(tmp_path, lambda _: None) as api, api.connect() as wire:
        response = wire.ask("GET", "/api/v1/daemon")
        assert (response.status, response.message) == (503, "DaemonInfo(DaemonAbnormal(NotReady))")
        assert wire.ask("GET", "/nowhere").status == 404
    assert "the supervisor did not answer 'daemon' in time" in api.log.read_text()


def test_answer_to_exit_is_on_the_wire_though_the_supervisor_is_gone(tmp_path: Path) -> None:
    cut: list[Callable[[], None]] = []

    def leaving(request: Json) -> Json | None:
        cut[0]()
        return handler(request)

    with ApiProcess(tmp_path, leaving) as api, api.connect() as idle, api.connect() as wire:
        cut.append(api.cut_lifeline)
        assert wire.ask("PUT", "/api/v1/daemon/exit").status == 204
        assert wire.at_end()
        assert idle.at_end()
        assert api.process.wait(30) == 0


def test_loss_of_the_supervisor_ends_the_process_and_every_connection(api: ApiProcess) -> None:
    with api.connect() as wire:
        assert wire.ask("GET", "/api/v1/daemon").status == 200
        api.cut_lifeline()
        assert wire.at_end()


def test_interrupt_of_the_terminal_is_left_to_the_supervisor(api: ApiProcess, wire: Wire) -> None:
    assert wire.ask("GET", "/api/v1/daemon").status == 200
    api.process.send_signal(signal.SIGINT)
    assert wire.ask("GET", "/api/v1/daemon").status == 200
