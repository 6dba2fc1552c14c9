"""Messages, specs and the front end's line to the supervisor, with a supervisor that the test plays."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from nydusd.errors import InternalError
from nydusd.ipc.arena import PAGE, Arena
from nydusd.ipc.client import ChunkClient, Reply
from nydusd.ipc.messages import (
    ANSWER,
    ANSWER_BODY,
    CANCEL,
    LOST,
    NUMBER,
    RELEASE,
    REQUEST,
    REQUEST_BODY,
    SlotRef,
    decode,
    encode,
)
from nydusd.ipc.spec import read_spec, supervisor_gone, write_spec
from nydusd.storage.api.io import ChunkRun
from tests.support.segments import segment_name


@pytest.mark.parametrize("frame", [b"", b"{", b"[]", b"1", b"\xff", b'"x"'])
def test_what_is_no_json_object_is_our_bug(frame: bytes) -> None:
    with pytest.raises(InternalError, match="message"):
        decode(frame)


def test_json_comes_back_as_it_was() -> None:
    message = {"kind": "fill", "chunks": [1, 2], "slot": None, "name": "ä"}
    assert decode(encode(message)) == message


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_spec_of_any_length_is_read_and_its_fd_closed(size: int) -> None:
    fd = write_spec({"text": "x" * size})
    assert read_spec(["--spec-fd", str(fd)]) == {"text": "x" * size}
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.mark.parametrize("argv", [[], ["--spec-fd"], ["--help", "3"], ["--spec-fd", "x"], ["--spec-fd", "-1"]])
def test_program_started_by_hand_says_so(argv: list[str]) -> None:
    with pytest.raises(InternalError, match="started by hand"):
        read_spec(argv)


@pytest.mark.parametrize("content", [b"", b"[]", b"{"])
def test_spec_that_is_no_object_is_our_bug(content: bytes) -> None:
    fd = os.memfd_create("spec")
    os.write(fd, content)
    with pytest.raises(InternalError):
        read_spec(["--spec-fd", str(fd)])


def test_supervisor_is_gone_when_its_end_of_the_pipe_is() -> None:
    out, into = os.pipe()
    assert not supervisor_gone(out)
    os.close(into)
    assert supervisor_gone(out)
    os.close(out)


class _Line:
    """A client, and the supervisor's end."""

    def __init__(self, folder: Path) -> None:
        self._context = zmq.Context()
        self.router = self._context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.setsockopt(zmq.RCVTIMEO, 10_000)
        self.router.bind(f"ipc://{folder}/front")
        self.client = ChunkClient(f"ipc://{folder}/front", b"fuse-0-1")

    def close(self) -> None:
        self.client.close()
        self.router.close()
        self._context.term()

    def replies(self, count: int) -> list[Reply]:
        found: list[Reply] = []
        while len(found) < count:
            if not (more := self.client.replies()):
                ready, _, _ = select.select([self.client.fileno()], [], [], 10)
                assert ready, f"{found} have come, {count} should"
            found += more
        return found


@pytest.fixture
def line(tmp_path: Path) -> Iterator[_Line]:
    made = _Line(tmp_path)
    yield made
    made.close()


def test_requests_cancels_and_releases_arrive_in_order(line: _Line) -> None:
    assert line.client.request(ChunkRun(7, 1 << 40, 3)) == 1
    assert line.client.request(ChunkRun(7, 5, 1), LOST) == 2
    assert line.client.request(ChunkRun(7, 5, 1), LOST, number=2) == 2, "asked again under its number"
    line.client.cancel(2)
    line.client.release(SlotRef(9, "/x", 7, []))
    frames = [line.router.recv_multipart() for _ in range(5)]
    assert frames == [
        [b"fuse-0-1", REQUEST, REQUEST_BODY.pack(1, 7, 1 << 40, 3, 0)],
        [b"fuse-0-1", REQUEST, REQUEST_BODY.pack(2, 7, 5, 1, LOST)],
        [b"fuse-0-1", REQUEST, REQUEST_BODY.pack(2, 7, 5, 1, LOST)],
        [b"fuse-0-1", CANCEL, NUMBER.pack(2)],
        [b"fuse-0-1", RELEASE, NUMBER.pack(9)],
    ]


def test_all_replies_that_came_are_given(line: _Line) -> None:
    line.client.request(ChunkRun(7, 0, 1))
    line.router.recv_multipart()
    for number in range(100):
        line.router.send_multipart([b"fuse-0-1", ANSWER, ANSWER_BODY.pack(number, number % 3)])
    assert line.replies(100) == [Reply(number, number % 3, None) for number in range(100)]
    assert line.client.replies() == []


def test_data_in_a_slot_is_seen(line: _Line) -> None:
    with segment_name() as name:
        arena = Arena.create(name, 2 * PAGE)
        arena.view(PAGE, 4)[:] = b"data"
        line.client.request(ChunkRun(7, 0, 1))
        line.router.recv_multipart()
        slot = SlotRef(3, name, 7, [(0, PAGE, 4)])
        line.router.send_multipart([b"fuse-0-1", ANSWER, ANSWER_BODY.pack(1, 0), encode(slot._asdict())])
        (reply,) = line.replies(1)
        assert reply.slot == slot
        pieces = line.client.pieces(reply.slot)
        assert {chunk: bytes(view) for chunk, view in pieces.items()} == {0: b"data"}
        del pieces
        arena.close()
