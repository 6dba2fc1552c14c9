"""`nydusctl list`: the daemons of this node, by what each has written down of itself (`/run/nydusd`, or $NYDUSD_RUNTIME_DIR).

A line a daemon: the supervisor's pid, the state, the mount point (or what it serves in place of one), the API socket. The
state is what its API says, `silent` if that does not answer within a second, `no API` without `--apisock`, and `killed` where
the supervisor is gone, and the same command would go on with what it has left. Needs no `--sock`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Final

from nydusd.cli.ctl.connection import Api, Json, RequestFailed
from nydusd.cli.ctl.silent import records
from nydusd.cli.ctl.text import MISSING, one_line, printable, table, text_at
from nydusd.cli.ctl.verb import Verb
from nydusd.nursery.place import root

_PATIENCE: Final = 1.0


def run(_: Api, args: argparse.Namespace) -> Iterator[str]:
    rows = [_row(content) for _instance, content in records()]
    if args.raw:
        yield one_line(rows)
    elif rows:
        head = ("PID", "STATE", "MOUNT POINT", "API SOCKET")
        yield table(head, [[text_at(row, key) for key in ("pid", "state", "mountpoint", "apisock")] for row in rows])
    else:
        yield f"no daemon has written anything down below {printable(root())}"


def _row(content: Json) -> Json:
    processes, socket = content.get("processes"), content.get("apisock")
    first = processes[0] if isinstance(processes, list) and processes else [0, 0]
    return {
        "pid": first[0],
        "state": _state(first, socket if isinstance(socket, str) else None),
        "mountpoint": content.get("mountpoint"),
        "apisock": socket,
    }


def _state(supervisor: object, socket: str | None) -> str:
    from nydusd.storage.state.lock import start_time

    if not (
        isinstance(supervisor, list) and isinstance(supervisor[0], int) and start_time(supervisor[0]) == supervisor[1]
    ):
        return "killed"
    if socket is None:
        return "no API"
    try:
        state = text_at(Api(socket, _PATIENCE).get("/api/v1/daemon"), "state")
    except RequestFailed:
        return "silent"
    return "silent" if state == MISSING else state


VERB = Verb(("list",), "the daemons of this node, and their API sockets", run, needs_socket=False)
