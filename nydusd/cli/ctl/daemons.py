"""`nydusctl list`: the daemons of this node, by what each has written down of itself (`/run/nydusd`, or $NYDUSD_RUNTIME_DIR).

A line a daemon: the supervisor's pid, the state, the mount point (or what it serves in place of one), the API socket. The
state is what its API says, `silent` if that does not answer within a second, `no API` without `--apisock`, and `killed` where
the supervisor is gone, and the same command would go on with what it has left. `taken`: a daemon that was started later with
the same `--apisock` answers there, so this one cannot be asked any more. Needs no `--sock`.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nydusd.cli.ctl.connection import Api, Json, RequestFailed
from nydusd.cli.ctl.silent import records
from nydusd.cli.ctl.text import MISSING, one_line, printable, table, text_at
from nydusd.cli.ctl.verb import Verb
from nydusd.errors import NydusError
from nydusd.nursery.place import root

_PATIENCE: Final = 1.0


def run(_: Api, args: argparse.Namespace) -> Iterator[str]:
    rows = [_row(content) for _instance, content in records()]
    for row in rows:
        if row["state"] not in ("killed", "no API") and _answers_for_another(row, rows):
            row["state"] = "taken"
    if not rows:
        _refuse_if_hidden()
    if args.raw:
        yield one_line(rows)
    elif rows:
        head = ("PID", "STATE", "MOUNT POINT", "API SOCKET")
        yield table(head, [[text_at(row, key) for key in ("pid", "state", "mountpoint", "apisock")] for row in rows])
    else:
        yield f"no daemon has written anything down below {printable(root())}"


def _answers_for_another(row: Json, rows: list[Json]) -> bool:
    """Whether another one of these daemons listens at the API socket of this one."""
    others = [other["pid"] for other in rows if other["apisock"] == row["apisock"] and other["pid"] != row["pid"]]
    if not others:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(_PATIENCE)
        try:
            line.connect(str(row["apisock"]))
            listens, _, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError:
            return False
    return listens in others


def _refuse_if_hidden() -> None:
    """Raises NydusError if there may be daemons of which we may not read anything: another user's."""
    for folder in Path(root()).glob("*/"):
        if not os.access(folder, os.X_OK):
            raise NydusError(f"{folder}: Permission denied: run nydusctl as the daemon's user (root)")


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
