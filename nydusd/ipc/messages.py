"""The messages between the processes of a daemon, over ZeroMQ.

Two ROUTER sockets of the supervisor, both `ipc://` in the run-time folder (mode 0700). `front`: front ends ask for chunks
(kinds R, X, F; answered with A) and the API process asks for control operations (C, answered with C). `work`: workers
announce themselves (H), take jobs (J) and report them (D). A message is a list of frames, the first one byte, the kind.

All requests are idempotent: a client that hears nothing sends the same request, with the same number, again.
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

from nydusd.errors import InternalError

REQUEST = b"R"  # frame 2: struct REQUEST_BODY
CANCEL = b"X"  # frame 2: u64 request number
RELEASE = b"F"  # frame 2: u64 slot lease
ANSWER = b"A"  # frame 2: struct ANSWER_BODY, frame 3: slot (JSON) if data travels in shared memory
CONTROL = b"C"  # frame 2: u64 request number, frame 3: JSON
HELLO = b"H"  # frame 2: JSON {"role", "pid", "protocol"}
JOB = b"J"  # frame 2: JSON
DONE = b"D"  # frame 2: JSON

REQUEST_BODY = struct.Struct("<QQQIB")  # request number, blob handle, first chunk, count, flags
ANSWER_BODY = struct.Struct("<Qi")  # request number, errno (0 = the chunks are ready)
NUMBER = struct.Struct("<Q")

PROTOCOL = 5
"""Version of all that supervisor and workers say to each other, and of the workers' specs. A worker says its own with HELLO:
one of another release is not put beside a supervisor that would not understand it, nor one of before 4, which does not say that
its disk may not have what it has written. A daemon that succeeds one of another version has workers of its own."""

LOST = 1
"""Request flag: the cache file did not hold what the chunk map promises. Forget these chunks and fetch them again."""

UNREADABLE = 4
"""Request flag: the disk does not give what the cache file has of these chunks. Get them past that file."""

AHEAD = 2
"""Request flag: a reader goes on sequentially and will want what is behind these chunks. Nothing is answered."""

SYNC = 8
"""Request flag: no chunk is wanted. Answered with 0 when all that is ready in the blob's segment now is on its disk.

With LOST: at once, since some of it is lost."""

Json = dict[str, Any]


class SlotRef(NamedTuple):
    """Data that travels in shared memory: chunks of one blob, each at an offset in the arena.

    `lease` is given back with RELEASE. `chunks` holds (chunk, arena offset, length).
    """

    lease: int
    arena: str
    handle: int
    chunks: list[tuple[int, int, int]]


def encode(message: Json) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def decode(frame: bytes) -> Json:
    """The JSON object of a frame from another process of ours. Raises InternalError for anything else."""
    try:
        message = json.loads(frame)
    except ValueError as e:
        raise InternalError(f"message is not JSON: {frame[:80]!r}") from e
    if not isinstance(message, dict):
        raise InternalError(f"message is not an object: {frame[:80]!r}")
    return message
