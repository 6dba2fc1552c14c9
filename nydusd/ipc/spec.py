"""How a child process gets to know its task: one JSON object in an inherited memfd (`--spec-fd N`).

Not in argv or the environment, which other users can read, and of any length.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Sequence

from nydusd.errors import InternalError
from nydusd.ipc.messages import Json, decode


def write_spec(spec: Json) -> int:
    """A memfd that holds `spec`; inheritable once passed on. The caller closes it."""
    fd = os.memfd_create("nydusd-spec")
    os.write(fd, json.dumps(spec).encode())
    return fd


def read_spec(argv: Sequence[str]) -> Json:
    """The spec named by `--spec-fd N` in argv; its fd is closed. `environment` in it, if any, becomes this process's."""
    if len(argv) < 2 or argv[0] != "--spec-fd" or not argv[1].isdecimal():
        raise InternalError("started by hand: this program is started by nydusd with --spec-fd N")
    fd = int(argv[1])
    try:
        spec = decode(os.pread(fd, os.fstat(fd).st_size, 0))
    finally:
        os.close(fd)
    os.environ.update(spec.pop("environment", {}))
    return spec


def supervisor_gone(lifeline_fd: int) -> bool:
    """Whether the supervisor has died: the other end of the lifeline pipe is closed."""
    poll = select.poll()
    poll.register(lifeline_fd, select.POLLIN)
    return bool(poll.poll(0))
